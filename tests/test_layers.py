"""Blocks that come without their experts, which come by groups."""

import slowft  # noqa: F401, I001  (before mlx: it loads OpenBLAS)

import json
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest

from architectures import ARCHITECTURES
from conftest import (
    LLAMA,
    attach_in_memory,
    in_memory,
    largest_difference,
    must_run,
    random_batch,
    randomise,
    reference,
    save_random,
)
from slowft.bench import cgroup
from slowft.bench.shapes import write_random
from slowft.errors import SlowftError
from slowft.models.seams import intercept
from slowft.planning.experts import NEARLY_ALL
from slowft.planning.job import Chunking
from slowft.planning.schedule import Schedule
from slowft.reports.plan import choices
from slowft.weights.extents import Extent, index_model
from slowft.weights.reader import ByteRange, Reader
from test_gradients import LORA, pair, save_quantized
from test_schedule import assert_same_as, every_product

EXPERTS = [name for name in ARCHITECTURES if "experts" in name]
N_EXPERTS = {"num_local_experts": 8, "num_experts": 8}
BY_EXPERTS = Schedule(slots=1, group_nbytes=60_000)


def experts(name: str) -> dict:
    config = ARCHITECTURES[name]
    return config | {key: n for key, n in N_EXPERTS.items() if key in config or config["model_type"] == "mixtral"}


@pytest.mark.parametrize("name", EXPERTS)
def test_gradients_equal_by_groups_of_experts(name, tmp_path):
    config = experts(name)
    whole, streamed = pair(save_random(tmp_path / "m", config))
    batch, lengths = random_batch(config["vocab_size"])
    expected = reference(whole, batch, lengths)
    assert_same_as(expected, streamed, batch, lengths, BY_EXPERTS)
    products = every_product(streamed)
    some = tuple(names[: len(names) // 2] if i % 2 else names[1::2] for i, names in enumerate(products))
    assert_same_as(expected, streamed, batch, lengths, Schedule(slots=1, group_nbytes=60_000, kept=some))
    batch, lengths = random_batch(config["vocab_size"], rows=2, tokens=7)  # too few for mlx-lm to sort them by expert
    assert_same_as(reference(whole, batch, lengths), streamed, batch, lengths, BY_EXPERTS)


@pytest.mark.parametrize("schedule", [Schedule(), BY_EXPERTS], ids=["whole", "groups"])
def test_a_block_that_the_model_never_calls_is_not_looked_for(schedule, tmp_path):
    config = experts("gpt_oss (attention sinks, experts, sliding window)") | {"num_hidden_layers": 3}
    config.pop("layer_types")  # mlx-lm makes up pairs of them, and leaves the third block out
    whole, streamed = pair(save_random(tmp_path / "m", config))
    assert len(streamed.engine.cut.blocks) == 3 and len(streamed.engine.cut.order) == 2
    batch, lengths = random_batch(config["vocab_size"])
    assert_same_as(reference(whole, batch, lengths), streamed, batch, lengths, schedule)


def test_an_adapter_on_a_block_that_the_model_never_calls_is_refused(tmp_path):
    config = experts("gpt_oss (attention sinks, experts, sliding window)") | {"num_hidden_layers": 3}
    config.pop("layer_types")
    with slowft.open_model(save_random(tmp_path / "m", config)).add_lora(num_layers=1).train() as model:
        with pytest.raises(SlowftError, match=r"never calls the block of model.layers.2.self_attn"):
            model.loss_and_grads(*random_batch(config["vocab_size"]))


@pytest.mark.parametrize("dtype", ["float32", "files"])
@pytest.mark.parametrize("name", [EXPERTS[0], EXPERTS[2]])
def test_gradients_equal_on_quantized_bases(name, dtype, tmp_path, monkeypatch):
    """Dequantized on arrival, and (as on a GPU) multiplied with packed."""
    from mlx_lm.utils import dequantize_model

    directory = save_quantized(tmp_path / "q", save_random(tmp_path / "m", experts(name)), 4, "affine", 32)
    whole = in_memory(directory)
    if dtype == "float32":
        whole = dequantize_model(whole)
        whole.freeze()
    attach_in_memory(whole, **LORA)
    streamed = slowft.open_model(directory, compute_dtype="float32" if dtype == "float32" else "native")
    streamed.add_lora(**LORA)
    randomise(whole, streamed)
    batch, lengths = random_batch(128)
    expected = reference(whole, batch, lengths)
    assert_same_as(expected, streamed, batch, lengths, BY_EXPERTS)


def test_micro_batches_and_dropout(tmp_path):
    """Several micro-batches, each with its own dropout masks, give what they give with whole blocks."""
    config = experts(EXPERTS[0])
    _, streamed = pair(save_random(tmp_path / "m", config), dropout=0.3)
    micro_batches = [random_batch(config["vocab_size"], rows=2, seed=seed) for seed in (3, 4)]
    streamed.step = 0
    expected = streamed.loss_and_grads(micro_batches)
    streamed.engine.follow(BY_EXPERTS)
    streamed.step = 0
    (loss, ntoks), gradients = streamed.loss_and_grads(micro_batches)
    assert loss.item() == expected[0][0].item()
    assert largest_difference(expected[1], gradients) == 0.0


# --- Few tokens ---------------------------------------------------------------------------------------

N_FEW = 64  # experts, so that what few tokens need is little
FEW = ARCHITECTURES[EXPERTS[1]] | {"num_experts": N_FEW, "num_experts_per_tok": 2, "mlp_only_layers": []}
EXPERT = 3 * 48 * 64 * 4  # bytes of an expert of a block


def routed(whole, tokens: mx.array) -> tuple[list[int], mx.array]:
    """(how many experts these tokens go to in each block, the logits), by mlx-lm's own router."""
    seen = []

    def note(_, inner, args, kwargs):
        seen.append(args[1])
        return inner(*args, **kwargs)

    for layer in whole.model.layers:
        intercept(layer.mlp.switch_mlp, "__call__", None, note)
    logits = whole(tokens)
    mx.eval(logits, seen)
    return [len(set(indices.reshape(-1).tolist())) for indices in seen], logits


def covers(r: ByteRange, e: Extent) -> bool:
    return r.file == e.file and r.offset <= e.offset and e.offset + e.nbytes <= r.offset + r.nbytes


@pytest.mark.parametrize("tokens", [1, 8, 32, 512])
def test_evaluation_reads_the_experts_that_were_routed_to(tokens, tmp_path, monkeypatch):
    directory = save_random(tmp_path / "m", FEW | {"max_position_embeddings": 1024})
    whole, streamed = in_memory(directory), slowft.open_model(directory)
    streamed.eval()
    batch = mx.random.randint(0, 128, (1, tokens))
    blocks = sum(unit.nbytes for unit in streamed.engine.cut.blocks)
    outside = len(set(batch.tolist()[0])) * 64 * 4 + 128 * 64 * 4  # rows of the embedding, and the head
    n_experts, expected = routed(whole, batch)
    reads, asked, submit = [], [], Reader.submit
    monkeypatch.setattr(Reader, "submit", lambda self, r, b: asked.extend(r := list(r)) or submit(self, r, b))
    for _ in range(2):
        before = streamed.stats.total.bytes_read
        logits = streamed(batch)
        mx.eval(logits)
        reads.append(streamed.stats.total.bytes_read - before)
        assert mx.array_equal(logits, expected)
    experts, first = sum(n_experts) * EXPERT, streamed.engine.cut.blocks[0].nbytes
    rest = blocks - 4 * N_FEW * EXPERT  # attention, norms, routers: read, or still in a buffer
    assert experts < reads[0] <= experts + rest + outside + (first - N_FEW * EXPERT)
    # the next time blocks come whole of which nearly all experts are needed
    apart = {i for i, n in enumerate(n_experts) if n < NEARLY_ALL * N_FEW}
    of_experts = [index_model(directory)[f"model.layers.{i}.mlp.switch_mlp.up_proj.weight"] for i in range(4)]
    assert apart == {i for i, e in enumerate(of_experts) if not any(covers(r, e) for r in asked)}
    if tokens == 512:
        assert 0 < len(apart) < 4
    else:
        assert experts < reads[1] <= experts + rest + outside + (first - N_FEW * EXPERT)


def test_generation_reads_few_experts(tmp_path):
    """`mlx_lm.generate` goes token by token."""
    from mlx_lm.generate import generate_step

    directory = save_random(tmp_path / "m", FEW)
    whole, streamed = in_memory(directory), slowft.open_model(directory)
    whole.eval(), streamed.eval()
    prompt = mx.array([3, 1, 4])
    expected = [token for token, _ in generate_step(prompt, whole, max_tokens=6)]
    before = streamed.stats.total.bytes_read
    assert [token for token, _ in generate_step(prompt, streamed, max_tokens=6)] == expected
    read = streamed.stats.total.bytes_read - before
    assert read < 8 * 0.3 * sum(unit.nbytes for unit in streamed.engine.cut.blocks)


def test_steps_by_groups_read_what_was_planned(tmp_path):
    """Where tokens go to all experts, so that the router makes no difference."""
    streamed = slowft.open_model(save_random(tmp_path / "m", FEW | {"num_experts_per_tok": N_FEW})).add_lora(**LORA)
    planner = streamed.planner(2, 24, micro_batches=2)
    batches = [random_batch(128, rows=2, seed=seed) for seed in (3, 4)]
    schedule = Schedule(slots=1, group_nbytes=30_000)
    plan = planner.predict(planner.job_of(Chunking()), schedule)
    streamed.engine.follow(schedule)
    streamed.loss_and_grads(batches)
    streamed.loss_and_grads(batches)
    assert abs(streamed.stats.last.bytes_read - plan.read_nbytes) <= 0.02 * plan.read_nbytes


# --- Adapters -----------------------------------------------------------------------------------------


def test_magnitudes_of_dora_are_those_of_mlx_lm(tmp_path):
    """With no more in memory than a layer."""
    lora = LORA | {"use_dora": True, "keys": ["self_attn.q_proj", "mlp.down_proj"]}
    whole, streamed = pair(save_random(tmp_path / "m", LLAMA), **lora)
    batch, lengths = random_batch(256)
    assert_same_as(reference(whole, batch, lengths), streamed, batch, lengths, Schedule(slots=1))


def test_keys_that_match_less_than_one_may_think_are_told(tmp_path):
    directory = save_random(tmp_path / "m", ARCHITECTURES[EXPERTS[1]])  # whose second block has no experts
    streamed = slowft.open_model(directory)
    with pytest.raises(slowft.SlowftError, match=r"mlp.switch_mlp.w1 match no layer.*mlp.switch_mlp.up_proj"):
        streamed.add_lora(keys=["mlp.switch_mlp.w1"], num_layers=-1)
    streamed.add_lora(keys=["mlp.switch_mlp.up_proj"], num_layers=-1)
    some, others = streamed.adapter_notes
    assert some.startswith("mlp.switch_mlp.up_proj is trained in 3 of 4 blocks")
    assert "mlp.switch_mlp.down_proj, mlp.switch_mlp.gate_proj are not trained" in others
    streamed = slowft.open_model(directory).add_lora(keys=["self_attn.q_proj"], num_layers=-1)
    assert streamed.adapter_notes == []


# --- A block larger than memory -----------------------------------------------------------------------

LARGE = LLAMA | {
    "model_type": "mixtral",
    "hidden_size": 512,
    "intermediate_size": 14336,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "rope_theta": 1e6,
}

STEP = """
import json, sys
import numpy as np
import slowft
from slowft.models.imports import import_mlx_lm_without_tokenizers
import_mlx_lm_without_tokenizers()
import mlx.core as mx
from mlx.utils import tree_flatten
mx.random.seed(0)
model = slowft.open_model(sys.argv[1], memory=None if sys.argv[2] == "None" else int(sys.argv[2]))
model.add_lora(num_layers=-1, rank=2, keys=json.loads(sys.argv[4]))
mx.random.seed(1)
parameters = tree_flatten(model.trainable_parameters())
model.load_weights([(name, 0.05 * mx.random.normal(array.shape)) for name, array in parameters], False)
model.train()
batch, lengths = mx.random.randint(0, 256, (1, 9)), mx.array([[1, 8]])
(loss, _), gradients = model.loss_and_grads(batch, lengths)
np.savez(sys.argv[3], **{name: np.array(array) for name, array in tree_flatten(gradients)})
plan = model.budget.plan
print(json.dumps(dict(
    loss=loss.item(), peak=model.stats.last.peak_memory, read=model.stats.last.bytes_read,
    block=model.engine.cut.blocks[0].nbytes, predicted=plan and plan.peak_nbytes,
    unused=plan and plan.job.optimizer_nbytes, group=plan and plan.schedule.group_nbytes,
)))
"""


def test_trains_in_less_memory_than_a_block_takes(tmp_path):
    """Blocks of 8 experts, 353 MB each, in a cgroup smaller than one of them, page cache and swap included."""
    if reason := cgroup.why_unavailable():
        must_run(reason)
    directory = write_random(tmp_path / "m", LARGE)
    keys = json.dumps(["self_attn.q_proj", "block_sparse_moe.switch_mlp.up_proj"])
    command = [sys.executable, "-c", STEP, str(directory)]
    limit = 300_000_000
    done, peak = cgroup.run([*command, str(limit), str(tmp_path / "within.npz"), keys], limit)
    assert done.returncode == 0, f"killed under {limit} bytes (peak {peak}): {done.stderr[-2000:]}"
    within = json.loads(done.stdout)
    assert peak <= limit < within["block"]
    assert within["peak"] <= 1.05 * (within["predicted"] - within["unused"])
    free = subprocess.run([*command, "None", str(tmp_path / "free.npz"), keys], capture_output=True, text=True)
    assert free.returncode == 0, free.stderr
    assert json.loads(free.stdout)["loss"] == within["loss"] and json.loads(free.stdout)["group"] is None
    a, b = np.load(tmp_path / "within.npz"), np.load(tmp_path / "free.npz")
    assert a.files == b.files and any(np.abs(a[name]).max() > 0 for name in a.files)
    assert all(np.array_equal(a[name], b[name]) for name in a.files)


def test_plans_by_groups_keep_to_their_memory_and_are_told(tmp_path):
    model = slowft.open_model(write_random(tmp_path / "m", LARGE | {"intermediate_size": 4096})).add_lora(-1, rank=2)
    planner = model.planner(1, 32)
    least, ways = planner.least(), [planner.predict(*way) for way in planner.ways()]
    whole_nbytes = min(plan.peak_nbytes for plan in ways if plan.schedule.group_nbytes is None)
    assert least.peak_nbytes < whole_nbytes - 100_000_000
    for memory in (least.peak_nbytes, least.peak_nbytes + 60_000_000):
        plan = planner.choose(memory)
        assert plan.schedule.group_nbytes and plan.peak_nbytes <= memory
        assert "experts of blocks by groups of" in choices(plan)
    assert planner.choose(2 * whole_nbytes).schedule.group_nbytes is None
    share = 1 - (1 - 2 / 8) ** 32
    blocks = sum(unit.nbytes for unit in model.engine.cut.blocks)
    assert 2 * share * blocks < plan.read_nbytes < 3 * blocks + 2 * 256 * 512 * 2
