"""Measures tokens a second of generation: waves of rows and drafts against one prompt at a time.

python benchmarks/generating.py     # as root: memory and reads are limited by a cgroup; about 3 minutes

The goals: 32 rows are at least 20 times as fast as one, and predictions are within 25%. Each way runs in a process of
its own that answers random prompts, with reads as slow as a laptop's. Passes that take in prompts are not counted.
Drafts are measured with a text that repeats itself, because prompt look-up is for such texts. The share of drafts that
were right is printed. Writes JSON to benchmarks/results/.
"""

import slowft  # noqa: F401, I001  (before mlx: it loads OpenBLAS)

import argparse
import datetime
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from activation_cache import SHAPE
from slowft.bench import cgroup
from slowft.bench.shapes import write_random
from slowft.sizes import parse_nbytes

RESULTS = Path(__file__).parent / "results"
WAYS = {"1 row": (1, None), "8 rows": (8, None), "32 rows": (32, None), "1 row, drafts": (1, "lookup")}
WAYS |= {"8 rows, drafts": (8, "lookup")}


class NoText:
    """A tokenizer without text, in which no token ends an answer."""

    eos_token_ids = ()
    last_segment = ""

    @property
    def detokenizer(self):
        return self

    def add_token(self, token: int) -> None:
        pass

    def finalize(self) -> None:
        pass


def measure(model: str, memory: int, rows: int, draft: str | None, tokens: int) -> dict:
    """Generate in this process. Returns figures of the passes that took in no prompt."""
    opened = slowft.open_model(model, memory=memory)
    opened.budget.measure_machine()
    random = np.random.default_rng(0)
    prompts = [random.integers(1, 2000, 16).tolist() * (4 if draft else 1) for _ in range(rows)]
    run = slowft.generate(opened, prompts, tokenizer=NoText(), max_tokens=tokens, wave=rows, draft=draft)
    passes = []
    while True:
        before, begin = run.tokens, time.perf_counter()
        answers = run.step()
        passes.append((run.tokens - before, time.perf_counter() - begin, opened.stats.last.wait_s))
        if answers:
            break
    counted = passes[3:-1]  # the first ones make room in memory, and try whether rows can be merged
    if not counted:
        sys.exit("no pass is left to count: give more --tokens")
    if run.predicted is None:
        sys.exit("all of the model is in memory, so nothing is read: give more --layers, or less --memory")
    seconds = statistics.median(s for _, s, _ in counted)
    return {
        "rows": run.wave,
        "tokens_per_pass": sum(n for n, _, _ in counted) / len(counted),
        "pass_s": seconds,
        "wait_share": sum(w for _, _, w in counted) / sum(s for _, s, _ in counted),
        "tokens_per_s": sum(n for n, _, _ in counted) / sum(s for _, s, _ in counted),
        "read_nbytes": opened.stats.last.bytes_read,
        "predicted_read_nbytes": run.predicted.read_nbytes,
        "predicted_pass_s": run.predicted.step_s,
        "drafted": run.drafted,
        "accepted": run.accepted,
        "peak_nbytes": opened.stats.total.peak_memory,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--memory", default="380MB", help="limit of the process")
    parser.add_argument("--limit-read", default="120MB", help="limit of reads in bytes a second")
    parser.add_argument("--tokens", type=int, default=10, help="tokens of each answer")
    parser.add_argument("--way", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    memory = parse_nbytes(args.memory)
    if args.way:
        model, rows, draft = args.way
        print(json.dumps(measure(model, memory, int(rows), None if draft == "None" else draft, args.tokens)))
        return
    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        config = SHAPE | {"num_hidden_layers": args.layers, "num_key_value_heads": 1}
        model = write_random(Path(scratch) / "model", config)
        files = sorted(model.glob("*.safetensors"))
        nbytes = sum(file.stat().st_size for file in files)
        print(f"{nbytes / 1e6:.0f} MB of weights, {args.memory} of memory, reads at {args.limit_read}/s")
        for name, (rows, draft) in WAYS.items():
            way = [
                sys.executable,
                __file__,
                "--memory",
                args.memory,
                "--tokens",
                str(args.tokens * (1 + 4 * bool(draft))),
            ]
            way += ["--way", str(model), str(rows), str(draft)]
            # so that rates remembered of this machine without limits do not count here, nor those of here elsewhere
            environment = os.environ | {"XDG_CACHE_HOME": scratch}
            done, peak = cgroup.run(way, memory, parse_nbytes(args.limit_read), files, env=environment)
            if done.returncode:
                sys.exit(done.stderr)
            figures = results[name] = json.loads(done.stdout.splitlines()[-1]) | {"kernel_peak_nbytes": peak}
            figures["times"] = figures["tokens_per_s"] / results["1 row"]["tokens_per_s"]
            drafted = figures["drafted"]
            right = f", {figures['accepted']} of {drafted} drafted tokens right" if drafted else ""
            print(
                f"{name:14} {figures['tokens_per_s']:6.2f} tok/s, {figures['times']:5.1f} times; "
                f"{figures['tokens_per_pass']:5.1f} tokens a reading, {figures['pass_s']:.2f} s each "
                f"(predicted {figures['predicted_pass_s']:.2f}), waiting {figures['wait_share']:.0%}; "
                f"kernel's peak {peak / 1e6:.0f} MB{right}",
                flush=True,
            )
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"generating_{datetime.date.today().isoformat()}.json"
    file.write_text(
        json.dumps({"arguments": {k: v for k, v in vars(args).items() if k != "way"}, "results": results}, indent=2)
    )


if __name__ == "__main__":
    main()
