"""What this machine is, and what it does per second, as far as earlier runs measured it.

Gives a `Machine` for a compute dtype. A run measures nothing before its first step (`known`). `slowft plan` has no step
to measure, so `measured` takes about half a second, 100 MB, and the model's files. It leaves MLX's limits as they were.
"""

import errno
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import mlx.core as mx

from .. import platform
from ..weights.buffers import read_buffer, shift, take_pages
from ..weights.reader import ByteRange, Reader
from .measure import Rates, remembered

PRODUCT_TOKENS, LARGE_MATRIX = 512, (2048, 4096)  # the product that is measured; larger ones are hardly faster
CAST_NBYTES = 32 << 20
# the share of a product's rate that a block's passes and the head reach, norms and attention included
OF_PRODUCTS = 0.7
READ_NBYTES = 32 << 20  # bytes read at a time
READ_AT_MOST_NBYTES = 512 << 20
UNCOUNTED_NBYTES = 8 << 20  # bytes read before those that count
READS_IN_FLIGHT = 4  # requests that runs make at once: a drive that needs fewer is no slower with more
CACHED_READS = 3  # reads of a piece in the file cache, to know what these take
# A read that takes less than so many times the seconds of one from the file cache may be one too: those differ by less
# while nothing else runs. A drive that is nearly as fast as its file cache stays unknown. It hardly holds a step up.
CACHE_SPREAD = 1.5
TELLING_NBYTES = 1 << 20  # fewer bytes to read say nothing about a drive
# for a machine of which nothing is known: plans that are made with it are right in bytes only
ASSUMED = Rates(forward=1e11, backward=1e11, head=1e11, cast=4e9, read=1e9)


@dataclass(frozen=True)
class Machine:
    """What a planner calculates with.

    Attributes:
        memory_nbytes: bytes that this process may use: physical memory or its control group's limit; on macOS the
            working set that Metal recommends, never the wired maximum.
        cores: processor cores that this process may use.
        device: name of the device that MLX computes on.
        compute_dtype: dtype that blocks are computed in.
        rates: what earlier runs, or `measured`, measured.
        write_bytes_per_s: bytes written to the drive per second. None stands for the rate of reading, as to measure it
            would write.
        reads_in_flight: requests that are made to the drive at once.
    """

    memory_nbytes: int
    cores: int
    device: str
    compute_dtype: str
    rates: Rates = Rates()
    write_bytes_per_s: float | None = None
    reads_in_flight: int = READS_IN_FLIGHT

    @property
    def is_assumed(self) -> bool:
        """Whether nothing was measured, so that predicted seconds mean nothing."""
        return self.rates.forward is None or self.rates.backward is None


def known(compute_dtype: mx.Dtype, matrix: tuple[int, int] = LARGE_MATRIX) -> Machine:
    """This machine, as far as it is known without measuring anything.

    Args:
        matrix: rows and columns of the largest matrix in a block.
    """
    device = str(mx.device_info().get("device_name", mx.default_device()))
    name = str(compute_dtype).rsplit(".", 1)[-1]
    return Machine(_memory_nbytes(), platform.cores(), device, name, remembered(device, name, matrix))


def measured(compute_dtype: mx.Dtype, files: Sequence[str], matrix: tuple[int, int] = LARGE_MATRIX) -> Machine:
    """This machine. What no run has measured yet is measured now.

    Args:
        files: model files. Reading is measured on them, from the middle on.
        matrix: rows and columns of the largest matrix in a block.
    """
    machine = known(compute_dtype, matrix)
    rates = machine.rates
    if rates.forward is None or rates.backward is None or rates.head is None or rates.cast is None:
        flops_per_s = OF_PRODUCTS * matmul_flops_per_s(compute_dtype, matrix)
        rates = rates.over(Rates(flops_per_s, flops_per_s, flops_per_s, _cast_bytes_per_s(compute_dtype)))
    if rates.read is None:
        rates = replace(rates, read=measure_reading(files))
    return replace(machine, rates=rates)


def matmul_flops_per_s(dtype: mx.Dtype, matrix: tuple[int, int] = LARGE_MATRIX) -> float:
    """Operations a second of the fastest of a few products with a matrix of this size, LARGE_MATRIX at most."""
    n, (inner, columns) = PRODUCT_TOKENS, min(matrix, LARGE_MATRIX, key=math.prod)
    a, b = mx.ones((n, inner), dtype), mx.ones((inner, columns), dtype)
    mx.eval(a, b)
    return 2 * n * inner * columns / _best(lambda: a @ b)


def _cast_bytes_per_s(dtype: mx.Dtype) -> float:
    """Bytes of casted values a second, written to memory that the process has already, as it has between blocks."""
    stored = mx.bfloat16 if dtype != mx.bfloat16 else mx.float16
    array = mx.zeros((CAST_NBYTES // dtype.size,), stored)
    mx.eval(array)
    return CAST_NBYTES / _best(lambda: array.astype(dtype))


def _best(function: Callable[[], mx.array]) -> float:
    """The least seconds that one evaluation takes. Other work on the machine can only add to them."""
    took = []
    for _ in range(4):
        begin = time.perf_counter()
        output = function()
        mx.eval(output)
        took.append(time.perf_counter() - begin)
        del output
    return min(took)


def _memory_nbytes() -> int:
    if platform.MACOS:
        recommended = mx.device_info().get("max_recommended_working_set_size")
        return int(recommended or platform.memory_limit())
    return platform.memory_limit()


# --- Reading --------------------------------------------------------------------------------------


def measure_reading(files: Sequence[str], seconds: float = 0.35, nbytes_at_once: int = READ_NBYTES) -> float | None:
    """Bytes of the files that the engine's own reader reads a second.

    Pieces are dropped from the file cache before they are read. The first read does not count, as a limit on reads
    lets some bytes through at once (a control group's 150 MB/s were 195 for the first 32 MB).

    A piece that comes about as fast as one that certainly is in the file cache came from the cache, not from the drive.
    Another one is measured in its place. The rate is None if there is too little to read, or if most pieces came from
    the cache.
    """
    pieces = [piece for file in files for piece in _pieces(file, nbytes_at_once)]
    middle = len(pieces) // 2
    pieces = pieces[middle:] + pieces[:middle]
    if sum(piece.nbytes for piece in pieces) < TELLING_NBYTES:
        return None
    buffer = memoryview(read_buffer(nbytes_at_once + platform.DIRECT_ALIGNMENT))
    take_pages(buffer)
    reader = Reader(READS_IN_FLIGHT)
    nbytes, cached_nbytes, took_s, spent_s = 0, 0, 0.0, 0.0

    def read(piece: ByteRange) -> float:
        platform.make_cold(piece.file, piece.offset, piece.nbytes)
        return _read_s(reader, piece, buffer)

    try:
        read(replace(pieces[-1], nbytes=min(pieces[-1].nbytes, UNCOUNTED_NBYTES)))
        cached_s_per_byte = _cached_s_per_byte(reader, max(pieces, key=lambda piece: piece.nbytes), buffer)
        for piece in pieces:
            piece_s = read(piece)
            spent_s += piece_s
            if piece_s > CACHE_SPREAD * cached_s_per_byte * piece.nbytes:
                took_s += piece_s
                nbytes += piece.nbytes
            else:
                cached_nbytes += piece.nbytes
            if spent_s >= seconds or nbytes + cached_nbytes >= READ_AT_MOST_NBYTES:
                break
    finally:
        reader.close()
    return nbytes / took_s if nbytes > cached_nbytes else None


def _read_s(reader: Reader, piece: ByteRange, buffer: memoryview) -> float:
    at = time.perf_counter()
    reader.read_now([replace(piece, at=shift(piece.offset))], buffer)
    return time.perf_counter() - at


def _cached_s_per_byte(reader: Reader, piece: ByteRange, buffer: memoryview) -> float:
    """Seconds per byte that is read from the file cache.

    They are 0 on Linux, where direct reads go to the drive. On macOS they take pages that are in the cache. How fast
    that is cannot be known beforehand (a copy in memory is faster), so it is measured: the piece is read through the
    cache, which leaves it there, and then by the reader like any other piece.
    """
    if not platform.MACOS:
        return 0.0
    with open(piece.file, "rb") as file:
        file.seek(piece.offset)
        file.readinto(buffer[: piece.nbytes])
    return min(_read_s(reader, piece, buffer) for _ in range(CACHED_READS)) / piece.nbytes


def _pieces(file: str, nbytes: int) -> Iterator[ByteRange]:
    """What the file has on the drive, a piece at a time. Holes are left out: they are read at the speed of memory."""
    with open(file, "rb") as f:
        end = os.fstat(f.fileno()).st_size
        at = 0
        while at < end:
            try:
                begin = os.lseek(f.fileno(), at, os.SEEK_DATA)
                at = os.lseek(f.fileno(), begin, os.SEEK_HOLE)
            except OSError as e:
                if e.errno == errno.ENXIO:  # from here on the file is one hole
                    return
                begin, at = at, end  # the file system does not report holes (HFS+ on macOS: ENOTTY)
            for offset in range(begin, at, nbytes):
                yield ByteRange(file, offset, min(nbytes, at - offset), 0)
