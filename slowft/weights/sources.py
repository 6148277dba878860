"""Makes the arrays that a module computes with from raw bytes: casts or dequantizes them to the compute dtype.

Comes in: extents of a safetensors file and the uint8 buffer they were read into. Goes out: arrays, built lazily. This
file reads only through a `Reader`, and never decides when weights come or go.
"""

import math
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from .. import platform
from ..memory import computes_on_gpu
from . import quantized
from .buffers import lies_as_in_file, read_buffer, shift
from .extents import Extent
from .reader import ByteRange, Reader

ALIGNMENT = 64  # bytes that a tensor's place in a buffer is a multiple of: a cache line, enough for any dtype on a GPU
PIECE_NBYTES = 8 << 20  # `read_whole` reads and casts so much of a large tensor at a time
LEAST_PIECES = 4  # it cuts a smaller tensor into at least so many pieces
GAP_NBYTES = 16 << 10  # rows nearer than this are read in one request, which costs less than a second one


def _as_array(raw: mx.array, extent: Extent, shape: tuple[int, ...]) -> mx.array:
    dtype = getattr(mx, extent.dtype)
    return raw.view(dtype).reshape(shape)


def _is_float(dtype: mx.Dtype) -> bool:
    return mx.issubdtype(dtype, mx.floating)


@dataclass(frozen=True)
class Plain:
    """A parameter that is stored as it is used, except for its dtype. `dtype` None keeps the file's."""

    extent: Extent
    dtype: mx.Dtype | None = None

    @property
    def extents(self) -> tuple[Extent, ...]:
        return (self.extent,)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.extent.shape

    @property
    def result_dtype(self) -> mx.Dtype:
        stored = getattr(mx, self.extent.dtype)
        return self.dtype if self.dtype is not None and _is_float(stored) else stored

    @property
    def is_copied(self) -> bool:
        """Whether the built array has its own memory, separate from the bytes it was built from."""
        return self.result_dtype != getattr(mx, self.extent.dtype)

    def build(self, raw: list[mx.array], n_rows: int | None = None) -> mx.array:
        """The array, from the flat uint8 bytes of its extents (of `n_rows` rows of the first axis, if given)."""
        return _as_array(raw[0], self.extent, _shape(self, n_rows)).astype(self.result_dtype)


@dataclass(frozen=True)
class Packed:
    """A quantized weight: stored as packed integers with scales (and biases), dequantized when used."""

    weight: Extent
    scales: Extent
    biases: Extent | None
    group_size: int
    bits: int
    mode: str
    dtype: mx.Dtype
    is_copied = True

    @property
    def result_dtype(self) -> mx.Dtype:
        return self.dtype

    @property
    def kind(self) -> tuple[int, int, str]:
        return self.bits, self.group_size, self.mode

    @property
    def extents(self) -> tuple[Extent, ...]:
        return tuple(e for e in (self.weight, self.scales, self.biases) if e is not None)

    @property
    def shape(self) -> tuple[int, ...]:
        *lead, packed = self.weight.shape
        return (*lead, packed * 32 // self.bits)

    def build(self, raw: list[mx.array], n_rows: int | None = None) -> mx.array:
        parts = [_as_array(part, extent, _shape(extent, n_rows)) for part, extent in zip(raw, self.extents)]
        return _dequantized(parts, *self.kind, self.dtype)


Source = Plain | Packed


def _shape(of: "Extent | Source", n_rows: int | None) -> tuple[int, ...]:
    return of.shape if n_rows is None else (n_rows, *of.shape[1:])


def _dequantized(parts: list[mx.array], bits: int, group_size: int, mode: str, dtype: mx.Dtype) -> mx.array:
    """The weight in the compute dtype. Scales and biases are cast to it first, as in `quantized_matmul`.

    Args:
        parts: packed weight, scales and, in mode "affine", biases.
    """
    weight, scales, *biases = parts
    if not quantized.can_dequantize(bits, group_size, mode, scales.dtype, dtype):
        weight, *others = (part.astype(dtype) if _is_float(part.dtype) else part for part in parts)
        return mx.dequantize(weight, *others, group_size=group_size, bits=bits, mode=mode, dtype=dtype)
    shape = (*weight.shape[:-1], weight.shape[-1] * 32 // bits)
    values = mx.zeros((math.prod(shape) * dtype.size,), mx.uint8)
    stored = [part.reshape(-1).view(mx.uint8) for part in parts]
    mx.eval(values, stored)
    quantized.dequantize([memoryview(s) for s in stored], bits, group_size, mode, scales.dtype, memoryview(values))
    return values.view(dtype).reshape(shape)


@dataclass
class Param:
    """One parameter of the opened model: the module entry that holds it, and the place of its bytes."""

    name: str
    owner: nn.Module | dict | list
    key: str | int
    source: Source
    placeholder: mx.array

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return sum(e.nbytes for e in self.source.extents)

    @property
    def compute_nbytes(self) -> int:
        """Bytes once it is an array to compute with."""
        return self.placeholder.nbytes

    def set(self, array: mx.array) -> None:
        self.owner[self.key] = array

    def clear(self) -> None:
        self.owner[self.key] = self.placeholder

    def keep(self, array: mx.array) -> None:
        """From now on the parameter is this array, and stays in memory."""
        self.placeholder = array
        self.clear()


def locate(module: nn.Module, name: str) -> tuple[nn.Module | dict | list, str | int]:
    """The module, dict or list in `module` that holds the parameter `name`, and its key there."""
    *path, key = name.split(".")
    owner = module
    for part in path:
        owner = owner[int(part)] if isinstance(owner, (list, tuple)) else owner[part]
    return owner, int(key) if isinstance(owner, list) else key


def placeholder(shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    """An array of the right shape and dtype that takes a few bytes: one NaN (or zero), broadcast.

    NaN makes it visible if a module computes with weights that are not in place.
    """
    value = mx.array(float("nan") if _is_float(dtype) else 0, dtype)
    array = mx.broadcast_to(value, shape)
    mx.eval(array)
    return array


class Layout:
    """Where the parameters of one unit lie in one buffer.

    Neighbours in a file stay neighbours in the buffer where they can be computed with as they lie in the file. One read
    past the file cache then puts them all in place. Every other extent is aligned to `ALIGNMENT`.
    """

    def __init__(self, params: list[Param]):
        self.ranges: list[ByteRange] = []
        starts: dict[Extent, int] = {}
        at = 0
        for run in _runs_of({e: None for param in params for e in param.source.extents}):
            at = -(-at // ALIGNMENT) * ALIGNMENT
            if _lies_as_in_file(run[0]):
                at += (run[0].offset - at) % platform.DIRECT_ALIGNMENT
            for e in run:
                starts[e] = at
                self.ranges.append(ByteRange(e.file, e.offset, e.nbytes, at))
                at += e.nbytes
        self._places = [[(starts[e], starts[e] + e.nbytes) for e in param.source.extents] for param in params]
        self._params = params
        self.compute_nbytes = sum(param.compute_nbytes for param in params)
        self.is_copied = all(param.source.is_copied for param in params)

    def fill(self, buffer: mx.array) -> list[mx.array]:
        """Put every parameter in its module, built lazily from the filled `buffer`. Returns the arrays.

        The thread's streams share the work of casting and dequantizing, evenly by bytes.
        """
        streams = casting_streams()
        arrays, loads = [], [0] * len(streams)
        for param, places in zip(self._params, self._places):
            source, raw = param.source, [buffer[begin:end] for begin, end in places]
            least_loaded = loads.index(min(loads))
            loads[least_loaded] += math.prod(source.shape) * source.result_dtype.size
            with mx.stream(streams[least_loaded]):
                arrays.append(source.build(raw))
            param.set(arrays[-1])
        return arrays


def casting_streams() -> list[mx.Stream]:
    """Streams of the calling thread to cast and dequantize on. MLX uses one core per stream for such work on a CPU."""
    device = mx.default_device()
    if computes_on_gpu():
        return [mx.default_stream(device)]
    if not hasattr(_of_thread, "streams"):  # MLX keeps a thread for each stream until the process ends
        others = [mx.new_stream(device) for _ in range(min(platform.cores(), 4) - 1)]
        _of_thread.streams = [mx.default_stream(device), *others]
    return _of_thread.streams


_of_thread = threading.local()


def _lies_as_in_file(e: Extent) -> bool:
    return lies_as_in_file(e.offset, getattr(mx, e.dtype).size)


def _runs_of(extents: Iterable[Extent]) -> Iterator[list[Extent]]:
    """Extents grouped so that each group may lie in memory as it lies in its file."""
    run: list[Extent] = []
    for e in sorted(extents, key=lambda e: (e.file, e.offset)):
        follows = run and (e.file, e.offset) == (run[-1].file, run[-1].offset + run[-1].nbytes)
        if run and not (follows and _lies_as_in_file(run[0]) and _lies_as_in_file(e)):
            yield run
            run = []
        run.append(e)
    if run:
        yield run


def read_rows(reader: Reader, source: Source, rows: list[int]) -> mx.array:
    """The rows `rows` (sorted, distinct) of the first axis, `[len(rows), ...]`, evaluated.

    Only those rows are read, and the small gaps between neighbours.
    """
    raw = []
    for extent in source.extents:
        n = extent.row_nbytes
        requests: list[list[int]] = []  # [first row, end row, the buffer's row where they begin] of each
        positions, n_read = [], 0  # positions: the buffer's row that holds each of `rows`
        for row in rows:
            if not requests or (row - requests[-1][1]) * n > GAP_NBYTES:
                requests.append([row, row, n_read])
            n_read += row + 1 - requests[-1][1]
            requests[-1][1] = row + 1
            positions.append(n_read - 1)
        buffer = mx.zeros((n_read * n,), mx.uint8)
        mx.eval(buffer)
        ranges = [
            ByteRange(extent.file, extent.offset + first * n, (end - first) * n, at * n) for first, end, at in requests
        ]
        reader.read_now(ranges, memoryview(buffer))
        raw.append(buffer.reshape(-1, n)[mx.array(positions)].reshape(-1))
    array = source.build(raw, n_rows=len(rows))
    mx.eval(array)
    return array


def read_whole(reader: Reader, source: Source) -> mx.array:
    """The whole parameter, evaluated. It is read and cast in pieces, so it takes little more memory than the result."""
    result = mx.zeros((placeholder(source.shape, source.result_dtype).nbytes,), mx.uint8)
    mx.eval(result)
    out = memoryview(result)
    first = source.extents[0]
    if len(source.extents) == 1 and getattr(mx, first.dtype) == source.result_dtype:
        reader.read_now([ByteRange(first.file, first.offset, first.nbytes, 0)], out)
    else:
        at = 0
        for piece in _pieces(reader, source):
            bytes_ = piece.reshape(-1).view(mx.uint8)
            mx.eval(bytes_)
            out[at : at + bytes_.nbytes] = memoryview(bytes_)
            at += bytes_.nbytes
            del piece, bytes_  # they must be freed before the next one is built
    array = result.view(source.result_dtype).reshape(source.shape)
    mx.eval(array)
    return array


def pieces_nbytes(stored_nbytes: int, built_nbytes: int) -> int:
    """Bytes that `read_whole` takes beside its result."""
    share = _piece_share(stored_nbytes, built_nbytes)
    return int(share * (2 * stored_nbytes + built_nbytes))  # one piece is read while another is built


def _piece_share(stored_nbytes: int, built_nbytes: int) -> float:
    """The share of a parameter that one piece is. Packed pieces grow to up to sixteen times their size."""
    return min(1 / LEAST_PIECES, PIECE_NBYTES / max(stored_nbytes, built_nbytes / 2, 1))


def _pieces(reader: Reader, source: Source) -> Iterator[mx.array]:
    """The parameter's rows, some at a time. The next ones are read while the caller uses these."""
    if not source.shape:
        yield _start_rows(reader, source, None)()
        return
    n_rows = source.shape[0]
    built_nbytes = math.prod(source.shape) * source.result_dtype.size
    step = max(1, int(n_rows * _piece_share(sum(e.nbytes for e in source.extents), built_nbytes)))
    next_piece = None
    for start in range(0, n_rows, step):
        piece = next_piece or _start_rows(reader, source, range(start, min(start + step, n_rows)))
        next_rows = range(start + step, min(start + 2 * step, n_rows))
        next_piece = _start_rows(reader, source, next_rows) if next_rows else None
        yield piece()


def _start_rows(reader: Reader, source: Source, rows: range | None) -> Callable[[], mx.array]:
    """Start reading consecutive rows (None: all of a scalar). The function returned waits for them and builds them."""
    buffers, reads = [], []
    for e in source.extents:
        first, nbytes = (0, e.nbytes) if rows is None else (rows.start * e.row_nbytes, len(rows) * e.row_nbytes)
        at = shift(e.offset + first)
        buffer = read_buffer(at + nbytes)
        buffers.append(buffer[at : at + nbytes])
        reads.append(reader.submit([ByteRange(e.file, e.offset + first, nbytes, at)], memoryview(buffer)))

    def finish() -> mx.array:
        for read in reads:
            reader.wait(read)
        return source.build(buffers, None if rows is None else len(rows))

    return finish
