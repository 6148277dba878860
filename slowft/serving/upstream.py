"""Passes requests on to another server, and its answers back as they come, byte for byte.

Only ever connects to the one host that it was made for, and follows no redirect. Knows nothing of what is in a body.
"""

import http.client
import os
import socket
import ssl
from collections.abc import Iterable
from contextlib import suppress
from email.message import Message
from urllib.parse import urlsplit

from ..errors import ConfigError
from ..platform import tls_context
from .guard import Refused
from .replies import Gone, Reply

CONNECT_S = 30
SILENT_S = 600  # the openai package waits as long for an answer
PIECE_NBYTES = 1 << 16
OWN_KEY = "SLOWFT_UPSTREAM_KEY"  # in the environment: of requests that bring none
PREFIX = "/v1"
# RFC 9110, 7.6.1: between two neighbours only.
HOP_BY_HOP = {
    "connection",
    "keep-alive",
    "proxy-authenticate",
    "proxy-authorization",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
}
READABLE = ("gzip", "deflate", "identity")  # of the codings that a client may ask for, those that can be recorded


class Upstream:
    """A server that answers in OpenAI's way.

    Args:
        url: as clients are given it, such as https://api.openai.com/v1.
    Raises:
        ConfigError: it is none.
    """

    def __init__(self, url: str):
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as e:
            raise ConfigError(f"--upstream {url} is no URL: {e}") from None
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
            raise ConfigError(f"--upstream {url} is no base URL. Give such as https://api.openai.com/v1")
        self.url = url
        self._host, self._path = parts.hostname, parts.path.rstrip("/")
        self._name = parts.netloc
        self._context = tls_context() if parts.scheme == "https" else None
        self._port = port or (443 if self._context else 80)

    def link(self) -> "Link":
        """A connection for the requests that come over one connection of a client's."""
        return Link(self)

    def connect(self) -> http.client.HTTPConnection:
        if self._context is not None:
            made = http.client.HTTPSConnection(self._host, self._port, timeout=CONNECT_S, context=self._context)
        else:
            made = http.client.HTTPConnection(self._host, self._port, timeout=CONNECT_S)
        made.connect()
        made.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        made.sock.settimeout(SILENT_S)
        return made

    def target(self, target: str) -> str:
        """The upstream's, of one of ours that begins with /v1/."""
        return self._path + target.removeprefix(PREFIX)

    @property
    def name(self) -> str:
        return self._name


class Link:
    """One connection to the upstream, kept between requests. Of one thread, but for `cancel`."""

    def __init__(self, upstream: Upstream):
        self._upstream = upstream
        self._connection: http.client.HTTPConnection | None = None

    def forward(self, method: str, target: str, headers: Message, body: bytes, keep_key: bool, reply: Reply) -> None:
        """Have the upstream answer a request.

        Args:
            target: has been through `guard.path_of`. keep_key: its Authorization is for the upstream.
        Raises:
            Refused: the upstream cannot be reached, or says nothing that is HTTP.
            Broken: its answer ended too early.
            Gone: the client did.
        """
        sent = request_headers(headers, keep_key)
        try:
            response = self._ask(method, self._upstream.target(target), sent, body, reply)
        except (OSError, http.client.HTTPException) as e:
            self.close()
            if reply.is_gone:
                raise Gone from e
            raise Refused(502, f"the upstream {self._upstream.name} cannot be used: {_said(e)}", "upstream") from e
        has_body = response.status not in (204, 304)
        left = response.length if has_body and not response.chunked else None
        try:
            reply.begin(response.status, response_headers(response.headers), left, response.reason)
            while has_body and left != 0:
                piece = self._read(response, PIECE_NBYTES if left is None else min(left, PIECE_NBYTES), reply)
                if not piece:
                    break
                reply.write(piece)
                left = None if left is None else left - len(piece)
            if left:
                raise Broken(f"{left} bytes of the upstream's answer never came")
            reply.end()
        except BaseException:
            self.close()
            raise
        response.close()  # of a whole answer: the connection stays
        if response.will_close:
            self.close()

    def cancel(self) -> None:
        """Have whoever reads from it, on another thread, read no more."""
        connection = self._connection
        if connection is not None and (sock := connection.sock) is not None:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _ask(self, method: str, target: str, headers: Iterable[tuple[str, str]], body: bytes, reply: Reply):
        if self._connection is not None and _is_over(self._connection.sock):
            self.close()
        connection = self._connection = self._connection or self._upstream.connect()
        if reply.is_gone:  # before there was anything to cancel
            raise Gone
        connection.putrequest(method, target, skip_host=True, skip_accept_encoding=True)
        connection.putheader("Host", self._upstream.name)
        for name, value in headers:
            connection.putheader(name, value.encode("latin-1"))
        if body or method == "POST":
            connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body or None)
        return connection.getresponse()

    @staticmethod
    def _read(response: http.client.HTTPResponse, nbytes: int, reply: Reply) -> bytes:
        try:
            return response.read1(nbytes)
        except (OSError, http.client.HTTPException, ValueError) as e:
            if reply.is_gone:
                raise Gone from e
            raise Broken(f"the upstream's answer ended too early: {_said(e)}") from e


class Broken(Exception):  # noqa: N818  (what happened, not whose error it is)
    """An answer ended before it was whole, after the client had some of it."""


def request_headers(headers: Message, keep_key: bool) -> list[tuple[str, str]]:
    """Of a client's request, those that the upstream gets."""
    left_out = HOP_BY_HOP | _named(headers) | {"host", "content-length", "expect", "op-tags", "accept-encoding"}
    if "Origin" in headers:  # of a page: its cookies are those of anything on this machine, whatever its port
        left_out |= {"cookie", "origin", "referer"}
    if not keep_key:
        left_out |= {"authorization"}
    found = [(name, value) for name, value in headers.items() if name.lower() not in left_out]
    codings = ", ".join(headers.get_all("Accept-Encoding") or ())
    kept = [one.strip() for one in codings.split(",") if one.strip().partition(";")[0].strip().lower() in READABLE]
    found.append(("Accept-Encoding", ", ".join(kept) or "identity"))
    key = os.environ.get(OWN_KEY)
    if key and not (keep_key and "Authorization" in headers):
        found.append(("Authorization", f"Bearer {key}"))
    return found


def response_headers(headers: Message) -> list[tuple[str, str]]:
    """Of the upstream's answer, those that the client gets."""
    left_out = HOP_BY_HOP | _named(headers) | {"content-length"}
    return [(name, value) for name, value in headers.items() if name.lower() not in left_out]


def _named(headers: Message) -> set[str]:
    """That Connection says are between neighbours."""
    return {name.strip().lower() for value in headers.get_all("Connection") or () for name in value.split(",")}


def _is_over(sock: socket.socket | None) -> bool:
    """Whether the other side has closed a connection that was idle, or said what nobody asked for."""
    if sock is None:
        return True
    sock.settimeout(0)
    try:
        sock.recv(1)
        return True
    except (BlockingIOError, ssl.SSLWantReadError):
        return False
    except OSError:
        return True
    finally:
        sock.settimeout(SILENT_S)


def _said(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
