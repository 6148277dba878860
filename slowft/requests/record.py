"""`slowft.record(client)` makes an OpenAI client write down what it is asked and answered, in its own process.

The application gets what it would get without this: the client's own objects, streams and errors. A failure to record
is only logged (logger "slowft.requests").
"""

import atexit
import inspect
import json
import logging
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from . import prices as price_lists
from .store import RequestStore
from .streams import Pieces

Client = TypeVar("Client")

BUSY_S = 1.0  # the most seconds that the application waits while another program writes the file
RAW = "x-stainless-raw-response"  # the header that openai's with_raw_response and with_streaming_response add
NOT_BODY = ("extra_headers", "extra_query", "extra_body", "timeout")
NOT_GIVEN = ("NotGiven", "Omit")  # openai's classes for arguments that were left out
LOG = logging.getLogger("slowft.requests")


def record(
    client: Client,
    *,
    db: str | Path = "requests.db",
    tags: Mapping[str, str] | None = None,
    redact: Sequence[str] = (),
    prices: str | Path | Mapping[str, Any] | None = None,
) -> Client:
    """Make an `openai.OpenAI` or `AsyncOpenAI` record its chat and plain completions, streamed or not.

    Args:
        client: is changed and returned. `with_raw_response` and `with_streaming_response` are not recorded.
        db: the file, which is created if it does not exist.
        tags: the tags of every request. A request's `metadata` adds to them.
        redact: regular expressions. What they match is written as "[redacted]".
        prices: the file of a price list, or what `requests.prices.load` returns.

    Raises:
        DataError: the file cannot be opened.
    """
    if isinstance(prices, str | Path):
        prices = price_lists.load(prices)
    store = RequestStore(db, redact=redact, prices=prices, busy_s=BUSY_S)
    atexit.register(store.close)
    _wrap(client, store, dict(tags or {}))
    return client


def _wrap(client: Any, store: RequestStore, tags: dict[str, str]) -> None:
    base = urlsplit(str(getattr(client, "base_url", ""))).path.rstrip("/")
    is_async = hasattr(client, "__aenter__")
    for resource, path in ((client.chat.completions, "/chat/completions"), (client.completions, "/completions")):
        inner = resource.create
        make = _async_create if is_async else _create
        resource.create = make(inner, store, f"{base}{path}", tags)
    for name in ("copy", "with_options"):  # a copy records too
        setattr(client, name, _copying(getattr(client, name), store, tags))


def _copying(inner: Any, store: RequestStore, tags: dict[str, str]) -> Any:
    def copy(*args, **kwargs):
        client = inner(*args, **kwargs)
        _wrap(client, store, tags)
        return client

    return copy


def _create(inner: Any, store: RequestStore, path: str, tags: dict[str, str]) -> Any:
    def create(*args, **kwargs):
        if _is_raw(kwargs):
            return inner(*args, **kwargs)
        recording = _Recording(store, path, kwargs, tags)
        try:
            answer = inner(*args, **kwargs)
        except BaseException as e:
            recording.failed(e)
            raise
        if not recording.is_stream(answer):
            recording.answered(answer)
        else:
            _after_close(answer, recording)
            answer._iterator = _recorded(answer._iterator, recording)
        return answer

    return create


def _async_create(inner: Any, store: RequestStore, path: str, tags: dict[str, str]) -> Any:
    async def create(*args, **kwargs):
        if _is_raw(kwargs):
            return await inner(*args, **kwargs)
        recording = _Recording(store, path, kwargs, tags)
        try:
            answer = await inner(*args, **kwargs)
        except BaseException as e:
            recording.failed(e)
            raise
        if not recording.is_stream(answer):
            recording.answered(answer)
        else:
            _after_async_close(answer, recording)
            answer._iterator = _recorded_async(answer._iterator, recording)
        return answer

    return create


def _recorded(chunks: Iterator[Any], recording: "_Recording") -> Iterator[Any]:
    try:
        for chunk in chunks:
            recording.add(chunk)
            yield chunk
    except BaseException as e:
        recording.failed(e)
        raise
    recording.ended()


async def _recorded_async(chunks: AsyncIterator[Any], recording: "_Recording") -> AsyncIterator[Any]:
    try:
        async for chunk in chunks:
            recording.add(chunk)
            yield chunk
    except BaseException as e:
        recording.failed(e)
        raise
    recording.ended()


def _after_close(stream: Any, recording: "_Recording") -> None:
    """Record a stream that is closed before its end as cut off. (At the end of a `with`, it is closed once more.)"""
    inner = stream.close

    def close():
        inner()
        recording.failed(GeneratorExit())

    stream.close = close


def _after_async_close(stream: Any, recording: "_Recording") -> None:
    inner = stream.close

    async def close():
        await inner()
        recording.failed(GeneratorExit())

    stream.close = close


def _is_raw(kwargs: Mapping[str, Any]) -> bool:
    headers = kwargs.get("extra_headers")
    return isinstance(headers, Mapping) and any(str(name).lower() == RAW for name in headers)


class _Recording:
    """One request on its way into the file. No failure in here reaches the application."""

    def __init__(self, store: RequestStore, path: str, kwargs: dict[str, Any], tags: Mapping[str, str]):
        self._store, self._id, self._pieces = store, None, Pieces()
        with _quietly():
            body = _body(kwargs)
            metadata = body.get("metadata")
            tags = {**tags, **(metadata if isinstance(metadata, dict) else {})}
            self._id = store.begin(path=path, body=body, source="client", tags=tags)

    def is_stream(self, answer: Any) -> bool:
        """Whether an answer is a stream, whose chunks can be recorded as they pass."""
        return hasattr(answer, "_iterator") and hasattr(answer, "close")

    def add(self, chunk: Any) -> None:
        with _quietly():
            self._pieces.add(_plain(chunk))

    def answered(self, answer: Any) -> None:
        with _quietly():
            self._finish(response=_plain(answer), status_code=200)

    def ended(self) -> None:
        with _quietly():
            self._finish(response=self._pieces.response(), status_code=200)

    def failed(self, error: BaseException) -> None:
        """The service raised an error, or the application wanted no more."""
        with _quietly():
            is_cut_off = not isinstance(error, Exception)
            code, body = getattr(error, "status_code", None), getattr(error, "body", None)
            response = self._pieces.response()
            if response is None and isinstance(body, dict):
                response = {"error": body}
            text = None if is_cut_off else f"{type(error).__name__}: {error}"
            self._finish(response=response, status_code=code, error=text, is_broken=is_cut_off)

    def _finish(self, **how) -> None:
        id, self._id = self._id, None  # only once: a stream that has ended is closed after that
        if id is not None and not self._store.is_closed:  # closed as the process ends: the row is broken
            self._store.finish(id, **how)


@contextmanager
def _quietly() -> Iterator[None]:
    """Log what goes wrong, and let the application go on."""
    try:
        yield
    except Exception as e:
        LOG.warning("a request was not recorded: %s", e)


def _body(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The body that is sent for these arguments of `create`. Iterators among them are replaced by lists."""
    for name, value in kwargs.items():
        if inspect.isgenerator(value) or (isinstance(value, Iterator) and not isinstance(value, Sequence)):
            kwargs[name] = list(value)
    body = {k: v for k, v in kwargs.items() if k not in NOT_BODY and type(v).__name__ not in NOT_GIVEN}
    if isinstance(kwargs.get("extra_body"), Mapping):
        body |= kwargs["extra_body"]
    return json.loads(json.dumps(body, default=_plain))


def _plain(value: Any) -> Any:
    """A value as JSON has it. openai's models give what was sent."""
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json", exclude_unset=True, warnings=False)
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, set | frozenset | tuple) or hasattr(value, "__iter__"):
        return list(value)
    return str(value)
