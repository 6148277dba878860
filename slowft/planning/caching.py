"""What is saved if activations are stored between epochs, so that later steps begin at the lowest trained block.

Takes a `Plan` of whole steps and makes the `Plan` of steps that begin at stored activations. Only calculates.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from .plan import Plan, Planner

LEAST_SAVED_SHARE = 0.05  # the least share of later steps' time that is worth writing to the disk
HASH_BYTES_PER_S = 1.5e9  # SHA-256 on processors with instructions for it


@dataclass(frozen=True)
class Caching:
    """Whether a run stores activations.

    Attributes:
        directory: where they are stored; None if they are not, and then `reason` says why.
        later: the plan of steps all of whose micro-batches are stored, as from the second epoch on; None if unknown.
        nbytes: bytes that the run's micro-batches will take on disk.
    """

    directory: Path | None = None
    reason: str | None = None
    later: Plan | None = None
    nbytes: int = 0


def from_boundary(planner: Planner, plan: Plan) -> Plan | None:
    """The plan of steps that begin at stored activations; None if the lowest block is trained. The schedule stays."""
    job, s, n = plan.job, plan.schedule, plan.job.lowest_trained
    if not job.is_chain or not 0 < n < len(job.visits):
        return None
    above = replace(job, visits=job.visits[n:], rows_nbytes=0)
    kept, spilled = s.kept[n:], max(s.spilled - n, 0)
    later = planner.predict(above, replace(s, kept=kept, spilled=spilled, temporary_nbytes=s.temporary_nbytes[n:]))
    stored = job.hidden_nbytes * job.micro_batches
    loading_s = _loading_s(planner, stored)
    return replace(
        later,
        memory=plan.memory,
        least_nbytes=plan.least_nbytes,
        read_nbytes=later.read_nbytes + stored,
        read_s=later.read_s + loading_s,
        step_s=later.step_s + loading_s,
    )


def pays(planner: Planner, plan: Plan, later: Plan, first_steps: float, later_steps: float) -> bool:
    """Whether it pays to store activations in `first_steps`, so that `later_steps` begin at them."""
    stored = plan.job.hidden_nbytes * plan.job.micro_batches
    saved = later_steps * (plan.step_s - later.step_s) - first_steps * _loading_s(planner, stored)
    return later_steps > 0 and saved > LEAST_SAVED_SHARE * later_steps * plan.step_s


def _loading_s(planner: Planner, nbytes: int) -> float:
    """Seconds to read and check stored activations. To hash and write them takes about as long."""
    return nbytes / planner.rates.read + nbytes / HASH_BYTES_PER_S
