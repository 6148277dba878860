"""Reads ranges of files into buffers, on its own threads, past the file cache.

Comes in: byte ranges and a writable memoryview. Goes out: the filled buffer, or an error that names file and offset.
The reader only fills bytes: MLX arrays belong to the thread that computes, and are never made here.

There are three ways to read.

- In place: directly (Linux's O_DIRECT, macOS's F_NOCACHE), `reads_in_flight` requests at a time, where a stretch of a
  file goes to one stretch of memory that is aligned like it. `buffers` and `sources.Layout` align whatever is large.
  The file cache is not touched and nothing is copied.
- By bounce: whole pages are read directly into the reader's own memory and copied from there. This is for few bytes,
  for the ends of a stretch, and for every stretch that is not aligned.
- Through the file cache, on file systems without direct reads: one request at a time, and its pages dropped after it.
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

# Bytes of one request through the file cache. There, a memory limit counts them until they are dropped: runs of 88 MB
# read in one request held 101 MB there, and 134 MB backwards. Requests of 2 MB held 17 MB, which is twice this disk's
# read-ahead of 8 MB (128 KB on most laptops). Median throughput forward / backward: 2.3 / 1.9 GB/s at 2 MB, 2.5 / 1.8
# at 4 MB, 2.4 / 1.9 in one request. At 1 MB it falls to a third and the cache fills, because a drop spares the kernel's
# large pages that it covers only in part. macOS comes here only with a few bytes, and refuses one read of 2 GiB.
MAX_REQUEST_NBYTES = 2 << 20
# Bytes of one direct request. On huge pages, one at a time: 1.9 GB/s at 2 MB, 2.1 at 8 MB; four at a time: 2.2 and 2.3.
DIRECT_REQUEST_NBYTES = 8 << 20
MAX_READS_IN_FLIGHT = 8

NOT_DIRECT_ERRORS = (errno.EINVAL, errno.EFAULT)  # from a file system that opens files for direct reads but has none


@dataclass(frozen=True)
class ByteRange:
    """`nbytes` bytes of `file` from `offset`, which go to `at` in the destination buffer."""

    file: str
    offset: int
    nbytes: int
    at: int


@dataclass(frozen=True)
class _State:
    """What differs after somebody wrote to a file or put another one in its place.

    The time of the last change (ctime), which `fingerprint.identities` compares between runs, is left out: adding or
    removing a name of an open file changes it too.
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
    """Reads lists of byte ranges, one after the other, in the order of the calls.

    Attributes:
        reads_in_flight: requests that a direct read has under way at once, 1 to `MAX_READS_IN_FLIGHT`. It may be
            changed at any time.
        bytes_read: bytes read so far.
        read_s: seconds that the drive was busy with them.
        wait_s: seconds that callers of `wait` and `read_now` waited for reads.
    """

    def __init__(self, reads_in_flight: int = 1):
        self.reads_in_flight = reads_in_flight
        self._files: dict[str, _File] = {}
        self._expected: dict[str, _State] = {}
        self._previous_end: tuple[int, int] | None = None  # (descriptor, end) of the last run through the file cache
        self._fills_in_place = True  # until the system refuses
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="slowft-reader")
        self._helpers = ThreadPoolExecutor(MAX_READS_IN_FLIGHT - 1, thread_name_prefix="slowft-reader-helper")
        # One for each request in flight, with room for a stretch that is not large and for the pages at its ends. The
        # one used last is used first, so the others take no memory.
        self._bounces: queue.LifoQueue[memoryview] = queue.LifoQueue()
        for _ in range(MAX_READS_IN_FLIGHT):
            self._bounces.put(memoryview(mmap.mmap(-1, LARGE_NBYTES + 2 * platform.DIRECT_ALIGNMENT)))
        self.bytes_read = 0
        self.read_s = self.wait_s = 0.0
        self._close_files = weakref.finalize(self, _close_all, self._files)

    def expect_unchanged(self, files: Iterable[str]) -> None:
        """From now on reading one of these files fails if it has changed. Other files must stay as at their first read.

        Raises:
            ModelError: a file does not exist.
        """
        self._expected.update({file: self._state(file) for file in files})

    def submit(self, ranges: Iterable[ByteRange], buffer: memoryview) -> Future:
        """Start filling `buffer`. The future returned is done when it is full."""
        ranges = list(ranges)
        place = {"file": ranges[0].file, "offset": ranges[0].offset} if ranges else {}
        traced = tracing.spanned(self._read, "read", "read", bytes=sum(r.nbytes for r in ranges), **place)
        return self._thread.submit(traced, ranges, buffer)

    def wait(self, read: Future) -> None:
        """Return when `read` is done.

        Raises:
            ModelError: the file ends early, cannot be read or was changed. It names the file and the offset.
        """
        begin = time.perf_counter()
        try:
            with tracing.span("wait", "read"):
                read.result()
        finally:
            self.wait_s += time.perf_counter() - begin

    def read_now(self, ranges: Iterable[ByteRange], buffer: memoryview) -> None:
        """Fill `buffer` and return. What was submitted earlier is read first."""
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
            # beside large runs, small ones are read directly too: the kernel would read ahead of them for nothing
            if not (is_large and self._read_directly(file, run, nbytes, buffer)):
                self._read_through_cache(file, run, nbytes, buffer)
            with self._lock:
                self.bytes_read += nbytes
            self._check_unchanged(file, run[0].offset)

    # --- Directly -----------------------------------------------------------------------------------

    def _read_directly(self, file: _File, run: list[ByteRange], nbytes: int, buffer: memoryview) -> bool:
        """Read a run past the file cache. Returns False if its file system or the place in memory does not allow it."""
        if file.direct_fd is None:
            return False
        try:
            if nbytes < LARGE_NBYTES:
                self._read_by_bounce(file, run[0].offset, _targets(run, buffer))
                return True
            for in_place, ranges in _parts(run, buffer):
                offset, at = ranges[0].offset, ranges[0].at
                if in_place and self._fills_in_place:
                    try:
                        self._read_in_place(file, offset, buffer[at : at + sum(r.nbytes for r in ranges)])
                        continue
                    except OSError as e:
                        if e.errno != errno.EFAULT:
                            raise
                        self._fills_in_place = False  # the drive cannot write to this memory, as a GPU's may be
                self._read_in_bounces(file, offset, _targets(ranges, buffer))
            return True
        except OSError as e:
            if e.errno not in NOT_DIRECT_ERRORS:
                raise
            file.close_direct()
            return False

    def _read_in_place(self, file: _File, offset: int, target: memoryview) -> None:
        """Fill memory that is aligned like the file: whole pages in place, the two ends by bounce."""
        head = -offset % platform.DIRECT_ALIGNMENT
        body = (len(target) - head) // platform.DIRECT_ALIGNMENT * platform.DIRECT_ALIGNMENT
        self._read_by_bounce(file, offset, [target[:head]])
        starts = range(head, head + body, DIRECT_REQUEST_NBYTES)
        requests = [(start, target[start : min(start + DIRECT_REQUEST_NBYTES, head + body)]) for start in starts]
        self._run_in_flight(
            [partial(_read_aligned, file, offset + start, request, len(request)) for start, request in requests]
        )
        self._read_by_bounce(file, offset + head + body, [target[head + body :]])

    def _read_in_bounces(self, file: _File, offset: int, targets: list[memoryview]) -> None:
        """Fill memory of any alignment, `LARGE_NBYTES` at a time.

        Requests begin and end on pages of the file, so that no page is read twice.
        """
        requests, begin, stop = [], offset, offset + sum(len(target) for target in targets)
        while begin < stop:
            end = min(begin - begin % LARGE_NBYTES + LARGE_NBYTES, stop)
            requests.append(partial(self._read_by_bounce, file, begin, _first_nbytes(targets, end - begin)))
            targets, begin = _without_first_nbytes(targets, end - begin), end
        self._run_in_flight(requests)

    def _run_in_flight(self, requests: list[Callable[[], None]]) -> None:
        """Run the requests, `reads_in_flight` at a time, in the order of the list."""
        remaining = iter(requests)

        def work():
            try:
                for request in remaining:  # the threads share this iterator: each takes the next request
                    request()
            except BaseException:
                for _ in remaining:  # leaves no request for the other threads
                    pass
                raise

        helpers = [self._helpers.submit(work) for _ in range(min(self.reads_in_flight, len(requests)) - 1)]
        try:
            work()
        finally:
            errors = [helper.exception() for helper in helpers]  # waits until no thread fills the buffer any more
        for error in errors:
            if error is not None:
                raise error

    def _read_by_bounce(self, file: _File, offset: int, targets: list[memoryview]) -> None:
        """Fill targets of at most `LARGE_NBYTES` together from whole pages, which are read to page-aligned memory."""
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
                source = np.frombuffer(bounce[at : at + len(target)], np.uint8)
                np.copyto(np.frombuffer(target, np.uint8), source)  # which lets other threads run, as `[:] =` does not
                at += len(target)
        finally:
            self._bounces.put(bounce)

    # --- Through the file cache ---------------------------------------------------------------------

    def _read_through_cache(self, file: _File, run: list[ByteRange], nbytes: int, buffer: memoryview) -> None:
        offset, targets, done = run[0].offset, _targets(run, buffer), 0
        while done < nbytes:
            n_read = _preadv(file, _first_nbytes(targets, MAX_REQUEST_NBYTES), offset + done)
            if n_read == 0:
                raise _ends_early(file, offset + done, nbytes - done)
            done += n_read
            targets = _without_first_nbytes(targets, n_read)
            # from 0 on, because the page that two runs share can be dropped only after the second
            platform.drop_cached(file.fd, 0, offset + done)
            if done == n_read:  # not sooner: pages that are still being read stay
                self._drop_read_ahead(file.fd, offset, nbytes)
        self._previous_end = file.fd, offset + nbytes

    def _drop_read_ahead(self, fd: int, offset: int, nbytes: int) -> None:
        """Drop what the kernel read past the end of the run before this one, unless this one goes on from there.

        The kernel reads ahead as far as its window. When blocks are visited backwards, that piles up in the file
        cache: 8 MB a block, measured. (POSIX_FADV_RANDOM would prevent it and halve the throughput: 1.1 for 2.2 GB/s.)
        """
        if self._previous_end is None or self._previous_end == (fd, offset):
            return
        if self._previous_end[0] != fd:
            platform.drop_cached(self._previous_end[0], 0, 0)
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
        """The descriptor of the file that is read under this path, even if another file has taken its place since."""
        return self._open(name).fd

    def is_direct(self, name: str) -> bool:
        """Whether large ranges of this file are read past the file cache; no more once its file system refused."""
        return self._open(name).direct_fd is not None

    def _state(self, name: str) -> _State:
        try:
            return _State.of(os.stat(name))
        except OSError as e:
            raise ModelError(f"{name} cannot be read: {reason_of(e)}") from None

    def _check_unchanged(self, file: _File, offset: int) -> None:
        """Raises ModelError if what was just read at `offset` may not be what was there at first.

        A file that was only deleted can still be read by whoever has it open.
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
        """Finish the reads under way, end the threads, and close the files."""
        self._thread.shutdown(cancel_futures=True)
        self._helpers.shutdown()
        self._close_files()


def _close_all(files: dict[str, _File]) -> None:
    while files:
        _, file = files.popitem()
        file.close_direct()
        os.close(file.fd)


def _preadv(file: _File, targets: list[memoryview], offset: int, is_direct: bool = False) -> int:
    """Fill the targets from `offset`, once more where that can help. Returns how many bytes; 0 at the end of the file.

    Raises:
        ModelError: the read failed. It names file and offset.
        OSError: a direct read failed with one of `NOT_DIRECT_ERRORS`.
    """
    try:
        return retried(os.preadv, file.direct_fd if is_direct else file.fd, targets, offset)
    except OSError as e:
        if is_direct and e.errno in NOT_DIRECT_ERRORS:
            raise
        raise ModelError(f"{file.name}: reading at byte {offset} failed: {e.strerror}") from None


def _read_aligned(file: _File, offset: int, target: memoryview, nbytes: int) -> None:
    """Fill at least the first `nbytes` of an aligned target. The file may end before the rest of the target is full."""
    done = 0
    while done < nbytes:
        n_read = _preadv(file, [target[done:]], offset + done, is_direct=True)
        if done + n_read < nbytes and n_read < platform.DIRECT_ALIGNMENT:
            raise _ends_early(file, offset + done + n_read, nbytes - done - n_read)
        done += n_read if done + n_read >= nbytes else n_read // platform.DIRECT_ALIGNMENT * platform.DIRECT_ALIGNMENT


def _ends_early(file: _File, end: int, missing: int) -> ModelError:
    return ModelError(f"{file.name} ends at byte {end}, {missing} bytes early: was it changed?")


def _parts(run: list[ByteRange], buffer: memoryview) -> list[tuple[bool, list[ByteRange]]]:
    """Split a run of ranges into parts: (whether the drive can put the part in place, its ranges).

    It can where a part is large and lies in one stretch of memory that is aligned like its stretch of the file.
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
    """The rest of a scatter list after `nbytes` bytes: a read may stop anywhere."""
    rest = []
    for target in targets:
        filled = min(nbytes, len(target))
        nbytes -= filled
        if filled < len(target):
            rest.append(target[filled:])
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
