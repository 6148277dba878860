"""The only owner of MLX's limits on memory: of arrays, of freed buffers that it keeps, and of wired memory.

Comes in: bytes. Goes out: calls of `mx.set_memory_limit`, `mx.set_cache_limit`, `mx.set_wired_limit` and
`mx.clear_cache`, which nothing else in slowft calls. What these do differs between MLX's two backends, so there is one
strategy for each; `limits` gives the one that holds. Never decides how much is kept: that is the plan's.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx

UNLIMITED_NBYTES = 1 << 60


class CpuLimits:
    """On MLX's CPU backend (mlx/backend/no_gpu/allocator.cpp), and what both backends have in common.

    A lower cache limit gives back at once what is above it, and first waits for everything under way. Beyond the memory
    limit MLX computes one operation at a time.
    """

    def __init__(self):
        self._found: tuple[int, int] | None = None  # (memory, cache) before slowft set either
        self._is_abandoned = False

    @property
    def found_cache_nbytes(self) -> int:
        """MLX's cache limit as it was before slowft set it."""
        return self._note_found()[1]

    def hold(self, active_nbytes: int | None, freed_nbytes: int = 0) -> None:
        """From now on, arrays take about this much at most: MLX allocates less far ahead of what it computes.

        Args:
            active_nbytes: None for the limit that was found.
            freed_nbytes: of freed buffers that the same ceiling has room for beside these arrays.
        """
        memory_nbytes, _ = self._note_found()
        mx.set_memory_limit(memory_nbytes if active_nbytes is None else active_nbytes)

    @contextmanager
    def one_at_a_time(self) -> Iterator[None]:
        """While this is entered, MLX waits for each operation before it makes the next one's buffers."""
        before = mx.set_memory_limit(1)
        try:
            yield
        finally:
            mx.set_memory_limit(before)

    def keep_freed(self, nbytes: int, of_those_kept: int | None = None) -> None:
        """From now on MLX keeps up to `nbytes` of freed buffers, to hand them out again.

        Args:
            of_those_kept: of the buffers that it keeps already, the oldest beyond so many bytes are given back now.
        """
        self._note_found()
        if of_those_kept is not None:
            self._trim(of_those_kept)
        mx.set_cache_limit(nbytes)

    def give_back(self) -> None:
        """Give all freed buffers that MLX keeps back to the system."""
        if not self._is_abandoned:
            mx.clear_cache()

    def wire(self, nbytes: int) -> None:
        """From now on the system is to leave so many bytes of arrays where they are.

        The CPU backend's memory is the process's own, which nothing wires.
        """

    def restore(self) -> None:
        """Set every limit as it was before slowft set it."""
        if self._found is not None:
            memory_nbytes, cache_nbytes = self._found
            mx.set_memory_limit(memory_nbytes)
            mx.set_cache_limit(cache_nbytes)
            self._found = None

    def abandon(self) -> None:
        """MLX has begun what will never end, a sum with a machine that is lost: from now on nothing waits for it.

        Giving back freed buffers does, and allocating beyond the memory limit. The process is about to end.
        """
        mx.set_memory_limit(UNLIMITED_NBYTES)
        self._found, self._is_abandoned = None, True

    @contextmanager
    def keeping_freed(self, nbytes: int) -> Iterator[None]:
        """While this is entered, MLX keeps up to `nbytes` of freed buffers."""
        before = mx.set_cache_limit(nbytes)
        try:
            yield
        finally:
            mx.set_cache_limit(before)

    @contextmanager
    def freeing_to_the_system(self) -> Iterator[None]:
        """While this is entered, MLX keeps no buffer that is freed; it has what it has, of sizes that are asked for."""
        with self.keeping_freed(mx.get_cache_memory()):
            yield

    def _note_found(self) -> tuple[int, int]:
        if self._found is None:  # MLX tells a limit only when it is given another; a higher one changes nothing
            self._found = mx.set_memory_limit(UNLIMITED_NBYTES), mx.set_cache_limit(UNLIMITED_NBYTES)
            mx.set_memory_limit(self._found[0])
            mx.set_cache_limit(self._found[1])
        return self._found

    def _trim(self, nbytes: int) -> None:
        mx.set_cache_limit(nbytes)


class MetalLimits(CpuLimits):
    """On Metal (mlx/backend/metal/allocator.cpp).

    The memory limit there is that of arrays and freed buffers together: a new buffer that would go beyond it takes the
    place of freed ones. It is also what arrays alone may take before MLX waits for a command buffer, and so for the
    buffers that are freed when that has completed: the ceiling, so it must not follow the cache limit, which goes up
    and down within a step. A lower cache limit keeps what is freed from then on from being kept, but what is kept
    already is given back only at the next allocation.
    """

    def __init__(self):
        super().__init__()
        self._found_wired_nbytes: int | None = None

    def hold(self, active_nbytes: int | None, freed_nbytes: int = 0) -> None:
        memory_nbytes, _ = self._note_found()
        if active_nbytes is not None:
            memory_nbytes = min(memory_nbytes, active_nbytes + freed_nbytes)
        mx.set_memory_limit(memory_nbytes)

    def give_back(self) -> None:
        if not self._is_abandoned:
            mx.synchronize()  # else what the last command buffers used is freed after this
        super().give_back()

    def wire(self, nbytes: int) -> None:
        """Have arrays wired, or macOS may compress weights that stay between two uses.

        MLX wires whatever is allocated as long as that is within the limit, so weights are wired for certain only where
        everything is. Never more than the working set that Metal recommends, which MLX refuses: beyond it, the machine
        may panic. Before macOS 15 nothing can be wired, and MLX takes no notice.
        """
        recommended_nbytes = mx.device_info(mx.gpu).get("max_recommended_working_set_size")
        if recommended_nbytes is None:  # another GPU than Apple's
            return
        before = mx.set_wired_limit(min(nbytes, int(recommended_nbytes)))
        if self._found_wired_nbytes is None:
            self._found_wired_nbytes = before

    def restore(self) -> None:
        super().restore()
        if self._found_wired_nbytes is not None:
            mx.set_wired_limit(self._found_wired_nbytes)
            self._found_wired_nbytes = None

    def _trim(self, nbytes: int) -> None:
        if mx.get_cache_memory() <= nbytes:
            return
        mx.set_cache_limit(nbytes)
        # Any allocation does it. This one is made at once; what the GPU had to make would wait for all before it.
        mx.eval(mx.array(0))


def limits() -> CpuLimits:
    """The limits of MLX's allocator, which is Metal's wherever there is Metal; the same object each time."""
    return _limits_of(computes_on_gpu() or mx.metal.is_available())


def computes_on_gpu() -> bool:
    """Whether MLX's default device is a GPU."""
    return mx.default_device() != mx.Device(mx.cpu)


@functools.cache
def _limits_of(is_metals: bool) -> CpuLimits:
    return MetalLimits() if is_metals else CpuLimits()
