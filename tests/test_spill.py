"""What is spilled comes back, takes no memory, leaves nothing behind, and a full disk is found before it matters."""

import slowft  # noqa: F401, I001  (before mlx: it loads OpenBLAS)

import contextlib
import errno
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import filecache
from conftest import must_run
from slowft import platform
from slowft.errors import SlowftError
from slowft.weights.spill import SpillFile

MB = 1 << 20


@pytest.fixture(autouse=True)
def temporary_files_on_disk(tmp_path, monkeypatch):
    """/tmp may be a tmpfs, and is good enough for most of this."""
    in_memory = platform.is_memory_filesystem
    monkeypatch.setattr(
        platform, "is_memory_filesystem", lambda path: not path.is_relative_to(tmp_path) and in_memory(path)
    )


def refusal(function, *args) -> str:
    with pytest.raises(SlowftError) as caught:
        function(*args)
    message = str(caught.value)
    assert "\n" not in message
    return message


def random_arrays(n: int = 20) -> list[np.ndarray]:
    """Of several types, shapes and sizes; an empty one, a scalar and one that is not contiguous among them."""
    numbers, shapes = np.random.default_rng(0), random.Random(0)
    arrays = [np.zeros((0, 3), np.float32), np.array(1.5, np.float16), numbers.random((300, 70)).T]
    for _ in range(n):
        shape = [shapes.randint(1, 50) for _ in range(shapes.randint(1, 3))]
        arrays.append(numbers.integers(0, 255, shape).astype(shapes.choice(["u1", "i4", "f2", "f4", "f8"])))
    return arrays


def test_arrays_come_back_in_reverse_order(tmp_path):
    arrays = random_arrays()
    ends = np.cumsum([a.nbytes for a in arrays]).tolist()
    spill = SpillFile(tmp_path, ends[-1], max_pending_nbytes=10_000)
    for _ in range(2):  # the same places are used step after step
        for array, end in zip(arrays, ends):
            spill.write(end - array.nbytes, array)
        for array, end in reversed(list(zip(arrays, ends))):
            raw = spill.read(end - array.nbytes, array.nbytes).result()
            assert raw.dtype == np.uint8 and raw.flags.writeable
            assert raw.tobytes() == array.tobytes()
        arrays = [a + 1 for a in arrays]
    assert spill.bytes_written == spill.bytes_read == 2 * ends[-1]
    spill.close()


def test_bfloat16_of_mlx_goes_as_bytes(tmp_path):
    array = mx.random.normal((7, 5)).astype(mx.bfloat16)
    raw = array.reshape(-1).view(mx.uint8)
    mx.eval(array, raw)
    spill = SpillFile(tmp_path, array.nbytes)
    spill.write(0, memoryview(raw))
    back = mx.array(spill.read(0, array.nbytes).result()).view(mx.bfloat16).reshape(7, 5)
    spill.close()
    assert mx.array_equal(back, array)


def test_places_beyond_the_file_are_refused(tmp_path):
    spill = SpillFile(tmp_path, 100)
    with pytest.raises(ValueError):
        spill.write(90, np.zeros(11, np.uint8))
    with pytest.raises(ValueError):
        spill.read(-1, 10)
    spill.close()


def test_read_waits_for_the_write_before_it(tmp_path, monkeypatch):
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda *args: time.sleep(0.05) or pwrite(*args))
    spill = SpillFile(tmp_path, 100)
    for value in (1, 2, 3):
        spill.write(0, np.full(100, value, np.uint8))
    assert (spill.read(0, 100).result() == 3).all()
    spill.close()


def test_short_writes_and_reads_are_continued(tmp_path, monkeypatch):
    pwrite, preadv = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:7], at))
    monkeypatch.setattr(os, "preadv", lambda fd, targets, at: preadv(fd, [targets[0][:5]], at))
    spill, array = SpillFile(tmp_path, 1000), np.arange(200, dtype=np.uint8)
    spill.write(300, array)
    assert (spill.read(300, 200).result() == array).all()
    spill.close()


def test_unwritten_bytes_are_bounded_and_the_wait_is_counted(tmp_path, monkeypatch):
    handed, written, unwritten, pwrite = 0, 0, [], os.pwrite

    def slow(fd, data, at):
        nonlocal written
        time.sleep(0.02)
        written += len(data)
        return pwrite(fd, data, at)

    monkeypatch.setattr(os, "pwrite", slow)
    spill = SpillFile(tmp_path, 1000, max_pending_nbytes=250)
    begin = time.perf_counter()
    for i in range(10):
        spill.write(100 * i, np.zeros(100, np.uint8))
        handed += 100
        unwritten.append(handed - written)
    took = time.perf_counter() - begin
    assert max(unwritten) == 200
    assert 0.1 < spill.wait_s <= took
    spill.write(0, np.zeros(1000, np.uint8)).result()  # more than may be pending: alone, it may
    spill.close()


# --- What is left ---------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["os._exit(3)", "os.kill(os.getpid(), 9)", "raise SystemExit(3)"])
def test_nothing_is_left_however_the_process_ends(end, tmp_path):
    code = f"""
import os, sys
from pathlib import Path
import numpy as np
from slowft import platform
from slowft.weights.spill import SpillFile
platform.is_memory_filesystem = lambda path: False
spill = SpillFile(Path(sys.argv[1]), 8 << 20)
spill.write(0, np.ones(4 << 20, np.uint8)).result()
spill.write(4 << 20, np.ones(4 << 20, np.uint8))
print(os.listdir(sys.argv[1]), os.fstat(spill._fd).st_blocks * 512 >= 8 << 20, flush=True)
{end}
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True)
    assert done.returncode in (3, -signal.SIGKILL), done.stderr
    assert done.stdout == "[] True\n"  # no name, and all of its room, while it is used
    assert list(tmp_path.iterdir()) == []


def open_files() -> set[tuple[int, int]]:
    """Device and inode of each file that this process has open. Those of earlier tests may be closed at any time."""
    found = set()
    for fd in os.listdir("/dev/fd"):
        with contextlib.suppress(OSError):  # it was the directory's own
            status = os.fstat(int(fd))
            if stat.S_ISREG(status.st_mode):
                found.add((status.st_dev, status.st_ino))
    return found


def test_close_gives_the_descriptor_back_and_may_be_repeated(tmp_path):
    before = open_files()
    spill = SpillFile(tmp_path / "made" / "for it", 1000)
    assert len(open_files() - before) == 1
    spill.close()
    spill.close()
    assert open_files() <= before


def test_file_cache_stays_small(tmp_path, monkeypatch):
    reason = filecache.why_unavailable(tmp_path)
    if reason:
        must_run(reason)
    spill, held, fds = SpillFile(tmp_path, 64 * MB), {"pwrite": [], "preadv": []}, set()

    def measured(name: str):
        call = getattr(os, name)

        def wrapped(*args):
            done = call(*args)
            fds.add(args[0])
            held[name].append(filecache.nbytes_cached(args[0]))
            return done

        return wrapped

    for name in held:
        monkeypatch.setattr(os, name, measured(name))
    for at in range(0, 64 * MB, 16 * MB):
        spill.write(at, np.frombuffer(os.urandom(16 * MB), np.uint8)).result()
    (fd,) = fds
    assert filecache.nbytes_cached(fd) < MB
    for at in reversed(range(0, 64 * MB, 16 * MB)):
        spill.read(at, 16 * MB).result()
    spill.close()
    assert 0 < max(held["pwrite"]) <= 8 * MB
    assert 0 < max(held["preadv"]) <= 8 * MB


# --- Disks that do not do -------------------------------------------------------------------------


def test_disk_without_room_is_found_before_anything_is_written(tmp_path):
    before, free = open_files(), shutil.disk_usage(tmp_path).free
    message = refusal(SpillFile, tmp_path, 1000 * free)
    assert f"{1000 * free / 1e6:,.0f}"[:3] in message and f"{free / 1e6:,.0f}"[:2] in message
    assert str(tmp_path) in message and "--spill-dir" in message and "--memory" in message
    assert shutil.disk_usage(tmp_path).free > 0.9 * free  # nor was it filled to find out
    assert open_files() <= before and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT])
def test_room_that_the_disk_does_not_grant_is_found_too(error, tmp_path, monkeypatch):
    """By quotas, reserved blocks or another process."""

    def full(fd, nbytes):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(platform, "preallocate", full)
    before = open_files()
    message = refusal(SpillFile, tmp_path, 5 * 10**6)
    assert "need 5.0 MB" in message and "B free" in message and "--spill-dir" in message
    assert open_files() <= before and list(tmp_path.iterdir()) == []


def test_directory_that_cannot_be_used_is_named(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"")
    assert str(file) in refusal(SpillFile, file, 100)
    assert str(file) in refusal(SpillFile, file / "below", 100)


def test_directory_in_memory_is_refused_with_one_that_is_not():
    directory = Path("/dev/shm")
    if not directory.is_dir():
        must_run("no /dev/shm here")
    message = refusal(SpillFile, directory, 100)
    elsewhere = f"--spill-dir with a directory on a disk, such as {platform.cache_directory()}"
    assert "/dev/shm is in memory" in message and elsewhere in message


def failing(monkeypatch, call: str, error: int, times: int) -> list[int]:
    """Have the next `times` calls fail and what they write be lost; returns a list that the offsets of all go to."""
    owner = platform if call == "write_back" else os
    works, pwrite, tries = getattr(owner, call), os.pwrite, []

    def fails(fd, data, offset):
        tries.append(offset if call != "write_back" else data)
        if len(tries) > times:
            return works(fd, data, offset)
        if call == "write_back":  # the kernel gives such pages up, and says so once
            pwrite(fd, bytes(offset), data)
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(owner, call, fails)
    return tries


@pytest.mark.parametrize("error", [errno.EIO, errno.EINTR, errno.EAGAIN])
@pytest.mark.parametrize("call", ["pwrite", "write_back", "preadv"])
def test_error_that_may_pass_is_tried_again(error, call, tmp_path, monkeypatch, no_pauses):
    spill, array = SpillFile(tmp_path, 300), np.arange(200, dtype=np.uint8)
    tries = failing(monkeypatch, call, error, 3)
    spill.write(70, array)
    assert (spill.read(70, 200).result() == array).all()
    assert tries == [70] * 4 and spill.bytes_written == spill.bytes_read == 200
    spill.close()


@pytest.mark.parametrize("error, times", [(errno.ENOSPC, 1), (errno.EIO, 4)])
@pytest.mark.parametrize("call", ["pwrite", "write_back"])
@pytest.mark.parametrize("then", ["write", "read", "close"])
def test_failed_write_is_told_by_the_next_call(error, times, call, then, tmp_path, monkeypatch, no_pauses):
    """Where trying again is no use, as on a full disk, or was none."""
    tries = failing(monkeypatch, call, error, times)
    before, spill = open_files(), SpillFile(tmp_path, 100)
    failed = spill.write(20, np.zeros(10, np.uint8))
    with pytest.raises(SlowftError):
        failed.result()
    assert len(tries) == times
    action = {
        "write": lambda: spill.write(0, np.zeros(10, np.uint8)),
        "read": lambda: spill.read(20, 10),
        "close": spill.close,
    }[then]
    message = refusal(action)
    assert str(tmp_path) in message and "byte 20" in message and os.strerror(error) in message
    assert "To fix it: another --spill-dir" in message
    spill.close()  # told once is enough
    assert open_files() <= before


def test_after_a_failed_write_nothing_waits_for_ever_or_goes_on(tmp_path, monkeypatch):
    tried = []

    def fails(fd, data, at):
        tried.append(at)
        time.sleep(0.05)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", fails)
    spill = SpillFile(tmp_path, 100, max_pending_nbytes=50)
    spill.write(0, np.zeros(25, np.uint8))
    spill.write(25, np.zeros(25, np.uint8))
    read = spill.read(0, 50)
    assert "byte 0" in refusal(lambda: spill.write(50, np.zeros(50, np.uint8)))
    assert "byte 0" in refusal(read.result)
    spill.close()
    assert tried == [0]


def test_failed_read_names_its_place_and_later_reads_work(tmp_path, monkeypatch, no_pauses):
    spill, pwrite, fds = SpillFile(tmp_path, 100), os.pwrite, set()
    monkeypatch.setattr(os, "pwrite", lambda *args: fds.add(args[0]) or pwrite(*args))
    spill.write(0, np.ones(100, np.uint8)).result()
    tries = failing(monkeypatch, "preadv", errno.EIO, 4)
    message = refusal(spill.read(30, 10).result)
    assert str(tmp_path) in message and "byte 30" in message and os.strerror(errno.EIO) in message
    assert "To fix it: another --spill-dir" in message and tries == [30] * 4
    assert spill.read(30, 10).result().tolist() == [1] * 10
    os.ftruncate(fds.pop(), 35)
    assert "activations end at byte 35" in refusal(spill.read(30, 10).result)
    spill.close()


def test_a_disk_that_writes_nothing_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "pwrite", lambda *args: 0)
    spill = SpillFile(tmp_path, 100)
    assert "byte 20" in refusal(spill.write(20, np.zeros(10, np.uint8)).result)
    refusal(spill.read, 0, 10)
    spill.close()
