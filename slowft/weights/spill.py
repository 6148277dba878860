"""Keeps block inputs (activations) on disk while memory has no room: written while blocks compute, read ahead of need.

Comes in: bytes and their place in the file, from the thread that computes. Goes out: futures of bytes. It never keeps
more than a bounded number of unwritten bytes, nor any in the file cache, which a memory limit counts.
"""

import errno
import os
import shutil
import tempfile
import threading
import time
import weakref
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from .. import platform, tracing
from ..errors import SlowftError, reason_of
from ..sizes import size_in_words
from .transfers import RequestError, free_nbytes, read_all, write_all

REMEDY = "another --spill-dir, more --memory, or fewer tokens at a time (--batch-size, --max-seq-length)"


class SpillFile:
    """One file of `nbytes` in `directory`. Its room on the disk is reserved from the start; it has no name.

    It is unlinked when it is made (`tempfile.TemporaryFile`), so nothing is left of it when the process ends, not
    even by kill -9. Reads and writes happen in the order of the calls, on one thread.

    Attributes:
        bytes_written, bytes_read: bytes so far.
        wait_s: seconds that callers of `write` waited because too much was unwritten.

    Args:
        max_pending_nbytes: the most data given to `write` and not written yet. (One larger piece goes alone.)

    Raises:
        SlowftError: the directory cannot be used, is in memory, or has no room.
    """

    def __init__(self, directory: Path, nbytes: int, max_pending_nbytes: int = 64 << 20):
        self.nbytes = nbytes
        self.bytes_written = 0
        self.bytes_read = 0
        self.wait_s = 0.0
        self._directory = Path(directory)
        self._max_pending_nbytes = max_pending_nbytes
        self._pending_nbytes = 0
        self._written = threading.Condition()
        self._error: SlowftError | None = None
        self._error_was_raised = False
        self._fd = self._make()
        self._close_file = weakref.finalize(self, os.close, self._fd)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="slowft-spill")

    def write(self, slot_offset: int, data: memoryview | np.ndarray) -> Future:
        """Start writing the bytes of `data` at `slot_offset`. They must not change before the future is done.

        It blocks while there are `max_pending_nbytes` unwritten bytes. An array that is not contiguous is copied.

        Raises:
            SlowftError: an earlier write failed.
        """
        bytes_ = memoryview(np.ascontiguousarray(data).reshape(-1).view(np.uint8))
        self._check(slot_offset, len(bytes_))
        begin = time.perf_counter()
        with self._written:
            self._written.wait_for(
                lambda: not self._pending_nbytes or self._pending_nbytes + len(bytes_) <= self._max_pending_nbytes
            )
            self.wait_s += time.perf_counter() - begin
            self._raise_error()
            self._pending_nbytes += len(bytes_)
        write = tracing.spanned(self._write, "spill", "write", bytes=len(bytes_))
        return self._thread.submit(write, slot_offset, bytes_)

    def read(self, slot_offset: int, nbytes: int) -> Future:
        """Start reading what was written last. The future's result is a new, writable array, uint8 `[nbytes]`.

        Raises:
            SlowftError: an earlier write failed. The future raises it if the read failed.
        """
        self._check(slot_offset, nbytes)
        with self._written:
            self._raise_error()
        return self._thread.submit(tracing.spanned(self._read, "spill", "read", bytes=nbytes), slot_offset, nbytes)

    def close(self) -> None:
        """Finish what is being read or written, drop the rest, and end the thread. The file is gone.

        Raises:
            SlowftError: a write failed and no call has raised that yet.
        """
        self._thread.shutdown(cancel_futures=True)
        self._close_file()
        if not self._error_was_raised:
            self._raise_error()

    def _make(self) -> int:
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            if platform.is_memory_filesystem(self._directory):
                raise SlowftError(
                    f"{self._directory} is in memory, where spilling saves none. To fix it: --spill-dir with a "
                    f"directory on a disk, such as {platform.cache_directory()}"
                )
            free = shutil.disk_usage(self._directory).free
            with tempfile.TemporaryFile(dir=self._directory, prefix="slowft-spill-", buffering=0) as file:
                platform.skip_file_cache(file.fileno())
                if free >= self.nbytes:  # else preallocating would fill the disk before it fails
                    platform.preallocate(file.fileno(), self.nbytes)
                    return os.dup(file.fileno())
        except OSError as e:
            if e.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise SlowftError(
                    f"{self._directory}: no file can be made there for activations: {reason_of(e)}. To fix it: another "
                    "--spill-dir"
                ) from None
        raise SlowftError(
            f"{self._directory} has {size_in_words(free_nbytes(self._directory))} free, and activations need "
            f"{size_in_words(self.nbytes)} there. To fix it: {REMEDY}"
        )

    def _check(self, offset: int, nbytes: int) -> None:
        if offset < 0 or nbytes < 0 or offset + nbytes > self.nbytes:
            raise ValueError(f"bytes {offset} to {offset + nbytes} of a spill file of {self.nbytes}")

    def _raise_error(self) -> None:
        if self._error is not None:
            self._error_was_raised = True
            raise self._error

    def _write(self, offset: int, data: memoryview) -> None:
        try:
            if self._error is not None:  # after a failed write the file is of no use
                raise self._error
            write_all(self._fd, data, offset)
            self.bytes_written += len(data)
        except RequestError as e:
            self._error = self._failure("writing", e)
            raise self._error from None
        finally:
            with self._written:
                self._pending_nbytes -= len(data)
                self._written.notify_all()

    def _read(self, offset: int, nbytes: int) -> np.ndarray:
        if self._error is not None:
            raise self._error
        array = np.empty(nbytes, np.uint8)
        try:
            done = read_all(self._fd, memoryview(array), offset)
        except RequestError as e:
            raise self._failure("reading", e) from None
        if done < nbytes:
            raise SlowftError(f"{self._directory}: activations end at byte {offset + done}: was the disk removed?")
        self.bytes_read += nbytes
        return array

    def _failure(self, doing: str, error: RequestError) -> SlowftError:
        where = f"at byte {error.offset} of {self.nbytes}"
        return SlowftError(
            f"{self._directory}: {doing} activations {where} failed: {reason_of(error)}. To fix it: {REMEDY}"
        )
