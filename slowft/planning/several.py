"""What a step takes if several machines like this one share its rows: a plan for each share, and the sum of gradients.

Takes a function that gives the `Planner` for a number of rows, and returns plain numbers for a number of machines.
"""

from collections.abc import Callable
from dataclasses import dataclass

from .plan import Planner

MACHINES = (2, 4, 8)
LINK_NBYTES_S = 1.25e9  # assumed: an Ethernet of 10 Gbit/s; Thunderbolt's network gives more


@dataclass(frozen=True)
class Shared:
    """A step of `machines`, each with `rows` of every micro-batch.

    Attributes:
        rows: None if the step cannot be shared like that; `reason` says why.
        step_s: seconds of the step, with those of the sum of gradients.
        sum_s: seconds of the sum of gradients.
        read_nbytes, peak_nbytes: bytes that each machine reads in a step, and the most that it has in memory.
    """

    machines: int
    rows: int | None = None
    step_s: float | None = None
    sum_s: float | None = None
    read_nbytes: int | None = None
    peak_nbytes: int | None = None
    reason: str | None = None


def shared(n: int, batch_size: int, memory: int, planner_of: Callable[[int], Planner], copies: int) -> Shared:
    """What a step takes on `n` machines with `memory` bytes each.

    Args:
        planner_of: gives the `Planner` for steps with this number of rows.
        copies: how many copies of the adapter's gradients a sum takes in memory.
    """
    rows, rest = divmod(batch_size, n)
    if rest or not rows:
        return Shared(n, reason=f"a batch of {batch_size} cannot be shared by {n} machines")
    planner = planner_of(rows)
    trainable_nbytes = planner.least().job.trainable_nbytes
    plan = planner.choose(memory - copies * trainable_nbytes)
    if plan is None:
        return Shared(n, reason=f"the memory is too little for each of {n} machines")
    sum_s = 2 * (n - 1) / n * trainable_nbytes / LINK_NBYTES_S  # each sends all but its own part, twice
    peak_nbytes = plan.peak_nbytes + copies * trainable_nbytes
    return Shared(n, rows, plan.step_s + sum_s, sum_s, plan.read_nbytes, peak_nbytes)
