"""The memory ceiling of an opened model: plans each step's shape within it, and has the engine follow.

Comes in: shapes of steps. Goes out: a `Plan` that is being followed, or an error that names the least memory
that would do, before anything is read.
"""

import functools
import warnings
from pathlib import Path

import mlx.core as mx

from .. import platform
from ..errors import ConfigError, SlowftWarning
from ..memory import limits
from ..models.seams import trainable_entries
from ..planning.caching import from_boundary, pays
from ..planning.job import Cut, Job
from ..planning.machine import Machine, measure
from ..planning.plan import Plan, Planner
from .costs import Costing

# for plans of which only the memory counts
UNKNOWN = Machine(0, 1e12, 1e10, 1e9, 1e10, 0.0, None, None, 1, "unknown", is_assumed=True)
# measuring takes memory too: with more than so many bytes beside the process its arrays are so many times smaller
ROOM_TO_MEASURE = ((256 << 20, 1), (72 << 20, 4))
WARM_UP_NBYTES = 16 << 20  # what libraries take once they are used: OpenBLAS's buffers, threads' stacks, page tables


class Budget:
    """Keeps an engine's steps within `memory` bytes; with None, plans are made only when asked for, and not followed.

    Attributes:
        plan: the one that is being followed.
        directory: where block inputs are spilled to.
        optimizer_copies: how many times the trainable parameters the optimizer is expected to keep (Adam: 2).
    """

    def __init__(self, engine, memory: int | None, directory: Path | None):
        self._engine, self.memory = engine, memory
        self.directory = directory or platform.cache_directory()
        self.optimizer_copies = 2
        self.plan: Plan | None = None
        self._shape = (0, 0, 0)
        self._base_nbytes: int | None = None
        self._held_nbytes = 0  # of it, in arrays
        self._planned_nbytes = 0
        self._has_warned = False
        self._jobs: dict[tuple, Job] = {}
        self._planner: Planner | None = None  # of the last plan

    def expect_optimizer(self, copies: int) -> None:
        """From now on plan for an optimizer that keeps `copies` times the trainable parameters."""
        if copies != self.optimizer_copies:
            self.optimizer_copies, self._shape = copies, (0, 0, 0)

    def measure_anew(self, planned_nbytes: int = 0) -> None:
        """The process took on something, such as an adapter, that plans made so far do not know of.

        Args:
            planned_nbytes: so many bytes it did not take on, but would to train.
        """
        self._base_nbytes, self._shape = None, (0, 0, 0)
        self._planned_nbytes = planned_nbytes

    def limit(self, nbytes: int) -> None:
        """From now on this is the ceiling."""
        if nbytes != self.memory:
            self.memory, self._shape = nbytes, (0, 0, 0)

    def cover(self, rows: int, tokens: int, micro_batches: int) -> Plan | None:
        """Follow a plan under which steps of this shape stay within the ceiling, if there is a ceiling.

        Raises:
            ConfigError: there is none; names the least memory that would do.
        """
        if self.memory is None or all(a <= b for a, b in zip((rows, tokens, micro_batches), self._shape)):
            return self.plan
        shape = tuple(max(a, b) for a, b in zip((rows, tokens, micro_batches), self._shape))
        plan = self.make(self.memory, *shape)
        self._engine.follow(plan.schedule, self.directory)
        self.plan, self._shape = plan, shape
        return plan

    def make(self, memory: int | None, rows: int, tokens: int, micro_batches: int) -> Plan:
        """The fastest plan for steps of this shape within `memory` bytes, not followed yet.

        Raises:
            ConfigError: there is none; names the least memory that would do.
        """
        if memory is not None:
            self._check(memory, rows, tokens, micro_batches)
        machine = self._machine_within(memory)
        planner = self.planner(rows, tokens, micro_batches, machine)
        if memory is not None and machine is not UNKNOWN:
            # more than the machine has (on macOS: than Metal recommends) would be paged
            memory = min(memory, machine.memory_nbytes)
        plan = planner.choose(memory)
        limits().give_back()  # of what was measured with
        if plan is None:
            raise ConfigError(planner.too_little(memory))
        self._planner = planner
        return plan

    def _machine_within(self, memory: int | None) -> Machine:
        """This machine, measured if there is room for that beside the process; in the smallest jobs there is none."""
        for room, shrink in ROOM_TO_MEASURE:
            if memory is None or memory > self._base_nbytes + room:
                return measured(self._engine.compute_dtype, self._engine.files, shrink)
        return UNKNOWN

    def caching(self, plan: Plan, first_steps: float, later_steps: float) -> tuple[Plan | None, bool]:
        """(the plan of steps that begin at stored activations, whether it pays to store them).

        Args:
            plan: of whole steps, the last that was made.
            first_steps: in which activations are stored; later_steps: that begin there.
        """
        later = from_boundary(self._planner, plan)
        return later, later is not None and pays(self._planner, plan, later, first_steps, later_steps)

    def after_step(self, peak_nbytes: int, rows: int, tokens: int, micro_batches: int) -> None:
        """Take note of the most that a step really took: keep more, or plan anew if that is more than the ceiling."""
        if self.plan is None or self.memory is None:
            return
        if peak_nbytes <= self.memory:
            if (rows, tokens, micro_batches) == self._shape:  # a smaller one leaves more room than the next will
                self._engine.reuse_more(self.plan.peak_nbytes - self.plan.parts["slack"] - peak_nbytes)
            return
        self._base_nbytes += peak_nbytes - self.plan.peak_nbytes
        plan = self.planner(*self._shape, self._planner.machine).choose(self.memory)
        if plan is not None:
            self._engine.follow(plan.schedule, self.directory)
            self.plan = plan
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"a step took {peak_nbytes / 1e9:.2f} GB, more than the memory of {self.memory / 1e9:.2f} GB it was "
                "given. " + ("Less is kept in memory from now on" if plan else "Make batches or sequences smaller"),
                SlowftWarning,
                stacklevel=4,
            )

    def check(self, rows: int, tokens: int, micro_batches: int) -> None:
        """Raises ConfigError if the ceiling is too low for steps of this shape. Reads nothing, measures nothing."""
        if self.memory is not None:
            self._check(self.memory, rows, tokens, micro_batches)

    def _check(self, memory: int, *shape: int) -> None:
        planner = self.planner(*shape, UNKNOWN)
        if memory < planner.least().peak_nbytes:
            raise ConfigError(planner.too_little(memory))

    def planner(self, rows: int, tokens: int, micro_batches: int, machine: Machine | None = None) -> Planner:
        """Plans for steps over `micro_batches` of `[rows, tokens]`."""
        engine = self._engine
        machine = machine or self._machine_within(None)
        if self._base_nbytes is None:  # before the first step: nothing of it is in memory yet
            limits().give_back()
            platform.release_freed_memory()
            self._base_nbytes = platform.memory_in_use() + WARM_UP_NBYTES + self._planned_nbytes
            self._held_nbytes = mx.get_active_memory()
        costing = Costing(engine)
        in_chunks = engine.head_may_be_cut

        def job_of(cut: Cut):
            what = rows, tokens, micro_batches, cut, self.optimizer_copies, in_chunks
            key = (*what, len(trainable_entries(engine.model)))
            if key not in self._jobs:
                self._jobs[key] = engine.on_thread(lambda: costing.job(*what))
            return self._jobs[key]

        return Planner(job_of, machine, self._base_nbytes, rows, tokens, self._held_nbytes)


@functools.cache  # once in a process
def measured(compute_dtype: mx.Dtype, files: tuple[str, ...], shrink: int = 1) -> Machine:
    return measure(compute_dtype, files, shrink=shrink)


def default_memory() -> int:
    """Bytes to stay within where nobody says: half of the machine's memory (or of what a cgroup allows)."""
    return platform.memory_limit() // 2
