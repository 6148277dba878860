"""Where a job is bound, by its plans: seconds of reading and computing against the micro-batches of a step.

Weights are read per step, computing goes with the micro-batches: from some number on, reading disappears behind it.
"""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..errors import ConfigError, SlowftError
from .job import Job


def predict(
    job: Job, most: int, read_bytes_per_s: float | None = None, told: Callable[[int], None] = lambda done: None
) -> dict[str, Any]:
    """Plans for 1, 2, 4 ... `most` micro-batches, and the least number at which computing takes as long as reading.

    Args:
        read_bytes_per_s: suppose that reads are no faster than this.
    Returns:
        "points": figures of a step at each number; "crossover": that number, None if there is none up to `most`.
    Raises:
        ConfigError: not even one micro-batch fits the memory.
    """
    from ..engine.budget import default_memory
    from ..engine.model import open_model

    memory = job.memory or default_memory()
    model = open_model(job.model)
    try:
        model.add_lora(job.num_layers, rank=job.rank, keys=job.keys)
        planners = {}

        def point(n: int) -> dict[str, Any] | None:
            planner = planners[n] = model.planner(job.batch_size, job.tokens, n, measure=n == 1)
            if read_bytes_per_s is not None:
                slower = min(planner.rates.read, read_bytes_per_s)
                planner.rates = replace(planner.rates, read=slower)
            plan = planner.choose(memory)
            if plan is None:
                return None
            tokens = job.batch_size * job.tokens * n
            return {
                "micro_batches": n,
                "tokens": tokens,
                "compute_s": plan.compute_s,
                "read_s": plan.read_s,
                "step_s": plan.step_s,
                "tokens_per_s": tokens / plan.step_s,
                "read_nbytes": plan.read_nbytes,
                "peak_nbytes": plan.peak_nbytes,
                "bound": plan.bound,
            }

        counts, points = [1], []
        while counts[-1] * 2 <= most:
            counts.append(counts[-1] * 2)
        for i, n in enumerate(counts):
            if (here := point(n)) is None:  # activations take the memory
                break
            points.append(here)
            told(i + 1)
        if not points:
            raise ConfigError(planners[1].too_little(memory))
        if planners[1].machine.rates.read is None:
            raise SlowftError(f"{job.name} has too little on disk to measure reading with")
        return {
            "job": job.as_dict() | {"memory": memory},
            "machine": asdict(planners[1].machine),
            "points": points,
            "crossover": crossover(points, point),
        }
    finally:
        model.close()


def crossover(points: list[dict], point: Callable[[int], dict | None]) -> int | None:
    """Between the last point bound by reading and the first that is not, by bisection."""
    hidden = next((p["micro_batches"] for p in points if p["bound"] == "computing"), None)
    if hidden is None:
        return None
    low, high = hidden // 2, hidden  # reading is longer at `low`, or it is 0
    while high - low > 1:
        middle = (low + high) // 2
        between = point(middle)
        if between is not None and between["bound"] == "computing":
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
    """Draw it as a PNG.

    Raises:
        SlowftError: the file cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    points, job, crossover = result["points"], result["job"], result["crossover"]
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
        f"{job['name']}, micro-batches of {job['batch_size']}x{job['tokens']} tokens, "
        f"{job['memory'] / 1e9:.2f} GB: predicted"
    )
    try:
        figure.savefig(file, dpi=110, format="png")
    except OSError as e:
        raise SlowftError(f"{file} cannot be written: {e.strerror}. Give the plot another name") from None
    finally:
        pyplot.close(figure)
