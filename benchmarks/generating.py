"""Tokens a second of generation: waves of rows and drafts against one prompt at a time, reads as slow as a laptop's.

python benchmarks/generating.py     # as root: memory and reads are limited by a cgroup; about 3 minutes

Asked: at least 20 times at 32 rows; the prediction within 25%. Writes JSON to benchmarks/results/. Each way is a
process of its own, told to answer random prompts with so many tokens; the passes that take in the prompts are not
counted. Drafts are measured with a text that repeats itself, which is what prompt look-up is for; how often they are
right is printed.
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
    """Token ids, of which none ends an answer."""

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
    """Generate in this process; figures of the passes that took in no prompt."""
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
    counted = passes[3:-1]  # the first make room, and try whether rows can be merged
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
    parser.add_argument("--memory", default="380MB", help="of the process")
    parser.add_argument("--limit-read", default="120MB", help="bytes a second")
    parser.add_argument("--tokens", type=int, default=10, help="of each answer")
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
            # what this machine is known to do without a limit must not be told here, nor what is measured here there
            environment = os.environ | {"XDG_CACHE_HOME": scratch}
            done, peak = cgroup.run(way, memory, parse_nbytes(args.limit_read), files, env=environment)
            if done.returncode:
                sys.exit(done.stderr)
            found = results[name] = json.loads(done.stdout.splitlines()[-1]) | {"kernel_peak_nbytes": peak}
            found["times"] = found["tokens_per_s"] / results["1 row"]["tokens_per_s"]
            right = f", {found['accepted']} of {found['drafted']} drafted tokens right" if found["drafted"] else ""
            print(
                f"{name:14} {found['tokens_per_s']:6.2f} tok/s, {found['times']:5.1f} times; "
                f"{found['tokens_per_pass']:5.1f} tokens a reading, {found['pass_s']:.2f} s each "
                f"(predicted {found['predicted_pass_s']:.2f}), waiting {found['wait_share']:.0%}; "
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
