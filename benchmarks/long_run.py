"""Checks over a thousand steps of a real small model that memory stays flat, and that every loss is mlx-lm's.

python benchmarks/long_run.py MODEL     # SmolLM2-135M as `slowft demo` makes it; about an hour on 2 cores

`slowft finetune` and the installed `mlx_lm.lora` (its own main, in memory) train the same float32 copy of the model on
the same batches. Prints the largest difference of a report's loss (the goal is 1e-3) and the memory over the steps.
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
class Reports(TrainingCallback):
    def on_train_loss_report(self, info):
        print("REPORT", json.dumps({k: float(v) for k, v in info.items()}), flush=True)
lora.get_reporting_callbacks = lambda *a, **k: Reports()
lora.main()
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--iters", type=int, default=1000)
    parser.add_argument("--memory", default="700MB")
    parser.add_argument("--reports", help="directory for the reports of both; finished ones there are used again")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        model, data = Path(scratch) / "model", write_data(Path(scratch))
        # float32, because mlx-lm multiplies packed weights, which takes minutes a step on a CPU
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
        events = [json.loads(line) for line in _lines(ours, reports / "slowft.txt") if line.startswith("{")]
        events = [event for event in events if event["event"] == "train"]
        theirs = [sys.executable, "-c", THEIRS, *how, "--adapter-path", f"{scratch}/theirs"]
        lines = _lines(theirs, reports / "mlx-lm.txt")
        reference = [json.loads(line[7:]) for line in lines if line.startswith("REPORT")]
    assert len(events) == len(reference) == args.iters, (len(events), len(reference))
    differences = [abs(a["train_loss"] - b["train_loss"]) for a, b in zip(events, reference)]
    print(f"{args.iters} steps, loss {events[0]['train_loss']:.4f} to {events[-1]['train_loss']:.4f}")
    print(f"largest difference of a report's loss from mlx-lm's: {max(differences):.2g}")
    memory = [event["memory_gb"] * 1e3 for event in events]
    n = max(1, len(memory) // 10)
    tenths = [sum(memory[i : i + n]) / n for i in range(0, len(memory) - n + 1, n)]
    print("MB of the process, mean over each tenth:", *(f"{m:.0f}" for m in tenths))
    print(f"peak {max(event['peak_memory'] for event in events) * 1e3:.0f} MB of {args.memory}")


def _lines(command: list[str], path: Path) -> list[str]:
    """The lines that `command` prints, which are written to `path`. If an earlier run finished it, nothing is run."""
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
