"""Writes what a `Conversion` describes: reads the weights in pieces, casts and quantizes them, and writes them.

Comes in: a conversion, an output directory, and a memory ceiling. Each weight is read once, and no more than some
pieces of tensors are in memory at a time.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from .. import platform
from ..errors import ConfigError, ModelError, first_line
from ..memory import computes_on_gpu, limits
from ..weights.buffers import read_buffer, shift
from ..weights.extents import Extent
from ..weights.reader import ByteRange, Reader
from ..weights.tensorfile import ITEM_NBYTES, TensorFile
from . import verify as manifest
from .conversion import Conversion
from .output import OutputDirectory
from .parts import Computed, File, Parameter, RowWise
from .scan import EXPONENTS

# How much of a tensor, in the dtype of its file, is read and worked on at a time. Larger pieces are no faster.
PIECE_NBYTES, LEAST_PIECE_NBYTES = 32 << 20, 1 << 20
# The most bytes in memory for each byte of a piece: the piece, the next one being read, the piece cast to a wider
# dtype, what is made of it, and what is being written.
PIECES_IN_MEMORY = 10
# For these modes MLX's CPU backend has no primitive and compares every weight with each of the 16 values. That takes
# 19 bytes for each byte of a piece of 2 MB, 2.3 for one of 0.5 MB, which is a little faster too (0.037 GB/s a core).
SLOW_MODES, SLOW_PIECE_NBYTES = ("mxfp4", "nvfp4"), 1 << 19
COMPUTED_ITEM_NBYTES = 4  # a computed element may be float32 whatever the weight's dtype: an adapter's product is
FLOOR_NBYTES = 32 << 20  # threads and the reader's buffers, besides pieces and what the process holds at the start


def write_model(
    conversion: Conversion,
    output: Path,
    limit: int,
    progress: manifest.Progress | None,
    note: Callable[[str], None],
) -> None:
    """Write the model that a conversion describes within `limit` bytes of memory, or finish an earlier run.

    Raises:
        ConfigError, ModelError, SlowftError: in the same cases as `prepare`.
    """
    conversion.chunk_products(limit)
    piece_nbytes = _piece_nbytes(conversion, limit)
    with OutputDirectory(output, conversion, note) as out:
        out.keep_finished(progress)
        conversion.skip(out.done)
        out.check_room()
        total, done = conversion.nbytes, sum(file.nbytes for file in conversion.files if file.name in out.done)

        def advance(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            if progress is not None:
                progress(done, total)

        advance(0)
        with limits().keeping_freed(2 * piece_nbytes):
            worker = _Worker(piece_nbytes, advance, conversion.computed_from)
            try:
                for file in conversion.files:
                    if file.name not in out.done:
                        out.write(file, worker.fill, 2 * piece_nbytes)
            finally:
                worker.close()
        out.complete()


def _piece_nbytes(conversion: Conversion, limit: int) -> int:
    """How many bytes of a tensor to work on at a time. Raises ConfigError if not even the smallest pieces fit."""
    fixed = platform.memory_in_use() + FLOOR_NBYTES + conversion.computed_nbytes
    piece = min(PIECE_NBYTES, (limit - fixed) // PIECES_IN_MEMORY)
    if piece < LEAST_PIECE_NBYTES:
        least = -(-(fixed + PIECES_IN_MEMORY * LEAST_PIECE_NBYTES) // 10_000_000) * 10_000_000
        doing = conversion.transform.doing
        why = f", {conversion.computed_nbytes / 1e9:.2f} GB of it for the largest that has to be computed at once"
        raise ConfigError(
            f"--memory {limit / 1e9:.2f}GB is too little: {doing} {conversion.path} takes {least / 1e9:.2f}GB"
            f"{why if conversion.computed_nbytes > FLOOR_NBYTES else ''}. Use --memory {least / 1e9:.2f}GB or more"
        )
    return piece // 4096 * 4096


@dataclass
class _Piece:
    """Some consecutive elements of a parameter. `load` waits for them; they are flat and in the parameter's dtype."""

    parameter: Parameter
    load: Callable[[], mx.array]
    source: str
    is_product: bool = False


class _Worker:
    """Carries tensors from the files they lie in to the file that is being written.

    Args:
        piece_nbytes: bytes of a tensor that are worked on at a time.
        advance: is called with the number of bytes that were given to the file.
        computed_from: the files that MLX reads by itself, to compute parameters whole.
    """

    def __init__(self, piece_nbytes: int, advance: Callable[[int], None], computed_from: Sequence[str]):
        self.piece_nbytes, self._advance, self._computed_from = piece_nbytes, advance, computed_from
        self._reader = Reader(reads_in_flight=4)
        device = mx.default_device()
        # MLX's CPU backend quantizes with one core for each stream: bfloat16 to affine 4 bits at 0.58 GB/s
        n_more = min(platform.cores(), 16) - 1 if not computes_on_gpu() else 0
        self._streams = [mx.default_stream(device), *(mx.new_stream(device) for _ in range(n_more))]

    def close(self) -> None:
        self._reader.close()

    def fill(self, out: TensorFile, file: File) -> None:
        """Write every tensor of `file`."""
        pieces = (piece for parameter in file.parameters for piece in self._pieces(parameter))
        next_piece = next(pieces, None)
        while next_piece is not None:
            piece = next_piece
            array = piece.load()
            next_piece = next(pieces, None)  # it is read while this one is worked on
            for name, data in self._make(piece, array):
                out.write(name, data)
                self._advance(len(data))
            del array

    def _pieces(self, parameter: Parameter) -> Iterator[_Piece]:
        nbytes = self.piece_nbytes
        if parameter.quantization is not None and parameter.quantization[2] in SLOW_MODES and not computes_on_gpu():
            nbytes = min(nbytes, SLOW_PIECE_NBYTES * len(self._streams))
        n_items = max(nbytes // (parameter.n_columns * parameter.dtype.size), 1) * parameter.n_columns
        while parameter.parts:
            part = parameter.parts.pop(0)
            if isinstance(part, Extent):
                n = part.nbytes // ITEM_NBYTES[part.dtype]
                for start in range(0, n, n_items):
                    yield _Piece(parameter, self._start_read(part, start, min(n_items, n - start)), part.file)
            elif isinstance(part, RowWise):
                yield from self._row_wise_pieces(parameter, part, n_items)
            elif isinstance(part, Computed):
                for entries in self._entries(part):
                    yield from self._split(parameter, part.compute(entries), n_items, part.extent.file)
            else:
                yield from self._split(parameter, part, n_items, "the model")

    def _entries(self, part: Computed) -> Iterator[mx.array]:
        """The tensor that a parameter is computed from, some entries of its first axis at a time: `[n, ...]`."""
        extent, n_entries = part.extent, part.shape[0]
        per_entry = extent.nbytes // n_entries // ITEM_NBYTES[extent.dtype]
        step = max(self.piece_nbytes // extent.row_nbytes, 1)
        for start in range(0, n_entries, step):
            n = min(step, n_entries - start)
            yield self._start_read(extent, start * per_entry, n * per_entry)().reshape(n, *extent.shape[1:])

    def _row_wise_pieces(self, parameter: Parameter, part: RowWise, n_items: int) -> Iterator[_Piece]:
        """The rows of a weight, some at a time; of experts, several experts or some rows of one.

        For a product, `Conversion.chunk_products` says how many rows are computed at a time. If these are more than a
        piece, they are split into pieces of `n_items` elements.
        """
        is_experts = len(part.shape) == 3
        n_entries, n_rows = part.shape[:-1] if is_experts else (1, part.shape[0])
        arrays = {
            key: [p if isinstance(p, Extent) else self._evaluated(parameter, p) for p in parts]
            for key, parts in part.parts.items()
        }
        piece_rows = max(self.piece_nbytes // (part.shape[-1] * COMPUTED_ITEM_NBYTES), 1)
        rows_at_once = part.product_rows or min(piece_rows, n_rows)
        entries_at_once = max(piece_rows // n_rows, 1)
        for entry in range(0, n_entries, entries_at_once):
            for row in range(0, n_rows, rows_at_once):
                entries = slice(entry, min(entry + entries_at_once, n_entries))
                rows = slice(row, min(row + rows_at_once, n_rows))
                shape = entries.stop - entries.start, rows.stop - rows.start
                n = math.prod(shape)
                reads = {key: self._start_rows(parts, entry * n_rows + row, n) for key, parts in arrays.items()}

                def load(reads=reads, entries=entries, rows=rows, shape=shape) -> mx.array:
                    pieces = {key: read() for key, read in reads.items()}
                    if is_experts:
                        pieces = {key: array.reshape(*shape, -1) for key, array in pieces.items()}
                    array = part.compute(pieces, entries if is_experts else slice(None), rows).reshape(-1)
                    return self._evaluated(parameter, array)

                if n > piece_rows:
                    yield from self._split(parameter, load(), n_items, "the model", part.is_product)
                else:
                    yield _Piece(parameter, load, "the model", part.is_product)

    def _start_rows(self, parts: Sequence[Extent | mx.array], first: int, n: int) -> Callable[[], mx.array]:
        """Start reading `n` rows, from `first` on, of the array of these parts. The result waits for them."""
        reads: list[Callable[[], mx.array]] = []
        for part in parts:
            n_columns = part.shape[-1]
            n_rows = math.prod(part.shape[:-1])
            begin, end = max(first, 0), min(first + n, n_rows)
            if begin < end and isinstance(part, Extent):
                reads.append(self._start_read(part, begin * n_columns, (end - begin) * n_columns))
            elif begin < end:
                rows = part.reshape(n_rows, n_columns)[begin:end]
                reads.append(lambda rows=rows: rows)
            first -= n_rows
        return lambda: mx.concatenate([read().reshape(-1, n_columns) for read in reads])

    def _evaluated(self, parameter: Parameter, array: mx.array) -> mx.array:
        try:
            mx.eval(array)
        except (RuntimeError, ValueError) as e:
            raise ModelError(f"tensor {parameter.name} cannot be computed: {first_line(e)}") from None
        for file in self._computed_from:
            platform.drop_cached_file(file)
        return array

    def _split(
        self, parameter: Parameter, array: mx.array, n_items: int, source: str, is_product: bool = False
    ) -> Iterator[_Piece]:
        """Pieces of `n_items` elements of an array, which is evaluated whole."""
        flat = array.reshape(-1)
        del array
        self._evaluated(parameter, flat)
        for start in range(0, flat.size, n_items):
            piece = flat[start : start + n_items]
            yield _Piece(parameter, lambda piece=piece: piece, source, is_product)

    def _start_read(self, extent: Extent, start: int, n: int) -> Callable[[], mx.array]:
        item = ITEM_NBYTES[extent.dtype]
        offset, nbytes = extent.offset + start * item, n * item
        at = shift(offset)
        buffer = read_buffer(at + nbytes)
        read = self._reader.submit([ByteRange(extent.file, offset, nbytes, at)], memoryview(buffer))

        def load() -> mx.array:
            self._reader.wait(read)
            return buffer[at : at + nbytes].view(getattr(mx, extent.dtype))

        return load

    def _make(self, piece: _Piece, array: mx.array) -> list[tuple[str, memoryview]]:
        """The bytes that a piece gives for each output tensor: (name of the tensor, bytes)."""
        parameter, n_columns = piece.parameter, piece.parameter.n_columns
        rows = array.size // n_columns
        share = -(-rows // len(self._streams))
        made: list[tuple[str, mx.array]] = []
        checks = []
        for i, stream in enumerate(self._streams):
            with mx.stream(stream):
                values = array[i * share * n_columns : (i + 1) * share * n_columns]
                if values.size == 0:
                    break
                values = values.astype(parameter.dtype).astype(parameter.target)
                checks.append(_largest_exponent(values))
                parts: Sequence[mx.array] = [values]
                if parameter.quantization is not None:
                    group_size, bits, mode = parameter.quantization
                    parts = mx.quantize(values.reshape(-1, n_columns), group_size, bits, mode=mode)
                made += [(name, _bytes(part)) for name, part in zip(parameter.outputs, parts)]
        mx.eval([a for _, a in made], [check for check in checks if check is not None])
        for check in checks:
            if check is not None and check.item() == EXPONENTS[_name(parameter.target)][1]:
                raise self._not_finite(piece, array)
        return [(name, memoryview(a)) for name, a in made]

    def _not_finite(self, piece: _Piece, array: mx.array) -> ModelError:
        name, target = piece.parameter.name, _name(piece.parameter.target)
        if mx.isfinite(array).all().item():
            largest = mx.abs(array.astype(mx.float32)).max().item()
            return ModelError(
                f"{piece.source}: tensor {name} holds {largest:.4g}, too large for {target}. "
                f"Use --dtype {_name(array.dtype)}"
            )
        kind = "NaN" if mx.isnan(array).any().item() else "infinity"
        if piece.is_product:
            return ModelError(
                f"tensor {name} becomes {kind} with the adapter: one of the two is damaged. "
                "Check the model (slowft verify) and use an earlier adapter"
            )
        return ModelError(f"{piece.source}: tensor {name} holds {kind}: the file is damaged. Download it again")


def _name(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")


def _bytes(array: mx.array) -> mx.array:
    return array.reshape(-1).view(mx.uint8)


def _largest_exponent(values: mx.array) -> mx.array | None:
    """All ones if any value is NaN or infinite. This compares integers: 3 times as fast as `mx.isfinite` on a CPU."""
    if _name(values.dtype) not in EXPONENTS:
        return None
    unsigned, exponent = EXPONENTS[_name(values.dtype)]
    bits = values.view(mx.uint16 if unsigned().itemsize == 2 else mx.uint32)
    return (bits & mx.array(exponent, bits.dtype)).max()
