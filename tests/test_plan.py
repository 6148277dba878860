"""Plans keep to their memory, keep by rule what helps most, and say what a step then really reads and writes."""

import slowft  # noqa: F401, I001  (before mlx: it loads OpenBLAS)

import itertools
import json
import os
import re
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest

from architectures import ARCHITECTURES
from conftest import LLAMA, save_random
from slowft import platform
from slowft.bench.shapes import quantized
from slowft.engine import budget
from slowft.engine.model import open_model, parse_nbytes
from slowft.models.outline import outline_of_config
from slowft.planning.job import Chunking
from slowft.planning.machine import Machine
from slowft.planning.measure import BACKWARD, FORWARD, HEAD, Experience, Measurements, Rates
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
HEAD_NBYTES = 1024 * 256 * 2
OUTSIDE = HEAD_NBYTES + ROWS * TOKENS * 256 * 2  # head, and rows of the embedding


def machine(read: float | None) -> Machine:
    """Computes 100 GFLOP/s, casts for nothing."""
    return Machine(10**12, 1, "a machine", "float32", Rates(1e11, 1e11, 1e11, 1e15, read))


MACHINES = {"slow disk": machine(1e5), "usual disk": machine(3e8), "fast disk": machine(1e11)}


class Opened:
    """A model with LoRA on its last `num_layers` blocks, and planners for it that share what they know of its jobs."""

    def __init__(self, directory: Path, num_layers: int = -1, compute_dtype: str | None = None, keys=None):
        self.model = open_model(directory, compute_dtype=compute_dtype).add_lora(num_layers, keys=keys)

    def planner(self, machine, rows=ROWS, tokens=TOKENS, micro_batches=1, base=BASE, experience=None) -> Planner:
        job_of = self.model.budget.planner(rows, tokens, micro_batches).job_of
        return Planner(job_of, machine, base, rows, tokens, mx.get_active_memory(), experience)


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


@pytest.fixture(scope="module")
def native(directory):
    opened = Opened(directory, compute_dtype="native")
    yield opened
    opened.model.close()


def budgets(planner: Planner, n: int = 10) -> list[int]:
    """From the least to a little more than all, closer together where memory is short."""
    least, most = planner.least().peak_nbytes, planner.most().peak_nbytes
    return [int(least + (1.02 * most - least) * (i / n) ** 2) for i in range(n + 1)]


def order_of_sums(plan) -> tuple:
    s = plan.schedule
    return s.rows, s.mlp_tokens, s.attention_queries, s.group_nbytes, s.head_tokens


# --- Memory -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model, disk",
    [("opened", disk) for disk in MACHINES] + [("few_trained", "usual disk"), ("native", "usual disk")],
)
def test_no_plan_passes_its_memory_and_more_of_it_is_hardly_slower(model, disk, request):
    n = 2 if model == "few_trained" else 1
    planner = request.getfixturevalue(model).planner(MACHINES[disk], micro_batches=n)
    plans = [planner.choose(memory) for memory in budgets(planner)]
    for plan in [*plans, *(planner.first(plan.memory) for plan in plans)]:
        assert plan.peak_nbytes <= plan.memory
        assert sum(plan.parts.values()) == plan.peak_nbytes
    for plan, larger in zip(plans, plans[1:]):
        assert (plan.schedule.rows or ROWS) <= (larger.schedule.rows or ROWS)
        if order_of_sums(plan) == order_of_sums(larger):
            assert larger.step_s <= plan.step_s * 1.05  # plans that differ by less are not told apart
            assert larger.written_nbytes <= plan.written_nbytes
    assert plans[-1].step_s < 0.9 * plans[0].step_s


def test_with_room_for_everything_it_is_ordinary_training(opened):
    planner = opened.planner(MACHINES["usual disk"])
    for plan in (planner.most(), planner.choose(10 * planner.most().peak_nbytes)):
        assert plan.is_ordinary and plan.schedule.keep_head and plan.schedule.keep_buffers
        assert order_of_sums(plan)[:4] == (None,) * 4
        assert plan.read_nbytes == ROWS * TOKENS * 256 * 2  # embedding rows


def test_nothing_lies_between_streaming_and_ordinary_training(opened):
    planner = opened.planner(MACHINES["usual disk"])
    assert {planner.choose(memory).schedule.in_memory for memory in budgets(planner, n=30)} == {False, True}


def test_the_first_step_keeps_next_to_nothing(opened):
    """Whatever the memory: it is the measurement. With much memory it spills nothing either."""
    planner = opened.planner(MACHINES["slow disk"])
    for memory in budgets(planner):
        first, later = planner.first(memory), planner.choose(memory)
        s = first.schedule
        assert not (s.in_memory or s.kept or s.resident_nbytes or s.keep_head or s.temporary_nbytes)
        assert order_of_sums(first) == order_of_sums(later)
    assert planner.first(BASE * 5).schedule.spilled == 0


def test_how_work_is_cut_depends_on_neither_measurements_nor_speed(opened):
    """Else a run that is resumed, or done again, would end in other last bits."""
    experience = Experience()
    planners = [opened.planner(machine) for machine in MACHINES.values()]
    job = planners[0].job_of(Chunking())
    for scale in (0.3, 1.0):
        measurements = Measurements()
        for visit in job.visits:
            measurements.note(visit.kind, FORWARD, 0.1, int(scale * visit.forward_nbytes))
            measurements.note(visit.kind, BACKWARD, 0.5, int(scale * visit.backward_nbytes))
        measurements.note(HEAD, FORWARD, 9.0, 10_000_000)
        experience.learn(job, Schedule(head_tokens=64), measurements)
        planners.append(opened.planner(MACHINES["usual disk"], experience=experience))
    for memory in budgets(planners[0], n=20):
        assert len({order_of_sums(planner.choose(memory)) for planner in planners}) == 1


def test_what_was_measured_takes_the_place_of_the_bound(opened):
    """And makes room for more to be kept."""
    job = opened.planner(MACHINES["usual disk"]).job_of(Chunking())
    measurements, experience = Measurements(), Experience()
    assert not experience.knows(job)
    for visit in job.visits:
        measurements.note(visit.kind, FORWARD, 0.1, visit.forward_nbytes // 2)
        measurements.note(visit.kind, BACKWARD, 0.5, visit.backward_nbytes // 2)
    assert experience.learn(job, Schedule(), measurements) and experience.knows(job)
    visit = job.visits[3]
    found = experience.nbytes(job, visit.kind, BACKWARD, visit.backward_nbytes)
    assert visit.backward_nbytes // 2 <= found <= 0.55 * visit.backward_nbytes
    longer = opened.planner(MACHINES["usual disk"], tokens=2 * TOKENS).job_of(Chunking())
    bound = longer.visits[3].backward_nbytes
    found = experience.nbytes(longer, visit.kind, BACKWARD, bound)  # by the ratio, with a larger margin
    assert 0.55 * bound < found < 0.7 * bound
    much_longer = opened.planner(MACHINES["usual disk"], tokens=8 * TOKENS).job_of(Chunking())
    assert not experience.knows(much_longer)
    memory = opened.planner(MACHINES["usual disk"]).least().peak_nbytes + 15_000_000
    before, after = (
        opened.planner(MACHINES["usual disk"], experience=known).choose(memory) for known in (None, experience)
    )
    n_kept = [sum(map(len, plan.schedule.kept)) for plan in (before, after)]
    assert n_kept[1] > n_kept[0]
    # seconds are those of this run from now on: 0.1 s and 0.5 s a block, less what kept outputs save
    assert 8 * 0.1 < after.compute_s < 8 * 0.6


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if "qwen3_next" not in name])
def test_a_pass_makes_no_more_than_its_bound(name, tmp_path):
    """By MLX's own count, while it makes no buffer ahead of the computation."""
    opened = Opened(save_random(tmp_path / "m", ARCHITECTURES[name]))
    model, rows, tokens = opened.model, 2, 60
    batch = mx.random.randint(0, 100, (rows, tokens + 1)), mx.array([[1, tokens]] * rows)
    job = opened.planner(MACHINES["usual disk"], rows, tokens).job_of(Chunking())
    for _ in range(2):  # the first step warms up
        model.engine.peaks_known.clear()
        model.engine.loss_and_grads([batch], measure=True)
    for visit in job.visits:
        passes = model.engine.measurements.passes
        assert 0 < passes[visit.kind, FORWARD].nbytes <= visit.forward_nbytes + 100_000
        assert 0 < passes[visit.kind, BACKWARD].nbytes <= visit.backward_nbytes + 100_000
    model.close()


@pytest.mark.parametrize("least", [2_010_000_000, 150_000_000, 150_000_001, 159_999_999])
def test_the_least_that_is_named_is_enough(least, opened):
    """Also where it is a round number, or 2.01 times 1e9, which is less than 2010000000."""
    planner = opened.planner(MACHINES["usual disk"])
    planner = opened.planner(MACHINES["usual disk"], base=BASE + least - planner.least().peak_nbytes)
    assert planner.least().peak_nbytes == least
    assert planner.choose(least - 1) is None and planner.first(least - 1) is None
    assert planner.choose(least).peak_nbytes == planner.first(least).peak_nbytes == least
    message = planner.too_little(least - 1)
    named = parse_nbytes(message.split("at least ")[1].split(",")[0])
    assert least <= named <= least + 10_000_001
    assert planner.choose(named) is not None
    assert f"{(least - 1) / 1e9:.2f} GB" in message and f"1 x {ROWS} x {TOKENS} tokens" in message


DENSE = SMALL | {"num_hidden_layers": 3, "hidden_size": 1024, "intermediate_size": 14336}
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


@pytest.mark.parametrize("dtype", ["native", "float32"])
def test_a_dense_block_that_would_fit_in_4_bits_is_told_how(dtype, tmp_path):
    """And not where that would not help, or cannot be done."""
    planners = {}
    for name, config in {"16": DENSE, "4": quantized(DENSE, 4), "experts": EXPERTS}.items():
        (tmp_path / "config.json").write_text(json.dumps(config))
        with outline_of_config(tmp_path / "config.json") as directory:
            with closing(open_model(directory, compute_dtype=dtype).add_lora(-1)) as model:
                job_of = model.budget.planner(ROWS, TOKENS, 1).job_of
                planners[name] = Planner(job_of, MACHINES["usual disk"], BASE, ROWS, TOKENS)
                planners[name].least()
    how, least = "slowft prepare MODEL --output DIR --quantize", planners["16"].least().peak_nbytes
    memories = range(BASE, least, 5_000_000)
    (enough_in_4_bits, *_) = told = [memory for memory in memories if how in planners["16"].too_little(memory)]
    assert told == [memory for memory in memories if memory >= enough_in_4_bits]
    assert planners["4"].least().peak_nbytes <= enough_in_4_bits < least - 30_000_000
    for name in ("4", "experts"):
        assert how not in planners[name].too_little(planners[name].least().peak_nbytes - 1)


def test_less_than_the_least_is_refused_before_anything_is_read(directory):
    with closing(open_model(directory).add_lora(-1)) as model:
        before = model.stats.total.bytes_read
        with pytest.raises(slowft.SlowftError, match=r"0\.03 GB is too little.*give at least [0-9.]+GB"):
            model.plan(1, 32, memory="30MB", follow=True)
        with pytest.raises(slowft.SlowftError, match="at least"):  # the ceiling stays
            model.loss_and_grads(mx.zeros((1, 33), mx.int32), mx.array([[1, 32]]))
        assert model.stats.total.bytes_read == before
    with pytest.raises(slowft.SlowftError, match="at least"):
        open_model(directory, memory="30MB")


@pytest.mark.parametrize("n_blocks", [1, 2])
def test_models_of_a_block_or_two_are_planned_for_every_budget(n_blocks, tmp_path):
    opened = Opened(save_random(tmp_path / "m", SMALL | {"num_hidden_layers": n_blocks}))
    planner = opened.planner(MACHINES["usual disk"], rows=1)
    plans = [planner.choose(memory) for memory in budgets(planner)]
    assert all(plan.peak_nbytes <= plan.memory for plan in plans)
    assert plans[-1].is_ordinary
    opened.model.close()


def test_long_sequences_are_cut_into_pieces_only_when_they_must(tmp_path):
    opened = Opened(save_random(tmp_path / "m", LLAMA | {"num_hidden_layers": 1, "num_attention_heads": 8}))
    scores = 8 * 4096 * 4096 * 4
    planner = opened.planner(MACHINES["usual disk"], rows=1, tokens=4096)
    whole, small = planner.choose(BASE + 8 * scores), planner.choose(BASE + scores // 2)
    assert order_of_sums(whole)[:3] == (None, None, None) and whole.peak_nbytes > BASE + scores
    assert small.schedule.rows is None and small.schedule.mlp_tokens and small.schedule.attention_queries
    assert small.peak_nbytes <= BASE + scores // 2
    opened.model.close()


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
    default = planner.predict(planner.job_of(Chunking()), model.engine.schedule)
    assert default.read_nbytes == (2 * 8 - 2) * BLOCK + OUTSIDE
    ahead = [replace(default.schedule, slots=slots, head_ahead=True) for slots in (1, 2)]
    plans = [default, *(planner.predict(planner.job_of(Chunking()), schedule) for schedule in ahead)]
    plans += [planner.choose(memory) for memory in budgets(planner, n=4)]
    try:
        for plan in plans:
            model.engine.follow(plan.schedule, tmp_path)
            for _ in range(2):  # the first starts with what the schedule before left
                model.loss_and_grads(*batch)
            assert model.stats.last.bytes_read == plan.read_nbytes
            assert model.stats.last.bytes_written == plan.written_nbytes
    finally:
        model.engine.follow(default.schedule, tmp_path)
    assert len({plan.read_nbytes for plan in plans}) >= 4


@pytest.mark.parametrize("n", [1, 2, 5])
def test_where_reads_are_waited_for_room_goes_to_blocks_first(n, opened):
    """Each that stays saves reading it twice."""
    planner = opened.planner(MACHINES["slow disk"])
    streaming = planner.predict(planner.job_of(Chunking()), Schedule(slots=1, head_tokens=128, cache_nbytes=0))
    assert streaming.read_nbytes == (2 * 8 - 2) * BLOCK + OUTSIDE
    # plans leave a few percent of slack, and up to a quarter of the room to freed buffers
    room = int(1.05 * n * BLOCK / 0.75) + HEAD_NBYTES
    assert planner.choose(streaming.peak_nbytes + room).read_nbytes <= streaming.read_nbytes - 2 * n * BLOCK


def test_where_reads_hide_room_goes_to_outputs_first(opened):
    planner = opened.planner(MACHINES["fast disk"])
    for memory in budgets(planner, n=30):
        plan = planner.choose(memory)
        if plan.schedule.resident_nbytes:  # then there was room for all outputs
            assert sum(map(len, plan.schedule.kept)) == 8 * len(LAYERS)


def test_blocks_have_the_room_of_outputs_until_these_are_made(opened):
    """Where reads are waited for: then fewer are, in no more memory."""
    planners = [opened.planner(machine(read)) for read in (7e7, 1e8, 1.5e8, 3e8)]
    n = 0
    for planner, memory in itertools.product(planners, budgets(planners[0], n=80)):
        plan = planner.choose(memory)
        if not (temporary := plan.schedule.temporary_nbytes):
            continue
        without = planner.predict(plan.job, replace(plan.schedule, temporary_nbytes=()))
        assert plan.step_s < without.step_s and plan.read_nbytes < without.read_nbytes
        assert plan.peak_nbytes <= memory
        assert len(temporary) == 8 and list(temporary) == sorted(temporary, reverse=True)
        n += 1
    assert n > 3


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


def test_flops_are_those_of_the_closed_form(opened):
    """Products of the layers and of their adapters of rank 8, and of attention."""
    visit = opened.planner(MACHINES["usual disk"]).job_of(Chunking()).visits[3]
    tokens, layers = ROWS * TOKENS, LAYERS | {"down_proj": (704, 256)}
    dense = sum(2 * tokens * a * b for a, b in layers.values())
    lora = sum(2 * tokens * 8 * (a + b) for a, b in layers.values())
    attention = 4 * ROWS * 8 * TOKENS * TOKENS * 64
    assert visit.forward_flops == dense + lora + attention
    assert visit.graph_flops == 2 * (dense + lora) + 3 * attention  # (a third product per adapter is left out)
    unneeded = 2 * tokens * (704 + 8) * 256  # down_proj's output, which no gradient needs
    assert visit.backward_flops == visit.graph_flops - unneeded


def test_a_kept_output_saves_just_its_multiplications(opened):
    """By the layer's matrix, and by the adapter's second one: gradients take what comes of its first, of rank 8."""
    visit = opened.planner(MACHINES["usual disk"]).job_of(Chunking()).visits[3]
    assert sorted(layer(output.name) for output in visit.outputs) == sorted(LAYERS)  # nobody needs down_proj's
    for output in visit.outputs:
        width_in, width_out = LAYERS[layer(output.name)]
        assert output.nbytes == ROWS * TOKENS * width_out * 4
        assert output.flops == 2 * ROWS * TOKENS * (width_in + 8) * width_out


@pytest.mark.parametrize(
    "name, needed",
    [
        ("gemma2 (embedding scale, soft caps)", {"o_proj", "down_proj"}),  # whose outputs are normalised
        ("cohere2 (parallel block, sliding window)", set()),  # both outputs are only added up
    ],
)
def test_outputs_that_no_gradient_needs_are_not_kept(name, needed, tmp_path):
    opened = Opened(save_random(tmp_path / "m", ARCHITECTURES[name]))
    visit = opened.planner(MACHINES["usual disk"]).job_of(Chunking()).visits[1]
    names = {layer(output.name) for output in visit.outputs}
    assert names & {"o_proj", "down_proj"} == needed and {"gate_proj", "up_proj", "v_proj"} <= names
    opened.model.close()


def test_outputs_are_kept_by_seconds_saved_per_byte(opened):
    """That is the width of what a layer multiplies; of equals, the larger output."""
    planner = opened.planner(MACHINES["fast disk"])
    order = [{"o_proj"}, {"gate_proj", "up_proj"}, {"q_proj"}, {"k_proj", "v_proj"}]
    seen = set()
    for memory in budgets(planner, n=60):
        plan = planner.choose(memory)
        kept = [layer(name) for names in plan.schedule.kept for name in names]
        for better, worse in zip(order, order[1:]):
            if any(name in worse for name in kept):
                assert all(kept.count(name) == 8 for name in better)
        seen |= {frozenset(kept)}
    assert frozenset({"o_proj"}) in seen and frozenset(LAYERS) in seen


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


def test_the_page_fits_its_terminal_and_a_pipe_gets_no_spaces_at_ends(slowft_, monkeypatch):
    def lines(*options) -> list[str]:
        outcome = slowft_.bare("plan", "--model", slowft_.model, "--memory", "2GB", *options)
        assert outcome.status == 0, outcome
        return re.sub(r"\x1b\[[0-9;]*m", "", outcome.out).splitlines()

    piped = lines("--batch-size", 2)
    assert not [line for line in piped if line != line.rstrip()]
    assert sum("shared by" in line for line in piped) == 3  # by 2 machines, and neither by 4 nor by 8
    assert not [line for line in lines("--batch-size", 1) if "shared by" in line]
    words = {word for word in " ".join(piped).split() if word.isalpha()} - {"what", "is", "kept"}  # a column's name
    monkeypatch.setenv("FORCE_COLOR", "1")  # to rich, this is a terminal
    for width in (80, 120):
        monkeypatch.setenv("COLUMNS", str(width))
        shown = lines("--batch-size", 2)
        assert max(map(len, shown)) <= width
        assert any(line.startswith("         ") for line in shown)  # what goes on below is below its name's words
        assert words <= set(" ".join(shown).split())  # nothing is lost


@pytest.mark.parametrize("name, dtype", LARGE)
def test_large_models_are_planned_from_their_config_alone(name, dtype, slowft_):
    platform.reset_peak_memory()
    in_use, read = platform.memory_in_use(), nbytes_read_by_this_process()
    job = ["--batch-size", 1, "--max-seq-length", 257, "--num-layers", 1, "--compute-dtype", dtype]
    result = planned(slowft_, "--config", CONFIGS / f"{name}.json", "--memory", "100GB", "--tokens", 1_000_000, *job)
    assert nbytes_read_by_this_process() - read < 30_000_000  # code, configs, headers
    assert platform.peak_memory() - in_use < 500_000_000  # a block of the least of them takes 980 MB
    assert result.keys() == {"machine", "model", "files", "notes", "plan", "table", "several", "run"}
    assert [one["reason"] is None for one in result["several"]["machines"]] == [False] * 3  # one row is not shared
    assert result["machine"]["rates"]["forward"] == 1e11
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
        return next(self.predict(*way) for way in self.ways() if way[1].rows == 2)

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
    monkeypatch.setattr(budget, "measured", lambda *_: machine(None))
    outcome = slowft_.bare("plan", "--model", slowft_.model, "--max-seq-length", 65)
    assert outcome.status == 0 and "reading is not in these seconds" in outcome.out


CONFIG = CONFIGS / "qwen3-32b.json"


@pytest.mark.parametrize(
    "options, status, says",
    [
        ([], 2, "give a model: --model with"),
        (["--model", "x", "--config", CONFIG], 2, "give --model or --config, not both"),
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
    assert third.startswith("  seconds are not predicted, as no step was measured") and third.endswith(" read a step")
    assert snapshot(slowft_.directory) == before

    lines = slowft_("--memory", "2GB").out.splitlines()
    assert lines[0] == first and lines[2] == third  # the second has what this process holds by now
    assert any(line.startswith("Iter 2") for line in lines[3:])
    assert (slowft_.directory / "adapters" / "adapters.safetensors").exists()


def test_nothing_is_measured_before_the_first_step_and_what_it_measured_is_known_to_the_next_run(slowft_, monkeypatch):
    monkeypatch.setattr(budget, "measured", None)  # cannot be called
    assert slowft_("--memory", "2GB").status == 0
    third = slowft_("--dry-run", "--memory", "2GB").out.splitlines()[2]
    assert third.startswith("  predicted step ") and "bound by" in third
    rates = json.loads((slowft_.directory / "cache" / "slowft" / "rates.json").read_text())
    of_this_machine, of_such_matrices = rates.values()
    assert of_this_machine.keys() == {"cast", "read"}
    assert of_such_matrices.keys() == {"forward", "backward", "head"}
    assert 1e6 < of_such_matrices["forward"] < 1e15


def test_a_run_streams_its_first_step_and_keeps_all_from_the_second_on(slowft_):
    lines = [
        json.loads(line) for line in slowft_("--memory", "2GB", "--json", "--steps-per-report", 1).out.splitlines()
    ]
    assert [event["event"] for event in lines].count("plan") == 1
    read = [event["read_gb"] for event in lines if event["event"] == "train"]
    assert read[0] > 3 * read[1]


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
    from slowft.engine import hidden as activations

    made = []

    def spill_file(directory, *rest):
        made.append(directory)
        return SpillFile(directory, *rest)

    SpillFile = activations.SpillFile
    monkeypatch.setattr(activations, "SpillFile", spill_file)
    spilling = Schedule(slots=1, spilled=4, head_tokens=64)

    def spill(self, memory):
        return replace(self.predict(self.job_of(Chunking()), spilling), memory=memory)

    monkeypatch.setattr(Planner, "choose", spill)
    monkeypatch.setattr(Planner, "first", spill)
    outcome = slowft_("--memory", "4GB", *(["--spill-dir", slowft_.directory / "here"] if named else []))
    assert outcome.status == 0, outcome
    assert "inputs of 2 blocks on disk" in outcome.out and "written a step" in outcome.out
    assert set(made) == {slowft_.directory / "here" if named else slowft_.directory / "cache" / "slowft"}
