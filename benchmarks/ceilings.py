"""Whether jobs of many kinds keep to the memory they are given: each in a cgroup of it, at three ceilings.

python benchmarks/ceilings.py                # about 10 minutes; root, on Linux
python benchmarks/ceilings.py --only gemma   # kinds whose name contains this

Every kind of model and step that a plan reckons differently: formats of weights, tied and large heads, experts, long
sequences, adapters, dtypes to compute in. Each is planned in its least memory, and a twentieth and half of the way from
there to keeping everything. The kernel kills what takes more; the predicted peak is told beside the measured one.
"""

import argparse
import sys
import tempfile
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
KINDS = {  # name: (config, bits, job)
    "llama": (LLAMA, None, {}),
    "llama, 4 x 64 tokens": (LLAMA, None, {"rows": 4, "tokens": 64}),
    "llama, 2 bits": (LLAMA, 2, {}),
    "llama, 3 bits": (LLAMA, 3, {}),
    "llama, 4 bits": (LLAMA, 4, {}),
    "llama, 8 bits": (LLAMA, 8, {}),
    "llama, held in 4 bits": (LLAMA, None, {"resident_bits": 4}),
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
SHARES = 0.0, 0.05, 0.5  # of the way from the least to everything


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="kinds whose name contains this")
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES, help="of the way to keeping everything")
    options = parser.parse_args()
    failed = 0
    for name, (config, bits, job) in KINDS.items():
        if options.only not in name:
            continue
        job = {"rows": 2, "tokens": 128, "steps": 2, "vary": True} | job
        with tempfile.TemporaryDirectory() as scratch:
            directory = write_random(Path(scratch) / "model", quantized(config, bits) if bits else config)
            ends = plans(directory, **job)
            for share in options.shares:
                memory = enough(int(ends["least"] + share * (ends["most"] - ends["least"])))
                try:
                    result = measure(directory, memory, **job)
                except RuntimeError as e:
                    failed += 1
                    print(f"{name:32} {memory / 1e6:5.0f} MB  FAILED  {str(e)[-300:]}", flush=True)
                    continue
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
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
