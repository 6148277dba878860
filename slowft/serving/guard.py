"""Decides who may use the server, and for which paths, before a request's body is read.

Comes in: the request line and its headers. Goes out: nothing, or a `Refused`. A page of another origin must never get
through, whatever name it has for this machine, and no path may lead out of the upstream's own path.
"""

import hmac
import ipaddress
import re
from dataclasses import dataclass
from email.message import Message
from urllib.parse import unquote, urlsplit

BODY_NBYTES = 32 << 20  # most bytes of a request's body: a million tokens are some 4 MB of text
PAGE = "/"
LENGTH = re.compile(r"[0-9]{1,15}")
TARGET = re.compile(r"/[!-~]*")  # printable ASCII, before percent-encoding is decoded


class Refused(Exception):  # noqa: N818  (what happened, not whose error it is)
    """The request is answered with this status and message."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None):
        super().__init__(message)
        self.status, self.code, self.param = status, code, param


@dataclass(frozen=True)
class Guard:
    """The rules of one server.

    Attributes:
        host: the address that the server listens at.
        token: each request must have it; None: there is none, which is allowed only on loopback addresses.
    """

    host: str
    token: str | None = None

    def check(self, target: str, headers: Message) -> str:
        """The path of a request, without its query.

        Raises:
            Refused: the path may not be used, or not by this client.
        """
        host = self._check_host(headers)
        path = path_of(target)
        self._check_origin(host, path, headers)
        if path != PAGE and self.token is not None and not self.is_token(headers.get("Authorization")):
            raise Refused(401, "the token is missing or wrong. Send it as 'Authorization: Bearer TOKEN'", "bad_token")
        return path

    def is_token(self, authorization: str | None) -> bool:
        """Whether a client's Authorization is this server's own token, and not a key of the upstream's."""
        if self.token is None or authorization is None:
            return False
        kind, _, given = authorization.partition(" ")
        return kind.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), self.token.encode())

    def _check_host(self, headers: Message) -> str:
        """Refuse other hosts. A page whose own name resolves to this machine (DNS rebinding) sends that name."""
        hosts = headers.get_all("Host") or []
        if len(hosts) != 1:
            raise Refused(400, f"a request needs one Host header, and this one has {len(hosts)}")
        name = _name(hosts[0])
        if name is None:
            raise Refused(400, "the Host header is no valid host")
        is_any_address = self.host in ("", "0.0.0.0", "::")  # then there is a token, which no page knows
        if not (is_any_address or is_loopback(name) or name == self.host.lower()):
            raise Refused(403, "this server does not answer to the name in the Host header", "bad_host")
        return hosts[0].lower()

    def _check_origin(self, host: str, path: str, headers: Message) -> None:
        for origin in headers.get_all("Origin") or ():
            if origin.lower() not in (f"http://{host}", f"https://{host}"):
                raise Refused(403, "pages of other origins cannot use this server", "bad_origin")
        # Browsers send this header with all requests, also with those that have no Origin.
        site = headers.get("Sec-Fetch-Site", "none").lower()
        if path != PAGE and site not in ("none", "same-origin"):
            raise Refused(403, "pages of other origins cannot use this server", "bad_origin")


def path_of(target: str) -> str:
    """The path of a request's target.

    Raises:
        Refused: the target names another server, or some server might read it as a way out of the path it begins with.
    """
    if not TARGET.fullmatch(target) or target.startswith("//"):
        raise Refused(400, "the request's target is no path on this server", "bad_path")
    path = target.partition("?")[0]
    decoded = unquote(path, errors="replace")
    if (
        "#" in target
        or "%" in decoded  # encoded twice
        or "\\" in decoded
        or "//" in decoded
        or any(part in (".", "..") for part in decoded.split("/"))
        or not decoded.isprintable()
    ):
        raise Refused(400, "the request's path has parts that may lead out of it", "bad_path")
    return path


def length_of(headers: Message) -> int:
    """Bytes of a request's body.

    Raises:
        Refused: the headers do not give one plain number, or it is too large.
    """
    lengths = headers.get_all("Content-Length") or []
    if headers.get("Transfer-Encoding") is not None:
        raise Refused(411, "bodies have to come with a Content-Length")
    if not lengths:
        return 0
    if len(lengths) > 1 or not LENGTH.fullmatch(lengths[0].strip()):
        raise Refused(400, "Content-Length must be one number")
    length = int(lengths[0])
    if length > BODY_NBYTES:
        raise Refused(413, f"the body has {length} bytes, and at most {BODY_NBYTES} are accepted")
    return length


def is_loopback(name: str) -> bool:
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _name(host: str) -> str | None:
    """The name or address in a Host header, in small letters."""
    if not re.fullmatch(r"[A-Za-z0-9._:\[\]-]+", host):
        return None
    try:
        parts = urlsplit(f"//{host}")
        _ = parts.port  # raises if the port is not a valid number
    except ValueError:
        return None
    return parts.hostname
