"""Who is still there of the machines that train together, told by a TCP connection of each to the first.

Comes in: where the first listens. Goes out: `Peers.loss`, as soon as a process has ended, however it did, and half a
minute after a network went silent. Nothing is sent while all is well: the operating systems ask each other (TCP
keepalive), so that a process that computes for an hour, or is suspended, is not taken for lost.
"""

import json
import selectors
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from .. import platform
from ..errors import PeerLost

JOIN_S = 60.0  # within which all have to come: a launcher starts them at once
FINISH_S = 60.0  # that a machine which is done waits for the others
FAIL_S = 5.0  # that one which failed does


@dataclass(frozen=True)
class Loss:
    """A machine that will take part no more. `rank`: None if nobody knows which; `said`: by itself, not its silence."""

    rank: int | None
    why: str
    said: bool = False


class Peers:
    """Connections of the `size` machines; the first has one to each, the others one to the first.

    Attributes:
        loss: the first machine that was lost; None while all are there.
    """

    def __init__(self, rank: int, size: int, address: tuple[str, int]):
        """Returns when all are there, and nobody listens at `address` any more: MLX's own engine will, next.

        Raises:
            PeerLost: not all came within `JOIN_S`.
        """
        self.rank, self.size, self.loss = rank, size, None
        self._changed = threading.Condition()
        self._left: set[int] = set()  # have said that they are done, or have gone
        self._gone: set[int] = set()
        self._is_over = False
        until = time.monotonic() + JOIN_S
        self._peers = _accept(size, address, until) if rank == 0 else {0: _connect(rank, size, address, until)}
        for connection in self._peers.values():
            platform.keep_alive(connection)
        threading.Thread(target=self._watch, name="slowft-peers", daemon=True).start()

    def lose(self, loss: Loss) -> None:
        """Somebody will not take part any more; the first machine tells the others."""
        with self._changed:
            self.loss = self.loss or loss
            self._changed.notify_all()
        if self.rank == 0:
            self._tell({"lost": [loss.rank, loss.why]})

    def wait(self, seconds: float, until: Callable[[], bool]) -> bool:
        """Until `until()` holds, which is asked when something changes; False: it did not within these seconds."""
        with self._changed:
            return self._changed.wait_for(until, seconds)

    @property
    def some_left(self) -> bool:
        """Whether a machine has ended its run."""
        return bool(self._left)

    def leave(self, error: str | None) -> None:
        """Tell the others that this machine is done, or what went wrong, and wait a little for them.

        The first goes when all others are done; the others after the first. So nobody's connection ends while another
        still sums, and a launcher that ends everybody when one has ended lets the first finish writing.
        """
        if self._is_over:
            return
        self._is_over = True
        self._tell({"done": True} if error is None else {"failed": error})
        if self.rank or error is None:
            others = self._left if self.rank == 0 else self._gone
            self.wait(FINISH_S if error is None else FAIL_S, lambda: others >= set(self._peers))

    def _tell(self, message: dict) -> None:
        for connection in self._peers.values():
            with suppress(OSError):
                connection.sendall(json.dumps(message).encode() + b"\n")

    def _watch(self) -> None:
        selector = selectors.DefaultSelector()
        for rank, connection in self._peers.items():
            selector.register(connection, selectors.EVENT_READ, (rank, bytearray()))
        while selector.get_map():  # until all have gone
            for key, _ in selector.select():
                rank, text = key.data
                try:
                    data = key.fileobj.recv(4096)
                    why = "the process has ended"
                except OSError as e:
                    data, why = b"", f"its connection is lost ({e.strerror})"
                text += data
                while b"\n" in text:
                    line, _, rest = text.partition(b"\n")
                    text[:] = rest
                    self._hear(rank, json.loads(line))
                if not data:
                    selector.unregister(key.fileobj)
                    key.fileobj.close()
                    self.lose(Loss(rank, why))
                    self._note(rank, self._left, self._gone)
        selector.close()

    def _hear(self, rank: int, message: dict) -> None:
        if "failed" in message:
            self.lose(Loss(rank, message["failed"], said=True))
        elif "lost" in message:
            self.lose(Loss(*message["lost"]))
        if "lost" not in message:
            self._note(rank, self._left)

    def _note(self, rank: int, *sets: set[int]) -> None:
        with self._changed:
            for one in sets:
                one.add(rank)
            self._changed.notify_all()


def _accept(size: int, address: tuple[str, int], until: float) -> dict[int, socket.socket]:
    peers: dict[int, socket.socket] = {}
    with socket.socket() as listener:
        _share(listener)
        try:
            listener.bind(address)
        except OSError as e:
            raise PeerLost(
                f"machine 1 of {size} cannot listen at {address[0]}:{address[1]}: {e.strerror}. Give mlx.launch "
                "another --starting-port"
            ) from None
        listener.listen(size)
        while len(peers) < size - 1:
            left = until - time.monotonic()
            if left <= 0:
                missing = ", ".join(str(rank + 1) for rank in range(1, size) if rank not in peers)
                raise PeerLost(
                    f"machine {missing} of {size} did not come within {JOIN_S:.0f} s. Is slowft installed there, and "
                    f"can it reach {address[0]}:{address[1]}?"
                )
            listener.settimeout(left)
            with suppress(OSError, ValueError, KeyError, TypeError):  # whoever else connects is no machine of ours
                connection, _ = listener.accept()
                connection.settimeout(5)
                hello = json.loads(_line(connection))
                if hello["slowft"] == size and 0 < hello["rank"] < size and hello["rank"] not in peers:
                    peers[hello["rank"]] = connection
    for connection in peers.values():  # nobody listens any more: now MLX may
        connection.sendall(b'{"go": true}\n')
        connection.settimeout(None)
    return peers


def _connect(rank: int, size: int, address: tuple[str, int], until: float) -> socket.socket:
    while (left := until - time.monotonic()) > 0:
        with suppress(OSError, ValueError):
            connection = socket.create_connection(address, timeout=min(left, 5))
            connection.settimeout(left)
            connection.sendall(json.dumps({"slowft": size, "rank": rank}).encode() + b"\n")
            if json.loads(_line(connection)):
                connection.settimeout(None)
                return connection
        time.sleep(0.05)
    raise PeerLost(
        f"machine {rank + 1} of {size} (rank {rank}) could not join the first one at {address[0]}:{address[1]} within "
        f"{JOIN_S:.0f} s, or not all came. Does slowft run there?"
    )


def _line(connection: socket.socket) -> bytes:
    """One line, byte by byte: what follows is not ours to read."""
    line = b""
    while not line.endswith(b"\n"):
        byte = connection.recv(1)
        if not byte or len(line) > 200:
            raise ValueError("no line")
        line += byte
    return line


def _share(listener: socket.socket) -> None:
    """The port is MLX's afterwards, while our connections to it live on."""
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
