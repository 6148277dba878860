"""Print docs/macs.md: what `slowft plan` predicts for large models on Macs of 8 to 64 GB. No Mac is needed.

    python scripts/mac_table.py > docs/macs.md

The speeds in `MAC` are assumptions, roughly those of a base M-series chip.
"""

import slowft  # noqa: F401, I001  (before mlx: it loads OpenBLAS)

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path


from slowft.engine.model import open_model
from slowft.models.outline import outline_of_config
from slowft.planning.machine import OF_PRODUCTS, Machine
from slowft.planning.measure import Rates
from slowft.planning.plan import Plan
from slowft.reports.plan import duration

CONFIGS = Path(__file__).parent.parent / "tests/configs"
MODELS = {
    "llama-3.3-70b": "Llama-3.3-70B",
    "qwen3-32b": "Qwen3-32B",
    "mixtral-8x22b": "Mixtral-8x22B",
    "gpt-oss-120b": "gpt-oss-120b",
}
FOUR_BITS = {"group_size": 64, "bits": 4, "mode": "affine"}
MEMORY = {8: 5, 16: 10, 32: 21, 64: 43}  # GB of the Mac -> GB for slowft: about two thirds
TOKENS, LAYERS, RANK = 1024, 16, 8
PRODUCTS = 3.5e12  # flops a second of a base M-series chip, in products of 16 bits
REACHED = OF_PRODUCTS * PRODUCTS
MAC = Machine(
    memory_nbytes=0,  # ceilings are given
    cores=8,
    device="an assumed Mac",
    compute_dtype="bfloat16",
    rates=Rates(forward=REACHED, backward=REACHED, head=REACHED, cast=50e9, read=3e9),
    write_bytes_per_s=2e9,
)

PAGE = """# Large models on Macs: predictions

**Predicted, not measured.** No Mac was at hand. The speeds are assumptions, about those of a base M-series chip and
the same for every size of memory: blocks reach {share:.0%} of {flops:g} TFLOP/s in 16-bit products, {read:g} GB/s are
read from the SSD, {written:g} GB/s written to it.

The job: one sequence of {tokens:,} tokens a step, LoRA of rank {rank} on the last {layers} blocks, Adam, in the
model's own dtype (`--compute-dtype native`, the default on a Mac). `--memory` is about two thirds of the Mac's
memory. Of each plan: its predicted peak, bytes read from the SSD a step, seconds a step, and what takes longer.

{table}

Bytes read are exact. Memory is an upper bound by arithmetic on the shapes of layers, which is up to twice what
computing a block takes, and includes what the process takes on the Linux machine where this page was made. Seconds are
floating point operations and bytes over the speeds above; a quantized weight is taken to multiply as fast as one of 16
bits.
A run measures its first step and then keeps more than this where memory turns out to be left. Where two blocks do not
fit, a block is not read while another one computes, so the seconds of both add up. Where it says *reading*,
`--grad-accumulation-steps` costs little: more tokens for the same bytes.

Made by `python scripts/mac_table.py > docs/macs.md`, from the configs in `tests/configs`. The same for your own Mac,
by its own speeds, for a model on its disk: `slowft plan --model DIRECTORY --batch-size 1 --max-seq-length 1025`.
"""


def main() -> None:
    header = ["model", "on disk", *(f"{mac} GB Mac, `--memory {budget}GB`" for mac, budget in MEMORY.items())]
    rows = [header, ["---"] * len(header)]
    for config_file, name in configs():
        print(name, file=sys.stderr)
        rows.append([name, *predict(config_file)])
    print(
        PAGE.format(
            table="\n".join(f"| {' | '.join(row)} |" for row in rows),
            flops=PRODUCTS / 1e12,
            share=OF_PRODUCTS,
            read=MAC.rates.read / 1e9,
            written=MAC.write_bytes_per_s / 1e9,
            tokens=TOKENS,
            rank=RANK,
            layers=LAYERS,
        ),
        end="",
    )


def configs() -> Iterator[tuple[Path, str]]:
    """Config files as they are, and of those that are not quantized a second one that asks for 4 bits."""
    with tempfile.TemporaryDirectory() as directory:
        for stem, name in MODELS.items():
            config = json.loads((CONFIGS / f"{stem}.json").read_text())
            method = config.get("quantization_config", {}).get("quant_method")
            yield CONFIGS / f"{stem}.json", f"{name}, {method or '16-bit'}"
            if method is None:
                quantized = Path(directory) / f"{stem}.json"
                quantized.write_text(json.dumps(config | {"quantization": FOUR_BITS}))
                yield quantized, f"{name}, 4-bit"


def predict(config_file: Path) -> list[str]:
    """Size on disk, and a cell for each budget."""
    with outline_of_config(config_file) as directory:
        model = open_model(directory, compute_dtype="native")
        try:
            model.expect_lora(LAYERS, rank=RANK)
            planner = model.budget.planner(1, TOKENS, 1, machine=MAC)
            least = f"does not fit: at least {planner.least().peak_nbytes / 1e9:.1f} GB"
            plans = [planner.choose(int(budget * 1e9)) for budget in MEMORY.values()]
            return [f"{model.nbytes_on_disk / 1e9:.0f} GB", *(cell(plan) if plan else least for plan in plans)]
        finally:
            model.close()


def cell(plan: Plan) -> str:
    read, peak = plan.read_nbytes / 1e9, plan.peak_nbytes / 1e9
    return f"{peak:.1f} GB, reads {read:.{1 if read < 10 else 0}f} GB, **{duration(plan.step_s)}**, {plan.bound}"


if __name__ == "__main__":
    main()
