"""Plans keep to their memory, get faster with more of it, and say what a step then really reads and writes."""

import slowft  # noqa: F401, I001  (before mlx: it loads OpenBLAS)

import itertools
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from unittest import mock

import mlx.core as mx
import pytest

from conftest import LLAMA, save_random
from slowft import platform
from slowft.bench.shapes import quantized
from slowft.engine import budget, costs
from slowft.engine.model import open_model, parse_nbytes
from slowft.models.outline import outline_of_config
from slowft.planning.job import Cut
from slowft.planning.plan import Planner
from slowft.planning.schedule import Schedule
from slowft.planning.timeline import reads_of
from test_cli import COMPLETIONS, Command, snapshot, write_splits

CONFIGS = Path(__file__).parent / "configs"
LARGE = [("llama-3.3-70b", "native"), ("qwen3-32b", "native"), ("mixtral-8x22b", "native")]
LARGE += [("gpt-oss-120b", "native"), ("gpt-oss-120b", "float32")]
SMALL = LLAMA | {  # blocks of 1.6 MB in bfloat16, in a plan whose process is made to take 100 MB
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,  # so that o_proj is wider (512) than what the other layers multiply (256)
    "num_hidden_layers": 8,
    "vocab_size": 1024,
}
BASE = 100_000_000
ROWS, TOKENS = 2, 128
BLOCK = 2 * (2 * 256 * 512 + 2 * 256 * 128 + 3 * 256 * 704 + 2 * 256)
OUTSIDE = 1024 * 256 * 2 + ROWS * TOKENS * 256 * 2  # head, and rows of the embedding

# what is not said does not count
FAST = {"matmul_flops_per_s": 1e11, "bytes_per_s": 1e10, "page_s_per_byte": 2e-10}
NEVER_WAITS = replace(budget.UNKNOWN, memory_nbytes=10**12, is_assumed=False, **FAST)
MACHINES = {
    "slow disk": replace(NEVER_WAITS, read_bytes_per_s=1e5),
    "usual disk": replace(NEVER_WAITS, read_bytes_per_s=3e8),
    "fast disk": replace(NEVER_WAITS, read_bytes_per_s=1e11),
}


class Opened:
    """A model with LoRA on its last `num_layers` blocks, and planners for it that share what they know of its jobs."""

    def __init__(self, directory: Path, num_layers: int = -1, compute_dtype: str | None = None, keys=None):
        self.model = open_model(directory, compute_dtype=compute_dtype).add_lora(num_layers, keys=keys)
        self.jobs: dict[tuple, Callable] = {}

    def planner(self, machine, rows=ROWS, tokens=TOKENS, micro_batches=1, base=BASE) -> Planner:
        shape = rows, tokens, micro_batches
        if shape not in self.jobs:
            self.jobs[shape] = self.model._budget.planner(*shape, machine=machine)._job_of
        return Planner(self.jobs[shape], machine, base, rows, tokens, mx.get_active_memory())


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    return save_random(tmp_path_factory.mktemp("plans") / "small", SMALL, mx.bfloat16)


@pytest.fixture(scope="module")
def opened(directory):
    opened = Opened(directory)
    yield opened
    opened.model.close()


@pytest.fixture(scope="module")
def few_trained(directory):
    opened = Opened(directory, num_layers=3)
    yield opened
    opened.model.close()


@pytest.fixture
def native(directory):
    opened = Opened(directory, compute_dtype="native")
    yield opened
    opened.model.close()


def budgets(planner: Planner, n: int = 10) -> list[int]:
    """From the least to a little more than all, closer together where memory is short."""
    least, most = planner.least().peak_nbytes, planner.most().peak_nbytes
    return [int(least + (1.02 * most - least) * (i / n) ** 2) for i in range(n + 1)]


def way_of_cutting(plan) -> tuple:
    return plan.schedule.rows, plan.schedule.mlp_tokens, plan.schedule.attention_queries


# --- Memory -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model, machine",
    [("opened", machine) for machine in MACHINES] + [("few_trained", "usual disk"), ("native", "usual disk")],
)
def test_no_plan_passes_its_memory_and_more_of_it_is_never_slower(model, machine, request):
    """Within one way to cut the work: that is chosen for equal sums, not for speed."""
    n = 2 if model == "few_trained" else 1
    planner = request.getfixturevalue(model).planner(MACHINES[machine], micro_batches=n)
    plans = [planner.choose(memory) for memory in budgets(planner)]
    for plan in plans:
        assert plan.peak_nbytes <= plan.memory
        assert sum(plan.parts.values()) == plan.peak_nbytes
    for plan, larger in zip(plans, plans[1:]):
        assert (plan.schedule.rows or ROWS) <= (larger.schedule.rows or ROWS)
        if way_of_cutting(plan) == way_of_cutting(larger):
            # ordinary training is preferred where its buffers just fit, though keeping fewer blocks may be no slower
            is_ordinary = larger.schedule.tail == 8 > plan.schedule.tail
            assert larger.step_s <= plan.step_s * (1.1 if is_ordinary else 1.01)
            assert larger.written_nbytes <= plan.written_nbytes
            if machine == "slow disk":  # elsewhere memory may serve computing better
                assert larger.read_nbytes <= plan.read_nbytes
    assert plans[-1].step_s < 0.9 * plans[0].step_s


DESCRIBED = (MACHINES["usual disk"], replace(NEVER_WAITS, matmul_flops_per_s=3.5e12, read_bytes_per_s=3e9))
EXPERTS = {
    "model_type": "mixtral",
    "num_hidden_layers": 4,
    "hidden_size": 256,
    "intermediate_size": 14336,  # blocks of 177 MB in bfloat16
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 1024,
}


def order_of_sums(plan) -> tuple:
    s = plan.schedule
    return s.rows, s.mlp_tokens, s.attention_queries


DENSE = SMALL | {"num_hidden_layers": 3, "hidden_size": 1024, "intermediate_size": 14336}


@pytest.mark.parametrize("dtype", ["native", "float32"])
@pytest.mark.parametrize("config", [DENSE, EXPERTS], ids=["dense", "experts"])
def test_more_memory_is_never_slower_whatever_is_done_with_it(config, dtype, tmp_path):
    """Across ways to cut the work and to bring blocks, as on a GPU (native: nothing is cast on arrival) and a CPU."""
    (tmp_path / "config.json").write_text(json.dumps(config))
    with outline_of_config(tmp_path / "config.json") as directory:
        opened = Opened(directory, compute_dtype=dtype)
        try:
            for machine in DESCRIBED:
                planner = opened.planner(machine, rows=4, tokens=64)
                with mock.patch.object(mx, "default_device", lambda: mx.Device(mx.gpu)):  # which gathers experts' rows
                    plans = [planner.choose(memory) for memory in budgets(planner, n=60)]
                for plan, larger in zip(plans, plans[1:]):
                    assert plan.peak_nbytes <= plan.memory
                    # sums keep their order as soon as that fits, if it can be hidden that blocks are read
                    if order_of_sums(plan) == order_of_sums(larger) or (
                        dtype == "native" and larger.schedule.slots == 1
                    ):
                        assert larger.step_s <= plan.step_s * 1.001
                assert any(plan.schedule.group_nbytes for plan in plans) == (config is EXPERTS)
                assert not all(plan.schedule.group_nbytes for plan in plans)
        finally:
            opened.model.close()


@pytest.mark.parametrize("machine", ["usual disk", "fast disk"])
def test_no_plain_schedule_that_fits_is_faster(machine, opened):
    planner = opened.planner(MACHINES[machine])
    job = planner._job_of(Cut())
    choices = itertools.product(range(9), (0, 4 * BLOCK), (False, True), (0, 20_000_000))
    plain = [
        planner.predict(job, Schedule(1, resident, tail=tail, keep_head=keep_head, head_tokens=64, cache_nbytes=cache))
        for tail, resident, keep_head, cache in choices
    ]
    n_compared = 0
    for memory in budgets(planner):
        plan = planner.choose(memory)
        fitting = [other.step_s for other in plain if other.peak_nbytes <= memory]
        if fitting and way_of_cutting(plan) == way_of_cutting(plain[0]):
            assert plan.step_s <= min(fitting) * (1.1 if plan.schedule.tail == 8 else 1.01)
            n_compared += 1
    assert n_compared > 5


def test_blocks_have_the_room_of_products_until_these_are_made(opened):
    """Where reads are waited for: then fewer are, in no more memory."""
    planners = [opened.planner(replace(NEVER_WAITS, read_bytes_per_s=rate)) for rate in (7e7, 1e8, 1.5e8)]
    n = 0
    for planner, memory in itertools.product(planners, budgets(planners[0], n=80)):
        plan = planner.choose(memory)
        if not (lent := plan.schedule.lent_nbytes):
            continue
        without = planner.predict(plan.job, replace(plan.schedule, lent_nbytes=()))
        assert plan.step_s < without.step_s and plan.read_nbytes < without.read_nbytes
        assert without.peak_nbytes <= plan.peak_nbytes <= memory
        assert len(lent) == 8 - plan.schedule.tail and list(lent) == sorted(lent, reverse=True)
        n += 1
    assert n > 3


def test_with_room_for_everything_it_is_ordinary_training(opened):
    planner = opened.planner(MACHINES["usual disk"])
    for plan in (planner.most(), planner.choose(10 * planner.most().peak_nbytes)):
        assert plan.schedule.tail == 8 and plan.schedule.keep_head and not plan.schedule.spilled
        assert way_of_cutting(plan) == (None, None, None)
        assert plan.read_nbytes == ROWS * TOKENS * 256 * 2  # embedding rows


@pytest.mark.parametrize("least", [2_010_000_000, 150_000_000, 150_000_001, 159_999_999])
def test_the_least_that_is_named_is_enough(least, opened):
    """Also where it is a round number, or 2.01 times 1e9, which is less than 2010000000."""
    planner = opened.planner(MACHINES["usual disk"])
    planner = opened.planner(MACHINES["usual disk"], base=BASE + least - planner.least().peak_nbytes)
    assert planner.least().peak_nbytes == least
    assert planner.choose(least - 1) is None
    assert planner.choose(least).peak_nbytes == least
    message = planner.too_little(least - 1)
    named = parse_nbytes(message.split("at least ")[1].split(",")[0])
    assert least <= named <= least + 10_000_001
    assert planner.choose(named) is not None
    assert f"{(least - 1) / 1e9:.2f} GB" in message and f"1 x {ROWS} x {TOKENS} tokens" in message


@pytest.mark.parametrize("dtype", ["native", "float32"])
def test_a_dense_block_that_would_fit_in_4_bits_is_told_how(dtype, tmp_path):
    """And not where that would not help, or cannot be done."""
    planners = {}
    for name, config in {"16": DENSE, "4": quantized(DENSE, 4), "experts": EXPERTS}.items():
        (tmp_path / "config.json").write_text(json.dumps(config))
        with outline_of_config(tmp_path / "config.json") as directory:
            with closing(open_model(directory, compute_dtype=dtype).add_lora(-1)) as model:
                planners[name] = model._budget.planner(ROWS, TOKENS, 1, machine=NEVER_WAITS)
                planners[name]._base = BASE
                planners[name].least()
    how, least = "slowft prepare MODEL --output DIR --quantize", planners["16"].least().peak_nbytes
    memories = range(BASE, least, 5_000_000)
    (enough_in_4_bits, *_) = told = [memory for memory in memories if how in planners["16"].too_little(memory)]
    assert told == [memory for memory in memories if memory >= enough_in_4_bits]
    assert planners["4"].least().peak_nbytes <= enough_in_4_bits < least - 30_000_000
    for name in ("4", "experts"):
        assert how not in planners[name].too_little(planners[name].least().peak_nbytes - 1)


def test_less_than_the_least_is_refused_before_anything_is_read(directory, monkeypatch):
    monkeypatch.setattr(budget, "measured", lambda *_: MACHINES["usual disk"])
    with closing(open_model(directory).add_lora(-1)) as model:
        before = model.stats.total.bytes_read
        with pytest.raises(slowft.SlowftError, match=r"0\.03 GB is too little.*give at least [0-9.]+GB"):
            model.plan(1, 32, memory="30MB", follow=True)
        with pytest.raises(slowft.SlowftError, match="at least"):  # the ceiling stays
            model.loss_and_grads(mx.zeros((1, 33), mx.int32), mx.array([[1, 32]]))
        assert model.stats.total.bytes_read == before
    with pytest.raises(slowft.SlowftError, match="at least"):
        open_model(directory, memory="30MB")


# --- Spilling ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("model, lowest, micro_batches", [("opened", 0, 1), ("few_trained", 5, 2)])
def test_inputs_are_spilled_only_as_far_as_they_must(model, lowest, micro_batches, request):
    """The input of the first block, and of blocks below those trained, is never asked for again."""
    planner = request.getfixturevalue(model).planner(MACHINES["usual disk"], micro_batches=micro_batches)
    first = max(lowest, 1)
    spilled = []
    for memory in budgets(planner, n=20):
        plan = planner.choose(memory)
        n = plan.schedule.spilled
        n_written = max(n - first, 0)
        hidden = plan.job.rows * TOKENS * 256 * 4
        assert plan.written_nbytes == n_written * plan.job.micro_batches * hidden
        spilled.append(n_written)
        if n:
            for fewer in (0, *range(first + 1, n)):
                schedule = replace(plan.schedule, spilled=fewer)
                assert planner.predict(plan.job, schedule).peak_nbytes > memory
    assert spilled[0] and not spilled[-1]


# --- Reading ----------------------------------------------------------------------------------------


def distinct_tokens() -> tuple[mx.array, mx.array]:
    """A batch in which no input token comes twice, so that each reads its row of the embedding."""
    tokens = mx.arange(ROWS * TOKENS).reshape(ROWS, TOKENS)
    return mx.concatenate([tokens, tokens[:, :1]], axis=1), mx.array([[1, TOKENS]] * ROWS)


def test_a_step_reads_and_writes_what_its_plan_says(opened, tmp_path):
    planner = opened.planner(MACHINES["slow disk"])
    model, batch = opened.model, distinct_tokens()
    default = planner.predict(planner._job_of(Cut()), model._engine.schedule)
    assert default.read_nbytes == (2 * 8 - 2) * BLOCK + OUTSIDE
    ahead = [replace(default.schedule, slots=slots, head_ahead=True) for slots in (1, 2)]
    plans = [default, *(planner.predict(planner._job_of(Cut()), schedule) for schedule in ahead)]
    plans += [planner.choose(memory) for memory in budgets(planner, n=4)]
    try:
        for plan in plans:
            model._engine.follow(plan.schedule, tmp_path)
            for _ in range(2):  # the first starts with what the schedule before left
                model.loss_and_grads(*batch)
            assert model.stats.last.bytes_read == plan.read_nbytes
            assert model.stats.last.bytes_written == plan.written_nbytes
    finally:
        model._engine.follow(default.schedule, tmp_path)
    assert len({plan.read_nbytes for plan in plans}) >= 4


@pytest.mark.parametrize("n", [1, 2, 5])
def test_where_reading_takes_longest_room_for_a_block_saves_reading_it_twice(n, opened):
    planner = opened.planner(MACHINES["slow disk"])
    streaming = planner.predict(planner._job_of(Cut()), Schedule(slots=1, head_tokens=64, cache_nbytes=0))
    assert streaming.read_nbytes == (2 * 8 - 2) * BLOCK + OUTSIDE
    room = int(1.05 * n * BLOCK)  # plans leave a few percent of slack
    assert planner.choose(streaming.peak_nbytes + room).read_nbytes <= streaming.read_nbytes - 2 * n * BLOCK


@pytest.mark.parametrize("n", [3, 5])
def test_predicted_reads_are_the_best_there_are(n):
    """Against an exhaustive search over everything a buffer could hold, for blocks of one size.

    Also where buffers are more the further the turn is away.
    """
    order = (*range(n), *reversed(range(n)))

    def best(capacities: list[int]) -> int:
        states = {frozenset(): 0}
        per_round = []
        for _ in range(4):
            before = min(states.values())
            for item, capacity in zip(order, capacities):
                following: dict[frozenset, int] = {}
                for held, read in states.items():
                    stays = set() if item in held else {item}  # what was there may go at once
                    others = (held | {item}) - stays
                    for some in itertools.combinations(others, min(len(others), capacity - len(stays))):
                        option = frozenset(some) | stays
                        following[option] = min(following.get(option, 10**9), read + len(stays))
                states = following
            per_round.append(min(states.values()) - before)
        return per_round[-1]

    for capacity in range(1, n + 1):
        for more in ([0] * n, [2] + [0] * (n - 1), [max(0, n // 2 - item) for item in range(n)]):
            capacities = [capacity + more[item] for item in order]
            reads = reads_of(order, (7,) * n, (1,) * n, capacities, slots=1)
            assert sum(r.nbytes for r in reads) == 7 * best(capacities)


# --- Computing --------------------------------------------------------------------------------------

# layer -> what it multiplies, what it makes
LAYERS = {"q_proj": (256, 512), "k_proj": (256, 128), "v_proj": (256, 128), "o_proj": (512, 256)}
LAYERS |= {"gate_proj": (256, 704), "up_proj": (256, 704)}


def layer(name: str) -> str:
    return next(part for part in name.split(".") if part.endswith("_proj"))


def test_a_kept_product_saves_just_its_multiplications(opened):
    """By the layer's matrix, and by the adapter's second one: gradients take what comes of its first, of rank 8."""
    job = opened.planner(MACHINES["usual disk"])._job_of(Cut())
    visit = job.visits[3]
    assert sorted(layer(product.name) for product in visit.products) == sorted(LAYERS)  # nobody needs down_proj's
    for product in visit.products:
        width_in, width_out = LAYERS[layer(product.name)]
        assert product.nbytes == ROWS * TOKENS * width_out * 4
        assert visit.backward.flops - product.backward.flops == 2 * ROWS * TOKENS * (width_in + 8) * width_out
    saved = sum(2 * ROWS * TOKENS * (a + 8) * b for a, b in LAYERS.values())
    assert visit.backward.flops - visit.backward_kept.flops == saved


def test_products_are_kept_by_seconds_saved_per_byte(opened):
    """Where only multiplying takes time that is the width of what a layer multiplies; of equals, the larger output."""
    machine = replace(NEVER_WAITS, matmul_flops_per_s=1e9, bytes_per_s=1e15, functions_per_s=1e15)
    planner = opened.planner(machine)
    order = [{"o_proj"}, {"gate_proj", "up_proj"}, {"q_proj"}, {"k_proj", "v_proj"}]
    seen = set()
    for memory in budgets(planner, n=40):
        plan = planner.choose(memory)
        kept = [layer(name) for names in plan.schedule.kept for name in names]
        streamed = 8 - plan.schedule.tail
        for better, worse in zip(order, order[1:]):
            if any(name in worse for name in kept):
                assert all(kept.count(name) == streamed for name in better)
        seen |= {frozenset(kept)}
    assert frozenset({"o_proj"}) in seen and frozenset(LAYERS) in seen


@pytest.mark.parametrize("model", ["opened", "few_trained"])
def test_a_long_tail_counted_by_a_few_of_its_blocks_costs_what_its_whole_graph_does(model, request, monkeypatch):
    opened = request.getfixturevalue(model)
    engine = opened.model._engine
    tails = [(4, None), (8, None), (8, 64)]
    counted = opened.planner(MACHINES["usual disk"])._job_of(Cut())
    counted = [counted.head(*tail) for tail in tails]
    monkeypatch.setattr(costs, "REPETITIONS", 8)
    whole = engine.on_thread(lambda: costs.Costing(engine).job(ROWS, TOKENS, 1, Cut(), 2, engine.head_may_be_cut))
    for cost, tail in zip(counted, tails):
        exact = whole.head(*tail)
        assert len(exact.ops) > 500
        for name in ("peak_nbytes", "output_nbytes", "flops", "allocated_nbytes", "products"):
            assert getattr(cost, name) == getattr(exact, name), name
        assert Counter(cost.ops) == Counter(exact.ops)


@pytest.mark.parametrize("keys", [None, ["self_attn.q_proj", "lm_head"]], ids=["blocks", "head too"])
def test_a_head_counted_by_a_few_of_its_chunks_costs_what_all_of_them_do(keys, tmp_path, monkeypatch):
    opened = Opened(save_random(tmp_path / "m", LLAMA | {"num_hidden_layers": 3}), keys=keys)
    engine = opened.model._engine
    counted = opened.planner(MACHINES["usual disk"], rows=3, tokens=100)._job_of(Cut())
    heads = [(0, 16), (2, 16), (2, 32)]  # 300 tokens: the last chunk is smaller
    counted = [counted.head(*head) for head in heads]
    monkeypatch.setattr(costs, "CHUNKS", 1000)
    whole = engine.on_thread(lambda: costs.Costing(engine).job(3, 100, 1, Cut(), 2, engine.head_may_be_cut))
    for cost, head in zip(counted, heads):
        exact = whole.head(*head)
        assert (cost.flops, cost.products) == (exact.flops, exact.products)
        assert cost.peak_nbytes == pytest.approx(exact.peak_nbytes, rel=0.01)
        assert cost.reserved_nbytes == pytest.approx(exact.reserved_nbytes, rel=0.01)
        moved = (sum(op[1] for op in c.ops) for c in (cost, exact))
        assert next(moved) == pytest.approx(next(moved), rel=0.02)
        seconds = [MACHINES["usual disk"].seconds(*c.work) for c in (cost, exact)]
        assert seconds[0] == pytest.approx(seconds[1], rel=0.02)
    opened.model.close()


@pytest.mark.parametrize("n_blocks", [1, 2])
def test_models_of_a_block_or_two_are_planned_for_every_budget(n_blocks, tmp_path):
    opened = Opened(save_random(tmp_path / "m", SMALL | {"num_hidden_layers": n_blocks}))
    planner = opened.planner(MACHINES["usual disk"], rows=1)
    plans = [planner.choose(memory) for memory in budgets(planner)]
    assert all(0 <= plan.schedule.tail <= n_blocks and plan.peak_nbytes <= plan.memory for plan in plans)
    assert plans[-1].schedule.tail == n_blocks
    opened.model.close()


def test_long_sequences_are_cut_into_pieces_only_when_they_must(tmp_path):
    config = LLAMA | {"num_hidden_layers": 1, "num_attention_heads": 8}
    opened = Opened(save_random(tmp_path / "m", config))
    scores = 8 * 4096 * 4096 * 4
    planner = opened.planner(MACHINES["usual disk"], rows=1, tokens=4096)
    whole, small = planner.choose(BASE + 8 * scores), planner.choose(BASE + scores // 2)
    assert way_of_cutting(whole) == (None, None, None) and whole.peak_nbytes > BASE + scores
    assert small.schedule.rows is None and small.schedule.mlp_tokens and small.schedule.attention_queries
    assert small.peak_nbytes <= BASE + scores // 2
    opened.model.close()


# --- The command ------------------------------------------------------------------------------------


@pytest.fixture
def slowft_(llama_with_tokenizer, tmp_path, capsys, monkeypatch) -> Command:
    """The command, on a machine that need not be measured."""
    monkeypatch.setattr(budget, "measured", lambda *_: MACHINES["usual disk"])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    data = write_splits(tmp_path / "data", COMPLETIONS)
    return Command(tmp_path, llama_with_tokenizer, data, capsys, monkeypatch)


def planned(slowft_: Command, *options) -> dict:
    outcome = slowft_.bare("plan", "--json", *options)
    assert outcome.err == "" and outcome.status == 0
    return json.loads(outcome.out)  # one object, nothing else


@pytest.mark.parametrize("name, dtype", LARGE)
def test_large_models_are_planned_from_their_config_alone(name, dtype, slowft_):
    platform.reset_peak_memory()
    in_use, read = platform.memory_in_use(), nbytes_read_by_this_process()
    job = ["--batch-size", 1, "--max-seq-length", 257, "--num-layers", 1, "--compute-dtype", dtype]
    result = planned(slowft_, "--config", CONFIGS / f"{name}.json", "--memory", "100GB", "--tokens", 1_000_000, *job)
    assert nbytes_read_by_this_process() - read < 30_000_000  # code, configs, headers
    assert platform.peak_memory() - in_use < 500_000_000  # a block of the least of them takes 980 MB
    assert result.keys() == {"machine", "model", "files", "notes", "plan", "table", "run"}
    assert result["machine"]["matmul_flops_per_s"] == 1e11
    assert result["model"]["nbytes_on_disk"] > 60e9
    plan, of_job = result["plan"], result["plan"]["job"]
    assert plan["predicted"]["peak_nbytes"] <= plan["memory"] == 100e9
    assert result["run"]["steps"] == round(1_000_000 / 256)
    least, *others = (row["predicted"]["peak_nbytes"] for row in result["table"])
    assert least < others[0] <= others[1] < others[2]
    assert least + 1_000_000 < plan["least_memory"] < least + 20_000_000  # as processes differ
    stored, computed = of_job["block_nbytes"], of_job["block_compute_nbytes"]
    if dtype == "native":  # as on a GPU: computed with as it lies there, packed if it is packed
        assert computed == stored
        assert least < 3 * max(stored) + 4e9
    else:  # 4 bits each and a byte for 32 of them become 32 bits each
        assert 7.3 * min(stored) < min(computed) < 32 / (4 + 8 / 32) * min(stored)


def nbytes_read_by_this_process() -> int:
    """As the kernel counts them: whatever `read` and its like returned, from disk or the file cache."""
    if sys.platform != "linux":
        return 0
    return int(dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())["rchar"])


def test_figures_are_those_of_the_shapes(slowft_):
    job = ["--batch-size", 2, "--max-seq-length", 129, "--grad-accumulation-steps", 3, "--num-layers", 16]
    run = ["--tokens", 1_000_000, "--epochs", 2, "--memory", "100GB"]
    result = planned(slowft_, "--config", CONFIGS / "llama-3.3-70b.json", *job, *run)
    of_job = result["plan"]["job"]
    hidden, ffn, kv, vocab = 8192, 28672, 1024, 128256
    block = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * ffn + 2 * hidden
    assert result["model"] == {
        "nbytes_on_disk": 2 * 70_553_706_496,  # its published number of parameters
        "embedding_nbytes": 2 * hidden * vocab,
    }
    in_and_out = 2 * 2 * hidden + 2 * (hidden + kv) + 3 * (hidden + ffn)
    adapter = 16 * 8 * in_and_out * 4
    assert of_job == {
        "micro_batches": 3,
        "rows": 2,
        "tokens": 128,
        "blocks": 80,
        "block_nbytes": [2 * block] * 80,
        "block_compute_nbytes": [4 * block] * 80,
        "head_nbytes": 2 * hidden * vocab,
        "head_compute_nbytes": 4 * hidden * vocab,
        "adapter_nbytes": adapter,
        "optimizer_nbytes": 2 * adapter,
        "activation_nbytes": 2 * 128 * hidden * 4,
    }
    steps = round(2 * 1_000_000 / (2 * 3 * 128))
    predicted = result["plan"]["predicted"]
    assert result["run"]["steps"] == steps
    first = steps / 2  # in the second epoch the 64 blocks below are not read
    assert 0 <= result["run"]["read_nbytes"] - first * predicted["read_nbytes"] < 0.3 * first * predicted["read_nbytes"]
    assert first * predicted["step_s"] < result["run"]["seconds"] < steps * predicted["step_s"]


def test_steps_are_counted_by_the_batch_as_given_however_it_is_cut(slowft_, monkeypatch):
    """3 rows, 2 at a time, are 3 rows."""

    def least_with_two_rows(self, memory):
        job = self._job_of(Cut(rows=2))
        return self.predict(job, self._least_of(job))

    monkeypatch.setattr(Planner, "choose", least_with_two_rows)
    options = ["--model", slowft_.model, "--batch-size", 3, "--max-seq-length", 65]
    result = planned(slowft_, *options, "--tokens", 192_000)
    assert result["plan"]["job"]["rows"] == result["plan"]["job"]["micro_batches"] == 2
    assert result["run"]["steps"] == 1000


def test_the_page_says_it_all(slowft_):
    options = ["--max-seq-length", 129, "--memory", "1GB", "--tokens", 10_000, "--epochs", 1.5]
    outcome = slowft_.bare("plan", "--model", slowft_.model, *options)
    assert outcome.err == "" and outcome.status == 0
    assert "Plan within 1.00 GB: all blocks and the head in memory, as in ordinary training" in outcome.out
    assert "1.5 x 10,000 tokens: 29 steps" in outcome.out and "nothing written" in outcome.out
    for words in ("Machine", "Model", "Job", "of the peak: ", "least", "1.5x", "2x", "all of it", "bound by"):
        assert words in outcome.out
    assert "reading is not in these seconds" not in outcome.out


def test_seconds_without_reading_are_said_to_be_without_it(slowft_, monkeypatch):
    monkeypatch.setattr(budget, "measured", lambda *_: NEVER_WAITS)
    outcome = slowft_.bare("plan", "--model", slowft_.model, "--max-seq-length", 65)
    assert outcome.status == 0 and "reading is not in these seconds" in outcome.out


CONFIG = CONFIGS / "qwen3-32b.json"


@pytest.mark.parametrize(
    "options, status, says",
    [
        ([], 2, "give a model: --model with"),
        (["--model", "x", "--config", CONFIG], 2, "give a model: --model with"),
        (["--config", CONFIG, "--epochs", 2], 2, "--tokens"),
        (["--config", CONFIG, "--tokens", 9, "--epochs", 0], 2, "'--epochs': 0"),
        (["--config", CONFIG, "--batch-size", 0], 2, "'--batch-size': 0"),
        (["--config", CONFIG, "--optimizer", "lion"], 2, "'lion'"),
    ],
    ids=str,
)
def test_misuse_is_a_usage_error(options, status, says, slowft_):
    assert says in slowft_.usage("plan", *options)


@pytest.mark.parametrize(
    "options, status, says",
    [
        (["--config", "none.json"], 1, "none.json cannot be read: No such file"),
        (["--model", "gone"], 1, "gone does not exist"),
        (["--config", CONFIG, "--memory", "lots"], 2, "'lots' is not an amount of memory to work in"),
        (["--config", CONFIG, *"--batch-size 1 --max-seq-length 65 --memory 90MB".split()], 2, "0.09 GB is too little"),
        (["--config", CONFIG, "--num-layers", -2], 2, "num"),
    ],
    ids=str,
)
def test_mistake_is_one_line(options, status, says, slowft_):
    before = snapshot(slowft_.directory)
    outcome = slowft_.bare("plan", *options)
    assert outcome.status == status and outcome.out == ""
    (line,) = outcome.err.splitlines()
    assert line.startswith("Error: ") and says in line
    assert snapshot(slowft_.directory) == before


def test_hub_out_of_reach_is_one_line():
    code = "import sys; sys.argv[0] = 'slowft'; from slowft.cli.main import main; main()"
    command = [sys.executable, "-c", code, "plan", "--model", "some/model"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("Error: some/model: the hub cannot be reached")


# --- Following it -----------------------------------------------------------------------------------


def test_dry_run_prints_the_plan_and_changes_nothing_and_a_run_prints_the_same_first(slowft_):
    before = snapshot(slowft_.directory)
    outcome = slowft_("--dry-run", "--memory", "2GB")
    assert outcome.err == "" and outcome.status == 0
    first, second, third = outcome.out.splitlines()
    assert first.startswith("Plan within 2.00 GB: all blocks and the head in memory")
    assert second.startswith("  predicted peak ") and "; least that works " in second
    assert third.startswith("  predicted step ") and third.endswith(" read a step")
    assert snapshot(slowft_.directory) == before

    lines = slowft_("--memory", "2GB").out.splitlines()
    assert lines[0] == first and lines[2] == third  # the second has what this process holds by now
    assert any(line.startswith("Iter 2") for line in lines[3:])
    assert (slowft_.directory / "adapters" / "adapters.safetensors").exists()


def test_seconds_are_not_predicted_where_the_machine_cannot_be_measured(slowft_, monkeypatch):
    monkeypatch.setattr(budget, "ROOM_TO_MEASURE", ((1 << 40, 1),))
    third = slowft_("--dry-run", "--memory", "2GB").out.splitlines()[2]
    assert third.startswith("  seconds not predicted, as measuring this machine takes more memory: ")
    assert slowft_("--memory", "2GB").status == 0


def test_finetune_refuses_too_little_naming_the_least_and_takes_that(slowft_, monkeypatch):
    monkeypatch.setattr(platform, "memory_in_use", lambda: 300_000_000)  # else this process's own moves between runs
    memory = "30MB"
    for _ in range(2):  # on opening, what one token needs; then what the job needs
        outcome = slowft_("--memory", memory, "--dry-run")
        if outcome.status == 0:
            break
        assert outcome.status == 2 and outcome.out == ""
        (line,) = outcome.err.splitlines()
        memory = line.split("give at least ")[1].split(",")[0]
    assert slowft_("--memory", memory, "--dry-run").status == 0
    assert memory != "30MB"


@pytest.mark.parametrize("named", [True, False])
def test_inputs_are_spilled_where_the_user_says(named, slowft_, monkeypatch):
    """Else into the user's cache directory."""
    from slowft.engine import activations

    made = []

    def spill_file(directory, *rest):
        made.append(directory)
        return SpillFile(directory, *rest)

    SpillFile = activations.SpillFile
    monkeypatch.setattr(activations, "SpillFile", spill_file)
    spilling = Schedule(slots=1, spilled=4, head_tokens=64)
    monkeypatch.setattr(Planner, "choose", lambda self, memory: self.predict(self._job_of(Cut()), spilling))
    outcome = slowft_("--memory", "4GB", *(["--spill-dir", slowft_.directory / "here"] if named else []))
    assert outcome.status == 0, outcome
    assert "inputs of 2 blocks on disk" in outcome.out and "written a step" in outcome.out
    assert set(made) == {slowft_.directory / "here" if named else slowft_.directory / "cache" / "slowft"}
