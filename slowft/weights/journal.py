"""Keeps the finished pieces of a long computation on disk, by name. A piece that is not whole counts as never written.

Comes in: a key that says which computation it is, names, evaluated arrays. Goes out: the same arrays with the same
memory layout, in this process or a later one. One thread writes one piece at a time, past the file cache, while the
computation goes on. A disk that is full or fails raises nothing: `problem` says it, and no more is written.
"""

import json
import math
import os
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx

from .. import platform
from ..errors import SlowftError, reason_of
from .fingerprint import of_arrays
from .transfers import opened, read_all, write_all


class Journal:
    """Pieces in `directory`, a file each.

    Attributes:
        bytes_written: bytes so far.
        wait_s: seconds that callers of `write` waited.
        problem: why nothing is written any more, as one line; None as long as pieces are written.
    """

    def __init__(self, directory: Path):
        self.directory, self._key = directory, ""
        self.bytes_written = 0
        self.wait_s = 0.0
        self.problem: str | None = None
        self._pending: Future | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="slowft-journal")

    @property
    def is_there(self) -> bool:
        """Whether there are pieces, of any computation."""
        return next(self.directory.glob("*"), None) is not None

    def begin(self, key: str) -> None:
        """A computation begins. Pieces with another key count as absent, and are overwritten."""
        self._key = key

    def write(self, name: str, arrays: Sequence[mx.array], drop: Sequence[str] = ()) -> None:
        """Start writing a piece. Its arrays stay in memory until the next call, which waits for the write.

        Args:
            drop: names of pieces that are of no use once this one is on the drive.
        """
        begin = time.perf_counter()
        self.finish_writing()
        self.wait_s += time.perf_counter() - begin
        if self.problem is None:
            try:
                self._pending = self._thread.submit(self._write, name, [_packed(array) for array in arrays], drop)
            except OSError as e:
                self._fail(e)

    def read(self, name: str) -> list[mx.array] | None:
        """The arrays of a piece, made by the calling thread; None if there is no whole one."""
        self.finish_writing()
        try:
            with opened(self.directory / name) as fd:
                return _read(fd, self._key, name)
        except (SlowftError, OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def finish_writing(self) -> None:
        if self._pending is not None:
            pending, self._pending = self._pending, None
            try:
                pending.result()
            except OSError as e:
                self._fail(e)

    def clear(self) -> None:
        """Remove all pieces: the computation is done."""
        self.finish_writing()
        shutil.rmtree(self.directory, ignore_errors=True)

    def close(self) -> None:
        self.finish_writing()
        self._thread.shutdown()

    def _fail(self, error: OSError) -> None:
        self.problem = (
            f"{self.directory}: writing finished blocks failed ({reason_of(error)}). The run goes on without; after a "
            "kill, the step under way begins anew"
        )
        self.clear()  # makes room for checkpoints on a full disk

    def _write(self, name: str, packed: list[tuple[list, memoryview]], drop: Sequence[str]) -> None:
        facts, data = [fact for fact, _ in packed], [bytes_ for _, bytes_ in packed]
        header = {"key": self._key, "arrays": facts, "sha256": of_arrays([self._key, name, facts], data)}
        header = json.dumps(header).encode()
        self.directory.mkdir(parents=True, exist_ok=True)
        fd = os.open(self.directory / name, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            platform.skip_file_cache(fd)
            at = 0
            for part in (memoryview(len(header).to_bytes(8, "little") + header), *data):
                write_all(fd, part, at)
                at += len(part)
            platform.sync_file(fd)
        finally:
            os.close(fd)
        self.bytes_written += at
        for other in drop:
            (self.directory / other).unlink(missing_ok=True)


def _packed(array: mx.array) -> tuple[list, memoryview]:
    """([dtype, shape, strides], the bytes of an evaluated array in the order in which they lie in memory).

    The strides are kept because MLX multiplies rows and columns by different routines, whose last bits differ.

    Raises:
        OSError: the array has gaps in memory. As far as we know, no block's output has.
    """
    strides = [stride // array.itemsize for stride in memoryview(array).strides]
    axes = sorted(range(array.ndim), key=lambda axis: -strides[axis])
    in_memory_order = mx.transpose(array, axes, stream=mx.cpu)  # a GPU would first do all that it was handed since
    mx.eval(in_memory_order)
    if not memoryview(in_memory_order).c_contiguous:
        raise OSError(f"an array of shape {array.shape} has gaps in memory")
    bytes_ = mx.view(mx.reshape(in_memory_order, (-1,), stream=mx.cpu), mx.uint8, stream=mx.cpu)
    mx.eval(bytes_)
    return [str(array.dtype).removeprefix("mlx.core."), list(array.shape), strides], memoryview(bytes_)


def _read(fd: int, key: str, name: str) -> list[mx.array] | None:
    size = os.fstat(fd).st_size
    at = 8 + int.from_bytes(os.pread(fd, 8, 0), "little")
    if at > size:
        return None
    header = json.loads(os.pread(fd, at - 8, 8))
    if header["key"] != key:
        return None
    arrays, data = [], []
    for dtype, shape, strides in header["arrays"]:
        nbytes = math.prod(shape) * getattr(mx, dtype).size
        if not 0 <= nbytes <= size - at:
            return None
        buffer = mx.zeros((nbytes,), mx.uint8)
        mx.eval(buffer)
        data.append(memoryview(buffer))
        if read_all(fd, data[-1], at) < nbytes:
            return None
        at += nbytes
        flat = buffer.view(getattr(mx, dtype))
        arrays.append(mx.as_strided(flat, shape, strides) if shape else flat.reshape(()))
    if at != size or of_arrays([key, name, header["arrays"]], data) != header["sha256"]:
        return None
    mx.eval(arrays)
    return arrays
