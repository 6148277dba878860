"""Measures step time per block for 8 to 64 small blocks. It is constant if no cost grows with the number of blocks.

python benchmarks/growth.py

All models are open at once and take turns, so that other work on the machine disturbs all of them alike. The time that
does not depend on blocks (head, embedding) is the intercept of the line through all medians. The rest is divided by the
number of blocks.
"""

import slowft  # noqa: F401, I001  (before mlx: it loads OpenBLAS)

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import mlx.core as mx
import numpy as np

from memory_ladder import SHAPE
from slowft.bench.shapes import write_random

SMALL = SHAPE | {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "vocab_size": 1024,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=128)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        models, times = {}, {n: [] for n in args.blocks}
        for n in args.blocks:
            path = write_random(Path(directory) / str(n), SMALL | {"num_hidden_layers": n})
            models[n] = slowft.open_model(path).add_lora(num_layers=-1, rank=8)
            models[n].train()
        mx.random.seed(0)
        batch = mx.random.randint(0, SMALL["vocab_size"], (args.rows, args.tokens + 1))
        lengths = mx.array([[1, args.tokens]] * args.rows)
        for i in range(args.rounds + 1):
            for n, model in models.items():
                begin = time.perf_counter()
                model.loss_and_grads(batch, lengths)
                if i:  # the first one warms up
                    times[n].append(time.perf_counter() - begin)
        waits = {n: model.stats.last.wait_s for n, model in models.items()}
        for model in models.values():
            model.close()
    medians = {n: statistics.median(seconds) for n, seconds in times.items()}
    slope, intercept = np.polyfit(list(medians), list(medians.values()), 1)
    per_block = {n: (median - intercept) / n for n, median in medians.items()}
    print(
        json.dumps(
            {
                "step_s": medians,
                "spread_s": {n: max(seconds) - min(seconds) for n, seconds in times.items()},
                "wait_s": waits,
                "outside_blocks_s": intercept,
                "per_block_ms": {n: 1e3 * s for n, s in per_block.items()},
                "whole_step_per_block_ms": {n: 1e3 * median / n for n, median in medians.items()},
                "largest_deviation": max(abs(s / slope - 1) for s in per_block.values()),
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
