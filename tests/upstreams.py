"""A server that answers with recorded bytes and remembers what it was asked. `slowft serve --upstream` asks it."""

import gzip
import json
import socket
import threading
from collections.abc import Callable

CHUNKS = [
    {"role": "assistant", "content": ""},
    {"content": "A heisen"},
    {"content": "bug: gone "},
    {"content": "when one looks – 你好."},
]
TOOL_CHUNKS = [
    {"role": "assistant", "content": None, "tool_calls": [
        {"index": 0, "id": "call_1", "type": "function", "function": {"name": "find", "arguments": ""}}]},
    {"tool_calls": [{"index": 0, "function": {"arguments": '{"word": '}}]},
    {"tool_calls": [{"index": 0, "function": {"arguments": '"bogon"}'}}]},
]  # fmt: skip
USAGE = {"prompt_tokens": 9, "completion_tokens": 12, "total_tokens": 21}


def chunk(delta: dict, finish: str | None = None, **more) -> bytes:
    said = {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "large-1",
        "choices": [{"index": 0, "delta": delta, "finish_reason": finish}],
    }
    return b"data: " + json.dumps(said | more, ensure_ascii=False).encode() + b"\n\n"


def stream(deltas: list[dict], finish: str) -> list[bytes]:
    usage = b"data: " + json.dumps({"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1,
                                    "model": "large-1", "choices": [], "usage": USAGE}).encode() + b"\n\n"  # fmt: skip
    return [*(chunk(delta) for delta in deltas), chunk({}, finish), usage, b"data: [DONE]\n\n"]


def message(**said) -> bytes:
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": None} | said}
    found = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "large-1", "choices": [choice]}
    return json.dumps(found | {"usage": USAGE}, indent=2).encode()


def head(status: str, *headers: str) -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status}", *headers, "", ""]).encode()


def whole(status: str, body: bytes, *headers: str, kind: str = "application/json") -> list[bytes]:
    return [head(status, f"Content-Type: {kind}", f"Content-Length: {len(body)}", *headers) + body]


def chunked(status: str, pieces: list[bytes], *headers: str, kind: str = "text/event-stream; charset=utf-8") -> list:
    begun = head(status, f"Content-Type: {kind}", "Transfer-Encoding: chunked", "Connection: keep-alive", *headers)
    return [begun, *(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces), b"0\r\n\r\n"]


CALL = [{"id": "call_1", "type": "function", "function": {"name": "find", "arguments": '{"word": "bogon"}'}}]
ERROR = {"error": {"message": "Rate limit reached", "type": "requests", "param": None, "code": "rate_limit_exceeded"}}

# By the request's model, or by its path. A callable is called between two pieces; False ends the connection.
RECORDED: dict[str, list[bytes | Callable | bool]] = {
    "plain": whole("200 OK", message(content="A heisenbug: gone when one looks – 你好."), "x-request-id: req_1",
                   "Set-Cookie: __cf_bm=COOKIE-OF-THE-UPSTREAM; path=/", "openai-processing-ms: 12"),
    "stream": chunked("200 OK", stream(CHUNKS, "stop"), "x-request-id: req_2", "Cache-Control: no-cache"),
    "tools": whole("200 OK", message(tool_calls=CALL)),
    "tool-stream": chunked("200 OK", stream(TOOL_CHUNKS, "tool_calls")),
    "text": whole("200 Fine", json.dumps({"id": "cmpl-1", "object": "text_completion", "created": 1, "model": "large-1",
                  "choices": [{"index": 0, "text": " gone.", "finish_reason": "stop", "logprobs": None}]}).encode()),
    "limited": whole("429 Too Many Requests", json.dumps(ERROR).encode(), "Retry-After: 7", "x-ratelimit-remaining: 0"),
    "gzip": whole("200 OK", gzip.compress(message(content="squeezed")), "Content-Encoding: gzip"),
    "moved": [head("302 Found", "Location: http://127.0.0.1:9/v1/elsewhere", "Content-Length: 0")],
    "old": [head("200 OK", "Content-Type: application/json", "Connection: close") + message(content="to the end"),
            False],
    "broken": [*chunked("200 OK", stream(CHUNKS, "stop"))[:3], False],
    "short": [whole("200 OK", message(content="cut off"))[0][:-20], False],
    "no-http": [b"SSH-2.0-OpenSSH_9.2\r\n", False],
    "/v1/embeddings": whole("200 OK", b'{"object": "list", "data": []}'),
    "/v1/models": whole("200 OK", b'{"object": "list", "data": [{"id": "large-1", "object": "model"}]}'),
    "/v1/files/f%201?purpose=x": [head("204 No Content", "x-deleted: yes")],
}  # fmt: skip


class Recorded:
    """The server.

    Attributes:
        asked: (request line, header lines, body) of each request. url: the base URL.
    """

    def __init__(self):
        self.asked: list[tuple[str, list[str], bytes]] = []
        self.answers = dict(RECORDED)
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.port = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        threading.Thread(target=self._listen, daemon=True).start()

    def close(self) -> None:
        self._socket.close()

    def _listen(self) -> None:
        while True:
            try:
                client, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(client,), daemon=True).start()

    def _answer(self, client: socket.socket) -> None:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with client, client.makefile("rb") as reading:
            try:
                while line := reading.readline().decode().strip():
                    headers = []
                    while text := reading.readline().decode().rstrip("\r\n"):
                        headers.append(text)
                    length = next((int(h.split(":")[1]) for h in headers if h.lower().startswith("content-length:")), 0)
                    body = reading.read(length)
                    self.asked.append((line, headers, body))
                    path = line.split()[1]
                    name = path if path in self.answers else json.loads(body)["model"]
                    for piece in self.answers[name]:
                        if piece is False:
                            return
                        if callable(piece):
                            piece()
                        else:
                            client.sendall(piece)
            except Exception:  # what nobody recorded an answer to
                return
