"""What a step takes where several machines like this one share its rows: the plan of a share, and the sum of gradients.

Comes in: a function that gives the `Planner` of steps with so many rows. Goes out: plain numbers for each number of
machines.
"""

from collections.abc import Callable
from dataclasses import dataclass

from .plan import Planner

MACHINES = (2, 4, 8)
LINK_NBYTES_S = 1.25e9  # assumed, 10 Gbit/s: such an Ethernet, and less than Thunderbolt's network gives


@dataclass(frozen=True)
class Shared:
    """A step of `machines`, each with `rows` of every micro-batch.

    Attributes:
        rows: None: it cannot be, for this `reason`.
        step_s: seconds, with those of the sum, `sum_s`.
        read_nbytes, peak_nbytes: of each machine.
    """

    machines: int
    rows: int | None = None
    step_s: float | None = None
    sum_s: float | None = None
    read_nbytes: int | None = None
    peak_nbytes: int | None = None
    reason: str | None = None


def shared(n: int, batch_size: int, memory: int, planner_of: Callable[[int], Planner], copies: int) -> Shared:
    """What to expect of `n` machines within `memory` bytes each.

    Args:
        copies: of the adapter's gradients that a sum takes.
    """
    rows, left = divmod(batch_size, n)
    if left or not rows:
        return Shared(n, reason=f"a batch of {batch_size} cannot be shared by {n} machines")
    planner = planner_of(rows)
    trainable_nbytes = planner.least().job.trainable_nbytes
    plan = planner.choose(memory - copies * trainable_nbytes)
    if plan is None:
        return Shared(n, reason=f"the memory is too little for each of {n} machines")
    sum_s = 2 * (n - 1) / n * trainable_nbytes / LINK_NBYTES_S  # each sends all but its own part, twice
    peak_nbytes = plan.peak_nbytes + copies * trainable_nbytes
    return Shared(n, rows, plan.step_s + sum_s, sum_s, plan.read_nbytes, peak_nbytes)
