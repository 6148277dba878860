"""MLX buffers that a drive can fill without a copy: page-aligned, on huge pages.

Comes in: a size. Goes out: a uint8 array of undefined content. Called by the thread that computes.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx
import numpy as np

from .. import platform

LARGE_NBYTES = 1 << 20  # below, a read is not worth aligning


def reads_directly() -> bool:
    """Whether files are read past the file cache only into aligned memory: Linux, on MLX's CPU backend.

    (A GPU's kernels want tensors aligned by more than files do; macOS needs no alignment.)
    """
    return not platform.MACOS and mx.default_device() == mx.Device(mx.cpu)


def shift(offset: int) -> int:
    """Where in a buffer bytes from this offset of a file have to begin, so that a drive can put them there."""
    return offset % platform.DIRECT_ALIGNMENT if reads_directly() else 0


def read_buffer(nbytes: int) -> mx.array:
    """An evaluated array, uint8 `[max(nbytes, 1)]`, writable through `memoryview`.

    From `LARGE_NBYTES` on, where `reads_directly`, it begins on a page (which takes one page more) and lies on huge
    pages: 88 MB in requests of 8 MB came in at 2.1 GB/s, on pages of 4 KB at 1.6.
    """
    if nbytes < LARGE_NBYTES or not reads_directly():
        buffer = mx.zeros((max(nbytes, 1),), mx.uint8)
        mx.eval(buffer)
        return buffer
    whole = mx.zeros((nbytes + platform.DIRECT_ALIGNMENT,), mx.uint8)
    mx.eval(whole)
    address = np.asarray(memoryview(whole)).ctypes.data
    platform.use_huge_pages(address, whole.nbytes)
    start = -address % platform.DIRECT_ALIGNMENT
    buffer = whole[start : start + nbytes]
    mx.eval(buffer)
    return buffer


@contextmanager
def freeing_to_the_system() -> Iterator[None]:
    """What is freed meanwhile does not go to MLX's cache, which keeps what it has: of sizes that are asked for."""
    limit = mx.set_cache_limit(mx.get_cache_memory())
    try:
        yield
    finally:
        mx.set_cache_limit(limit)
