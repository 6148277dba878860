"""Compares predicted with measured peak memory and step time, for jobs of different shapes.

python benchmarks/predictions.py          # about 10 minutes

The goals: a plan's peak is within 10% of what the operating system counts and never more than 5% below it, and the
step's seconds are within 25%. Writes JSON to benchmarks/results/.
"""

import argparse
import datetime
import json
import tempfile
from pathlib import Path

from memory_ladder import RESULTS, SHAPE
from planned import measure, plans

from slowft.bench.shapes import quantized, write_random

WIDE = SHAPE | {"num_hidden_layers": 6}
SMALL = SHAPE | {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_hidden_layers": 12}
LARGE_HEAD = SMALL | {"num_hidden_layers": 4, "vocab_size": 128000}
QWEN3 = SMALL | {
    "model_type": "qwen3",
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
}
EXPERTS = SMALL | {
    "model_type": "mixtral",
    "intermediate_size": 1408,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 6,
    "rope_theta": 1e6,
}
# name -> (config, bits, part of the way from the least memory to keeping everything, job)
JOBS = {
    "wide blocks, least": (WIDE, None, 0.02, {"rows": 4, "tokens": 128}),
    "wide blocks, 150 MB/s": (WIDE, None, 0.1, {"rows": 4, "tokens": 128, "read_bytes_per_s": 150_000_000}),
    "wide blocks, half": (WIDE, None, 0.5, {"rows": 4, "tokens": 128}),
    "wide blocks, everything": (WIDE, None, 1.02, {"rows": 4, "tokens": 128}),
    "long sequence": (SMALL, None, 0.3, {"rows": 1, "tokens": 1024}),
    "four micro-batches": (SMALL, None, 0.1, {"rows": 2, "tokens": 128, "micro_batches": 4}),
    "last four blocks trained": (SMALL, None, 0.2, {"rows": 4, "tokens": 256, "num_layers": 4}),
    "large head": (LARGE_HEAD, None, 0.1, {"rows": 4, "tokens": 128}),
    "tied embeddings, qwen3": (QWEN3, None, 0.2, {"rows": 4, "tokens": 128}),
    "experts": (EXPERTS, None, 0.1, {"rows": 4, "tokens": 128}),
    "experts, by groups": (EXPERTS, None, 0.0, {"rows": 4, "tokens": 128}),
    "4-bit": (SMALL, 4, 0.1, {"rows": 4, "tokens": 128}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="jobs whose name contains this")
    only = parser.parse_args().only
    results, written = {}, {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, (config, bits, share, job) in JOBS.items():
            if only and only not in name:
                continue
            key = json.dumps([config, bits])
            if key not in written:
                written[key] = write_random(Path(scratch) / str(len(written)), quantized(config, bits))
            ends = plans(written[key], **job)
            memory = int(ends["least"] * 1.005 + share * (ends["most"] - ends["least"]))
            result = results[name] = measure(written[key], memory, steps=2, **job)
            predicted, measured = result["predicted"], result["measured"]
            ratios = {k: predicted[k] / measured[k] for k in ("peak_nbytes", "step_s")}
            result["ratios"] = ratios
            print(
                f"{name:26} peak {predicted['peak_nbytes'] / 1e6:6.0f} / {measured['peak_nbytes'] / 1e6:6.0f} MB "
                f"({ratios['peak_nbytes']:.2f}), step {predicted['step_s']:5.2f} / {measured['step_s']:5.2f} s "
                f"({ratios['step_s']:.2f}), kernel {(result['kernel_peak_nbytes'] or 0) / 1e6:.0f} of "
                f"{memory / 1e6:.0f} MB; "
                f"{result['kept']}",
                flush=True,
            )
    if only:
        return
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"predictions_{datetime.date.today().isoformat()}.json"
    file.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
