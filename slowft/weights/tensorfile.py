"""Writes a safetensors file tensor by tensor, a piece at a time, and hashes it meanwhile.

Comes in: names, dtypes and shapes, then bytes. Goes out: a synced file, which gets its final name only when it is
whole, and its checksums. It never holds more than a bounded number of unwritten bytes, and leaves none in the file
cache.

Data begins on a page of the file. Tensors of whole pages come first, so that all of these lie on page boundaries. The
format allows a header padded with spaces, but no holes between tensors, so tensors of other sizes (norms, biases)
follow one another at the end. Format: https://github.com/huggingface/safetensors#format
"""

import errno
import hashlib
import json
import math
import os
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
from .transfers import REQUEST_NBYTES, free_nbytes, retried, write_all

PAGE_NBYTES = 4096
UNFINISHED = ".partial"

STORED = {dtype: stored for stored, (dtype, _) in reversed(DTYPES.items())}  # MLX dtype -> safetensors type
ITEM_NBYTES = dict(DTYPES.values())


@dataclass(frozen=True)
class Tensor:
    """A tensor to be written: an array of `shape` and `dtype`, which is MLX's name of it."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_NBYTES[self.dtype]


def arrange(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The order in the file: tensors of whole pages first, then those of larger dtypes, so that all are aligned."""

    def key(t: Tensor) -> tuple[bool, int]:
        ends_on_page = t.nbytes % PAGE_NBYTES == 0
        return not ends_on_page, 0 if ends_on_page else -ITEM_NBYTES[t.dtype]

    return sorted(tensors, key=key)


def header(tensors: Iterable[Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """The start of a file that holds these tensors in this order, up to the data. It fills whole pages."""
    entries: dict[str, dict] = {"__metadata__": metadata or {"format": "mlx"}}
    end = 0
    for t in tensors:
        begin, end = end, end + t.nbytes
        entries[t.name] = {"dtype": STORED[t.dtype], "shape": list(t.shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % PAGE_NBYTES)
    return struct.pack("<Q", len(text)) + text


class TensorFile:
    """`file`, which has a temporary name in its directory until `finish`.

    Args:
        max_pending_nbytes: the most data given to `write` and not written yet.
        metadata: the file's metadata; None for those that mlx-lm writes.

    Raises:
        SlowftError: the file cannot be made, or its disk has no room for it.
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
        self._given = dict(self._begin)  # where the bytes of each tensor that were given to `write` end
        self._written = dict(self._begin)  # where the bytes of each tensor that are hashed and in the file end
        self._hashes = {t.name: hashlib.sha256() for t in self._tensors}
        self._header_hash = hashlib.sha256(start).hexdigest()
        # the hash of the file up to `_hashed`, which lies in the tensor `_next` of the file's order
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
        """Start writing the next bytes of a tensor. They must not change before `finish` returns.

        It blocks while more than `max_pending_nbytes` are unwritten.

        Raises:
            SlowftError: an earlier write failed.
        """
        at = self._given[name]
        self._given[name] = at + len(data)
        write = self._writer.submit(write_all, self._fd, data, at)
        self._pending.append((self._hasher.submit(self._hash, name, at, data, write), len(data)))
        while sum(nbytes for _, nbytes in self._pending) > self._max_pending_nbytes:
            self._wait_for_oldest()

    def finish(self) -> dict:
        """Sync the file and give it its final name. Returns its checksums, in the manifest's form.

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

    def _hash(self, name: str, at: int, data: memoryview, write: Future) -> None:
        self._hashes[name].update(data)
        if at == self._hashed:
            self._file_hash.update(data)
            self._hashed += len(data)
        write.result()
        self._written[name] = at + len(data)
        self._hash_written_early()

    def _hash_written_early(self) -> None:
        """Continue the file's hash through data that were written before their turn, such as scales beside a weight."""
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
    """The error for a user whose disk is full, read-only or gone. `nbytes` is the size of the whole file."""
    size = "" if nbytes is None else f" ({size_in_words(nbytes)})"
    return SlowftError(f"{file}{size} cannot be written: {reason_of(error)}{_free(file, error)}")


def _free(file: Path, error: OSError) -> str:
    """How much the disk has left, if the error is that it is full."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return ""
    return f" ({size_in_words(free_nbytes(file))} free)"


def load_arrays(file: Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    """(arrays, metadata) as `mx.load` reads them, evaluated. The header is checked first: some wrong ones crash MLX.

    Raises:
        ModelError: the header is wrong. It says how.
        RuntimeError: the file cannot be read.
    """
    read_header(file)
    arrays, metadata = mx.load(str(file), format="safetensors", return_metadata=True)
    mx.eval(arrays)
    return arrays, metadata


def load_lazily(file: Path) -> dict[str, mx.array]:
    """The same arrays as `load_arrays`, each read when it is evaluated. Raises the same errors."""
    read_header(file)
    return mx.load(str(file), format="safetensors")


def save_arrays(file: Path, arrays: Mapping[str, mx.array], metadata: Mapping[str, str] | None = None) -> None:
    """Write arrays by `mx.save_safetensors`, which by itself does not say why writing failed.

    Raises:
        OSError: the file cannot be written.
    """
    with open(file, "wb") as out:
        mx.save_safetensors(out, dict(arrays), dict(metadata or {}))


def sync(file: Path) -> None:
    """Make what was written to a file survive a power cut.

    Raises:
        OSError: the drive did not take it.
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
    """Write and sync a small file, which replaces what has its name all at once.

    Raises:
        SlowftError: the file cannot be written.
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
