"""Measures steps of slowft on one workload: speed, reads, waiting, memory, and the distance to the machine's rates."""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from . import worker
from .limits import Limits
from .workload import Workload


def measure(workload: Workload, limits: Limits, progress: Callable[[int], None] = lambda step: None) -> dict[str, Any]:
    """Medians and spreads over the workload's steps.

    Args:
        progress: called with the number of steps done, including the first one, which is not measured.
    """
    limits.check(workload)
    machine = limits.on(worker.run("machine", workload))
    with limits.group(workload) as group:
        run = worker.run("slowft", workload, progress, group)
        kernel = group and group.peak_nbytes
    return {
        "job": workload.as_dict(),
        "limits": limits.as_dict(),
        "machine": machine,
        **summary(workload, run, machine),
        "kernel_peak_nbytes": kernel,
    }


def trace(workload: Workload, file: str, progress: Callable[[int], None]) -> dict[str, Any]:
    """Trace the last of the workload's steps to `file`. Returns its figures."""
    run = worker.run("slowft", workload, progress, trace=file)
    last = run["steps"][-1]
    return {"job": workload.as_dict(), "kept": run["kept"], "losses": run["losses"], **last}


def summary(workload: Workload, run: dict[str, Any], machine: dict[str, Any]) -> dict[str, Any]:
    """A run's figures, made of those of its steps."""
    steps = run["steps"]
    step_s = statistics.median(step["step_s"] for step in steps)
    read = statistics.median(step["read_nbytes"] for step in steps)
    flops = run["flops"]
    compute_s = flops / machine["matmul_flops_per_s"]
    read_s = read / machine["read_bytes_per_s"] if machine["read_bytes_per_s"] else 0.0
    return {
        "step_s": step_s,
        "spread_s": spread([step["step_s"] for step in steps]),
        "tokens_per_s": workload.tokens_of_step / step_s,
        "read_nbytes": read,
        "written_nbytes": statistics.median(step["written_nbytes"] for step in steps),
        "read_bytes_per_s": read / step_s,
        "wait_share": statistics.median(step["wait_s"] / step["step_s"] for step in steps),
        "flops": flops,
        "flops_per_s": flops / step_s,
        # seconds for the same operations and reads at the machine's measured rates
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
    """The difference between the largest and the smallest value."""
    return max(values) - min(values)
