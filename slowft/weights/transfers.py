"""Writes and reads stretches of a file one request at a time, and tries a request again where that can help.

Comes in: a descriptor, an offset, bytes or room for them. Goes out: all bytes, or an error that knows its offset. No
more than one request is left in the file cache, which a memory limit counts.
"""

import errno
import io
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .. import platform
from ..errors import ConfigError, ModelError, SlowftError, reason_of

# Bytes in the file cache at a time. Writing, measured on ext4: 2.3 GB/s at 4 MB, 2.1 at 2, 2.2 at 16. Reading back
# includes fresh pages: 0.8 GB/s, with the kernel's read-ahead or without.
REQUEST_NBYTES = 4 << 20

RETRIED_ERRORS = (errno.EIO, errno.EINTR, errno.EAGAIN)  # these may not come again: a loose cable, a busy bus
RETRY_AFTER_S = (0.02, 0.2, 1.0)


class RequestError(OSError):
    """A request failed, and trying again did not help or is of no use.

    Attributes:
        offset: where in the file the request could not read or write.
    """

    def __init__(self, error: OSError, offset: int):
        super().__init__(error.errno, error.strerror)
        self.offset = offset


def retried(request: Callable[..., Any], *args) -> Any:
    """Returns `request(*args)`, which is tried again where that can help.

    Raises:
        OSError: the error of the last try.
    """
    for pause in RETRY_AFTER_S:
        try:
            return request(*args)
        except OSError as e:
            if e.errno not in RETRIED_ERRORS:
                raise
            time.sleep(pause)
    return request(*args)


def write_all(fd: int, data: memoryview, offset: int) -> None:
    """Write the bytes of `data` at `offset`. They have left the file cache when this returns.

    Raises:
        RequestError: they could not be written.
    """
    done = 0
    while done < len(data):
        try:
            written = retried(_write, fd, data[done : done + REQUEST_NBYTES], offset + done)
            if written == 0:
                raise OSError(errno.EIO, "nothing was written")
        except OSError as e:
            raise RequestError(e, offset + done) from None
        platform.drop_cached(fd, 0, 0)
        done += written


def append_all(file: io.RawIOBase, data: bytes) -> None:
    """Write all of `data` at the position of an unbuffered file, as one call of its `write` may write only a part.

    Raises:
        OSError: the data could not be written.
    """
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


def read_all(fd: int, target: memoryview, offset: int, drop: bool = True) -> int:
    """Fill `target` from `offset`. Returns how many bytes were read: fewer than asked only if the file ends before.

    Args:
        drop: whether to drop them from the file cache.
    Raises:
        RequestError: they could not be read.
    """
    done = 0
    while done < len(target):
        try:
            n_read = retried(os.preadv, fd, [target[done : done + REQUEST_NBYTES]], offset + done)
        except OSError as e:
            raise RequestError(e, offset + done) from None
        if n_read == 0:
            break
        if drop:
            platform.drop_cached(fd, 0, 0)
        done += n_read
    return done


@contextmanager
def opened(file: str | os.PathLike, error: type[SlowftError] = ModelError) -> Iterator[int]:
    """Open a file for reading while this is entered. Gives its descriptor.

    Raises:
        SlowftError: of the class `error`. The file cannot be opened.
    """
    try:
        fd = platform.open_uncached(str(file))
    except OSError as e:
        raise error(f"{file} cannot be opened: {reason_of(e)}") from None
    try:
        yield fd
    finally:
        os.close(fd)


def read_bytes(file: str | os.PathLike, fd: int, nbytes: int, offset: int, error: type[SlowftError]) -> bytes:
    """Read `nbytes` bytes of an open file at `offset`: fewer only if it ends before.

    Raises:
        SlowftError: of the class `error`. It names the file and the byte that could not be read.
    """
    data = bytearray(nbytes)
    try:
        return bytes(memoryview(data)[: read_all(fd, memoryview(data), offset, drop=False)])
    except RequestError as e:
        raise error(f"{file}: reading at byte {e.offset} failed: {reason_of(e)}") from None


def free_nbytes(path: Path) -> int:
    """Bytes free on the disk of `path`, which need not exist yet."""
    return shutil.disk_usage(nearest_existing(path)).free


def nearest_existing(path: Path) -> Path:
    """The path or, if it does not exist, the nearest directory above it that does."""
    return next(p for p in (path, *path.absolute().parents) if p.exists())


def check_directory(option: str, directory: Path) -> None:
    """Raises ConfigError if an option's directory is none, or cannot be made or written to. Makes nothing."""
    existing = nearest_existing(directory)
    if not existing.is_dir():
        raise ConfigError(f"{option} {directory}: {existing} is a file. Give a directory on a disk")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(f"{option} {directory}: {existing} cannot be written to. Give another directory")


def _write(fd: int, data: memoryview, offset: int) -> int:
    """Write and flush one request. A retry writes all of it again, as Linux reports an unwritten page only once."""
    written = os.pwrite(fd, data, offset)
    platform.write_back(fd, offset, written)
    return written
