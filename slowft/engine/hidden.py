"""The hidden states that a step keeps from its forward pass: block inputs, in memory or on disk.

Comes in: arrays of the compute thread, by micro-batch and visit. Goes out: the same arrays, once. Inputs of the first
visits, which the backward pass needs last, may be spilled to a file. They are written while blocks compute, and read
ahead. Never used by another thread than the one that computes.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path

import mlx.core as mx

from .. import tracing
from ..weights.spill import SpillFile

Key = tuple[int, int]  # (micro-batch, visit)
ALIGNMENT = 4096  # bytes: arrays begin in the file at multiples of it


class HiddenStates:
    """Inputs of blocks, by micro-batch and visit.

    Attributes:
        bytes_written, bytes_read: of the spill file, so far.
        wait_s: seconds that the computation waited for the spill file.
    """

    def __init__(self):
        self._spilled, self._directory = 0, None
        self._in_memory: dict[Key, mx.array] = {}
        self._on_disk: dict[Key, tuple[int, tuple[int, ...], mx.Dtype, int]] = {}
        self._ahead: dict[Key, Future] = {}
        self._file: SpillFile | None = None
        self._reserved_nbytes = self._end = 0
        self.bytes_written = self.bytes_read = 0
        self.wait_s = 0.0
        self._watched: tuple[int | None, Callable] = None, lambda *_: None

    def watch(self, position: int | None, on_arrival: Callable[[int, mx.array], None] = lambda *_: None) -> None:
        """From now on `on_arrival(micro_batch, array)` is called with each input of the visit `position`."""
        self._watched = position, on_arrival

    def spill(self, visits: int, directory: Path | None) -> None:
        """From now on inputs of visits below `visits` go to a file in `directory`."""
        self.close()
        self._spilled, self._directory = visits, directory

    def reserve(self, nbytes: Sequence[int]) -> None:
        """Reserve room on disk for a step whose block inputs have `nbytes`, for each micro-batch.

        Raises:
            SlowftError: the disk is too full; nothing has been computed yet.
        """
        needed = max(self._spilled - 1, 0) * sum(map(_aligned, nbytes))  # the first visit's input is never spilled
        if needed > self._reserved_nbytes:
            self.close()
            pending = 2 * max(map(_aligned, nbytes))  # one being written while the next is computed
            self._file, self._reserved_nbytes = SpillFile(self._directory, needed, pending), needed

    def put(self, key: Key, array: mx.array, may_spill: bool) -> None:
        """Keep an evaluated array. If it is to be spilled, writing it starts now.

        Args:
            may_spill: False if the backward pass does not need the array.
        """
        self._in_memory[key] = array
        if key[1] == self._watched[0]:
            self._watched[1](key[0], array)
        if may_spill and key[1] < self._spilled:
            offset, self._end = self._end, self._end + _aligned(array.nbytes)
            self._on_disk[key] = (offset, array.shape, array.dtype, array.nbytes)
            begin = time.perf_counter()
            with tracing.span("wait", "spill write"):
                self._file.write(offset, memoryview(array.reshape(-1).view(mx.uint8)))
            self.wait_s += time.perf_counter() - begin
            self.bytes_written += array.nbytes

    def get(self, key: Key) -> mx.array:
        """The array, for the forward pass: it is still in memory."""
        return self._in_memory[key]

    def forward_done(self, key: Key) -> None:
        """The forward pass needs this array no more: if it is spilled, it leaves memory."""
        if key in self._on_disk:
            del self._in_memory[key]

    def pop(self, key: Key, following: Key | None = None) -> mx.array:
        """The array, which is then kept no longer.

        Args:
            following: the array that is needed next. If it is on disk, reading it starts now.
        """
        if key in self._in_memory:
            array = self._in_memory.pop(key)
        else:
            self._read_ahead(key)
            _, shape, dtype, nbytes = self._on_disk.pop(key)
            begin = time.perf_counter()
            with tracing.span("wait", "spill read"):
                raw = self._ahead.pop(key).result()
            self.wait_s += time.perf_counter() - begin
            self.bytes_read += nbytes
            array = mx.array(raw).view(dtype).reshape(shape)
        if following is not None and following in self._on_disk:
            self._read_ahead(following)
        return array

    def discard(self, key: Key) -> None:
        self._in_memory.pop(key, None)

    def clear(self) -> None:
        """Forget all arrays: the step is over, or was broken off."""
        for read in self._ahead.values():
            read.exception()
        self._in_memory.clear()
        self._on_disk.clear()
        self._ahead.clear()
        self._end = 0

    def close(self) -> None:
        self.clear()
        if self._file is not None:
            self._file.close()
            self._file, self._reserved_nbytes = None, 0

    def _read_ahead(self, key: Key) -> None:
        if key not in self._ahead:
            offset, _, _, nbytes = self._on_disk[key]
            self._ahead[key] = self._file.read(offset, nbytes)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
