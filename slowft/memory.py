"""The only owner of MLX's memory limits: for arrays, for the freed buffers that MLX keeps, and for wired memory.

Comes in: bytes. Goes out: calls of `mx.set_memory_limit`, `mx.set_cache_limit`, `mx.set_wired_limit` and
`mx.clear_cache`, which nothing else in slowft calls. They work differently on MLX's two backends, so there is one
strategy for each. `limits` gives the one that holds. The plan decides how much is kept, never this file.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx

UNLIMITED_NBYTES = 1 << 60


class CpuLimits:
    """The limits on MLX's CPU backend (mlx/backend/no_gpu/allocator.cpp), and what both backends have in common.

    When the cache limit is lowered, MLX waits for everything under way, and gives back at once what is above the limit.
    Beyond the memory limit MLX computes one operation at a time.
    """

    def __init__(self):
        self._found: tuple[int, int] | None = None  # (memory, cache) before slowft set either
        self._is_abandoned = False

    @property
    def found_cache_nbytes(self) -> int:
        """MLX's cache limit as it was before slowft set it."""
        return self._note_found()[1]

    def hold(self, active_nbytes: int | None, freed_nbytes: int = 0) -> None:
        """From now on arrays take about this much at most: MLX allocates less far ahead of what it computes.

        Args:
            active_nbytes: bytes of arrays; None for the limit as it was before slowft set it.
            freed_nbytes: bytes of freed buffers that the same ceiling has room for beside these arrays.
        """
        memory_nbytes, _ = self._note_found()
        mx.set_memory_limit(memory_nbytes if active_nbytes is None else active_nbytes)

    @contextmanager
    def one_at_a_time(self) -> Iterator[None]:
        """While this is entered, MLX waits for each operation before it allocates the next one's buffers."""
        before = mx.set_memory_limit(1)
        try:
            yield
        finally:
            mx.set_memory_limit(before)

    def keep_freed(self, nbytes: int, of_those_kept: int | None = None) -> None:
        """From now on MLX keeps up to `nbytes` of freed buffers for reuse.

        Args:
            of_those_kept: bytes of the buffers kept already that may stay; the oldest beyond that are given back now.
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
        """From now on the system should leave so many bytes of arrays in memory.

        This does nothing on the CPU backend, whose memory is the process's own and is never wired.
        """

    def restore(self) -> None:
        """Set every limit as it was before slowft set it."""
        if self._found is not None:
            memory_nbytes, cache_nbytes = self._found
            mx.set_memory_limit(memory_nbytes)
            mx.set_cache_limit(cache_nbytes)
            self._found = None

    def abandon(self) -> None:
        """From now on nothing waits for MLX: it has begun what will never end, a sum with a machine that is lost.

        Giving back freed buffers would wait, and so would allocating beyond the memory limit. The process ends soon.
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
        """While this is entered, MLX gives freed buffers to the system. It keeps those that it has already."""
        with self.keeping_freed(mx.get_cache_memory()):
            yield

    def _note_found(self) -> tuple[int, int]:
        if self._found is None:  # MLX returns a limit only when it is set; setting a higher one gives nothing back
            self._found = mx.set_memory_limit(UNLIMITED_NBYTES), mx.set_cache_limit(UNLIMITED_NBYTES)
            mx.set_memory_limit(self._found[0])
            mx.set_cache_limit(self._found[1])
        return self._found

    def _trim(self, nbytes: int) -> None:
        mx.set_cache_limit(nbytes)


class MetalLimits(CpuLimits):
    """The limits on Metal (mlx/backend/metal/allocator.cpp).

    There the memory limit is for arrays and freed buffers together: if a new buffer would go beyond it, freed ones are
    given back first. MLX also waits for a command buffer, and so for the buffers that are freed when that has
    completed, where arrays alone are beyond it. So it is the ceiling, and must not follow the cache limit, which goes
    up and down within a step. A lower cache limit applies at once to what is freed from then on. What is kept already
    is given back only at the next allocation.
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
            mx.synchronize()  # else the buffers of the last command buffers are freed only after this
        super().give_back()

    def wire(self, nbytes: int) -> None:
        """Wire arrays, or macOS may compress weights that stay in memory between two uses.

        MLX wires whatever is allocated while that fits the limit, so weights are certainly wired only if everything is.
        Never more is wired than the working set that Metal recommends: MLX refuses more, and the machine may panic.
        Before macOS 15 nothing can be wired, and MLX ignores the call.
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
        # Any allocation gives back what is above the limit. This one is made at once: what the GPU had to make would
        # wait for all that was handed to it before.
        mx.eval(mx.array(0))


def limits() -> CpuLimits:
    """The limits of MLX's allocator, which is Metal's wherever there is Metal: the same object each time."""
    return _limits_of(computes_on_gpu() or mx.metal.is_available())


def computes_on_gpu() -> bool:
    """Whether MLX's default device is a GPU."""
    return mx.default_device() != mx.Device(mx.cpu)


@functools.cache
def _limits_of(is_metals: bool) -> CpuLimits:
    return MetalLimits() if is_metals else CpuLimits()
