"""What is measured of this machine, against numpy, the operating system, and the clock."""

import slowft  # noqa: F401, I001  (before mlx: it loads OpenBLAS)

import errno
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import filecache
import macos
from conftest import must_run
from slowft import platform
from slowft.bench import cgroup
from slowft.engine.budget import ROOM_TO_MEASURE
from slowft.planning import machine
from slowft.models.weights import Packed
from slowft.planning.machine import _dequantize_s_per_byte, measure
from slowft.storage.index import Extent

MB = 1 << 20


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("drive") / "model.safetensors"
    with open(path, "wb") as f:
        f.write(np.random.default_rng(0).bytes(96 * MB))
        f.flush()
        os.fsync(f.fileno())  # what is not yet on the drive cannot be dropped from the file cache
    return path


@pytest.fixture(scope="module")
def measured(file) -> tuple[machine.Machine, float]:
    begin = time.perf_counter()
    figures = measure(mx.float32, [str(file)])
    return figures, time.perf_counter() - begin


def best_s(function: Callable[[], object], repetitions: int = 5) -> float:
    def once() -> float:
        begin = time.perf_counter()
        function()
        return time.perf_counter() - begin

    return min(once() for _ in range(repetitions))


def test_it_takes_seconds_and_leaves_limits_as_they_were(file):
    limit = mx.set_cache_limit(12345678)
    try:
        begin = time.perf_counter()
        measure(mx.float32, [str(file)])
        assert time.perf_counter() - begin < 5
        assert mx.set_cache_limit(limit) == 12345678
    finally:
        mx.set_cache_limit(limit)


def test_matmul_rate_is_of_numpys_order(measured):
    if mx.default_device() != mx.Device(mx.cpu):
        pytest.skip("numpy multiplies on the processor")
    a = np.random.default_rng(0).standard_normal((1024, 1024), dtype=np.float32)
    by_numpy = 2 * 1024**3 / best_s(lambda: a @ a)
    assert by_numpy / 4 < measured[0].matmul_flops_per_s < by_numpy * 4


def test_memory_rates_are_of_numpys_order(measured):
    if mx.default_device() != mx.Device(mx.cpu):
        pytest.skip("numpy adds on the processor")
    a, b, out = np.ones((3, 12 * MB), np.float32)
    by_numpy = 3 * a.nbytes / best_s(lambda: np.add(a, b, out=out))
    assert by_numpy / 4 < measured[0].bytes_per_s < by_numpy * 4
    # a cast reads half of what it writes, so it puts out less than is moved in all
    assert measured[0].bytes_per_s / 10 < measured[0].cast_bytes_per_s < measured[0].bytes_per_s * 2


def test_fresh_pages_cost_what_they_cost_numpy(measured):
    if platform.MACOS:
        pytest.skip("how much of it is fresh is the system's business")
    nbytes = 48 * MB

    def touch(memory: mmap.mmap) -> None:
        np.frombuffer(memory, np.float32).fill(1.0)

    warm = mmap.mmap(-1, nbytes)
    by_numpy = (best_s(lambda: touch(mmap.mmap(-1, nbytes))) - best_s(lambda: touch(warm))) / nbytes
    assert by_numpy / 5 < measured[0].page_s_per_byte < by_numpy * 5


def test_memory_is_what_the_system_says(measured):
    if platform.MACOS:
        assert measured[0].memory_nbytes <= platform.physical_memory()
        return
    total = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
    assert platform.physical_memory() == int(total.split()[1]) * 1024
    assert measured[0].memory_nbytes <= platform.physical_memory()
    assert measured[0].cores == len(os.sched_getaffinity(0))


def test_limit_of_the_control_group_counts():
    if reason := cgroup.why_unavailable():
        must_run(reason)
    code = "from slowft import platform; print(platform.memory_limit())"
    done, _ = cgroup.run([sys.executable, "-c", code], 300 * MB, cwd=Path(__file__).parents[1])
    assert int(done.stdout) == 300 * MB, done.stderr
    if not cgroup.V1.is_dir():
        return
    inner = (
        "import sys; from slowft.bench import cgroup;"
        f"done, _ = cgroup.run([sys.executable, '-c', {code!r}], 500 << 20); print(done.stdout, done.stderr)"
    )
    done, _ = cgroup.run([sys.executable, "-c", inner], 300 * MB, cwd=Path(__file__).parents[1])
    assert int(done.stdout.split()[0]) == 300 * MB, "the limit of the group above its own"


def test_reading_is_measured_past_the_file_cache(measured, file):
    fd = os.open(file, os.O_RDONLY)
    buffer = bytearray(32 * MB)

    def read():
        platform.drop_cached(fd, 0, 96 * MB)
        for at in range(0, 96 * MB, len(buffer)):
            os.preadv(fd, [buffer], at)

    try:
        by_hand = 96 * MB / best_s(read, 3)
    finally:
        os.close(fd)
    assert by_hand / 5 < measured[0].read_bytes_per_s < by_hand * 3


def test_what_is_in_the_file_cache_already_is_read_from_the_drive(file, monkeypatch):
    if reason := filecache.why_unavailable(file.parent):
        must_run(reason)
    file.read_bytes()
    cached = []
    submit = machine.Reader.submit
    with open(file, "rb+") as f:

        def spy(self, ranges, buffer):
            cached.append(filecache.nbytes_cached(f.fileno()))
            return submit(self, ranges, buffer)

        monkeypatch.setattr(machine.Reader, "submit", spy)
        assert filecache.nbytes_cached(f.fileno()) == 96 * MB
        measure(mx.float32, [str(file)], 0.1)
    assert cached[0] <= 88 * MB and cached[1] <= 64 * MB  # what comes first has gone: 8 MB, then from the middle on


def test_holes_are_not_read(tmp_path, monkeypatch):
    with open(tmp_path / "hole", "wb") as f:
        f.truncate(256 * MB)
    assert measure(mx.float32, [str(tmp_path / "hole")], 0.1).read_bytes_per_s is None
    assert measure(mx.float32, [], 0.1).read_bytes_per_s is None

    with open(tmp_path / "part", "wb") as f:
        f.truncate(256 * MB)
        f.seek(128 * MB)
        f.write(os.urandom(8 * MB))
        f.flush()
        os.fsync(f.fileno())
    asked = []
    submit = machine.Reader.submit
    monkeypatch.setattr(machine.Reader, "submit", lambda self, r, b: asked.extend(r) or submit(self, r, b))
    assert measure(mx.float32, [str(tmp_path / "part")], 0.1).read_bytes_per_s > 0
    assert [(r.offset, r.nbytes) for r in asked] == [(128 * MB, 8 * MB)] * 2  # the first time does not count


def test_file_system_that_tells_of_no_holes_is_read_all_the_same(tmp_path, monkeypatch):
    """HFS+ and network shares on macOS; those that do end in ENXIO past the last data."""
    file = tmp_path / "file"
    file.write_bytes(bytes(5 * MB))

    def refuse(fd, offset, whence):
        raise OSError(errno.ENOTTY, os.strerror(errno.ENOTTY))

    monkeypatch.setattr(os, "lseek", refuse)
    pieces = machine._pieces(str(file), 2 * MB)
    assert [(piece.offset, piece.nbytes) for piece in pieces] == [(0, 2 * MB), (2 * MB, 2 * MB), (4 * MB, MB)]


@pytest.fixture
def mac(monkeypatch) -> macos.Mac:
    return macos.simulate(monkeypatch, page_nbytes=16384)


def test_macos_drops_the_pages_of_each_piece_before_it_is_read(file, mac, monkeypatch):
    """By MS_SYNC | MS_INVALIDATE on a mapping of just the piece."""
    submit, read = machine.Reader.submit, []

    def spy(self, ranges, buffer):
        read.append((ranges[0].offset, ranges[0].nbytes, list(mac.calls)))
        mac.calls.clear()
        return submit(self, ranges, buffer)

    monkeypatch.setattr(machine.Reader, "submit", spy)
    rate, _ = machine.measure_reading([str(file)])
    assert rate is None or rate > 0  # this disk may be as fast as its file cache
    to_know_the_caches_rate = slice(1, 1 + machine.CACHED_READS * len(machine.DEPTHS))
    cold = read[:1] + read[to_know_the_caches_rate.stop :]
    assert len(cold) >= 2
    for offset, nbytes, calls in cold:
        names = [name for name, _ in calls if name != "fcntl"]
        assert names == ["mmap", "msync", "munmap"]
        called = dict(calls)
        assert (called["mmap"][5], called["mmap"][1]) == (offset, nbytes)
        assert called["msync"] == (mac.mapped[0], nbytes, 0x12)
        mac.mapped.pop(0)
    assert all("mmap" not in dict(calls) for _, _, calls in read[to_know_the_caches_rate])


@pytest.mark.parametrize("stays", [0.0, 0.2, 0.8, 1.0])
def test_macos_takes_the_caches_rate_for_no_drives(stays, tmp_path, mac, monkeypatch):
    """A model just downloaded, of which all pages are cached, and those of a share of the file stay whatever is done.

    A drive of 1 GB/s with one request at a time and 2 with more, a cache of 4 and 8, by the clock it is measured with.
    """
    file, n_pieces = tmp_path / "file", 20
    file.write_bytes(bytes(n_pieces * MB))
    cached, now = set(range(n_pieces)), [0.0]

    def make_cold(path, offset, nbytes):
        assert path == str(file)
        if offset // MB >= stays * n_pieces:
            cached.discard(offset // MB)

    def read_now(self, ranges, buffer):
        for r in ranges:
            at_once = min(self.reads_in_flight, 2)
            now[0] += r.nbytes / (4e9 if r.offset // MB in cached else 1e9) / at_once

    monkeypatch.setattr(platform, "make_cold", make_cold)
    monkeypatch.setattr(machine.Reader, "read_now", read_now)
    monkeypatch.setattr(machine.time, "perf_counter", lambda: now[0])
    rate, in_flight = machine.measure_reading([str(file)], nbytes_at_once=MB)
    if stays < 0.5:
        assert rate == pytest.approx(2e9) and in_flight == 2
    else:
        assert rate is None and in_flight == max(machine.DEPTHS)


@pytest.mark.parametrize("bits, group_size, mode", [(4, 64, "affine"), (8, 32, "affine"), (4, 32, "mxfp4")])
def test_dequantizing_takes_what_it_takes(bits, group_size, mode):
    """Against a block's worth of layers brought by hand."""
    parts = mx.quantize(mx.random.normal((4096, 1024)).astype(mx.bfloat16), group_size, bits, mode=mode)
    stored = [part.reshape(-1).view(mx.uint8) for part in parts]
    mx.eval(stored)
    extents = [Extent("", "", 0, a.nbytes, str(p.dtype).split(".")[-1], p.shape) for a, p in zip(stored, parts)]
    source = Packed(extents[0], extents[1], (extents + [None])[2], group_size, bits, mode, mx.float32)
    mx.set_cache_limit(64 << 20)
    by_hand = best_s(lambda: mx.eval([source.build(stored) for _ in range(4)])) / (4 * 4096 * 1024 * 4)
    measured = _dequantize_s_per_byte(bits, group_size, mode, mx.float32)
    assert by_hand / 6 < measured < by_hand * 4
    begin = time.perf_counter()
    assert _dequantize_s_per_byte(bits, group_size, mode, mx.float32) == measured
    assert time.perf_counter() - begin < 0.01  # measured once a process


@pytest.mark.parametrize("room, shrink", ROOM_TO_MEASURE)
def test_it_fits_in_little_memory(file, room, shrink):
    """What a job is measured with may take no more than it has beside the process, by the system's count."""
    code = (
        "import sys, slowft, mlx.core as mx; from slowft import platform; from slowft.planning.machine import measure;"
        "platform.fix_malloc_threshold(); before = platform.memory_in_use(); shrink = int(sys.argv[1]);"
        "machine = measure(mx.float32, sys.argv[2:], shrink=shrink); machine.dequantize_s_per_byte(4, 64, 'affine');"
        "machine.gather_mm_s_per_byte(4096, 14336, False); machine.matmul_s_per_flop(1, 512, 2048, 5632, False, True);"
        "print(platform.peak_memory() - before)"
    )
    root, arguments = Path(__file__).parents[1], [str(shrink), str(file)]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=root)
    assert 0 < int(done.stdout) < room, done.stderr


def test_smaller_arrays_measure_the_same(file, measured):
    smaller = measure(mx.float32, [str(file)], shrink=4)
    for rate in ("matmul_flops_per_s", "bytes_per_s", "functions_per_s", "cast_bytes_per_s"):
        assert 1 / 4 < getattr(smaller, rate) / getattr(measured[0], rate) < 4, rate
