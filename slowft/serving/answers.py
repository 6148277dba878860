"""Reads an answer from its bytes: from JSON, or from the chunks of a stream. Also writes an answer as a stream.

Comes in: bytes as they went over the wire. Goes out: the object that the same request would give without streaming.
"""

import json
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

from ..requests.streams import Pieces

DATA = b"data:"
DONE = b"[DONE]"


def read(body: bytes, content_type: str, coding: str = "") -> dict[str, Any] | None:
    """The response in an answer's body; None: the body holds no JSON object."""
    try:
        plain = decoded(body, coding)
        if content_type.partition(";")[0].strip().lower() == "text/event-stream":
            return put_together(events(plain))
        found = json.loads(plain)
    except (ValueError, RecursionError, zlib.error):
        return None
    return found if isinstance(found, dict) else None


def decoded(body: bytes, coding: str) -> bytes:
    """A body with the Content-Encoding `coding`, decoded as far as it was received."""
    for name in reversed([part.strip().lower() for part in coding.split(",") if part.strip()]):
        if name in ("gzip", "x-gzip", "deflate"):
            body = zlib.decompressobj(zlib.MAX_WBITS | 32).decompress(body)
    return body


def events(stream: bytes) -> Iterator[dict[str, Any]]:
    """The objects in the events of a stream."""
    for line in stream.splitlines():
        data = line.removeprefix(DATA).strip() if line.startswith(DATA) else b""
        if data and data != DONE:
            try:
                found = json.loads(data)
            except (ValueError, RecursionError):
                continue  # the last line of a stream that was cut off
            if isinstance(found, dict):
                yield found


def put_together(chunks: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
    """The response whose chunks these are; None: there were none."""
    pieces = Pieces()
    for chunk in chunks:
        pieces.add(chunk)
    return pieces.response()


def as_stream(response: dict[str, Any], with_usage: bool) -> bytes:
    """The bytes of a stream that gives the same answer as a response."""
    is_chat = response.get("object") == "chat.completion"
    plain = {key: value for key, value in response.items() if key not in ("choices", "usage")}
    plain |= {"object": "chat.completion.chunk"} if is_chat else {}
    chunks = []
    for choice in response.get("choices", ()):
        streamed = {key: value for key, value in choice.items() if key != "message"}
        if is_chat:
            streamed["delta"] = dict(choice.get("message") or {})
            calls = streamed["delta"].get("tool_calls")
            if isinstance(calls, list):
                streamed["delta"]["tool_calls"] = [{"index": i, **call} for i, call in enumerate(calls)]
        chunks.append(plain | {"choices": [streamed]})
    if with_usage and response.get("usage"):
        chunks.append(plain | {"choices": [], "usage": response["usage"]})
    lines = [DATA + b" " + text.encode() for text in (*map(json.dumps, chunks), DONE.decode())]
    return b"".join(line + b"\n\n" for line in lines)
