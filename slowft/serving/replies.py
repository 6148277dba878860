"""One answer as it goes out to the client, piece by piece. It can be kept too, so that it can be recorded."""

import json
from collections.abc import Callable, Iterable
from http.server import BaseHTTPRequestHandler
from typing import Any

KEPT_NBYTES = 64 << 20  # most bytes of an answer that is recorded
Headers = Iterable[tuple[str, str]]
OWN_HEADERS = [
    ("Cache-Control", "no-store"),
    ("X-Content-Type-Options", "nosniff"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
]


class Gone(Exception):  # noqa: N818  (what happened, not whose error it is)
    """The client has hung up."""


class Reply:
    """The answer to one request.

    Attributes:
        status: that was sent; None: nothing was sent. is_ended: the answer is whole.
        kept: the body so far, if the caller sets this to a bytearray; None: it is not kept, or is too long for that.
        headers: that were sent.
        before: is called before anything is sent.
        is_gone: the client has hung up; `Watch` notices it too.
    """

    def __init__(self, handler: BaseHTTPRequestHandler):
        self._handler, self._is_chunked = handler, False
        self.status: int | None = None
        self.headers: list[tuple[str, str]] = []
        self.kept: bytearray | None = None
        self.is_ended = self.is_gone = False
        self.before: Callable[[], None] | None = None

    def begin(self, status: int, headers: Headers, nbytes: int | None, reason: str | None = None) -> None:
        """Send the head of the answer.

        Args:
            nbytes: of the body; None: not known, and the last chunk tells the client where the body ends.
            reason: words beside the status; None: the usual ones.
        """
        handler = self._handler
        if self.before is not None:
            self.before()
        self.status, self.headers = status, list(headers)
        handler.send_response_only(status, reason)
        for name, value in self.headers:
            handler.send_header(name, value.replace("\r", " ").replace("\n", " "))
        if status in (204, 304):
            pass
        elif nbytes is not None:
            handler.send_header("Content-Length", str(nbytes))
        elif handler.request_version == "HTTP/1.1":
            handler.send_header("Transfer-Encoding", "chunked")
            self._is_chunked = True
        else:
            handler.close_connection = True
        if handler.close_connection:
            handler.send_header("Connection", "close")
        try:
            handler.end_headers()
        except OSError as e:
            raise self._gone() from e

    def write(self, piece: bytes) -> None:
        """Send more of the body at once.

        Raises:
            Gone: the client has hung up.
        """
        if not piece:
            return
        if self.kept is not None:
            self.kept += piece
            if len(self.kept) > KEPT_NBYTES:
                self.kept = None
        if self.is_gone:
            raise Gone
        try:
            self._handler.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece) if self._is_chunked else piece)
        except OSError as e:
            raise self._gone() from e

    def end(self) -> None:
        """Note that the body is whole, and send the last chunk."""
        self.is_ended = True  # set first: an answer counts as whole even if the client does not wait for the last chunk
        try:
            if self._is_chunked:
                self._handler.wfile.write(b"0\r\n\r\n")
        except OSError as e:
            raise self._gone() from e

    def whole(self, status: int, body: bytes, kind: str, headers: Headers = ()) -> None:
        """Send a whole answer of this server's own."""
        handler = self._handler
        dated = [("Date", handler.date_time_string()), ("Content-Type", kind), *OWN_HEADERS, *headers]
        self.begin(status, dated, len(body))
        self.write(body)
        self.end()

    def json(self, status: int, value: Any, headers: Headers = ()) -> None:
        self.whole(status, json.dumps(value).encode(), "application/json", headers)

    def error(self, status: int, message: str, code: str | None = None, param: str | None = None) -> None:
        self.json(status, error_of(status, message, code, param))

    def header(self, name: str) -> str:
        """The value of a header that was sent, or an empty text."""
        return next((value for key, value in self.headers if key.lower() == name), "")

    def _gone(self) -> Gone:
        self.is_gone = self._handler.close_connection = True
        return Gone()


class Caught(Reply):
    """An answer that is not sent, but kept to make another answer of it."""

    def begin(self, status: int, headers: Headers, nbytes: int | None, reason: str | None = None) -> None:
        self.status, self.headers = status, list(headers)

    def write(self, piece: bytes) -> None:
        self.kept += piece

    def end(self) -> None:
        self.is_ended = True


def error_of(status: int, message: str, code: str | None = None, param: str | None = None) -> dict:
    """The body of an error, in the form of OpenAI's servers."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
