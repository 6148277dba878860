"""Describes a plan: three lines before a run, a page for `slowft plan`, or a dict for programs.

Comes in: `Plan`s, and the machine that they were made for. Goes out: text or plain values. A GB is 10^9 bytes.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ..planning.caching import Caching
from ..planning.machine import Machine
from ..planning.plan import Plan, enough
from ..planning.several import LINK_NBYTES_S, Shared


def size(nbytes: float) -> str:
    """ "2.20 GB", "88 MB", "4.2 MB"."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= scale or unit == "kB":
            value = nbytes / scale
            return f"{value:.2f} {unit}" if unit in ("GB", "TB") else f"{value:.{0 if value >= 10 else 1}f} {unit}"
    raise AssertionError


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.2g} s" if seconds < 1 else f"{seconds:.1f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def choices(plan: Plan) -> str:
    """What is kept in memory and how work is cut, in a few words."""
    s, job = plan.schedule, plan.job
    words = []
    if plan.is_ordinary:
        words.append("all blocks and the head in memory, as in ordinary training")
    else:
        if s.group_nbytes:
            words.append(f"experts of blocks by groups of {size(s.group_nbytes)}")
        else:
            words.append(f"{s.slots} block buffer{'s' if s.slots > 1 else ''}")
        if plan.resident_blocks:
            words.append(f"{plan.resident_blocks} more blocks resident")
        n_kept = sum(map(len, s.kept))
        if n_kept:
            words.append(f"outputs of {n_kept} frozen layers kept" + _temporarily_resident(plan))
        words.append("head in memory" if s.keep_head else "head read ahead" if s.head_ahead else "head streamed")
    if s.spilled > 1:
        words.append(f"inputs of {s.spilled - max(job.lowest_trained, 1)} blocks on disk")
    chunks = [
        f"{value} {name}"
        for value, name in (
            (s.rows, "row" if s.rows == 1 else "rows"),
            (s.mlp_tokens, "tokens of feed-forward layers"),
            (s.attention_queries, "queries"),
        )
        if value
    ]
    if chunks:
        words.append(" and ".join(chunks) + " at a time")
    if s.head_tokens:
        words.append(f"logits of {s.head_tokens} tokens at a time")
    return ", ".join(words)


def _temporarily_resident(plan: Plan) -> str:
    """Which blocks use the memory of kept outputs until these are computed; empty if none do."""
    nbytes = max(plan.schedule.temporary_nbytes, default=0)
    n = nbytes // max(visit.stored_nbytes for visit in plan.job.visits)
    return f", until then up to {n} blocks in their room" if n else ""


def three_lines(plan: Plan, note: str = "", caching: Caching | None = None) -> list[str]:
    ceiling = "without a ceiling" if plan.memory is None else f"within {size(plan.memory)}{note}"
    reads = f"{size(plan.read_nbytes)} read" + (f", {size(plan.written_nbytes)} written" if plan.written_nbytes else "")
    later = ""
    if caching is not None and caching.directory is not None:
        later = f"; activations of the lower blocks go to {caching.directory}"
        if caching.later is not None:
            later += f" ({size(caching.nbytes)}): from the second epoch {later_step(caching.later)}"
    step = f"predicted step {duration(plan.step_s)}, bound by {plan.bound}"
    if plan.is_for_assumed_machine:
        step = "seconds are not predicted, as no step was measured on this machine yet"
    return [
        f"Plan {ceiling}: {choices(plan)}",
        f"  predicted peak {size(plan.peak_nbytes)}; least that works {size(enough(plan.least_nbytes))}",
        f"  {step}: {reads} a step{later}",
    ]


def later_step(later: Plan) -> str:
    seconds = "" if later.is_for_assumed_machine else f"{duration(later.step_s)} and "
    return f"{seconds}{size(later.read_nbytes)} read a step"


def several_lines(several: Sequence[Shared]) -> list[str]:
    """Lines that say how long the same step would take on more machines; none if no number of them can share it."""
    possible = [shared for shared in several if shared.rows]
    lines = []
    if possible:
        steps = ", ".join(f"{duration(shared.step_s)} by {shared.machines}" for shared in possible)
        link = f"{duration(possible[-1].sum_s)} of it to sum gradients, at an assumed {LINK_NBYTES_S * 8e-9:g} Gbit/s"
        lines.append(f"  the same step, shared by machines like this one: {steps} ({link})")
        lines += [f"  {shared.reason}" for shared in several if shared.reason]
    return lines


def describe_machine(machine: Machine) -> str:
    rates = machine.rates
    read = f"reads {size(rates.read)}/s" if rates.read else "read speed unknown"
    words = f"{machine.device}, {machine.cores} cores, {size(machine.memory_nbytes)} of memory; {read}"
    if not machine.is_assumed:
        flops = sorted({round(rate / 1e9) for rate in (rates.forward, rates.backward)})
        words += f", computes blocks at {' to '.join(f'{rate:,}' for rate in flops)} GFLOP/s"
    return words


def describe_job(plan: Plan) -> list[str]:
    job = plan.job
    blocks = {visit.block: visit for visit in job.visits}
    stored, computed = ({getattr(v, k) for v in blocks.values()} for k in ("stored_nbytes", "compute_nbytes"))
    each = size(max(stored)) + ("" if len(stored) == 1 else " at most")
    to_compute = f", {size(max(computed))} to compute with" if max(computed) != max(stored) else ""
    return [
        f"{len(blocks)} blocks of {each}{to_compute}; head {size(job.head_stored_nbytes)} "
        f"({size(job.head_compute_nbytes)} to compute with)",
        f"{job.micro_batches} x {job.rows} x {job.tokens} tokens a step; adapter {size(job.trainable_nbytes)}, "
        f"gradients the same, optimizer {size(job.optimizer_nbytes)}; activations {size(job.hidden_nbytes)} a block "
        "and micro-batch",
    ]


def as_dict(plan: Plan, caching: Caching | None = None) -> dict[str, Any]:
    """The plan for programs, in bytes and seconds."""
    job = plan.job
    blocks = {visit.block: visit for visit in job.visits}.values()
    cache = {} if caching is None else {"activation_cache": _caching(caching)}
    return cache | {
        "memory": plan.memory,
        "least_memory": enough(plan.least_nbytes),
        "schedule": asdict(plan.schedule),
        "resident_blocks": plan.resident_blocks,
        "predicted": {
            "peak_nbytes": plan.peak_nbytes,
            "parts": plan.parts,
            "read_nbytes": plan.read_nbytes,
            "written_nbytes": plan.written_nbytes,
            "step_s": plan.step_s,
            "compute_s": plan.compute_s,
            "read_s": plan.read_s,
            "bound": plan.bound,
            "is_for_assumed_machine": plan.is_for_assumed_machine,
        },
        "job": {
            "micro_batches": job.micro_batches,
            "rows": job.rows,
            "tokens": job.tokens,
            "blocks": len(blocks),
            "block_nbytes": [block.stored_nbytes for block in blocks],
            "block_compute_nbytes": [block.compute_nbytes for block in blocks],
            "head_nbytes": job.head_stored_nbytes,
            "head_compute_nbytes": job.head_compute_nbytes,
            "adapter_nbytes": job.trainable_nbytes,
            "optimizer_nbytes": job.optimizer_nbytes,
            "activation_nbytes": job.hidden_nbytes,
        },
    }


def _caching(caching: Caching) -> dict[str, Any]:
    later = caching.later
    return {
        "directory": None if caching.directory is None else str(caching.directory),
        "reason": caching.reason,
        "nbytes": caching.nbytes,
        "later": None if later is None else {"read_nbytes": later.read_nbytes, "step_s": later.step_s},
    }
