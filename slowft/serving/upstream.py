"""Passes requests on to another server, and its answers back as they come, byte for byte.

It connects only to the one host that it was made for, and follows no redirect. It never looks into a body.
"""

import http.client
import os
import socket
import ssl
from collections.abc import Iterable
from contextlib import suppress
from email.message import Message
from urllib.parse import urlsplit

from ..errors import ConfigError, first_line
from ..platform import tls_context
from .guard import Refused
from .replies import Gone, Reply

CONNECT_S = 30
SILENT_S = 600  # the openai package waits as long for an answer
PIECE_NBYTES = 1 << 16
OWN_KEY = "SLOWFT_UPSTREAM_KEY"  # environment variable with the key for requests that have none
PREFIX = "/v1"
# Headers for one connection only, which a proxy must not pass on (RFC 9110, 7.6.1).
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
READABLE = ("gzip", "deflate", "identity")  # codings of answers that can be recorded


class Upstream:
    """A server that answers in OpenAI's way.

    Args:
        url: as clients are given it, such as https://api.openai.com/v1.
    Raises:
        ConfigError: the text is no base URL.
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
        """A new connection, which serves the requests of one connection of a client."""
        return Link(self)

    def connect(self) -> http.client.HTTPConnection:
        if self._context is not None:
            connection = http.client.HTTPSConnection(self._host, self._port, timeout=CONNECT_S, context=self._context)
        else:
            connection = http.client.HTTPConnection(self._host, self._port, timeout=CONNECT_S)
        connection.connect()
        connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sock.settimeout(SILENT_S)
        return connection

    def target(self, target: str) -> str:
        """The upstream's target for one of ours that begins with /v1/."""
        return self._path + target.removeprefix(PREFIX)

    @property
    def name(self) -> str:
        return self._name


class Link:
    """One connection to the upstream, kept between requests. Only `cancel` may be called from other threads."""

    def __init__(self, upstream: Upstream):
        self._upstream = upstream
        self._connection: http.client.HTTPConnection | None = None

    def forward(self, method: str, target: str, headers: Message, body: bytes, keep_key: bool, reply: Reply) -> None:
        """Have the upstream answer a request.

        Args:
            target: was checked by `guard.path_of`. keep_key: the request's Authorization is for the upstream.
        Raises:
            Refused: the upstream cannot be reached, or does not answer in HTTP.
            Broken: the upstream's answer ended too early.
            Gone: the client has hung up.
        """
        passed_on = request_headers(headers, keep_key)
        try:
            response = self._ask(method, self._upstream.target(target), passed_on, body, reply)
        except (OSError, http.client.HTTPException) as e:
            self.close()
            if reply.is_gone:
                raise Gone from e
            raise Refused(502, f"the upstream {self._upstream.name} cannot be used: {first_line(e)}", "upstream") from e
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
        response.close()  # the answer is whole, and the connection stays open
        if response.will_close:
            self.close()

    def cancel(self) -> None:
        """End the reading from the upstream on another thread."""
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
        if reply.is_gone:  # the client hung up before `cancel` could end anything
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
            raise Broken(f"the upstream's answer ended too early: {first_line(e)}") from e


class Broken(Exception):  # noqa: N818  (what happened, not whose error it is)
    """An answer ended before it was whole, after the client had some of it."""


def request_headers(headers: Message, keep_key: bool) -> list[tuple[str, str]]:
    """The headers of a client's request that the upstream gets."""
    left_out = HOP_BY_HOP | _named(headers) | {"host", "content-length", "expect", "op-tags", "accept-encoding"}
    if "Origin" in headers:  # a page sends the cookies of all servers on this machine, whatever their port
        left_out |= {"cookie", "origin", "referer"}
    if not keep_key:
        left_out |= {"authorization"}
    passed_on = [(name, value) for name, value in headers.items() if name.lower() not in left_out]
    codings = ", ".join(headers.get_all("Accept-Encoding") or ())
    readable = [one.strip() for one in codings.split(",") if one.strip().partition(";")[0].strip().lower() in READABLE]
    passed_on.append(("Accept-Encoding", ", ".join(readable) or "identity"))
    key = os.environ.get(OWN_KEY)
    if key and not (keep_key and "Authorization" in headers):
        passed_on.append(("Authorization", f"Bearer {key}"))
    return passed_on


def response_headers(headers: Message) -> list[tuple[str, str]]:
    """The headers of the upstream's answer that the client gets."""
    left_out = HOP_BY_HOP | _named(headers) | {"content-length"}
    return [(name, value) for name, value in headers.items() if name.lower() not in left_out]


def _named(headers: Message) -> set[str]:
    """Names of headers that the Connection header limits to one connection."""
    return {name.strip().lower() for value in headers.get_all("Connection") or () for name in value.split(",")}


def _is_over(sock: socket.socket | None) -> bool:
    """Whether the other side has closed an idle connection, or sent something without a request."""
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
