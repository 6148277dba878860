"""Compares slowft's reader with raw reads of the same files, in turns: how much of the drive's throughput arrives.

Before each reading the files are removed from the file cache. All read the same bytes in the same order.
"""

import json
import mmap
import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .. import platform
from ..errors import SlowftError
from ..planning.machine import READS_IN_FLIGHT
from ..weights.buffers import read_buffer, take_pages
from ..weights.reader import ByteRange, Reader

BLOCK_NBYTES = 64 << 20  # bytes the reader is asked for at a time: about a block of a 1 B model in 16 bits
RAW_NBYTES = 16 << 20  # bytes of a raw request


def measure(
    files: Sequence[Path], most_nbytes: int, rounds: int, progress: Callable[[int], None] = lambda done: None
) -> dict[str, Any]:
    """Bytes per second, and processor seconds, of the reader and of each raw way there is: medians over rounds.

    Args:
        most_nbytes: the most bytes to read in a reading, from the first file on.
        progress: called with the number of readings done.
    Raises:
        SlowftError: there is too little to read.
    """
    parts, remaining = [], most_nbytes
    for file in files:  # in whole requests, because O_DIRECT needs aligned sizes
        nbytes = min(file.stat().st_size, remaining) // RAW_NBYTES * RAW_NBYTES
        if nbytes:
            parts.append((file, nbytes))
            remaining -= nbytes
    if not parts:
        raise SlowftError(f"there is nothing to measure reading with: give a model of more than {RAW_NBYTES >> 20} MB")
    buffers = _buffers()
    ways = {"slowft": lambda parts: _by_reader(parts, buffers), **_raw_ways(parts[0][0])}
    total = sum(nbytes for _, nbytes in parts)
    rates: dict[str, list[float]] = {way: [] for way in ways}
    processor: dict[str, list[float]] = {way: [] for way in ways}
    done = 0
    for _ in range(rounds):
        for name, way in ways.items():
            for file, _ in parts:
                platform.make_cold(str(file))
            before = _processor_s()
            rates[name].append(total / way(parts))
            processor[name].append((_processor_s() - before) / total)
            done += 1
            progress(done)
    medians = {way: statistics.median(values) for way, values in rates.items()}
    raw = max((way for way in ways if way != "slowft"), key=medians.get)
    return {
        "nbytes": total,
        "reads_in_flight": READS_IN_FLIGHT,
        "rates": rates,
        "median_bytes_per_s": medians,
        "processor_s_per_gb": {way: 1e9 * statistics.median(values) for way, values in processor.items()},
        "raw": raw,  # the fastest raw way
        # ratios are taken within a round, because the drive's speed changes from round to round
        "ratio": statistics.median(ours / theirs for ours, theirs in zip(rates["slowft"], rates[raw])),
        "ratios": {way: medians["slowft"] / rate for way, rate in medians.items() if way != "slowft"},
    }


def n_readings(file: Path, rounds: int) -> int:
    """How often `measure` will call `progress`."""
    return rounds * (1 + len(_raw_ways(file)))


Parts = Sequence[tuple[Path, int]]


def _raw_ways(file: Path) -> dict[str, Callable[[Parts], float]]:
    """The ways to read without slowft. Each is a function that gives the seconds it took."""
    ways: dict[str, Callable[[Parts], float]] = {}
    if shutil.which("fio"):
        ways["fio"] = _by_fio
        if not platform.MACOS:
            ways["fio, huge pages"] = lambda parts: _by_fio(parts, GLIBC_TUNABLES="glibc.malloc.hugetlb=1")
    if shutil.which("dd") and _dd_can_go_past_the_cache(file):
        ways["dd iflag=direct"] = _by_dd
    return ways | {"preads": _by_preads}


def _buffers() -> list[memoryview]:
    """Two buffers of the kind that blocks are read into. Their pages are in memory, as they are after a first step."""
    buffers = [memoryview(read_buffer(BLOCK_NBYTES)) for _ in range(2)]
    for buffer in buffers:
        take_pages(buffer)
    return buffers


def _by_reader(parts: Parts, buffers: Sequence[memoryview]) -> float:
    """Reads into two buffers in turns. As with blocks, a read is begun before the one before it is waited for."""
    pieces = [
        ByteRange(str(file), at, min(BLOCK_NBYTES, nbytes - at), 0)
        for file, nbytes in parts
        for at in range(0, nbytes, BLOCK_NBYTES)
    ]
    reader = Reader(READS_IN_FLIGHT)
    try:
        begin = time.perf_counter()
        reads = []
        for i, piece in enumerate(pieces):
            if i >= 2:
                reader.wait(reads[i - 2])
            reads.append(reader.submit([piece], buffers[i % 2]))
        for read in reads[-2:]:
            reader.wait(read)
        return time.perf_counter() - begin
    finally:
        reader.close()


def _by_preads(parts: Parts) -> float:
    buffer, seconds = memoryview(_pages(RAW_NBYTES)), 0.0
    for file, nbytes in parts:
        fd = platform.open_uncached(str(file))
        try:
            begin = time.perf_counter()
            for at in range(0, nbytes, RAW_NBYTES):
                if os.preadv(fd, [buffer], at) != RAW_NBYTES:
                    raise SlowftError(f"{file} cannot be read at byte {at}")
                platform.drop_cached(fd, at, RAW_NBYTES)
            seconds += time.perf_counter() - begin
        finally:
            os.close(fd)
    return seconds


def _by_dd(parts: Parts) -> float:
    return sum(_dd_seconds(file, nbytes) for file, nbytes in parts)


def _dd_seconds(file: Path, nbytes: int) -> float:
    """Seconds by dd's own clock, which does not count dd's start."""
    request = ["iflag=direct", f"bs={RAW_NBYTES}", f"count={nbytes // RAW_NBYTES}"]
    done = subprocess.run(
        ["dd", f"if={file}", "of=/dev/null", *request], capture_output=True, text=True, env=_english()
    )
    if done.returncode:
        raise SlowftError(f"dd: {done.stderr.strip().splitlines()[-1]}")
    return float(done.stderr.splitlines()[-1].split(" copied, ")[1].split(" s")[0])


def _dd_can_go_past_the_cache(file: Path) -> bool:
    command = ["dd", f"if={file}", "of=/dev/null", "iflag=direct", "bs=4096", "count=1"]
    done = subprocess.run(command, capture_output=True, text=True, env=_english())
    return done.returncode == 0 and " copied, " in done.stderr


def _english() -> dict[str, str]:
    return os.environ | {"LC_ALL": "C"}


def _by_fio(parts: Parts, **environment: str) -> float:
    """Large sequential reads past the cache, several in flight."""
    seconds = 0.0
    engine = "posixaio" if platform.MACOS else "libaio"
    for file, nbytes in parts:
        done = subprocess.run(
            ["fio", "--name=read", f"--filename={file}", "--readonly", "--rw=read", "--direct=1", "--iodepth=4"]
            + [f"--ioengine={engine}", f"--bs={RAW_NBYTES // 2}", f"--size={nbytes}", "--output-format=json"],
            capture_output=True,
            text=True,
            env=os.environ | environment,
        )
        if done.returncode:
            raise SlowftError(f"fio: {(done.stderr or done.stdout).strip().splitlines()[-1]}")
        seconds += json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]["read"]["runtime"] / 1e3
    return seconds


def _processor_s() -> float:
    """Processor seconds of this process and of the processes that it waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _pages(nbytes: int) -> mmap.mmap:
    """Page-aligned memory, whose pages are in memory."""
    pages = mmap.mmap(-1, nbytes)
    pages.write(bytes(nbytes))
    return pages
