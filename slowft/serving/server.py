"""The HTTP server: each connection has a thread, which reads requests and has them answered.

Comes in: connections. Goes out: answers of `Local`, `Upstream` and `Pages`. Chat and plain completions are recorded.
"""

import errno
import json
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, first_line, printable, reason_of
from . import answers
from .guard import Guard, Refused, is_loopback, length_of
from .pages import Pages
from .recorder import Answered, Record, Recorder, tags_of
from .replies import Caught, Gone, Reply, error_of
from .upstream import Broken, Link, Upstream
from .watch import Watch

if TYPE_CHECKING:  # the import would load mlx-lm, which a server that only passes requests on does not need
    from .local import Local

IDLE_S = 60  # seconds that a client may take to send a request, or to receive a piece of an answer
# Connections that the system holds until a thread takes them; macOS makes 128 of it (kern.ipc.somaxconn). TCP has the
# clients beyond these ask again by itself.
WAITING = 512
COMPLETIONS = ("/v1/chat/completions", "/v1/completions")
ENDING_S = 0.5  # seconds that a server which ends waits for answers; then it waits twice as long for records
FULL_S = 0.1  # seconds between two looks at waiting connections while no more files can be opened
ENDED = "the server was stopped"


@dataclass
class Parts:
    """The parts of a server. A part that is None does not exist."""

    guard: Guard
    pages: Pages
    local: "Local | None" = None
    upstream: Upstream | None = None
    recorder: Recorder | None = None
    is_caching: bool = False
    on_answer: Callable[[str], None] | None = None


class Server(ThreadingHTTPServer):
    """Takes its address when it is made; from `start` on it listens, and answers until it is closed.

    Raises:
        ConfigError: the address is in use, or other machines can reach it and there is no token.
    """

    daemon_threads = True
    block_on_close = False
    request_queue_size = WAITING

    def __init__(self, host: str, port: int, parts: Parts):
        if not is_loopback(host) and parts.guard.token is None:
            raise ConfigError(f"--host {host} can be reached from elsewhere. Give a --token that clients have to send")
        if not 0 <= port <= 65535:
            raise ConfigError(f"--port must be from 0 to 65535, got {port}")
        self.parts, self.watch = parts, Watch()
        self.is_ending, self.is_recorded = False, True
        self._answering, self._changed = 0, threading.Condition()
        try:
            infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            self.address_family, _, _, _, address = infos[0]
            super().__init__(address, Handler, bind_and_activate=False)
            self.server_bind()
        except OSError as e:
            if hasattr(self, "socket"):
                self.server_close()
            self.watch.close()
            raise _cannot_listen(host, port, e) from None
        self._thread = threading.Thread(target=self.serve_forever, args=(0.1,), name="slowft-serve", daemon=True)

    @property
    def url(self) -> str:
        """The base URL for clients."""
        host, port = self.server_address[:2]
        return f"http://{f'[{host}]' if ':' in str(host) else host}:{port}/v1"

    def answer_by(self, local: "Local | None") -> None:
        """From now on answer requests for the models of `local` here. Its address was taken before they were opened."""
        self.parts = replace(self.parts, local=local)

    def start(self) -> None:
        try:
            self.server_activate()
        except OSError as e:  # two servers can take the same address; the second to listen cannot
            raise _cannot_listen(*self.server_address[:2], e) from None
        self._thread.start()

    def close(self) -> None:
        """Take no more requests, break off answers that are being made, and finish recording.

        Recording takes long if another program has locked the file. `is_recorded` says whether it was finished.
        """
        self.is_ending = True
        if self._thread.is_alive():
            self.shutdown()
        self.server_close()
        self.watch.all_gone()
        with self._changed:
            self._changed.wait_for(lambda: not self._answering, ENDING_S)
        if self.parts.recorder is not None:
            self.is_recorded = self.parts.recorder.close(2 * ENDING_S)
        self.watch.close()

    def server_bind(self) -> None:
        """Bind as `http.server` does, but without asking name servers for this machine's name, which is not needed."""
        TCPServer.server_bind(self)

    def get_request(self) -> Any:
        """The next connection. `serve_forever` asks at once again where there was no descriptor for it."""
        try:
            return super().get_request()
        except OSError as e:
            if e.errno in (errno.EMFILE, errno.ENFILE):
                time.sleep(FULL_S)
            raise

    def answering(self, change: int) -> None:
        """Count one more request that is being answered, or one less."""
        with self._changed:
            self._answering += change
            self._changed.notify_all()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Do nothing: connections of clients break all the time."""


class Handler(BaseHTTPRequestHandler):
    """The requests of one connection, one after the other."""

    protocol_version = "HTTP/1.1"
    timeout = IDLE_S
    disable_nagle_algorithm = True
    server: Server

    def setup(self) -> None:
        super().setup()
        self._link: Link | None = None

    def finish(self) -> None:
        if self._link is not None:
            self._link.close()
        with suppress(OSError):
            super().finish()

    def do_GET(self) -> None:
        self._take()

    do_POST = do_DELETE = do_GET

    def log_message(self, *_: Any) -> None:
        """Do nothing: `_take` calls `on_answer`."""

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer something that is no readable request."""
        self.close_connection = True
        body = json.dumps(error_of(code, message or "this is no request")).encode()
        self.send_response_only(code)
        for name, value in (
            ("Content-Type", "application/json"),
            ("Content-Length", len(body)),
            ("Connection", "close"),
        ):
            self.send_header(name, str(value))
        self.end_headers()
        with suppress(OSError):
            self.wfile.write(body)

    def _take(self) -> None:
        reply, begin = Reply(self), time.perf_counter()
        self.server.answering(1)
        try:
            self._answer(reply)
        except Refused as e:
            self._refuse(reply, e.status, str(e), e.code, e.param)
        except (Gone, Broken, OSError):  # OSError: the request could not be read
            self.close_connection = True
        except Exception as e:  # a fault of ours: the client is told, and the server goes on
            self._refuse(reply, 500, f"{type(e).__name__}: {next(iter(str(e).splitlines()), '')}")
        finally:
            self.server.answering(-1)
            if self.server.parts.on_answer is not None:
                status = reply.status if not reply.is_gone else "gone"
                seconds = time.perf_counter() - begin
                self.server.parts.on_answer(f"{self.command} {printable(self.path[:80])} {status} {seconds:.2f} s")

    def _refuse(
        self, reply: Reply, status: int, message: str, code: str | None = None, param: str | None = None
    ) -> None:
        """Answer with an error, or break off if a part of an answer was already sent."""
        if reply.status is not None:
            self.close_connection = True
            return
        with suppress(Gone):
            reply.error(status, message, code, param)

    def _answer(self, reply: Reply) -> None:
        parts = self.server.parts
        try:
            path = parts.guard.check(self.path, self.headers)
            length = length_of(self.headers)
        except Refused:
            self.close_connection = True  # the body is not read
            raise
        body = self.rfile.read(length)
        if len(body) < length:
            raise Gone
        if self.server.is_ending:
            self.close_connection = True
            raise Refused(503, ENDED)
        query = self.path.partition("?")[2]
        if path == "/" or path.startswith("/api/"):
            parts.pages.answer(self.command, path, query, _parsed(body), reply)
        elif path == "/health" and self.command == "GET":
            reply.json(*self._health())
        elif path in COMPLETIONS and self.command == "POST":
            self._complete(path, body, reply)
        elif path == "/v1/models" or path.startswith("/v1/models/"):
            self._models(path, body, reply)
        elif path.startswith("/v1/") and parts.upstream is not None:
            self._forward(body, reply)
        elif path.startswith("/v1/"):
            raise Refused(404, f"{path} is not known here, and there is no --upstream to ask", "unknown_url")
        else:
            raise Refused(404, "there is no such thing here. The models are under /v1", "unknown_url")

    # --- Completions ------------------------------------------------------------------------------------

    def _complete(self, path: str, body: bytes, reply: Reply) -> None:
        parts = self.server.parts
        parsed = _parsed(body)
        is_local = parts.local is not None and parts.local.name_of(parsed) is not None
        if not is_local and parts.upstream is None:
            if not isinstance(parsed, dict):
                raise Refused(400, "the body must be a JSON object")
            raise Refused(404, self._unknown(parsed.get("model")), "model_not_found", "model")
        if parts.is_caching and parts.recorder is not None and self._from_cache(path, body, parsed, reply):
            return
        record = None
        if parts.recorder is not None:
            tags = tags_of(self.headers.get("op-tags"), parsed)
            record = parts.recorder.begin(path, body, "local" if is_local else "upstream", tags)
            reply.before, reply.kept = record.wait, bytearray()
        error: str | None = None
        try:
            if is_local:
                self._answer_here(path, parsed, reply)
            else:
                self._forward(body, reply)
        except Refused as e:
            self._refuse(reply, e.status, str(e), e.code, e.param)
            error = str(e)
        except Gone:
            error = ENDED if self.server.is_ending else "the client hung up"
            raise
        except BaseException as e:
            error = first_line(e)
            raise
        finally:
            if record is not None:
                self._finish(record, reply, error)

    def _finish(self, record: Record, reply: Reply, error: str | None) -> None:
        body = None if reply.kept is None else bytes(reply.kept)
        kind, coding = reply.header("content-type"), reply.header("content-encoding")
        record.finish(Answered(reply.status, body, kind, coding, error, not reply.is_ended))

    def _answer_here(self, path: str, body: dict, reply: Reply) -> None:
        cancels: list[Callable[[], None]] = []

        def gone() -> None:
            reply.is_gone = True
            for cancel in cancels:
                cancel()

        def on_gone(cancel: Callable[[], None]) -> None:
            cancels.append(cancel)
            if reply.is_gone:  # the client hung up before this could be cancelled
                cancel()

        with self.server.watch.watching(self.connection, gone):
            self.server.parts.local.answer(path, body, reply, on_gone)

    def _from_cache(self, path: str, body: bytes, parsed: Any, reply: Reply) -> bool:
        """Answer as an equal request was answered before; False: there was none, or the file cannot be read."""
        try:
            row = self.server.parts.recorder.store.cached(path, body)
        except Exception:  # whatever is wrong with the file, the application gets an answer
            return False
        if row is None or not isinstance(row.response, dict):
            return False
        headers = [("slowft-cache", str(row.id))]
        if isinstance(parsed, dict) and parsed.get("stream") is True:
            options = parsed.get("stream_options")
            with_usage = isinstance(options, dict) and bool(options.get("include_usage"))
            reply.whole(200, answers.as_stream(row.response, with_usage), "text/event-stream", headers)
        else:
            reply.json(200, row.response, headers)
        return True

    def _unknown(self, model: Any) -> str:
        names = ", ".join(self.server.parts.local.names) if self.server.parts.local is not None else "none"
        return f"the model {str(model)[:100]!r} is not here, and there is no --upstream to ask. Known are: {names}"

    # --- Other requests ---------------------------------------------------------------------------------

    def _forward(self, body: bytes, reply: Reply) -> None:
        parts = self.server.parts
        self._link = link = self._link or parts.upstream.link()

        def gone() -> None:
            reply.is_gone = True
            link.cancel()

        is_own = parts.guard.is_token(self.headers.get("Authorization"))
        with self.server.watch.watching(self.connection, gone):
            link.forward(self.command, self.path, self.headers, body, not is_own, reply)

    def _models(self, path: str, body: bytes, reply: Reply) -> None:
        """Answer with the models of this machine and then the upstream's, or with the one that the path names."""
        parts = self.server.parts
        local = {
            name: {"id": name, "object": "model", "created": parts.local.created, "owned_by": "slowft"}
            for name in (parts.local.names if parts.local is not None else ())
        }
        if path != "/v1/models":
            name = path.removeprefix("/v1/models/")
            if name in local and self.command == "GET":
                reply.json(200, local[name])
            elif parts.upstream is not None:
                self._forward(body, reply)
            else:
                raise Refused(404, self._unknown(name), "model_not_found", "model")
        elif self.command != "GET":
            raise Refused(405, "/v1/models can only be read, with GET")
        elif not local and parts.upstream is not None:
            self._forward(body, reply)
        else:
            reply.json(200, {"object": "list", "data": [*local.values(), *self._models_upstream()]})

    def _models_upstream(self) -> list[Any]:
        """The models that the upstream lists for this client; none if it cannot be asked."""
        if self.server.parts.upstream is None:
            return []
        caught = Caught(self)
        caught.kept = bytearray()
        with suppress(Refused, Broken):
            self._forward(b"", caught)
        if caught.status != 200 or not caught.is_ended:
            return []
        kind, coding = caught.header("content-type"), caught.header("content-encoding")
        models = (answers.read(bytes(caught.kept), kind, coding) or {}).get("data")
        return models if isinstance(models, list) else []

    def _health(self) -> tuple[int, dict]:
        """(HTTP status, body) of the answer to /health."""
        parts = self.server.parts
        is_well = parts.local is None or parts.local.scheduler.is_well
        health: dict[str, Any] = {"status": "ok" if is_well else "unavailable"}
        if parts.local is not None:
            health |= parts.local.scheduler.state()
        if parts.recorder is not None:
            health["recorded"] = {"requests": parts.recorder.written, "lost": parts.recorder.lost}
        return (200 if is_well else 503), health


def _cannot_listen(host: Any, port: Any, error: OSError) -> ConfigError:
    return ConfigError(f"cannot listen at {host}, port {port}: {reason_of(error)}. Give another --port or --host")


def _parsed(body: bytes) -> Any:
    """The value of a body of JSON; None: it is no JSON."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None
