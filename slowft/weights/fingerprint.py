"""Tells by digests whether files, or arrays that are stored, have changed. Files are not read whole.

Comes in: open safetensors files, name -> descriptor; or arrays' bytes. Goes out: a digest. Of a file only the header
and a few hundred kilobytes of contents are read.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping

from .. import platform
from ..errors import ModelError
from .extents import MAX_HEADER_NBYTES
from .transfers import read_bytes

SAMPLES, SAMPLE_NBYTES = 64, 4096  # of each file's contents


def identities(files: Mapping[str, int]) -> tuple:
    """Inodes, sizes and times: they change with any write to the files, and if other files take their place.

    The time of the last change (`ctime`) is the kernel's own. A program that restores the time of modification, as
    `cp -p` and `rsync -t` do, cannot set it.
    """
    stats = [os.fstat(fd) for fd in files.values()]
    return tuple((s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for s in stats)


def fingerprint(files: Mapping[str, int]) -> str:
    """A digest of the files' identities, their headers, and samples of their contents.

    The samples are needed on file systems that keep no such times (FAT, some network shares).
    """
    return hashlib.sha256(f"{identities(files)} {of_contents(files)}".encode()).hexdigest()


def of_contents(files: Mapping[str, int]) -> str:
    """A digest of headers and of samples of the contents. It is the same for a copy, whatever the files' names.

    Raises:
        ModelError: a file cannot be read.
    """
    digest = hashlib.sha256()
    for name, fd in files.items():
        size = os.fstat(fd).st_size

        def read(nbytes: int, offset: int, name=name, fd=fd) -> bytes:
            return read_bytes(name, fd, nbytes, offset, ModelError)

        header_nbytes = int.from_bytes(read(8, 0), "little")  # any number, if it is no safetensors file
        digest.update(read(min(header_nbytes, size, MAX_HEADER_NBYTES), 8))
        for i in range(SAMPLES):
            digest.update(read(SAMPLE_NBYTES, i * max(size - SAMPLE_NBYTES, 0) // (SAMPLES - 1)))
        platform.drop_cached(fd, 0, 0)
    return digest.hexdigest()


def of_arrays(facts: list, data: Iterable[memoryview]) -> str:
    """A digest of facts, as JSON says them, and of the arrays' bytes."""
    # current processors have instructions for SHA-256: 1.8 GB/s a core here, BLAKE2b 0.9
    digest = hashlib.sha256(json.dumps(facts).encode())
    for part in data:
        digest.update(part)
    return digest.hexdigest()
