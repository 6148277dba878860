"""Measures step time, bytes read and the kernel's peak for ceilings from the least memory to keeping everything.

python benchmarks/memory_ladder.py                      # the 1.1 B Llama shape, 4x128 tokens: about 20 minutes
python benchmarks/memory_ladder.py --layers 8 --rungs 4

Each rung runs in a cgroup of exactly the planned size, if one can be made. The rungs take turns, `--rounds` times, and
all are planned on one measurement of the machine. Medians are printed. The first and slowest rung is run only once.
Writes JSON and a plot to benchmarks/results/ (pip install matplotlib).
"""

import argparse
import datetime
import json
import platform
import statistics
import tempfile
from pathlib import Path

from planned import measure, plans

from slowft.bench.shapes import SHAPES, write_random

RESULTS = Path(__file__).parent / "results"
SHAPE = SHAPES["llama-1b"]


def climb(directory: Path, rungs: int, rounds: int, **job) -> list[dict]:
    """Measurements at budgets in equal ratios, from the least memory to keeping everything."""
    ends = plans(directory, **job)
    least, most = int(ends["least"] * 1.01), int(ends["most"] * 1.02)
    results: list[list[dict]] = [[] for _ in range(rungs)]
    for i in range(rounds):
        for number, runs in enumerate(results):
            if i == 0 or number > 0:
                memory = int(least * (most / least) ** (number / (rungs - 1)))
                runs.append(measure(directory, memory, **job))
                print(describe(runs[-1]), flush=True)
    return [_summary(runs) for runs in results]


def _summary(runs: list[dict]) -> dict:
    """The last of the runs, with the median of their steps and the highest of their peaks."""
    steps = [run["measured"]["step_s"] for run in runs]
    peak = max(run["measured"]["peak_nbytes"] for run in runs)
    kernel = [run["kernel_peak_nbytes"] for run in runs]
    measured = runs[-1]["measured"] | {"step_s": statistics.median(steps), "peak_nbytes": peak, "steps_s": steps}
    return runs[-1] | {"measured": measured, "kernel_peak_nbytes": max(kernel) if all(kernel) else None}


def describe(rung: dict) -> str:
    predicted, measured = rung["predicted"], rung["measured"]
    kernel = rung["kernel_peak_nbytes"]
    return (
        f"{rung['memory'] / 1e9:5.2f} GB: peak {measured['peak_nbytes'] / 1e9:.2f} GB resident, "
        f"{'-' if kernel is None else f'{kernel / 1e9:.2f}'} kernel, {predicted['peak_nbytes'] / 1e9:.2f} predicted; "
        f"step {measured['step_s']:.1f} s (predicted {predicted['step_s']:.1f}); "
        f"read {measured['read_nbytes'] / 1e9:.2f} GB, written {measured['written_nbytes'] / 1e9:.2f}; {rung['kept']}"
    )


def plot(rungs: list[dict], title: str, file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    budgets = [rung["memory"] / 1e9 for rung in rungs]
    figure, (times, reads, peaks) = pyplot.subplots(1, 3, figsize=(13, 4), constrained_layout=True)
    for axes, key, scale, label in (
        (times, "step_s", 1, "seconds a step"),
        (reads, "read_nbytes", 1e9, "GB read a step"),
        (peaks, "peak_nbytes", 1e9, "peak, GB"),
    ):
        axes.plot(budgets, [r["measured"][key] / scale for r in rungs], "o-", color="#1f4e79", label="measured")
        axes.plot(budgets, [r["predicted"][key] / scale for r in rungs], "x--", color="#c0504d", label="predicted")
        axes.set(xlabel="memory given, GB", ylabel=label, xscale="log")
        axes.set_xticks(budgets, [f"{b:.1f}" for b in budgets])
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    if all(r["kernel_peak_nbytes"] for r in rungs):
        kernel = [r["kernel_peak_nbytes"] / 1e9 for r in rungs]
        peaks.plot(budgets, kernel, "s:", color="#4f8f4f", label="kernel (cgroup)")
    peaks.plot(budgets, budgets, color="0.6", lw=1, label="given")
    for axes in (times, reads, peaks):
        axes.legend(frameon=False)
    figure.suptitle(title)
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--steps", type=int, default=1, help="steps measured, after one that is not")
    parser.add_argument("--rungs", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", help="a model directory, instead of a random one")
    args = parser.parse_args()
    job = {"rows": args.rows, "tokens": args.tokens, "steps": args.steps}
    with tempfile.TemporaryDirectory() as scratch:
        model = args.model or write_random(Path(scratch) / "m", SHAPE | {"num_hidden_layers": args.layers})
        rungs = climb(Path(model), args.rungs, args.rounds, **job)
        print("\nMedians of the steps, highest peaks:")
        for rung in rungs:
            print(describe(rung))
    today = datetime.date.today().isoformat()
    shape = f"{args.layers} blocks of 2048/5632" if args.model is None else args.model
    machine = f"{platform.machine()} {platform.system()}, MLX on the CPU" if platform.system() == "Linux" else "macOS"
    title = f"{shape}, {args.rows}x{args.tokens} tokens, {machine}"
    RESULTS.mkdir(exist_ok=True)
    name = f"memory_ladder_{args.layers}"
    (RESULTS / f"{name}_{today}.json").write_text(json.dumps({"title": title, "job": job, "rungs": rungs}, indent=2))
    try:
        plot(rungs, title, RESULTS / f"{name}.png")
    except ImportError:
        print("no plot: pip install matplotlib")


if __name__ == "__main__":
    main()
