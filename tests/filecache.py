"""How much of a file the kernel's file cache holds, by mincore(2): the operating system's own figure."""

import ctypes
import mmap
import os
import sys
from pathlib import Path


def nbytes_cached(fd: int) -> int:
    """Bytes of the open file (readable and writable, as the kernel requires of who asks) in the file cache."""
    size = os.fstat(fd).st_size
    if size == 0:
        return 0
    libc = ctypes.CDLL(None, use_errno=True)
    pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
    with mmap.mmap(fd, size) as mapping:
        first = ctypes.c_ubyte.from_buffer(mapping)
        failed = libc.mincore(ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(size), pages)
        error = ctypes.get_errno()
        del first
    if failed:
        raise OSError(error, os.strerror(error))
    return sum(page & 1 for page in pages) * mmap.PAGESIZE


def read_ahead_nbytes(path: Path) -> int:
    """How far the kernel reads ahead in a file on this disk; it may have two such windows under way."""
    device = os.stat(path).st_dev
    file = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")
    return int(file.read_text()) << 10 if file.exists() else 8 << 20


def why_unavailable(path: Path) -> str | None:
    """None if files under `path` can be seen to come and go in the file cache, else the reason."""
    if sys.platform != "linux":
        return "only Linux tells what its file cache holds"
    probe = path / "probe"
    probe.write_bytes(bytes(1 << 20))
    fd = os.open(probe, os.O_RDWR)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        return f"{path} is no disk: its files are always in memory" if nbytes_cached(fd) else None
    finally:
        os.close(fd)
        probe.unlink()
