"""The machines that train together: sums and messages over MLX's engine, and no hang when one is lost.

Comes in: what `mlx.launch` sets in the environment. Goes out: `Machines`, which every run has; usually it is one alone,
and nothing of MLX's engine begins. Its calls run on a thread of their own: when a machine is lost some of them never
return (MLX 0.32.4's ring: of three one killed, one of the two others waits), and the caller's thread has to go on.
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

from ..errors import ConfigError, PeerLost
from .peers import FAIL_S, JOIN_S, Loss, Peers

T = TypeVar("T")
SMALL_NBYTES = 512  # of a message that takes one round: its length and its text
END_S = 10.0  # that a process has to end by itself after a loss
COPIES = 3  # of the trainable parameters that a sum takes at most: what goes in, MLX's, what comes out


class Machines:
    """This machine and the others. Whatever is called here is called by all of them, in the same order.

    Attributes:
        rank, size: this one's number, from 0, and how many there are.
    """

    def __init__(self, rank: int = 0, size: int = 1, peers: Peers | None = None, group: Any = None):
        self.rank, self.size = rank, size
        self._peers, self._group = peers, group
        self._jobs: queue.SimpleQueue[tuple[Callable[[], Any], Future]] = queue.SimpleQueue()
        if peers is not None:
            threading.Thread(target=self._work, name="slowft-machines", daemon=True).start()
            atexit.register(self._at_exit)
        self._error: str | None = None
        self._is_stuck = False

    @property
    def name(self) -> str:
        return _name(self.rank, self.size)

    def gather(self, values: T) -> list[T]:
        """What each machine gives, by rank. Values are such that JSON has."""
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

        It is taken on the CPU, of values that are computed: MLX's engine has no sum on a GPU's stream.
        """
        if self.size == 1:
            return vector
        mx.eval(vector)
        return mx.array(self._together(mx.distributed.all_sum, np.asarray(vector)))

    def send(self, source: int, data: bytes | None) -> bytes:
        """On all machines, the `data` of the one of rank `source`."""
        (nbytes,) = {n for n in self.gather(None if data is None else len(data)) if n is not None}
        padded = (data or b"").ljust(-(-nbytes // 4) * 4, b"\0") if self.rank == source else bytes(-(-nbytes // 4) * 4)
        values = np.frombuffer(padded, np.int32)  # a sum with zeros keeps every bit of an integer
        return self._together(mx.distributed.all_sum, values).tobytes()[:nbytes]

    def in_turn(self, function: Callable[[], object]) -> None:
        """`function()` on one machine after the other: for what would meet on a disk that they share."""
        for rank in range(self.size):
            if rank == self.rank:
                function()
            self.gather(None)

    def leads(self, loss: Loss | None = None) -> bool:
        """Whether this machine writes files and speaks: the first does, and every one that is left without it."""
        return self.rank == 0 or (loss is not None and loss.rank == 0)

    @property
    def speaks(self) -> bool:
        """Whether an error that ends the run on all machines is to be shown here."""
        loss = None if self._peers is None else self._peers.loss
        return self.leads(None if loss is not None and loss.said and not self._is_stuck else loss)

    def fail(self, error: BaseException) -> None:
        """What ends the run on this machine; the others are told."""
        if self._peers is not None and self._error is None:
            self._error = str(error) or type(error).__name__
            self._peers.leave(self._error)

    @contextmanager
    def failing(self) -> Iterator[None]:
        """Tell the others of an error that leaves this."""
        try:
            yield
        except BaseException as e:
            self.fail(e)
            raise

    def end_soon(self, said: str) -> None:
        """A machine was lost, and all is written: should anything else wait for MLX, the process ends nevertheless."""

        def end() -> None:
            if self.speaks:
                print(f"Error: {said}", file=sys.stderr, flush=True)
            os._exit(1)

        timer = threading.Timer(END_S, end)
        timer.daemon = True
        timer.start()

    # --- MLX's thread ---------------------------------------------------------------------------------

    def _gather_bytes(self, data: bytes) -> list[bytes]:
        found = self._together(mx.distributed.all_gather, np.frombuffer(data, np.uint8))
        return [row.tobytes() for row in found.reshape(self.size, -1)]

    def _together(self, collective: Callable[..., mx.array], values: np.ndarray) -> np.ndarray:
        def take_part() -> np.ndarray:
            found = collective(mx.array(values), group=self._group, stream=mx.cpu)
            mx.eval(found)  # lets other threads run meanwhile, which the conversion to NumPy does not
            return np.array(found)

        return self._run(take_part)

    def _run(self, function: Callable[[], T]) -> T:
        """`function()` on MLX's thread.

        Raises:
            PeerLost: a machine is lost, so that it will not end, or has not.
        """
        future: Future = Future()
        self._jobs.put((function, future))
        while not wait([future], 0.1).done:
            if self._peers.loss is not None:
                raise self._lost(self._peers.loss)
            if self._peers.some_left and not wait([future], FAIL_S).done:
                raise self._lost(Loss(None, "it has ended its run"))
        try:
            return future.result()
        except RuntimeError as e:  # MLX noticed first; who it is comes a moment later
            self._peers.wait(FAIL_S, lambda: self._peers.loss is not None)
            raise self._lost(self._peers.loss or Loss(None, str(e))) from None

    def _lost(self, loss: Loss) -> PeerLost:
        """The error to raise; from now on the process can only end by force: a thread may be inside of MLX for ever."""
        self._peers.lose(loss)
        self._is_stuck = True
        return PeerLost(self.describe(loss), loss)

    def describe(self, loss: Loss, when: str = "") -> str:
        """Which machine was lost, when, and why."""
        who = "a machine" if loss.rank is None else _name(loss.rank, self.size)
        return f"{who} {'failed' if loss.said else 'was lost'}{when}: {loss.why}"

    def _work(self) -> None:
        while True:
            function, future = self._jobs.get()
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


@functools.cache  # a process joins once, as MLX's engine does
def of_launch() -> Machines:
    """The machines that `mlx.launch` started this process with; this one alone if none did.

    Raises:
        ConfigError: the launch is of a kind that slowft has no way to watch.
        PeerLost: not all came.
    """
    found = _launched()
    if found is None:
        return Machines()
    backend, rank, size, address = found
    peers = Peers(rank, size, address)
    with _interrupted_after(JOIN_S):
        try:
            group = mx.distributed.init(strict=True, backend=backend)
        except (RuntimeError, ValueError) as e:
            reason = str(e).splitlines()[0]
            raise PeerLost(
                f"{_name(rank, size)} could not join the others: {reason}. Start all of them again"
            ) from None
    return Machines(rank, size, peers, group)


def checksum(model) -> int:
    """Of the trainable parameters."""
    found = 0
    for name, array in tree_flatten(model.trainable_parameters()):
        found = zlib.crc32(name.encode(), found)
        found = zlib.crc32(memoryview(array.reshape(-1).view(mx.uint8)) if array.size else b"", found)
    return found


def _launched() -> tuple[str, int, int, tuple[str, int]] | None:
    """(MLX's name of the engine, rank, number of machines, where the first can be reached); None: not launched."""
    env = os.environ
    if int(env.get("OMPI_COMM_WORLD_SIZE", 1)) > 1 or int(env.get("MLX_WORLD_SIZE", 1)) > 1:
        raise ConfigError("several machines train over MLX's ring or JACCL. Give mlx.launch --backend ring or jaccl")
    if "MLX_RANK" not in env:
        return None
    try:
        if "MLX_JACCL_COORDINATOR" in env:
            size = len(_read_json(env["MLX_IBV_DEVICES"]) or [0])
            backend, where = "jaccl", env["MLX_JACCL_COORDINATOR"]
        else:
            hosts = _read_json(env["MLX_HOSTFILE"]) or [["127.0.0.1:0"]]
            backend, size, where = "ring", len(hosts), hosts[0][0]
        host, _, port = where.rpartition(":")
        rank = int(env["MLX_RANK"])
        return None if size == 1 else (backend, rank, size, (host, int(port)))
    except (OSError, ValueError, KeyError, IndexError, TypeError) as e:
        raise ConfigError(
            f"MLX_RANK is set, but not what mlx.launch sets with it ({e!r}). Start with mlx.launch, or unset MLX_RANK"
        ) from None


def _read_json(file: str) -> Any:
    """None of an empty file, which mlx.launch makes for one machine."""
    with open(file) as f:
        text = f.read().strip()
    return json.loads(text) if text else None


@contextmanager
def _interrupted_after(seconds: float) -> Iterator[None]:
    """MLX joins while it holds Python's lock, and waits for its peers for ever: a signal breaks its wait off."""
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
