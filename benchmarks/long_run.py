"""A thousand steps of a real small model: memory stays flat, and the loss is mlx-lm's at every report.

python benchmarks/long_run.py MODEL     # SmolLM2-135M as `slowft demo` makes it; about an hour on 2 cores

Both train the same float32 copy of the model on the same batches: `slowft finetune`, and the installed `mlx_lm.lora`'s
own main, in memory. Prints the largest difference of a report's loss (asked: 1e-3) and what memory does over the steps.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from slowft.demo import write_data

THEIRS = """
import slowft, sys  # OpenBLAS before MLX
from mlx_lm import lora
from mlx_lm.tuner.trainer import TrainingCallback
import json
class Told(TrainingCallback):
    def on_train_loss_report(self, info):
        print("REPORT", json.dumps({k: float(v) for k, v in info.items()}), flush=True)
lora.get_reporting_callbacks = lambda *a, **k: Told()
lora.main()
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--iters", type=int, default=1000)
    parser.add_argument("--memory", default="700MB")
    parser.add_argument("--reports", help="write the reports of both there as they come, and use the ones there are")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        model, data = Path(scratch) / "model", write_data(Path(scratch))
        # (mlx-lm multiplies packed weights, which takes minutes a step on a CPU)
        convert = (
            "import slowft, sys; from mlx_lm import convert as c; c(*sys.argv[1:], dequantize=True, dtype='float32')"
        )
        subprocess.run([sys.executable, "-c", convert, args.model, str(model)], check=True, stdout=subprocess.DEVNULL)
        how = ["--model", model, "--data", data, "--train", "--iters", args.iters, "--batch-size", 1]
        how += [
            "--max-seq-length",
            96,
            "--steps-per-report",
            1,
            "--steps-per-eval",
            100 * args.iters,
            "--val-batches",
            1,
        ]
        how += ["--save-every", args.iters, "--learning-rate", "1e-4", "--seed", 0, "--num-layers", 16]
        how = list(map(str, how))
        ours = [sys.executable, "-m", "slowft", "finetune", *how, "--memory", args.memory, "--json"]
        ours += ["--adapter-path", f"{scratch}/ours"]
        reports = Path(args.reports or scratch)
        reports.mkdir(parents=True, exist_ok=True)
        found = [json.loads(line) for line in _lines(ours, reports / "slowft.txt") if line.startswith("{")]
        found = [event for event in found if event["event"] == "train"]
        theirs = [sys.executable, "-c", THEIRS, *how, "--adapter-path", f"{scratch}/theirs"]
        told = _lines(theirs, reports / "mlx-lm.txt")
        reference = [json.loads(line[7:]) for line in told if line.startswith("REPORT")]
    assert len(found) == len(reference) == args.iters, (len(found), len(reference))
    apart = [abs(a["train_loss"] - b["train_loss"]) for a, b in zip(found, reference)]
    print(f"{args.iters} steps, loss {found[0]['train_loss']:.4f} to {found[-1]['train_loss']:.4f}")
    print(f"largest difference of a report's loss from mlx-lm's: {max(apart):.2g}")
    memory = [event["memory_gb"] * 1e3 for event in found]
    n = max(1, len(memory) // 10)
    tenths = [sum(memory[i : i + n]) / n for i in range(0, len(memory) - n + 1, n)]
    print("MB of the process, mean over each tenth:", *(f"{m:.0f}" for m in tenths))
    print(f"peak {max(event['peak_memory'] for event in found) * 1e3:.0f} MB of {args.memory}")


def _lines(command: list[str], path: Path) -> list[str]:
    """What ``command`` prints, which goes to ``path``; what an earlier run left there whole is not made again."""
    if not path.exists():
        part = path.with_suffix(".part")
        with part.open("w") as out:
            done = subprocess.run(command, stdout=out, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            sys.exit(part.read_text()[-2000:] + done.stderr[-2000:])
        part.rename(path)
    return path.read_text().splitlines()


if __name__ == "__main__":
    main()
