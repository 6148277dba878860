"""Ranges of files into buffers, on threads of its own, past the file cache.

Comes in: (extent or byte range, writable memoryview). Goes out: the filled buffer, or an error that names
file and offset. Only fills bytes: MLX arrays belong to the thread that computes, and are never made here.

Three ways. Directly (Linux's O_DIRECT, macOS's F_NOCACHE, `reads_in_flight` requests at a time) where a stretch of a
file goes to one stretch of memory that is aligned like it: `buffers` and `weights.Layout` see to that for all that is
large. The file cache is not touched, nothing is copied. By bounce for few bytes, for the ends of a stretch, and for
every stretch that goes elsewhere: whole pages directly into memory of the reader's own, copied from there. Through the
file cache, a request at a time and each dropped after it, on file systems without direct reads.
"""

import errno
import mmap
import os
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import numpy as np

from .. import platform, tracing
from ..errors import ModelError, reason_of
from .buffers import LARGE_NBYTES
from .transfers import retried

# Bytes asked of the kernel at a time where it puts them into the file cache first, where a memory limit counts
# them until they are dropped: 88 MB runs read at once held 101 MB there, and 134 MB backwards; in requests of 2 MB
# 17 MB, which is twice this disk's read-ahead of 8 MB (128 KB on most laptops). Median throughput forward / backward:
# 2.3 / 1.9 GB/s at 2 MB, 2.5 / 1.8 at 4 MB, 2.4 / 1.9 whole. At 1 MB it falls to a third and
# the cache fills: a drop spares the kernel's large pages that it covers only in part. macOS comes here only with a few
# bytes, and refuses a single read of 2 GiB.
MAX_REQUEST_NBYTES = 2 << 20
# The same of direct reads. On huge pages, one at a time: 1.9 GB/s at 2 MB, 2.1 at 8; four at a time 2.2 and 2.3.
DIRECT_REQUEST_NBYTES = 8 << 20
MAX_READS_IN_FLIGHT = 8

NOT_DIRECT_ERRORS = (errno.EINVAL, errno.EFAULT)  # a file system that opens files for direct reads and has none


@dataclass(frozen=True)
class ByteRange:
    """`nbytes` bytes of `file` from `offset`, to be put at `at` in the destination buffer."""

    file: str
    offset: int
    nbytes: int
    at: int


@dataclass(frozen=True)
class _State:
    """What tells a file from the same file after somebody wrote to it, or put another in its place.

    Not the time of its last change (ctime), by which `fingerprint.identities` tells files between runs: taking a name
    from an open file, or giving it one, sets that too.
    """

    device: int
    inode: int
    nbytes: int
    modified_ns: int

    @classmethod
    def of(cls, stat: os.stat_result) -> "_State":
        return cls(stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)


@dataclass
class _File:
    name: str
    fd: int
    direct_fd: int | None  # on macOS the same as `fd`
    state: _State

    def close_direct(self) -> None:
        """Read it through the file cache from now on."""
        if self.direct_fd not in (None, self.fd):
            os.close(self.direct_fd)
        self.direct_fd = None


class Reader:
    """Reads byte ranges in the order asked, one list after the other.

    Attributes:
        reads_in_flight: requests that a direct read has under way at once, 1 to `MAX_READS_IN_FLIGHT`. May be changed
            at any time.
        bytes_read: bytes read so far.
        read_s: seconds that the drive was busy with them.
        wait_s: seconds that callers of `wait` and `read_now` were held up by reads.
    """

    def __init__(self, reads_in_flight: int = 1):
        self.reads_in_flight = reads_in_flight
        self._files: dict[str, _File] = {}
        self._expected: dict[str, _State] = {}
        self._last: tuple[int, int] | None = None  # (descriptor, end) of the run last read through the file cache
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="slowft-reader")
        self._helpers = ThreadPoolExecutor(MAX_READS_IN_FLIGHT - 1, thread_name_prefix="slowft-reader-helper")
        # A stretch that is not large, and the pages at its ends, for each request in flight. The one used last is used
        # first: the others take no memory.
        self._bounces: queue.LifoQueue[memoryview] = queue.LifoQueue()
        for _ in range(MAX_READS_IN_FLIGHT):
            self._bounces.put(memoryview(mmap.mmap(-1, LARGE_NBYTES + 2 * platform.DIRECT_ALIGNMENT)))
        self.bytes_read = 0
        self.read_s = self.wait_s = 0.0
        self._close_files = weakref.finalize(self, _close_all, self._files)

    def expect_unchanged(self, files: Iterable[str]) -> None:
        """From now on reading one of these fails if it is not as it is now. Others must stay as they are first read.

        Raises:
            ModelError: there is no such file.
        """
        self._expected.update({file: self._state(file) for file in files})

    def submit(self, ranges: Iterable[ByteRange], buffer: memoryview) -> Future:
        """Start filling `buffer` and return a future that is done when it is full."""
        ranges = list(ranges)
        place = {"file": ranges[0].file, "offset": ranges[0].offset} if ranges else {}
        traced = tracing.spanned(self._read, "read", "read", bytes=sum(r.nbytes for r in ranges), **place)
        return self._thread.submit(traced, ranges, buffer)

    def wait(self, read: Future) -> None:
        """Return when `read` is done.

        Raises:
            ModelError: the file ends early, cannot be read or was changed; names the file and the offset.
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

    def _read(self, ranges: list[ByteRange], buffer: memoryview) -> None:
        begin = time.perf_counter()
        try:
            self._read_runs(ranges, buffer)
        finally:
            self.read_s += time.perf_counter() - begin

    def _read_runs(self, ranges: list[ByteRange], buffer: memoryview) -> None:
        is_large = sum(r.nbytes for r in ranges) >= LARGE_NBYTES
        # neighbours in the file become one request, scattered to their places
        for run in _contiguous_runs(ranges):
            file, nbytes = self._open(run[0].file), sum(r.nbytes for r in run)
            # small ones too where large ones are read directly: the kernel would read ahead of them for nothing
            if not (is_large and self._read_directly(file, run, nbytes, buffer)):
                self._read_through_cache(file, run, nbytes, buffer)
            with self._lock:
                self.bytes_read += nbytes
            self._check_unchanged(file, run[0].offset)

    # --- Directly -----------------------------------------------------------------------------------

    def _read_directly(self, file: _File, run: list[ByteRange], nbytes: int, buffer: memoryview) -> bool:
        """Read a run past the file cache, if its file system and the place in memory allow it. Returns whether."""
        if file.direct_fd is None:
            return False
        try:
            if nbytes < LARGE_NBYTES:
                self._read_by_bounce(file, run[0].offset, _targets(run, buffer))
                return True
            for in_place, ranges in _parts(run, buffer):
                if in_place:
                    at = ranges[0].at
                    self._read_in_place(file, ranges[0].offset, buffer[at : at + sum(r.nbytes for r in ranges)])
                else:
                    self._read_in_bounces(file, ranges[0].offset, _targets(ranges, buffer))
            return True
        except OSError as e:
            if e.errno not in NOT_DIRECT_ERRORS:
                raise
            file.close_direct()
            return False

    def _read_in_place(self, file: _File, offset: int, target: memoryview) -> None:
        """Fill memory that is aligned like the file: whole pages in place, what is left at the ends by bounce."""
        head = -offset % platform.DIRECT_ALIGNMENT
        body = (len(target) - head) // platform.DIRECT_ALIGNMENT * platform.DIRECT_ALIGNMENT
        self._read_by_bounce(file, offset, [target[:head]])
        starts = range(head, head + body, DIRECT_REQUEST_NBYTES)
        requests = [(start, target[start : min(start + DIRECT_REQUEST_NBYTES, head + body)]) for start in starts]
        self._in_flight(
            [partial(_read_aligned, file, offset + start, request, len(request)) for start, request in requests]
        )
        self._read_by_bounce(file, offset + head + body, [target[head + body :]])

    def _read_in_bounces(self, file: _File, offset: int, targets: list[memoryview]) -> None:
        """Fill any memory, `LARGE_NBYTES` at a time. Requests meet on pages of the file, so that none is read twice."""
        requests, at, stop = [], offset, offset + sum(len(target) for target in targets)
        while at < stop:
            end = min(at - at % LARGE_NBYTES + LARGE_NBYTES, stop)
            requests.append(partial(self._read_by_bounce, file, at, _first_nbytes(targets, end - at)))
            targets, at = _without_first_nbytes(targets, end - at), end
        self._in_flight(requests)

    def _in_flight(self, requests: list[Callable[[], None]]) -> None:
        """Make the requests, several at a time, in the order of the list."""
        left = iter(requests)

        def work():
            try:
                for request in left:  # shared by the threads: each takes the next
                    request()
            except BaseException:
                for _ in left:  # the others begin no more
                    pass
                raise

        helpers = [self._helpers.submit(work) for _ in range(min(self.reads_in_flight, len(requests)) - 1)]
        try:
            work()
        finally:
            errors = [helper.exception() for helper in helpers]  # no thread fills the buffer any more
        for error in errors:
            if error is not None:
                raise error

    def _read_by_bounce(self, file: _File, offset: int, targets: list[memoryview]) -> None:
        """Fill targets that are no multiple of pages, `LARGE_NBYTES` in all at most, by way of a page-aligned one."""
        nbytes = sum(len(target) for target in targets)
        if nbytes == 0:
            return
        before = offset % platform.DIRECT_ALIGNMENT
        aligned_nbytes = -(-(before + nbytes) // platform.DIRECT_ALIGNMENT) * platform.DIRECT_ALIGNMENT
        bounce = self._bounces.get()
        try:
            _read_aligned(file, offset - before, bounce[:aligned_nbytes], before + nbytes)
            at = before
            for target in targets:
                target[:] = bounce[at : at + len(target)]
                at += len(target)
        finally:
            self._bounces.put(bounce)

    # --- Through the file cache ---------------------------------------------------------------------

    def _read_through_cache(self, file: _File, run: list[ByteRange], nbytes: int, buffer: memoryview) -> None:
        offset, targets, done = run[0].offset, _targets(run, buffer), 0
        while done < nbytes:
            got = _preadv(file, _first_nbytes(targets, MAX_REQUEST_NBYTES), offset + done)
            if got == 0:
                raise _ends_early(file, offset + done, nbytes - done)
            done += got
            targets = _without_first_nbytes(targets, got)
            # from 0: the page that two runs share goes with the second
            platform.drop_cached(file.fd, 0, offset + done)
            if done == got:
                self._drop_read_ahead(file.fd, offset, nbytes)
        self._last = file.fd, offset + nbytes

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

    # --- Files --------------------------------------------------------------------------------------

    def _open(self, name: str) -> _File:
        with self._lock:
            if name not in self._files:
                try:
                    fd = platform.open_uncached(name)
                    self._files[name] = file = _File(name, fd, None, _State.of(os.fstat(fd)))
                    file.direct_fd = platform.open_direct(name, fd)
                except OSError as e:
                    raise ModelError(f"{name} cannot be opened: {reason_of(e)}") from None
                file.state = self._expected.get(name, file.state)
            return self._files[name]

    def descriptor(self, name: str) -> int:
        """Of the open file that is read under this path, whatever has taken its place since."""
        return self._open(name).fd

    def _state(self, name: str) -> _State:
        try:
            return _State.of(os.stat(name))
        except OSError as e:
            raise ModelError(f"{name} cannot be read: {reason_of(e)}") from None

    def _check_unchanged(self, file: _File, offset: int) -> None:
        """Raises ModelError if what was just read at `offset` may not be what was there at first.

        A file that was only deleted is still there for who has it open.
        """
        now = _State.of(os.fstat(file.fd))
        if now == file.state:
            try:
                now = _State.of(os.stat(file.name))
            except FileNotFoundError:
                return
        if now != file.state:
            if (now.device, now.inode) != (file.state.device, file.state.inode):
                what = "another file was put in its place"
            elif now.nbytes != file.state.nbytes:
                what = f"it had {file.state.nbytes} bytes and has {now.nbytes}"
            else:
                what = "it was written to"
            raise ModelError(
                f"{file.name} was changed while it was in use, seen at byte {offset}: {what}. Open it again"
            )

    def close(self) -> None:
        """Finish the reads under way, end the threads, close the files."""
        self._thread.shutdown(cancel_futures=True)
        self._helpers.shutdown()
        self._close_files()


def _close_all(files: dict[str, _File]) -> None:
    while files:
        _, file = files.popitem()
        file.close_direct()
        os.close(file.fd)


def _preadv(file: _File, targets: list[memoryview], offset: int, is_direct: bool = False) -> int:
    """Bytes read at `offset`, 0 at the end of the file; tried again where that can help.

    Raises:
        ModelError: names file and offset.
        OSError: of `NOT_DIRECT_ERRORS`, from a direct read.
    """
    try:
        return retried(os.preadv, file.direct_fd if is_direct else file.fd, targets, offset)
    except OSError as e:
        if is_direct and e.errno in NOT_DIRECT_ERRORS:
            raise
        raise ModelError(f"{file.name}: reading at byte {offset} failed: {e.strerror}") from None


def _read_aligned(file: _File, offset: int, target: memoryview, nbytes: int) -> None:
    """Fill the first `nbytes` of an aligned target; the file may end between them and the target's end."""
    done = 0
    while done < nbytes:
        got = _preadv(file, [target[done:]], offset + done, is_direct=True)
        if done + got < nbytes and got < platform.DIRECT_ALIGNMENT:
            raise _ends_early(file, offset + done + got, nbytes - done - got)
        done += got if done + got >= nbytes else got // platform.DIRECT_ALIGNMENT * platform.DIRECT_ALIGNMENT


def _ends_early(file: _File, end: int, missing: int) -> ModelError:
    return ModelError(f"{file.name} ends at byte {end}, {missing} bytes early: was it changed?")


def _parts(run: list[ByteRange], buffer: memoryview) -> list[tuple[bool, list[ByteRange]]]:
    """A run of ranges, cut into what a drive can put in place and what goes elsewhere.

    In place goes what is large and lies in memory in one stretch that is aligned like its stretch of the file.
    """
    address = np.frombuffer(buffer, np.uint8).ctypes.data
    parts: list[tuple[bool, list[ByteRange]]] = []
    for skew, group in groupby((r for r in run if r.nbytes), key=lambda r: r.at - r.offset):
        stretch = list(group)
        is_aligned = (address + skew) % platform.DIRECT_ALIGNMENT == 0
        in_place = is_aligned and sum(r.nbytes for r in stretch) >= LARGE_NBYTES
        if parts and not in_place and not parts[-1][0]:
            parts[-1][1].extend(stretch)
        else:
            parts.append((in_place, stretch))
    return parts


def _targets(run: list[ByteRange], buffer: memoryview) -> list[memoryview]:
    return [buffer[r.at : r.at + r.nbytes] for r in run if r.nbytes]


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
