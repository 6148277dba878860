"""Notices when one of the machines that train together is lost, by a TCP connection of each to the first.

Comes in: where the first listens. Goes out: `Peers.loss`, as soon as a process has ended for any reason, and half a
minute after a network went silent. slowft sends nothing while all is well. The operating systems check the connections
(TCP keepalive), so a process that computes for an hour, or is suspended, is not taken for lost.
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

JOIN_S = 60.0  # all machines have to come within this time: a launcher starts them at once
FINISH_S = 60.0  # a machine that is done waits this long for the others
FAIL_S = 5.0  # a machine that failed waits this long for the others


@dataclass(frozen=True)
class Loss:
    """A machine that takes part no more. `rank` is None if nobody knows which; `said`: the machine said so itself."""

    rank: int | None
    why: str
    said: bool = False


class Peers:
    """Connections between `size` machines: the first has one to each other, and each other has one to the first.

    Attributes:
        loss: the first machine that was lost; None while all are there.
        connections: the open ones, by the other side's rank. One is closed here when it has ended.
    """

    def __init__(self, rank: int, size: int, address: tuple[str, int]):
        """Wait until all machines have come. After that `address` is free: MLX's own engine listens there next.

        Raises:
            PeerLost: not all machines came within `JOIN_S`.
        """
        self.rank, self.size, self.loss = rank, size, None
        self._changed = threading.Condition()
        self._left: set[int] = set()  # machines that said they are done or failed, or whose connection has ended
        self._gone: set[int] = set()  # machines whose connection has ended
        self._is_over = False
        deadline = time.monotonic() + JOIN_S
        self.connections = (
            _accept(size, address, deadline) if rank == 0 else {0: _connect(rank, size, address, deadline)}
        )
        for connection in self.connections.values():
            platform.keep_alive(connection)
        threading.Thread(target=self._watch, name="slowft-peers", daemon=True).start()

    def lose(self, loss: Loss) -> None:
        """Note that a machine does not take part any more. The first machine tells the others."""
        with self._changed:
            self.loss = self.loss or loss
            self._changed.notify_all()
        if self.rank == 0:
            self._send({"lost": [loss.rank, loss.why]})

    def wait(self, seconds: float, until: Callable[[], bool]) -> bool:
        """Wait until `until()` is true, which is tested at every change. False if it was not within these seconds."""
        with self._changed:
            return self._changed.wait_for(until, seconds)

    @property
    def some_left(self) -> bool:
        """Whether a machine has ended its run."""
        return bool(self._left)

    def leave(self, error: str | None) -> None:
        """Tell the others that this machine is done, or its error, and wait a little for them.

        The first machine ends when all others are done, and the others end after the first. So no connection ends while
        another machine still sums, and the first can finish writing before a launcher that has seen one end ends all.
        """
        if self._is_over:
            return
        self._is_over = True
        self._send({"done": True} if error is None else {"failed": error})
        if self.rank or error is None:
            others = self._left if self.rank == 0 else self._gone
            self.wait(FINISH_S if error is None else FAIL_S, lambda: others >= set(self.connections))

    def _send(self, message: dict) -> None:
        for connection in self.connections.values():
            with suppress(OSError):
                connection.sendall(json.dumps(message).encode() + b"\n")

    def _watch(self) -> None:
        selector = selectors.DefaultSelector()
        for rank, connection in self.connections.items():
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
                    self._receive(rank, json.loads(line))
                if not data:
                    selector.unregister(key.fileobj)
                    key.fileobj.close()
                    self.lose(Loss(rank, why))
                    self._add(rank, self._left, self._gone)
        selector.close()

    def _receive(self, rank: int, message: dict) -> None:
        if "failed" in message:
            self.lose(Loss(rank, message["failed"], said=True))
        elif "lost" in message:
            self.lose(Loss(*message["lost"]))
        if "lost" not in message:
            self._add(rank, self._left)

    def _add(self, rank: int, *sets: set[int]) -> None:
        with self._changed:
            for ranks in sets:
                ranks.add(rank)
            self._changed.notify_all()


def _accept(size: int, address: tuple[str, int], deadline: float) -> dict[int, socket.socket]:
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
            left = deadline - time.monotonic()
            if left <= 0:
                missing = ", ".join(str(rank + 1) for rank in range(1, size) if rank not in peers)
                raise PeerLost(
                    f"machine {missing} of {size} did not come within {JOIN_S:.0f} s. Is slowft installed there, and "
                    f"can it reach {address[0]}:{address[1]}?"
                )
            listener.settimeout(left)
            with suppress(OSError, ValueError, KeyError, TypeError):  # another program may connect, and is ignored
                connection, _ = listener.accept()
                connection.settimeout(5)
                hello = json.loads(_line(connection))
                if hello["slowft"] == size and 0 < hello["rank"] < size and hello["rank"] not in peers:
                    peers[hello["rank"]] = connection
    for connection in peers.values():  # the listener is closed, so MLX can listen now
        connection.sendall(b'{"go": true}\n')
        connection.settimeout(None)
    return peers


def _connect(rank: int, size: int, address: tuple[str, int], deadline: float) -> socket.socket:
    while (left := deadline - time.monotonic()) > 0:
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
    """Read one line, byte by byte, so that nothing after it is consumed."""
    line = b""
    while not line.endswith(b"\n"):
        byte = connection.recv(1)
        if not byte or len(line) > 200:
            raise ValueError("no line")
        line += byte
    return line


def _share(listener: socket.socket) -> None:
    """Let MLX listen at the same port afterwards, while our connections to it stay open."""
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
