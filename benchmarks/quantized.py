"""Compares a 4-bit base with the same model in 16 bits, at the same budget and rate of reads: bytes and seconds.

python benchmarks/quantized.py     # as root: reads are limited by a cgroup; about 3 minutes

The goal: the 4-bit base reads at most 0.3 of the bytes. The vocabulary is small, so that the head has the share of the
work that it has in a model of 8 B parameters. Writes JSON to benchmarks/results/.
"""

import argparse
import datetime
import json
import tempfile
from pathlib import Path

from activation_cache import SHAPE

from slowft.bench import step
from slowft.bench.limits import Limits
from slowft.bench.shapes import quantized, write_random
from slowft.bench.workload import Workload
from slowft.engine.model import parse_nbytes

RESULTS = Path(__file__).parent / "results"
FIGURES = ("step_s", "spread_s", "read_nbytes", "wait_share", "peak_nbytes", "kernel_peak_nbytes", "kept", "losses")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--memory", default="450MB", help="ceiling: too little for most 16-bit blocks to stay")
    parser.add_argument("--limit-read", default="60MB", help="limit of reads in bytes a second")
    args = parser.parse_args()
    memory, limits = parse_nbytes(args.memory), Limits(read_bytes_per_s=parse_nbytes(args.limit_read))
    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        config = SHAPE | {"num_hidden_layers": args.layers}
        bases = {bits: write_random(Path(scratch) / str(bits), quantized(config, bits)) for bits in (None, 4)}
        for name, bits in (("16-bit base", None), ("4-bit base", 4)):
            workload = Workload(str(bases[bits]), name, args.batch_size, args.tokens, steps=args.steps, memory=memory)
            measured = step.measure(workload, limits)
            results[name] = {figure: measured[figure] for figure in FIGURES} | {"predicted": measured["predicted"]}
            print(
                f"{name:11} step {measured['step_s']:5.2f} s (predicted {measured['predicted']['step_s']:5.2f}), "
                f"{measured['read_nbytes'] / 1e6:5.0f} MB read a step, waiting {measured['wait_share']:.0%}, "
                f"peak {measured['peak_nbytes'] / 1e6:.0f} MB; {measured['kept']}",
                flush=True,
            )
    first = results["16-bit base"]
    for result in results.values():
        result["bytes_share"] = result["read_nbytes"] / first["read_nbytes"]
        result["step_share"] = result["step_s"] / first["step_s"]
    print("bytes, of the 16-bit base's:", {name: round(r["bytes_share"], 3) for name, r in results.items()})
    RESULTS.mkdir(exist_ok=True)
    summary = {"arguments": vars(args), "shape": config, "device": measured["machine"]["device"], "results": results}
    file = RESULTS / f"quantized_{datetime.date.today().isoformat()}.json"
    file.write_text(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main()
