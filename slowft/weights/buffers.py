"""Makes MLX buffers that a drive can fill without a copy: page-aligned, on huge pages.

Comes in: a size. Goes out: a uint8 array of undefined content. The thread that computes calls this.
"""

import io
import mmap

import mlx.core as mx
import numpy as np

from .. import platform
from ..memory import computes_on_gpu

LARGE_NBYTES = 1 << 20  # a smaller read is not worth aligning

# What a tensor's address on a GPU has to be a multiple of. Metal wants offsets into a buffer aligned to the type that a
# kernel reads, 16 bytes at most. For operands that are not (`gemv_wide_config`: multiples of 8) MLX chooses other
# kernels, whose last bits differ from those of a model in memory, where every tensor has its own buffer.
GPU_ALIGNMENT = 16


def reads_directly() -> bool:
    """Whether MLX's buffers are filled past the file cache: wherever they are in the processor's own memory.

    That is so on macOS, whose GPU shares the processor's memory, and on MLX's CPU backend.
    """
    return platform.MACOS or not computes_on_gpu()


def lies_as_in_file(offset: int, item_nbytes: int = 1) -> bool:
    """Whether a tensor at this offset of a file can be computed with where a drive puts it.

    A drive puts it at the same place of a memory page as it has in the file's page. In files of `slowft prepare`,
    tensors begin on pages. In others the header's length decides their offset: a multiple of 8 in most, any number in
    those that MLX writes. Tensors that cannot be used there are copied to their place after they are read.

    Args:
        item_nbytes: bytes of an element, which a CPU wants aligned; 1 if alignment does not matter.
    """
    alignment = GPU_ALIGNMENT if computes_on_gpu() else item_nbytes
    return reads_directly() and offset % alignment == 0


def shift(offset: int) -> int:
    """Where in a buffer the bytes at this offset of a file have to begin, so that a drive can put them there."""
    return offset % platform.DIRECT_ALIGNMENT if lies_as_in_file(offset) else 0


def read_buffer(nbytes: int) -> mx.array:
    """An evaluated array, uint8 `[max(nbytes, 1)]`, writable through `memoryview`.

    From `LARGE_NBYTES` on, where `reads_directly`, it begins on a page (which takes one page more) and lies on huge
    pages. 88 MB in requests of 8 MB were read at 2.1 GB/s there, and at 1.6 GB/s on pages of 4 KB.
    """
    if nbytes < LARGE_NBYTES or not reads_directly():
        buffer = mx.zeros((max(nbytes, 1),), mx.uint8)
        mx.eval(buffer)
        return buffer
    whole = mx.load(_NothingToRead(nbytes + platform.DIRECT_ALIGNMENT), format="npy", stream=mx.cpu)
    mx.eval(whole)
    address = np.asarray(memoryview(whole)).ctypes.data
    platform.use_huge_pages(address, whole.nbytes)
    start = -address % platform.DIRECT_ALIGNMENT
    with mx.stream(mx.cpu):  # a GPU would come to it only after all that it has to do
        buffer = whole[start : start + nbytes]
        mx.eval(buffer)
    return buffer


def take_pages(buffer: memoryview) -> None:
    """Bring all pages of a buffer into memory, as a first read to it does. The content is lost."""
    buffer[:: mmap.PAGESIZE] = bytes(-(-len(buffer) // mmap.PAGESIZE))


class _NothingToRead(io.RawIOBase):
    """A .npy file whose data are never read: an array loaded from it has memory that is not written yet.

    88 MB take 0.4 ms this way, and 50 ms as zeros. The first read into a page is then the first use of it.
    """

    def __init__(self, nbytes: int):
        header = io.BytesIO()
        description = {"descr": "|u1", "fortran_order": False, "shape": (nbytes,)}
        np.lib.format.write_array_header_1_0(header, description)
        self._header, self._at = header.getvalue(), 0

    def readinto(self, target: memoryview) -> int:
        part = self._header[self._at : self._at + len(target)]
        target[: len(part)] = part
        self._at += len(target)
        return len(target)

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: len(self._header)}[whence]
        return self._at
