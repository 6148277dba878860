"""Compares slowft with other trainers on the same workload. They take turns, each in a process of its own.

Only ratios of figures from the same machine and run are given.
"""

import statistics
from collections.abc import Callable
from typing import Any

from ..errors import SlowftError
from . import slowllama, step, worker
from .limits import Limits
from .workload import Workload

OURS = "slowft"


def contenders(slowllama_checkout: str | None) -> dict[str, tuple[str, dict[str, Any]]]:
    """Name -> (the worker's task, its options)."""
    tasks: dict[str, tuple[str, dict[str, Any]]] = {
        OURS: ("slowft", {}),
        "mlx-lm": ("mlx-lm", {"grad_checkpoint": False}),
        "mlx-lm --grad-checkpoint": ("mlx-lm", {"grad_checkpoint": True}),
    }
    if slowllama_checkout is not None:
        tasks["slowllama"] = ("slowllama", {"checkout": slowllama_checkout})
    return tasks


def measure(
    workload: Workload,
    turns: int,
    limits: Limits,
    slowllama_checkout: str | None = None,
    progress: Callable[[str, int], None] = lambda name, steps: None,
) -> dict[str, Any]:
    """Step times of all contenders, who take turns, and slowft's ratio to each.

    If a contender fails, for example for want of memory, the result has the reason. Memory is limited only for those
    that stream, because mlx-lm needs the whole model in memory.

    Args:
        progress: called with a contender's name and how many steps it has done in all turns.
    """
    limits.check(workload)
    machine = limits.on(worker.run("machine", workload))
    if slowllama_checkout is not None:
        worker.run("write slowllama's files", workload, checkout=slowllama_checkout)
    tasks = contenders(slowllama_checkout)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in tasks}
    failed: dict[str, str] = {}
    for turn in range(turns):
        for name, (task, options) in tasks.items():
            if name in failed:
                continue
            if task == "slowllama":
                slowllama.drop_cached_files(workload)

            def on_step(n: int, name: str = name, before: int = turn * workload.steps) -> None:
                progress(name, before + n)

            with limits.group(workload, memory=task != "mlx-lm") as group:
                try:
                    run = worker.run(task, workload, on_step, group, **options)
                    runs[name].append(run | {"kernel_peak_nbytes": group and group.peak_nbytes})
                except SlowftError as e:
                    failed[name] = str(e)
    if OURS in failed:
        raise SlowftError(failed[OURS])
    results = {name: _summary(workload, own_runs) for name, own_runs in runs.items() if own_runs}
    ours = step.summary(workload, runs[OURS][-1] | {"steps": [s for run in runs[OURS] for s in run["steps"]]}, machine)
    return {
        "job": workload.as_dict(),
        "limits": limits.as_dict(),
        "machine": machine,
        "results": results | {name: {"failed": reason} for name, reason in failed.items()},
        OURS: ours,
        # above 1 if the other one takes longer
        "times_as_fast": {
            name: other["step_s"] / results[OURS]["step_s"] for name, other in results.items() if name != OURS
        },
    }


def check(workload: Workload, limits: Limits, slowllama_checkout: str | None) -> None:
    """Raises ConfigError if the comparison is not possible here."""
    limits.check(workload)
    if slowllama_checkout is not None:
        slowllama.check(slowllama_checkout, workload)


def _summary(workload: Workload, runs: list[dict[str, Any]]) -> dict[str, Any]:
    seconds = [s["step_s"] for run in runs for s in run["steps"]]
    kernel = [run["kernel_peak_nbytes"] for run in runs if run["kernel_peak_nbytes"]]
    return {
        "step_s": statistics.median(seconds),
        "spread_s": step.spread(seconds),
        "tokens_per_s": workload.tokens_of_step / statistics.median(seconds),
        "peak_nbytes": max(s["peak_nbytes"] for run in runs for s in [run["first"], *run["steps"]]),
        "kernel_peak_nbytes": max(kernel, default=None),
        "losses": runs[-1]["losses"],
        "step_s_of_turns": [[s["step_s"] for s in run["steps"]] for run in runs],
    }
