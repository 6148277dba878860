"""The main job under the double of a Mac (mac.py), against mlx-lm in memory under the same double.

These find what Python can see go wrong there. None of it was run on a Mac.
"""

import math
import os

import mlx.core as mx
import mlx.nn as nn
import pytest
from click.testing import CliRunner
from mlx.utils import tree_flatten, tree_map
from mlx_lm.tuner.trainer import default_loss
from mlx_lm.utils import load_model
from test_gradients import save_quantized
from test_schedule import every_product
from test_training import config, write_data

import slowft
from architectures import ARCHITECTURES
from conftest import (
    LLAMA,
    attach_in_memory,
    in_memory,
    largest,
    largest_difference,
    random_batch,
    randomise,
    reference,
    save_random,
)
from mac import F_NOCACHE, F_PREALLOCATE
from slowft import platform
from slowft.cli.main import slowft as command_line
from slowft.memory import MetalLimits, limits
from slowft.planning.schedule import Schedule
from slowft.reports.base import Report
from slowft.training.run import run
from slowft.weights import reader

LORA = {"num_layers": -1, "rank": 4, "scale": 2.0}
MOE = ARCHITECTURES["mixtral (experts)"]
KINDS = ["dense", "experts", "quantized"]
MB = 1 << 20


@pytest.fixture
def directory(tmp_path, request):
    """A model of the kind that the test is parametrised with: in bfloat16, but for experts."""
    if request.param == "experts":  # of which MLX's CPU backend has no product in bfloat16
        return save_random(tmp_path / "m", MOE)
    dense = save_random(tmp_path / "m", LLAMA, mx.bfloat16)
    return save_quantized(tmp_path / "q", dense, 4, "affine", 32) if request.param == "quantized" else dense


def pair(directory, **lora):
    """(in memory, streamed) with the same random adapters, both in the model's own dtype."""
    lora = LORA | lora
    streamed = slowft.open_model(directory)
    whole = in_memory(directory, streamed.engine.compute_dtype, **lora)
    streamed.add_lora(**lora)
    randomise(whole, streamed)
    whole.train()
    streamed.train()
    return whole, streamed


def assert_equal(expected, got):
    (loss, gradients), ((streamed_loss, _), streamed_gradients) = expected, got
    assert largest(gradients) > 1e-4
    assert streamed_loss.item() == loss.item()
    assert largest_difference(gradients, streamed_gradients) == 0.0


# --- The double ---------------------------------------------------------------------------------------


def test_the_double_tells_forward_passes_apart(mac):
    """What slowft is held to: a gradient's forward pass, recomputation included, and a plain one differ."""
    x = mx.random.normal((1, 2, 8, 4)).astype(mx.bfloat16)

    def attend(x):
        return mx.fast.scaled_dot_product_attention(x, x, x, scale=0.5)

    def in_trace(of):
        return mx.vjp(lambda _: [attend(x)], [mx.array(0.0) if of is None else of], [mx.zeros_like(x)])[0][0]

    assert not mx.array_equal(attend(x), in_trace(None))
    assert mx.array_equal(in_trace(x), in_trace(None))


def test_the_double_tells_compiled_functions_apart(mac):
    x = mx.random.normal((8,)).astype(mx.bfloat16)
    (of_traced,), _ = mx.vjp(nn.silu, [x], [x])
    assert not mx.array_equal(nn.silu(x), of_traced)
    mx.disable_compile()
    try:
        assert mx.array_equal(nn.silu(x), of_traced)
    finally:
        mx.enable_compile()


def test_the_double_gives_back_freed_buffers_with_the_next_allocation(mac):
    mx.clear_cache()
    mx.eval([mx.zeros((MB,), mx.uint8) + 1 for _ in range(16)])
    assert mx.get_cache_memory() >= 16 * MB
    mx.set_cache_limit(2 * MB)
    assert mx.get_cache_memory() >= 16 * MB
    mx.eval(mx.zeros((1,)))
    assert mx.get_cache_memory() <= 2 * MB


def test_nothing_that_runs_on_the_gpu_can_be_exported_in_the_double(mac):
    with pytest.raises(ValueError, match="Unable to serialize primitive"):
        mx.export_function(lambda _: None, lambda x: x + 1, mx.zeros((2,)))


# --- Platform and memory --------------------------------------------------------------------------------


@pytest.mark.parametrize("directory", KINDS, indirect=True)
def test_the_models_own_dtype_and_packed_weights_are_computed_with(directory, mac):
    model = slowft.open_model(directory)
    assert model.engine.compute_dtype == model.engine.cut.blocks[0].params[-1].source.result_dtype
    for unit in model.engine.cut.blocks:
        assert unit.compute_nbytes == unit.nbytes  # nothing is cast or dequantized on arrival
    model.close()


def test_memory_is_the_physical_footprint(mac):
    in_use = platform.memory_in_use()
    platform.reset_peak_memory()
    before = platform.peak_memory()
    block = mx.ones((64 << 20,), mx.uint8)
    mx.eval(block)
    assert before >= in_use and platform.peak_memory() - before > 60 << 20
    assert mac.called("proc_pid_rusage") and mac.called("proc_reset_footprint_interval")


def test_files_are_read_past_the_cache_and_written_to_room_that_is_there(mac, tmp_path):
    (tmp_path / "file").write_bytes(bytes(100))
    descriptors = reader.Reader()
    try:
        descriptors.descriptor(str(tmp_path / "file"))
    finally:
        descriptors.close()
    assert [F_NOCACHE, 1] in mac.called("fcntl")
    with open(tmp_path / "spill", "wb") as file:
        platform.preallocate(file.fileno(), 12345)
        platform.sync_file(file.fileno())
    assert (tmp_path / "spill").stat().st_size == 12345
    assert F_PREALLOCATE in [command for command, *_ in mac.called("fcntl")]


def test_the_machine_is_kept_awake_as_long_as_something_is_done(mac):
    with platform.kept_awake():
        (child,) = mac.children
        assert os.getpgid(child) == child  # Ctrl-C is not for it
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
    command = ["/usr/bin/caffeinate", "-is", "-w", str(os.getpid())]
    assert mac.called("posix_spawn") == [["/usr/bin/caffeinate", command]]


def test_limits_are_metals(mac):
    found = mac.memory_limit, mac.cache_limit
    assert isinstance(limits(), MetalLimits)
    limits().give_back()
    limits().hold(100 * MB, 64 * MB)
    assert mac.memory_limit == 164 * MB  # of arrays and freed buffers together
    limits().keep_freed(1000 * MB)
    assert mac.memory_limit == 164 * MB

    mx.eval([mx.zeros((MB,), mx.uint8) + 1 for _ in range(16)])
    assert mx.get_cache_memory() >= 16 * MB
    limits().keep_freed(32 * MB, of_those_kept=4 * MB)  # now, not with the next allocation
    assert mx.get_cache_memory() <= 4 * MB and mac.cache_limit == 32 * MB
    limits().give_back()
    assert mx.get_cache_memory() == 0

    limits().wire(10 * MB)
    limits().wire(mac.memory_nbytes)
    assert mac.wired == [10 * MB, mac.recommended_nbytes]
    limits().restore()
    assert (mac.memory_limit, mac.cache_limit) == found and mac.wired[-1] == 0


def test_weights_that_stay_are_wired_with_what_lies_beside_them(mac, llama):
    model = slowft.open_model(llama).add_lora(**LORA)
    assert not any(mac.wired)
    model.engine.follow(Schedule(in_memory=True, keep_head=True))
    assert mac.wired[-1] == sum(unit.compute_nbytes for unit in [*model.engine.cut.blocks, *model.engine.cut.head])
    model.engine.follow(Schedule(resident_nbytes=100_000))
    assert mac.wired[-1] == 100_000
    model.engine.follow(Schedule(resident_nbytes=100_000, active_nbytes=5 * MB, cache_nbytes=MB))
    assert mac.wired[-1] == 6 * MB  # MLX wires what comes first, be it weights or not
    model.engine.follow(Schedule(active_nbytes=5 * MB, cache_nbytes=MB))
    assert mac.wired[-1] == 0
    model.close()
    assert mac.wired[-1] == 0


def test_mlx_is_never_allowed_more_than_the_ceiling(mac, llama, monkeypatch):
    """What MLX keeps of freed buffers goes up and down within a step; what Metal takes in all may not go up with it."""
    model = slowft.open_model(llama).add_lora(**LORA).train()
    model.engine.follow(Schedule(active_nbytes=99 * MB, cache_nbytes=MB, total_nbytes=100 * MB))
    set_memory_limit, limits_set = mx.set_memory_limit, []
    monkeypatch.setattr(mx, "set_memory_limit", lambda n: limits_set.append(n) or set_memory_limit(n))
    model.loss_and_grads(*random_batch(128, rows=2))
    assert mac.cache_limit > 50 * MB
    assert limits_set and max([mac.memory_limit, *limits_set]) == 100 * MB
    model.close()


# --- The same bits as in memory ---------------------------------------------------------------------------


@pytest.mark.parametrize("memory", ["least", "ample"])
@pytest.mark.parametrize("directory", KINDS, indirect=True)
def test_gradients_equal_in_memory(directory, memory, mac):
    """In the least memory, and with room for everything; of one row, as several would be taken one by one."""
    whole, streamed = pair(directory)
    least = streamed.planner(1, 24).least().peak_nbytes
    streamed.plan(1, 24, memory=least + (0 if memory == "least" else 1 << 30), follow=True)
    batch, lengths = random_batch(128, rows=1)
    expected = reference(whole, batch, lengths)
    for _ in range(4):  # measured in the first ones, planned by that from then on
        assert_equal(expected, streamed.loss_and_grads(batch, lengths))
    schedule = streamed.followed_plan.schedule
    assert schedule.in_memory == (memory == "ample")
    assert schedule.mlp_tokens is schedule.attention_queries is None


@pytest.mark.parametrize("lora", [{}, {"num_layers": 2}], ids=["all blocks", "last two"])
@pytest.mark.parametrize("schedule", ["stream", "keep outputs", "in memory", "groups of experts"])
@pytest.mark.parametrize("directory", KINDS, indirect=True)
def test_gradients_equal_under_every_schedule(directory, schedule, lora, mac):
    whole, streamed = pair(directory, **lora)
    batch, lengths = random_batch(128)
    expected = reference(whole, batch, lengths)
    kept = every_product(streamed)
    streamed.engine.follow(
        {
            "stream": Schedule(),
            "keep outputs": Schedule(kept=kept),
            "in memory": Schedule(in_memory=True, keep_head=True),
            "groups of experts": Schedule(slots=1, group_nbytes=1 << 20),
        }[schedule]
    )
    for _ in range(2):
        assert_equal(expected, streamed.loss_and_grads(batch, lengths))
    outside = mac.attention[1]
    streamed.loss_and_grads(batch, lengths)
    assert mac.attention[1] == outside  # all of a step's attention is inside of a trace


@pytest.mark.parametrize("directory", KINDS, indirect=True)
def test_gradients_of_ones_own_transformation_equal_in_memory(directory, mac):
    whole, streamed = pair(directory)
    batch, lengths = random_batch(128)
    loss, gradients = reference(streamed, batch, lengths)
    assert_equal(reference(whole, batch, lengths), ((loss, None), gradients))


@pytest.mark.parametrize("directory", KINDS, indirect=True)
def test_an_evaluation_is_that_of_mlx_lm_outside_of_a_trace(directory, mac):
    whole, streamed = pair(directory)
    batch, lengths = random_batch(128)
    whole.eval()
    expected, _ = default_loss(whole, batch, lengths)
    training = reference(whole, batch, lengths)[0]
    streamed.eval()
    assert streamed.loss(batch, lengths)[0].item() == expected.item() != training.item()


@pytest.mark.parametrize("directory", KINDS, indirect=True)
def test_scores_are_those_of_mlx_lm(directory, mac):
    whole, streamed = pair(directory)
    batch, lengths = random_batch(128)
    whole.eval(), streamed.eval()
    (found,) = streamed.log_probabilities([slowft.MicroBatch(batch, lengths)], top_k=2)
    log_p = nn.log_softmax(whole(batch[:, :-1]).astype(mx.float32))
    expected = mx.take_along_axis(log_p, batch[:, 1:, None], axis=-1)[..., 0]
    for i, (row, (first, last)) in enumerate(zip(found.rows(), lengths.tolist())):
        assert row.target.tolist() == expected[i, max(first, 1) - 1 : last].tolist()
        assert row.top[:, 0].tolist() == log_p[i, max(first, 1) - 1 : last].max(axis=-1).tolist()


def test_micro_batches_equal_their_sum_in_memory(llama, mac):
    whole, streamed = pair(llama)
    batches = [random_batch(256, seed=seed) for seed in (3, 4)]
    parts = [reference(whole, *pair_of) for pair_of in batches]
    n = [default_loss(whole, *pair_of)[1].item() for pair_of in batches]
    (loss, _), gradients = streamed.loss_and_grads(batches)
    weighted = [tree_map(lambda g, k=k: g * (k / sum(n)), g) for (_, g), k in zip(parts, n)]
    expected = tree_map(mx.add, *weighted)
    assert loss.item() == pytest.approx(sum(of.item() * k for (of, _), k in zip(parts, n)) / sum(n), rel=1e-6)
    assert largest_difference(expected, gradients) <= 1e-6 * largest(expected)


def test_stored_activations_are_those_of_a_training_step_or_of_an_evaluation(llama, mac, tmp_path):
    """Below the lowest trained block the two differ, of the same tokens."""
    whole, streamed = pair(llama, num_layers=2)
    streamed.cache_activations(tmp_path / "cache")
    batch, lengths = random_batch(256)
    for _ in range(2):
        whole.train(), streamed.train()
        assert_equal(reference(whole, batch, lengths), streamed.loss_and_grads(batch, lengths))
        whole.eval(), streamed.eval()
        assert streamed.loss(batch, lengths)[0].item() == default_loss(whole, batch, lengths)[0].item()
    assert streamed.stats.total.from_cache == 2
    streamed.close()


# --- The whole job ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", ["least", "ample"])
def test_a_run_trains_evaluates_saves_and_resumes(memory, mac, llama_with_tokenizer, tmp_path):
    data = write_data(tmp_path / "data")
    options = dict(
        model=str(llama_with_tokenizer),
        data=str(data),
        memory=f"{(platform.memory_in_use() + ((200 if memory == 'least' else 2000) << 20)) // 1_000_000}MB",
        iters=4,
        grad_accumulation_steps=2,
        save_every=2,
        steps_per_eval=2,
    )
    report = Report()
    result = run(config(tmp_path, **options), report)
    assert math.isfinite(result["valid_loss"]) and result["valid_loss"] < result["valid_loss_before"]
    saved = tmp_path / "adapter" / "adapters.safetensors"
    assert (tmp_path / "adapter" / "0000002_adapters.safetensors").exists()
    again = config(tmp_path, **options | dict(resume_adapter_file=str(saved), adapter_path=str(tmp_path / "second")))
    second = run(again, report)
    assert second["valid_loss_before"] == result["valid_loss"]
    assert mac.memory_limit == mac.cache_limit > 1 << 30  # as they were before


def test_a_run_is_the_same_in_any_memory(mac, llama_with_tokenizer, tmp_path):
    adapters = []
    for n, extra in enumerate((200, 2000)):
        settings = config(
            tmp_path,
            model=str(llama_with_tokenizer),
            data=str(write_data(tmp_path / "data")),
            memory=f"{(platform.memory_in_use() + (extra << 20)) // 1_000_000}MB",
            adapter_path=str(tmp_path / f"adapter-{n}"),
        )
        run(settings, Report())
        adapters.append(mx.load(str(tmp_path / f"adapter-{n}" / "adapters.safetensors")))
    assert largest_difference(*adapters) == 0.0


def test_the_command_trains(mac, llama_with_tokenizer, tmp_path):
    paths = {"model": llama_with_tokenizer, "data": write_data(tmp_path / "data"), "adapter-path": tmp_path / "adapter"}
    command = ["finetune", "--iters", "2", "--batch-size", "2", "--memory", "3GB"]
    command += [part for name, path in paths.items() for part in (f"--{name}", str(path))]
    done = CliRunner().invoke(command_line, command, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    whole, _ = load_model(llama_with_tokenizer)
    attach_in_memory(whole, num_layers=16, rank=8, scale=20.0)
    names = set(dict(tree_flatten(whole.trainable_parameters())))
    assert names >= set(mx.load(str(tmp_path / "adapter" / "adapters.safetensors")))


@pytest.mark.parametrize("directory", KINDS, indirect=True)
def test_generates_on_a_mac_what_mlx_lm_does(mac, directory):
    """In the model's own dtype, alone and in a wave: until, in 16 bits, rounding tells tokens apart."""
    from test_generate import LIMITS, PROMPTS, generated, of_mlx_lm, waves

    whole = load_model(directory)[0]
    with slowft.open_model(directory, memory="2GB") as model:
        expected = of_mlx_lm(whole, PROMPTS[:3], LIMITS[:3])
        for size in (1, 3):
            answers = generated(waves(model, size), PROMPTS[:3], LIMITS[:3])
            assert [answer[0] for answer in answers] == [answer[0] for answer in expected]


def test_experts_come_as_they_did_before_the_run_was_stopped(mac, tmp_path):
    """On a GPU the number of experts at a time decides last bits, so more memory may not change it on the way."""
    config = MOE | {"num_local_experts": 8}
    model = slowft.open_model(save_random(tmp_path / "m", config)).add_lora(**LORA)
    cuts = model.cuts | {"group_nbytes": 60_000}
    assert model.planner(1, 24).choose(10 << 30).is_ordinary
    model.keep_cuts(cuts)
    plan = model.planner(1, 24).choose(10 << 30)
    assert plan.schedule.group_nbytes == 60_000 and not plan.is_ordinary
    model.keep_cuts(cuts | {"group_nbytes": None})
    assert model.planner(1, 24).choose(10 << 30).is_ordinary
    model.close()
