"""The same job by slowft and by others, in turns, each in a process of its own: one machine, one run, ratios."""

import statistics
from collections.abc import Callable
from typing import Any

from ..errors import SlowftError
from . import slowllama, step, worker
from .job import Job
from .limits import Limits

OURS = "slowft"


def contenders(slowllama_checkout: str | None) -> dict[str, tuple[str, dict[str, Any]]]:
    """Name -> (task, its options)."""
    found: dict[str, tuple[str, dict[str, Any]]] = {
        OURS: ("slowft", {}),
        "mlx-lm": ("mlx-lm", {"grad_checkpoint": False}),
        "mlx-lm --grad-checkpoint": ("mlx-lm", {"grad_checkpoint": True}),
    }
    if slowllama_checkout is not None:
        found["slowllama"] = ("slowllama", {"checkout": slowllama_checkout})
    return found


def measure(
    job: Job,
    turns: int,
    limits: Limits,
    slowllama_checkout: str | None = None,
    told: Callable[[str, int], None] = lambda name, steps: None,
) -> dict[str, Any]:
    """Step times of all contenders, by turns, and slowft's ratio to each.

    One that fails, as where its memory does not suffice, is in the result with its reason. Memory is limited only for
    those that stream: models in memory have to fit in it.

    Args:
        told: who has done how many steps in all.
    """
    limits.check(job)
    machine = limits.on(worker.run("machine", job))
    if slowllama_checkout is not None:
        worker.run("write slowllama's files", job, checkout=slowllama_checkout)
    everyone = contenders(slowllama_checkout)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in everyone}
    failed: dict[str, str] = {}
    for turn in range(turns):
        for name, (task, options) in everyone.items():
            if name in failed:
                continue
            if task == "slowllama":
                slowllama.drop_cached_files(job)
            with limits.group(job, memory=task != "mlx-lm") as group:
                try:
                    before = turn * job.steps
                    run = worker.run(task, job, lambda n, name=name: told(name, before + n), group, **options)  # noqa: B023
                    runs[name].append(run | {"kernel_peak_nbytes": group and group.peak_nbytes})
                except SlowftError as e:
                    failed[name] = str(e)
    if OURS in failed:
        raise SlowftError(failed[OURS])
    results = {name: _summary(job, of_name) for name, of_name in runs.items() if of_name}
    ours = step.summary(job, runs[OURS][-1] | {"steps": [s for run in runs[OURS] for s in run["steps"]]}, machine)
    return {
        "job": job.as_dict(),
        "limits": limits.as_dict(),
        "machine": machine,
        "results": results | {name: {"failed": reason} for name, reason in failed.items()},
        OURS: ours,
        # above 1: the other one takes longer
        "times_as_fast": {
            name: of_name["step_s"] / results[OURS]["step_s"] for name, of_name in results.items() if name != OURS
        },
    }


def check(job: Job, limits: Limits, slowllama_checkout: str | None) -> None:
    """Raises ConfigError for what cannot be compared here."""
    limits.check(job)
    if slowllama_checkout is not None:
        slowllama.check(slowllama_checkout, job)


def _summary(job: Job, runs: list[dict[str, Any]]) -> dict[str, Any]:
    seconds = [s["step_s"] for run in runs for s in run["steps"]]
    kernel = [run["kernel_peak_nbytes"] for run in runs if run["kernel_peak_nbytes"]]
    return {
        "step_s": statistics.median(seconds),
        "spread_s": step.spread(seconds),
        "tokens_per_s": job.tokens_of_step / statistics.median(seconds),
        "peak_nbytes": max(s["peak_nbytes"] for run in runs for s in [run["first"], *run["steps"]]),
        "kernel_peak_nbytes": max(kernel, default=None),
        "losses": runs[-1]["losses"],
        "step_s_of_turns": [[s["step_s"] for s in run["steps"]] for run in runs],
    }
