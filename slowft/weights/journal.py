"""What is finished of a long computation, on disk: pieces by name, each whole or as if it had never been written.

Comes in: a key that says which computation it is, names, evaluated arrays. Goes out: the same arrays, laid out as they
were, to another process too. Written behind compute by one thread, a piece at a time, past the file cache. Never
raises for a disk that is full or fails: `problem` says it, and nothing more is written.
"""

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx

from .. import platform
from ..errors import SlowftError, reason_of
from .transfers import opened, read_all, write_all


class Journal:
    """Pieces in `directory`, a file each.

    Attributes:
        bytes_written: so far.
        wait_s: seconds that callers of `write` were held up.
        problem: why nothing is written any more, as one line; None as long as it is.
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
        """Whether there are pieces, of whatever."""
        return next(self.directory.glob("*"), None) is not None

    def begin(self, key: str) -> None:
        """A computation begins; what has another key is as if it were not there, and is written over."""
        self._key = key

    def write(self, name: str, arrays: Sequence[mx.array], drop: Sequence[str] = ()) -> None:
        """Start writing a piece. It is held until the next call, which waits for it.

        Args:
            drop: pieces that are of no use once this one is on the drive.
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
        """The arrays of a piece, arrays of the calling thread; None if there is none that is whole."""
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
        """Remove everything: what it was for is done."""
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
        self.clear()  # on a full disk, room for the checkpoints

    def _write(self, name: str, packed: list[tuple[list, memoryview]], drop: Sequence[str]) -> None:
        facts, data = [fact for fact, _ in packed], [bytes_ for _, bytes_ in packed]
        header = {"key": self._key, "arrays": facts, "sha256": _hash(self._key, name, facts, data)}
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

    MLX multiplies rows and columns by different routines, whose last bits differ: so the layout has to come back too.

    Raises:
        OSError: it has gaps, which no block puts out as far as we know.
    """
    strides = [stride // array.itemsize for stride in memoryview(array).strides]
    axes = sorted(range(array.ndim), key=lambda axis: -strides[axis])
    along = mx.transpose(array, axes, stream=mx.cpu)  # not on a GPU, after all that it was handed since
    mx.eval(along)
    if not memoryview(along).c_contiguous:
        raise OSError(f"an array of shape {array.shape} has gaps in memory")
    bytes_ = mx.view(mx.reshape(along, (-1,), stream=mx.cpu), mx.uint8, stream=mx.cpu)
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
    if at != size or _hash(key, name, header["arrays"], data) != header["sha256"]:
        return None
    mx.eval(arrays)
    return arrays


def _hash(key: str, name: str, facts: list, data: Iterable[memoryview]) -> str:
    digest = hashlib.sha256(json.dumps([key, name, facts]).encode())
    for part in data:
        digest.update(part)
    return digest.hexdigest()
