"""Bytes come from where MLX's own loader takes them, damaged files are named, and no read is made twice for nothing."""

import slowft  # noqa: F401, I001  (before mlx: it loads OpenBLAS)

import errno
import gc
import itertools
import json
import os
import queue
import random
import resource
import shutil
import signal
import struct
import sys
import threading
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from safetensors import safe_open

import filecache
import macos
from conftest import LLAMA, must_run, random_batch, save_random
from slowft import platform
from slowft.bench import cgroup
from slowft.errors import ModelError
from slowft.weights.sources import Layout, Param, Plain
from slowft.weights.cache import BlockCache
from slowft.weights.extents import DTYPES, find_weights, index_model, read_header
from slowft.weights import buffers
from slowft.weights import reader as storage_reader
from slowft.weights.reader import ByteRange, Reader

# --- Index ------------------------------------------------------------------------------------------


def write_safetensors(file: Path, header: dict | bytes, data: bytes = b"") -> Path:
    """A safetensors file by hand: the format's own three parts, right or wrong."""
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)
    return file


def write_shards(directory: Path) -> dict[str, mx.array]:
    """Two shards with an index, of several types and odd sizes, written by MLX; returns the tensors."""
    directory.mkdir(parents=True, exist_ok=True)
    mx.random.seed(0)
    shards = {
        "model-00001-of-00002.safetensors": {
            "embed.weight": mx.random.normal((7, 3)).astype(mx.bfloat16),
            "layers.0.scales": mx.random.normal((5,)).astype(mx.float16),
            "layers.0.weight": mx.random.randint(0, 1 << 30, (5, 3)).astype(mx.uint32),
        },
        "model-00002-of-00002.safetensors": {
            "layers.1.flag": mx.array([True, False, True]),
            "layers.1.weight": mx.random.normal((2, 3, 4)),
            "scalar": mx.array(3.5),
        },
    }
    for name, tensors in shards.items():
        mx.save_safetensors(str(directory / name), tensors, {"format": "mlx"})
    weight_map = {tensor: name for name, tensors in shards.items() for tensor in tensors}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return {name: array for tensors in shards.values() for name, array in tensors.items()}


def bytes_at(extent) -> bytes:
    with open(extent.file, "rb") as file:
        file.seek(extent.offset)
        return file.read(extent.nbytes)


def bytes_of(array: mx.array) -> bytes:
    return bytes(memoryview(array.reshape(-1).view(mx.uint8)))


def assert_same_as_mlx_loads(extents: dict, files) -> None:
    loaded = {name: array for file in files for name, array in mx.load(str(file)).items()}
    assert extents.keys() == loaded.keys()
    for name, array in loaded.items():
        extent = extents[name]
        assert (getattr(mx, extent.dtype), extent.shape) == (array.dtype, array.shape)
        assert bytes_at(extent) == bytes_of(array), name


@pytest.mark.parametrize("stored", DTYPES)
def test_every_type_lies_where_mlx_reads_it(stored, tmp_path):
    itemsize = DTYPES[stored][1]
    nbytes = 6 * itemsize
    header = {
        "__metadata__": {"format": "pt"},
        "second": {"dtype": stored, "shape": [2, 3], "data_offsets": [nbytes, 2 * nbytes]},
        "first": {"dtype": stored, "shape": [6], "data_offsets": [0, nbytes]},
    }
    data = bytes(i % 2 for i in range(2 * nbytes)) if stored == "BOOL" else bytes(range(2 * nbytes))
    file = write_safetensors(tmp_path / "model.safetensors", header, data)
    assert_same_as_mlx_loads(read_header(file), [file])


def test_extents_are_those_of_the_safetensors_library(tmp_path):
    file = tmp_path / "model.safetensors"
    mx.save_safetensors(
        str(file), {"a": mx.arange(12.0).reshape(3, 4), "b": mx.arange(5), "c": mx.ones((2, 2), mx.float16)}
    )
    extents = index_model(tmp_path)
    with safe_open(file, "np") as reference:
        assert extents.keys() == set(reference.keys())
        for name, extent in extents.items():
            assert bytes_at(extent) == reference.get_tensor(name).tobytes()
            assert extent.shape == reference.get_tensor(name).shape


def test_shards_are_indexed_as_mlx_loads_them(tmp_path):
    tensors = write_shards(tmp_path)
    extents = index_model(tmp_path)
    assert_same_as_mlx_loads(extents, sorted(tmp_path.glob("model*.safetensors")))
    assert extents.keys() == tensors.keys()


def test_hub_snapshot_of_symlinks_is_read_through_them(tmp_path):
    """The hub's cache: snapshots/<commit>/name is a relative link to blobs/<hash>."""
    write_shards(tmp_path / "download")
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for i, file in enumerate(sorted((tmp_path / "download").iterdir())):
        file.rename(blobs / f"{i:064x}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"{i:064x}")
    assert_same_as_mlx_loads(index_model(snapshot), sorted(snapshot.glob("model*.safetensors")))


def refusal(function, *args) -> str:
    with pytest.raises(ModelError) as caught:
        function(*args)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def whole(tmp_path) -> Path:
    file = tmp_path / "model.safetensors"
    mx.save_safetensors(str(file), {"a": mx.arange(100), "b": mx.arange(50)})
    return file


def test_file_cut_within_its_data_names_tensor_and_both_sizes(whole):
    size = whole.stat().st_size
    last = max(read_header(whole).values(), key=lambda e: e.offset)
    os.truncate(whole, size - 1)
    message = refusal(index_model, whole.parent)
    assert str(whole) in message and f"tensor {last.name} " in message
    assert f"byte {size}," in message and f"has {size - 1}." in message


def test_file_cut_within_its_header_names_both_sizes(whole):
    (header_nbytes,) = struct.unpack("<Q", whole.read_bytes()[:8])
    os.truncate(whole, 8 + header_nbytes // 2)
    message = refusal(index_model, whole.parent)
    assert str(whole) in message and "cut short" in message
    assert str(8 + header_nbytes) in message and str(8 + header_nbytes // 2) in message


@pytest.mark.parametrize("content", [b"", b"abc", b"<html>404 Not Found</html>", b"\x00" * 64])
def test_other_file_under_that_name_is_not_a_safetensors_file(content, whole):
    whole.write_bytes(content)
    assert f"{whole} is not a safetensors file ({len(content)} bytes)" in refusal(index_model, whole.parent)


@pytest.mark.parametrize("header", [b"{garbage!", b"\xff\xfe\x00\x01", b"[1, 2]", b'"text"'])
def test_garbage_header_is_corrupt(header, tmp_path):
    file = write_safetensors(tmp_path / "model.safetensors", header, bytes(64))
    assert f"{file} has a corrupt header" in refusal(index_model, tmp_path)


@pytest.mark.parametrize(
    "entry",
    [
        [],
        {"dtype": "F32"},
        {"dtype": "F32", "shape": [2], "data_offsets": [0]},
        {"dtype": "F32", "shape": [2], "data_offsets": ["0", "8"]},
        {"dtype": "F32", "shape": ["2"], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [-2], "data_offsets": [8, 0]},
        {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]},
        {"dtype": "F32", "shape": 2, "data_offsets": [0, 8]},
    ],
)
def test_malformed_header_entry_names_its_tensor(entry, tmp_path):
    file = write_safetensors(tmp_path / "model.safetensors", {"layers.0.w": entry}, bytes(64))
    message = refusal(index_model, tmp_path)
    assert message.startswith(f"{file}: ") and "tensor layers.0.w is malformed" in message


def test_extent_that_contradicts_its_shape_names_both_sizes(tmp_path):
    entry = {"dtype": "F16", "shape": [3, 4], "data_offsets": [0, 20]}
    write_safetensors(tmp_path / "model.safetensors", {"w": entry}, bytes(64))
    message = refusal(index_model, tmp_path)
    assert "tensor w [3, 4] of F16 needs 24 bytes" in message and "gives 20" in message


@pytest.mark.parametrize("stored", ["F64", "F8_E5M2", "nonsense"])
def test_type_that_mlx_does_not_read_is_refused(stored, tmp_path):
    entry = {"dtype": stored, "shape": [1], "data_offsets": [0, 8]}
    file = write_safetensors(tmp_path / "model.safetensors", {"w": entry}, bytes(8))
    with pytest.raises(RuntimeError):  # MLX agrees
        mx.eval(mx.load(str(file)))
    assert f"{file}: tensor w is of type {stored}" in refusal(index_model, tmp_path)


def test_missing_shard_is_named_with_the_index_that_names_it(tmp_path):
    write_shards(tmp_path)
    shard = tmp_path / "model-00002-of-00002.safetensors"
    shard.unlink()
    message = refusal(index_model, tmp_path)
    assert f"{shard} is missing" in message and "model.safetensors.index.json" in message


def test_tensor_that_its_shard_does_not_hold_is_named(tmp_path):
    write_shards(tmp_path)
    shard = tmp_path / "model-00002-of-00002.safetensors"
    mx.save_safetensors(str(shard), {"scalar": mx.array(1.0), "layers.1.flag": mx.array([True])})
    message = refusal(index_model, tmp_path)
    assert "layers.1.weight" in message and shard.name in message


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": 3}'])
def test_garbage_shard_index_is_noted_and_the_files_speak_for_themselves(content, tmp_path):
    tensors = write_shards(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(content)
    weights = find_weights(tmp_path)
    assert weights.extents.keys() == tensors.keys()
    assert weights.notes[0].startswith(f"{tmp_path / 'model.safetensors.index.json'} is not a safetensors index")


def test_dangling_symlink_is_a_download_that_did_not_finish(tmp_path):
    link = tmp_path / "model.safetensors"
    link.symlink_to(tmp_path / "blobs" / "0123")
    message = refusal(index_model, tmp_path)
    assert f"{link} is missing" in message and "broken link" in message


def test_directory_under_a_weight_files_name_is_one_line(tmp_path):
    (tmp_path / "model.safetensors").mkdir()
    assert str(tmp_path / "model.safetensors") in refusal(index_model, tmp_path)


def test_directory_without_weights_says_what_it_found_and_what_to_do(tmp_path):
    assert "copy of the model in safetensors" in refusal(index_model, tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    assert "found pytorch_model.bin" in refusal(index_model, tmp_path)
    (tmp_path / "small.gguf").write_bytes(b"x")
    assert f"slowft prepare {tmp_path / 'small.gguf'} --output small" in refusal(index_model, tmp_path)


# --- Reader -----------------------------------------------------------------------------------------


@pytest.fixture
def reader():
    reader = Reader()
    yield reader
    reader.close()


@pytest.fixture
def blob(tmp_path) -> Path:
    file = tmp_path / "blob"
    file.write_bytes(np.random.default_rng(0).bytes(200_000))
    return file


def scattered(file: Path, first: int, sizes: list[int], shuffle: random.Random) -> list[ByteRange]:
    """Ranges that follow each other in the file, each with its place in a buffer, in shuffled order with gaps."""
    offsets = [first + sum(sizes[:i]) for i in range(len(sizes))]
    order = shuffle.sample(range(len(sizes)), len(sizes))
    places, at = {}, 5
    for i in order:
        places[i], at = at, at + sizes[i] + 3
    return [ByteRange(str(file), offsets[i], sizes[i], places[i]) for i in order]


def expected(ranges: list[ByteRange], nbytes: int) -> bytes:
    buffer = bytearray(nbytes)
    for r in ranges:
        with open(r.file, "rb") as file:
            file.seek(r.offset)
            buffer[r.at : r.at + r.nbytes] = file.read(r.nbytes)
    return bytes(buffer)


def test_neighbours_in_a_file_are_one_request_scattered_to_their_places(reader, blob, monkeypatch):
    requests, preadv = [], os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: requests.append(at) or preadv(fd, buffers, at))
    shuffle = random.Random(0)
    ranges = scattered(blob, 1000, [10, 1, 4096, 333, 7], shuffle)
    buffer = bytearray(5000)
    reader.read_now(ranges, memoryview(buffer))
    assert bytes(buffer) == expected(ranges, 5000)
    assert requests == [1000]


def test_ranges_of_several_files_and_places_arrive(reader, blob, tmp_path):
    other = tmp_path / "other"
    other.write_bytes(bytes(range(256)) * 4)
    ranges = [
        ByteRange(str(other), 300, 50, 0),
        ByteRange(str(blob), 7000, 20, 100),
        ByteRange(str(other), 0, 50, 50),
        ByteRange(str(blob), 7000, 20, 130),  # the same bytes twice: tied weights
        ByteRange(str(blob), 0, 0, 160),  # an empty tensor
    ]
    buffer = bytearray(200)
    reader.read_now(ranges, memoryview(buffer))
    assert bytes(buffer) == expected(ranges, 200)


def test_more_neighbours_than_one_system_call_takes_arrive(reader, blob):
    ranges = scattered(blob, 17, [1 + i % 3 for i in range(2500)], random.Random(1))  # IOV_MAX is 1024
    nbytes = 5 + sum(r.nbytes + 3 for r in ranges)
    buffer = bytearray(nbytes)
    reader.read_now(ranges, memoryview(buffer))
    assert bytes(buffer) == expected(ranges, nbytes)


@pytest.mark.parametrize("most", [1, 7, 64, 1000])
def test_short_reads_are_continued_where_they_stopped(most, reader, blob, monkeypatch):
    preadv = os.preadv

    def short(fd, buffers, offset):
        left, some = most, []
        for buffer in buffers:
            some.append(buffer[:left])
            left -= len(some[-1])
            if not left:
                break
        return preadv(fd, some, offset)

    monkeypatch.setattr(os, "preadv", short)
    ranges = scattered(blob, 1000, [10, 1, 700, 333, 7], random.Random(2))
    buffer = bytearray(2000)
    reader.read_now(ranges, memoryview(buffer))
    assert bytes(buffer) == expected(ranges, 2000)
    assert reader.bytes_read == 1051


def test_file_that_ends_early_names_file_and_offset(reader, blob):
    message = refusal(reader.read_now, [ByteRange(str(blob), 199_900, 300, 0)], memoryview(bytearray(300)))
    assert str(blob) in message and "byte 200000" in message and "200 bytes early" in message


def test_file_that_is_cut_while_it_is_used_names_file_and_offset(reader, blob):
    ranges = [ByteRange(str(blob), 0, 200_000, 0)]
    reader.read_now(ranges, memoryview(bytearray(200_000)))
    os.truncate(blob, 150_000)
    message = refusal(reader.read_now, ranges, memoryview(bytearray(200_000)))
    assert str(blob) in message and "byte 150000" in message


def failing(monkeypatch, error: int, times: int) -> list[int]:
    """Have the next `times` reads fail; returns a list that the offsets of all tries go to."""
    preadv, tries = os.preadv, []

    def fails(fd, buffers, offset):
        tries.append(offset)
        if len(tries) <= times:
            raise OSError(error, os.strerror(error))
        return preadv(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", fails)
    return tries


@pytest.mark.parametrize("error", [errno.EIO, errno.EINTR, errno.EAGAIN])
def test_error_that_may_pass_is_tried_again(error, reader, blob, monkeypatch, no_pauses):
    tries = failing(monkeypatch, error, 3)
    ranges, buffer = [ByteRange(str(blob), 4242, 10, 0)], bytearray(10)
    reader.read_now(ranges, memoryview(buffer))
    assert bytes(buffer) == expected(ranges, 10) and tries == [4242] * 4


@pytest.mark.parametrize("error, times", [(errno.EIO, 4), (errno.EBADF, 1)])
def test_failing_disk_names_file_offset_and_reason_and_later_reads_work(
    error, times, reader, blob, monkeypatch, no_pauses
):
    """An error that stays, or one where trying again is no use."""
    tries = failing(monkeypatch, error, times)
    ranges, buffer = [ByteRange(str(blob), 4242, 10, 0)], bytearray(10)
    message = refusal(reader.read_now, ranges, memoryview(buffer))
    assert str(blob) in message and "byte 4242" in message and os.strerror(error) in message
    assert len(tries) == times
    reader.read_now(ranges, memoryview(buffer))
    assert bytes(buffer) == expected(ranges, 10)


def write_within(file: Path) -> None:
    with open(file, "r+b") as f:
        f.write(b"x")
    os.utime(file, ns=(0, 0))  # on a clock that ticks coarsely


def append_to(file: Path) -> None:
    with open(file, "ab") as f:
        f.write(b"x")


def replace(file: Path) -> None:
    stat = file.stat()
    other = file.with_name("other")
    other.write_bytes(bytes(stat.st_size))
    os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    os.replace(other, file)


CHANGES = [(write_within, "written to"), (append_to, "had 200000 bytes and has 200001"), (replace, "another file")]


@pytest.mark.parametrize("change, what", CHANGES)
@pytest.mark.parametrize("when", ["before it is opened", "between reads", "while it is read"])
def test_changed_file_is_refused_with_what_changed(when, change, what, reader, blob, monkeypatch):
    ranges, buffer = [ByteRange(str(blob), 500, 100, 0)], memoryview(bytearray(100))
    if when == "before it is opened":
        reader.expect_unchanged([str(blob)])
    else:
        reader.read_now(ranges, buffer)
    if when == "while it is read":
        preadv = os.preadv
        monkeypatch.setattr(os, "preadv", lambda *args: (preadv(*args), change(blob))[0])
    else:
        change(blob)
    message = refusal(reader.read_now, ranges, buffer)
    assert f"{blob} was changed" in message and "byte 500" in message and what in message


def test_deleted_file_is_read_on(reader, blob):
    ranges, buffer = [ByteRange(str(blob), 500, 100, 0)], bytearray(100)
    reader.read_now(ranges, memoryview(bytearray(100)))
    data = expected(ranges, 100)
    blob.unlink()
    reader.read_now(ranges, memoryview(buffer))
    assert bytes(buffer) == data


def test_file_that_is_gone_before_it_is_read_is_named(reader, tmp_path):
    gone = str(tmp_path / "gone")
    assert gone in refusal(reader.expect_unchanged, [gone])


def test_file_that_is_gone_is_named(reader, tmp_path):
    gone = str(tmp_path / "gone")
    assert gone in refusal(reader.read_now, [ByteRange(gone, 0, 1, 0)], memoryview(bytearray(1)))


def test_bytes_read_and_time_waited_are_counted(reader, blob, monkeypatch):
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda *args: time.sleep(0.05) or preadv(*args))
    read = reader.submit(
        [ByteRange(str(blob), 0, 100, 0), ByteRange(str(blob), 100, 23, 100)], memoryview(bytearray(123))
    )
    reader.wait(read)
    assert reader.bytes_read == 123
    assert 0.04 < reader.wait_s < 5
    reader.read_now([ByteRange(str(blob), 50, 77, 0)], memoryview(bytearray(77)))
    assert reader.bytes_read == 200


def test_signals_do_not_break_reads_off(reader, blob, monkeypatch):
    """Not the reader's doing but Python's (PEP 475), and relied on: a pipe makes preadv slow enough to be hit."""
    signals, before = [], signal.signal(signal.SIGALRM, lambda *_: signals.append(1))
    ends, threads = os.pipe(), queue.SimpleQueue()

    def from_pipe(fd, buffers, at):
        threads.put(threading.get_ident())
        return os.readv(ends[0], buffers)

    monkeypatch.setattr(os, "preadv", from_pipe)
    try:
        buffer = bytearray(100)
        read = reader.submit([ByteRange(str(blob), 0, 100, 0)], memoryview(buffer))
        thread = threads.get(timeout=10)
        for _ in range(5):
            time.sleep(0.02)
            signal.pthread_kill(thread, signal.SIGALRM)
        os.write(ends[1], b"x" * 100)
        reader.wait(read)
    finally:
        signal.signal(signal.SIGALRM, before)
        for end in ends:
            os.close(end)
    assert bytes(buffer) == b"x" * 100 and len(signals) > 2


MB = 1 << 20
RUN_NBYTES, N_RUNS = 32 * MB, 5


@pytest.fixture
def cold_file(tmp_path) -> Path:
    """Larger than all that may be cached of it, on the disk, and not cached."""
    file = tmp_path / "cold"
    with open(file, "wb") as out:
        for _ in range(N_RUNS):
            out.write(os.urandom(RUN_NBYTES))
        out.flush()
        os.fsync(out.fileno())
        if sys.platform == "linux":
            os.posix_fadvise(out.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return file


def test_file_cache_stays_small_where_nothing_is_read_directly(reader, cold_file, monkeypatch):
    """Never a whole run, and no read-ahead left behind by each: forward and backward, at odd offsets."""
    reason = filecache.why_unavailable(cold_file.parent)
    if reason:
        must_run(reason)
    monkeypatch.setattr(platform, "open_direct", lambda *_: None)
    held, preadv = [], os.preadv
    with open(cold_file, "r+b") as file:

        def measured(*args):
            got = preadv(*args)
            held.append(filecache.nbytes_cached(file.fileno()))
            return got

        assert filecache.nbytes_cached(file.fileno()) == 0
        monkeypatch.setattr(os, "preadv", measured)
        buffer = memoryview(bytearray(RUN_NBYTES))
        for run in [*range(N_RUNS), *reversed(range(N_RUNS))]:
            start = run * RUN_NBYTES + 77
            reader.read_now([ByteRange(str(cold_file), start, RUN_NBYTES - 100, 0)], buffer)
    assert 0 < max(held) <= 4 * MB + 3 * filecache.read_ahead_nbytes(cold_file)


# --- Reader, directly -------------------------------------------------------------------------------


def direct_calls(reader: Reader, file: Path, monkeypatch) -> list[tuple[int, int]]:
    """A list that (offset, bytes asked) of every read past the file cache goes to, while through it none may go."""
    preadv, calls = os.preadv, []

    def watched(fd, targets, offset):
        assert fd != reader.descriptor(str(file))
        calls.append((offset, sum(len(t) for t in targets)))
        return preadv(fd, targets, offset)

    monkeypatch.setattr(os, "preadv", watched)
    return calls


def test_a_model_has_more_shards_than_a_shell_lets_be_open(tmp_path):
    """256 on macOS; here 32 more than there are."""
    whole, sharded = save_random(tmp_path / "whole", LLAMA | {"num_hidden_layers": 8}), tmp_path / "sharded"
    sharded.mkdir()
    shutil.copy(whole / "config.json", sharded)
    tensors = mx.load(str(whole / "model.safetensors"))
    for name, tensor in tensors.items():
        mx.save_safetensors(str(sharded / f"model-{name}.safetensors"), {name: tensor})
    weight_map = {name: f"model-{name}.safetensors" for name in tensors}
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 512:
        must_run("no more files may be open")
    in_use = set(map(int, os.listdir("/dev/fd")))
    free = itertools.islice((number for number in itertools.count() if number not in in_use), 32)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(free) + 1, hard))
    try:
        losses = []
        for directory in (sharded, whole):
            with slowft.open_model(directory) as model:
                losses.append(model.loss(*random_batch(256))[0].item())
                assert len(model.engine.cut.files) == (len(tensors) if directory == sharded else 1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(tensors) > 64 and losses[0] == losses[1]


def opens_directly(file: str) -> bool:
    fd = platform.open_uncached(file)
    direct_fd = platform.open_direct(file, fd)
    for one in {fd, direct_fd} - {None}:
        os.close(one)
    return direct_fd is not None


@pytest.fixture
def large_blob(tmp_path) -> Path:
    if not buffers.reads_directly() or not opens_directly(__file__):
        must_run("nothing is read directly here")
    file = tmp_path / "large"
    file.write_bytes(np.random.default_rng(0).bytes(5 * MB + 1234))
    return file


@pytest.mark.parametrize("first, nbytes", [(0, 5 * MB + 1234), (4096, 4 * MB), (77, 3 * MB), (MB - 1, 4 * MB + 1235)])
@pytest.mark.parametrize("in_flight", [1, 4])
def test_any_stretch_of_a_file_is_read_directly_into_an_mlx_buffer(
    first, nbytes, in_flight, reader, large_blob, monkeypatch
):
    """Aligned or not, up to the file's last byte, and nothing beside it is touched."""
    monkeypatch.setattr(storage_reader, "DIRECT_REQUEST_NBYTES", MB // 2)
    reader.reads_in_flight = in_flight
    at = 8192 + buffers.shift(first)
    buffer = buffers.read_buffer(at + nbytes + 100)
    data, calls = memoryview(buffer), direct_calls(reader, large_blob, monkeypatch)
    data[:at], data[at + nbytes :] = b"a" * at, b"z" * 100
    reader.read_now([ByteRange(str(large_blob), first, nbytes, at)], data)
    assert bytes(memoryview(buffer)) == b"a" * at + large_blob.read_bytes()[first : first + nbytes] + b"z" * 100
    assert max(n for _, n in calls) == MB // 2 and reader.bytes_read == nbytes


def test_small_neighbours_of_large_ranges_are_read_directly_too(reader, large_blob, monkeypatch):
    calls = direct_calls(reader, large_blob, monkeypatch)
    at = buffers.shift(3 * MB)
    ranges = [ByteRange(str(large_blob), 3 * MB, 2 * MB, at)]
    ranges += [ByteRange(str(large_blob), 100 + 50 * i, 50, at + 3 * MB - 60 * i) for i in range(5)]
    buffer = buffers.read_buffer(at + 4 * MB)
    reader.read_now(ranges, memoryview(buffer))
    for r in ranges:
        assert bytes(memoryview(buffer))[r.at : r.at + r.nbytes] == large_blob.read_bytes()[r.offset :][: r.nbytes]
    assert calls[0] == (0, 4096)


@pytest.mark.parametrize("in_flight", [1, 4])
def test_requests_in_flight_are_as_many_as_asked_in_the_order_of_the_file(in_flight, reader, large_blob, monkeypatch):
    monkeypatch.setattr(storage_reader, "DIRECT_REQUEST_NBYTES", MB // 2)
    preadv, lock, under_way, seen, order = os.preadv, threading.Lock(), set(), [], []

    def slow(fd, targets, offset):
        with lock:
            under_way.add(offset)
            seen.append(len(under_way))
            order.append(offset)
        time.sleep(0.01)
        try:
            return preadv(fd, targets, offset)
        finally:
            with lock:
                under_way.discard(offset)

    monkeypatch.setattr(os, "preadv", slow)
    reader.reads_in_flight = in_flight
    reader.read_now([ByteRange(str(large_blob), 0, 5 * MB, 0)], memoryview(buffers.read_buffer(5 * MB)))
    assert max(seen) == in_flight
    for place, offset in enumerate(order):
        assert abs(offset // (MB // 2) - place) < in_flight


def test_short_direct_reads_are_continued(reader, large_blob, monkeypatch):
    """Also those that stop within a sector, from where none can go on."""
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, targets, at: min(preadv(fd, targets, at), 777_777))
    at = buffers.shift(100)
    buffer = buffers.read_buffer(at + 5 * MB)
    reader.read_now([ByteRange(str(large_blob), 100, 5 * MB, at)], memoryview(buffer))
    assert bytes(memoryview(buffer))[at:] == large_blob.read_bytes()[100 : 100 + 5 * MB]
    assert reader.is_direct(str(large_blob))  # it was not given up for the file cache


@pytest.mark.parametrize("nbytes", [5 * MB + 1234 + 1, 6 * MB])
@pytest.mark.parametrize("in_flight", [1, 4])
def test_file_that_ends_early_is_named_by_direct_reads(nbytes, in_flight, reader, large_blob):
    reader.reads_in_flight = in_flight
    message = refusal(
        reader.read_now, [ByteRange(str(large_blob), 0, nbytes, 0)], memoryview(buffers.read_buffer(nbytes))
    )
    assert str(large_blob) in message and f"byte {5 * MB + 1234}, " in message
    assert f"{nbytes - 5 * MB - 1234} bytes early" in message or nbytes == 6 * MB


@pytest.mark.parametrize("in_flight", [1, 4])
def test_failing_disk_is_named_by_direct_reads_after_the_last_one_ended(
    in_flight, reader, large_blob, monkeypatch, no_pauses
):
    monkeypatch.setattr(storage_reader, "DIRECT_REQUEST_NBYTES", MB // 2)
    reader.reads_in_flight = in_flight
    preadv, lock, under_way, tries = os.preadv, threading.Lock(), [], []

    def fails(fd, targets, offset):
        with lock:
            under_way.append(offset)
        try:
            if offset == MB:
                tries.append(offset)
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            time.sleep(0.02)
            return preadv(fd, targets, offset)
        finally:
            with lock:
                under_way.remove(offset)

    monkeypatch.setattr(os, "preadv", fails)
    ranges, buffer = [ByteRange(str(large_blob), 0, 5 * MB, 0)], buffers.read_buffer(5 * MB)
    message = refusal(reader.read_now, ranges, memoryview(buffer))
    assert under_way == [] and len(tries) == 4
    assert f"{large_blob}: reading at byte {MB} failed: {os.strerror(errno.EIO)}" in message
    monkeypatch.setattr(os, "preadv", preadv)
    reader.read_now(ranges, memoryview(buffer))
    assert bytes(memoryview(buffer)) == expected(ranges, 5 * MB)


@pytest.mark.parametrize("error", [errno.EINVAL, errno.EFAULT])
def test_file_system_without_direct_reads_is_read_through_the_file_cache(error, reader, large_blob, monkeypatch):
    preadv = os.preadv

    def none(fd, targets, offset):
        if fd != reader.descriptor(str(large_blob)):
            raise OSError(error, os.strerror(error))
        return preadv(fd, targets, offset)

    monkeypatch.setattr(os, "preadv", none)
    ranges, buffer = [ByteRange(str(large_blob), 0, 5 * MB, 0)], buffers.read_buffer(5 * MB)
    for _ in range(2):
        reader.read_now(ranges, memoryview(buffer))
        assert bytes(memoryview(buffer)) == expected(ranges, 5 * MB)
    assert not reader.is_direct(str(large_blob))


@pytest.mark.parametrize("place", ["as in the file", "elsewhere"])
def test_direct_reads_leave_nothing_in_the_file_cache(place, reader, cold_file):
    """Nor does the kernel read ahead of them: files as MLX writes them, aligned to nothing, were read 1.6 times."""
    reason = filecache.why_unavailable(cold_file.parent)
    if reason or not buffers.reads_directly():
        must_run(reason or "nothing is read directly here")
    reader.reads_in_flight, start = 4, 77
    buffer = buffers.read_buffer(RUN_NBYTES + 4096)
    for run in (0, 1, 3, 2):
        offset = run * RUN_NBYTES + start
        at = offset % platform.DIRECT_ALIGNMENT if place == "as in the file" else 0
        reader.read_now([ByteRange(str(cold_file), offset, RUN_NBYTES, at)], memoryview(buffer))
    with open(cold_file, "r+b") as file:
        assert filecache.nbytes_cached(file.fileno()) == 0


def test_large_buffers_begin_on_a_page(reader):
    if not buffers.reads_directly():
        must_run("nothing is read directly here")
    for nbytes in (MB, MB + 1, 7 * MB):
        buffer = buffers.read_buffer(nbytes)
        data = np.asarray(memoryview(buffer))
        assert buffer.nbytes == nbytes and data.ctypes.data % 4096 == 0
        data[:], data[-1] = 3, 5  # the array's own memory, to its last byte
        assert (buffer[0].item(), buffer[-1].item()) == (3, 5)


READ_RUNS = """
import sys
from slowft.weights import buffers
from slowft.weights import reader as storage_reader
from slowft.weights.reader import ByteRange, Reader
file, run_nbytes, order = sys.argv[1], int(sys.argv[2]), sys.argv[3]
buffer, reader = bytearray(b'1') * run_nbytes, Reader()  # its pages exist
for run in order:
    reader.read_now([ByteRange(file, int(run) * run_nbytes, run_nbytes, 0)], memoryview(buffer))
"""


def test_kernel_counts_little_more_than_the_buffer_for_a_read(cold_file):
    """In a memory cgroup, which counts the file cache: its peak with and without reads."""
    reason = cgroup.why_unavailable() or filecache.why_unavailable(cold_file.parent)
    if reason:
        must_run(reason)
    peaks = []
    for order in ("", "01234", "43210"):
        command = [sys.executable, "-c", READ_RUNS, str(cold_file), str(RUN_NBYTES), order]
        done, peak = cgroup.run(command, 2 << 30)
        assert done.returncode == 0, done.stderr
        peaks.append(peak)
    if not peaks[0]:
        must_run("this kernel keeps no peak for a cgroup")
    assert max(peaks) - peaks[0] <= 4 * MB + 3 * filecache.read_ahead_nbytes(cold_file)


# --- Reader, on macOS -------------------------------------------------------------------------------


@pytest.fixture(params=[4096, 16384], ids=["Intel", "Apple Silicon"])
def mac(request, monkeypatch) -> macos.Mac:
    return macos.simulate(monkeypatch, request.param)


@pytest.fixture
def mac_blob(tmp_path, mac) -> Path:
    file = tmp_path / "large"
    file.write_bytes(np.random.default_rng(0).bytes(5 * MB + 1234))
    return file


class Requests:
    """What a reader that fills `buffer` asked of the system, by file offset, bytes, and addresses."""

    def __init__(self, buffer: memoryview, monkeypatch):
        preadv, self.asked = os.preadv, []
        begin = np.frombuffer(buffer, np.uint8).ctypes.data
        self._places = range(begin, begin + len(buffer))

        def watched(fd, targets, offset):
            places = [(np.frombuffer(t, np.uint8).ctypes.data, len(t)) for t in targets]
            self.asked.append((fd, offset, places))
            return preadv(fd, targets, offset)

        monkeypatch.setattr(os, "preadv", watched)

    def of_memory(self, bounced: bool) -> list[tuple[int, int]]:
        """(file offset, bytes) of each request to the reader's own memory, or to the caller's."""
        return [(at, sum(n for _, n in p)) for _, at, p in self.asked if (p[0][0] not in self._places) == bounced]

    def assert_aligned(self) -> None:
        for _, offset, places in self.asked:
            # Linux puts the reader's own memory on its pages
            page = platform.DIRECT_ALIGNMENT if places[0][0] in self._places else 4096
            assert len(places) == 1 and places[0][0] % page == 0
            assert offset % platform.DIRECT_ALIGNMENT == 0 and places[0][1] % platform.DIRECT_ALIGNMENT == 0


def assert_uncached(mac: macos.Mac, requests: Requests) -> None:
    uncached = {args[0] for name, args in mac.calls if name == "fcntl" and args[1:] == (48, 1)}
    assert requests.asked and {fd for fd, _, _ in requests.asked} <= uncached
    assert "mmap" not in [name for name, _ in mac.calls]  # pages are not dropped request by request


STRETCHES = {
    "whole file": (0, 5 * MB + 1234),
    "pages": (32768, 4 * MB),
    "odd": (77, 3 * MB),
    "to the end": (MB - 1, 4 * MB + 1235),
    "just large": (16380, MB),
}


@pytest.mark.parametrize("first, nbytes", STRETCHES.values(), ids=STRETCHES)
@pytest.mark.parametrize("in_flight", [1, 4])
@pytest.mark.parametrize("place", ["as in the file", "elsewhere"])
def test_macos_reads_whole_pages_wherever_they_go(first, nbytes, in_flight, place, mac, mac_blob, reader, monkeypatch):
    """In place, but for what is left at the ends; all by way of the reader's memory where bytes go elsewhere."""
    monkeypatch.setattr(storage_reader, "DIRECT_REQUEST_NBYTES", MB // 2)
    reader.reads_in_flight, page = in_flight, platform.DIRECT_ALIGNMENT
    at = 2 * page + first % page + 64 * (place == "elsewhere")
    buffer = buffers.read_buffer(at + nbytes + 100)
    data, requests = memoryview(buffer), Requests(memoryview(buffer), monkeypatch)
    data[:at], data[at + nbytes :] = b"a" * at, b"z" * 100
    reader.read_now([ByteRange(str(mac_blob), first, nbytes, at)], data)
    assert bytes(memoryview(buffer)) == b"a" * at + mac_blob.read_bytes()[first : first + nbytes] + b"z" * 100
    requests.assert_aligned()
    assert_uncached(mac, requests)
    in_place, bounced = requests.of_memory(False), requests.of_memory(True)
    if place == "elsewhere":
        assert in_place == [] and len(bounced) == -(-(first + nbytes) // MB) - first // MB
    else:
        assert sum(n for _, n in in_place) > nbytes - 2 * page and max(n for _, n in in_place) <= MB // 2
        assert len(bounced) == (first % page > 0) + ((first + nbytes) % page > 0)
    asked = sorted(in_place + bounced)
    assert all(offset + n <= following for (offset, n), (following, _) in zip(asked, asked[1:]))  # nothing twice


@pytest.mark.parametrize("first", [0, 3000])
@pytest.mark.parametrize("in_flight", [1, 4])
def test_macos_reads_scattered_and_tiny_ranges(first, in_flight, mac, mac_blob, reader, monkeypatch):
    reader.reads_in_flight = in_flight
    ranges = scattered(mac_blob, first, [10, 2 * MB + 3, 1, 4096, MB - 7, 333, 7], random.Random(0))
    nbytes = 4 * MB
    buffer = bytearray(nbytes)
    requests = Requests(memoryview(buffer), monkeypatch)
    reader.read_now(ranges, memoryview(buffer))
    assert bytes(buffer) == expected(ranges, nbytes)
    requests.assert_aligned()
    assert_uncached(mac, requests)
    few = [ByteRange(str(mac_blob), 5 * MB + 1230, 4, 0), ByteRange(str(mac_blob), 4095, 2, 10)]
    buffer = bytearray(20)
    reader.read_now(few, memoryview(buffer))
    assert bytes(buffer) == expected(few, 20)
    assert_uncached(mac, requests)


@pytest.mark.parametrize("shift", [0, 64])
@pytest.mark.parametrize("in_flight", [1, 4])
def test_macos_has_as_many_requests_in_flight_as_asked(shift, in_flight, mac, mac_blob, reader, monkeypatch):
    """Both to where bytes lie as in the file and to elsewhere."""
    monkeypatch.setattr(storage_reader, "DIRECT_REQUEST_NBYTES", MB // 2)
    preadv, lock, under_way, seen = os.preadv, threading.Lock(), set(), []

    def slow(fd, targets, offset):
        with lock:
            under_way.add(offset)
            seen.append(len(under_way))
        time.sleep(0.01)
        try:
            return preadv(fd, targets, offset)
        finally:
            with lock:
                under_way.discard(offset)

    monkeypatch.setattr(os, "preadv", slow)
    reader.reads_in_flight = in_flight
    buffer = buffers.read_buffer(5 * MB + shift)
    reader.read_now([ByteRange(str(mac_blob), 0, 5 * MB, shift)], memoryview(buffer))
    assert bytes(memoryview(buffer))[shift:] == mac_blob.read_bytes()[: 5 * MB]
    assert max(seen) == in_flight


@pytest.mark.parametrize("in_flight", [1, 4])
def test_macos_reads_by_way_of_its_own_pages_where_a_gpus_are_refused(in_flight, mac, mac_blob, reader, monkeypatch):
    buffer = buffers.read_buffer(5 * MB)
    requests = Requests(memoryview(buffer), monkeypatch)
    watched = os.preadv
    begin = np.frombuffer(memoryview(buffer), np.uint8).ctypes.data

    def only_to_own_pages(fd, targets, offset):
        places = [np.frombuffer(target, np.uint8).ctypes.data for target in targets]
        if any(begin <= place < begin + 5 * MB for place in places):
            raise OSError(errno.EFAULT, os.strerror(errno.EFAULT))
        return watched(fd, targets, offset)

    monkeypatch.setattr(os, "preadv", only_to_own_pages)
    reader.reads_in_flight = in_flight
    for _ in range(2):
        reader.read_now([ByteRange(str(mac_blob), 0, 5 * MB, 0)], memoryview(buffer))
        assert bytes(memoryview(buffer)) == mac_blob.read_bytes()[: 5 * MB]
    assert_uncached(mac, requests)


@pytest.mark.parametrize("shift", [0, 64])
@pytest.mark.parametrize("error", [errno.EINVAL, errno.EFAULT])
def test_macos_goes_on_through_the_file_cache_where_pages_are_refused(error, shift, mac, mac_blob, reader, monkeypatch):
    preadv = os.preadv

    def none(fd, targets, offset):
        if reader.is_direct(str(mac_blob)):
            raise OSError(error, os.strerror(error))
        return preadv(fd, targets, offset)

    monkeypatch.setattr(os, "preadv", none)
    reader.reads_in_flight = 4
    buffer = buffers.read_buffer(5 * MB + shift)
    reader.read_now([ByteRange(str(mac_blob), 0, 5 * MB, shift)], memoryview(buffer))
    assert bytes(memoryview(buffer))[shift:] == mac_blob.read_bytes()[: 5 * MB]


@pytest.mark.parametrize("shift", [0, 64])
def test_macos_continues_short_reads(shift, mac, mac_blob, reader, monkeypatch):
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, targets, at: min(preadv(fd, targets, at), 333_333))
    buffer = buffers.read_buffer(5 * MB + 1234 + shift)
    reader.read_now([ByteRange(str(mac_blob), 0, 5 * MB + 1234, shift)], memoryview(buffer))
    assert bytes(memoryview(buffer))[shift:] == mac_blob.read_bytes()
    assert reader.is_direct(str(mac_blob))


@pytest.mark.parametrize("shift", [0, 64])
@pytest.mark.parametrize("in_flight", [1, 4])
def test_macos_names_a_file_that_ends_early(shift, in_flight, mac, mac_blob, reader):
    reader.reads_in_flight = in_flight
    buffer = memoryview(buffers.read_buffer(6 * MB + shift))
    message = refusal(reader.read_now, [ByteRange(str(mac_blob), 0, 5 * MB + 1235, shift)], buffer)
    assert str(mac_blob) in message and f"byte {5 * MB + 1234}, 1 bytes early" in message


def layout_of(file: Path) -> tuple[Layout, dict]:
    extents = read_header(file)
    params = [Param(name, {}, name, Plain(e), mx.zeros(e.shape, getattr(mx, e.dtype))) for name, e in extents.items()]
    return Layout(params), {(e.offset, e.nbytes): e for e in extents.values()}


def write_padded(file: Path, before_data: int) -> None:
    """Tensors as MLX stores them, with data `before_data` bytes past a page of the file."""
    tensors = {"b": ("BF16", 2 * MB), "a": ("U32", 3 * MB), "n": ("BF16", 998), "c": ("F32", MB)}
    header, end = {}, 0
    for name, (dtype, nbytes) in tensors.items():
        itemsize = DTYPES[dtype][1]
        header[name] = {"dtype": dtype, "shape": [nbytes // itemsize], "data_offsets": [end, end + nbytes]}
        end += nbytes
    text = json.dumps(header).encode()
    text += b" " * ((before_data - 8 - len(text)) % 65536)
    write_safetensors(file, text, np.random.default_rng(0).bytes(end))


@pytest.mark.parametrize("device", ["cpu", "gpu"])
@pytest.mark.parametrize("before_data", [0, 16, 8, 4, 3])
def test_macos_puts_tensors_where_kernels_want_them(before_data, device, mac, tmp_path, reader, monkeypatch):
    """On multiples of 16 bytes for a GPU, of an element for a CPU, of 64 if copied there; in place where it can be."""
    file = tmp_path / "model.safetensors"
    write_padded(file, before_data)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(getattr(mx, device)))
    layout, extents = layout_of(file)
    buffer = buffers.read_buffer(max(r.at + r.nbytes for r in layout.ranges))
    requests = Requests(memoryview(buffer), monkeypatch)
    reader.read_now(layout.ranges, memoryview(buffer))
    contents, address = file.read_bytes(), np.asarray(memoryview(buffer)).ctypes.data
    for r in layout.ranges:
        assert bytes(memoryview(buffer))[r.at : r.at + r.nbytes] == contents[r.offset : r.offset + r.nbytes]
        itemsize = getattr(mx, extents[r.offset, r.nbytes].dtype).size
        assert (address + r.at) % (itemsize if device == "cpu" else 16) == 0
        assert (r.at - r.offset) % platform.DIRECT_ALIGNMENT == 0 or (address + r.at) % 64 == 0
    requests.assert_aligned()
    in_place = sum(n for _, n in requests.of_memory(bounced=False))
    fits = before_data % (4 if device == "cpu" else 16) == 0
    assert 4.9 * MB < in_place < 5 * MB + 998 if fits else in_place == 0  # never "c", which follows 998 bytes


def test_large_buffers_begin_on_a_page_of_macos(mac):
    for nbytes in (MB, MB + 1, 7 * MB):
        buffer = buffers.read_buffer(nbytes)
        data = np.asarray(memoryview(buffer))
        assert buffer.nbytes == nbytes and data.ctypes.data % platform.DIRECT_ALIGNMENT == 0
        data[:], data[-1] = 3, 5
        assert (buffer[0].item(), buffer[-1].item()) == (3, 5)


# --- Cache ------------------------------------------------------------------------------------------


class CountingReader(Reader):
    """Counts reads, and ends each one before going on, so that a test's course does not hang on the disk's speed."""

    def __init__(self):
        super().__init__()
        self.n_reads = 0

    def submit(self, ranges, buffer):
        read = super().submit(ranges, buffer)
        read.exception()
        self.n_reads += 1
        return read


def items_of(file: Path, sizes: list[int]) -> list[list[ByteRange]]:
    """One item a size, each of two ranges that lie apart in the file and swap places in the buffer."""
    items, at = [], 0
    for size in sizes:
        half = size // 2
        items.append(
            [ByteRange(str(file), at + 5, half, size - half), ByteRange(str(file), at + half + 9, size - half, 0)]
        )
        at += size + 20
    return items


def soon(holds) -> bool:
    """Whether that comes true. The reader's thread may keep a buffer for a moment after its read has ended."""
    deadline = time.monotonic() + 5
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.001)
    return holds()


def assert_holds(buffer: mx.array, item: list[ByteRange]) -> None:
    nbytes = sum(r.nbytes for r in item)
    assert bytes(memoryview(buffer))[:nbytes] == expected(item, nbytes)


def visit_all(
    reader: Reader, file: Path, sizes: list[int], visits: list[int], capacity: int, copied_first: bool = False
) -> int:
    """Take and release items in this order, checking every buffer; returns bytes MLX held at most for it.

    With `copied_first` the cache is told that an item is released before it is computed with.
    """
    items = items_of(file, sizes)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    cache = BlockCache(reader, items, capacity, slots=1 if copied_first else 2)
    for t, item in enumerate(visits):
        buffer = cache.take(item, visits[t + 1 :])
        assert_holds(buffer, items[item])
        del buffer
        cache.release(item)
    held = mx.get_peak_memory() - before
    cache.clear()
    assert mx.get_active_memory() <= before
    return held


def fewest_reads(visits: list[int], slots: int, next_has_a_slot: bool) -> int:
    """By trying every eviction: the fewest reads that serve `visits` with `slots` equal buffers.

    The item in use occupies a slot; with `next_has_a_slot`, so does the one after it (it is being read).
    """
    fewest = {frozenset(): 0}  # resident items -> reads so far
    for item, following in itertools.zip_longest(visits, visits[1:]):
        needed = {item, following} - {None} if next_has_a_slot else {item}
        reached: dict[frozenset, int] = {}
        for resident, n_reads in fewest.items():
            wanted = resident | needed
            n_evicted = max(0, len(wanted) - slots)
            for evicted in itertools.combinations(wanted - needed, n_evicted):
                state = wanted - set(evicted)
                reached[state] = min(reached.get(state, len(visits)), n_reads + len(needed - resident))
        fewest = reached
    return min(fewest.values())


def n_reads(file: Path, n_items: int, visits: list[int], slots: int, copied_first: bool = False) -> int:
    reader, size = CountingReader(), 64
    visit_all(reader, file, [size] * n_items, visits, slots * size, copied_first)
    reader.close()
    assert reader.bytes_read == reader.n_reads * size
    return reader.n_reads


def test_brute_force_knows_closed_forms():
    forward = list(range(4)) * 3
    assert fewest_reads(forward, 4, False) == 4  # all fit
    assert fewest_reads(forward, 1, False) == 12  # none stays
    there_and_back = (list(range(4)) + list(range(4))[::-1]) * 3
    assert fewest_reads(there_and_back, 2, False) == 4 + 5 * 2  # two stay at every turn, two are read
    # Belady's own example of three slots: 9 faults with OPT
    assert fewest_reads([1, 2, 3, 4, 1, 2, 5, 1, 2, 3, 4, 5], 3, False) == 7


def orders_of(n: int) -> dict[str, list[int]]:
    """One pass over blocks 0..n-1: evaluation, training, training of the last blocks only."""
    there, back = list(range(n)), list(range(n))[::-1]
    return {"forward": there} | {f"back to {k}": there + back[: n - k] for k in range(n)}


SMALL = [(n, slots, order) for n in range(2, 7) for slots in range(1, n + 1) for order in orders_of(n)]


@pytest.mark.parametrize("n, slots, order", SMALL)
def test_reads_are_the_fewest_possible_if_copied_first(n, slots, order, blob):
    """Reading ahead adds nothing to what perfect foresight reads on demand, down to a single buffer."""
    visits = orders_of(n)[order] * 4
    assert n_reads(blob, n, visits, slots, copied_first=True) == fewest_reads(visits, slots, next_has_a_slot=False)


@pytest.mark.parametrize("n, slots, order", [case for case in SMALL if case[1] > 1])
def test_reads_are_the_fewest_possible_with_the_next_one_beside(n, slots, order, blob):
    """An item in use to the end of its visit cannot make room for the next; still no read more than that costs."""
    visits = orders_of(n)[order] * 4
    fewest = fewest_reads(visits, slots, next_has_a_slot=True)
    assert n_reads(blob, n, visits, slots) == fewest
    if order == "back to 0":  # a training step: what was just used is used last, so it costs nothing
        assert fewest == fewest_reads(visits, slots, next_has_a_slot=False)


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_disk_speed_changes_no_read(slots, blob, monkeypatch):
    """Reads that end late, anywhere in a visit, start others later, but not other ones."""
    preadv, slow = os.preadv, random.Random(slots)
    monkeypatch.setattr(os, "preadv", lambda *args: time.sleep(slow.choice([0, 0.002])) or preadv(*args))
    for order in orders_of(5).values():
        reader, items, visits = Reader(), items_of(blob, [400] * 5), order * 3
        cache = BlockCache(reader, items, slots * 400, slots=1)
        for t, item in enumerate(visits):
            assert_holds(cache.take(item, visits[t + 1 :]), items[item])
            time.sleep(slow.choice([0, 0.002]))
            cache.release(item)
            time.sleep(slow.choice([0, 0.002]))
        reader.close()
        assert reader.bytes_read == 400 * fewest_reads(visits, slots, next_has_a_slot=False)


def test_everything_is_read_once_when_everything_fits(blob):
    assert n_reads(blob, 5, (list(range(5)) + list(range(5))[::-1]) * 4, slots=5) == 5


@pytest.mark.parametrize("copied_first", [True, False])
def test_other_orders_too_are_served_with_the_fewest_reads(copied_first, blob):
    order = random.Random(0)
    for _ in range(60):
        n = order.randint(2, 6)
        visits, slots = [order.randrange(n) for _ in range(14)], order.randint(1 if copied_first else 2, n)
        fewest = fewest_reads(visits, slots, next_has_a_slot=not copied_first)
        assert n_reads(blob, n, visits, slots, copied_first) == fewest, (visits, slots)


PAGE = 16384  # MLX rounds buffers up to pages on a Mac


@pytest.mark.parametrize("copied_first", [True, False])
@pytest.mark.parametrize("seed", range(12))
def test_unequal_items_never_exceed_capacity(seed, copied_first, tmp_path):
    order = random.Random(seed)
    sizes = [order.choice([1, 2, 3, 5, 8]) * PAGE for _ in range(order.randint(2, 6))]
    file = tmp_path / "blob"
    file.write_bytes(order.randbytes(sum(sizes) + 20 * len(sizes)))
    cycle = list(range(len(sizes)))
    visits = (cycle if seed % 2 else cycle + cycle[::-1]) * 4
    least = (1 if copied_first else 2) * max(sizes)
    capacity = order.choice([0, least + PAGE, sum(sizes)])
    reader = Reader() if seed % 3 else CountingReader()
    gc.collect()
    held = visit_all(reader, file, sizes, visits, capacity, copied_first)
    reader.close()
    assert max(sizes) <= held < max(capacity, least) + PAGE  # less than any item more: `mx.zeros` makes a scalar


@pytest.mark.parametrize("slots", [5, 4])
def test_lowered_capacity_is_kept_from_the_next_visit_on(slots, tmp_path):
    """Also where everything fitted before, so that nothing has to be read."""
    file, size = tmp_path / "blob", 4 * PAGE
    file.write_bytes(random.Random(0).randbytes(6 * size))
    items, reader = items_of(file, [size] * 5), CountingReader()
    visits = (list(range(5)) + list(range(5))[::-1]) * 2
    gc.collect()
    before = mx.get_active_memory()
    cache = BlockCache(reader, items, slots * size)
    for t, item in enumerate(visits):
        if t == 10:
            assert slots * size <= mx.get_active_memory() - before
            cache.capacity = 3 * size
        buffer = cache.take(item, visits[t + 1 :])
        assert_holds(buffer, items[item])
        del buffer
        if t >= 10:
            assert mx.get_active_memory() - before < 3 * size + PAGE
        cache.release(item)
    reader.close()


def test_small_item_in_a_large_buffer_leaves_room_for_the_large_one(blob):
    """Block 2 comes into block 0's buffer; then block 0 is to be read beside it."""
    reader = CountingReader()
    visit_all(reader, blob, [100, 50, 10], [0, 1, 2] * 3, capacity=0)
    reader.close()


def test_bytes_stay_right_while_the_next_item_is_read(blob, monkeypatch):
    """On a slow disk: reads are under way while a buffer is in use, and must not touch it."""
    preadv, slow = os.preadv, random.Random(0)
    monkeypatch.setattr(os, "preadv", lambda *args: time.sleep(slow.choice([0, 0.001])) or preadv(*args))
    items, reader = items_of(blob, [400] * 4), Reader()
    for slots in (2, 3):
        cache = BlockCache(reader, items, slots * 400)
        visits = (list(range(4)) + list(range(4))[::-1] + [2, 0, 3]) * 5
        for t, item in enumerate(visits):
            buffer = cache.take(item, visits[t + 1 :])
            assert_holds(buffer, items[item])
            time.sleep(slow.choice([0, 0.001, 0.002]))
            assert_holds(buffer, items[item])
            cache.release(item)
        cache.clear()
    reader.close()


def test_next_item_is_read_while_the_present_one_is_in_use(blob):
    items, reader = items_of(blob, [400] * 3), Reader()
    cache = BlockCache(reader, items)
    cache.take(0, [1, 2])
    assert soon(lambda: reader.bytes_read == 800)  # items 0 and 1, not 2
    cache.release(0)
    cache.clear()
    reader.close()


def test_read_starts_at_the_first_visit_that_can_spare_the_room(blob):
    """In 0, 1, 2, 2, 0 what 0 needs is free from the first visit of 2 on: block 1, used after it, makes room."""
    items, reader = items_of(blob, [400] * 3), CountingReader()
    cache, visits = BlockCache(reader, items), [0, 1, 2, 2, 0, 1, 2, 2]
    for t, (item, n_reads) in enumerate(zip(visits[:4], [2, 3, 4, 4])):
        cache.take(item, visits[t + 1 :])
        assert reader.n_reads == n_reads
        cache.release(item)
    cache.clear()
    reader.close()


def test_same_buffer_takes_the_next_item_as_soon_as_it_is_released(blob):
    """With room for one only: nothing is read beside the item in use, the next one while it is computed with."""
    items, reader = items_of(blob, [400] * 3), Reader()
    cache = BlockCache(reader, items, slots=1)
    assert cache.least_capacity == cache.capacity == 400
    before = mx.get_active_memory()
    buffer = cache.take(0, [1, 2, 0])
    time.sleep(0.05)
    assert_holds(buffer, items[0])
    assert reader.bytes_read == 400
    del buffer
    cache.release(0)
    assert soon(lambda: reader.bytes_read == 800)
    cache.release(0)  # again, as where a visit ends
    assert_holds(cache.take(1, [2, 0]), items[1])
    assert reader.bytes_read == 800
    assert mx.get_active_memory() - before < 800  # one buffer, and what of other tests comes or goes
    cache.clear()
    reader.close()


def test_second_item_in_use_at_once_is_refused_where_there_is_room_for_one(blob):
    items, reader = items_of(blob, [400] * 3), Reader()
    cache = BlockCache(reader, items, slots=1)
    cache.take(0, [1])
    with pytest.raises(RuntimeError, match="in use"):
        cache.take(1, [2])
    cache.release(0)
    assert_holds(cache.take(1, [2]), items[1])
    cache.slots = 2  # has no room for it: nothing is read ahead, and nothing fails
    assert_holds(cache.take(1, [2]), items[1])
    cache.clear()
    reader.close()


@pytest.mark.skipif(not buffers.reads_directly(), reason="elsewhere zeros are made")
def test_a_buffer_takes_no_pages_before_it_is_read_to():
    size = 64 << 20
    mx.clear_cache()
    platform.release_freed_memory()
    before = platform.memory_in_use()
    buffer = buffers.read_buffer(size)
    assert (buffer.dtype, buffer.shape) == (mx.uint8, (size,))
    assert platform.memory_in_use() - before < size // 8
    np.asarray(memoryview(buffer))[:] = 1
    assert platform.memory_in_use() - before > size * 7 // 8
    assert mx.all(buffer == 1).item()


def test_trim_gives_memory_back_without_a_visit(tmp_path):
    """To the system: MLX keeps nothing of it either. What is in use stays."""
    file, size = tmp_path / "blob", 16 * PAGE
    file.write_bytes(random.Random(0).randbytes(6 * size))
    items, reader = items_of(file, [size] * 5), CountingReader()
    gc.collect()
    before = mx.get_active_memory()
    cache = BlockCache(reader, items, 5 * size, slots=1)
    for item in range(5):
        cache.take(item, [*range(item + 1, 5), *range(5)])
        cache.release(item)
    buffer = cache.take(2, [3, 4, 0, 1])
    assert mx.get_active_memory() - before >= 5 * size
    cache.capacity, cached = cache.least_capacity, mx.get_cache_memory()
    cache.trim()
    assert mx.get_active_memory() - before < size + PAGE
    assert mx.get_cache_memory() <= cached
    assert_holds(buffer, items[2])
    del buffer
    cache.release(2)
    n_reads = reader.n_reads
    assert_holds(cache.take(3, [4, 0, 1, 2]), items[3])
    assert reader.n_reads - n_reads <= 1
    cache.clear()
    reader.close()


@pytest.mark.parametrize("slots", [1, 2])
def test_capacity_may_change_at_every_visit(slots, tmp_path):
    file, size = tmp_path / "blob", 4 * PAGE
    file.write_bytes(random.Random(0).randbytes(7 * size))
    items, reader, change = items_of(file, [size] * 6), Reader(), random.Random(slots)
    cache = BlockCache(reader, items, slots=slots)
    visits = (list(range(6)) + list(range(6))[::-1]) * 6
    gc.collect()
    before = mx.get_active_memory()
    for t, item in enumerate(visits):
        cache.capacity = change.randint(slots, 6) * size
        buffer = cache.take(item, visits[t + 1 :])
        assert_holds(buffer, items[item])
        del buffer
        assert soon(lambda: mx.get_active_memory() - before < cache.capacity + PAGE)
        cache.release(item)
    cache.clear()
    assert soon(lambda: mx.get_active_memory() <= before)
    reader.close()


def test_unexpected_item_is_served(blob):
    items, reader = items_of(blob, [400] * 4), Reader()
    cache = BlockCache(reader, items)
    for item in (0, 3, 1, 1, 2, 0):  # it is always told that 1, 2, 3 come next
        assert_holds(cache.take(item, [1, 2, 3]), items[item])
        cache.release(item)
    cache.clear()
    reader.close()


def test_failed_read_is_raised_at_its_item_and_tried_again_later(blob, monkeypatch, no_pauses):
    items, reader = items_of(blob, [400] * 3), CountingReader()
    bad = items[1][0].offset
    preadv = os.preadv

    def fails(fd, buffers, offset):
        if offset == bad:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", fails)
    cache = BlockCache(reader, items)
    assert_holds(cache.take(0, [1, 2]), items[0])  # the read ahead of item 1 fails, silently
    cache.release(0)
    assert f"byte {bad}" in refusal(cache.take, 1, [2, 0])
    monkeypatch.setattr(os, "preadv", preadv)
    for item in (1, 2, 0):
        assert_holds(cache.take(item, [2, 0, 1]), items[item])
        cache.release(item)
    cache.clear()
    reader.close()
