"""With room for everything, a step is ordinary training: slowft against mlx-lm's own trainer step, in one run.

python benchmarks/everything.py                # 8 blocks of the 1.1 B shape, 4x128 tokens, float32: about 5 minutes

Processes take turns (slowft, mlx-lm, slowft, ...), and the ratio is of the medians over all their steps. mlx-lm's
step is the one in its trainer: loss, gradients and update under `mx.compile`.
"""

import slowft  # noqa: F401, I001  (before mlx: it loads OpenBLAS)

import argparse
import datetime
import json
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim

from memory_ladder import RESULTS, SHAPE
from planned import write_random


def batch(rows: int, tokens: int):
    mx.random.seed(0)
    return mx.random.randint(0, SHAPE["vocab_size"], (rows, tokens + 1)), mx.array([[1, tokens]] * rows)


def step_of_slowft(directory: str, rows: int, tokens: int):
    model = slowft.open_model(directory, memory="1000GB").add_lora(num_layers=-1, rank=8)
    model.train()
    plan = model.plan(rows, tokens, follow=True)
    assert plan.schedule.tail == len(model.layers)
    optimizer = optim.Adam(1e-4)

    def step(*data):
        _, gradients = model.loss_and_grads(*data)
        optimizer.update(model, gradients)
        mx.eval(model.trainable_parameters(), optimizer.state)

    return step


def step_of_mlx_lm(directory: str, rows: int, tokens: int):
    """The step in mlx_lm/tuner/trainer.py, of the model in float32."""
    from mlx.utils import tree_map
    from mlx_lm.tuner.trainer import default_loss
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load_model

    model, _ = load_model(Path(directory), lazy=True)
    model.update(tree_map(lambda p: p.astype(mx.float32), model.parameters()))
    model.freeze()
    linear_to_lora_layers(model, -1, {"rank": 8, "scale": 20.0, "dropout": 0.0})
    mx.eval(model.parameters())
    model.train()
    optimizer, loss_and_grads = optim.Adam(1e-4), nn.value_and_grad(model, default_loss)
    state = [model.state, optimizer.state, mx.random.state]

    @partial(mx.compile, inputs=state, outputs=state)
    def compiled(*data):
        (loss, _), gradients = loss_and_grads(model, *data)
        optimizer.update(model, gradients)
        return loss

    return lambda *data: mx.eval(state, compiled(*data))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--steps", type=int, default=4, help="steps measured in each process, after two that are not")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--one", choices=["slowft", "mlx_lm"], help=argparse.SUPPRESS)
    parser.add_argument("--dir", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        step = globals()[f"step_of_{args.one}"](args.dir, args.rows, args.tokens)
        data, times = batch(args.rows, args.tokens), []
        for _ in range(args.steps + 2):
            begin = time.perf_counter()
            step(*data)
            times.append(time.perf_counter() - begin)
        print(json.dumps({"times": times[2:], "peak_gb": slowft.platform.peak_memory() / 1e9}))
        return
    results: dict[str, list[dict]] = {"slowft": [], "mlx_lm": []}
    with tempfile.TemporaryDirectory() as directory:
        write_random(Path(directory), SHAPE | {"num_hidden_layers": args.layers})
        for kind in list(results) * args.turns:
            command = [sys.executable, __file__, "--one", kind, "--dir", directory]
            command += [f"--{o}={getattr(args, o)}" for o in ("rows", "tokens", "steps")]
            results[kind].append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    medians = {k: statistics.median(t for run in runs for t in run["times"]) for k, runs in results.items()}
    summary = {
        "step_s": medians,
        "ratio": medians["slowft"] / medians["mlx_lm"],
        "peak_gb": {k: max(run["peak_gb"] for run in runs) for k, runs in results.items()},
        "times": {k: [run["times"] for run in runs] for k, runs in results.items()},
    }
    print(json.dumps(summary, indent=2))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"everything_{datetime.date.today().isoformat()}.json").write_text(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main()
