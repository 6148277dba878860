"""Compares seconds a step of one process with those of two that train together. They take turns in one run.

python benchmarks/several.py                     # about 3 minutes; writes JSON to benchmarks/results/

"one core": a process that may use one core. "two, a core each": two such processes with the same joint batch, started
by mlx.launch. They stand for two machines, but their link is the loopback, and they share memory and disk.
"both cores": one process with both cores. The model is random, of the shape that --shape names.
"""

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from mlx.utils import tree_flatten

import slowft
from slowft.bench.shapes import SHAPES, cached, config_of
from slowft.bench.system import describe
from slowft.reports.base import Report

RESULTS = Path(__file__).parent / "results"
WAYS = {"one core": (1, 1), "two, a core each": (2, 1), "both cores": (1, 2)}  # processes, cores of each


class Steps(Report):
    """Notes when each step ended."""

    def __init__(self):
        self.ended = []

    def begin(self, config, model):
        self.ended.append(time.perf_counter())

    def advance(self, iterations, loss, model):
        self.ended.append(time.perf_counter())


def work(model: str, rows: int, tokens: int, steps: int, memory: str) -> None:
    """Train as one of the processes. The first one prints its seconds a step, and those spent in sums."""
    from slowft.training.machines import of_launch

    machines, together_s = of_launch(), []

    def timed(collective):
        def call(values):
            begin = time.perf_counter()
            try:
                return collective(values)
            finally:
                together_s.append(time.perf_counter() - begin)

        return call

    machines.gather, machines.sum = timed(machines.gather), timed(machines.sum)
    rng, report = np.random.default_rng(0), Steps()
    samples = [(rng.integers(3, 1000, tokens + 1).astype(np.int32), 0) for _ in range(rows)]
    with tempfile.TemporaryDirectory() as directory, slowft.open_model(model, memory) as opened:
        config = slowft.TrainConfig(
            iters=steps + 1,
            batch_size=rows,
            num_layers=-1,
            max_seq_length=tokens + 1,
            adapter_path=directory,
            save_every=1000,
            steps_per_report=1000,
        )
        slowft.Trainer(opened, config, report).fit(samples)
        seconds = np.diff(report.ended)[1:]  # the first step warms up
        if machines.rank == 0:
            found = {"step_s": statistics.median(seconds), "steps_s": seconds.tolist(), "size": machines.size}
            adapter = sum(array.nbytes for _, array in tree_flatten(opened.trainable_parameters()))
            print(json.dumps(found | {"together_s": sum(together_s) / (steps + 1), "adapter_nbytes": adapter}))


def measured(model: str, n: int, cores: int, arguments: list[str]) -> dict:
    """One turn of `n` processes."""
    command = [sys.executable, str(Path(__file__).resolve()), "--work", model, *arguments, "--cores", str(cores)]
    if n > 1:
        command = [str(Path(sys.executable).with_name("mlx.launch")), "-n", str(n), "--backend", "ring", *command]
    with tempfile.TemporaryDirectory() as cache:  # so that rates of one core are not remembered as this machine's
        # (OpenBLAS starts its threads when it is loaded, before the process sets its cores)
        environment = os.environ | {"XDG_CACHE_HOME": cache, "OPENBLAS_NUM_THREADS": str(cores)}
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    return json.loads(done.stdout.strip().splitlines()[-1])


def summary(turns: dict[str, list[dict]]) -> dict:
    """Seconds a step of each way, and ratios: of medians, and of the fastest steps, which other work disturbs least."""
    kinds = {"median": statistics.median, "fastest": min}
    seconds = {
        way: {kind: of([s for turn in own_turns for s in turn["steps_s"]]) for kind, of in kinds.items()}
        for way, own_turns in turns.items()
    }
    one, two = seconds["one core"], seconds["two, a core each"]
    return {"step_s": seconds, "ratio": {kind: one[kind] / two[kind] for kind in kinds}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-135m", choices=sorted(SHAPES))
    parser.add_argument("--rows", type=int, default=4, help="rows of the joint batch")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--memory", default="1GB", help="ceiling of each process")
    parser.add_argument("--work", metavar="MODEL", help=argparse.SUPPRESS)
    parser.add_argument("--cores", type=int, default=1, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work is not None:
        rank, cores = int(os.environ.get("MLX_RANK", 0)), sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[rank * options.cores :][: options.cores])
        work(options.work, options.rows, options.tokens, options.steps, options.memory)
        return
    model = str(cached(config_of(options.shape)))
    own = {name: str(getattr(options, name)) for name in ("shape", "rows", "tokens", "steps", "memory")}
    arguments = [text for name, value in own.items() for text in (f"--{name}", value)]
    turns: dict[str, list[dict]] = {way: [] for way in WAYS}
    for _ in range(options.turns):
        for way, (n, cores) in WAYS.items():
            turn = measured(model, n, cores, arguments)
            turns[way].append(turn)
            print(f"{way:18} {turn['step_s']:.3f} s a step, of it {turn['together_s']:.3f} together", flush=True)
    result = summary(turns)
    for way, seconds in result["step_s"].items():
        print(f"{way:18} {seconds['median']:.3f} s a step, the fastest {seconds['fastest']:.3f}")
    ratio = result["ratio"]
    print(f"two of one core each are {ratio['fastest']:.2f} times as fast as one ({ratio['median']:.2f} by medians)")
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"several_{datetime.date.today().isoformat()}.json"
    file.write_text(json.dumps({"machine": describe(), "job": own, **result, "turns": turns}, indent=1))


if __name__ == "__main__":
    main()
