"""Plans: within their memory, faster with more of it, and what a step then really reads."""

import json
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from click.testing import CliRunner

import slowft
from conftest import LLAMA, random_batch, save_random
from slowft.cli.plan import plan as command
from slowft.planning.job import Cut
from slowft.planning.plan import _reads_of

CONFIGS = Path(__file__).parent / "configs"
WIDE = LLAMA | {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_attention_heads": 8,
    "num_hidden_layers": 8,
    "vocab_size": 1000,
}


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A bfloat16 model whose weights, not the process, make up most of its plans' memory."""
    return save_random(tmp_path_factory.mktemp("wide") / "m", WIDE, mx.bfloat16, shards=True)


@pytest.fixture
def planner(wide):
    model = slowft.open_model(wide).add_lora(num_layers=-1)
    yield model.planner(4, 256)
    model.close()


def run(*arguments, status: int = 0):
    outcome = CliRunner().invoke(command, [str(a) for a in arguments])
    if status == 0 and outcome.exception is not None:
        raise outcome.exception
    return outcome


def test_more_memory_is_never_slower_and_never_exceeded(planner):
    least, most = planner.least().peak_nbytes, planner.most().peak_nbytes
    plans = [planner.choose(int(least + share * (most - least))) for share in (0, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1)]
    for plan in plans:
        assert plan.peak_nbytes <= plan.memory
    for plan, larger in zip(plans, plans[1:]):
        assert larger.step_s <= plan.step_s * 1.01
        if larger.schedule.rows == plan.schedule.rows:
            assert larger.written_nbytes <= plan.written_nbytes
    assert plans[-1].schedule.tail == 8 and plans[-1].schedule.keep_head
    assert plans[0].schedule.spilled and not plans[-1].schedule.spilled
    assert planner.choose(least - 1) is None


def test_the_least_that_is_named_is_enough_and_less_is_refused_before_a_read(wide):
    batch, lengths = random_batch(1000, rows=4, tokens=256)
    model = slowft.open_model(wide).add_lora(num_layers=-1)
    read = model.stats.total.bytes_read
    with pytest.raises(slowft.SlowftError, match=r"too little for steps of 1 x 4 x 256 tokens.*at least [\d.]+GB") as e:
        model.plan(4, 256, memory="120MB", follow=True)
    assert model.stats.total.bytes_read == read
    named = str(e.value).split("at least ")[1].split(",")[0]
    assert model.plan(4, 256, memory=named, follow=True).peak_nbytes <= float(named[:-2]) * 1e9
    model.loss_and_grads(batch, lengths)


def test_a_step_reads_and_writes_what_its_plan_says(wide, tmp_path):
    batch, lengths = random_batch(1000, rows=4, tokens=256)
    for share in (0, 0.15, 0.5, 1):
        model = slowft.open_model(wide, spill_dir=tmp_path / "spill").add_lora(num_layers=-1)
        least, most = (plan().peak_nbytes for plan in (model.planner(4, 256).least, model.planner(4, 256).most))
        plan = model.plan(4, 256, memory=int(least * 1.02 + share * (most - least)), follow=True)
        for _ in range(2):
            model.loss_and_grads(batch, lengths)
        last = model.stats.last
        embedding = 1000 * 512 * 2  # of whose rows each micro-batch reads some
        assert abs(last.bytes_read - plan.read_nbytes) <= plan.job.micro_batches * embedding
        assert last.bytes_written == plan.written_nbytes
        model.close()


@pytest.mark.parametrize("n", [3, 5])
def test_predicted_reads_are_the_best_there_are(n):
    """Against an exhaustive search over everything a buffer could hold, for blocks of one size."""
    order = (*range(n), *reversed(range(n)))

    def best(capacity: int) -> int:
        states = {frozenset(): 0}
        per_round = []
        for _ in range(4):
            before = min(states.values())
            for item in order:
                following: dict[frozenset, int] = {}
                for held, read in states.items():
                    if item in held:
                        options, cost = [held], read
                    else:
                        cost = read + 1
                        full = len(held) >= capacity
                        options = [held - {v} | {item} for v in held] if full else [held | {item}]
                    for option in options:
                        following[option] = min(following.get(option, 10**9), cost)
                states = following
            per_round.append(min(states.values()) - before)
        return per_round[-1]

    for capacity in range(1, n + 1):
        assert _reads_of(order, (7,) * n, 7 * capacity) == 7 * best(capacity)


def test_a_kept_product_saves_just_its_multiplication(wide):
    from slowft.engine.costs import Costing

    model = slowft.open_model(wide).add_lora(num_layers=-1)
    engine = model._engine
    job = engine.on_thread(lambda: Costing(engine).job(4, 256, 1, Cut(), 2, True))
    visit = job.visits[3]
    shapes = {p.name.split(".")[-2] if p.name.endswith(".linear") else p.name: p for p in visit.products}
    assert set(shapes) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"}  # nobody needs down_proj's
    for name, width in (("q_proj", 512), ("gate_proj", 1408)):
        product = shapes[name]
        assert product.nbytes == 4 * 256 * width * 4
        assert visit.backward.flops - product.backward.flops == 2 * 4 * 256 * 512 * width
    model.close()


def test_long_sequences_are_cut_into_pieces_only_when_they_must(tmp_path):
    model = slowft.open_model(save_random(tmp_path / "m", WIDE | {"num_hidden_layers": 2})).add_lora(num_layers=-1)
    planner = model.planner(1, 8192)
    assert planner.most().schedule.attention_queries is None
    small = planner.choose(2_000_000_000)  # attention scores alone: 8 x 8192 x 8192 x 4 bytes
    assert small.schedule.attention_queries and small.peak_nbytes <= 2_000_000_000
    model.close()


@pytest.mark.parametrize("name", ["llama-3.3-70b", "qwen3-32b", "gpt-oss-120b", "mixtral-8x22b"])
def test_large_models_are_planned_from_their_config_alone(name):
    """In a process that never holds a block; gpt-oss's adapter alone, on 128 experts a block, takes 1.1 GB."""
    arguments = [f"--config={CONFIGS / name}.json", "--batch-size=1", "--max-seq-length=513", "--compute-dtype=native"]
    code = (
        "import sys; from slowft.cli.main import main; sys.argv[0] = 'slowft'; main()\n"
        "from slowft import platform; print(platform.peak_memory(), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "plan", "--json", "--memory=64GB", "--tokens=1000000", "--epochs=2", *arguments],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    job = result["plan"]["job"]
    assert int(done.stderr.split()[-1]) < 400_000_000 + job["adapter_nbytes"]
    assert result["run"]["steps"] == round(2 * 1_000_000 / 512)
    assert len(result["table"]) == 4 and result["machine"]["matmul_flops_per_s"] > 0
    if name == "llama-3.3-70b":
        hidden, ffn, kv = 8192, 28672, 1024
        block = 2 * (2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * ffn + 2 * hidden)
        assert job["blocks"] == 80 and set(job["block_nbytes"]) == {block}
        assert job["head_nbytes"] == 2 * hidden * 128256
        assert job["activation_nbytes"] == 512 * hidden * 2
        in_and_out = 2 * 2 * hidden + 2 * (hidden + kv) + 3 * (hidden + ffn)
        assert job["adapter_nbytes"] == 4 * 16 * 8 * in_and_out


@pytest.mark.parametrize(
    "arguments, said",
    [
        ([], "give a model"),
        (["--model", "x/y", "--config", "c.json"], "give a model"),
        (["--config", "nowhere.json"], "nowhere.json"),
        (["--model", "./nowhere"], "does not exist"),
        (["--config", CONFIGS / "qwen3-32b.json", "--memory", "lots"], "8GB"),
        (["--config", CONFIGS / "qwen3-32b.json", "--memory", "1GB"], "at least"),
    ],
    ids=str,
)
def test_mistakes_are_named_in_one_line(arguments, said):
    outcome = run(*arguments, status=1)
    assert outcome.exit_code != 0
    message = outcome.output if isinstance(outcome.exception, SystemExit) else str(outcome.exception)
    assert said in message
    assert isinstance(outcome.exception, SystemExit) or "\n" not in message


def test_the_page_says_it_all(wide):
    page = run("--model", wide, "--memory", "1GB", "--max-seq-length", 129, "--tokens", 10_000).output
    for word in (
        "Machine",
        "Model",
        "Job",
        "Plan within 1.00 GB",
        "of the peak",
        "steps",
        "budget",
        "least",
        "all of it",
    ):
        assert word in page
    assert max(map(len, page.splitlines())) < 400
