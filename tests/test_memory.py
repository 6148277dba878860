"""What is in memory, and what is read, as the operating system counts it."""

import gc
import json
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import slowft
from conftest import LLAMA, largest_difference, must_run, random_batch, save_random
from slowft import platform
from slowft.bench import cgroup
from slowft.models import seams
from slowft.planning.schedule import Schedule
from slowft.weights.reuse import Reuse

SHAPE = LLAMA | {"hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8, "num_key_value_heads": 8}

STEP = """
import json, sys
import slowft
from slowft.models.imports import import_mlx_lm_without_tokenizers
import_mlx_lm_without_tokenizers()
import mlx.core as mx
from slowft import platform
from slowft.models import seams
import mlx_lm.utils, mlx_lm.tuner.utils  # so that what follows measures the model alone
before = platform.memory_in_use()
mx.random.seed(0)
model = slowft.open_model(sys.argv[1])
opened = platform.memory_in_use()
model.add_lora(num_layers=-1, rank=8)
model.train()
batch, lengths = mx.random.randint(0, 256, (2, 65)), mx.array([[1, 64]] * 2)
losses = []
for _ in range(int(sys.argv[2])):
    (loss, _), gradients = model.loss_and_grads(batch, lengths)
    losses.append(loss.item())
    del gradients
print(json.dumps(dict(
    before=before, opened=opened, peak=model.stats.total.peak_memory, active_peak=mx.get_peak_memory(), losses=losses,
    nbytes=model.nbytes_on_disk,
)))
"""


def measure(directory: Path, steps: int = 2) -> dict:
    done = subprocess.run([sys.executable, "-c", STEP, directory, str(steps)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_opening_takes_less_than_a_twentieth_of_the_model(tmp_path):
    measured = measure(save_random(tmp_path / "m", SHAPE | {"num_hidden_layers": 32}, shards=True), steps=0)
    assert measured["nbytes"] > 400e6
    assert measured["opened"] - measured["before"] < 0.05 * measured["nbytes"]


def test_memory_is_flat_over_blocks(tmp_path):
    """8 and 32 equal blocks, forward and backward: the same peak, but for the blocks' stored inputs and adapters."""
    peaks = {}
    for n in (8, 32):
        directory = save_random(tmp_path / str(n), SHAPE | {"num_hidden_layers": n}, mx.bfloat16, shards=True)
        peaks[n] = measure(directory)["active_peak"]
    stored_input = 2 * 64 * 512 * 4
    adapter = 8 * 4 * sum((512 + 512, 512 + 512, 512 + 512, 512 + 512, 512 + 1408, 512 + 1408, 512 + 1408))
    kept_per_block = stored_input + 2 * adapter  # the adapter and its gradient
    block = 4 * (4 * 512 * 512 + 3 * 512 * 1408)
    assert peaks[32] - peaks[8] <= 24 * kept_per_block + 0.1 * block


def test_each_block_is_read_at_most_twice_however_many_micro_batches(tmp_path):
    model = slowft.open_model(save_random(tmp_path / "m", LLAMA | {"num_hidden_layers": 12}))
    model.add_lora(num_layers=-1, rank=4)
    blocks = sum(unit.nbytes for unit in model.engine.cut.blocks)
    head = 256 * 64 * 4
    batch, lengths = random_batch(256)
    rows = 256 * 64 * 4
    read = []
    for n in (1, 4):
        model.loss_and_grads([(batch, lengths)] * n)
        read.append(model.stats.last.bytes_read)
        assert blocks < read[-1] <= 2 * blocks + head + n * rows
    assert read[1] - read[0] <= 3 * rows


def test_backward_stops_at_the_lowest_trained_block(tmp_path):
    model = slowft.open_model(save_random(tmp_path / "m", LLAMA | {"num_hidden_layers": 12}))
    model.add_lora(num_layers=3, rank=4)
    block = model.engine.cut.blocks[0].nbytes
    model.loss_and_grads(*random_batch(256))
    outside = 2 * 256 * 64 * 4  # head and embedding rows
    assert model.stats.last.bytes_read <= (12 + 3 + 1) * block + outside


def test_evaluation_reads_each_block_once(tmp_path):
    model = slowft.open_model(save_random(tmp_path / "m", LLAMA | {"num_hidden_layers": 12}))
    blocks, before = sum(unit.nbytes for unit in model.engine.cut.blocks), model.stats.total.bytes_read
    model.loss(*random_batch(256))
    outside = 2 * 256 * 64 * 4
    assert model.stats.total.bytes_read - before <= blocks + outside + 2 * model.engine.cut.blocks[0].nbytes


def test_a_model_that_is_in_memory_keeps_no_block_buffer(tmp_path):
    """Of the first step, which streams. What MLX holds afterwards is the weights it computes with, and small things."""
    directory = save_random(tmp_path / "m", SHAPE | {"num_hidden_layers": 3}, mx.bfloat16)
    gc.collect()
    before = mx.get_active_memory()
    with slowft.open_model(directory, memory="8GB") as model:
        model.add_lora(num_layers=-1, rank=4).train()
        for _ in range(3):
            model.loss_and_grads(*random_batch(256))
        assert model.engine.schedule.in_memory
        numbers = 4 * 512 * 512 + 3 * 512 * 1408  # of a block
        whole = 4 * (3 * numbers + 256 * 512)  # float32, with the head
        if not platform.MACOS:  # a GPU computes in bfloat16
            assert whole < mx.get_active_memory() - before < whole + numbers


def test_memory_left_over_keeps_blocks_and_changes_no_gradient(tmp_path):
    directory = save_random(tmp_path / "m", SHAPE | {"num_hidden_layers": 12})
    batch, lengths = random_batch(256)
    results = {}
    for memory in (None, "8GB"):
        model = slowft.open_model(directory, memory=memory)
        mx.random.seed(0)
        model.add_lora(num_layers=-1, rank=4)
        for _ in range(3):
            (loss, _), gradients = model.loss_and_grads(batch, lengths)
        results[memory] = model.stats.last.bytes_read, loss.item(), gradients
        model.close()
    blocks = 12 * 4 * (4 * 512 * 512 + 3 * 512 * 1408)
    assert results[None][0] > 1.5 * blocks
    assert results["8GB"][0] < 0.1 * blocks
    assert results[None][1] == results["8GB"][1]
    assert largest_difference(results[None][2], results["8GB"][2]) == 0.0


def test_a_step_that_takes_more_than_its_memory_is_told_once_and_planned_anew(tmp_path):
    """A prediction that proves too low (here: made so) is corrected by what the operating system counted."""
    model = slowft.open_model(save_random(tmp_path / "m", SHAPE | {"num_hidden_layers": 8}), memory="8GB")
    model.add_lora(num_layers=-1, rank=4)
    batch, lengths = random_batch(256)
    for _ in range(3):
        model.loss_and_grads(batch, lengths)
    assert model.followed_plan.is_ordinary
    measured = model.stats.last.peak_memory
    model.budget.memory = measured - 40_000_000
    with pytest.warns(slowft.errors.SlowftWarning, match="more than the memory") as told:
        for _ in range(3):
            model.loss_and_grads(batch, lengths)
    assert len(told) == 1
    assert model.stats.last.peak_memory <= measured - 40_000_000


def test_too_little_memory_is_refused_before_anything_is_read(tmp_path):
    directory = save_random(tmp_path / "m", SHAPE | {"num_hidden_layers": 2})
    with pytest.raises(slowft.SlowftError, match="at least [0-9.]+GB"):
        slowft.open_model(directory, memory="20MB")
    with pytest.raises(slowft.SlowftError, match="8GB"):
        slowft.open_model(directory, memory="lots")


def test_embedding_reads_only_the_rows_of_the_batch(tmp_path):
    config = LLAMA | {"vocab_size": 20000, "num_hidden_layers": 1, "tie_word_embeddings": False}
    model = slowft.open_model(save_random(tmp_path / "m", config))
    before = model.stats.total.bytes_read
    (table,) = [unit for unit in model.engine.cut.outside[seams.Use.ROWS]]
    hidden = model.model.embed_tokens(mx.array([[7, 19999, 7, 9000]]))
    mx.eval(hidden)
    whole = mx.load(str(tmp_path / "m" / "model.safetensors"))["model.embed_tokens.weight"]
    assert table.name == "model.embed_tokens"
    assert mx.array_equal(hidden, whole[mx.array([[7, 19999, 7, 9000]])])
    assert model.stats.total.bytes_read - before == 3 * 64 * 4


def test_file_cache_is_left_alone(tmp_path):
    """The pages of the weight files are not in the file cache after a step (Linux: mincore; macOS: F_NOCACHE)."""
    if sys.platform != "linux":
        pytest.skip("F_NOCACHE leaves nothing to look at")
    directory = save_random(tmp_path / "m", SHAPE | {"num_hidden_layers": 4}, mx.bfloat16)
    subprocess.run(["sync", str(directory / "model.safetensors")], check=True)
    model = slowft.open_model(directory)
    model.add_lora(num_layers=-1, rank=4)
    model.loss_and_grads(*random_batch(256))
    resident = cached_share(directory / "model.safetensors")
    assert resident < 0.1


def cached_share(file: Path) -> float:
    """The share of a file's pages that the kernel holds in memory, by mincore(2)."""
    import ctypes
    import mmap

    nbytes = file.stat().st_size
    pages = -(-nbytes // mmap.PAGESIZE)
    with open(file, "r+b") as handle, mmap.mmap(handle.fileno(), nbytes) as mapped:
        held = (ctypes.c_ubyte * pages)()
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), held) == 0
        share = sum(page & 1 for page in held) / pages
        del address
        import gc

        gc.collect()
    return share


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """A model of over 400 MB."""
    config = SHAPE | {
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_hidden_layers": 20,
    }
    directory = save_random(tmp_path_factory.mktemp("large") / "m", config, mx.bfloat16, shards=True)
    mx.clear_cache()
    return directory


def test_trains_in_less_memory_than_the_model_takes(large):
    """In a cgroup that allows less than the model's size, page cache and swap included."""
    if reason := cgroup.why_unavailable():
        must_run(reason)
    limit = 380_000_000
    done, peak = cgroup.run([sys.executable, "-c", STEP, str(large), "1"], limit)
    assert done.returncode == 0, f"killed under {limit} bytes (peak {peak}): {done.stderr[-2000:]}"
    measured = json.loads(done.stdout)
    assert measured["nbytes"] > 400_000_000
    assert peak <= limit
    free = measure(large, steps=1)
    assert measured["losses"] == free["losses"]


SCORE = """
import json, sys
import slowft
import numpy as np
texts = [(row, 0) for row in np.random.default_rng(0).integers(0, 256, (4, 33)).tolist()]
model = slowft.open_model(sys.argv[1], memory=int(sys.argv[2]))
print(json.dumps([sample.total for sample in slowft.score(model, texts)["base"].samples]))
"""


def test_scores_in_half_the_memory_that_the_model_takes(large):
    if reason := cgroup.why_unavailable():
        must_run(reason)
    limit = 240_000_000
    done, peak = cgroup.run([sys.executable, "-c", SCORE, str(large), str(limit)], limit)
    assert done.returncode == 0 and 0 < peak <= limit, f"under {limit} bytes (peak {peak}): {done.stderr[-2000:]}"
    rows = mx.array(np.random.default_rng(0).integers(0, 256, (4, 33)))
    with slowft.open_model(large) as model:
        assert model.nbytes_on_disk > 2 * limit
        loss, n = model.loss(rows, mx.array([[1, 32]] * 4))
    assert sum(json.loads(done.stdout)) == pytest.approx(-loss.item() * n.item(), rel=1e-5)


def test_peak_memory_is_the_operating_systems(tmp_path):
    platform.release_freed_memory()  # what earlier tests left free in malloc's heap would be taken up
    platform.reset_peak_memory()
    before = platform.peak_memory()
    block = mx.ones((64 << 20,), mx.uint8)
    mx.eval(block)
    assert platform.peak_memory() - before > 60 << 20


def test_arrays_that_are_there_already_take_nothing_from_what_a_step_may_use(tmp_path):
    """MLX is held to a limit of all arrays, the caller's own among them."""
    directory = save_random(tmp_path / "m", SHAPE)

    def room() -> int:
        gc.collect()
        mx.clear_cache()
        platform.release_freed_memory()  # of what tests before left, as planning does: else the ceiling has it in it
        model = slowft.open_model(directory).add_lora(num_layers=-1, rank=4)
        held = mx.get_active_memory()
        model.plan(2, 128, memory=platform.memory_in_use() + (200 << 20), follow=True)
        limit = mx.set_memory_limit(1 << 40)
        model.close()
        return limit - held

    usual = room()
    own = mx.ones((150 << 18,))  # of 4 bytes
    mx.eval(own)
    assert abs(room() - usual) < 20 << 20


def test_the_heads_own_limit_holds_in_the_head_alone():
    def limit() -> int:
        found = mx.set_memory_limit(1 << 40)
        mx.set_memory_limit(found)
        return found

    def fail():
        raise ValueError

    blocks, head = 3 << 30, 2 << 30
    mx.set_memory_limit(blocks)  # as `Engine.follow` does
    reuse = Reuse(Schedule(cache_nbytes=0, active_nbytes=blocks, head_active_nbytes=head))
    with reuse.computing():
        assert limit() == blocks
    with reuse.computing(is_head=True):
        assert limit() == head
    assert limit() == blocks
    with pytest.raises(ValueError), reuse.computing(is_head=True):
        fail()
    assert limit() == blocks


def test_in_the_least_memory_blocks_may_use_all_that_is_planned_for_arrays(tmp_path):
    """MLX beyond its limit computes on one core at a time."""
    model = slowft.open_model(save_random(tmp_path / "m", SHAPE)).add_lora(num_layers=-1, rank=4)
    plan = model.plan(2, 128, memory=model.planner(2, 128).least().peak_nbytes, follow=True)
    held = mx.get_active_memory()
    arrays = plan.peak_nbytes - plan.parts["process"] - plan.parts["slack"] + held
    assert arrays <= mx.set_memory_limit(1 << 40)
    model.close()
