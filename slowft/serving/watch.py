"""Notices clients that hang up while their answers are being made."""

import select
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

EVERY_S = 0.2


class Watch:
    """Checks connections every `EVERY_S` seconds on a thread of its own, as long as there are any."""

    def __init__(self):
        self._watched: dict[socket.socket, Callable[[], None]] = {}
        self._changed = threading.Condition()
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="slowft-watch", daemon=True)
        self._thread.start()

    @contextmanager
    def watching(self, client: socket.socket, gone: Callable[[], None]) -> Iterator[None]:
        """A context in which `gone` is called, once and from another thread, if the client hangs up."""
        with self._changed:
            self._watched[client] = gone
            self._changed.notify()
        try:
            yield
        finally:
            with self._changed:
                self._watched.pop(client, None)

    def all_gone(self) -> None:
        """Treat all clients as if they had hung up."""
        with self._changed:
            callbacks = list(self._watched.values())
        for gone in callbacks:
            gone()

    def close(self) -> None:
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        with self._changed:
            while not self._is_closing:
                hung_up = [(client, gone) for client, gone in self._watched.items() if _has_hung_up(client)]
                for client, gone in hung_up:
                    del self._watched[client]
                    gone()
                self._changed.wait(EVERY_S if self._watched else None)


def _has_hung_up(client: socket.socket) -> bool:
    try:
        poll = select.poll()
        poll.register(client, select.POLLIN)
        # Without the poll, recv would wait, because the socket has a timeout.
        return bool(poll.poll(0)) and client.recv(1, socket.MSG_PEEK) == b""
    except OSError:
        return True
