"""The memory ceiling of an opened model: plans each step's shape within it, and has the engine follow.

Comes in: shapes of steps, and what each step measured. Goes out: a `Plan` that is being followed, or an error that
names the least memory that would do, before anything is read.
"""

import functools
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx

from .. import platform
from ..errors import ConfigError, SlowftWarning
from ..memory import limits
from ..models.seams import trainable_entries
from ..planning.caching import from_boundary, pays
from ..planning.job import Chunking, Job
from ..planning.machine import Machine, known, measured
from ..planning.measure import Experience, remember
from ..planning.plan import FASTER, Plan, Planner, enough
from ..planning.schedule import Schedule
from ..planning.shapes import Shapes, largest_matrix
from .randomness import keeping_random_state

WARM_UP_NBYTES = 16 << 20  # what libraries take once they are used: OpenBLAS's buffers, threads' stacks, page tables
# that are planned anew: the first step finds no buffers in memory, so its seconds say less than the second's
STEPS_TO_LEARN_FROM = 2
# Of an evaluation without a ceiling: hidden states of one pass may take this share of half the machine's memory. Of
# each micro-batch there are a block's input, its output, and the first block's input.
UNBOUNDED_SHARE, HIDDEN_ARRAYS = 0.25, 3


@dataclass(frozen=True)
class Wave:
    """Rows that are to be generated.

    Attributes:
        rows: that there are; tokens: of the longest prompt (or draft); total: with its answer.
        row_nbytes: of a row's keys and values when it is finished; layer_nbytes: of its largest layer's.
        other_nbytes: of what is in memory beside them for so many rows.
        passengers: micro-batches that a row is in a pass.
    """

    rows: int
    tokens: int
    total: int
    row_nbytes: int
    layer_nbytes: int
    other_nbytes: Callable[[int], int] = lambda rows: 0
    passengers: int = 1

    def nbytes(self, rows: int) -> int:
        """Of so many rows; of one layer there are three, when it grows or rows come and go."""
        return rows * (self.row_nbytes + 2 * self.layer_nbytes) + self.other_nbytes(rows)


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
        self._top_k = 0
        self.plan: Plan | None = None
        self._cut_like: Schedule | None = None
        self._groups_alike = False
        self._machine: Machine | None = None
        self._is_to_remember = False
        self._shape = (0, 0, 0)
        self._base_nbytes: int | None = None
        self._held_nbytes = 0  # of it, in arrays
        self._planned_nbytes = 0
        self._steps_measured = 0  # of the shape that is planned for
        self._has_warned = False
        self._passes_shape: tuple[tuple, int] = ((), 0)  # of the evaluation that is planned for, and what goes at once
        self._jobs: dict[tuple, Job] = {}
        self._experience = Experience()

    def expect_optimizer(self, copies: int) -> None:
        """From now on plan for an optimizer that keeps `copies` times the trainable parameters."""
        if copies != self.optimizer_copies:
            self.optimizer_copies, self._shape = copies, (0, 0, 0)

    def expect_teacher(self, top_k: int) -> None:
        """From now on plan for steps whose loss is taken against a teacher's `top_k` most probable tokens too."""
        if top_k != self._top_k:
            self._top_k, self._shape = top_k, (0, 0, 0)

    def measure_anew(self, planned_nbytes: int = 0) -> None:
        """The process took on something, such as an adapter, that plans made so far do not know of.

        Args:
            planned_nbytes: so many bytes it did not take on, but would to train.
        """
        self._base_nbytes, self._shape, self._experience = None, (0, 0, 0), Experience()
        self._passes_shape = (), 0
        self._planned_nbytes = planned_nbytes
        self._engine.adapter_changed()

    def cut_like(self, schedule: Schedule, groups_too: bool = False) -> None:
        """From now on cut the work as this schedule does, whatever the ceiling: other cuts give other last bits.

        Args:
            groups_too: experts come as they do in this schedule, in groups of that size or with their blocks.
        """
        self._cut_like, self._groups_alike, self._shape = schedule, groups_too, (0, 0, 0)

    @property
    def is_measuring(self) -> bool:
        """Whether the next step's passes are to be measured."""
        return self.memory is not None and self._steps_measured < STEPS_TO_LEARN_FROM

    def limit(self, nbytes: int) -> None:
        """From now on this is the ceiling."""
        if nbytes != self.memory:
            self.memory, self._shape = nbytes, (0, 0, 0)

    def check(self, rows: int, tokens: int, micro_batches: int) -> None:
        """Raises ConfigError if the ceiling is too low for steps of this shape. Reads nothing, measures nothing."""
        if self.memory is not None:
            planner = self.planner(rows, tokens, micro_batches)
            if planner.chunked(self.memory) is None:
                raise ConfigError(planner.too_little(self.memory))

    def cover(self, rows: int, tokens: int, micro_batches: int) -> Plan | None:
        """Follow a plan under which steps of this shape stay within the ceiling, if there is a ceiling.

        Raises:
            ConfigError: there is none; names the least memory that would do.
        """
        if self.memory is None or all(a <= b for a, b in zip((rows, tokens, micro_batches), self._shape)):
            return self.plan
        shape = tuple(max(a, b) for a, b in zip((rows, tokens, micro_batches), self._shape))
        planner = self.planner(*shape)
        plan = planner.first(self._usable(self.memory))
        if plan is None:
            raise ConfigError(planner.too_little(self.memory))
        if self._experience.knows(plan.job):
            plan = planner.choose(self._usable(self.memory))
        self._follow(plan)
        self._shape, self._passes_shape, self._steps_measured = shape, ((), 0), 0
        self._engine.peaks_known.clear()
        return plan

    def cover_passes(
        self,
        rows: int,
        tokens: int,
        groups: int,
        adapters: Collection[bool | str],
        of_each: int = 1,
        beside_nbytes: int = 0,
        found_nbytes: int = 0,
    ) -> int:
        """How many groups of micro-batches an evaluation takes through the model at once; a plan for it is followed.

        As many as their hidden states have room for: where a model does not fit, each pass saved saves more reading
        than blocks that stay would. But where fewer at a time leave room for what then need not be read, as predicted,
        it is fewer.

        Args:
            adapters: that the micro-batches ask for. of_each: micro-batches in a group.
            beside_nbytes: are in memory besides.
            found_nbytes: of what is found of a group, which stays until the pass is over.
        Raises:
            ConfigError: the ceiling is too low even for one; names the least memory that would do.
        """
        if self.memory is None:
            hidden_nbytes = of_each * HIDDEN_ARRAYS * rows * tokens * self._engine.cut.hidden_nbytes  # 0: of no chain
            each = max(hidden_nbytes, 1) + found_nbytes
            return min(groups, max(1, int(UNBOUNDED_SHARE * default_memory()) // each))
        beside = beside_nbytes, found_nbytes
        shape = rows, tokens, groups, of_each, beside, frozenset(adapters), self.memory, self._cut_like
        if shape == self._passes_shape[0]:
            return self._passes_shape[1]
        usable = self._usable(self.memory)

        def planner(n: int, cut_like: Schedule | None = None) -> Planner:
            how = {"training": False, "beside_nbytes": beside_nbytes, "adapters": adapters, "cut_like": cut_like}
            return self.planner(rows, tokens, n * of_each, **how, outside_nbytes=n * found_nbytes)

        one = planner(1).chunked(usable)
        if one is None:
            raise ConfigError(planner(1).too_little(self.memory))
        planner = functools.partial(planner, cut_like=one[1])  # so that last bits depend on no prediction
        most = _most(groups, lambda n: planner(n).chunked(usable) is not None)
        at_once, plan = most, planner(most).choose(usable)
        for n in [most >> i for i in range(1, most.bit_length() if most < groups else 1)]:
            other = planner(n).choose(usable)
            if other.step_s / n < FASTER * plan.step_s / at_once:
                at_once, plan = n, other
        self._follow(plan)
        self._shape, self._passes_shape = (0, 0, 0), (shape, at_once)
        return at_once

    def make(self, memory: int | None, rows: int, tokens: int, micro_batches: int) -> Plan:
        """The plan for steps of this shape within `memory` bytes, by what is known so far; it is not followed.

        Raises:
            ConfigError: there is none; names the least memory that would do.
        """
        planner = self.planner(rows, tokens, micro_batches)
        plan = planner.choose(None if memory is None else self._usable(memory))
        if plan is None:
            raise ConfigError(planner.too_little(memory))
        return plan

    def cover_decoding(self, wave: Wave) -> tuple[int, int, Plan | None]:
        """Follow a plan under which so many rows can be generated together as there is room for.

        Returns, raises:
            as `size_decoding`.
        """
        rows, prompts, plan = self.size_decoding(wave)
        self.follow_decoding(plan)
        return rows, prompts, plan

    def follow_decoding(self, plan: Plan | None) -> None:
        """From now on follow a plan of `size_decoding`'s."""
        if plan is not None:
            self._follow(plan)
            self._shape, self._passes_shape = (0, 0, 0), ((), 0)  # training and evaluation are planned anew

    def size_decoding(self, wave: Wave) -> tuple[int, int, Plan | None]:
        """How many rows can be generated together, and by which plan. It is not followed yet.

        The more rows, the more tokens a second: each reading is paid by all of them. So memory goes to their keys and
        values first, and to blocks that stay only when every row has its place.

        Returns:
            (rows at a time, of them those whose prompts go through in one pass, the plan; None without a ceiling)
        Raises:
            ConfigError: there is not enough for one; names the least memory that would do.
        """
        if self.memory is None:
            return wave.rows, wave.rows, None
        memory = self._usable(self.memory)

        def planner(rows: int, prompts: int) -> Planner:
            micro_batches = prompts * wave.passengers
            return self.planner(1, wave.tokens, micro_batches, training=False, beside_nbytes=wave.nbytes(rows))

        def fits(rows: int, prompts: int = 1) -> bool:
            return planner(rows, prompts).chunked(memory) is not None

        if not fits(1):
            needed = enough(planner(1, 1).least().peak_nbytes)
            raise ConfigError(
                f"memory of {self.memory / 1e9:.2f} GB is too little for a text of {wave.tokens} tokens that is "
                f"answered with up to {wave.total - wave.tokens}: give at least {needed / 1e9:.2f}GB, or make "
                "--max-tokens or the prompt smaller"
            )
        rows = _most(wave.rows, fits)
        # Prompts that wait for a later pass cost it a reading; what all of them would take, it costs as memory.
        prompts = _most(rows, lambda n: n == 1 or n * 2 * self._hidden(wave.tokens) <= memory // 8 and fits(rows, n))
        plan = planner(rows, prompts).forward_only(memory)
        return rows, prompts, plan

    def needed_beside(self, nbytes: int) -> int | None:
        """The least memory for one token at a time if so many bytes more were in it; None: there is enough."""
        if self.memory is None:
            return None
        planner = self.planner(1, 1, 1, training=False, beside_nbytes=nbytes)
        return None if planner.chunked(self._usable(self.memory)) is not None else enough(planner.least().peak_nbytes)

    def predict_decoding(self, rows: int, plan: Plan) -> Plan:
        """What a pass that gives each of so many rows a token takes, under the plan that is followed."""
        job = self._job(rows, 1, 1, Chunking(), training=False)
        return self.planner(rows, 1, 1, training=False).predict(job, plan.schedule)

    def _hidden(self, tokens: int) -> int:
        return tokens * self._engine.cut.hidden_nbytes

    def after_step(self, rows: int, tokens: int, micro_batches: int) -> None:
        """Learn from what the engine measured in a step of this shape, and keep what that leaves room for."""
        if self.plan is None or self.memory is None:
            return
        step, schedule = self._engine.measurements, self.plan.schedule
        is_largest = (rows, tokens, micro_batches) == self._shape
        job = self.plan.job if is_largest else self._job(rows, tokens, micro_batches, self.plan.job.chunking)
        is_news = self._experience.learn(job, schedule, step)
        over = self._over(step.peak_nbytes)
        if step.peak_nbytes > self.plan.peak_nbytes:  # there is more in the process than anybody counted
            self._base_nbytes += step.peak_nbytes - self.plan.peak_nbytes
            is_news = True
        if self._steps_measured < STEPS_TO_LEARN_FROM:
            self._steps_measured += 1
            is_news = self._is_to_remember = True
        if is_news or over > 0:
            plan = self.planner(*self._shape).choose(self._usable(self.memory))
            if plan is not None and plan.schedule != schedule:
                self._follow(plan)
            elif plan is not None:
                self.plan = plan  # the same schedule, predicted by what is known now
        elif is_largest:  # a smaller one leaves more room than the next will
            self._engine.reuse_more(self.plan.peak_nbytes - self.plan.parts["slack"] - step.peak_nbytes)

    def remember(self) -> None:
        """Keep what was measured for plans of later runs on this machine. For real runs: others may be held back."""
        if self._is_to_remember:
            self._is_to_remember = False
            machine = self.machine
            remember(machine.device, machine.compute_dtype, self._matrix, self._experience.rates)

    def after_pass(self) -> None:
        """Learn from the peak of an evaluation's pass that was just made."""
        peak_nbytes = self._engine.stats.last.peak_memory
        if self.plan is None or self.memory is None or peak_nbytes <= self.plan.peak_nbytes:
            return
        self._base_nbytes += peak_nbytes - self.plan.peak_nbytes
        self._passes_shape = (), 0
        self._over(peak_nbytes)

    def _over(self, peak_nbytes: int) -> int:
        """By how much a step was over the ceiling, in bytes; below 0: under it. Warns of it once."""
        over = peak_nbytes - self.memory
        if over > 0 and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"a step took {peak_nbytes / 1e9:.2f} GB, more than the memory of {self.memory / 1e9:.2f} GB it "
                "was given. Less is kept in memory from now on. If this goes on, make batches or sequences smaller",
                SlowftWarning,
                stacklevel=5,
            )
        return over

    def caching(self, plan: Plan, first_steps: float, later_steps: float) -> tuple[Plan | None, bool]:
        """(the plan of steps that begin at stored activations, whether it pays to store them).

        Args:
            plan: of whole steps.
            first_steps: in which activations are stored; later_steps: that begin there.
        """
        planner = self.planner(plan.job.rows, plan.job.tokens, plan.job.micro_batches)
        later = from_boundary(planner, plan)
        return later, later is not None and pays(planner, plan, later, first_steps, later_steps)

    def planner(
        self,
        rows: int,
        tokens: int,
        micro_batches: int,
        machine: Machine | None = None,
        training: bool = True,
        beside_nbytes: int = 0,
        adapters: Collection[bool | str] = (True,),
        cut_like: Schedule | None = None,
        outside_nbytes: int = 0,
    ) -> Planner:
        """Plans for steps over `micro_batches` of `[rows, tokens]`.

        Args:
            training: False for forward passes.
            beside_nbytes: are in memory besides, in MLX's arrays; outside_nbytes: in others.
            adapters: that they ask for; the one that makes blocks compute the most is planned for.
            cut_like: a schedule by which the work is to be cut, unless `cut_like` was called.
        """
        if self._base_nbytes is None:  # before the first step: nothing of it is in memory yet
            limits().give_back()
            platform.release_freed_memory()
            self._base_nbytes = platform.memory_in_use() + WARM_UP_NBYTES + self._planned_nbytes
            self._held_nbytes = mx.get_active_memory()

        def job_of(chunking: Chunking) -> Job:
            jobs = [self._job(rows, tokens, micro_batches, chunking, training, adapter) for adapter in adapters]
            return max(jobs, key=lambda job: max(visit.forward_nbytes for visit in job.visits))

        base = self._base_nbytes + beside_nbytes + outside_nbytes
        what = machine or self.machine, base, rows, tokens, self._held_nbytes + beside_nbytes, self._experience
        if training and self._cut_like is not None:
            return Planner(job_of, *what, self._cut_like, self._groups_alike)
        return Planner(job_of, *what, cut_like)

    def measure_machine(self) -> None:
        """Measure what no run has measured on this machine yet: for plans of which there is no step to learn from."""
        self._machine = measured(self._engine.compute_dtype, self._engine.files, self._matrix)
        limits().give_back()  # what was measured with

    @property
    def machine(self) -> Machine:
        """This machine, as far as it is known without measuring."""
        if self._machine is None:
            self._machine = known(self._engine.compute_dtype, self._matrix)
        return self._machine

    @functools.cached_property
    def _matrix(self) -> tuple[int, int]:
        return largest_matrix(self._engine.cut)

    def _follow(self, plan: Plan) -> None:
        self._passes_shape = (), 0
        self._engine.follow(plan.schedule, self.directory)
        self.plan = plan

    def _usable(self, memory: int) -> int:
        """Of the memory that was given, what there is: more (on macOS: than Metal recommends) would be paged."""
        return min(memory, self.machine.memory_nbytes)

    def _job(
        self,
        rows: int,
        tokens: int,
        micro_batches: int,
        chunking: Chunking,
        training: bool = True,
        adapter: bool | str = True,
    ) -> Job:
        """Steps with the adapter that is attached, or forward passes with one that was added by name."""
        engine = self._engine
        shape = rows, tokens, 1, chunking, self.optimizer_copies, self._top_k if training else 0
        is_added = isinstance(adapter, str)
        key = (*shape, training, engine.head_may_be_cut, len(trainable_entries(engine.model)), is_added and adapter)
        if key not in self._jobs:
            with keeping_random_state(), engine.chain.adapters.using(adapter if is_added else True):
                if is_added:
                    engine.adapter_changed()
                try:
                    self._jobs[key] = Shapes(engine, training).job(*shape)
                finally:
                    if is_added:
                        engine.adapter_changed()
        job = self._jobs[key]
        return replace(job, micro_batches=job.micro_batches * micro_batches)


def _most(limit: int, fits: Callable[[int], bool]) -> int:
    """The largest number up to `limit` that fits. One does."""
    low, high = 1, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def default_memory() -> int:
    """Bytes to stay within where nobody says: half of the machine's memory (or of what a cgroup allows)."""
    return platform.memory_limit() // 2
