"""Connects the machines that train together: sums and messages over MLX's engine, and no hang when one is lost.

Comes in: what `mlx.launch` sets in the environment. Goes out: `Machines`, which every run has. Usually there is one
machine alone, and nothing of MLX's engine is started. MLX is called on a thread of its own: when a machine is lost,
some calls never return (with MLX 0.32.4's ring, when one of three is killed, one of the others waits), and the
caller's thread has to go on.
"""

import atexit
import functools
import json
import os
import queue
import signal
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from ..errors import ConfigError, PeerLost, first_line
from .peers import FAIL_S, JOIN_S, Loss, Peers

T = TypeVar("T")
SMALL_NBYTES = 512  # a message of at most this size, with its length, takes one collective
END_S = 10.0  # a process that has not ended this long after a loss is ended by force
COPIES = 3  # a sum takes at most this many copies of the trainable parameters: input, MLX's own, output


class Machines:
    """This machine and the others. All machines have to call the same collective methods in the same order.

    Attributes:
        rank, size: this machine's number, from 0, and the number of machines.
    """

    def __init__(self, rank: int = 0, size: int = 1, peers: Peers | None = None, group: Any = None):
        self.rank, self.size = rank, size
        self._peers, self._group = peers, group
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], Future]] = queue.SimpleQueue()
        if peers is not None:
            threading.Thread(target=self._work, name="slowft-machines", daemon=True).start()
            atexit.register(self._at_exit)
        self._error: str | None = None
        self._is_stuck = False

    @property
    def name(self) -> str:
        return _name(self.rank, self.size)

    def gather(self, values: T) -> list[T]:
        """The values of all machines, by rank. JSON has to be able to hold them."""
        if self.size == 1:
            return [values]
        text = json.dumps(values).encode()
        head = len(text).to_bytes(4, "little") + text[: SMALL_NBYTES - 4]
        heads = self._gather_bytes(head.ljust(SMALL_NBYTES))
        n = [int.from_bytes(head[:4], "little") for head in heads]
        if max(n) <= SMALL_NBYTES - 4:
            texts = [head[4 : 4 + length] for head, length in zip(heads, n)]
        else:
            texts = [whole[:length] for whole, length in zip(self._gather_bytes(text.ljust(max(n))), n)]
        return [json.loads(text) for text in texts]

    def sum(self, vector: mx.array) -> mx.array:
        """The sum of the machines' float32 vectors, the same bits on all of them.

        The vector is evaluated first, and the sum is computed on the CPU: MLX's engine has no sum on a GPU's stream.
        """
        if self.size == 1:
            return vector
        mx.eval(vector)
        return mx.array(self._collect(mx.distributed.all_sum, np.asarray(vector)))

    def send(self, source: int, data: bytes | None) -> bytes:
        """Send `data` of the machine of rank `source` to all machines, which return it."""
        (nbytes,) = {n for n in self.gather(None if data is None else len(data)) if n is not None}
        padded = (data or b"").ljust(-(-nbytes // 4) * 4, b"\0") if self.rank == source else bytes(-(-nbytes // 4) * 4)
        values = np.frombuffer(padded, np.int32)  # a sum with zeros keeps every bit of an integer
        return self._collect(mx.distributed.all_sum, values).tobytes()[:nbytes]

    def in_turn(self, function: Callable[[], object]) -> None:
        """Call `function` on one machine after the other, because they may share a disk."""
        for rank in range(self.size):
            if rank == self.rank:
                function()
            self.gather(None)

    def leads(self, loss: Loss | None = None) -> bool:
        """Whether this machine writes files and shows messages: the first does, or all others if the first is lost."""
        return self.rank == 0 or (loss is not None and loss.rank == 0)

    @property
    def speaks(self) -> bool:
        """Whether this machine shows an error that ends the run on all machines."""
        loss = None if self._peers is None else self._peers.loss
        return self.leads(None if loss is not None and loss.said and not self._is_stuck else loss)

    def fail(self, error: BaseException) -> None:
        """Tell the other machines of the error that ends the run on this one."""
        if self._peers is not None and self._error is None:
            self._error = str(error) or type(error).__name__
            self._peers.leave(self._error)

    @contextmanager
    def failing(self) -> Iterator[None]:
        """Tell the other machines of any error that is raised within this context."""
        try:
            yield
        except BaseException as e:
            self.fail(e)
            raise

    def end_soon(self, message: str) -> None:
        """End the process by force after `END_S`: a machine was lost, so something may wait for MLX for ever."""

        def end() -> None:
            if self.speaks:
                print(f"Error: {message}", file=sys.stderr, flush=True)
            os._exit(1)

        timer = threading.Timer(END_S, end)
        timer.daemon = True
        timer.start()

    # --- MLX's thread ---------------------------------------------------------------------------------

    def _gather_bytes(self, data: bytes) -> list[bytes]:
        gathered = self._collect(mx.distributed.all_gather, np.frombuffer(data, np.uint8))
        return [row.tobytes() for row in gathered.reshape(self.size, -1)]

    def _collect(self, collective: Callable[..., mx.array], values: np.ndarray) -> np.ndarray:
        def take_part() -> np.ndarray:
            result = collective(mx.array(values), group=self._group, stream=mx.cpu)
            mx.eval(result)  # lets other threads run meanwhile, which the conversion to NumPy does not
            return np.array(result)

        return self._run(take_part)

    def _run(self, function: Callable[[], T]) -> T:
        """Call `function` on MLX's thread.

        Raises:
            PeerLost: a machine is lost, so the call failed or will never return.
        """
        future: Future = Future()
        self._calls.put((function, future))
        while not wait([future], 0.1).done:
            if self._peers.loss is not None:
                raise self._lost(self._peers.loss)
            if self._peers.some_left and not wait([future], FAIL_S).done:
                raise self._lost(Loss(None, "it has ended its run"))
        try:
            return future.result()
        except RuntimeError as e:  # MLX noticed the loss first; which machine it is becomes known a moment later
            self._peers.wait(FAIL_S, lambda: self._peers.loss is not None)
            raise self._lost(self._peers.loss or Loss(None, str(e))) from None

    def _lost(self, loss: Loss) -> PeerLost:
        """The error to raise. From now on the process can only end by force: a thread may wait in MLX for ever."""
        self._peers.lose(loss)
        self._is_stuck = True
        return PeerLost(self.describe(loss), loss)

    def describe(self, loss: Loss, when: str = "") -> str:
        """Which machine was lost, when, and why."""
        who = "a machine" if loss.rank is None else _name(loss.rank, self.size)
        return f"{who} {'failed' if loss.said else 'was lost'}{when}: {loss.why}"

    def _work(self) -> None:
        while True:
            function, future = self._calls.get()
            try:
                future.set_result(function())
            except Exception as e:
                future.set_exception(e)

    def _at_exit(self) -> None:
        self._peers.leave(self._error)
        if self._is_stuck:
            for stream in (sys.stdout, sys.stderr):
                with suppress(OSError, ValueError):
                    stream.flush()
            os._exit(1)


@functools.cache  # a process can join only once
def of_launch() -> Machines:
    """The machines on which `mlx.launch` started this program, or this one alone.

    Raises:
        ConfigError: slowft cannot watch the machines of this kind of launch.
        PeerLost: not all machines came.
    """
    found = launched()
    if found is None:
        return Machines()
    backend, rank, size, address = found
    peers = Peers(rank, size, address)
    with _interrupted_after(JOIN_S):
        try:
            group = mx.distributed.init(strict=True, backend=backend)
        except (RuntimeError, ValueError) as e:
            reason = first_line(e)
            raise PeerLost(
                f"{_name(rank, size)} could not join the others: {reason}. Start all of them again"
            ) from None
    return Machines(rank, size, peers, group)


def checksum(model) -> int:
    """A checksum (CRC-32) of the trainable parameters."""
    crc = 0
    for name, array in tree_flatten(model.trainable_parameters()):
        crc = zlib.crc32(name.encode(), crc)
        crc = zlib.crc32(memoryview(array.reshape(-1).view(mx.uint8)) if array.size else b"", crc)
    return crc


def launched() -> tuple[str, int, int, tuple[str, int]] | None:
    """(MLX's name of the engine, rank, number of machines, address of the first); None if this is the only machine.

    Raises:
        ConfigError: it is another kind of launch, or not all is said that `mlx.launch` says.
    """
    env = os.environ
    if int(env.get("OMPI_COMM_WORLD_SIZE", 1)) > 1 or int(env.get("MLX_WORLD_SIZE", 1)) > 1:
        raise ConfigError("several machines train over MLX's ring or JACCL. Give mlx.launch --backend ring or jaccl")
    if "MLX_RANK" not in env:
        return None
    try:
        if "MLX_JACCL_COORDINATOR" in env:
            size = len(_read_json(env["MLX_IBV_DEVICES"]) or [0])
            backend, address = "jaccl", env["MLX_JACCL_COORDINATOR"]
        else:
            hosts = _read_json(env["MLX_HOSTFILE"]) or [["127.0.0.1:0"]]
            backend, size, address = "ring", len(hosts), hosts[0][0]
        host, _, port = address.rpartition(":")
        rank = int(env["MLX_RANK"])
        return None if size == 1 else (backend, rank, size, (host, int(port)))
    except (OSError, ValueError, KeyError, IndexError, TypeError) as e:
        raise ConfigError(
            f"MLX_RANK is set, but not what mlx.launch sets with it ({e!r}). Start with mlx.launch, or unset MLX_RANK"
        ) from None


def _read_json(file: str) -> Any:
    """What a JSON file holds; None for an empty file, which mlx.launch writes for one machine."""
    with open(file) as f:
        text = f.read().strip()
    return json.loads(text) if text else None


@contextmanager
def _interrupted_after(seconds: float) -> Iterator[None]:
    """Interrupt this context by a signal after `seconds`: MLX may wait for ever, and holds Python's lock meanwhile."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGALRM, lambda number, frame: None)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _name(rank: int, size: int) -> str:
    return f"machine {rank + 1} of {size} (rank {rank})"
