"""Checks that jobs of many kinds keep to their memory: each runs in a cgroup of that size, at three ceilings.

python benchmarks/ceilings.py                # half an hour; needs root on Linux
python benchmarks/ceilings.py --only gemma   # kinds whose name contains this
python benchmarks/ceilings.py --random 40    # 40 jobs with random sizes, ceilings and drives

There is a kind for each model and step that a plan computes in another way: formats of weights, tied and large heads,
experts, long sequences, adapters, dtypes to compute in. Each is planned in its least memory, and at 5% and 50% of the
way from there to keeping everything. The kernel kills what takes more. The predicted peak is printed beside the
measured one.

Random jobs are of these kinds with other sizes. Half of them have a slow drive, so that steps wait for it and plans
keep other things in memory.
"""

import argparse
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from planned import measure, plans

from slowft.bench.shapes import quantized, write_random
from slowft.planning.plan import enough

LLAMA = {
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}
SMALL = LLAMA | {"hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8, "vocab_size": 8000}
QWEN3 = LLAMA | {"model_type": "qwen3", "head_dim": 64, "tie_word_embeddings": True}
QWEN2 = LLAMA | {"model_type": "qwen2", "tie_word_embeddings": True, "vocab_size": 151936, "num_hidden_layers": 4}
GEMMA2 = LLAMA | {
    "model_type": "gemma2",
    "head_dim": 64,
    "vocab_size": 64000,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "query_pre_attn_scalar": 64,
}
GEMMA3 = GEMMA2 | {"model_type": "gemma3_text", "sliding_window": 64, "sliding_window_pattern": 3}
PHI3 = LLAMA | {"model_type": "phi3", "num_key_value_heads": 16}
MIXTRAL = LLAMA | {
    "model_type": "mixtral",
    "intermediate_size": 1408,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 4,
}
QWEN3_MOE = QWEN3 | {
    "model_type": "qwen3_moe",
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 512,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "num_hidden_layers": 4,
}
GPT_OSS = {
    "model_type": "gpt_oss",
    "hidden_size": 512,
    "intermediate_size": 512,
    "num_hidden_layers": 6,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 32000,
    "rms_norm_eps": 1e-5,
    "rope_theta": 150000,
    "sliding_window": 64,
}
KINDS = {  # name -> (config, bits, job)
    "llama": (LLAMA, None, {}),
    "llama, 4 x 64 tokens": (LLAMA, None, {"rows": 4, "tokens": 64}),
    "llama, 2 bits": (LLAMA, 2, {}),
    "llama, 3 bits": (LLAMA, 3, {}),
    "llama, 4 bits": (LLAMA, 4, {}),
    "llama, 8 bits": (LLAMA, 8, {}),
    "llama, bfloat16": (LLAMA, None, {"rows": 1, "tokens": 32, "compute_dtype": "bfloat16"}),
    "llama, DoRA": (LLAMA, None, {"use_dora": True}),
    "llama, last two": (LLAMA, None, {"num_layers": 2}),
    "llama, micro-batches": (LLAMA, None, {"rows": 1, "micro_batches": 6}),
    "small, long": (SMALL, None, {"rows": 1, "tokens": 3000}),
    "small, 4 bits, long": (SMALL, 4, {"rows": 1, "tokens": 2000}),
    "small": (SMALL, None, {"rows": 8}),
    "qwen3, tied": (QWEN3, None, {}),
    "qwen3, tied, 4 bits": (QWEN3, 4, {}),
    "qwen2, large tied head": (QWEN2, None, {}),
    "qwen2, large tied head, 4 bits": (QWEN2, 4, {}),
    "gemma2": (GEMMA2, None, {}),
    "gemma3": (GEMMA3, None, {}),
    "phi3": (PHI3, None, {}),
    "mixtral": (MIXTRAL, None, {}),
    "mixtral, 4 bits": (MIXTRAL, 4, {}),
    "qwen3_moe": (QWEN3_MOE, None, {}),
    "qwen3_moe, 2 tokens": (QWEN3_MOE, None, {"rows": 1, "tokens": 2}),
    "gpt_oss": (GPT_OSS, None, {}),
}
SHARES = 0.0, 0.05, 0.5  # parts of the way from the least memory to keeping everything
DRIVES = None, None, 120_000_000, 40_000_000  # bytes a second that a random job's drive is limited to


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="kinds whose name contains this")
    parser.add_argument(
        "--shares", type=float, nargs="+", default=SHARES, help="ceilings, as parts of the way to keeping everything"
    )
    parser.add_argument("--random", type=int, metavar="N", help="run so many random jobs instead")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random jobs")
    options = parser.parse_args()
    kinds = {name: kind for name, kind in KINDS.items() if options.only in name}
    if options.random is None:
        runs = ((name, config, bits, job, options.shares, None) for name, (config, bits, job) in kinds.items())
    else:
        runs = draw(kinds, options.random, random.Random(options.seed))
    failed = 0
    for name, config, bits, job, shares, read_bytes_per_s in runs:
        job = {"rows": 2, "tokens": 128, "steps": 2, "vary": True} | job
        with tempfile.TemporaryDirectory() as scratch:
            directory = write_random(Path(scratch) / "model", quantized(config, bits) if bits else config)
            ends = plans(directory, **job)
            for share in shares:
                memory = enough(int(ends["least"] + share * (ends["most"] - ends["least"])))
                failed += not has_kept_to(name, directory, memory, read_bytes_per_s, job)
    sys.exit(1 if failed else 0)


def has_kept_to(name: str, directory: Path, memory: int, read_bytes_per_s: int | None, job: dict) -> bool:
    """Run the job and print a line about it. Returns whether it stayed within its memory."""
    try:
        result = measure(directory, memory, read_bytes_per_s, **job)
    except RuntimeError as e:
        print(f"{name:32} {memory / 1e6:5.0f} MB  FAILED  {str(e)[-300:]}", flush=True)
        return False
    (predicted, peak), (planned_s, step_s) = (
        (result["predicted"][k], result["measured"][k]) for k in ("peak_nbytes", "step_s")
    )
    over = "  OVER" if peak > memory else ""
    print(
        f"{name:32} {memory / 1e6:5.0f} MB  peak {predicted / 1e6:5.0f} / {peak / 1e6:5.0f} "
        f"({predicted / peak:.2f})  step {planned_s:5.2f} / {step_s:5.2f} s ({planned_s / step_s:.2f})  "
        f"{result['kept']}{over}",
        flush=True,
    )
    return not over


def draw(kinds: dict, n: int, dice: random.Random) -> Iterator[tuple]:
    """(name, config, bits, job, shares, limit of reads in bytes a second) of `n` random jobs."""
    for number in range(n):
        config, bits, job = kinds[dice.choice(list(kinds))]
        config = config | {
            "num_hidden_layers": dice.randint(2, 12),
            "vocab_size": 64 * dice.randint(16, config["vocab_size"] // 64),
        }
        if config["model_type"] == "gpt_oss":  # mlx-lm makes its layer types in pairs, and leaves an odd block out
            config = config | {"num_hidden_layers": 2 * (config["num_hidden_layers"] // 2)}
        if "num_local_experts" not in config:
            config = config | {"intermediate_size": 64 * dice.randint(8, 60)}
        rows = dice.choice([1, 2, 3, 5])
        most = 40 if "compute_dtype" in job else 1200  # MLX is slow in 16 bits on a CPU
        job = job | {
            "rows": rows,
            "tokens": min(dice.choice([7, 33, 100, 257, 600]), most // rows),
            "micro_batches": dice.choice([1, 1, 1, 3]),
            "num_layers": dice.choice([-1, -1, 1, config["num_hidden_layers"] // 2]),
            "vary": dice.random() < 0.5,
        }
        drive = dice.choice(DRIVES)
        sizes = f"{config['num_hidden_layers']} blocks, {job['micro_batches']}x{rows}x{job['tokens']}"
        limit = "" if drive is None else f", {drive // 10**6} MB/s"
        name = f"{number} {config['model_type']}{f' {bits} bits' if bits else ''}, {sizes}{limit}"
        yield name, config, bits, job, [dice.random() ** 2], drive


if __name__ == "__main__":
    main()
