"""Writes down what was asked and answered, on a thread of its own: whatever goes wrong there, no answer waits for it.

Comes in: bodies of requests, answers as they went out. Goes out: rows of a `RequestStore`. Keys and cookies never come
in here, since headers do not, but for tags.
"""

import json
import queue
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from . import answers

WAITING = 10_000  # requests and answers that wait to be written; what comes then is lost, and counted
BEGUN_S = 1.0  # that an answer waits, at most, for its request to be in the file
TAGS = 50  # of one request
TAG_CHARACTERS = 512


@dataclass
class Answered:
    """How a request ended.

    Attributes:
        status: that was sent; None: nothing was.
        body: of the answer, in the `coding` that its headers say; None: it was too long to be kept.
        error: why there is none, or not all of it. is_broken: it ended before it was whole.
    """

    status: int | None
    body: bytes | None
    content_type: str = ""
    coding: str = ""
    error: str | None = None
    is_broken: bool = False


class Record:
    """One request that is written down. Made by `Recorder.begin`."""

    def __init__(self, recorder: "Recorder", about: dict[str, Any]):
        self._recorder, self.about = recorder, about
        self.row: int | None = None
        self.is_begun = threading.Event()

    def wait(self) -> None:
        """Until the request is in the file, so that a crash does not lose it; once at most where that takes long."""
        if self._recorder.is_prompt:
            self._recorder.is_prompt = self.is_begun.wait(BEGUN_S)

    def finish(self, answered: Answered) -> None:
        self._recorder._put(lambda: self._recorder._finish(self, answered), is_last=True)


class Recorder:
    """Writes to a store, in the order in which things happened.

    Args:
        store: a `RequestStore`. on_trouble: told the first time that something could not be written.

    Attributes:
        written, lost: requests. is_well: the last one was written. is_prompt: answers may wait for that.
    """

    def __init__(self, store: Any, on_trouble: Callable[[str], None] = lambda text: None):
        self.store, self._on_trouble = store, on_trouble
        self.written = self.lost = 0
        self.is_well = self.is_prompt = True
        self._queue: queue.Queue[tuple[Callable[[], None], bool] | None] = queue.Queue(WAITING)
        self._thread = threading.Thread(target=self._run, name="slowft-recorder", daemon=True)
        self._thread.start()

    def begin(self, path: str, body: bytes, source: str, tags: Mapping[str, str]) -> Record:
        """A request came. Its row is there as soon as the thread gets to it."""
        record = Record(self, {"path": path, "body": body, "source": source, "tags": dict(tags)})
        self._put(lambda: self._begin(record), is_last=False)
        return record

    def close(self, timeout_s: float) -> bool:
        """Write what waits, for so long at most; whether all was written."""
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
        while (found := self._queue.get()) is not None:
            work, is_last = found
            try:
                work()
            except Exception as e:  # whatever it is, the application must not notice
                self._failed(next(iter(str(e).splitlines()), "") or type(e).__name__, is_last)

    def _begin(self, record: Record) -> None:
        try:
            record.row = self.store.begin(**record.about)
            self.is_well = self.is_prompt = True
        finally:
            record.is_begun.set()

    def _finish(self, record: Record, answered: Answered) -> None:
        if record.row is None:
            record.row = self.store.begin(**record.about)  # perhaps it can be written now
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
    """What a stream that began well ended with."""
    error = None if response is None else response.get("error")
    if isinstance(error, dict):
        return str(error.get("message") or error)
    return None if error is None else str(error)


def tags_of(header: str | None, body: Any) -> dict[str, str]:
    """Of `op-tags`, a JSON object or k=v,..., and of the body's `metadata`. What is no tag is left out."""
    found: dict[Any, Any] = {}
    metadata = body.get("metadata") if isinstance(body, dict) else None
    if isinstance(metadata, dict):
        found |= metadata
    if header:
        try:
            said = json.loads(header)
        except (ValueError, RecursionError):
            said = dict(part.strip().split("=", 1) for part in header.split(",") if "=" in part)
        if isinstance(said, dict):
            found |= said
    tags = {}
    for name, value in found.items():
        if isinstance(value, str | int | float | bool) and str(name).strip():
            text = value if isinstance(value, str) else json.dumps(value)
            tags[str(name).strip()[:TAG_CHARACTERS]] = text[:TAG_CHARACTERS]
    return dict(list(tags.items())[:TAGS])
