"""From what a job needs and what the machine can do to what is kept in memory: the schedule that is fastest within it.

Comes in: `Job`s (one for each way to cut the work), a `Machine`, a ceiling in bytes. Goes out: a `Plan`: a
`Schedule` with its predicted memory, reads, writes and seconds; or the least memory that would do. Only
calculates: nothing is measured, read or computed here.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..errors import PlanError
from ..models.weights import pieces_nbytes
from .graph import Cost
from .job import Cut, Job, LayerCost, Visit
from .machine import Machine
from .schedule import Schedule
from .timeline import Read, Work, reads_of, step_seconds

PIECES = (2048, 1024, 512, 256)  # tokens and queries at a time, to choose from
HEAD_TOKENS = (64, 128, 256)  # whose logits exist at once, to choose from: more than that is hardly faster
SLACK_NBYTES = 8 << 20  # what the process takes besides: Python's heap, stacks, small arrays
SLACK_SHARE = 0.03
PROCESSES_DIFFER_NBYTES = 3_000_000  # in what they take before the first step (1.7 MB in 24 runs of one job)
# of what computing takes: a buffer that MLX hands out again ahead of time is in memory already, a new one is not yet
AHEAD_SHARE = 1.3
LONG_TAIL = 2  # visits, from which on what the head and its tail make is mostly what blocks make
# of freed buffers that find no use of just their size when all blocks are one graph, what is planned for: in eight such
# graphs they were 1.00 to 1.09 times what is reckoned; 1.33 in one with a head in chunks
MISFIT_SHARES = (1.1, 0.5, 0)
PIECES_MARGIN = 1.12  # what computing in pieces takes more than its graph shows (8,192 tokens: 23 of 250 MB)
GROUPS = (256 << 20, 128 << 20, 64 << 20, 32 << 20, 16 << 20)  # bytes of a layer at once, to choose from
WAITING = 1.02  # times the seconds of computing: a step that takes more waits for reads
BLOCKS_SHARES = (0.25, 0.5, 0.75)  # of room, to choose from where blocks are kept and products too
STAGES_SHARE = 0.25  # of layers' outputs, which a pass by groups holds beyond what its graph shows
# of a forward pass, done once more as a block's vjp is taken in stages: 10.2 s a step by groups of experts for 12.8
RECOMPUTED_SHARE = 0.6
GROUP_S = 3e-3  # seconds that a group of a layer takes besides what is computed with it
# of the bytes of buffers made, what finds no page in use however large MLX's cache: 0.2 to 0.65 in blocks, by their
# seconds beyond what computing takes in memory that is in use (with 0.5, six of eight streamed jobs took longer than
# predicted); 0.8 to 1.25 where MLX keeps nothing
LEAST_FRESH = 0.65


@dataclass(frozen=True)
class Plan:
    """What a step will do, and what is predicted of it.

    Attributes:
        memory: the ceiling, in bytes; None if there was none.
        peak_nbytes: the most the process takes, as the operating system counts it.
        read_nbytes, written_nbytes: per optimizer step, from and to the disk.
        compute_s, read_s: seconds per optimizer step of either alone; step_s: of a step.
        parts: what the peak is made of, name -> bytes.
        least_nbytes: the peak of the plan that takes the least memory of all; `enough` of it is what to give.
        is_for_assumed_machine: seconds are not this machine's, which was not measured; only bytes are predicted.
    """

    schedule: Schedule
    job: Job
    memory: int | None
    peak_nbytes: int
    read_nbytes: int
    written_nbytes: int
    compute_s: float
    read_s: float
    step_s: float
    parts: dict[str, int]
    least_nbytes: int = 0
    is_for_assumed_machine: bool = False

    @property
    def bound(self) -> str:
        """What a step's time goes into mostly: "reading" or "computing"."""
        return "reading" if self.read_s > self.compute_s else "computing"

    @property
    def resident_blocks(self) -> int:
        """Blocks that are kept between visits, the tail's left out."""
        return _whole_blocks(self.job, self.schedule)


@dataclass(frozen=True)
class _Phases:
    """What takes memory in each phase of a step: the head, visits forward, visits backward, the optimizer.

    Attributes:
        fixed: name -> bytes that are there all the time; parts: name -> bytes in each of the phases.
    """

    fixed: dict[str, int]
    parts: dict[str, np.ndarray]

    @functools.cached_property
    def totals(self) -> np.ndarray:
        """Bytes in each of the phases, what is fixed left out."""
        return sum(self.parts.values())

    @functools.cached_property
    def worst(self) -> tuple[int, dict[str, int]]:
        """(the most bytes, what they are made of)."""
        at = int(self.totals.argmax())
        parts = self.fixed | {name: int(nbytes[at]) for name, nbytes in self.parts.items()}
        return sum(parts.values()), parts


class _Visits:
    """Figures of a job's visits, each an array `[visits]`; a backward pass that does not come is 0."""

    def __init__(self, visits: Sequence[Visit]):
        def each(figure: Callable[[Visit], float]) -> np.ndarray:
            return np.array([figure(visit) for visit in visits])

        self.blocks = each(lambda v: v.block)
        self.come_back = each(lambda v: v.backward is not None)
        self.forward = each(lambda v: v.forward.peak_nbytes)
        self.backward = each(lambda v: v.backward.peak_nbytes if v.backward else 0)
        self.forward_allocated = each(lambda v: v.forward.allocated_nbytes)
        self.backward_allocated = each(lambda v: v.backward.allocated_nbytes if v.backward else 0)
        self.compute = each(lambda v: v.compute_nbytes)
        self.are_copied = each(lambda v: v.is_copied)
        self.cast = max(self.compute[self.are_copied].tolist(), default=math.inf)  # a block's, at most
        self.trainable = each(lambda v: v.trainable_nbytes)


class Planner:
    """Chooses schedules for one job on one machine.

    Args:
        job_of: the job under a way to cut its work; called only for those that are tried.
        base_nbytes: what the process takes before the first step: libraries, adapter, small layers, data.
        rows, tokens: of a micro-batch as it is given.
        held_nbytes: of `base_nbytes`, what is in arrays, which count where MLX is held to a limit.
    """

    def __init__(
        self,
        job_of: Callable[[Cut], Job],
        machine: Machine,
        base_nbytes: int,
        rows: int,
        tokens: int,
        held_nbytes: int = 0,
    ):
        self.machine = machine
        self._job_of, self._base, self._held = job_of, base_nbytes, held_nbytes
        self._seconds_of: dict[int, float] = {}  # by id of the cost
        self._candidates_of: dict[int, list] = {}  # by id of the visits, which `_visits_of` keeps
        self._visits_of: dict[int, tuple[tuple[Visit, ...], _Visits]] = {}
        self._kept_of: dict[tuple[int, tuple[str, ...]], tuple[int, tuple[Cost, ...]]] = {}  # by id of the visit
        self._rows, self._tokens = rows, tokens
        # of this planner alone: a cache of the class would keep it, and its model's adapter, for good
        self.least, self.choose = functools.cache(self.least), functools.cache(self.choose)

    def least(self) -> Plan:
        """The plan that takes the least memory of all."""
        cuts = self._cuts()
        cuts = list(dict.fromkeys([cuts[0], [cut for cut in cuts if cut.mlp_tokens is None][-1], cuts[-1]]))
        least = [
            (self._peak(job, schedule), job, schedule)
            for job in self._jobs(cuts)
            for schedule in (self._least_of(job), self._least_by_groups(job))
            if schedule
        ]
        peak, job, schedule = min(least, key=lambda found: found[0])
        return replace(self.predict(job, schedule), least_nbytes=peak)

    def most(self) -> Plan:
        """The fastest plan of all, however much it takes."""
        return self._best(self._job_of(Cut()), None)

    def too_little(self, memory: int) -> str:
        """What to say where `choose` finds no plan."""
        job, least = self._job_of(Cut()), self.least()
        needed = enough(least.peak_nbytes)
        return (
            f"memory of {memory / 1e9:.2f} GB is too little for steps of {job.micro_batches} x {self._rows} x "
            f"{self._tokens} tokens on this model: give at least {needed / 1e9:.2f}GB, or make "
            "--batch-size or --max-seq-length smaller" + self._how_it_would_fit(least, memory)
        )

    def _how_it_would_fit(self, least: Plan, memory: int) -> str:
        """Says so if it is a dense block that does not fit, and would in 4 bits."""
        largest = max(least.job.visits, key=lambda visit: visit.stored_nbytes)
        saved = least.schedule.slots * largest.quantizing_saves_nbytes
        if largest.layers or enough(least.peak_nbytes - saved) > memory:
            return ""
        return ". A block of this model in 4 bits would fit: slowft prepare MODEL --output DIR --quantize"

    def choose(self, memory: int | None) -> Plan | None:
        """The fastest plan within `memory` bytes; None if there is none.

        The work is cut only as far as it must be, because smaller pieces change the order of sums. Experts are brought
        by groups, and read up to three times, only where whole blocks do not fit with the work uncut; or where no whole
        one is read while another computes, and that is slower than what is done with less memory.
        """
        if memory is None:
            return self.most()
        plans, least = [], 0  # the memory from which on the work can be done so
        if (whole := self._first_that_fits(self._cuts(), self._least_of, memory)) is not None:
            least = self._peak(*whole)
            plans.append(self._best(whole[0], memory))
        if whole is None or whole[0].cut != Cut():
            cuts = [cut for cut in self._cuts() if cut.mlp_tokens is None]
            if (by_groups := self._first_that_fits(cuts, self._least_by_groups, memory)) is not None:
                least = max(least, self._peak(*by_groups))
                plans.append(self._best(by_groups[0], memory, by_groups[1]))
        best = min(plans, key=lambda plan: plan.step_s, default=None)
        if best is None or _overlaps(best.job, best.schedule) or best.schedule.tail == len(best.job.visits):
            return best
        less = self.choose(least - 1)
        return best if less is None or less.step_s >= best.step_s else replace(less, memory=memory)

    def _first_that_fits(
        self, cuts: list[Cut], least_of: Callable[[Job], Schedule | None], memory: int
    ) -> tuple[Job, Schedule] | None:
        """The job under the first of the cuts of which the least fits, and that."""
        for job in self._jobs(cuts):
            schedule = least_of(job)
            if schedule is not None and self._peak(job, schedule) <= memory:
                return job, schedule
        return None

    def _jobs(self, cuts: list[Cut]) -> Iterator[Job]:
        """The job under each of the cuts, as far as its costs can be seen; the whole one must be."""
        for cut in cuts:
            try:
                yield self._job_of(cut)
            except PlanError:
                if cut == Cut():
                    raise

    def _cuts(self) -> list[Cut]:
        """Ever smaller pieces: fewer rows, then fewer queries and tokens of feed-forward layers."""
        cuts, rows = [Cut()], self._rows
        while rows > 1:
            rows = -(-rows // 2)
            cuts.append(Cut(rows=rows))
        one_row = 1 if self._rows > 1 else None
        return cuts + [Cut(one_row, mlp_tokens=n, attention_queries=n) for n in PIECES if n < self._tokens]

    def _least_of(self, job: Job) -> Schedule:
        """What takes the least memory with whole blocks."""
        schedule = Schedule(
            slots=1,
            spilled=len(job.visits) + 1 if job.is_chain else 0,
            head_tokens=HEAD_TOKENS[0],
            cache_nbytes=0,
            **_as_schedule(job.cut),
        )
        schedules = [replace(schedule, spilled=n) for n in {0, schedule.spilled}]
        return min(schedules, key=lambda s: self._peak(job, s))  # of few blocks, spilling takes more than it saves

    def _least_by_groups(self, job: Job) -> Schedule | None:
        """The least with experts brought by groups; None where that is no less, or they are few bytes."""
        largest = max(sum(layer.compute_nbytes for layer in visit.layers) for visit in job.visits)
        if job.cut.mlp_tokens is not None or largest < 2 * GROUPS[-1]:
            return None
        least = self._least_of(job)
        schedule = replace(least, slots=_slots_by_groups(job), group_nbytes=GROUPS[-1])
        return schedule if self._peak(job, schedule) < self._peak(job, least) else None

    def _best(self, job: Job, memory: int | None, least: Schedule | None = None) -> Plan:
        """The fastest plan within `memory`.

        Args:
            least: what fits certainly, if that is not whole blocks, one at a time.
        """
        limit = float("inf") if memory is None else memory
        everything = self._everything(job, limit) if least is None else None
        plan = everything if everything is not None and everything.schedule.keep_buffers else None
        bases = self._bases if least is None else self._bases_by_groups
        while plan is None:
            candidates = [plan for base in bases(job, limit) for plan in self._filled(job, base, limit)]
            fitting = [plan for plan in [everything, *candidates] if plan is not None and plan.peak_nbytes <= limit]
            chosen = min(fitting, key=lambda plan: plan.step_s).schedule if fitting else least or self._least_of(job)
            plan = self.predict(job, chosen, limit=limit)
            if memory is not None and plan.peak_nbytes > memory:  # a long tail was underestimated
                limit -= plan.peak_nbytes - memory
                plan = None
        plan = self._with_reuse(job, plan, plan.peak_nbytes if memory is None else memory)
        return replace(plan, memory=memory, least_nbytes=self.least().peak_nbytes)

    def _with_reuse(self, job: Job, plan: Plan, memory: int) -> Plan:
        """The plan with what is left of `memory` given to freed buffers, as far as they can be of use."""
        s = plan.schedule
        phases = self._phases(job, s, True)
        head, *others = phases.parts["computing"].tolist()
        work = max(others)
        left = min(memory - plan.peak_nbytes, max(head, work)) if _is_simple(s) and s.tail < len(job.visits) else 0
        beside = self._base - self._held  # what is in no array
        slack, arrays = plan.parts["slack"], plan.peak_nbytes + left - beside
        if s.keep_buffers:  # computes no further ahead than the graph has it: that would ask for more buffers
            total = arrays - slack // 2
            active = active_in_head = total - s.cache_nbytes
        else:  # twice the slack: what freed buffers take must never be what breaks the ceiling
            total = arrays - 2 * slack
            active = memory - beside - (s.cache_nbytes or 0)
            # MLX waits once more than that is in use, so what it makes last, in the head logits, comes on top
            logits = 4 * job.vocab_size * (s.head_tokens or 0) - int(phases.totals.max() - phases.totals[0])
            active_in_head = active - max(slack, logits)
        schedule = replace(
            s,
            active_nbytes=max(active, 1 << 20),
            head_active_nbytes=max(active_in_head, 1 << 20),
            total_nbytes=total if _is_simple(s) else 0,
            workspace_nbytes=int(AHEAD_SHARE * work),
            head_workspace_nbytes=int(AHEAD_SHARE * head) + (0 if s.keep_head else job.head_compute_nbytes),
            head_reuses_blocks=s.tail >= LONG_TAIL,
            head_cache_nbytes=self._head_cache(job, s),
            reads_in_flight=self.machine.reads_in_flight,
        )
        reused = left - min(left, slack)  # of the two slacks one is in the plan already
        parts = plan.parts | {"buffer cache": plan.parts.get("buffer cache", 0) + reused}
        parts = {k: v for k, v in parts.items() if v}
        return replace(plan, schedule=schedule, peak_nbytes=plan.peak_nbytes + reused, parts=parts)

    def _everything(self, job: Job, limit: float) -> Plan | None:
        """Ordinary training, if there is room for it: for keeping all its buffers from step to step, or most."""
        tail = len(job.visits)
        weights = {visit.block: visit.compute_nbytes for visit in job.visits}
        if not _has_tail(job) or sum(weights.values()) > limit:
            return None
        for head_tokens, share in itertools.product((None, HEAD_TOKENS[-1]), MISFIT_SHARES):
            of_two = job.head(min(2, tail), head_tokens)  # a longer one has more of the same sizes
            schedule = Schedule(
                slots=1,
                tail=tail,
                keep_head=True,
                head_tokens=head_tokens,
                cache_nbytes=int(share * (of_two.reserved_nbytes - of_two.peak_nbytes)),
                keep_buffers=share == MISFIT_SHARES[0],
                **_as_schedule(job.cut),
            )
            if math.isinf(limit) or self._peak(job, schedule, False) <= limit:
                plan = self.predict(job, schedule, limit=limit)
                if plan.peak_nbytes <= limit:
                    return plan
        return None

    def _bases(self, job: Job, limit: float) -> Iterator[Schedule]:
        """Schedules that fit, before memory is filled with products and resident blocks.

        No more inputs are spilled than must be for anything to fit: spilling wears the disk.
        """
        least = self._least_spilled(job, self._least_of(job), limit)
        yield least
        if least.spilled:
            return
        head_tokens = self._head_tokens(job, least, limit)
        n, is_copied = len(job.visits), all(visit.is_copied for visit in job.visits)
        tails = sorted({round(n * i / 16) for i in range(17)} | {1, min(2, n)}) if _has_tail(job) else [0]
        workspace = _workspace(job)
        for slots in (1,) if is_copied else (1, 2):  # what is copied out of its buffer leaves it to the next block
            heads = ({}, {"keep_head": True}) + (({"head_ahead": True},) if job.is_chain else ())
            for cache, head in itertools.product((0, workspace // 2, workspace), heads):
                for tail in tails:
                    base = replace(least, slots=slots, cache_nbytes=cache, tail=tail, head_tokens=head_tokens, **head)
                    if self._peak(job, base, False) > limit:
                        break  # a longer tail only takes more
                    yield base

    def _bases_by_groups(self, job: Job, limit: float) -> Iterator[Schedule]:
        """The same with experts brought by groups: of the largest groups that fit."""
        schedule = self._least_by_groups(job)
        for group_nbytes in GROUPS:
            base = self._least_spilled(job, replace(schedule, group_nbytes=group_nbytes), limit)
            if self._peak(job, base, False) > limit:
                continue
            base = replace(base, head_tokens=self._head_tokens(job, base, limit))
            for cache, keep_head in itertools.product((0, _group(job, base)[1]), (False, True)):
                chosen = replace(base, cache_nbytes=cache, keep_head=keep_head)
                if self._peak(job, chosen, False) <= limit:
                    yield chosen

    def _head_tokens(self, job: Job, schedule: Schedule, limit: float) -> int | None:
        """As many tokens as fit whose logits exist at once; None for all."""
        chunks = [n for n in HEAD_TOKENS if n < job.rows * job.tokens] or [None]
        fitting = (n for n in chunks[::-1] if self._peak(job, replace(schedule, head_tokens=n), False) <= limit)
        return next(fitting, chunks[0])

    def _least_spilled(self, job: Job, schedule: Schedule, limit: float) -> Schedule:
        """The schedule with as few inputs spilled as fit: the first few take more than none, being written and read."""
        if self._peak(job, replace(schedule, spilled=0), False) <= limit:
            return replace(schedule, spilled=0)
        low, high = min(_first_kept(job) + 1, schedule.spilled), schedule.spilled
        while low < high:
            middle = (low + high) // 2
            if self._peak(job, replace(schedule, spilled=middle), False) <= limit:
                high = middle
            else:
                low = middle + 1
        return replace(schedule, spilled=low)

    def _filled(self, job: Job, base: Schedule, limit: float) -> Iterator[Plan]:
        """The schedule as it is, and with the room that is left given to products and then blocks, or the reverse.

        Where reads are waited for, also with part of the room given to blocks and the rest to products.
        """
        plan = self.predict(job, base, False, limit)
        yield plan
        if base.spilled or base.tail == len(job.visits):
            return
        products, blocks = self._keep_products, self._keep_blocks
        orders = [(products, blocks), (blocks, products)]
        if plan.step_s > WAITING * plan.compute_s:
            orders += [(functools.partial(blocks, share=share), products) for share in BLOCKS_SHARES]
        for order in [(products,)] if base.group_nbytes else orders:
            filled = base
            for fill in order:
                filled = fill(job, filled, (limit - self._peak(job, filled, False)) / (1 + SLACK_SHARE))
            if filled is not base:
                yield (plan := self.predict(job, filled, False, limit))
                if plan.step_s > WAITING * plan.compute_s and (lent := self._lent(job, filled)):
                    yield self.predict(job, replace(filled, lent_nbytes=lent), False, limit)

    def _keep_blocks(self, job: Job, schedule: Schedule, room: float, share: float = 1.0) -> Schedule:
        sizes = [_rest_nbytes(visit, schedule) for visit in _streamed_blocks(job, schedule)]
        nbytes = int(min(share * room, sum(sizes)))
        if len(set(sizes)) == 1:  # what holds no whole block is no use
            nbytes = nbytes // sizes[0] * sizes[0]
        return replace(schedule, resident_nbytes=nbytes) if nbytes >= min(sizes) else schedule

    def _lent(self, job: Job, schedule: Schedule) -> tuple[int, ...]:
        """Of each visit, there and back, bytes that blocks may take until products and inputs of later ones come.

        What freed buffers can use is left to them.
        """
        n, sizes = len(job.visits) - schedule.tail, _streamed_nbytes(job, schedule)
        if not n or not _is_simple(schedule):
            return ()
        phases = self._phases(job, schedule, False)
        rooms = self._rooms(job, schedule, phases, 0) - (1 - LEAST_FRESH) * phases.parts["computing"]
        head, there, back, optimizer = rooms[0], rooms[1 : 1 + n], rooms[1 + n : 1 + 2 * n], rooms[-1]
        lent = np.minimum(there, back)
        lent[-1], lent[0] = min(lent[-1], head), min(lent[0], optimizer)
        missing = sum(sizes) - schedule.slots * max(sizes, default=0) - schedule.resident_nbytes
        lent = tuple(int(nbytes) for nbytes in np.clip(lent, 0, max(missing, 0)))
        return lent if any(lent) else ()

    def _keep_products(self, job: Job, schedule: Schedule, room: float) -> Schedule:
        """Products by seconds saved per byte over all blocks, as many as there is room for."""
        kept: list[list[str]] = [[] for _ in range(len(job.visits) - schedule.tail)]
        for position, product in self._candidates(job):
            if position < len(kept):
                room -= product.nbytes * job.micro_batches
                if room < 0:
                    break
                kept[position].append(product.name)
        return replace(schedule, kept=tuple(map(tuple, kept))) if any(kept) else schedule

    def _candidates(self, job: Job) -> list:
        """(visit, product), the most seconds saved per byte first; of equals the larger, and the later block."""
        self._figures(job)
        if (found := self._candidates_of.get(id(job.visits))) is None:
            found = []
            for position, visit in enumerate(job.visits):
                for product in visit.products:
                    saved = self._seconds(visit.backward) - self._seconds(product.backward)
                    found.append((-round(1e12 * saved / product.nbytes), -product.nbytes, -position, product))
            found = [(-position, product) for _, _, position, product in sorted(found, key=lambda c: c[:3])]
            self._candidates_of[id(job.visits)] = found
        return found

    # --- Predictions --------------------------------------------------------------------------------

    def predict(self, job: Job, schedule: Schedule, exact: bool = True, limit: float = 0) -> Plan:
        """What a step under `schedule` will take.

        Args:
            exact: long tails are looked at, rather than extrapolated from short ones.
            limit: bytes that it may take. What it does not need of them goes to freed buffers.
        """
        phases = self._phases(job, schedule, exact)
        peak, parts = self._peak_of(phases)
        bandwidth = self.machine.read_bytes_per_s or float("inf")
        reads = _reads_of_blocks(job, schedule)
        works = self._works(job, schedule, exact, self._rooms(job, schedule, phases, limit))
        nbytes = sum(read.nbytes for read in reads) + sum(work.read_nbytes for work in works)
        nbytes += job.rows_nbytes * job.micro_batches
        written = sum(work.written_nbytes for work in works)
        write_s = written / (self.machine.write_bytes_per_s or bandwidth)
        seconds = sum(work.seconds for work in works), nbytes / bandwidth + write_s
        step_s = step_seconds(reads, works, bandwidth, self.machine.write_bytes_per_s or bandwidth)
        return Plan(schedule, job, None, peak, nbytes, written, *seconds, step_s, parts, 0, self.machine.is_assumed)

    def _peak(self, job: Job, schedule: Schedule, exact: bool = True) -> int:
        return self._peak_of(self._phases(job, schedule, exact))[0]

    def _peak_of(self, phases: _Phases) -> tuple[int, dict[str, int]]:
        """(the most bytes that a step takes, what they are made of)."""
        total, parts = phases.worst
        slack = self._slack(total)
        return total + slack, {k: v for k, v in {**parts, "slack": slack}.items() if v}

    def _rooms(self, job: Job, s: Schedule, phases: _Phases, limit: float) -> np.ndarray:
        """Bytes of freed buffers that MLX may keep in each phase: all that the phase does not need."""
        least = np.full_like(phases.totals, s.cache_nbytes or 0)
        least[0] = self._head_cache(job, s)
        if not _is_simple(s):
            return least
        most = phases.totals.max()
        if limit < float("inf"):
            within = (limit - SLACK_NBYTES + SLACK_SHARE * self._base) / (1 + SLACK_SHARE)
            most = max(most, int(within) - sum(phases.fixed.values()))
        ahead = (AHEAD_SHARE - 1) * phases.parts["computing"]
        return np.maximum(least, most - phases.totals + phases.parts["buffer cache"] - ahead)

    def _slack(self, total: int) -> int:
        return SLACK_NBYTES + int(SLACK_SHARE * (total - self._base))

    def _phases(self, job: Job, s: Schedule, exact: bool) -> _Phases:
        n, m, visits = len(job.visits) - s.tail, job.micro_batches, self._figures(job)
        sizes = _streamed_nbytes(job, s)
        slots = s.slots * max(sizes, default=0)
        tail = _tail_blocks(job, s)
        whole = sum(v.compute_nbytes for v in tail) + (job.head_compute_nbytes if s.keep_head else 0)
        stream = min(slots + s.resident_nbytes, max(slots, sum(sizes)))
        buffers, built = _group(job, s)
        fixed = {
            "process": self._base,
            "optimizer": job.optimizer_nbytes,
            "tail and head": whole,
            "block buffers": slots,
            "resident blocks": stream - slots,
            # masks and the first block's input in the trace of each micro-batch; the gradient on its way down
            "trace": m * (2 * job.hidden_nbytes + job.side_nbytes),
            "groups of experts": buffers,
        }
        come_back = visits.come_back[:n]

        def joined(head: int, forward, backward, optimizer: int) -> np.ndarray:
            of_visits = np.broadcast_to(forward, n), np.where(come_back, backward, 0)
            return np.concatenate(([head], *of_visits, [optimizer]))

        # of a spilled pass, those of one visit are in memory, those being written, and the one read ahead
        spill_window = (m + 3) * job.hidden_nbytes if s.spilled else 0
        # inputs of the visits up to each one, and to the head, that the backward pass comes back for
        stored = np.arange(n + 1)
        if job.is_chain:
            stored = np.maximum(stored + 1 - max(s.spilled, _first_kept(job)), 0)
        stored = stored * m * job.hidden_nbytes + spill_window

        kept, backward = np.zeros(n, int), visits.backward[:n]
        if any(s.kept):
            kept[: len(s.kept)] = [m * self._kept(v, names)[0] for v, names in zip(job.visits, s.kept)]
            of_kept = [v.backward_kept.peak_nbytes if names else 0 for v, names in zip(job.visits, s.kept)]
            backward = np.maximum(backward, of_kept + [0] * (n - len(of_kept)))
        kept = np.cumsum(kept)

        margin = 1 if job.cut.mlp_tokens is None else PIECES_MARGIN
        forward, backward = ((margin * a).astype(int) + 2 * job.hidden_nbytes for a in (visits.forward[:n], backward))
        weights = visits.compute[:n]
        if s.group_nbytes is not None:
            apart = [_apart(visit, s) for visit in job.visits[:n]]
            forward = forward + [_held_by_groups(layers, False) for layers in apart]
            backward = backward + [_held_by_groups(layers, True) for layers in apart]
            weights = weights - [sum(a.compute_nbytes for a in layers) - bool(layers) * built for layers in apart]
        weights = np.where(visits.are_copied[:n], weights, 0)

        # those of the visits above; then the optimizer's turn: gradients, and everything it makes anew
        trainable = visits.trainable[:n]
        gradients = sum(v.trainable_nbytes for v in tail) + trainable[::-1].cumsum()[::-1] - trainable
        made = job.trainable_nbytes + job.optimizer_nbytes

        head_peak, _, _ = self._head(job, s.tail, s.head_tokens, exact)
        head_weights = 0 if s.keep_head else job.head_compute_nbytes
        computing = head_peak + 2 * job.hidden_nbytes
        if not (s.keep_head or s.head_ahead):  # brought in pieces before anything is computed
            computing = max(computing, pieces_nbytes(job.head_stored_nbytes, job.head_compute_nbytes))
        cache = s.cache_nbytes or 0
        parts = {
            "buffer cache": joined(self._head_cache(job, s), cache, cache, cache),
            "activations": joined(stored[n], stored[:n] + job.hidden_nbytes, stored[:n], 0),
            "kept products": joined(kept[-1] if n else 0, kept, kept, 0),
            "weights": joined(head_weights, weights, weights, 0),
            "computing": joined(computing, forward, backward, made),
            "gradients": joined(0, 0, gradients, job.trainable_nbytes),
        }
        if lent := s.lent_nbytes:
            parts["blocks ahead of products"] = joined(lent[-1], lent, lent, lent[0])
        return _Phases(fixed, parts)

    def _head_cache(self, job: Job, s: Schedule) -> int:
        """Bytes of freed buffers kept while the head computes: what the last block's weights left; with a tail, all."""
        cache, visits = s.cache_nbytes or 0, self._figures(job)
        return cache if s.tail else min(cache, visits.cast)

    def _figures(self, job: Job) -> _Visits:
        if (found := self._visits_of.get(id(job.visits))) is None:
            found = self._visits_of[id(job.visits)] = job.visits, _Visits(job.visits)
        return found[1]

    def _kept(self, visit: Visit, names: tuple[str, ...]) -> tuple[int, tuple[Cost, ...]]:
        """(bytes of these products of a micro-batch, the backward pass with each of them at hand)."""
        key = id(visit), names
        if (found := self._kept_of.get(key)) is None:
            chosen = [p for p in visit.products if p.name in names] if names else []
            found = self._kept_of[key] = sum(p.nbytes for p in chosen), tuple(p.backward for p in chosen)
        return found

    def _reads_apart(self, job: Job, s: Schedule, position: int) -> tuple[int, int]:
        """Bytes of a visit's layers that come apart from its block, (on the way there, on the way back).

        They come anew for each micro-batch and for each pass, which are two on the way back: the recomputation and the
        cotangents.
        """
        visit, kept = job.visits[position], s.kept[position] if position < len(s.kept) else ()
        forward = backward = 0
        for layer in _apart(visit, s):
            nbytes = int(job.micro_batches * layer.read_share(job.rows * job.tokens) * layer.nbytes)
            forward += nbytes
            if visit.backward is not None:
                backward += nbytes * (1 if layer.name in kept else 2)
        return forward, backward

    def _works(self, job: Job, s: Schedule, exact: bool, rooms: np.ndarray) -> list[Work]:
        """What is done at each visit to a block below the tail, at the head and its tail, and on the way back."""
        n, m, visits, machine = len(job.visits) - s.tail, job.micro_batches, self._figures(job), self.machine
        page_s = m * machine.page_s_per_byte
        rooms_there, rooms_back = rooms[1 : 1 + n], rooms[1 + n : 1 + 2 * n]
        fresh_s = page_s * _fresh_share(rooms_there, visits.forward[:n]) * visits.forward_allocated[:n]
        fresh_back_s = page_s * _fresh_share(rooms_back, visits.backward[:n]) * visits.backward_allocated[:n]
        there, back = [], []
        for position, visit in enumerate(job.visits[:n]):
            forward_s, arrival_s = self._seconds(visit.forward), self._arrival(visit)
            apart_s = recomputed_s = 0.0
            layers = _apart(visit, s)
            if layers:
                share = sum(layer.compute_nbytes for layer in layers) / visit.compute_nbytes
                brought = sum(layer.read_share(job.rows * job.tokens) * layer.compute_nbytes for layer in layers)
                apart_s = m * arrival_s * brought / visit.compute_nbytes
                if visit.is_copied:
                    apart_s += page_s * brought
                apart_s += m * GROUP_S * sum(1 / layer.group_share(s.group_nbytes) for layer in layers)
                arrival_s *= 1 - share
                recomputed_s = m * RECOMPUTED_SHARE * forward_s
            nbytes, nbytes_back = self._reads_apart(job, s, position) if layers else (0, 0)
            written = m * job.hidden_nbytes if _first_kept(job) <= position < s.spilled else 0
            seconds = m * forward_s + arrival_s + apart_s + float(fresh_s[position])
            freed_s = arrival_s if visit.is_copied else seconds
            there.append(Work(freed_s, seconds, nbytes, written))
            if visit.backward is not None:
                backward_s = self._seconds(visit.backward)
                names = s.kept[position] if position < len(s.kept) else ()
                backward_s -= sum(backward_s - self._seconds(cost) for cost in self._kept(visit, names)[1])
                seconds = m * backward_s + arrival_s + 2 * apart_s + recomputed_s + float(fresh_back_s[position])
                freed_s = arrival_s if visit.is_copied else seconds
                back.append(Work(freed_s, seconds, nbytes_back + written))
        return [*there, self._head_work(job, s, exact, rooms[0]), *reversed(back)]

    def _head_work(self, job: Job, s: Schedule, exact: bool, room: int) -> Work:
        machine = self.machine
        peak, seconds, allocated = self._head(job, s.tail, s.head_tokens, exact)
        fresh = 0.0 if s.keep_buffers else float(_fresh_share(room, peak))
        seconds = job.micro_batches * (seconds + fresh * allocated * machine.page_s_per_byte)
        cast_s = 0.0
        if not s.keep_head and job.head_compute_nbytes != job.head_stored_nbytes:
            cast_s = job.head_compute_nbytes * (1 / machine.cast_bytes_per_s + machine.page_s_per_byte)
            if not s.head_ahead:  # it comes in pieces, which are copied to where it is whole
                cast_s += job.head_compute_nbytes * (2 / machine.bytes_per_s + machine.page_s_per_byte)
        freed_s = cast_s if job.head_compute_nbytes != job.head_stored_nbytes else cast_s + seconds
        nbytes = 0 if s.keep_head or s.head_ahead else job.head_stored_nbytes
        written = job.micro_batches * job.hidden_nbytes if len(job.visits) < s.spilled else 0
        return Work(freed_s, cast_s + seconds, nbytes + written, written, inline_rate=1.0)

    def _arrival(self, visit: Visit) -> float:
        """Seconds to cast or dequantize a block's weights."""
        seconds = 0.0
        if visit.is_copied:
            seconds += (visit.compute_nbytes - sum(visit.dequantized.values())) / self.machine.cast_bytes_per_s
        for kind, nbytes in visit.dequantized.items():
            seconds += nbytes * self.machine.dequantize_s_per_byte(*kind)
        return seconds

    def _seconds(self, cost: Cost) -> float:
        """Seconds of computing, in memory that is in use already."""
        seconds = self._seconds_of.get(id(cost))
        if seconds is None:
            seconds = self._seconds_of[id(cost)] = self.machine.seconds(*cost.work)
        return seconds

    def _head(self, job: Job, tail: int, head_tokens: int | None, exact: bool) -> tuple[int, float, int]:
        """(peak bytes, seconds, bytes of buffers made) of the head and its tail.

        Of a long tail they are extrapolated, unless `exact`.
        """
        if exact or tail <= 2:
            cost = job.head(tail, head_tokens)
            return cost.peak_nbytes, self._seconds(cost), cost.allocated_nbytes
        one, two = self._head(job, 1, head_tokens, True), self._head(job, 2, head_tokens, True)
        return tuple(b + (tail - 2) * (b - a) for a, b in zip(one, two))


def enough(peak_nbytes: int) -> int:
    """Memory to give for a plan that takes `peak_nbytes` here, in whole 10 MB: another process begins with more.

    Always more, as 2.01 x 1e9 is less than 2010000000.
    """
    return ((peak_nbytes + PROCESSES_DIFFER_NBYTES) // 10**7 + 1) * 10**7


def _overlaps(job: Job, s: Schedule) -> bool:
    """Whether a block is read while another computes: beside it, or where bytes are copied out of their buffer."""
    return s.slots > 1 or all(visit.is_copied for visit in job.visits)


def _is_simple(s: Schedule) -> bool:
    """Whether what a step holds is known well enough to give all that it leaves to freed buffers."""
    return not (s.spilled or s.group_nbytes or s.mlp_tokens)


def _as_schedule(cut: Cut) -> dict:
    return {"rows": cut.rows, "mlp_tokens": cut.mlp_tokens, "attention_queries": cut.attention_queries}


def _first_kept(job: Job) -> int:
    """The first visit whose input is kept for the backward pass; that of the very first is in the trace anyway."""
    return max(job.lowest_trained, 1)


def _has_tail(job: Job) -> bool:
    """Whether blocks may form one graph with the head.

    In pieces they may not: more is alive at once than such a graph shows (8,192 tokens: 692 MB, predicted 579).
    """
    return job.is_chain and job.cut.mlp_tokens is None


def _fresh_share(cache_nbytes: np.ndarray, nbytes: np.ndarray) -> np.ndarray:
    """Of the buffers of computations that take `nbytes`, the shares that MLX's cache has no memory for."""
    return np.maximum(LEAST_FRESH, 1 - cache_nbytes / np.maximum(nbytes, 1))


def _workspace(job: Job) -> int:
    """Bytes that computing a block takes at most."""
    return max(max(v.forward.peak_nbytes, v.backward.peak_nbytes if v.backward else 0) for v in job.visits)


def _slots_by_groups(job: Job) -> int:
    """Buffers for what is left of blocks: the next one's is read meanwhile."""
    return 1 if all(visit.is_copied for visit in job.visits) else 2


def _apart(visit: Visit, s: Schedule) -> tuple[LayerCost, ...]:
    """The layers that do not come with a block that is streamed."""
    return visit.layers if s.group_nbytes is not None else ()


def _rest_nbytes(visit: Visit, s: Schedule) -> int:
    """Bytes on disk of what comes with the block."""
    return visit.stored_nbytes - sum(layer.nbytes for layer in _apart(visit, s))


def _group(job: Job, s: Schedule) -> tuple[int, int]:
    """Bytes of (buffers for groups of experts, the group in use as it is computed with)."""
    if s.group_nbytes is None:
        return 0, 0
    shares = [(layer, layer.group_share(s.group_nbytes)) for visit in job.visits for layer in visit.layers]
    buffers = 2 * max(int(share * layer.nbytes) for layer, share in shares)
    return buffers, max(int(share * layer.compute_nbytes) for layer, share in shares)


def _held_by_groups(layers: Sequence[LayerCost], is_backward: bool) -> int:
    """Bytes that a pass by groups takes more than its graph shows.

    Backward, the layers' outputs and the cotangents of their inputs are there to the end; forward, a layer's input and
    output come to its groups and go by way of a copy.
    """
    if not is_backward:
        return max((layer.input_nbytes + layer.output_nbytes for layer in layers), default=0)
    return sum(layer.input_nbytes + int(STAGES_SHARE * layer.output_nbytes) for layer in layers)


def _tail_blocks(job: Job, s: Schedule) -> list:
    visits = job.visits[len(job.visits) - s.tail :]
    return list({visit.block: visit for visit in visits}.values())


def _streamed_blocks(job: Job, s: Schedule) -> list:
    tail = {visit.block for visit in _tail_blocks(job, s)}
    return list({visit.block: visit for visit in job.visits if visit.block not in tail}.values())


def _streamed_nbytes(job: Job, s: Schedule) -> list[int]:
    """Sizes of what goes through the block buffers."""
    blocks = [_rest_nbytes(v, s) for v in _streamed_blocks(job, s)]
    return blocks + [job.head_stored_nbytes] * s.head_ahead


def _reads_of_blocks(job: Job, s: Schedule) -> tuple[Read, ...]:
    """Reads of a step through the block buffers."""
    blocks = [visit.block for visit in _streamed_blocks(job, s)]
    numbers = {block: number for number, block in enumerate(blocks)}
    sizes = _streamed_nbytes(job, s)
    below = job.visits[: len(job.visits) - s.tail]
    there = [numbers.get(visit.block) for visit in below]
    back = [numbers.get(visit.block) for visit in reversed(below) if visit.backward is not None]
    order = [*there, len(blocks) if s.head_ahead else None, *back]
    lent = s.lent_nbytes or (0,) * len(below)
    back_lent = [nbytes for nbytes, visit in zip(reversed(lent), reversed(below)) if visit.backward is not None]
    capacities = [s.resident_nbytes + nbytes for nbytes in [*lent, *lent[-1:], *back_lent]] or [s.resident_nbytes]
    if len(set(sizes[: len(blocks)])) == 1:  # so many places, of which the head takes one
        held, capacities = [1] * len(sizes), [s.slots + nbytes // sizes[0] for nbytes in capacities]
    else:
        held, capacities = sizes, [s.slots * max(sizes, default=0) + nbytes for nbytes in capacities]
    return reads_of(order, sizes, held, capacities, s.slots)


def _whole_blocks(job: Job, s: Schedule) -> int:
    sizes = [_rest_nbytes(visit, s) for visit in _streamed_blocks(job, s)]
    return min(len(sizes), s.resident_nbytes // max(sizes)) if sizes else 0
