"""Predicts by plans whether a workload is bound by reading or by computing, for each number of micro-batches a step.

Weights are read as often however many micro-batches a step has, but computing grows with them. From some number on,
reading is hidden behind computing.
"""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..errors import ConfigError, SlowftError
from ..planning.plan import Plan
from .workload import Workload


def predict(
    workload: Workload,
    most: int,
    read_bytes_per_s: float | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """Plans for 1, 2, 4 ... `most` micro-batches, and the least number at which computing takes as long as reading.

    Args:
        read_bytes_per_s: an assumed limit of the drive's rate.
        progress: called with the number of plans made.
    Returns:
        "points": figures of a step for each number. "crossover": that least number; None if there is none up to `most`.
    Raises:
        ConfigError: not even one micro-batch fits into the memory.
    """
    from ..engine.budget import default_memory
    from ..engine.model import open_model

    memory = workload.memory or default_memory()
    model = open_model(workload.model)
    try:
        model.add_lora(workload.num_layers, rank=workload.rank, keys=workload.keys)
        planners = {}

        def point(n: int) -> dict[str, Any] | None:
            planner = planners[n] = model.planner(workload.batch_size, workload.tokens, n, measure=n == 1)
            if read_bytes_per_s is not None:
                slower = min(planner.rates.read, read_bytes_per_s)
                planner.rates = replace(planner.rates, read=slower)
            plan = planner.choose(memory)
            return None if plan is None else _figures(plan, workload.with_(micro_batches=n))

        counts, points = [1], []
        while counts[-1] * 2 <= most:
            counts.append(counts[-1] * 2)
        for i, n in enumerate(counts):
            if (figures := point(n)) is None:  # activations need too much memory
                break
            points.append(figures)
            progress(i + 1)
        if not points:
            raise ConfigError(planners[1].too_little(memory))
        if planners[1].machine.rates.read is None:
            raise SlowftError(f"{workload.name} has too little on disk to measure reading with")
        return {
            "job": workload.as_dict() | {"memory": memory},
            "machine": asdict(planners[1].machine),
            "points": points,
            "crossover": crossover(points, point),
        }
    finally:
        model.close()


def _figures(plan: Plan, workload: Workload) -> dict[str, Any]:
    return {
        "micro_batches": workload.micro_batches,
        "tokens": workload.tokens_of_step,
        "compute_s": plan.compute_s,
        "read_s": plan.read_s,
        "step_s": plan.step_s,
        "tokens_per_s": workload.tokens_of_step / plan.step_s,
        "read_nbytes": plan.read_nbytes,
        "peak_nbytes": plan.peak_nbytes,
        "bound": plan.bound,
    }


def crossover(points: list[dict], point: Callable[[int], dict | None]) -> int | None:
    """The least number of micro-batches that is bound by computing, found by bisection between the points."""
    first = next((p["micro_batches"] for p in points if p["bound"] == "computing"), None)
    if first is None:
        return None
    low, high = first // 2, first  # at `low` reading takes longer, or `low` is 0
    while high - low > 1:
        middle = (low + high) // 2
        figures = point(middle)
        if figures is not None and figures["bound"] == "computing":
            high = middle
        else:
            low = middle
    return high


def check_plot() -> None:
    """Raises ConfigError unless plots can be drawn."""
    import importlib.util

    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("a plot needs matplotlib. To fix it: pip install 'slowft[bench]', or use --json")


def plot(result: dict[str, Any], file: str | Path) -> None:
    """Draw the result as a PNG.

    Raises:
        SlowftError: the file cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    points, workload, crossover = result["points"], result["job"], result["crossover"]
    counts = [p["micro_batches"] for p in points]
    figure, (seconds, speed) = pyplot.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    for key, label, style in (
        ("read_s", "reading", "s-"),
        ("compute_s", "computing", "o-"),
        ("step_s", "step", "k--"),
    ):
        seconds.plot(counts, [p[key] for p in points], style, label=label, alpha=0.8)
    seconds.set(xlabel="micro-batches a step", ylabel="seconds a step", xscale="log", yscale="log")
    speed.plot(counts, [p["tokens_per_s"] for p in points], "o-", color="#1f4e79")
    speed.set(xlabel="micro-batches a step", ylabel="tokens/s", xscale="log")
    speed.set_ylim(0, 1.1 * max(p["tokens_per_s"] for p in points))
    for axes in (seconds, speed):
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, [str(n) for n in counts])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        if crossover is not None:
            axes.axvline(crossover, color="0.5", lw=1, ls=":", label=f"reading hidden from {crossover} on")
    seconds.legend(frameon=False)
    figure.suptitle(
        f"{workload['name']}, micro-batches of {workload['batch_size']}x{workload['tokens']} tokens, "
        f"{workload['memory'] / 1e9:.2f} GB: predicted"
    )
    try:
        figure.savefig(file, dpi=110, format="png")
    except OSError as e:
        raise SlowftError(f"{file} cannot be written: {e.strerror}. Give the plot another name") from None
    finally:
        pyplot.close(figure)
