"""What an answer says, of its bytes: JSON, or the chunks of a stream put together; and such a stream, of an answer.

Comes in: bytes as they went over the wire. Goes out: the object that the same request would give without streaming.
"""

import json
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

DATA = b"data:"
DONE = b"[DONE]"
MESSAGES = {"chat.completion.chunk": "chat.completion"}
TEXTS = ("content", "refusal", "reasoning", "reasoning_content")  # of a message: these come in pieces


def read(body: bytes, content_type: str, coding: str = "") -> dict[str, Any] | None:
    """The response in an answer's body; None: it holds no JSON object."""
    try:
        plain = decoded(body, coding)
        if content_type.partition(";")[0].strip().lower() == "text/event-stream":
            return put_together(events(plain))
        found = json.loads(plain)
    except (ValueError, RecursionError, zlib.error):
        return None
    return found if isinstance(found, dict) else None


def decoded(body: bytes, coding: str) -> bytes:
    """As much as there is of a body in such a Content-Encoding."""
    for one in reversed([part.strip().lower() for part in coding.split(",") if part.strip()]):
        if one in ("gzip", "x-gzip", "deflate"):
            body = zlib.decompressobj(zlib.MAX_WBITS | 32).decompress(body)
    return body


def events(stream: bytes) -> Iterator[dict[str, Any]]:
    """Objects that the events of a stream carry."""
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
    response: dict[str, Any] | None = None
    choices: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        if response is None:
            kind = chunk.get("object")
            response = {**chunk, "choices": []}
            if kind in MESSAGES:
                response["object"] = MESSAGES[kind]
        for key in ("usage", "error", "system_fingerprint"):
            if chunk.get(key) is not None:
                response[key] = chunk[key]
        found = chunk.get("choices")
        for part in found if isinstance(found, list) else ():
            if isinstance(part, dict) and isinstance(index := part.get("index", 0), int):
                _add(choices.setdefault(index, {"index": index, "finish_reason": None}), part)
    if response is not None:
        response["choices"] = [choices[index] for index in sorted(choices)]
        if not choices and "error" in response:
            del response["choices"]
    return response


def _add(choice: dict[str, Any], part: dict[str, Any]) -> None:
    if part.get("finish_reason") is not None:
        choice["finish_reason"] = part["finish_reason"]
    if isinstance(part.get("text"), str):  # of a plain completion
        choice["text"] = choice.get("text", "") + part["text"]
    if isinstance(delta := part.get("delta"), dict):
        message = choice.setdefault("message", {"role": "assistant", "content": None})
        for key, value in delta.items():
            if key == "tool_calls" and isinstance(value, list):
                _add_calls(message.setdefault("tool_calls", []), value)
            elif key in TEXTS and isinstance(value, str):
                message[key] = (message.get(key) or "") + value
            elif value is not None and key != "role":
                message[key] = value
    if isinstance(logprobs := part.get("logprobs"), dict):
        into = choice.setdefault("logprobs", {})
        for key, value in logprobs.items():
            into[key] = into.get(key, []) + value if isinstance(value, list) else value


def _add_calls(calls: list[dict[str, Any]], parts: list[Any]) -> None:
    for part in parts:
        if not isinstance(part, dict):
            continue
        index = part.get("index", len(calls))
        while isinstance(index, int) and len(calls) <= index < 1000:
            calls.append({"type": "function", "function": {"name": "", "arguments": ""}})
        if not isinstance(index, int) or not 0 <= index < len(calls):
            continue
        call = calls[index]
        for key, value in part.items():
            if key == "function" and isinstance(value, dict):
                for name, text in value.items():
                    if isinstance(text, str):
                        call["function"][name] = call["function"].get(name, "") + text
            elif key != "index" and value is not None:
                call[key] = value


def as_stream(response: dict[str, Any], with_usage: bool) -> bytes:
    """Events of a stream that say what a response does."""
    is_chat = response.get("object") == "chat.completion"
    plain = {key: value for key, value in response.items() if key not in ("choices", "usage")}
    plain |= {"object": "chat.completion.chunk"} if is_chat else {}
    chunks = []
    for choice in response.get("choices", ()):
        said = {key: value for key, value in choice.items() if key != "message"}
        if is_chat:
            said["delta"] = dict(choice.get("message") or {})
            calls = said["delta"].get("tool_calls")
            if isinstance(calls, list):
                said["delta"]["tool_calls"] = [{"index": i, **call} for i, call in enumerate(calls)]
        chunks.append(plain | {"choices": [said]})
    if with_usage and response.get("usage"):
        chunks.append(plain | {"choices": [], "usage": response["usage"]})
    lines = [DATA + b" " + text.encode() for text in (*map(json.dumps, chunks), DONE.decode())]
    return b"".join(line + b"\n\n" for line in lines)
