"""A model directory -> one that streams well: tensors as the model uses them, quantized if asked for.

Comes in: any directory that mlx-lm loads. Goes out: a directory that mlx-lm loads as well, equal tensor by tensor to
what `mlx_lm.convert` writes, with a file for each block, in the order of a forward pass, and checksums of everything.
Reads each weight once and never holds more than some pieces of tensors. A killed run goes on where it was.
"""

import fcntl
import json
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from .. import platform
from ..errors import ConfigError, ModelError, SlowftError, SlowftWarning, reason_of
from ..memory import computes_on_gpu, limits
from ..models.loading import resolve
from ..sizes import parse_nbytes
from ..weights.buffers import read_buffer, shift
from ..weights.extents import Extent
from ..weights.reader import ByteRange, Reader
from ..weights.tensorfile import ITEM_NBYTES, UNFINISHED, TensorFile, header, sync_directory, write_file
from ..weights.transfers import free_nbytes
from . import verify as manifest
from .conversion import INDEX, Computed, Conversion, File, Job, Options, RowWise, versions
from .scan import EXPONENTS

# Of a tensor, in the dtype of its file, read and worked on at a time. Larger pieces are no faster.
PIECE_NBYTES, LEAST_PIECE_NBYTES = 32 << 20, 1 << 20
# What is in memory for each byte of a piece, at most: it, the next one being read, it cast to a wider dtype, what is
# made of it, what is being written.
PIECES_IN_MEMORY = 10
# The same where MLX has no primitive and compares every weight with each of the 16 values: 19 bytes for each byte of
# 2 MB, 2.3 of 0.5 MB, and a little faster (0.037 GB/s a core).
SLOW_MODES, SLOW_PIECE_NBYTES = ("mxfp4", "nvfp4"), 1 << 19
# Of an element that is computed: an adapter's product is float32, whatever the weight is.
COMPUTED_ITEM_NBYTES = 4
FLOOR_NBYTES = 32 << 20  # besides those and what the process holds at the start: threads, buffers of the reader


def prepare(
    path_or_hub_id: str | Path,
    output: str | Path,
    *,
    quantize: bool = False,
    bits: int | None = None,
    group_size: int | None = None,
    mode: str = "affine",
    quant_predicate: str | None = None,
    dtype: str | None = None,
    memory: str | int | None = None,
    trust_remote_code: bool = False,
    progress: manifest.Progress | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> Path:
    """Write a model so that it can be streamed; with `quantize`, quantized as `mlx_lm.convert -q` would.

    Args:
        path_or_hub_id: a directory that mlx-lm loads, or a hub id, which is downloaded.
        output: a directory that is not there yet, is empty, or holds an unfinished run with the same arguments, which
            is gone on with.
        bits, group_size, mode: None is the mode's own: affine 4 bits, groups of 64.
        quant_predicate: a recipe of mixed bits, such as "mixed_4_6".
        dtype: of the tensors that are not quantized; None is the config's.
        memory: such as "2GB" (or bytes): a ceiling for the whole process. None: half of this machine's.
        trust_remote_code: let the model run code of its own (`model_file` in its config.json).
        progress: told (bytes done, bytes in all) of the tensors to be written, and before that of an earlier run's
            files, which are hashed again.
        note: told of what a user should know, such as that an earlier run is gone on with.
    Returns:
        The output directory.
    Raises:
        ConfigError: options that contradict each other, or too little memory; names the least.
        ModelError: the model is incomplete, of an unknown architecture, or holds NaN or infinity.
        SlowftError: the output cannot be written, or its disk has too little room; names both numbers.
    """
    options = Options(quantize, bits, group_size, mode, quant_predicate, dtype)
    options.check()
    platform.fix_malloc_threshold()
    limit = platform.memory_limit() // 2 if memory is None else parse_nbytes(memory)
    output = Path(output).expanduser()
    refuse_unusable(output)
    path = resolve(str(path_or_hub_id))
    if output.resolve() == path.resolve():
        raise ConfigError(f"--output {output} is the model itself. Give another directory")
    conversion = Conversion(path, options, trust_remote_code)
    for text in conversion.notes:
        warnings.warn(text, SlowftWarning, stacklevel=2)
    write_model(conversion, output, limit, progress, note)
    return output


def write_model(
    conversion: Conversion,
    output: Path,
    limit: int,
    progress: manifest.Progress | None,
    note: Callable[[str], None],
) -> None:
    """Write what a conversion makes of a model within `limit` bytes of memory, or go on with writing it.

    Raises:
        ConfigError, ModelError, SlowftError: as `prepare` does.
    """
    conversion.cut(limit)
    piece_nbytes = _piece_nbytes(conversion, limit)
    with _Output(output, conversion, note) as out:
        out.go_on(progress)
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
                        out.write(file, worker)
            finally:
                worker.close()
        out.complete()


def prepare_gguf(file: str | Path, output: str | Path, *, progress: manifest.Progress | None = None, **options) -> Path:
    """Write the model directory of a GGUF file, weights repacked exactly, and its checksums.

    Args:
        options: of `prepare`; all have to be left as they are.
    Raises:
        ConfigError: an option was given.
        ModelError: no such file, or one that cannot be converted.
        SlowftError: the output cannot be written.
    """
    from . import gguf

    file, output = Path(file).expanduser(), Path(output).expanduser()
    if Options(**options) != Options():
        raise ConfigError(
            "a GGUF file is repacked as it is, so --quantize and --dtype have no effect. First: slowft prepare "
            f"{file} --output {file.stem}; then the same options with {file.stem} as MODEL"
        )
    if not file.is_file():
        raise ModelError(f"{file} does not exist. Give a .gguf file, a model directory or a hub id")
    refuse_unusable(output)
    needed, free = file.stat().st_size, free_nbytes(output)
    if free < needed:
        raise SlowftError(_no_room(output, needed, free))
    try:
        made = {"source": str(file.resolve()), "versions": versions()}
        gguf.convert(file, output, progress, lambda whole: manifest.write_manifest(whole, made, progress))
    except OSError as e:
        raise SlowftError(f"{output} cannot be written: {e.strerror}") from None
    return output


def _piece_nbytes(conversion: Conversion, limit: int) -> int:
    """Bytes of a tensor to work on at a time within this much memory.

    Raises:
        ConfigError: not even small pieces fit.
    """
    held = platform.memory_in_use() + FLOOR_NBYTES + conversion.computed_nbytes
    piece = min(PIECE_NBYTES, (limit - held) // PIECES_IN_MEMORY)
    if piece < LEAST_PIECE_NBYTES:
        least = -(-(held + PIECES_IN_MEMORY * LEAST_PIECE_NBYTES) // 10_000_000) * 10_000_000
        doing = conversion.options.doing
        why = f", {conversion.computed_nbytes / 1e9:.2f} GB of it for the largest that has to be computed at once"
        raise ConfigError(
            f"--memory {limit / 1e9:.2f}GB is too little: {doing} {conversion.path} takes {least / 1e9:.2f}GB"
            f"{why if conversion.computed_nbytes > FLOOR_NBYTES else ''}. Use --memory {least / 1e9:.2f}GB or more"
        )
    return piece // 4096 * 4096


# --- Reading, casting, quantizing -------------------------------------------------------------------


@dataclass
class _Piece:
    """Some of a tensor's elements, end to end: `load` waits for them; flat, in the tensor's own dtype."""

    job: Job
    load: Callable[[], mx.array]
    source: str
    is_product: bool = False


class _Worker:
    """Carries tensors from the files they lie in to the file that is being written.

    Args:
        piece_nbytes: of a tensor at a time.
        advance: told of bytes given to the file.
        computed_from: files that MLX reads by itself, to compute tensors whole.
    """

    def __init__(self, piece_nbytes: int, advance: Callable[[int], None], computed_from: Sequence[str]):
        self.piece_nbytes, self._advance, self._computed_from = piece_nbytes, advance, computed_from
        self._reader = Reader(reads_in_flight=4)
        device = mx.default_device()
        # MLX's CPU backend quantizes on one core a stream: bfloat16 to affine 4 bits at 0.58 GB/s
        n_more = min(platform.cores(), 16) - 1 if not computes_on_gpu() else 0
        self._streams = [mx.default_stream(device), *(mx.new_stream(device) for _ in range(n_more))]

    def close(self) -> None:
        self._reader.close()

    def fill(self, out: TensorFile, file: File) -> None:
        """Write every tensor of `file`."""
        pieces = (piece for job in file.jobs for piece in self._pieces(job))
        ahead = next(pieces, None)
        while ahead is not None:
            piece = ahead
            array = piece.load()
            ahead = next(pieces, None)  # its read goes on meanwhile
            for name, data in self._make(piece, array):
                out.write(name, data)
                self._advance(len(data))
            del array

    def _pieces(self, job: Job) -> Iterator[_Piece]:
        nbytes = self.piece_nbytes
        if job.quantization is not None and job.quantization[2] in SLOW_MODES and not computes_on_gpu():
            nbytes = min(nbytes, SLOW_PIECE_NBYTES * len(self._streams))
        step = max(nbytes // (job.n_columns * job.dtype.size), 1) * job.n_columns
        while job.parts:
            part = job.parts.pop(0)
            if isinstance(part, Extent):
                n = part.nbytes // ITEM_NBYTES[part.dtype]
                for start in range(0, n, step):
                    yield _Piece(job, self._start_read(part, start, min(step, n - start)), part.file)
            elif isinstance(part, RowWise):
                yield from self._row_wise_pieces(job, part, step)
            elif isinstance(part, Computed):
                for entries in self._entries(part):
                    yield from self._computed_pieces(job, part.compute(entries), step, part.extent.file)
            else:
                yield from self._computed_pieces(job, part, step, "the model")

    def _entries(self, part: Computed) -> Iterator[mx.array]:
        """Some entries of the tensor's first axis after the other, `[n, ...]`."""
        extent, n_entries = part.extent, part.shape[0]
        per_entry = extent.nbytes // n_entries // ITEM_NBYTES[extent.dtype]
        step = max(self.piece_nbytes // extent.row_nbytes, 1)
        for start in range(0, n_entries, step):
            n = min(step, n_entries - start)
            yield self._start_read(extent, start * per_entry, n * per_entry)().reshape(n, *extent.shape[1:])

    def _row_wise_pieces(self, job: Job, part: RowWise, n_items: int) -> Iterator[_Piece]:
        """Some rows after the other; of experts, several or some rows of one.

        Of a product as many rows as `Conversion.cut` says; what is more than a piece then goes on `n_items` at a time.
        """
        n_entries, n_rows = part.shape[:-1] if len(part.shape) == 3 else (1, part.shape[0])
        held = {
            key: [p if isinstance(p, Extent) else self._whole(job, p) for p in ps] for key, ps in part.parts.items()
        }
        wanted = max(self.piece_nbytes // (part.shape[-1] * COMPUTED_ITEM_NBYTES), 1)  # rows at a time
        step = part.product_rows or min(wanted, n_rows)
        per_piece = max(wanted // n_rows, 1)
        for entry in range(0, n_entries, per_piece):
            for row in range(0, n_rows, step):
                entries = slice(entry, min(entry + per_piece, n_entries))
                rows = slice(row, min(row + step, n_rows))
                first, n = entry * n_rows + row, (entries.stop - entries.start) * (rows.stop - rows.start)
                reads = {key: self._start_rows(parts, first, n) for key, parts in held.items()}

                def load(reads=reads, entries=entries, rows=rows) -> mx.array:
                    arrays = {key: read() for key, read in reads.items()}
                    if len(part.shape) == 3:
                        shape = entries.stop - entries.start, rows.stop - rows.start, -1
                        arrays = {key: array.reshape(shape) for key, array in arrays.items()}
                    array = part.compute(arrays, entries if len(part.shape) == 3 else slice(None), rows).reshape(-1)
                    self._evaluate(job, array)
                    return array

                if (entries.stop - entries.start) * (rows.stop - rows.start) > wanted:
                    yield from self._computed_pieces(job, load(), n_items, "the model", part.is_product)
                else:
                    yield _Piece(job, load, "the model", part.is_product)

    def _whole(self, job: Job, array: mx.array) -> mx.array:
        self._evaluate(job, array)
        return array

    def _start_rows(self, parts: Sequence[Extent | mx.array], first: int, n: int) -> Callable[[], mx.array]:
        """Read `n` rows from `first` on of an array whose parts are these, end to end. Goes out: `[n, columns]`."""
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

    def _evaluate(self, job: Job, array: mx.array) -> None:
        try:
            mx.eval(array)
        except (RuntimeError, ValueError) as e:
            raise ModelError(f"tensor {job.name} cannot be computed: {str(e).splitlines()[0]}") from None
        for file in self._computed_from:
            platform.drop_cached_file(file)

    def _computed_pieces(
        self, job: Job, array: mx.array, step: int, source: str, is_product: bool = False
    ) -> Iterator[_Piece]:
        flat = array.reshape(-1)
        del array
        self._evaluate(job, flat)
        for start in range(0, flat.size, step):
            piece = flat[start : start + step]
            yield _Piece(job, lambda piece=piece: piece, source, is_product)

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
        """The bytes of each output that come of a piece."""
        job, n_columns = piece.job, piece.job.n_columns
        rows = array.size // n_columns
        share = -(-rows // len(self._streams))
        made: list[tuple[str, mx.array]] = []
        checks = []
        for i, stream in enumerate(self._streams):
            with mx.stream(stream):
                values = array[i * share * n_columns : (i + 1) * share * n_columns]
                if values.size == 0:
                    break
                values = values.astype(job.dtype).astype(job.target)
                checks.append(_largest_exponent(values))
                parts: Sequence[mx.array] = [values]
                if job.quantization is not None:
                    group_size, bits, mode = job.quantization
                    parts = mx.quantize(values.reshape(-1, n_columns), group_size, bits, mode=mode)
                made += [(name, _bytes(part)) for name, part in zip(job.outputs, parts)]
        mx.eval([a for _, a in made], [check for check in checks if check is not None])
        for check in checks:
            if check is not None and check.item() == EXPONENTS[_name(job.target)][1]:
                raise self._not_finite(piece, array)
        return [(name, memoryview(a)) for name, a in made]

    def _not_finite(self, piece: _Piece, array: mx.array) -> ModelError:
        job = piece.job
        if mx.isfinite(array).all().item():
            largest = mx.abs(array.astype(mx.float32)).max().item()
            return ModelError(
                f"{piece.source}: tensor {job.name} holds {largest:.4g}, too large for {_name(job.target)}. "
                f"Use --dtype {_name(array.dtype)}"
            )
        kind = "NaN" if mx.isnan(array).any().item() else "infinity"
        if piece.is_product:
            return ModelError(
                f"tensor {job.name} becomes {kind} with the adapter: one of the two is damaged. "
                "Check the model (slowft verify) and use an earlier adapter"
            )
        return ModelError(f"{piece.source}: tensor {job.name} holds {kind}: the file is damaged. Download it again")


def _name(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")


def _bytes(array: mx.array) -> mx.array:
    return array.reshape(-1).view(mx.uint8)


def _largest_exponent(values: mx.array) -> mx.array | None:
    """All ones if any value is NaN or infinite; by integers, which is 3 times as fast as `mx.isfinite` on a CPU."""
    if _name(values.dtype) not in EXPONENTS:
        return None
    unsigned, exponent = EXPONENTS[_name(values.dtype)]
    bits = values.view(mx.uint16 if unsigned().itemsize == 2 else mx.uint32)
    return (bits & mx.array(exponent, bits.dtype)).max()


# --- The output directory ---------------------------------------------------------------------------


def refuse_unusable(output: Path) -> None:
    """Raises SlowftError if `output` is there and is neither empty nor an unfinished run."""
    if not output.exists():
        return
    if not output.is_dir():
        raise SlowftError(f"{output} is a file. Give a directory for the model to be written")
    names = set(os.listdir(output))
    if names and manifest.JOURNAL not in names:
        if manifest.NAME in names:
            raise SlowftError(
                f"{output} holds a finished model already. Check it (slowft verify {output}) or give another directory"
            )
        raise SlowftError(f"{output} is not empty and not slowft's. Give another --output")


class _Output:
    """The directory that is being written, held by this process alone.

    The journal, `slowft.journal`, is there from before the first file until after the last, config.json, without
    which nobody takes the directory for a model.

    Attributes:
        done: finished files' entries of the manifest, by name.
    """

    def __init__(self, directory: Path, conversion: Conversion, note: Callable[[str], None]):
        self._directory, self._conversion, self._note = directory, conversion, note
        self.done: dict[str, dict] = {}
        self._identity, self._command = conversion.identity(), conversion.options.command
        self._copied = conversion.copied()

    def __enter__(self) -> "_Output":
        if not self._directory.exists():
            self.check_room()  # before anything is made
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(self._directory, os.O_RDONLY)
        except OSError as e:
            raise SlowftError(f"{self._directory} cannot be made: {e.strerror}") from None
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._fd)
            raise SlowftError(
                f"another slowft {self._command} is writing to {self._directory}. Let it finish"
            ) from None
        return self

    def __exit__(self, *exception) -> None:
        os.close(self._fd)

    def go_on(self, progress: manifest.Progress | None) -> None:
        """Keep what an earlier run finished, if it was one of this very job and its files are as it left them."""
        refuse_unusable(self._directory)
        journal = self._directory / manifest.JOURNAL
        if not journal.exists():
            return
        try:
            earlier = manifest.load(journal)
            identity, files = earlier["made"], earlier["files"]
        except (ModelError, KeyError):
            identity, files = {}, {}
        differing = [key for key, value in self._identity.items() if identity.get(key) != value]
        if differing:
            raise SlowftError(
                f"{self._directory} holds an unfinished slowft {self._command} of another job (other {differing[0]}). "
                "Delete it, or give another --output"
            )
        faults = {fault.file for fault in manifest.verify_entries(self._directory, files, progress)}
        wanted = {file.name for file in self._conversion.files}
        self.done = {name: entry for name, entry in files.items() if name in wanted and name not in faults}
        n, redone = len(self.done), len(wanted & files.keys() & faults)
        again = f"; {redone} damaged since, written again" if redone else ""
        self._note(f"Going on with an earlier run: {n} of {len(wanted)} files are there{again}")

    def check_room(self) -> None:
        """Raises SlowftError if the disk has too little room for what is not there yet."""
        needed = sum(f.nbytes + len(header(f.tensors)) for f in self._conversion.files if f.name not in self.done)
        needed += sum(file.stat().st_size for file in self._copied) + (1 << 20)
        free = free_nbytes(self._directory)
        unfinished = [self._directory / (f.name + UNFINISHED) for f in self._conversion.files]
        free += sum(file.stat().st_size for file in unfinished if file.exists())
        if free < needed:
            raise SlowftError(_no_room(self._directory, needed, free))

    def write(self, file: File, worker: _Worker) -> None:
        """Make one file of weights, and enter it in the journal."""
        try:
            if not (self._directory / manifest.JOURNAL).exists():
                self._write_journal()  # before the first byte: what is in the directory is known to be ours
            out = TensorFile(self._directory / file.name, file.tensors, 2 * worker.piece_nbytes)
            try:
                worker.fill(out, file)
                self.done[file.name] = out.finish()
            except BaseException:
                out.abandon()
                raise
            self._write_journal()
        except SlowftError as e:
            raise self._explained(e) from None

    def complete(self) -> None:
        """Add everything else; config.json is last."""
        try:
            for file in self._copied:
                self._add(file.name, _contents(file))
            self._add(INDEX, json.dumps(self._conversion.index, indent=4).encode())
            config = self._conversion.config_text().encode()
            entries = self.done | {"config.json": manifest.entry_of(config)}
            manifest.save(self._directory, self._identity, entries)
            write_file(self._directory / "config.json", config)
            (self._directory / manifest.JOURNAL).unlink()
            sync_directory(self._directory)
        except OSError as e:
            raise SlowftError(f"{self._directory} cannot be written: {e.strerror}") from None
        except SlowftError as e:
            raise self._explained(e) from None

    def _add(self, name: str, contents: bytes) -> None:
        write_file(self._directory / name, contents)
        self.done[name] = manifest.entry_of(contents)

    def _write_journal(self) -> None:
        write_file(self._directory / manifest.JOURNAL, manifest.encode(self._identity, self.done))

    def _explained(self, error: SlowftError) -> SlowftError:
        if isinstance(error, ModelError):
            return error
        n, total = len(self.done.keys() & {f.name for f in self._conversion.files}), len(self._conversion.files)
        return SlowftError(f"{error}. {n} of {total} files are done: make room, then the same command goes on")


def _contents(file: Path) -> bytes:
    """Of a file of the model that is copied. Raises ModelError if it cannot be read."""
    try:
        return file.read_bytes()
    except OSError as e:
        raise ModelError(f"{file} cannot be read: {reason_of(e)}") from None


def _no_room(directory: Path, needed: int, free: int) -> str:
    return (
        f"{directory} needs {needed / 1e6:,.0f} MB, and its disk has {free / 1e6:,.0f} MB free. "
        "Make room, or give another --output"
    )
