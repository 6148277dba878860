"""`slowft.record(client)`: an OpenAI client that writes down what it is asked and answered, in its own process.

What the application gets is what it would get without: the client's own objects, streams and errors. A failure to
record is logged (logger "slowft.requests") and nothing else.
"""

import atexit
import inspect
import json
import logging
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from . import prices as price_lists
from .store import RequestStore
from .streams import Pieces

Client = TypeVar("Client")

BUSY_S = 1.0  # that the application waits for a file which another program is writing, at most
RAW = "x-stainless-raw-response"  # header by which openai's with_raw_response and with_streaming_response ask
NOT_BODY = ("extra_headers", "extra_query", "extra_body", "timeout")
NOT_GIVEN = ("NotGiven", "Omit")  # openai's classes of arguments that were left out
LOG = logging.getLogger("slowft.requests")


def record(
    client: Client,
    *,
    db: str | Path = "requests.db",
    tags: Mapping[str, str] | None = None,
    redact: Sequence[str] = (),
    prices: str | Path | Mapping[str, Any] | None = None,
) -> Client:
    """Have an `openai.OpenAI` or `AsyncOpenAI` record its chat and plain completions, streamed or not.

    Args:
        client: is changed, and returned. `with_raw_response` and `with_streaming_response` are left as they are.
        db: the file, which is made if it is not there.
        tags: of every request; `metadata` of a request adds to them.
        redact: regular expressions; what they match is written as "[redacted]".
        prices: a price list's file, or what `requests.prices.load` gives.

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
        one = _Recording(store, path, kwargs, tags)
        try:
            answer = inner(*args, **kwargs)
        except BaseException as e:
            one.failed(e)
            raise
        if not one.is_stream(answer):
            one.answered(answer)
        else:
            _after_close(answer, one)
            answer._iterator = _followed(answer._iterator, one)
        return answer

    return create


def _async_create(inner: Any, store: RequestStore, path: str, tags: dict[str, str]) -> Any:
    async def create(*args, **kwargs):
        if _is_raw(kwargs):
            return await inner(*args, **kwargs)
        one = _Recording(store, path, kwargs, tags)
        try:
            answer = await inner(*args, **kwargs)
        except BaseException as e:
            one.failed(e)
            raise
        if not one.is_stream(answer):
            one.answered(answer)
        else:
            _after_async_close(answer, one)
            answer._iterator = _followed_async(answer._iterator, one)
        return answer

    return create


def _followed(chunks: Iterator[Any], one: "_Recording") -> Iterator[Any]:
    try:
        for chunk in chunks:
            one.piece(chunk)
            yield chunk
    except BaseException as e:
        one.failed(e)
        raise
    one.ended()


async def _followed_async(chunks: AsyncIterator[Any], one: "_Recording") -> AsyncIterator[Any]:
    try:
        async for chunk in chunks:
            one.piece(chunk)
            yield chunk
    except BaseException as e:
        one.failed(e)
        raise
    one.ended()


def _after_close(stream: Any, one: "_Recording") -> None:
    """A stream that is closed before its end was cut off; its `with` closes it too, after the end."""
    inner = stream.close

    def close():
        inner()
        one.failed(GeneratorExit())

    stream.close = close


def _after_async_close(stream: Any, one: "_Recording") -> None:
    inner = stream.close

    async def close():
        await inner()
        one.failed(GeneratorExit())

    stream.close = close


def _is_raw(kwargs: Mapping[str, Any]) -> bool:
    headers = kwargs.get("extra_headers")
    return isinstance(headers, Mapping) and any(str(name).lower() == RAW for name in headers)


class _Recording:
    """One request on its way into the file. Nothing that goes wrong in here gets out."""

    def __init__(self, store: RequestStore, path: str, kwargs: dict[str, Any], tags: Mapping[str, str]):
        self._store, self._id, self._pieces = store, None, Pieces()
        with _Quietly():
            body = _body(kwargs)
            told = body.get("metadata")
            tags = {**tags, **(told if isinstance(told, dict) else {})}
            self._id = store.begin(path=path, body=body, source="client", tags=tags)

    def is_stream(self, answer: Any) -> bool:
        """Whether an answer comes in pieces that can be followed."""
        return hasattr(answer, "_iterator") and hasattr(answer, "close")

    def piece(self, chunk: Any) -> None:
        with _Quietly():
            self._pieces.add(_plain(chunk))

    def answered(self, answer: Any) -> None:
        with _Quietly():
            self._finish(response=_plain(answer), status_code=200)

    def ended(self) -> None:
        with _Quietly():
            self._finish(response=self._pieces.response(), status_code=200)

    def failed(self, error: BaseException) -> None:
        """By the service's error, or because the application wanted no more."""
        with _Quietly():
            is_cut_off = not isinstance(error, Exception)
            code, body = getattr(error, "status_code", None), getattr(error, "body", None)
            response = self._pieces.response()
            if response is None and isinstance(body, dict):
                response = {"error": body}
            said = None if is_cut_off else f"{type(error).__name__}: {error}"
            self._finish(response=response, status_code=code, error=said, is_broken=is_cut_off)

    def _finish(self, **how) -> None:
        id, self._id = self._id, None  # once: a stream that ended is closed after that
        if id is not None and not self._store.is_closed:  # as the process ends: the row is broken already
            self._store.finish(id, **how)


class _Quietly:
    """Logs what goes wrong, and lets the application go on."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind, error, trace) -> bool:
        if isinstance(error, Exception):
            LOG.warning("a request was not recorded: %s", error)
            return True
        return False


def _body(kwargs: dict[str, Any]) -> dict[str, Any]:
    """What is sent, by the arguments of `create`; those that can be read only once are put back as lists."""
    for name, value in kwargs.items():
        if inspect.isgenerator(value) or (isinstance(value, Iterator) and not isinstance(value, Sequence)):
            kwargs[name] = list(value)
    body = {k: v for k, v in kwargs.items() if k not in NOT_BODY and type(v).__name__ not in NOT_GIVEN}
    if isinstance(kwargs.get("extra_body"), Mapping):
        body |= kwargs["extra_body"]
    return json.loads(json.dumps(body, default=_plain))


def _plain(value: Any) -> Any:
    """As JSON has it: of openai's models, what was sent."""
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json", exclude_unset=True, warnings=False)
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, set | frozenset | tuple) or hasattr(value, "__iter__"):
        return list(value)
    return str(value)
