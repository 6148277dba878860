"""Steps that begin at stored activations give the gradients of whole ones, to the last bit, or do not begin there."""

import errno
import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from test_cli import COMPLETIONS, Command, write_splits
from test_gradients import save_quantized
from test_plan import MACHINES

import slowft
from architectures import ARCHITECTURES
from conftest import (
    LLAMA,
    in_memory,
    largest,
    largest_difference,
    random_batch,
    randomise,
    reference,
    save_random,
)
from slowft import platform
from slowft.data.store import TokenDataset
from slowft.engine import boundary, budget
from slowft.engine.model import StreamedModel
from slowft.errors import ConfigError, SlowftError, SlowftWarning
from slowft.planning.schedule import Schedule
from slowft.weights import activation_cache
from slowft.weights.activation_cache import ActivationCache
from slowft.weights.extents import index_model
from slowft.weights.reader import Reader

LORA = {"num_layers": 2, "rank": 4, "scale": 2.0}


@pytest.fixture(autouse=True)
def temporary_files_on_disk(tmp_path, monkeypatch):
    """/tmp may be a tmpfs, and is good enough for most of this."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr(platform, "is_memory_filesystem", lambda path: not path.is_relative_to(tmp_path))


def opened(directory, store=None, compute_dtype="float32", **lora) -> StreamedModel:
    model = slowft.open_model(directory, compute_dtype=compute_dtype)
    mx.random.seed(1)
    model.add_lora(**(LORA | lora))
    randomise(model)
    model.train()
    return model if store is None else model.cache_activations(store)


def assert_step_equals(whole, streamed, batch, lengths, from_cache):
    """`whole` in memory, by mlx-lm and MLX alone."""
    loss, gradients = reference(whole, batch, lengths)
    assert largest(gradients) > 1e-4  # something to compare
    (streamed_loss, _), streamed_gradients = streamed.loss_and_grads(batch, lengths)
    assert streamed_loss.item() == loss.item()
    assert largest_difference(gradients, streamed_gradients) == 0.0
    assert streamed.stats.last.from_cache == from_cache


def assert_same_step(plain, caching, micro_batches, from_cache):
    """`plain` is a streamed model that stores nothing."""
    (loss, _), gradients = plain.loss_and_grads(micro_batches)
    (other_loss, _), other_gradients = caching.loss_and_grads(micro_batches)
    assert loss.item() == other_loss.item()
    assert largest_difference(gradients, other_gradients) == 0.0
    assert caching.stats.last.from_cache == from_cache


def batches(*seeds, rows=3, tokens=24, vocab=256):
    return [random_batch(vocab, rows + seed % 2, tokens + 8 * (seed % 3), seed) for seed in seeds]


def entries(store: Path) -> list[Path]:
    return sorted(store.glob("*.activation"))


# --- The same gradients -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gradients_equal_in_memory(name, tmp_path):
    config = ARCHITECTURES[name]
    directory = save_random(tmp_path / "m", config)
    whole, streamed = in_memory(directory, **LORA), opened(directory)
    randomise(whole, streamed)
    whole.train()
    if not streamed.engine.cut.is_chain:
        with pytest.raises(ConfigError, match="handed more than the output of the block before"):
            streamed.cache_activations(tmp_path / "store")
        assert not (tmp_path / "store").exists()
        assert name.startswith("gemma4")
        return
    streamed.cache_activations(tmp_path / "store")
    batch, lengths = random_batch(config["vocab_size"])
    for from_cache in (0, 1, 1):
        assert_step_equals(whole, streamed, batch, lengths, from_cache)


@pytest.mark.parametrize("bits, mode, group_size", [(4, "affine", 32), (4, "mxfp4", 32)])
def test_quantized_base(bits, mode, group_size, tmp_path):
    packed = save_quantized(tmp_path / "packed", save_random(tmp_path / "dense", LLAMA), bits, mode, group_size)
    plain, caching = opened(packed), opened(packed, tmp_path / "store")
    for from_cache in (0, 2, 2):
        assert_same_step(plain, caching, batches(3, 4), from_cache)


def test_sixteen_bit_files_are_stored_in_the_dtype_of_the_computation(tmp_path):
    directory = save_random(tmp_path / "m", LLAMA, mx.bfloat16)
    whole, streamed = in_memory(directory, **LORA), opened(directory, tmp_path / "store")
    randomise(whole, streamed)
    batch, lengths = random_batch(LLAMA["vocab_size"])
    for from_cache in (0, 1):
        assert_step_equals(whole, streamed, batch, lengths, from_cache)
    (entry,) = entries(tmp_path / "store")
    assert entry.stat().st_size - activation_cache.HEADER_NBYTES == 3 * 24 * LLAMA["hidden_size"] * 4


def test_computing_in_bfloat16(tmp_path):
    directory = save_random(tmp_path / "m", LLAMA, mx.bfloat16)
    plain, caching = (opened(directory, store, compute_dtype="bfloat16") for store in (None, tmp_path / "store"))
    for from_cache in (0, 1):
        assert_same_step(plain, caching, batches(5), from_cache)


def test_some_micro_batches_of_a_step_are_stored(llama, tmp_path):
    """Five of different shapes: sums over them keep their order, and each block is read for all at once."""
    plain, caching = opened(llama), opened(llama, tmp_path / "store")
    assert_same_step(plain, caching, batches(2, 4), 0)
    assert_same_step(plain, caching, batches(1, 2, 3, 4, 5), 2)
    assert caching.stats.last.bytes_read <= plain.stats.last.bytes_read + 2 * 40_000  # two entries more
    assert_same_step(plain, caching, batches(5, 3, 1, 2, 4), 5)


@pytest.mark.parametrize(
    "schedule",
    [
        Schedule(slots=1),
        Schedule(slots=1, in_memory=True, keep_head=True),
        Schedule(slots=1, spilled=4),
        Schedule(kept=((),) * 3 + (("mlp.gate_proj", "mlp.up_proj"),)),
        Schedule(rows=2),
    ],
    ids=str,
)
def test_every_schedule(schedule, llama, tmp_path):
    plain, caching = opened(llama), opened(llama, tmp_path / "store")
    for model in (plain, caching):
        model.engine.follow(schedule, tmp_path / "spill")
    (batch, lengths), *_ = batches(1, rows=2)
    n = 2 if schedule.rows else 1
    for from_cache in (0, n, n):
        assert_same_step(plain, caching, [(batch, lengths)], from_cache)
    assert caching.stats.last.bytes_written == plain.stats.last.bytes_written  # of what is spilled
    assert plain.loss(batch, lengths)[0].item() == caching.loss(batch, lengths)[0].item()


def test_dropout_above_the_boundary_is_drawn_as_ever(llama, tmp_path):
    plain, caching = (opened(llama, store, dropout=0.5) for store in (None, tmp_path / "store"))
    losses = set()
    for from_cache in (0, 2, 2):
        assert_same_step(plain, caching, batches(1, 2), from_cache)
        losses.add(caching.loss_and_grads(batches(1, 2))[0][0].item())
        plain.step += 1
    assert len(losses) == 3


def test_evaluation_begins_there_too(llama, tmp_path):
    plain, caching = opened(llama), opened(llama, tmp_path / "store")
    (batch, lengths), other = batches(1, 2)
    for total in (0, 1, 2):
        assert caching.loss(batch, lengths)[0].item() == plain.loss(batch, lengths)[0].item()
        assert caching.stats.total.from_cache == total
    assert_same_step(plain, caching, [(batch, lengths)], 1)  # what an evaluation stored, a step begins from
    assert_same_step(plain, caching, [other], 0)
    assert caching.loss(*other)[0].item() == plain.loss(*other)[0].item()
    assert caching.stats.total.from_cache == 4


# --- Fewer reads --------------------------------------------------------------------------------------


@contextmanager
def names_read(model: StreamedModel, monkeypatch):
    """The names of the parameters any of whose bytes are asked for meanwhile."""
    names, submit, extents = set(), Reader.submit, index_model(model.path)

    def noted(self, ranges, buffer):
        ranges = list(ranges)
        for name, e in extents.items():
            if any(
                r.file == e.file and r.offset < e.offset + e.nbytes and e.offset < r.offset + r.nbytes for r in ranges
            ):
                names.add(name)
        return submit(self, ranges, buffer)

    with monkeypatch.context() as patched:
        patched.setattr(Reader, "submit", noted)
        yield names


def test_later_steps_read_neither_the_embedding_nor_a_block_below(llama, tmp_path, monkeypatch):
    model = opened(llama, tmp_path / "store")
    model.engine.follow(Schedule(slots=1))
    with names_read(model, monkeypatch) as first:
        model.loss_and_grads(batches(1, 2))
    with names_read(model, monkeypatch):  # reads ahead as the first did
        model.loss_and_grads(batches(1, 2))
    with names_read(model, monkeypatch) as later:
        model.loss_and_grads(batches(2, 1))
    below = {n for n in first if n.startswith(("model.layers.0.", "model.layers.1.", "model.embed_tokens"))}
    assert len(below) == 2 * 9 + 1 and later == first - below
    of_blocks = sum(
        unit.nbytes for unit in model.engine.cut.blocks[2:]
    )  # each once: 2 3 3 2, 2 3 3 2 with room for one
    stored = sum(path.stat().st_size for path in entries(tmp_path / "store"))
    head = sum(unit.nbytes for unit in model.engine.cut.head)
    assert model.stats.last.bytes_read == of_blocks + head + stored


# --- Never stale, never damaged -------------------------------------------------------------------------


def step_from_cache(model, batch) -> int:
    model.loss_and_grads(*batch)
    n = model.stats.last.from_cache
    model.close()
    return n


def test_activations_outlive_the_process_that_stored_them(llama, tmp_path):
    (batch,) = batches(1)
    assert step_from_cache(opened(llama, tmp_path / "store"), batch) == 0
    assert_same_step(opened(llama), opened(llama, tmp_path / "store"), [batch], 1)


def test_other_weights_with_the_same_header_size_and_time(llama, tmp_path):
    (batch,) = batches(1)
    file = llama / "model.safetensors"
    assert step_from_cache(opened(llama, tmp_path / "store"), batch) == 0
    before, data = file.stat(), bytearray(file.read_bytes())
    data[-5_000:-4_900] = os.urandom(100)[:100]
    with open(file, "r+b") as same_file:
        same_file.write(data)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_mtime_ns == before.st_mtime_ns and file.stat().st_size == before.st_size
    assert step_from_cache(opened(llama, tmp_path / "store"), batch) == 0


def test_weights_that_change_while_they_are_in_use(llama, tmp_path):
    (batch,) = batches(1)
    model, file = opened(llama, tmp_path / "store"), llama / "model.safetensors"
    model.loss_and_grads(*batch)
    data = bytearray(file.read_bytes())
    with open(file, "r+b") as same_file:
        same_file.write(data)
    with pytest.raises(slowft.SlowftError, match="changed while it was in use"):  # nothing was taken from the store
        step_from_cache(model, batch)


def test_what_is_computed_while_weights_change_is_not_stored(llama, tmp_path, monkeypatch):
    (batch,) = batches(1)
    model, file, find = opened(llama, tmp_path / "store"), llama / "model.safetensors", boundary.Boundary.find

    def changed_meanwhile(self, keys):
        found, data = find(self, keys), file.read_bytes()
        with open(file, "r+b") as same_file:
            same_file.write(data)
        return found

    monkeypatch.setattr(boundary.Boundary, "find", changed_meanwhile)
    with pytest.raises(slowft.SlowftError, match="changed while it was in use"):
        step_from_cache(model, batch)
    assert not entries(tmp_path / "store")


def other_boundary(directory):
    return opened(directory, num_layers=1)


def other_rope(directory):
    (directory / "config.json").write_text(json.dumps(LLAMA | {"rope_theta": 500.0}))
    return opened(directory)


def other_compute_dtype(directory):
    return opened(directory, compute_dtype="bfloat16")


@pytest.mark.parametrize("change", [other_boundary, other_rope, other_compute_dtype])
def test_another_model_uses_nothing(change, llama, tmp_path):
    (batch,) = batches(1)
    assert step_from_cache(opened(llama, tmp_path / "store"), batch) == 0
    plain, caching = change(llama), change(llama).cache_activations(tmp_path / "store")
    assert_same_step(plain, caching, [batch], 0)
    assert_same_step(plain, caching, [batch], 1)


@pytest.mark.parametrize("what", ["NUMERICS", "blas", "compiled"])
def test_other_software_uses_nothing(what, llama, tmp_path, monkeypatch):
    (batch,) = batches(1)
    assert step_from_cache(opened(llama, tmp_path / "store"), batch) == 0
    if what == "NUMERICS":
        monkeypatch.setattr(boundary, "NUMERICS", boundary.NUMERICS + 1)
    elif what == "blas":
        monkeypatch.setattr(platform, "blas_description", lambda: "another library")
    else:
        mx.disable_compile()
    try:
        assert step_from_cache(opened(llama, tmp_path / "store"), batch) == 0
    finally:
        mx.enable_compile()


def test_other_tokens_or_padding_use_nothing(llama, tmp_path):
    plain, caching = opened(llama), opened(llama, tmp_path / "store")
    ((batch, lengths),) = batches(1)
    assert_same_step(plain, caching, [(batch, lengths)], 0)
    padded = mx.concatenate([batch, mx.zeros((batch.shape[0], 8), batch.dtype)], 1)
    assert_same_step(plain, caching, [(padded, lengths)], 0)
    assert_same_step(plain, caching, [(batch[:2], lengths[:2])], 0)
    changed = mx.array(np.asarray(batch))
    changed[0, 3] = (changed[0, 3] + 1) % 256
    assert_same_step(plain, caching, [(changed, lengths)], 0)
    changed = mx.array(np.asarray(batch))
    changed[0, -1] = (changed[0, -1] + 1) % 256  # only a target: no input of any block
    assert_same_step(plain, caching, [(changed, lengths)], 1)


@pytest.mark.parametrize("damage", ["a byte at the end", "a byte of the shape", "no header", "cut short", "empty"])
def test_a_damaged_entry_is_computed_and_stored_anew(damage, llama, tmp_path):
    plain, caching = opened(llama), opened(llama, tmp_path / "store")
    (batch,) = batches(1)
    assert_same_step(plain, caching, [batch], 0)
    assert_same_step(plain, caching, [batch], 1)
    (entry,) = entries(tmp_path / "store")
    whole = entry.read_bytes()
    entry.write_bytes(
        {
            "a byte at the end": whole[:-1] + bytes([whole[-1] ^ 1]),
            "a byte of the shape": whole.replace(b"64]", b"46]", 1),
            "no header": bytes(4096) + whole[4096:],
            "cut short": whole[:-100],
            "empty": b"",
        }[damage]
    )
    assert_same_step(plain, caching, [batch], 0)
    assert_same_step(plain, caching, [batch], 1)
    (entry,) = entries(tmp_path / "store")
    assert entry.read_bytes() == whole


def test_an_entry_under_another_ones_name_is_not_used(tmp_path):
    cache = ActivationCache(tmp_path / "store")
    cache.write("a", mx.arange(10))
    cache.close()
    (entry,) = entries(tmp_path / "store")
    entry.rename(entry.with_name("b.activation"))
    assert ActivationCache(tmp_path / "store").read("b") is None


def test_kill_while_writing_leaves_no_entry(tmp_path):
    code = f"""
import os, signal, slowft, mlx.core as mx
from pathlib import Path
from slowft import platform
from slowft.weights import activation_cache as store
platform.is_memory_filesystem = lambda path: False
write = store.write_all
def half(fd, data, offset):
    write(fd, data[: len(data) // 2], offset)
    if offset:
        os.kill(os.getpid(), signal.SIGKILL)
store.write_all = half
cache = store.ActivationCache(Path({str(tmp_path)!r}))
cache.write("a", mx.arange(100_000))
cache.close()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    (left,) = tmp_path.iterdir()
    assert left.stat().st_size > 100_000 and not entries(tmp_path)
    assert ActivationCache(tmp_path).read("a") is None
    os.utime(left, (0, 0))  # long ago: no process writes it any more
    ActivationCache(tmp_path)
    assert not list(tmp_path.iterdir())


# --- Room on the disk -----------------------------------------------------------------------------------


def test_size_limit(llama, tmp_path):
    """Two of four fit: they stay, the others are computed, and the user is told once."""
    plain, caching = opened(llama), opened(llama, tmp_path / "store")
    caching.engine.activation_cache.limit_nbytes = 2 * (4 * 32 * 64 * 4 + 4096)
    four = batches(1, 7, 13, 19)
    with pytest.warns(SlowftWarning, match="full .* a larger --activation-cache-size") as told:
        for _ in range(2):
            for batch in four:
                (loss, _), gradients = plain.loss_and_grads([batch])
                (other_loss, _), other_gradients = caching.loss_and_grads([batch])
                assert loss.item() == other_loss.item()
                assert largest_difference(gradients, other_gradients) == 0.0
    assert len(told) == 1
    assert caching.stats.total.from_cache == 2
    stored = entries(tmp_path / "store")
    assert len(stored) == 2
    assert sum(path.stat().st_size for path in stored) == caching.engine.activation_cache.limit_nbytes


def test_what_no_run_uses_makes_room_the_longest_unused_first(tmp_path):
    cache, n = ActivationCache(tmp_path, 4 * 8192), 1024
    for i in range(4):
        cache.write(f"old{i}", mx.arange(n))
    cache.close()
    for i, path in enumerate(entries(tmp_path)):
        os.utime(path, (i, i))
    cache = ActivationCache(tmp_path, 4 * 8192)
    assert cache.read("old0") is not None  # in use again
    assert (tmp_path / "old0.activation").stat().st_mtime > 4
    for i in range(2):
        cache.write(f"new{i}", mx.arange(n))
    cache.close()
    assert {path.stem for path in entries(tmp_path)} == {"old0", "old3", "new0", "new1"}
    assert cache.problem is None
    cache = ActivationCache(tmp_path, 4 * 8192)
    assert all(cache.read(key) is not None for key in ("old0", "old3", "new0", "new1"))
    cache.write("more", mx.arange(n))
    assert "full" in cache.problem and len(entries(tmp_path)) == 4


def test_a_full_disk_warns_and_training_goes_on(llama, tmp_path, monkeypatch):
    plain, caching = opened(llama), opened(llama, tmp_path / "store")
    one, two, three = batches(1, 2, 3)
    assert_same_step(plain, caching, [one], 0)
    assert_same_step(plain, caching, [one], 1)

    def full(fd, data, offset):
        os.pwrite(fd, data[:100], offset)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(activation_cache, "write_all", full)
    with pytest.warns(SlowftWarning, match="No space left on device.*To fix it") as told:
        for _ in range(2):
            for batch in (two, three):
                assert_same_step(plain, caching, [batch], 0)
    assert len(told) == 1
    assert_same_step(plain, caching, [one], 1)  # what is stored serves as before
    assert len(list((tmp_path / "store").iterdir())) == 1


def test_an_entry_that_another_run_removed_is_computed(llama, tmp_path):
    plain, caching = opened(llama), opened(llama, tmp_path / "store")
    (batch,) = batches(1)
    assert_same_step(plain, caching, [batch], 0)
    assert caching.engine.activation_cache.read("another") is None  # waits for what is being written
    entries(tmp_path / "store")[0].unlink()
    assert_same_step(plain, caching, [batch], 0)
    assert_same_step(plain, caching, [batch], 1)


# --- What has no use for it -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lora, reason",
    [
        ({"num_layers": -1}, "smaller --num-layers"),
        ({"keys": ["mlp.up_proj", "lm_head"]}, "outside the blocks"),
        ({"keys": ["mlp.up_proj", "model.embed_tokens"]}, "outside the blocks"),
    ],
    ids=str,
)
def test_refused_with_its_reason(lora, reason, llama, tmp_path):
    model = opened(llama, **lora)
    assert reason in model.why_no_activation_cache()
    with pytest.raises(ConfigError, match=reason) as error:
        model.cache_activations(tmp_path / "store")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "store").exists()


def test_a_frozen_adapter_below_is_refused(llama, tmp_path):
    model = opened(llama, num_layers=-1)
    model.layers[0].freeze()
    with pytest.raises(ConfigError, match="below the lowest trained block, has an adapter"):
        model.cache_activations(tmp_path / "store")


def test_training_more_blocks_later_stores_no_more(llama, tmp_path):
    """What is trainable is looked at in every step."""
    plain, caching = opened(llama, num_layers=2), opened(llama, tmp_path / "store", num_layers=2)
    (batch,) = batches(1)
    assert_same_step(plain, caching, [batch], 0)
    assert_same_step(plain, caching, [batch], 1)
    for model in (plain, caching):
        model.layers[2].freeze()
    assert "has an adapter" in caching.why_no_activation_cache()
    assert_same_step(plain, caching, [batch], 0)


def test_a_directory_that_cannot_be_used(llama, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SlowftError, match="cannot be used.*Choose another"):
        opened(llama, tmp_path / "file" / "store")
    with pytest.raises(ConfigError, match="in memory. Choose a directory on a disk"):
        opened(llama, tmp_path.parent / f"{tmp_path.name}-memory")
    (tmp_path.parent / f"{tmp_path.name}-memory").rmdir()


# --- Training -------------------------------------------------------------------------------------------


def samples() -> TokenDataset:
    rng = np.random.default_rng(0)
    lengths = [20, 30, 40, 50, 60, 70]
    return TokenDataset([(rng.integers(3, 250, n).astype(np.int32), n % 4) for n in lengths], [str(n) for n in lengths])


def train(directory, path, store, **options):
    """(adapter, micro-batches that began at stored activations) after two epochs."""
    config = slowft.TrainConfig(
        **{"iters": 6, "batch_size": 2, "num_layers": 2, "learning_rate": 1e-3, "val_batches": -1} | options,
        adapter_path=str(path),
        activation_cache=store,
    )
    model = slowft.open_model(directory)
    slowft.Trainer(model, config).fit(samples(), samples())
    model.close()
    return mx.load(str(path / "adapters.safetensors")), model.stats.total.from_cache


def test_a_run_ends_with_the_same_adapter(llama, tmp_path):
    options = {"grad_accumulation_steps": 2, "lora_parameters": {"dropout": 0.3}}
    plain, none = train(llama, tmp_path / "plain", "off", **options)
    adapter, n = train(llama, tmp_path / "caching", str(tmp_path / "store"), **options)
    assert largest_difference(plain, adapter) == 0.0
    assert none == 0
    assert n == 6 + 3  # all but the first evaluation, which has the samples of the training set
    assert len(entries(tmp_path / "store")) == 3
    again, n = train(llama, tmp_path / "again", str(tmp_path / "store"), **options)
    assert largest_difference(plain, again) == 0.0
    assert n == 6 + 6


@pytest.fixture
def finetune(llama_with_tokenizer, tmp_path, capsys, monkeypatch) -> Command:
    """The command, on a machine that need not be measured: it reads slowly."""
    monkeypatch.setattr(budget, "measured", lambda *_: MACHINES["usual disk"])
    monkeypatch.chdir(tmp_path)
    return Command(tmp_path, llama_with_tokenizer, write_splits(tmp_path / "data", COMPLETIONS), capsys, monkeypatch)


def planned(finetune, *options) -> dict:
    outcome = finetune("--json", "--dry-run", *options)
    assert outcome.status == 0, outcome.err
    (plan,) = (event for event in map(json.loads, outcome.out.splitlines()) if event["event"] == "plan")
    return plan


@pytest.mark.parametrize(
    "options, reason",
    [
        (["--iters", 9], None),
        (["--iters", 3], "one epoch"),
        (["--iters", 9, "--num-layers", -1], "smaller --num-layers"),
        (["--iters", 9, "--activation-cache", "off"], "is off"),
        (["--iters", 9, "--activation-cache-size", "1MB", "--max-seq-length", 33], None),
    ],
    ids=str,
)
def test_it_is_on_where_it_pays(options, reason, finetune, tmp_path):
    plan = planned(finetune, *options)
    caching = plan["activation_cache"]
    if reason is None:
        assert caching["reason"] is None and caching["directory"] == str(tmp_path / "xdg" / "slowft" / "activations")
        assert caching["later"]["step_s"] < plan["predicted"]["step_s"]
    else:
        assert caching["directory"] is None and reason in caching["reason"]
    assert not (tmp_path / "xdg").exists()  # a dry run leaves nothing


def test_the_command_stores_where_it_says(finetune, tmp_path):
    assert finetune("--iters", 9).status == 0
    stored = entries(tmp_path / "xdg" / "slowft" / "activations")
    assert len(stored) == 3  # the validation set has the same samples
    outcome = finetune("--iters", 3, "--activation-cache", tmp_path / "named")
    assert len(entries(tmp_path / "named")) == len(stored)
    assert f"activations of the lower blocks go to {tmp_path / 'named'}" in outcome.out


@pytest.mark.parametrize(
    "options, words",
    [
        (["--num-layers", -1, "--activation-cache", "store"], "has no use here: the first block is trained"),
        (["--num-layers", -1, "--activation-cache", "store", "--dry-run"], "has no use here: the first block"),
        (["--activation-cache", "off", "--activation-cache-size", "2GB"], "has no effect with --activation-cache off"),
        (["--activation-cache-size", "much"], "'much' is not a size to store activations in. Write it like 8GB"),
    ],
    ids=str,
)
def test_mistakes_are_one_line(options, words, finetune, tmp_path):
    outcome = finetune("--iters", 9, *options)
    assert outcome.status == 2 and outcome.out == ""
    (line,) = outcome.err.splitlines()
    assert words in line
    assert not (tmp_path / "store").exists()


def test_plan_counts_later_epochs(finetune):
    def run(epochs) -> dict:
        job = ["--memory", "1GB", "--tokens", 200_000, "--num-layers", 1, "--max-seq-length", 65, "--epochs", epochs]
        return json.loads(finetune.bare("plan", "--json", "--model", finetune.model, *job).out)["run"]

    one, three = run(1), run(3)
    assert one["later"] is None
    assert three["seconds"] == pytest.approx(one["seconds"] + 2 * one["steps"] * three["later"]["step_s"], rel=0.01)
    assert three["seconds"] < 2.5 * one["seconds"]
