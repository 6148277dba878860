"""Writes down requests and answers, on a thread of its own. Whatever goes wrong there, the answers go on.

Comes in: bodies of requests, answers as they went out. Goes out: rows of a `RequestStore`. Of the headers only tags
come in here, so keys and cookies never do.
"""

import json
import queue
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import first_line
from . import answers

WAITING = 10_000  # requests and answers that wait to be written at most; further ones are lost, and counted
BEGUN_S = 1.0  # seconds that an answer waits at most until its request is in the file
TAGS = 50  # of one request
TAG_CHARACTERS = 512


@dataclass
class Answered:
    """How a request ended.

    Attributes:
        status: that was sent; None: nothing was sent.
        body: of the answer, in the `coding` of its headers; None: it was too long to be kept.
        error: why the answer is missing or not whole. is_broken: it ended before it was whole.
    """

    status: int | None
    body: bytes | None
    content_type: str = ""
    coding: str = ""
    error: str | None = None
    is_broken: bool = False


class Record:
    """One request that is being recorded. Made by `Recorder.begin`."""

    def __init__(self, recorder: "Recorder", about: dict[str, Any]):
        self._recorder, self.about = recorder, about
        self.row: int | None = None
        self.is_begun = threading.Event()

    def wait(self) -> None:
        """Wait until the request is in the file, so that a crash does not lose it.

        Once this took longer than `BEGUN_S`, no request waits until one was written in time again.
        """
        if self._recorder.is_prompt:
            self._recorder.is_prompt = self.is_begun.wait(BEGUN_S)

    def finish(self, answered: Answered) -> None:
        self._recorder._put(lambda: self._recorder._finish(self, answered), is_last=True)


class Recorder:
    """Writes to a store, in the order in which things happened.

    Args:
        store: a `RequestStore`. on_trouble: is called with a line when writing begins to fail.

    Attributes:
        written, lost: numbers of requests. is_well: the last one was written.
        is_prompt: writing is fast enough for answers to wait for it.
    """

    def __init__(self, store: Any, on_trouble: Callable[[str], None] = lambda text: None):
        self.store, self._on_trouble = store, on_trouble
        self.written = self.lost = 0
        self.is_well = self.is_prompt = True
        self._queue: queue.Queue[tuple[Callable[[], None], bool] | None] = queue.Queue(WAITING)
        self._thread = threading.Thread(target=self._run, name="slowft-recorder", daemon=True)
        self._thread.start()

    def begin(self, path: str, body: bytes, source: str, tags: Mapping[str, str]) -> Record:
        """Begin the record of a request. The thread adds its row to the file."""
        record = Record(self, {"path": path, "body": body, "source": source, "tags": dict(tags)})
        self._put(lambda: self._begin(record), is_last=False)
        return record

    def close(self, timeout_s: float) -> bool:
        """Write what waits, within so many seconds; returns whether all was written."""
        try:
            self._queue.put(None, timeout=timeout_s)
        except queue.Full:
            return False
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    # --- Underneath -----------------------------------------------------------------------------------

    def _put(self, work: Callable[[], None], is_last: bool) -> None:
        try:
            self._queue.put_nowait((work, is_last))
        except queue.Full:
            self._failed(f"{WAITING} requests wait to be written", is_last)

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            work, is_last = item
            try:
                work()
            except Exception as e:  # whatever went wrong, the application must not notice it
                self._failed(first_line(e), is_last)

    def _begin(self, record: Record) -> None:
        try:
            record.row = self.store.begin(**record.about)
            self.is_well = self.is_prompt = True
        finally:
            record.is_begun.set()

    def _finish(self, record: Record, answered: Answered) -> None:
        if record.row is None:
            record.row = self.store.begin(**record.about)  # the first try failed, and this one may not
        response = None
        if answered.body is not None:
            response = answers.read(answered.body, answered.content_type, answered.coding)
        error = answered.error or error_in(response)
        self.store.finish(
            record.row, response=response, status_code=answered.status, error=error, is_broken=answered.is_broken
        )
        self.written += 1
        self.is_well = True

    def _failed(self, why: str, is_lost: bool) -> None:
        self.lost += is_lost
        if self.is_well:
            self._on_trouble(f"Recording failed, answers go on: {why}")
        self.is_well = False


def error_in(response: dict[str, Any] | None) -> str | None:
    """The error in a response, such as at the end of a stream that began well; None: there is none."""
    error = None if response is None else response.get("error")
    if isinstance(error, dict):
        return str(error.get("message") or error)
    return None if error is None else str(error)


def tags_of(header: str | None, body: Any) -> dict[str, str]:
    """Tags in the header `op-tags` (a JSON object or k=v,...) and in the body's `metadata`; the rest is left out."""
    given: dict[Any, Any] = {}
    metadata = body.get("metadata") if isinstance(body, dict) else None
    if isinstance(metadata, dict):
        given |= metadata
    if header:
        try:
            of_header = json.loads(header)
        except (ValueError, RecursionError):
            of_header = dict(part.strip().split("=", 1) for part in header.split(",") if "=" in part)
        if isinstance(of_header, dict):
            given |= of_header
    tags = {}
    for name, value in given.items():
        if isinstance(value, str | int | float | bool) and str(name).strip():
            text = value if isinstance(value, str) else json.dumps(value)
            tags[str(name).strip()[:TAG_CHARACTERS]] = text[:TAG_CHARACTERS]
    return dict(list(tags.items())[:TAGS])
