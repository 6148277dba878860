"""Stores arrays on disk by key, for later processes too: written while blocks compute, checked by hash when read.

Comes in: keys (hex digests of whatever determines the values) and evaluated arrays. Goes out: the same arrays, or None.
An array that is damaged, cut short or gone counts as never stored. This file knows nothing of models, never raises for
a disk that is full or fails, and leaves nothing in the file cache, which a memory limit counts.
"""

import json
import os
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import mlx.core as mx

from .. import platform
from ..errors import ConfigError, SlowftError, reason_of
from .fingerprint import of_arrays
from .transfers import free_nbytes, read_all, write_all

SUFFIX = ".activation"
HEADER_NBYTES = 4096  # JSON, padded; the array's bytes follow
ABANDONED_S = 3600  # a temporary file older than this belongs to no process that still writes it
FREE_DISK_SHARE = 0.25  # the share of the free disk to use if no limit is given


class ActivationCache:
    """One file per array in `directory`, at most `limit_nbytes` of them together.

    A file is written under a temporary name and renamed, so it is whole or does not exist. Only after a power cut it
    may be neither, which its hash shows. Files that this object has not used make room for new ones, the longest unused
    first. When there are no more of those, new arrays are not stored.

    Attributes:
        nbytes: bytes of all files.
        bytes_read, bytes_written: bytes so far.
        read_wait_s, write_wait_s: seconds that callers of `read` and of `write` waited.
        problem: why arrays are not stored any more, as one line; None as long as they are.

    Args:
        limit_nbytes: None for a quarter of what is free on the disk, files of earlier runs included.

    Raises:
        ConfigError: the directory is in memory.
        SlowftError: the directory cannot be used.
    """

    def __init__(self, directory: Path, limit_nbytes: int | None = None):
        self.directory = directory
        self.bytes_read = self.bytes_written = 0
        self.read_wait_s = self.write_wait_s = 0.0
        self.problem: str | None = None
        self._used: set[str] = set()
        self._pending: Future | None = None
        try:
            self._sizes = self._open()  # file name -> bytes, the longest unused first
            self.limit_nbytes = limit_nbytes if limit_nbytes is not None else self.usual_limit(directory)
        except OSError as e:
            raise SlowftError(
                f"--activation-cache {directory} cannot be used: {reason_of(e)}. Choose another"
            ) from None
        self.nbytes = sum(self._sizes.values())
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="slowft-activation-cache")

    @staticmethod
    def usual_limit(directory: Path) -> int:
        """The default limit, in bytes: a quarter of the free disk and of what is stored there already."""
        stored_nbytes = sum(size for _, _, size in _entries(directory))
        return int(FREE_DISK_SHARE * (free_nbytes(directory) + stored_nbytes))

    def read(self, key: str) -> mx.array | None:
        """The array stored under `key`, made by the calling thread; None if there is no whole one."""
        name, begin = key + SUFFIX, time.perf_counter()
        self._finish_writing()
        try:
            array = self._read(key)
            if array is None:  # damaged
                (self.directory / name).unlink()
            else:
                os.utime(self.directory / name)
        except OSError:
            array = None
        finally:
            self.read_wait_s += time.perf_counter() - begin
        self._count(name, 0 if array is None else HEADER_NBYTES + array.nbytes)
        if array is not None:
            self._used.add(name)
        return array

    def write(self, key: str, array: mx.array) -> None:
        """Start storing an evaluated array. Its bytes must not change before the next call of `read` or `write`."""
        name, nbytes, begin = key + SUFFIX, HEADER_NBYTES + array.nbytes, time.perf_counter()
        self._finish_writing()
        self.write_wait_s += time.perf_counter() - begin
        if self.problem is None and name not in self._sizes and self._make_room(nbytes):
            self._count(name, nbytes)
            self._used.add(name)
            facts = {"key": key, "dtype": str(array.dtype).removeprefix("mlx.core."), "shape": list(array.shape)}
            data = memoryview(array.reshape(-1).view(mx.uint8))
            self._pending = self._thread.submit(self._write, name, facts, data)

    def close(self) -> None:
        self._finish_writing()
        self._thread.shutdown()

    def _open(self) -> dict[str, int]:
        self.directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=self.directory):
            pass
        for path in self.directory.glob(f"*{SUFFIX}.tmp"):
            if time.time() - path.stat().st_mtime > ABANDONED_S:
                path.unlink()
        if platform.is_memory_filesystem(self.directory):
            raise ConfigError(
                f"--activation-cache {self.directory} is in memory. Choose a directory on a disk, such as "
                f"{platform.cache_directory()}"
            )
        return {name: size for _, name, size in sorted(_entries(self.directory))}

    def _count(self, name: str, nbytes: int) -> None:
        """Note that a file takes `nbytes`; 0 if it does not exist."""
        self.nbytes += nbytes - self._sizes.pop(name, 0)
        if nbytes:
            self._sizes[name] = nbytes

    def _make_room(self, nbytes: int) -> bool:
        """Remove files that this run has not used until `nbytes` more fit. If they never do, `problem` says so."""
        if self.nbytes + nbytes <= self.limit_nbytes:
            return True
        for name in [name for name in self._sizes if name not in self._used]:
            with suppress(OSError):
                (self.directory / name).unlink()
            self._count(name, 0)
            if self.nbytes + nbytes <= self.limit_nbytes:
                return True
        self.problem = (
            f"the activation cache in {self.directory} is full ({self.nbytes / 1e6:,.0f} of "
            f"{self.limit_nbytes / 1e6:,.0f} MB). Activations that are not in it are computed in every epoch. To fix "
            "it: a larger --activation-cache-size"
        )
        return False

    def _finish_writing(self) -> None:
        if self._pending is not None:
            name, error = self._pending.result()
            self._pending = None
            if error is not None:
                self._count(name, 0)
                self._used.discard(name)
                self.problem = (
                    f"{self.directory}: storing activations failed ({error}). Those that are not stored yet are "
                    "computed in every epoch. To fix it: room on that disk, or another --activation-cache"
                )

    def _write(self, name: str, facts: dict, data: memoryview) -> tuple[str, str | None]:
        """(name, what went wrong; None if nothing did)"""
        temporary = None
        try:
            header = json.dumps({**facts, "sha256": of_arrays([*facts.values()], [data])}).encode().ljust(HEADER_NBYTES)
            with tempfile.NamedTemporaryFile(
                dir=self.directory, prefix=name.split(".")[0][:16], suffix=f"{SUFFIX}.tmp", delete=False, buffering=0
            ) as file:
                temporary = Path(file.name)
                write_all(file.fileno(), memoryview(header), 0)
                write_all(file.fileno(), data, HEADER_NBYTES)
            os.replace(temporary, self.directory / name)
        except OSError as e:
            if temporary is not None:
                temporary.unlink(missing_ok=True)
            return name, e.strerror or str(e)
        self.bytes_written += HEADER_NBYTES + len(data)
        return name, None

    def _read(self, key: str) -> mx.array | None:
        with open(self.directory / (key + SUFFIX), "rb", buffering=0) as file:
            fd, size = file.fileno(), os.fstat(file.fileno()).st_size
            header = bytearray(HEADER_NBYTES)
            try:
                if read_all(fd, memoryview(header), 0) < HEADER_NBYTES:
                    return None
                stored = json.loads(header)
                facts = {"key": key, "dtype": stored["dtype"], "shape": stored["shape"]}
                buffer = mx.zeros((size - HEADER_NBYTES,), mx.uint8)
                mx.eval(buffer)
                data = memoryview(buffer)
                if read_all(fd, data, HEADER_NBYTES) < len(data):
                    return None
                if of_arrays([*facts.values()], [data]) != stored["sha256"]:
                    return None
                self.bytes_read += size
                return buffer.view(getattr(mx, facts["dtype"])).reshape(facts["shape"])
            except (ValueError, KeyError, TypeError):
                return None


def _entries(directory: Path) -> list[tuple[float, str, int]]:
    """(last use, name, bytes) of every activation file in the directory."""
    entries = []
    if directory.exists():
        for entry in os.scandir(directory):
            if entry.name.endswith(SUFFIX):
                try:
                    stat = entry.stat()
                except FileNotFoundError:  # another run removed it
                    continue
                entries.append((stat.st_mtime, entry.name, stat.st_size))
    return entries
