"""What is known and measured of this machine, against numpy, the operating system, and the clock."""

import slowft  # noqa: F401, I001  (before mlx: it loads OpenBLAS)

import errno
import json
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
from slowft.planning import machine
from slowft.planning.machine import known, matmul_flops_per_s, measure_reading, measured
from slowft.planning.measure import Measurements, Rates, remember, remembered
from slowft.reports.base import Report
from slowft.training.run import run
from test_training import config, write_data

MB = 1 << 20


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("drive") / "model.safetensors"
    with open(path, "wb") as f:
        f.write(np.random.default_rng(0).bytes(96 * MB))
        f.flush()
        os.fsync(f.fileno())  # what is not yet on the drive cannot be dropped from the file cache
    return path


@pytest.fixture
def nothing_remembered(tmp_path, monkeypatch) -> Path:
    """Returns the file that rates are kept in."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return platform.cache_directory() / "rates.json"


def best_s(function: Callable[[], object], repetitions: int = 5) -> float:
    def once() -> float:
        begin = time.perf_counter()
        function()
        return time.perf_counter() - begin

    return min(once() for _ in range(repetitions))


# --- Computing ----------------------------------------------------------------------------------------


def test_measuring_takes_a_moment_and_leaves_limits_as_they_were(file, nothing_remembered):
    limits = mx.set_cache_limit(12345678), mx.set_memory_limit(1 << 34)
    try:
        begin = time.perf_counter()
        found = measured(mx.float32, [str(file)])
        assert time.perf_counter() - begin < 5
        assert mx.set_cache_limit(limits[0]) == 12345678 and mx.set_memory_limit(limits[1]) == 1 << 34
    finally:
        mx.set_cache_limit(limits[0]), mx.set_memory_limit(limits[1])
    assert not found.is_assumed and known(mx.float32).is_assumed
    assert None not in (found.rates.head, found.rates.cast, found.rates.read)


def test_matmul_rate_is_of_numpys_order():
    if mx.default_device() != mx.Device(mx.cpu):
        pytest.skip("numpy multiplies on the processor")
    a = np.random.default_rng(0).standard_normal((1024, 1024), dtype=np.float32)
    by_numpy = 2 * 1024**3 / best_s(lambda: a @ a)
    assert by_numpy / 4 < matmul_flops_per_s(mx.float32) < by_numpy * 4


def test_measuring_fits_in_little_memory(file):
    code = (
        "import sys, slowft, mlx.core as mx; from slowft import platform; from slowft.planning.machine import measured;"
        "platform.fix_malloc_threshold(); before = platform.memory_in_use(); measured(mx.float32, sys.argv[1:]);"
        "print(platform.peak_memory() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True)
    assert 0 < int(done.stdout) < 200 * MB, done.stderr


def test_memory_is_what_the_system_says():
    found = known(mx.float32)
    if platform.MACOS:
        assert found.memory_nbytes <= platform.physical_memory()
        return
    total = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
    assert platform.physical_memory() == int(total.split()[1]) * 1024
    assert found.memory_nbytes <= platform.physical_memory()
    assert found.cores == len(os.sched_getaffinity(0))


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


# --- Reading ------------------------------------------------------------------------------------------


def test_reading_is_measured_past_the_file_cache(file):
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
    assert by_hand / 5 < measure_reading([str(file)]) < by_hand * 3


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
        measure_reading([str(file)], 0.05)
    assert cached[0] <= 88 * MB and cached[1] <= 64 * MB  # what comes first has gone: 8 MB, then from the middle on


def test_holes_are_not_read(tmp_path, monkeypatch):
    with open(tmp_path / "hole", "wb") as f:
        f.truncate(256 * MB)
    assert measure_reading([str(tmp_path / "hole")], 0.05) is None
    assert measure_reading([], 0.05) is None

    with open(tmp_path / "part", "wb") as f:
        f.truncate(256 * MB)
        f.seek(128 * MB)
        f.write(os.urandom(8 * MB))
        f.flush()
        os.fsync(f.fileno())
    asked = []
    submit = machine.Reader.submit
    monkeypatch.setattr(machine.Reader, "submit", lambda self, r, b: asked.extend(r) or submit(self, r, b))
    assert measure_reading([str(tmp_path / "part")], 0.05) > 0
    assert [(r.offset, r.nbytes) for r in asked] == [(128 * MB, 8 * MB)] * 2  # the first time does not count


def test_file_system_that_tells_of_no_holes_is_read_all_the_same(tmp_path, monkeypatch):
    """HFS+ and network shares on macOS; those that do end in ENXIO past the last data."""
    file = tmp_path / "file"
    file.write_bytes(bytes(5 * MB))

    def refuse(fd, offset, whence):
        raise OSError(errno.ENOTTY, os.strerror(errno.ENOTTY))

    monkeypatch.setattr(os, "lseek", refuse)
    asked, submit = set(), machine.Reader.submit
    monkeypatch.setattr(machine.Reader, "submit", lambda self, r, b: asked.update(r) or submit(self, r, b))
    measure_reading([str(file)], 10, 2 * MB)
    assert {(r.offset, r.nbytes) for r in asked} >= {(0, 2 * MB), (2 * MB, 2 * MB), (4 * MB, MB)}


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
    rate = machine.measure_reading([str(file)])
    assert rate is None or rate > 0  # this disk may be as fast as its file cache
    to_know_the_caches_rate = slice(1, 1 + machine.CACHED_READS)
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
    rate = machine.measure_reading([str(file)], nbytes_at_once=MB)
    if stays < 0.5:
        assert rate == pytest.approx(2e9)
    else:
        assert rate is None


# --- What runs have measured --------------------------------------------------------------------------


def test_bytes_of_a_pass_are_those_it_needs_beyond_what_was_there():
    """Of x -> (x + 1) * 2 summed up, one array beyond x itself, as the second takes the first one's buffer."""
    x = mx.ones((4 * MB,))
    mx.eval(x)
    measurements = Measurements()
    for _ in range(2):
        with measurements.measuring("a kind", "forward"):
            total = ((x + 1) * 2).sum()
            mx.eval(total)
    found = measurements.passes["a kind", "forward"]
    assert 16 * MB <= found.nbytes <= 17 * MB
    assert found.n == 1 and 0 < found.seconds < 10  # the first time tells bytes, the second seconds


def test_the_limit_of_memory_is_as_before_even_if_a_pass_fails():
    limit = mx.set_memory_limit(1 << 33)
    try:
        with pytest.raises(ZeroDivisionError), Measurements().measuring("a kind", "forward"):
            raise ZeroDivisionError
    finally:
        assert mx.set_memory_limit(limit) == 1 << 33


def test_rates_come_back_as_they_were_kept(nothing_remembered):
    rates, large, small = Rates(1e11, 2e11, 3e11, 4e9, 5e9), (2048, 5632), (576, 1536)
    remember("a device", "float32", large, rates)
    remember("a device", "bfloat16", large, replaced := Rates(forward=7e11))
    assert remembered("a device", "float32", large) == remembered("a device", "float32", (2048, 4096)) == rates
    assert remembered("a device", "bfloat16", large) == replaced
    assert remembered("another", "float32", large) == Rates()
    remember("a device", "float32", large, Rates(forward=9e11))  # what a run did not measure stays
    assert remembered("a device", "float32", large) == Rates(9e11, 2e11, 3e11, 4e9, 5e9)
    assert remembered("a device", "float32", small) == Rates(cast=4e9, read=5e9)
    remember("a device", "float32", small, Rates(forward=1e10, read=6e9))  # a small model's multiplications are its own
    assert remembered("a device", "float32", large) == Rates(9e11, 2e11, 3e11, 4e9, 6e9)
    assert [path.name for path in nothing_remembered.parent.iterdir()] == ["rates.json"]


def test_only_training_runs_are_remembered(nothing_remembered, llama_with_tokenizer, tmp_path):
    """Steps of a benchmark may be held back."""
    with slowft.open_model(llama_with_tokenizer, memory="1GB").add_lora() as model:
        model.loss_and_grads(mx.ones((1, 9), mx.int32), mx.array([[0, 8]]))
    assert not nothing_remembered.exists()
    data = str(write_data(tmp_path / "data"))
    run(config(tmp_path, model=str(llama_with_tokenizer), data=data, memory="1GB", iters=2), Report())
    assert "matrices of" in nothing_remembered.read_text()


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        '{"a device, float32": 3}',
        '{"a device, float32": {"forward": "fast", "read": -1, "cast": 1e999, "more": 2}}',
    ],
)
def test_what_cannot_be_read_is_as_if_it_were_not_there(content, nothing_remembered):
    nothing_remembered.parent.mkdir(parents=True)
    nothing_remembered.write_text(content)
    assert remembered("a device", "float32", (9, 9)) == Rates()
    remember("a device", "float32", (9, 9), Rates(read=1e9))
    assert remembered("a device", "float32", (9, 9)) == Rates(read=1e9)
    json.loads(nothing_remembered.read_text())


def test_a_place_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    remember("a device", "float32", (9, 9), Rates(read=1e9))
    assert remembered("a device", "float32", (9, 9)) == Rates()
