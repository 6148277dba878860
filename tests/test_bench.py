"""`slowft bench` and traces: what is reported is what the kernel, closed forms and mlx-lm say."""

import slowft  # noqa: F401, I001  (before mlx: it loads OpenBLAS)

import importlib.util
import json
import math
import re
import shlex
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import click
import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import llama as llama_of_mlx_lm
from mlx_lm.tuner.trainer import default_loss
from mlx_lm.utils import load_model
from safetensors import safe_open

import filecache
from conftest import LLAMA, largest_difference, must_run, random_batch, randomise, save_random
from slowft import platform, tracing
from slowft.bench import cgroup, compare, reading, roofline, shapes, slowllama, step, worker
from slowft.bench.workload import Workload
from slowft.bench.limits import Limits
from slowft.cli.bench import bench
from slowft.cli.main import main
from slowft.errors import ConfigError, SlowftError

MB = 1 << 20


class Outcome:
    def __init__(self, status: int, out: str, err: str):
        self.status, self.out, self.err = status, out, err


@pytest.fixture
def slowft_(capsys, monkeypatch, tmp_path):
    """`slowft` in this process, its cache in a directory of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)

    def run(*words) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["slowft", *map(str, words)])
        capsys.readouterr()
        status, text = 0, ""
        try:
            main()
        except SystemExit as e:
            status, text = (1, e.code) if isinstance(e.code, str) else (e.code or 0, "")
        captured = capsys.readouterr()
        return Outcome(status, captured.out, captured.err + text)

    return run


def read_by_this_process() -> int:
    if not Path("/proc/self/io").exists():
        must_run("only Linux counts what a process reads")
    return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])


# --- Traces -----------------------------------------------------------------------------------------


def traced_step(directory: Path, file: Path, **schedule):
    mx.random.seed(1)
    model = slowft.open_model(directory).add_lora(-1)
    randomise(model)
    model.train()
    if schedule:
        from slowft.planning.schedule import Schedule

        model.engine.follow(Schedule(**schedule), file.parent)
    batches = [random_batch(256), random_batch(256, seed=5)]
    model.loss_and_grads(batches)
    before = read_by_this_process(), model.stats.total
    with model.trace(file):
        result = model.loss_and_grads(batches)
    after = read_by_this_process(), model.stats.total
    model.close()
    spans = [event for event in json.loads(file.read_text())["traceEvents"] if event["ph"] == "X"]
    return spans, result, after[0] - before[0], after[1].wait_s - before[1].wait_s


def test_trace_has_every_block_and_pass_once_and_all_reads(llama, tmp_path):
    spans, _, _, waited = traced_step(llama, tmp_path / "t.json")
    computed = [
        (s["name"], s["args"]["pass"]) for s in spans if s["cat"] == "compute" and s["args"].get("micro-batch") == 1
    ]
    blocks = [f"model.layers.{i}" for i in range(LLAMA["num_hidden_layers"])]
    forward, backward = [(b, "forward") for b in blocks], [(b, "backward") for b in reversed(blocks)]
    assert computed == [*forward, ("head", "head"), *backward]
    reads = [s for s in spans if s["cat"] == "read"]
    with safe_open(llama / "model.safetensors", "np") as f:
        stored = {b: sum(f.get_tensor(n).nbytes for n in f.keys() if n.startswith(b + ".")) for b in blocks}
    for block in blocks:  # once or twice: two stay in their buffers at either turn
        sizes = [s["args"]["bytes"] for s in reads if s["name"] == block]
        assert 1 <= len(sizes) <= 2 and set(sizes) == {stored[block]}
    waits = sum(s["dur"] for s in spans if s["cat"] == "wait") / 1e6
    assert waits == pytest.approx(waited, rel=0.2, abs=1e-3)


def test_bytes_in_a_trace_are_those_the_kernel_counts(llama, tmp_path):
    spans, _, read, _ = traced_step(llama, tmp_path / "t.json")
    assert sum(s["args"]["bytes"] for s in spans if s["cat"] == "read") == pytest.approx(read, abs=8192)  # /proc too


def test_spans_of_a_thread_do_not_overlap_and_name_their_lane(llama, tmp_path):
    file = tmp_path / "t.json"
    spans, *_ = traced_step(llama, file)
    events = json.loads(file.read_text())["traceEvents"]
    names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    ends: dict[int, float] = {}
    for s in sorted(spans, key=lambda s: s["ts"]):
        assert s["ts"] >= ends.get(s["tid"], 0) - 1e-3 and s["dur"] >= 0
        ends[s["tid"]] = s["ts"] + s["dur"]
        assert names[s["tid"]].split()[0] == s["cat"]
    assert {"read", "cast", "compute", "wait"} <= {s["cat"] for s in spans}


def test_overlapping_spans_of_a_lane_get_threads_of_their_own(tmp_path):
    recorder = tracing.Recorder(begin=0.0)
    for begin, end in ((0, 4), (1, 3), (2, 5), (4, 6), (3, 7)):
        recorder.add(tracing.Span("read", f"{begin}-{end}", begin, end, {}))
    recorder.write(tmp_path / "t.json")
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    threads = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    rows = {e["name"]: threads[e["tid"]] for e in events if e["ph"] == "X"}
    assert rows == {"0-4": "read", "1-3": "read 2", "2-5": "read 3", "3-7": "read 2", "4-6": "read"}


def test_spilling_is_in_the_trace(llama, tmp_path):
    if platform.is_memory_filesystem(tmp_path):
        must_run(f"{tmp_path} is in memory")
    spans, *_ = traced_step(llama, tmp_path / "t.json", spilled=4)
    spilled = [(s["name"], s["args"]["bytes"]) for s in spans if s["cat"] == "spill"]
    hidden = 3 * 24 * LLAMA["hidden_size"] * 4
    # inputs of the second to fourth block, of two micro-batches
    assert sorted(spilled) == [("read", hidden)] * 6 + [("write", hidden)] * 6


def test_a_traced_step_is_the_same_step_and_afterwards_nothing_is_recorded(llama, tmp_path):
    _, ((loss, _), gradients), *_ = traced_step(llama, tmp_path / "t.json")
    model = slowft.open_model(llama).add_lora(-1)
    randomise(model)
    (plain, _), expected = model.loss_and_grads([random_batch(256), random_batch(256, seed=5)])
    model.close()
    assert loss.item() == plain.item() and largest_difference(gradients, expected) == 0
    assert tracing.span("read", "x") is tracing.span("compute", "y")  # nothing to fill


def test_finetune_writes_a_trace_of_its_steps(llama_with_tokenizer, slowft_, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train.jsonl").write_text('{"text": "Sample of plain text."}\n' * 4)
    options = ["--model", llama_with_tokenizer, "--data", tmp_path / "data", "--iters", 2, "--batch-size", 1]
    outcome = slowft_("finetune", *options, "--num-layers", 1, "--trace", tmp_path / "t.json")
    assert outcome.status == 0, outcome.err
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    passes = [e["args"]["pass"] for e in events if e.get("cat") == "compute"]
    first, second = passes[:-2], passes[-2:]
    assert first == ["forward"] * (1 + LLAMA["num_hidden_layers"]) + ["head", "backward"]  # measured, block by block
    assert second == ["forward", "head"]  # with room for everything: embedding, then all blocks and the head


def test_a_trace_that_cannot_be_written_is_refused_before_anything_runs(llama, tmp_path):
    model = slowft.open_model(llama).add_lora(-1)
    with pytest.raises(SlowftError, match="no/t.json cannot be written"), model.trace(tmp_path / "no/t.json"):
        raise AssertionError("it went on")
    model.close()


# --- Random models ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [None, 4])
def test_random_weights_load_in_mlx_lm_and_predict_by_chance(bits, tmp_path):
    config = shapes.quantized(LLAMA, bits)
    directory = shapes.write_random(tmp_path / "m", config)
    model, _ = load_model(directory)
    batch, lengths = random_batch(LLAMA["vocab_size"])
    loss, _ = default_loss(model, batch, lengths)
    assert abs(loss.item() - math.log(LLAMA["vocab_size"])) < 0.5
    q = model.model.layers[1].self_attn.q_proj
    weight = mx.dequantize(q.weight, q.scales, q.biases, q.group_size, q.bits) if bits else q.weight
    expected = 1 / math.sqrt(3 * LLAMA["hidden_size"])  # of uniform values within 1 / sqrt(columns)
    assert mx.sqrt(mx.square(weight.astype(mx.float32)).mean()).item() == pytest.approx(expected, rel=0.1)


def test_writing_random_weights_takes_little_memory(tmp_path):
    config = LLAMA | {"hidden_size": 1024, "intermediate_size": 4096, "vocab_size": 32000, "num_hidden_layers": 2}
    shapes.write_random(tmp_path / "warm", LLAMA)
    platform.reset_peak_memory()
    before = platform.memory_in_use()
    directory = shapes.write_random(tmp_path / "m", config)
    nbytes = (directory / "model.safetensors").stat().st_size
    assert nbytes > 180 * MB
    assert platform.peak_memory() - before < 80 * MB


def test_a_shape_is_written_once(slowft_, tmp_path, monkeypatch):
    told = []
    first = shapes.cached(LLAMA, lambda done, total: told.append((done, total)))
    assert told[-1][0] == told[-1][1] == (first / "model.safetensors").stat().st_size
    monkeypatch.setattr(shapes, "write_random", None)
    assert shapes.cached(LLAMA) == first and first.is_relative_to(tmp_path / "cache")


# --- step -------------------------------------------------------------------------------------------

MACHINE = {"device": "a machine", "cores": 1, "matmul_flops_per_s": 1e9, "read_bytes_per_s": 1e6}


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    return save_random(
        tmp_path_factory.mktemp("bench") / "small", LLAMA | {"hidden_size": 128, "intermediate_size": 320}
    )


def matmul_flops(tokens: int, rows: int, recomputed: bool) -> float:
    """Of a step over Llama of 4 blocks, 128 hidden, LoRA of rank 8 on all linear layers: products alone."""
    d, f, kv, n, vocab, rank, blocks = 128, 320, 64, rows * tokens, 256, 8, 4
    linear = [(d, d), (d, kv), (d, kv), (d, d), (d, f), (d, f), (f, d)]
    dense, lora = sum(2 * n * a * b for a, b in linear), sum(2 * n * rank * (a + b) for a, b in linear)
    attention = 2 * 2 * rows * tokens * tokens * d
    forward = dense + lora + attention
    backward = dense + 2 * lora + 2 * attention
    return blocks * ((1 + recomputed) * forward + backward) + 2 * 2 * n * d * vocab


def test_flops_of_a_plan_are_those_of_the_closed_form(small):
    model = slowft.open_model(small).add_lora(-1)
    planner = model.planner(2, 64)
    for plan, is_recomputed in ((planner.least(), True), (planner.most(), False)):
        flops = worker.flops_of(plan)
        closed = matmul_flops(64, 2, is_recomputed) - is_recomputed * 4 * 2 * 128 * 320 * 128  # all but a last product
        assert flops == pytest.approx(closed, rel=0.04)  # (the first block's input needs no gradient)
    model.close()


def test_figures_of_a_step_follow_from_its_steps(small):
    job, told = Workload(str(small), "small", 2, 64, steps=2, memory=2 * 10**9), []
    run = worker.run_slowft(job, told.append)
    result = step.summary(job, run, MACHINE)
    assert told == [1, 2, 3] and len(result["steps"]) == 2 and len(result["losses"]) == 3
    assert "all blocks and the head in memory" in run["kept"]
    assert result["compute_s"] == result["flops"] / 1e9 > 0  # by that machine's rate
    seconds = [s["step_s"] for s in result["steps"]]
    assert result["step_s"] == statistics.median(seconds) and result["spread_s"] == max(seconds) - min(seconds)
    assert result["tokens_per_s"] == pytest.approx(128 / result["step_s"])
    assert result["roofline_share"] == max(result["compute_s"], result["read_s"]) / result["step_s"]
    assert 0 <= result["wait_share"] < 1


# --- io ---------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path) -> list[Path]:
    parts = []
    for i, nbytes in enumerate((40 * MB, 20 * MB + 77)):
        parts.append(tmp_path / f"model-{i}.safetensors")
        parts[-1].write_bytes(np.random.default_rng(i).bytes(nbytes))
    return parts


def test_reader_and_raw_reads_read_the_same_bytes(files, monkeypatch):
    monkeypatch.setattr(reading.shutil, "which", lambda name: None)  # what is left runs in this process
    before = read_by_this_process()
    result = reading.measure(files, 1 << 30, 2)
    assert result["nbytes"] == 48 * MB  # whole requests of 16 MB
    assert read_by_this_process() - before == pytest.approx(2 * 2 * 48 * MB, rel=1e-3)
    assert set(result["rates"]) == {"slowft", "preads"} and result["raw"] == "preads"
    pairs = [ours / raw for ours, raw in zip(result["rates"]["slowft"], result["rates"]["preads"])]
    assert result["ratio"] == statistics.median(pairs)
    if filecache.why_unavailable(files[0].parent) is None:
        with open(files[0], "r+b") as f:
            assert filecache.nbytes_cached(f.fileno()) < 20 * MB


def test_dd_and_fio_report_their_rates(files):
    result = reading.measure(files, 16 * MB, 1)
    assert result["nbytes"] == 16 * MB and all(rate > 0 for rates in result["rates"].values() for rate in rates)
    dd = ["dd", f"if={files[0]}", "of=/dev/null", "iflag=direct", "bs=4096", "count=1"]
    goes_past_the_cache = bool(shutil.which("dd")) and not subprocess.run(dd, stderr=subprocess.DEVNULL).returncode
    assert ("dd iflag=direct" in result["rates"]) == goes_past_the_cache


def test_too_little_to_read_is_refused(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(bytes(1000))
    with pytest.raises(SlowftError, match="more than 16 MB"):
        reading.measure([file], 1 << 30, 1)


# --- roofline ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [1, 2, 3, 37, 63, 64, 65])
def test_the_crossover_is_the_first_count_bound_by_computing(first):
    def point(n: int) -> dict:
        return {"micro_batches": n, "bound": "computing" if n >= first else "reading"}

    points = [point(1 << i) for i in range(7)]
    assert roofline.crossover(points, point) == (first if first <= 64 else None)


def test_slower_reads_are_what_a_job_is_bound_by(tmp_path):
    config = LLAMA | {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 2}
    directory = shapes.write_random(tmp_path / "m", config)
    model = slowft.open_model(directory).add_lora(-1)
    memory = model.planner(1, 16).least().peak_nbytes + 10 * MB  # not enough to keep the 46 MB of blocks
    model.close()
    result = roofline.predict(Workload(str(directory), "m", 1, 16, memory=memory), 1, 1e6)
    assert [point["micro_batches"] for point in result["points"]] == [1] and result["crossover"] is None
    for point in result["points"]:
        assert point["bound"] == "reading" and point["read_nbytes"] > 0
        assert point["read_s"] == pytest.approx(point["read_nbytes"] / 1e6)


def test_the_plot_is_a_png_and_without_matplotlib_the_fix_is_named(small, slowft_, tmp_path, monkeypatch):
    options = ["--model", small, "--batch-size", 1, "--max-seq-length", 17, "--micro-batches", 1]
    printed = slowft_("bench", "roofline", *options, "--json", "--save", tmp_path / "results")
    (file,) = (tmp_path / "results").iterdir()
    result = json.loads(printed.out)
    assert result == json.loads(file.read_text()) and re.match(r"roofline_\d{4}-\d\d-\d\d_", file.name)
    monkeypatch.setattr(roofline, "predict", lambda *_: {key: result[key] for key in ("job", "points", "crossover")})
    if importlib.util.find_spec("matplotlib"):
        outcome = slowft_("bench", "roofline", *options, "--plot", tmp_path / "r.png")
        assert outcome.status == 0 and "bound by" in outcome.out
        assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "matplotlib" else find(name, *a))
    refused = slowft_("bench", "roofline", *options)
    assert refused.status == 2 and "pip install 'slowft[bench]'" in refused.err and len(refused.err.splitlines()) == 1
    assert slowft_("bench", "roofline", *options, "--json").status == 0


# --- compare ----------------------------------------------------------------------------------------


def run_here(task, job, told=lambda step: None, group=None, **options):
    """`worker.run` in this process."""
    return MACHINE if task == "machine" else json.loads(json.dumps(worker.TASKS[task](job, told, **options)))


def test_all_do_the_same_job(small, monkeypatch):
    block = llama_of_mlx_lm.TransformerBlock
    monkeypatch.setattr(block, "__call__", block.__call__)  # mlx-lm's checkpointing replaces it for good
    monkeypatch.setattr(compare.worker, "run", run_here)
    told = []
    job = Workload(str(small), "small", 2, 32, micro_batches=2, steps=2, memory=2 * 10**9)
    result = compare.measure(job, 1, Limits(), progress=lambda *who: told.append(who))
    assert told[-1] == ("mlx-lm --grad-checkpoint", 4)  # two warm up
    first = {name: of_name["losses"][0] for name, of_name in result["results"].items()}  # adapters begin as zero
    assert set(first) == {"slowft", "mlx-lm", "mlx-lm --grad-checkpoint"}
    assert first["mlx-lm"] == pytest.approx(first["slowft"], rel=1e-5)
    assert first["mlx-lm --grad-checkpoint"] == pytest.approx(first["slowft"], rel=1e-5)
    for name, ratio in result["times_as_fast"].items():
        assert ratio == result["results"][name]["step_s"] / result["results"]["slowft"]["step_s"]
        assert len(result["results"][name]["step_s_of_turns"][0]) == 2


def test_a_process_of_its_own_tells_steps_results_and_errors(small):
    told = []
    job = Workload(str(small), "small", 2, 32, steps=1, memory=380 * 10**6)  # too little to measure the machine first
    here = run_here("slowft", job.with_(memory=2 * 10**9))  # this process may have grown
    run = worker.run("slowft", job, told.append)
    assert told == [1, 2] and run["losses"][0] == pytest.approx(here["losses"][0], rel=1e-6)
    with pytest.raises(SlowftError, match="^slowft: /nowhere does not exist"):
        worker.run("slowft", job.with_(model="/nowhere"))


# --- Limits -----------------------------------------------------------------------------------------


def test_a_process_in_a_group_is_limited_as_the_kernel_says(files):
    if reason := cgroup.why_unavailable(files[0]):
        must_run(reason)
    with cgroup.limit(64 * MB, 10 * MB, files) as group:
        shown = worker.subprocess.run(
            group.entered(["cat", "/proc/self/cgroup"]), capture_output=True, text=True
        ).stdout
        name = group.directories[0].name
        assert len([line for line in shown.splitlines() if line.endswith(name)]) == len(group.directories)
        rates = [
            d / f for d in group.directories for f in ("blkio.throttle.read_bps_device", "io.max") if (d / f).exists()
        ]
        drive = cgroup.drive_of(files[0])
        assert any(re.search(rf"^{drive} .*{10 * MB}", file.read_text(), re.M) for file in rates)
        hungry = [sys.executable, "-c", "x = bytearray(200 << 20)"]
        assert worker.subprocess.run(group.entered(hungry), capture_output=True).returncode == -9
        assert 0 < group.peak_nbytes <= 64 * MB
    assert not any(d.exists() for d in group.directories)


def test_limits_that_cannot_be_enforced_are_one_line(small, slowft_, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(cgroup, "limit", refuse)
    outcome = slowft_("bench", "step", "--model", small, "--limit-memory", "1GB", "--limit-read", "150MB")
    (line,) = outcome.err.splitlines()
    assert outcome.status == 2 and line.startswith("Error: --limit-memory and --limit-read: ")
    assert "run as root" in line or "Linux" in line


def test_a_run_that_its_limit_kills_is_in_the_result(small, slowft_, monkeypatch):
    def killed(task, job, told=None, group=None, **_):
        if task == "machine":
            return MACHINE | {"device": "an abacus"}
        if task == "mlx-lm":
            raise SlowftError(f"{task}: killed, most likely for want of memory")
        steps = [{"step_s": 2.0, "peak_nbytes": 1, "read_nbytes": 0, "written_nbytes": 0, "wait_s": 0.0}] * 2
        plan = {"predicted": {}, "memory": 10**9}
        return {"first": steps[0], "steps": steps, "losses": [1.0], "flops": 1, "kept": "nothing", "plan": plan}

    monkeypatch.setattr(compare.worker, "run", killed)
    outcome = slowft_("bench", "compare", "--model", small, "--batch-size", 2, "--max-seq-length", 33)
    assert outcome.status == 0 and "Failed   mlx-lm: killed, most likely for want of memory" in outcome.out
    assert re.search(r"^slowft +2\.00 s", outcome.out, re.M) and "MLX on an abacus" in outcome.out
    outcome = slowft_("bench", "compare", "--model", small, "--json")
    result = json.loads(outcome.out)
    assert "want of memory" in result["results"]["mlx-lm"]["failed"] and result["system"]["cpu"]
    assert result["results"]["slowft"]["step_s"] == 2.0
    assert str(small) not in outcome.out  # results are kept and shown: no path of this machine


# --- slowllama --------------------------------------------------------------------------------------


@pytest.mark.parametrize("ffn", [5632, 5461, 5000, 77, 28672, 8209])
def test_slowllamas_own_arithmetic_arrives_at_the_shape(ffn, tmp_path):
    config = shapes.config_of("llama-1b") | {"intermediate_size": ffn}
    (tmp_path / "config.json").write_text(json.dumps(config))
    params = slowllama.params_of(Workload(str(tmp_path), "odd"))
    hidden = int(params["ffn_dim_multiplier"] * int(2 * (4 * params["dim"]) / 3))  # its FeedForward
    multiple = params["multiple_of"]
    assert multiple * ((hidden + multiple - 1) // multiple) == config["intermediate_size"]


def test_slowllama_is_refused_where_it_cannot_run(small, slowft_, tmp_path, monkeypatch):
    options = ["bench", "compare", "--model", small, "--slowllama"]
    refused = slowft_(*options, tmp_path / "nothing")
    assert refused.status == 2 and "git clone" in refused.err and len(refused.err.splitlines()) == 1
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    for name in slowllama.MODULES:
        (checkout / f"{name}.py").touch()
    find = importlib.util.find_spec
    has_torch = [False]
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: has_torch[0] or None if name == "torch" else find(name, *a)
    )
    assert "pip install torch" in slowft_(*options, checkout).err
    has_torch[0] = True
    assert "--num-layers -1" in slowft_(*options, checkout, "--num-layers", 2).err
    slowllama.check(str(checkout), Workload(str(small), "small"))
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"model_type": "qwen3"}))
    with pytest.raises(ConfigError, match="plain 16-bit Llama shapes, which q is not"):
        slowllama.check(str(checkout), Workload(str(tmp_path), "q"))


# --- The command ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(bench.commands))
def test_help_of_each_benchmark_ends_in_an_example_that_parses(name, slowft_):
    text = slowft_("bench", name, "--help").out
    example = shlex.split(" ".join(text.split("Options:")[0].split("Example:")[1].split()))
    assert example[:3] == ["slowft", "bench", name]
    command = bench.commands[name]
    command.make_context(name, example[3:])
    assert all(p.help for p in command.params if isinstance(p, click.Option))


def test_mistakes_are_one_line(slowft_):
    for words, said in (
        (["step", "--shape", "gpt-9"], "llama-135m"),
        (["step", "--model", "x", "--shape", "llama-1b"], "leave them out"),
        (["io", "--model", "./nowhere"], "does not exist"),
        (["trace", "--out", "no/t.json"], "there is no directory no"),
        (["step", "--memory", "much"], "Write it like 8GB"),
    ):
        outcome = slowft_("bench", *words)
        assert outcome.status in (1, 2) and said in outcome.err.splitlines()[-1] and "Traceback" not in outcome.err
