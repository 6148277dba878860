"""The memory ceiling of an opened model: makes a plan for each shape of steps, and has the engine follow it.

Before a step, `Budget.cover` makes a plan if the step's shape is larger than those before. If there is none, it raises
an error that names the least memory that would do, before anything is read. The first plan keeps next to nothing, and
its step is measured. After each step, `Budget.after_step` learns what was measured. If that is news, or the step took
more than was planned, the plan is made again. Evaluations and generated tokens have plans of their own.
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
# The plan is made again after each of these steps. The first finds no freed buffers in memory, so its seconds say less
# than the second's.
STEPS_TO_LEARN_FROM = 2
# Without a ceiling, the hidden states of an evaluation's pass may take this share of half the machine's memory. Each
# micro-batch has three arrays of them: a block's input, its output, and the first block's input.
UNBOUNDED_SHARE, HIDDEN_ARRAYS = 0.25, 3
NO_SHAPE, NO_PASSES = (0, 0, 0), ((), 0)  # if the plan that is followed holds for no step, or for no evaluation


@dataclass(frozen=True)
class Wave:
    """Rows that are to be generated.

    Attributes:
        tokens, total: tokens of the longest prompt (or draft), and with its answer.
        row_nbytes, layer_nbytes: bytes of a finished row's keys and values, in all layers and in the largest.
        other_nbytes: gives the bytes of all else that is in memory for a number of rows.
        passengers: number of micro-batches that a row makes in a pass.
    """

    rows: int
    tokens: int
    total: int
    row_nbytes: int
    layer_nbytes: int
    other_nbytes: Callable[[int], int] = lambda rows: 0
    passengers: int = 1

    def nbytes(self, rows: int) -> int:
        """Bytes of so many rows. When they grow, or rows come and go, there are three of the largest layer."""
        return rows * (self.row_nbytes + 2 * self.layer_nbytes) + self.other_nbytes(rows)


class Budget:
    """Keeps an engine's steps within `memory` bytes. With None, plans are made only on request, and none is followed.

    Attributes:
        plan: the plan that is followed; None before the first, and without a ceiling.
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
        self._same_groups = False
        self._machine: Machine | None = None
        self._is_to_remember = False
        self._shape = NO_SHAPE  # (rows, tokens, micro-batches) of the largest step that the plan holds for
        self._process_nbytes: int | None = None  # what the process takes before the first step
        self._arrays_nbytes = 0  # how many of these are in MLX's arrays
        self._planned_nbytes = 0
        self._steps_measured = 0  # of the shape that is planned for
        self._has_warned = False
        self._passes: tuple[tuple, int] = NO_PASSES  # the evaluation that the plan holds for, and its groups in a pass
        self._jobs: dict[tuple, Job] = {}
        self._experience = Experience()

    def expect_optimizer(self, copies: int) -> None:
        """From now on plan for an optimizer that keeps `copies` times the trainable parameters."""
        if copies != self.optimizer_copies:
            self.optimizer_copies, self._shape = copies, NO_SHAPE

    def expect_teacher(self, top_k: int) -> None:
        """From now on plan for steps whose loss compares with a teacher's `top_k` most probable tokens too."""
        if top_k != self._top_k:
            self._top_k, self._shape = top_k, NO_SHAPE

    def measure_anew(self, planned_nbytes: int = 0) -> None:
        """Forget what the process takes, as something came into memory, such as an adapter, that no plan knows of.

        Args:
            planned_nbytes: bytes that are not in memory yet, but would be in training.
        """
        self._process_nbytes, self._shape, self._passes = None, NO_SHAPE, NO_PASSES
        self._experience, self._planned_nbytes = Experience(), planned_nbytes
        self._engine.adapter_changed()

    def cut_like(self, schedule: Schedule, groups_too: bool = False) -> None:
        """From now on cut the work as this schedule does, whatever the ceiling. Other cuts give other last bits.

        Args:
            groups_too: experts come as in this schedule too: in groups of that size, or with their blocks.
        """
        self._cut_like, self._same_groups, self._shape = schedule, groups_too, NO_SHAPE

    @property
    def is_measuring(self) -> bool:
        """Whether the next step's passes are to be measured."""
        return self.memory is not None and self._steps_measured < STEPS_TO_LEARN_FROM

    def limit(self, nbytes: int) -> None:
        """From now on this is the ceiling."""
        if nbytes != self.memory:
            self.memory, self._shape = nbytes, NO_SHAPE

    def check(self) -> None:
        """Raises ConfigError if the ceiling is too low for steps of one token. Reads nothing, measures nothing."""
        if self.memory is not None:
            planner = self.planner(1, 1, 1)
            _or_refuse(planner.chunked(self.memory), planner, self.memory)

    def cover(self, rows: int, tokens: int, micro_batches: int) -> Plan | None:
        """If there is a ceiling, follow a plan under which steps of this shape stay within it.

        Raises:
            ConfigError: there is no such plan; names the least memory that would do.
        """
        if self.memory is None or all(a <= b for a, b in zip((rows, tokens, micro_batches), self._shape)):
            return self.plan
        shape = tuple(max(a, b) for a, b in zip((rows, tokens, micro_batches), self._shape))
        planner = self.planner(*shape)
        plan = _or_refuse(planner.first(self._usable(self.memory)), planner, self.memory)
        if self._experience.knows(plan.job):
            plan = planner.choose(self._usable(self.memory))
        self._follow(plan)
        self._shape, self._steps_measured = shape, 0
        self._engine.peaks_known.clear()
        return plan

    def cover_passes(
        self,
        rows: int,
        tokens: int,
        groups: int,
        adapters: Collection[bool | str],
        per_group: int = 1,
        beside_nbytes: int = 0,
        result_nbytes: int = 0,
    ) -> int:
        """How many groups of micro-batches an evaluation takes through the model at once. A plan for it is followed.

        As many as their hidden states have room for: where a model does not fit, one pass less saves more reading than
        resident blocks would. But if fewer at once leave room for blocks and are predicted to be faster, it is fewer.

        Args:
            adapters: the adapters that the micro-batches ask for.
            per_group: number of micro-batches in a group.
            beside_nbytes: bytes of MLX's arrays that are in memory besides.
            result_nbytes: bytes of a group's results, which stay until the pass is over.
        Raises:
            ConfigError: the ceiling is too low even for one group; names the least memory that would do.
        """
        if self.memory is None:
            # (hidden states of a model that is no chain count as 0)
            hidden_nbytes = per_group * HIDDEN_ARRAYS * rows * tokens * self._engine.cut.hidden_nbytes
            group_nbytes = max(hidden_nbytes, 1) + result_nbytes
            return min(groups, max(1, int(UNBOUNDED_SHARE * default_memory()) // group_nbytes))
        sizes = per_group, beside_nbytes, result_nbytes
        evaluation = rows, tokens, groups, *sizes, frozenset(adapters), self.memory, self._cut_like
        if evaluation == self._passes[0]:
            return self._passes[1]
        usable = self._usable(self.memory)

        def planner(n: int, cut_like: Schedule | None = None) -> Planner:
            how = {"training": False, "beside_nbytes": beside_nbytes, "adapters": adapters, "cut_like": cut_like}
            return self.planner(rows, tokens, n * per_group, **how, outside_nbytes=n * result_nbytes)

        _, least = _or_refuse(planner(1).chunked(usable), planner(1), self.memory)
        planner = functools.partial(planner, cut_like=least)  # so that last bits depend on no prediction
        most = _most(groups, lambda n: planner(n).chunked(usable) is not None)
        at_once, plan = most, planner(most).choose(usable)
        for n in [most >> i for i in range(1, most.bit_length() if most < groups else 1)]:
            other = planner(n).choose(usable)
            if other.step_s / n < FASTER * plan.step_s / at_once:
                at_once, plan = n, other
        self._follow(plan)
        self._shape, self._passes = NO_SHAPE, (evaluation, at_once)
        return at_once

    def make(self, memory: int | None, rows: int, tokens: int, micro_batches: int) -> Plan:
        """The plan for steps of this shape within `memory` bytes, by what is known so far. It is not followed.

        Raises:
            ConfigError: there is no such plan; names the least memory that would do.
        """
        planner = self.planner(rows, tokens, micro_batches)
        return _or_refuse(planner.choose(None if memory is None else self._usable(memory)), planner, memory)

    def follow_decoding(self, plan: Plan | None) -> None:
        """From now on follow a plan that `size_decoding` made."""
        if plan is not None:
            self._follow(plan)
            self._shape = NO_SHAPE  # training is planned anew

    def size_decoding(self, wave: Wave) -> tuple[int, int, Plan | None]:
        """How many rows can be generated together, and by which plan. The plan is not followed yet.

        More rows make more tokens a second, as each reading of the weights serves all of them. So memory goes to their
        keys and values first. Blocks are resident only when every row has its place.

        Returns:
            (rows at a time, how many of their prompts go through in one pass, the plan; None without a ceiling)
        Raises:
            ConfigError: there is not enough memory for one row; names the least that would do.
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
        # A prompt that waits for a later pass costs a reading. One that goes along takes memory for its hidden states.
        hidden_nbytes = wave.tokens * self._engine.cut.hidden_nbytes
        prompts = _most(rows, lambda n: n == 1 or n * 2 * hidden_nbytes <= memory // 8 and fits(rows, n))
        return rows, prompts, planner(rows, prompts).forward_only(memory)

    def needed_beside(self, nbytes: int) -> int | None:
        """The least memory for one token at a time with so many bytes more in arrays; None if there is enough."""
        if self.memory is None:
            return None
        planner = self.planner(1, 1, 1, training=False, beside_nbytes=nbytes)
        return None if planner.chunked(self._usable(self.memory)) is not None else enough(planner.least().peak_nbytes)

    def predict_decoding(self, rows: int, plan: Plan) -> Plan:
        """What a pass that makes one token for each of so many rows takes under the schedule of `plan`."""
        job = self._job(rows, 1, 1, Chunking(), training=False)
        return self.planner(rows, 1, 1, training=False).predict(job, plan.schedule)

    def after_step(self, rows: int, tokens: int, micro_batches: int) -> None:
        """Learn from what the engine measured in a step of this shape, and correct the plan by it."""
        if self.plan is None:
            return
        step, schedule = self._engine.measurements, self.plan.schedule
        is_largest = (rows, tokens, micro_batches) == self._shape
        job = self.plan.job if is_largest else self._job(rows, tokens, micro_batches, self.plan.job.chunking)
        is_news = self._experience.learn(job, schedule, step)
        over_nbytes = self._over_ceiling(step.peak_nbytes)
        if step.peak_nbytes > self.plan.peak_nbytes:  # there is more in the process than was counted
            self._process_nbytes += step.peak_nbytes - self.plan.peak_nbytes
            is_news = True
        if self._steps_measured < STEPS_TO_LEARN_FROM:
            self._steps_measured += 1
            is_news = self._is_to_remember = True
        if is_news or over_nbytes > 0:
            plan = self.planner(*self._shape).choose(self._usable(self.memory))
            if plan is not None and plan.schedule != schedule:
                self._follow(plan)
            elif plan is not None:
                self.plan = plan  # the same schedule, predicted by what is known now
        elif is_largest:  # a smaller step leaves more room than the next one will
            self._engine.weights.reuse.raise_by(self.plan.peak_nbytes - self.plan.parts["slack"] - step.peak_nbytes)

    def remember(self) -> None:
        """Keep what was measured for later runs on this machine. Only training runs do: others may be held back."""
        if self._is_to_remember:
            self._is_to_remember = False
            machine = self.machine
            remember(machine.device, machine.compute_dtype, self._matrix, self._experience.rates)

    def after_pass(self) -> None:
        """Learn from the peak of the evaluation's pass that was made last."""
        peak_nbytes = self._engine.stats.last.peak_memory
        if self.plan is None or peak_nbytes <= self.plan.peak_nbytes:
            return
        self._process_nbytes += peak_nbytes - self.plan.peak_nbytes
        self._passes = NO_PASSES
        self._over_ceiling(peak_nbytes)

    def _over_ceiling(self, peak_nbytes: int) -> int:
        """How many bytes a step took beyond the ceiling; below 0 if it stayed within it. Warns the first time."""
        over_nbytes = peak_nbytes - self.memory
        if over_nbytes > 0 and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"a step took {peak_nbytes / 1e9:.2f} GB, more than the memory of {self.memory / 1e9:.2f} GB it "
                "was given. Less is kept in memory from now on. If this goes on, make batches or sequences smaller",
                SlowftWarning,
                stacklevel=5,
            )
        return over_nbytes

    def caching(self, plan: Plan, first_steps: float, later_steps: float) -> tuple[Plan | None, bool]:
        """(the plan of steps that begin at stored activations, whether it pays to store them).

        Args:
            plan: the plan of whole steps.
            first_steps, later_steps: number of steps that store activations, and of those that begin at them.
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
        """Makes plans for steps over `micro_batches` of `[rows, tokens]`.

        Args:
            training: False for forward passes.
            beside_nbytes, outside_nbytes: bytes that are in memory besides, in MLX's arrays and outside of them.
            adapters: the adapters that micro-batches ask for. Plans are for the one whose blocks take the most memory.
            cut_like: a schedule; the work is cut as in it. In training, a call of `cut_like` comes before it.
        """
        if self._process_nbytes is None:  # nothing of a step is in memory yet
            limits().give_back()
            platform.release_freed_memory()
            self._process_nbytes = platform.memory_in_use() + WARM_UP_NBYTES + self._planned_nbytes
            self._arrays_nbytes = mx.get_active_memory()

        def job_of(chunking: Chunking) -> Job:
            jobs = [self._job(rows, tokens, micro_batches, chunking, training, adapter) for adapter in adapters]
            return max(jobs, key=lambda job: max(visit.forward_nbytes for visit in job.visits))

        process_nbytes = self._process_nbytes + beside_nbytes + outside_nbytes
        arrays_nbytes = self._arrays_nbytes + beside_nbytes
        what = machine or self.machine, process_nbytes, rows, tokens, arrays_nbytes, self._experience
        if training and self._cut_like is not None:
            return Planner(job_of, *what, self._cut_like, self._same_groups)
        return Planner(job_of, *what, cut_like)

    def measure_machine(self) -> None:
        """Measure what no run has measured on this machine yet, for plans without a step to learn from."""
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
        self._passes = NO_PASSES
        self._engine.follow(plan.schedule, self.directory)
        self.plan = plan

    def _usable(self, memory: int) -> int:
        """How much of `memory` there is on this machine. More (on macOS: more than Metal recommends) would be paged."""
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
        """The job of steps with the attached adapter, or of forward passes with one that was added by name."""
        engine = self._engine
        shape = rows, tokens, chunking, self.optimizer_copies, self._top_k if training else 0
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


def _or_refuse(made, planner: Planner, memory: int | None):
    """What the planner made for `memory` bytes. If it made nothing, the error names the least memory that would do."""
    if made is None:
        raise ConfigError(planner.too_little(memory))
    return made


def _most(limit: int, fits: Callable[[int], bool]) -> int:
    """The largest number up to `limit` that fits. 1 always does."""
    low, high = 1, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def default_memory() -> int:
    """The ceiling where none is given: half of the machine's memory, or of what a cgroup allows."""
    return platform.memory_limit() // 2
