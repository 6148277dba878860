"""Steps of slowft on one job: speed, reads, waiting, memory, and how near that is to what the machine can do."""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from . import worker
from .job import Job
from .limits import Limits


def measure(job: Job, limits: Limits, told: Callable[[int], None] = lambda step: None) -> dict[str, Any]:
    """Medians and spreads over the job's steps.

    Args:
        told: of each step that is done, the first (which is not counted) included.
    """
    limits.check(job)
    machine = limits.on(worker.run("machine", job))
    with limits.group(job) as group:
        run = worker.run("slowft", job, told, group)
        kernel = group and group.peak_nbytes
    return {
        "job": job.as_dict(),
        "limits": limits.as_dict(),
        "machine": machine,
        **summary(job, run, machine),
        "kernel_peak_nbytes": kernel,
    }


def trace(job: Job, file: str, told: Callable[[int], None]) -> dict[str, Any]:
    """The last of the job's steps, traced to `file`."""
    run = worker.run("slowft", job, told, trace=file)
    last = run["steps"][-1]
    return {"job": job.as_dict(), "kept": run["kept"], "losses": run["losses"], **last}


def summary(job: Job, run: dict[str, Any], machine: dict[str, Any]) -> dict[str, Any]:
    """Figures of a run of slowft, from each of its steps."""
    steps = run["steps"]
    step_s = statistics.median(step["step_s"] for step in steps)
    read = statistics.median(step["read_nbytes"] for step in steps)
    flops = run["flops"]
    compute_s = flops / machine["matmul_flops_per_s"]
    read_s = read / machine["read_bytes_per_s"] if machine["read_bytes_per_s"] else 0.0
    return {
        "step_s": step_s,
        "spread_s": spread([step["step_s"] for step in steps]),
        "tokens_per_s": job.tokens_of_step / step_s,
        "read_nbytes": read,
        "written_nbytes": statistics.median(step["written_nbytes"] for step in steps),
        "read_bytes_per_s": read / step_s,
        "wait_share": statistics.median(step["wait_s"] / step["step_s"] for step in steps),
        "flops": flops,
        "flops_per_s": flops / step_s,
        # seconds that the machine's own rates would take over the same operations and reads
        "compute_s": compute_s,
        "read_s": read_s,
        "roofline_share": max(compute_s, read_s) / step_s,
        "peak_nbytes": max(step["peak_nbytes"] for step in [run["first"], *steps]),
        "predicted": run["plan"]["predicted"],
        "memory": run["plan"]["memory"],
        "kept": run["kept"],
        "losses": run["losses"],
        "steps": steps,
    }


def spread(values: Sequence[float]) -> float:
    """From the least to the most."""
    return max(values) - min(values)
