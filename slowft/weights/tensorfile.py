"""A safetensors file written tensor by tensor, a piece at a time, hashed as it is written, in place all at once.

Comes in: names, dtypes and shapes, then bytes. Goes out: a file under its final name, synced, and its checksums.
Never holds more than a bounded number of unwritten bytes, nor leaves any in the file cache.

Data begins on a page of the file, and tensors of whole pages come first, so that all of those lie on page boundaries.
The format allows a header padded with spaces and no holes between tensors, so those of other sizes (norms, biases)
follow one another at the end. Format: https://github.com/huggingface/safetensors#format
"""

import errno
import hashlib
import json
import math
import os
import shutil
import struct
from collections import deque
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from .. import platform
from ..errors import SlowftError, reason_of
from ..sizes import size_in_words
from .extents import DTYPES, read_header
from .transfers import REQUEST_NBYTES, retried, write_all

PAGE_NBYTES = 4096
UNFINISHED = ".partial"

STORED = {dtype: stored for stored, (dtype, _) in reversed(DTYPES.items())}  # MLX dtype -> safetensors type
ITEM_NBYTES = dict(DTYPES.values())


@dataclass(frozen=True)
class Tensor:
    """What a file is to hold: an array of `shape` and MLX dtype name."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_NBYTES[self.dtype]


def arrange(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The order in the file: whole pages first, then larger items before smaller, so that every item is aligned."""
    return sorted(tensors, key=lambda t: (t.nbytes % PAGE_NBYTES != 0, t.nbytes % PAGE_NBYTES and -_item_nbytes(t)))


def _item_nbytes(tensor: Tensor) -> int:
    return ITEM_NBYTES[tensor.dtype]


def header(tensors: Iterable[Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """The start of the file that holds these, in this order, up to the data: whole pages."""
    entries: dict[str, dict] = {"__metadata__": metadata or {"format": "mlx"}}
    end = 0
    for t in tensors:
        begin, end = end, end + t.nbytes
        entries[t.name] = {"dtype": STORED[t.dtype], "shape": list(t.shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % PAGE_NBYTES)
    return struct.pack("<Q", len(text)) + text


class TensorFile:
    """`file`, under a temporary name in its directory until `finish`.

    Args:
        max_pending_nbytes: of data given to `write` and not written yet.
        metadata: of the file; None: what mlx-lm writes.

    Raises:
        SlowftError: it cannot be made, or its disk has no room for it.
    """

    def __init__(
        self,
        file: Path,
        tensors: Iterable[Tensor],
        max_pending_nbytes: int,
        metadata: dict[str, str] | None = None,
    ):
        self._file, self._partial = file, file.with_name(file.name + UNFINISHED)
        self._tensors = arrange(tensors)
        start = header(self._tensors, metadata)
        self._begin: dict[str, int] = {}
        self.nbytes = len(start)
        for t in self._tensors:
            self._begin[t.name] = self.nbytes
            self.nbytes += t.nbytes
        self._given = dict(self._begin)  # up to where each tensor's bytes were given to `write`
        self._written = dict(self._begin)  # up to where they were hashed, and are in the file
        self._hashes = {t.name: hashlib.sha256() for t in self._tensors}
        self._header_hash = hashlib.sha256(start).hexdigest()
        self._file_hash, self._hashed, self._next = hashlib.sha256(start), len(start), 0
        self._max_pending_nbytes = max_pending_nbytes
        self._pending: deque[tuple[Future, int]] = deque()
        try:
            self._fd = os.open(self._partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        except OSError as e:
            raise cannot_write(file, e, self.nbytes) from None
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="slowft-write")
        self._hasher = ThreadPoolExecutor(1, thread_name_prefix="slowft-hash")
        try:
            platform.skip_file_cache(self._fd)
            platform.preallocate(self._fd, self.nbytes)
            write_all(self._fd, memoryview(start), 0)
        except OSError as e:
            self.abandon()
            raise cannot_write(file, e, self.nbytes) from None

    def write(self, name: str, data: memoryview) -> None:
        """Start writing the next bytes of a tensor; they must not change before `finish` returns.

        Blocks while too much is unwritten.

        Raises:
            SlowftError: an earlier write failed.
        """
        at = self._given[name]
        self._given[name] = at + len(data)
        put = self._writer.submit(write_all, self._fd, data, at)
        self._pending.append((self._hasher.submit(self._hash, name, at, data, put), len(data)))
        while sum(nbytes for _, nbytes in self._pending) > self._max_pending_nbytes:
            self._wait_for_oldest()

    def finish(self) -> dict:
        """Sync the file and give it its name. Returns its checksums, as the manifest has them.

        Raises:
            SlowftError: a write failed.
        """
        while self._pending:
            self._wait_for_oldest()
        ends = {t.name: self._begin[t.name] + t.nbytes for t in self._tensors}
        if self._written != ends or self._hashed != self.nbytes:
            missing = [name for name, end in ends.items() if self._written[name] != end]
            raise RuntimeError(f"{self._file.name}: tensors {missing} are not of the size that was announced")
        try:
            platform.sync_file(self._fd)
            self._close()
            os.replace(self._partial, self._file)
            sync_directory(self._file.parent)
        except OSError as e:
            raise cannot_write(self._file, e, self.nbytes) from None
        return {
            "nbytes": self.nbytes,
            "sha256": self._file_hash.hexdigest(),
            "header_sha256": self._header_hash,
            "tensors": {
                t.name: {
                    "offset": self._begin[t.name],
                    "nbytes": t.nbytes,
                    "sha256": self._hashes[t.name].hexdigest(),
                }
                for t in self._tensors
            },
        }

    def abandon(self) -> None:
        """Delete what was written."""
        self._close()
        self._partial.unlink(missing_ok=True)

    def _close(self) -> None:
        for thread in (self._writer, self._hasher):  # in this order: a hash waits for its data to be written
            thread.shutdown(cancel_futures=True)
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _wait_for_oldest(self) -> None:
        try:
            self._pending.popleft()[0].result()
        except OSError as e:
            raise cannot_write(self._file, e, self.nbytes) from None

    def _hash(self, name: str, at: int, data: memoryview, put: Future) -> None:
        self._hashes[name].update(data)
        if at == self._hashed:
            self._file_hash.update(data)
            self._hashed += len(data)
        put.result()
        self._written[name] = at + len(data)
        self._hash_what_follows()

    def _hash_what_follows(self) -> None:
        """Go on with the file's hash through what was written before its turn: scales, beside their weight."""
        while self._next < len(self._tensors):
            t = self._tensors[self._next]
            while self._hashed < self._written[t.name]:
                nbytes = min(REQUEST_NBYTES, self._written[t.name] - self._hashed)
                data = retried(os.pread, self._fd, nbytes, self._hashed)
                if not data:
                    raise OSError(errno.EIO, "what was written is not there")
                self._file_hash.update(data)
                platform.drop_cached(self._fd, self._hashed, len(data))
                self._hashed += len(data)
            if self._hashed < self._begin[t.name] + t.nbytes:
                return
            self._next += 1


def cannot_write(file: Path, error: OSError, nbytes: int | None = None) -> SlowftError:
    """What to tell a user whose disk is full, read-only or gone. `nbytes`: of the whole file."""
    size = "" if nbytes is None else f" ({size_in_words(nbytes)})"
    return SlowftError(f"{file}{size} cannot be written: {reason_of(error)}{_free(file, error)}")


def _free(file: Path, error: OSError) -> str:
    """What the disk has left, if that is what is wrong."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return ""
    there = next(path for path in (file, *file.absolute().parents) if path.exists())
    return f" ({size_in_words(shutil.disk_usage(there).free)} free)"


def load_arrays(file: Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    """(arrays, metadata) as `mx.load` reads them, evaluated; it crashes on some headers that contradict themselves.

    Raises:
        ModelError: what is wrong with the header.
        RuntimeError: the file cannot be read.
    """
    read_header(file)
    arrays, metadata = mx.load(str(file), format="safetensors", return_metadata=True)
    mx.eval(arrays)
    return arrays, metadata


def load_lazily(file: Path) -> dict[str, mx.array]:
    """The same arrays, each read when it is evaluated. Raises as `load_arrays` does."""
    read_header(file)
    return mx.load(str(file), format="safetensors")


def save_arrays(file: Path, arrays: Mapping[str, mx.array], metadata: Mapping[str, str] | None = None) -> None:
    """Write arrays as `mx.save_safetensors` does, which by itself does not say why it cannot.

    Raises:
        OSError: it cannot be written.
    """
    with open(file, "wb") as out:
        mx.save_safetensors(out, dict(arrays), dict(metadata or {}))


def sync(file: Path) -> None:
    """Have the drive take what was written to a file.

    Raises:
        OSError: it cannot.
    """
    fd = os.open(file, os.O_RDWR)
    try:
        platform.sync_file(fd)
    finally:
        os.close(fd)


def sync_directory(directory: Path) -> None:
    """Make the names of files written there survive a power cut."""
    fd = os.open(directory, os.O_RDONLY)
    try:
        platform.sync_file(fd)
    finally:
        os.close(fd)


def write_file(file: Path, contents: bytes) -> None:
    """A small file, in place all at once and synced.

    Raises:
        SlowftError: it cannot be written.
    """
    partial = file.with_name(file.name + UNFINISHED)
    try:
        with open(partial, "wb") as out:
            out.write(contents)
            out.flush()
            platform.sync_file(out.fileno())
        os.replace(partial, file)
        sync_directory(file.parent)
    except OSError as e:
        partial.unlink(missing_ok=True)
        raise cannot_write(file, e, len(contents)) from None
