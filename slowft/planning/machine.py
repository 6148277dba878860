"""What this machine can do, measured in about a second.

Comes in: the compute dtype, the model's files. Goes out: a `Machine`. Never writes, never holds more than about
160 MB, or 50 MB if asked to, and leaves MLX's limits as they were.
"""

import contextlib
import errno
import functools
import itertools
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import mlx.core as mx

from .. import platform
from ..memory import limits
from ..models.weights import Packed, build_all, casting_streams
from ..storage.buffers import read_buffer, shift, take_pages
from ..storage.index import Extent
from ..storage.reader import ByteRange, Reader
from .graph import FULL_RATE_WIDTH

STREAM_NBYTES = 40 << 20  # of each array that is read or written: more than glibc ever keeps for itself (32 MB)
READ_NBYTES = 32 << 20  # read at a time
READ_AT_MOST_NBYTES = 512 << 20
UNCOUNTED_NBYTES = 8 << 20  # read before that
DEPTHS = (1, 2, 4)  # requests in flight, tried in turn
WORTH_IT = 1.05  # times as fast as with fewer in flight
CACHED_READS = 3  # of a piece that is in the file cache, to know what that takes, with each number in flight
# Times that, in which a read may be of the cache: more than such reads differ by while nothing else runs. A drive that
# is nearer to its file cache is unknown: it hardly holds a step up.
CACHE_SPREAD = 1.5
TELLING_NBYTES = 1 << 20  # less than this to read says nothing about a drive
FUNCTION_VALUES = 1 << 20
DEQUANTIZED_NBYTES, DEQUANTIZED_AT_ONCE = 8 << 20, 4
PRODUCT_LENGTH, PRODUCT_FLOPS = 2048, 1 << 30  # of products that are measured: larger ones run as fast
NARROW = 32  # up to this length its own rate is measured, beyond that of the nearest power of two
BATCHED_FLOPS = 512 << 20  # of many small products together
PRODUCT_NBYTES = 32 << 20  # of the results of products that are measured together
SLOW = 1.3  # times as long as products take by their width: measured once more
LEAST_MEASURED_SHARE = 0.01  # of a computation's seconds: the rate of products that take less is not measured
EXPERT_NBYTES = 48 << 20  # of a matrix, at most: more than processors' caches hold
GATHERED_NBYTES = 96 << 20  # of experts' matrices that are multiplied by at once, about


@dataclass(frozen=True)
class Machine:
    """What the planner reckons with. Rates are per second; bytes are bytes.

    Attributes:
        memory_nbytes: what this process may use: physical memory or its control group's limit; on macOS the
            working set that Metal recommends, never the wired maximum.
        matmul_flops_per_s: matrix products in the compute dtype; a multiply-add is two.
        bytes_per_s: bytes read and written by an elementwise operation, in memory that is in use already.
        functions_per_s: exponentials of float numbers, which take up to four cores on a CPU.
        cast_bytes_per_s: bytes put out by a cast to the compute dtype, in memory that is in use already.
        page_s_per_byte: seconds that it takes in addition where the memory is fresh from the operating system.
        read_bytes_per_s: one file after the other, past the file cache; None if there was nothing to read, or if what
            was read came from the file cache all the same.
        write_bytes_per_s: to the drive; None, as measuring it would write.
        cores: processor cores that this process may use.
        device: name of the device that MLX computes on.
        compute_dtype: what was measured in; None of a machine that was not measured but described.
        reads_in_flight: requests at once with which `read_bytes_per_s` was reached.
        shrink: how many times smaller than usual the larger arrays are with which it is measured.
        is_assumed: it is no machine in particular, and seconds on it are not to be believed.
    """

    memory_nbytes: int
    matmul_flops_per_s: float
    bytes_per_s: float
    functions_per_s: float
    cast_bytes_per_s: float
    page_s_per_byte: float
    read_bytes_per_s: float | None
    write_bytes_per_s: float | None
    cores: int
    device: str
    compute_dtype: str | None = None
    reads_in_flight: int = 1
    shrink: int = 1
    is_assumed: bool = False

    def seconds(
        self,
        ops: Iterable[tuple[int, int, int, float]],
        products: Iterable[tuple[Sequence, tuple[int, float]]],
        gathered: Iterable[tuple[Sequence, int]],
    ) -> float:
        """Seconds of computing what a `Cost.work` says, if arithmetic, memory or functions hold every operation up.

        That is the roofline model. Matrix products take what they are measured to take, where the machine was measured.
        """
        seconds = sum(
            max(
                flops / (efficiency * self.matmul_flops_per_s),
                nbytes / self.bytes_per_s,
                values / self.functions_per_s,
            )
            for flops, nbytes, values, efficiency in ops
        )
        seconds += sum(nbytes * self.gather_mm_s_per_byte(*kind) for kind, nbytes in gathered)
        for shape, (flops, effective) in products if self.compute_dtype is not None else ():
            estimated = effective / self.matmul_flops_per_s
            if estimated > LEAST_MEASURED_SHARE * seconds:
                seconds += flops * self.matmul_s_per_flop(*shape) - estimated
        return seconds

    def dequantize_s_per_byte(self, bits: int, group_size: int, mode: str) -> float:
        """Seconds per byte put out when a block's weights are dequantized on arrival, on all the cores that takes.

        Measured when it is first asked for; 0 of a machine that was not measured.
        """
        if self.compute_dtype is None:
            return 0.0
        return _dequantize_s_per_byte(bits, group_size, mode, getattr(mx, self.compute_dtype))

    def gather_mm_s_per_byte(self, rows: int, columns: int, is_transposed: bool) -> float:
        """Seconds per byte of experts' matrices `[rows, columns]` that are multiplied by row after row.

        Measured when it is first asked for, as it depends on what the processor's caches hold.
        """
        if self.compute_dtype is None:
            return 1 / self.bytes_per_s
        return _gather_mm_s_per_byte(rows, columns, is_transposed, getattr(mx, self.compute_dtype), self.shrink)

    def matmul_s_per_flop(
        self, batches: int, rows: int, inner: int, columns: int, a_transposed: bool, b_transposed: bool
    ) -> float:
        """Seconds per flop of `[batches, rows, inner]` by `[batches, inner, columns]`, of a machine that was measured.

        Measured when it is first asked for: 512 x 1024 x 2816 reaches two thirds of what 4096^3 does, rank 8 a tenth.
        """
        sizes = [n if n <= NARROW else min(2 ** round(math.log2(n)), PRODUCT_LENGTH) for n in (rows, inner, columns)]
        while 2 * math.prod(sizes) > PRODUCT_FLOPS:
            longest = sizes.index(max(sizes))
            sizes[longest] = -(-sizes[longest] // 2)
        dtype = getattr(mx, self.compute_dtype or "float32")
        most = min(BATCHED_FLOPS // (2 * math.prod(sizes)), PRODUCT_NBYTES // (sizes[0] * sizes[2] * dtype.size))
        batches = max(1, min(batches, most))
        product = batches, *sizes, a_transposed, b_transposed, dtype
        s_per_flop = _matmul_s_per_flop(*product)
        usual = self.matmul_flops_per_s * min(1.0, min(sizes) / FULL_RATE_WIDTH)
        if s_per_flop * usual > SLOW:  # the shape may be, or other work came between
            s_per_flop = min(s_per_flop, _matmul_s_per_flop(*product, again=True))
        return s_per_flop


def measure(compute_dtype: mx.Dtype, files: Sequence[str], seconds: float = 0.75, shrink: int = 1) -> Machine:
    """Measure this machine on MLX's default device.

    Args:
        compute_dtype: what blocks are computed in.
        files: model files; reading is measured on them, from the middle on.
        seconds: what it may take altogether, roughly.
        shrink: how many times smaller than usual the larger arrays are to be; 4 takes 50 MB of memory, not 160.
    """
    read_bytes_per_s, reads_in_flight = measure_reading(files, seconds * 0.45, READ_NBYTES // shrink)
    nbytes = STREAM_NBYTES // shrink
    with _cache_limit(8 * nbytes):  # an output takes the place of the one before
        fresh_s, warm_s = _cast_s(compute_dtype, nbytes, seconds * 0.2)
        bytes_per_s = _bytes_per_s(compute_dtype, nbytes, seconds * 0.15)
        matmul_flops_per_s = _matmul_flops_per_s(compute_dtype, 4096 // shrink, seconds * 0.15)
    functions_per_s = _functions_per_s(compute_dtype, seconds * 0.05)
    with _cache_limit(8 * nbytes):  # once more: a moment's other work would halve what both cores do
        again = _matmul_flops_per_s(compute_dtype, 4096 // shrink, seconds * 0.15)
    cores = platform.cores()
    return Machine(
        memory_nbytes=_memory_nbytes(),
        matmul_flops_per_s=max(matmul_flops_per_s, again),
        bytes_per_s=bytes_per_s,
        functions_per_s=functions_per_s * (min(cores, 4) if mx.default_device() == mx.Device(mx.cpu) else 1),
        cast_bytes_per_s=nbytes / warm_s,
        page_s_per_byte=max(0.0, fresh_s - warm_s) / nbytes,
        read_bytes_per_s=read_bytes_per_s,
        write_bytes_per_s=None,
        cores=cores,
        device=str(mx.device_info().get("device_name", mx.default_device())),
        compute_dtype=str(compute_dtype).rsplit(".", 1)[-1],
        reads_in_flight=reads_in_flight,
        shrink=shrink,
    )


@functools.cache
def _dequantize_s_per_byte(bits: int, group_size: int, mode: str, dtype: mx.Dtype) -> float:
    """Seconds per byte put out in `dtype` as a block's weights arrive: together, in memory that is in use already."""
    columns = 2048
    rows = DEQUANTIZED_NBYTES // dtype.size // columns
    row = mx.random.normal((1, columns), key=mx.random.key(0)).astype(mx.bfloat16)
    parts = [mx.repeat(a, rows, 0) for a in mx.quantize(row, group_size=group_size, bits=bits, mode=mode)]
    stored = [part.reshape(-1).view(mx.uint8) for part in parts]
    mx.eval(stored)
    extents = [
        Extent("", "", 0, a.nbytes, str(part.dtype).rsplit(".", 1)[-1], part.shape) for a, part in zip(stored, parts)
    ]
    biases = extents[2] if len(extents) > 2 else None
    source = Packed(extents[0], extents[1], biases, group_size, bits, mode, dtype)
    nbytes = DEQUANTIZED_AT_ONCE * DEQUANTIZED_NBYTES
    del parts

    def arrive() -> list[mx.array]:
        return build_all([source] * DEQUANTIZED_AT_ONCE, [stored] * DEQUANTIZED_AT_ONCE, streams)

    streams = casting_streams()
    with _cache_limit(nbytes):  # as between blocks
        return _best(arrive, 0.05) / nbytes


@functools.cache
def _matmul_s_per_flop(batches, rows, inner, columns, a_transposed, b_transposed, dtype, again=False) -> float:
    def matrices(n_rows: int, n_columns: int, is_transposed: bool) -> mx.array:
        shape = (batches, n_columns, n_rows) if is_transposed else (batches, n_rows, n_columns)
        return _ones(shape, dtype)

    a, b = matrices(rows, inner, a_transposed), matrices(inner, columns, b_transposed)

    def multiply() -> mx.array:
        return (a.swapaxes(-1, -2) if a_transposed else a) @ (b.swapaxes(-1, -2) if b_transposed else b)

    with _cache_limit(batches * rows * columns * dtype.size):
        return _best(multiply, 0, at_least=4) / (2 * batches * rows * inner * columns)


@functools.cache
def _gather_mm_s_per_byte(rows: int, columns: int, is_transposed: bool, dtype: mx.Dtype, shrink: int) -> float:
    """Seconds per byte of `[rows, columns]` matrices in `mx.gather_mm` of rows that are sorted by expert."""
    largest = EXPERT_NBYTES // shrink // dtype.size  # a larger matrix is read from memory just as one of this size is
    rows = min(rows, max(1, largest // columns))
    shape = (2, columns, rows) if is_transposed else (2, rows, columns)
    matrices = _ones(shape, dtype)
    n = min(max(GATHERED_NBYTES // shrink // (2 * rows * columns * dtype.size), 1), 8)  # rows for each of two experts
    x = mx.ones((2 * n, 1, rows), dtype)
    of_expert = mx.array([0] * n + [1] * n)
    mx.eval(x, of_expert)

    def multiply() -> mx.array:
        b = matrices.swapaxes(-1, -2) if is_transposed else matrices
        return mx.gather_mm(x, b, rhs_indices=of_expert, sorted_indices=True)

    return _best(multiply, 0.05, at_least=2) / (len(of_expert) * rows * columns * dtype.size)


def _memory_nbytes() -> int:
    if platform.MACOS:
        recommended = mx.device_info().get("max_recommended_working_set_size")
        return int(recommended or platform.memory_limit())
    return platform.memory_limit()


# --- Computing ------------------------------------------------------------------------------------


@contextlib.contextmanager
def _cache_limit(nbytes: int) -> Iterator[None]:
    """MLX keeps up to so many bytes of freed buffers to hand out again."""
    with limits().keeping_freed(nbytes):
        limits().give_back()  # what would fill it
        try:
            yield
        finally:
            limits().give_back()


def _ones(shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    """Ones in memory of their own: drawing random numbers takes longer than multiplying them."""
    array = mx.contiguous(mx.broadcast_to(mx.array(1, dtype), shape))
    mx.eval(array)
    return array


def _once(function: Callable[[], mx.array | list[mx.array]]) -> float:
    """Seconds of one evaluation; what it put out is freed."""
    at = time.perf_counter()
    output = function()
    mx.eval(output)
    seconds = time.perf_counter() - at
    del output
    return seconds


def _best(function: Callable[[], mx.array | list[mx.array]], seconds: float, at_least: int = 3) -> float:
    """The least seconds one evaluation takes, of so many at least and as many as go into `seconds`.

    The first is not counted: it wakes devices and loads kernels. Other work on the machine only ever adds.
    """
    _once(function)
    took = []
    begin = time.perf_counter()
    while len(took) < at_least or time.perf_counter() - begin < seconds:
        took.append(_once(function))
    return min(took)


def _cast_s(dtype: mx.Dtype, nbytes: int, seconds: float) -> tuple[float, float]:
    """Seconds that a cast of `nbytes` to `dtype` takes into (fresh pages, memory that is in use already), at best.

    From bfloat16, in which most models are stored. In turns, so that other work on the machine meets both.
    """
    stored = mx.bfloat16 if dtype != mx.bfloat16 else mx.float16
    array = mx.zeros((nbytes // dtype.size,), stored)
    mx.eval(array)
    fresh, warm = [], []

    def cast() -> mx.array:
        return array.astype(dtype)

    begin = time.perf_counter()
    while len(warm) < 4 or time.perf_counter() - begin < seconds:
        limits().give_back()
        platform.release_freed_memory()  # where malloc has so much free between other blocks, it takes that
        fresh.append(_once(cast))
        warm.append(_once(cast))
    return min(fresh[1:]), min(warm[1:])  # the first wakes devices


def _bytes_per_s(dtype: mx.Dtype, nbytes: int, seconds: float) -> float:
    a, b = mx.zeros((2, nbytes // dtype.size), dtype)
    mx.eval(a, b)
    return 3 * nbytes / _best(lambda: a + b, seconds)


def _functions_per_s(dtype: mx.Dtype, seconds: float) -> float:
    array = mx.zeros((FUNCTION_VALUES,), dtype)
    mx.eval(array)
    return FUNCTION_VALUES / _best(lambda: mx.exp(array), seconds)


def _matmul_flops_per_s(dtype: mx.Dtype, largest: int, seconds: float) -> float:
    """Of square matrices, the larger the faster they are multiplied: 512 takes 0.16 s on a reference BLAS."""
    size, rate = 512, 0.0
    begin = time.perf_counter()
    while size <= largest:
        a = _ones((size, size), dtype)
        at = time.perf_counter()
        rate = max(rate, 2 * size**3 / _best(lambda a=a: a @ a, 0))
        took = time.perf_counter() - at
        if time.perf_counter() - begin + 8 * took > seconds:
            break
        size *= 2
    return rate


# --- Reading --------------------------------------------------------------------------------------


def measure_reading(
    files: Sequence[str], seconds: float = 0.35, nbytes_at_once: int = READ_NBYTES
) -> tuple[float | None, int]:
    """What the engine's own reader reads of the files per second, and with how many requests in flight.

    The file cache is emptied of them first. More requests have to be worth it. What is read first does not count: a
    limit on reads lets some through at once (150 MB/s by a control group: 195 for the first 32 MB).

    Pieces that come about as fast as one that is in the file cache for certain are the cache's, not the drive's: others
    of the files are measured in their place.

    Returns:
        None for the rate if there is too little to read, or if most of what came was the cache's.
    """
    pieces = [piece for file in files for piece in _pieces(file, nbytes_at_once)]
    middle = len(pieces) // 2
    pieces = pieces[middle:] + pieces[:middle]
    if sum(piece.nbytes for piece in pieces) < TELLING_NBYTES:
        return None, 1
    buffer = memoryview(read_buffer(nbytes_at_once + platform.DIRECT_ALIGNMENT))
    take_pages(buffer)
    reader, took = Reader(), dict.fromkeys(DEPTHS, 0.0)
    nbytes, cached_nbytes, spent_s = dict.fromkeys(DEPTHS, 0), 0, 0.0

    def read(piece: ByteRange) -> float:
        platform.make_cold(piece.file, piece.offset, piece.nbytes)
        return _read_s(reader, piece, buffer)

    try:
        read(replace(pieces[-1], nbytes=min(pieces[-1].nbytes, UNCOUNTED_NBYTES)))
        cached_s_per_byte = _cached_s_per_byte(reader, max(pieces, key=lambda piece: piece.nbytes), buffer)
        for piece, depth in zip(pieces, itertools.cycle(DEPTHS)):
            reader.reads_in_flight = depth
            piece_s = read(piece)
            spent_s += piece_s
            if piece_s > CACHE_SPREAD * cached_s_per_byte[depth] * piece.nbytes:
                took[depth] += piece_s
                nbytes[depth] += piece.nbytes
            else:
                cached_nbytes += piece.nbytes
            if spent_s >= seconds or sum(nbytes.values()) + cached_nbytes >= READ_AT_MOST_NBYTES:
                break
    finally:
        reader.close()
    if cached_nbytes >= sum(nbytes.values()):
        return None, DEPTHS[-1]  # which a drive that needs fewer is none the worse for
    rates = {depth: nbytes[depth] / took[depth] for depth in DEPTHS if nbytes[depth]}
    best = max(rates.values())
    depth = next(depth for depth, rate in rates.items() if rate * WORTH_IT >= best)
    return rates[depth], depth


def _read_s(reader: Reader, piece: ByteRange, buffer: memoryview) -> float:
    at = time.perf_counter()
    reader.read_now([replace(piece, at=shift(piece.offset))], buffer)
    return time.perf_counter() - at


def _cached_s_per_byte(reader: Reader, piece: ByteRange, buffer: memoryview) -> dict[int, float]:
    """Seconds per byte of what is in the file cache, by the number of requests in flight; 0 where none is read from it.

    That is on Linux, whose direct reads go to the drive. On macOS they take what pages there are. How fast that is
    nobody knows beforehand, and a copy in memory is faster, so it is measured: the piece is read through the cache,
    which leaves it there, and then by the reader as every other.
    """
    if not platform.MACOS:
        return dict.fromkeys(DEPTHS, 0.0)
    with open(piece.file, "rb") as file:
        file.seek(piece.offset)
        file.readinto(buffer[: piece.nbytes])
    seconds = {}
    for reader.reads_in_flight in DEPTHS:
        least_s = min(_read_s(reader, piece, buffer) for _ in range(CACHED_READS))
        seconds[reader.reads_in_flight] = least_s / piece.nbytes
    return seconds


def _pieces(file: str, nbytes: int) -> Iterator[ByteRange]:
    """What the file has on the drive, a piece at a time: holes would be read at the speed of memory."""
    with open(file, "rb") as f:
        end = os.fstat(f.fileno()).st_size
        at = 0
        while at < end:
            try:
                begin = os.lseek(f.fileno(), at, os.SEEK_DATA)
                at = os.lseek(f.fileno(), begin, os.SEEK_HOLE)
            except OSError as e:
                if e.errno == errno.ENXIO:  # nothing but a hole from here on
                    return
                begin, at = at, end  # a file system that tells of no holes: on macOS ENOTTY, as of HFS+
            for offset in range(begin, at, nbytes):
                yield ByteRange(file, offset, min(nbytes, at - offset), 0)
