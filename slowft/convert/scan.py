"""Reads segments of files once, past the file cache, and has several threads hash them or look for NaN.

Comes in: `Segment`s, and a consumer for the bytes of each. Goes out: a result for each, or the error that reading it
raised. Each thread holds two pieces in memory, however large the segments are.
"""

import hashlib
import mmap
import queue
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from .. import platform
from ..errors import ModelError
from ..weights.reader import ByteRange, Reader

PIECE_NBYTES = 8 << 20
# SHA-256 runs at 1.3 GB/s a core where the processor has instructions for it, else at 0.4. A drive reads 2 to 7 GB/s.
THREADS = min(platform.cores(), 8)

EXPONENTS = {"bfloat16": (np.uint16, 0x7F80), "float16": (np.uint16, 0x7C00), "float32": (np.uint32, 0x7F800000)}


@dataclass(frozen=True)
class Segment:
    """`nbytes` bytes of `file` from `offset`."""

    file: str
    offset: int
    nbytes: int


class Consumer(Protocol):
    """Takes a segment's bytes in order, some at a time. `result` is called after the last."""

    def update(self, data: memoryview) -> None: ...

    def result(self) -> Any: ...


class Sha256:
    """The result is the digest in hexadecimal."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def update(self, data: memoryview) -> None:
        self._hash.update(data)

    def result(self) -> str:
        return self._hash.hexdigest()


class NotFinite:
    """The result is the index of the first NaN or infinity among floats of `dtype`; None if there is none."""

    def __init__(self, dtype: str) -> None:
        self._unsigned, self._exponent = EXPONENTS[dtype]
        self._seen, self._first = 0, None
        self._masked = np.empty(0, self._unsigned)

    def update(self, data: memoryview) -> None:
        if self._first is None:
            bits = np.frombuffer(data, self._unsigned)
            if len(self._masked) < len(bits):
                self._masked = np.empty(len(bits), self._unsigned)
            masked = np.bitwise_and(bits, self._unsigned(self._exponent), out=self._masked[: len(bits)])
            if masked.max(initial=0) == self._exponent:
                self._first = self._seen + int(np.argmax(masked == self._exponent))
            self._seen += len(bits)

    def result(self) -> int | None:
        return self._first


def scan(
    segments: Sequence[Segment],
    consumers: Iterable[Consumer],
    progress: Callable[[int], None] | None = None,
) -> list[Any]:
    """Read every segment and give its bytes to its consumer.

    Args:
        progress: is called with the number of bytes of each piece that is done, from any thread, one call at a time.
    Returns:
        For each segment, its consumer's result, or the ModelError that reading it raised.
    """
    reader, lock = Reader(), threading.Lock()
    free: queue.SimpleQueue[list[memoryview]] = queue.SimpleQueue()
    for _ in range(THREADS):
        free.put([memoryview(mmap.mmap(-1, PIECE_NBYTES + platform.DIRECT_ALIGNMENT)) for _ in range(2)])

    def work(segment: Segment, consumer: Consumer) -> Any:
        buffers = free.get()
        try:
            for piece in _pieces(reader, segment, buffers):
                consumer.update(piece)
                if progress is not None:
                    with lock:
                        progress(len(piece))
            return consumer.result()
        except ModelError as e:
            return e
        finally:
            free.put(buffers)

    pool = ThreadPoolExecutor(THREADS, thread_name_prefix="slowft-scan")
    try:
        return list(pool.map(work, segments, consumers))
    finally:
        pool.shutdown(cancel_futures=True)
        reader.close()


def _pieces(reader: Reader, segment: Segment, buffers: list[memoryview]):
    """The segment's bytes in order. The next piece is read while the caller has this one."""
    starts = range(0, segment.nbytes, PIECE_NBYTES)

    def start(i: int):
        offset = segment.offset + starts[i]
        nbytes = min(PIECE_NBYTES, segment.nbytes - starts[i])
        at = offset % platform.DIRECT_ALIGNMENT
        buffer = buffers[i % 2]
        return reader.submit([ByteRange(segment.file, offset, nbytes, at)], buffer), buffer[at : at + nbytes]

    ahead = start(0) if starts else None  # (the read, the piece)
    try:
        for i in range(len(starts)):
            (read, piece), ahead = ahead, None
            reader.wait(read)
            if i + 1 < len(starts):
                ahead = start(i + 1)
            yield piece
    finally:
        if ahead is not None:  # waits: nothing may fill the buffer once it belongs to another segment
            ahead[0].exception()
