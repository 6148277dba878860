"""One optimizer step of a random Llama shape, streamed: seconds, reads, waiting, memory by the kernel's count.

python benchmarks/step.py                        # the 1.1 B shape, 4x128 tokens
python benchmarks/step.py --layers 8 --compare   # and mlx-lm in memory, with checkpointing, in the same run
"""

import slowft  # noqa: F401, I001  (before mlx: it loads OpenBLAS)

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import mlx.core as mx

from memory_ladder import SHAPE
from planned import write_random


def batch(rows: int, tokens: int):
    mx.random.seed(0)
    return mx.random.randint(0, SHAPE["vocab_size"], (rows, tokens + 1)), mx.array([[1, tokens]] * rows)


def streamed(directory: str, rows: int, tokens: int, steps: int) -> dict:
    model = slowft.open_model(directory).add_lora(num_layers=-1, rank=8)
    model.train()
    times = []
    for _ in range(steps + 1):
        begin = time.perf_counter()
        model.loss_and_grads(*batch(rows, tokens))
        times.append(time.perf_counter() - begin)
    last = model.stats.last
    return {
        "step_s": statistics.median(times[1:]),
        "spread_s": max(times[1:]) - min(times[1:]),
        "wait_share": last.wait_s / times[-1],
        "read_gb": last.bytes_read / 1e9,
        "peak_gb": model.stats.total.peak_memory / 1e9,
    }


def in_memory(directory: str, rows: int, tokens: int, steps: int) -> dict:
    """mlx-lm's own model in float32, its gradient checkpointing on."""
    import mlx.nn as nn
    from mlx.utils import tree_map
    from mlx_lm.tuner.trainer import default_loss, grad_checkpoint
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load_model

    from slowft.platform import peak_memory

    model, _ = load_model(Path(directory), lazy=True)
    model.update(tree_map(lambda p: p.astype(mx.float32), model.parameters()))
    model.freeze()
    linear_to_lora_layers(model, -1, {"rank": 8, "scale": 20.0, "dropout": 0.0})
    grad_checkpoint(model.layers[0])
    mx.eval(model.parameters())
    model.train()
    times = []
    for _ in range(steps + 1):
        begin = time.perf_counter()
        mx.eval(nn.value_and_grad(model, default_loss)(model, *batch(rows, tokens)))
        times.append(time.perf_counter() - begin)
    return {
        "step_s": statistics.median(times[1:]),
        "spread_s": max(times[1:]) - min(times[1:]),
        "peak_gb": peak_memory() / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--steps", type=int, default=3, help="steps measured, after one that is not")
    parser.add_argument("--compare", action="store_true", help="also mlx-lm in memory with --grad-checkpoint")
    parser.add_argument("--one", choices=["streamed", "in_memory"], help=argparse.SUPPRESS)
    parser.add_argument("--dir", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(globals()[args.one](args.dir, args.rows, args.tokens, args.steps)))
        return
    with tempfile.TemporaryDirectory() as directory:
        write_random(Path(directory), SHAPE | {"num_hidden_layers": args.layers})
        shape = f"{args.layers} blocks, {args.rows}x{args.tokens} tokens, {platform.machine()} {platform.system()}"
        results = {}
        for kind in ["streamed"] + ["in_memory"] * args.compare:
            command = [sys.executable, __file__, "--one", kind, "--dir", directory]
            command += [f"--{o}={getattr(args, o)}" for o in ("rows", "tokens", "steps")]
            results[kind] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        if args.compare:
            results["ratio"] = results["streamed"]["step_s"] / results["in_memory"]["step_s"]
        print(json.dumps({"shape": shape, **results}, indent=2))


if __name__ == "__main__":
    main()
