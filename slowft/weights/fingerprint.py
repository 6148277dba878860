"""Tells whether files are still the ones they were, without reading them.

Comes in: descriptors of safetensors files. Goes out: a digest. Reads headers and a few hundred kilobytes of contents.
"""

import hashlib
import os
from collections.abc import Sequence

from .. import platform
from .extents import MAX_HEADER_NBYTES

SAMPLES, SAMPLE_NBYTES = 64, 4096  # of each file's contents


def identities(descriptors: Sequence[int]) -> tuple:
    """What changes with any write to the files, and with other files in their place: inodes, sizes and times.

    The time of the last change (`ctime`) is the kernel's own: a program that restores the time of modification, as
    `cp -p` and `rsync -t` do, cannot set it.
    """
    stats = [os.fstat(fd) for fd in descriptors]
    return tuple((s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for s in stats)


def fingerprint(descriptors: Sequence[int]) -> str:
    """A digest of the files' identities, their headers, and samples of their contents.

    The samples are for file systems that keep no such times (FAT, some network shares).
    """
    return hashlib.sha256(f"{identities(descriptors)} {of_contents(descriptors)}".encode()).hexdigest()


def of_contents(descriptors: Sequence[int]) -> str:
    """A digest of headers and of samples of the contents: the same for a copy."""
    digest = hashlib.sha256()
    for fd in descriptors:
        size = os.fstat(fd).st_size
        header_nbytes = int.from_bytes(os.pread(fd, 8, 0), "little")  # of a file beside the model it may be anything
        digest.update(os.pread(fd, min(header_nbytes, size, MAX_HEADER_NBYTES), 8))
        for i in range(SAMPLES):
            digest.update(os.pread(fd, SAMPLE_NBYTES, i * max(size - SAMPLE_NBYTES, 0) // (SAMPLES - 1)))
        platform.drop_cached(fd, 0, 0)
    return digest.hexdigest()
