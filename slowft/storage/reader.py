"""Ranges of files into buffers, on a thread of its own, past the file cache.

Comes in: (extent or byte range, writable memoryview). Goes out: the filled buffer, or an error that names
file and offset. Only fills bytes: MLX arrays belong to the thread that computes, and are never made here.
"""

import os
import threading
import time
import weakref
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from .. import platform, tracing
from ..errors import ModelError

# Bytes asked of the kernel at a time. Linux puts them into the file cache first, where a memory limit counts
# them until they are dropped: 88 MB runs read at once held 101 MB there, and 134 MB backwards; in requests of 2 MB
# 17 MB, which is twice this disk's read-ahead of 8 MB (128 KB on most laptops). Median throughput forward / backward:
# 2.3 / 1.9 GB/s at 2 MB, 2.5 / 1.8 at 4 MB, 2.4 / 1.9 whole, 1.0 / 1.0 by O_DIRECT. At 1 MB it falls to a third and
# the cache fills: a drop spares the kernel's large pages that it covers only in part. macOS goes past the cache
# anyway, and only cuts a single read short of 2 GiB.
MAX_REQUEST_NBYTES = 1 << 30 if platform.MACOS else 2 << 20


@dataclass(frozen=True)
class ByteRange:
    """`nbytes` bytes of `file` from `offset`, to be put at `at` in the destination buffer."""

    file: str
    offset: int
    nbytes: int
    at: int


class Reader:
    """Reads byte ranges in the order asked, one at a time.

    Attributes:
        bytes_read: bytes read so far.
        wait_s: seconds that callers of `wait` and `read_now` were held up by reads.
    """

    def __init__(self):
        self._descriptors: dict[str, int] = {}
        self._last: tuple[int, int] | None = None  # (descriptor, end) of the run read last
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="slowft-reader")
        self.bytes_read = 0
        self.wait_s = 0.0
        self._close_files = weakref.finalize(self, _close_all, self._descriptors)

    def submit(self, ranges: Iterable[ByteRange], buffer: memoryview) -> Future:
        """Start filling `buffer` and return a future that is done when it is full."""
        ranges = list(ranges)
        place = {"file": ranges[0].file, "offset": ranges[0].offset} if ranges else {}
        traced = tracing.spanned(self._read, "read", "read", bytes=sum(r.nbytes for r in ranges), **place)
        return self._thread.submit(traced, ranges, buffer)

    def wait(self, read: Future) -> None:
        """Return when `read` is done.

        Raises:
            ModelError: the file ends early or cannot be read; names the file and the offset.
        """
        begin = time.perf_counter()
        try:
            with tracing.span("wait", "read"):
                read.result()
        finally:
            self.wait_s += time.perf_counter() - begin

    def read_now(self, ranges: Iterable[ByteRange], buffer: memoryview) -> None:
        """Fill `buffer` before returning, ahead of nothing that was submitted earlier."""
        self.wait(self.submit(ranges, buffer))

    def _read(self, ranges: Iterable[ByteRange], buffer: memoryview) -> None:
        # neighbours in the file become one request, scattered to their places
        for run in _contiguous_runs(ranges):
            self._read_run(run, buffer)

    def _read_run(self, run: list[ByteRange], buffer: memoryview) -> None:
        file, offset = run[0].file, run[0].offset
        nbytes = sum(r.nbytes for r in run)
        targets = [buffer[r.at : r.at + r.nbytes] for r in run if r.nbytes]
        fd = self._descriptor(file)
        done = 0
        while done < nbytes:
            try:  # (Python itself tries again after a signal)
                got = os.preadv(fd, _first_nbytes(targets, MAX_REQUEST_NBYTES), offset + done)
            except OSError as e:
                raise ModelError(f"{file}: reading at byte {offset + done} failed: {e.strerror}") from None
            if got == 0:
                raise ModelError(f"{file} ends at byte {offset + done}, {nbytes - done} bytes early: was it changed?")
            done += got
            targets = _without_first_nbytes(targets, got)
            platform.drop_cached(fd, 0, offset + done)  # from 0: the page that two runs share goes with the second
            if done == got:
                self._drop_read_ahead(fd, offset, nbytes)
        self._last = fd, offset + nbytes
        with self._lock:
            self.bytes_read += nbytes

    def _drop_read_ahead(self, fd: int, offset: int, nbytes: int) -> None:
        """Forget what the kernel read past the end of the run before this one, unless this one goes on from there.

        It reads on as far as its read-ahead window, which piles up in the file cache when blocks are visited
        backwards: 8 MB a block, measured. Only after this run's first request, as what is still being read stays.
        (POSIX_FADV_RANDOM would prevent it and halve the throughput: 1.1 for 2.2 GB/s.)
        """
        if self._last is None or self._last == (fd, offset):
            return
        if self._last[0] != fd:
            platform.drop_cached(self._last[0], 0, 0)
        platform.drop_cached(fd, offset + nbytes, 0)

    def _descriptor(self, file: str) -> int:
        with self._lock:
            if file not in self._descriptors:
                try:
                    self._descriptors[file] = platform.open_uncached(file)
                except OSError as e:
                    raise ModelError(f"{file} cannot be opened: {e.strerror}") from None
            return self._descriptors[file]

    def close(self) -> None:
        """Finish the reads under way, end the thread, close the files."""
        self._thread.shutdown(cancel_futures=True)
        self._close_files()


def _close_all(descriptors: dict[str, int]) -> None:
    while descriptors:
        os.close(descriptors.popitem()[1])


def _first_nbytes(targets: list[memoryview], nbytes: int) -> list[memoryview]:
    """The leading part of a scatter list, `nbytes` bytes at most."""
    head = []
    for target in targets:
        head.append(target[:nbytes])
        nbytes -= len(head[-1])
        if nbytes == 0:
            break
    return head


def _without_first_nbytes(targets: list[memoryview], nbytes: int) -> list[memoryview]:
    """What is left of a scatter list after `nbytes` bytes: a read may stop anywhere."""
    rest = []
    for target in targets:
        taken = min(nbytes, len(target))
        nbytes -= taken
        if taken < len(target):
            rest.append(target[taken:])
    return rest


def _contiguous_runs(ranges: Iterable[ByteRange]) -> Iterable[list[ByteRange]]:
    """Ranges in file order, grouped so that each group is one unbroken stretch of a file."""
    run: list[ByteRange] = []
    for r in sorted(ranges, key=lambda r: (r.file, r.offset)):
        full = len(run) >= 512  # IOV_MAX is 1024 on Linux and macOS
        if run and (full or r.file != run[-1].file or r.offset != run[-1].offset + run[-1].nbytes):
            yield run
            run = []
        run.append(r)
    if run:
        yield run
