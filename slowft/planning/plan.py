"""A plan: what a step keeps in memory, how it cuts its work, and what it then takes.

Takes `Job`s (one for each chunking), a `Machine`, a ceiling in bytes, and what the run's steps have taught. Gives a
`Plan`, which is a `Schedule` with its predicted memory, reads, writes and seconds; or the least memory that would do.
Only calculates: nothing is measured, read or computed here.

1. Arithmetic says how the work has to be cut for anything to fit (`Planner.chunked`).
2. The first step keeps next to nothing (`Planner.first`). It is the measurement.
3. After it, memory is filled by rule (`Planner.choose`). If everything fits, everything stays, as in ordinary training.
   Else blocks stay until reads are no longer waited for. What is left goes to the outputs that save the most seconds
   per byte, then to more blocks, then to freed buffers. MLX is held to the plan by limits.

`phases` says what is in memory in each phase of a step, `work` what a step reads and computes at each visit to a block,
and `timeline` how long that takes.
"""

import bisect
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from .experts import GROUP_NBYTES
from .job import Chunking, Job
from .machine import ASSUMED, Machine
from .measure import BACKWARD, Experience
from .phases import SLACK_NBYTES, SLACK_SHARE, MemoryUse, nbytes_of, streamed_nbytes
from .schedule import Schedule
from .timeline import step_seconds
from .work import flops_per_s, reads_of_blocks, works_of

PIECES = (2048, 1024, 512, 256)  # numbers of tokens and queries at a time, to choose from
LOGITS_NBYTES = 64 << 20  # more bytes of logits than this are large
# In training, large logits exist whole if they take at most this share of the room that the least plan leaves. If they
# took all of it, steps were predicted to take up to 2.2 times as long; so it is 1.05 times.
LOGITS_SHARE = 0.5
HEAD_TOKENS = (256, 128, 64)  # tokens whose logits exist at once, to choose from: more are hardly faster
GROUPS = (256 << 20, 128 << 20, 64 << 20, GROUP_NBYTES, 16 << 20)  # bytes of a layer of experts at once, to choose from
PROCESSES_DIFFER_NBYTES = 3_000_000  # in what they take before the first step (1.7 MB in 24 runs of one job)
BLOCKS_SHARES = (0, 0.25, 0.5, 0.75, 1)  # shares of the room for blocks, tried in turn until reads are not waited for
# A block or the head is left so many times the bytes that it makes: MLX allocates ahead of the computation, and a freed
# buffer that it hands out again is in memory already, while a new one is not yet.
AHEAD_SHARE = 1.3
WAITING = 1.02  # a step waits for reads if it takes more than so many times the seconds of computing
FASTER = 0.97  # a plan is faster if it takes less than so many times the seconds: less of a difference cannot be told
# Freed buffers get this share of the room before anything else, up to what computing a block takes. Fresh pages cost
# ten times the cast that fills them, but memory that is short does more elsewhere.
FREED_SHARE = 0.25


@dataclass(frozen=True)
class Plan:
    """What a step will do, and what is predicted for it.

    Attributes:
        schedule: what the step keeps in memory and how it cuts its work.
        job: what the step needs under the schedule's chunking.
        memory: the ceiling in bytes; None if there was none.
        peak_nbytes: the most bytes that the process takes, as the operating system counts them.
        read_nbytes, written_nbytes: bytes from and to the disk in an optimizer step.
        compute_s, read_s: seconds of an optimizer step if it only computed, and if it only read and wrote.
        step_s: seconds of an optimizer step.
        parts: what the peak is made of, name -> bytes.
        least_nbytes: the peak of the plan that takes the least memory of all. `enough` of it is what to give.
        is_for_assumed_machine: nothing was measured on this machine yet, so that only bytes are predicted.
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
        """What takes most of a step's time: "reading" or "computing"."""
        return "reading" if self.read_s > self.compute_s else "computing"

    @property
    def resident_blocks(self) -> int:
        """How many blocks are resident besides those in the slots; 0 in ordinary training."""
        sizes = streamed_nbytes(self.job, self.schedule)
        return min(len(sizes), self.schedule.resident_nbytes // max(sizes)) if sizes else 0

    @property
    def is_ordinary(self) -> bool:
        """Whether everything stays in memory, as in ordinary training."""
        return self.schedule.in_memory


class Planner:
    """Makes plans for one job on one machine.

    Args:
        job_of: gives the job under a chunking. It is called only for chunkings that are tried.
        process_nbytes: bytes that the process takes before the first step: libraries, adapter, small layers, data.
        rows, tokens: shape of a micro-batch as it is given.
        arrays_nbytes: how many of `process_nbytes` are in MLX's arrays. Only these count where MLX is held to a limit.
        experience: what the run's steps have taught; None before the first step.
        cut_like: a schedule; the work is cut as in it and in no other way. None to cut as little as fits.
        same_groups: experts come in the groups of `cut_like` too.

    Attributes:
        rates: rates that seconds are predicted by: measured in this run, else remembered, else assumed.
    """

    def __init__(
        self,
        job_of: Callable[[Chunking], Job],
        machine: Machine,
        process_nbytes: int,
        rows: int,
        tokens: int,
        arrays_nbytes: int = 0,
        experience: Experience | None = None,
        cut_like: Schedule | None = None,
        same_groups: bool = False,
    ):
        self.machine, self.job_of = machine, job_of
        self._rows, self._tokens = rows, tokens
        self._outside_arrays_nbytes = process_nbytes - arrays_nbytes
        self._cut_like = cut_like
        self._groups: tuple[int | None, ...] = (None, *GROUPS) if not same_groups else (cut_like.group_nbytes,)
        self._experience = experience or Experience()
        self._bounds = MemoryUse(process_nbytes, Experience())
        self._measured = MemoryUse(process_nbytes, self._experience)
        self.rates = self._experience.rates.over(machine.rates).over(ASSUMED)

    # --- How the work is cut: by arithmetic alone -----------------------------------------------------

    def least(self) -> Plan:
        """The plan that takes the least memory of all."""
        ways = ((self._bounds.peak(job, schedule), job, schedule) for job, schedule in self.ways())
        peak, job, schedule = min(ways, key=lambda way: way[0])
        return replace(self.predict(job, schedule, self._bounds), least_nbytes=peak)

    def chunked(self, memory: float) -> tuple[Job, Schedule] | None:
        """(the job that is cut least, the schedule that keeps least) whose bound is within `memory`; None if none is.

        Whole blocks are cut as far as they must be. Only then experts are offloaded from their blocks, as they are read
        up to three times then. But if a block of experts leaves no room to read the next one while it computes, its
        experts are offloaded first.
        """
        for is_read_ahead in (True, False):
            for job, schedule in self.ways():
                has_experts = any(visit.layers for visit in job.visits)
                if is_read_ahead and has_experts and schedule.group_nbytes is None and not _are_copied(job):
                    schedule = replace(schedule, slots=2)
                if self._bounds.peak(job, schedule) <= memory:
                    return job, self._with_head_tokens(job, replace(schedule, slots=1), memory)
        return None

    def ways(self) -> Iterator[tuple[Job, Schedule]]:
        """Every way to cut the work, each in less memory than the one before, with the schedule that keeps least."""
        rows = self._rows
        chunkings = [Chunking()]
        while rows > 1:
            rows = -(-rows // 2)
            chunkings.append(Chunking(rows=rows))
        one_row = 1 if self._rows > 1 else None
        pieces = [Chunking(one_row, n, n) for n in PIECES if n < self._tokens]
        if (like := self._cut_like) is not None:
            chunkings, pieces = [Chunking(like.rows, like.mlp_tokens, like.attention_queries)], []
        for chunking in [*chunkings, *pieces] if None in self._groups else ():
            yield (job := self.job_of(chunking)), self._keeping_least(job)
        for chunking, group_nbytes in itertools.product(chunkings, [n for n in self._groups if n is not None]):
            job = self.job_of(chunking)
            shares = [layer.group_share(group_nbytes) for visit in job.visits for layer in visit.layers]
            if any(share < 1 for share in shares):
                yield job, self._keeping_least(job, group_nbytes)

    def _keeping_least(self, job: Job, group_nbytes: int | None = None) -> Schedule:
        """The schedule that keeps the least in memory."""
        chunking, least = job.chunking, HEAD_TOKENS[-1]
        head_tokens = least if job.head_in_chunks and least < job.rows * job.tokens else None
        schedule = Schedule(
            slots=1,
            head_tokens=head_tokens if self._cut_like is None else self._cut_like.head_tokens,
            cache_nbytes=0,
            rows=chunking.rows,
            mlp_tokens=chunking.mlp_tokens,
            attention_queries=chunking.attention_queries,
            group_nbytes=group_nbytes,
            reads_in_flight=self.machine.reads_in_flight,
        )
        spilled = replace(schedule, spilled=len(job.visits) + 1 if job.is_chain else 0)
        # with few blocks, spilling takes more memory than it saves
        return min(spilled, schedule, key=lambda s: self._bounds.peak(job, s))

    def _with_head_tokens(self, job: Job, schedule: Schedule, memory: float) -> Schedule:
        """With the logits of all tokens at once, if these are small or leave room for other things.

        A product of fewer rows may be rounded in another way, so only then gradients are those of training in memory to
        the last bit. Else as many tokens at once as leave room for everything else. In forward passes alone, where
        memory is better spent on more micro-batches, large logits never exist whole.
        """
        if self._cut_like is not None:
            return schedule
        n_tokens = job.rows * job.tokens
        whole = replace(schedule, head_tokens=None)
        are_small = 4 * n_tokens * job.vocab_size <= LOGITS_NBYTES
        if are_small or job.trains:
            least, share = self._bounds.peak(job, schedule), 1 if are_small else LOGITS_SHARE
            if self._bounds.peak(job, whole) - least <= share * (memory - least):
                return whole
        for n in HEAD_TOKENS if job.head_in_chunks and _may_be_graph(job, schedule) else ():
            everything = replace(schedule, head_tokens=n, in_memory=True, keep_head=True, spilled=0)
            if n < n_tokens and self._bounds.peak(job, everything) <= memory:
                return replace(schedule, head_tokens=n)
        return schedule

    # --- What is kept ---------------------------------------------------------------------------------

    def first(self, memory: int) -> Plan | None:
        """The plan for a step of which nothing is measured yet; None if none fits."""
        if (cut := self.chunked(memory)) is None:
            return None
        job, least = cut
        schedule = _with_slots(job, _least_spilled(job, least, memory, self._bounds), memory, self._bounds)
        return self._with_limits(job, schedule, memory, self._bounds)

    def choose(self, memory: int | None) -> Plan | None:
        """The plan for `memory` bytes by what was measured so far; None if none fits."""
        limit = math.inf if memory is None else memory
        if (cut := self.chunked(limit)) is None:
            return None
        job, least = cut
        if (everything := self._everything(job, least, limit)) is not None:
            return replace(everything, memory=memory)
        best, *others = self._filled(job, _least_spilled(job, least, limit, self._measured), limit)
        for plan in others:
            if plan.step_s < FASTER * best.step_s:
                best = plan
        nbytes = best.peak_nbytes if memory is None else memory
        return replace(self._with_limits(job, best.schedule, nbytes, self._measured), memory=memory)

    def forward_only(self, memory: int) -> Plan | None:
        """The plan for forward passes without backward passes, of which many follow each other; None if none fits.

        They read every block that is not resident, so all the room is for blocks.
        """
        if (cut := self.chunked(memory)) is None:
            return None
        job, least = cut
        if (everything := self._everything(job, least, memory)) is not None:
            return everything
        schedule = _with_slots(job, replace(least, spilled=0), memory, self._measured)
        with_head = replace(schedule, keep_head=True)
        if self._measured.peak(job, with_head) <= memory:
            schedule = with_head
        schedule = _with_blocks(job, schedule, self._room_to_fill(job, schedule, memory))
        return self._with_limits(job, schedule, memory, self._measured)

    def most(self) -> Plan:
        """The plan that keeps everything, however much memory it takes."""
        return self.choose(None)

    def too_little(self, memory: int) -> str:
        """The message for a user whose `memory` has no plan."""
        job, least = self.job_of(Chunking()), self.least()
        needed = enough(least.peak_nbytes)
        message = f"memory of {memory / 1e9:.2f} GB is too little for "
        if job.micro_batches * self._rows * self._tokens == 1:
            message += f"this model, whatever is done with it: give at least {needed / 1e9:.2f}GB"
        else:
            message += (
                f"steps of {job.micro_batches} x {self._rows} x {self._tokens} tokens on this model: give at least "
                f"{needed / 1e9:.2f}GB, or make --batch-size or --max-seq-length smaller"
            )
        largest = max(least.job.visits, key=lambda visit: visit.stored_nbytes)
        saved = least.schedule.slots * largest.quantizing_saves_nbytes
        if not largest.layers and enough(least.peak_nbytes - saved) <= memory:
            message += ". A block of this model in 4 bits would fit: slowft prepare MODEL --output DIR --quantize"
        return message

    def _everything(self, job: Job, least: Schedule, limit: float) -> Plan | None:
        """The plan of ordinary training; None if there is no room for it."""
        if not _may_be_graph(job, least):
            return None
        schedule = replace(least, in_memory=True, keep_head=True, spilled=0)
        peak = self._measured.peak(job, schedule)
        if peak > limit:
            return None
        # All that is freed stays for the next step, if there is room for as much again: a buffer finds a use only for
        # nearly its own size (a graph of 314 MB took 600 MB). Else as much stays as there is room for.
        again = self._measured.graph_nbytes(job, schedule)
        room = again if math.isinf(limit) else int((limit - peak) / (1 + SLACK_SHARE))
        schedule = replace(schedule, cache_nbytes=min(room, again), keep_buffers=room >= again)
        return self._with_limits(job, schedule, limit, self._measured)

    def _filled(self, job: Job, base: Schedule, limit: float) -> Iterator[Plan]:
        """The plan of a schedule that streams, then plans in which its room is filled in a handful of ways."""
        base = _with_slots(job, base, limit, self._measured)
        if not job.is_chain:  # then nothing but blocks can be kept
            yield self.predict(job, _with_blocks(job, base, self._room(job, base, limit)))
            return
        yield self.predict(job, base)
        if base.spilled:
            return
        for head in ({"keep_head": True}, {"head_ahead": True}, {}):
            with_head = replace(base, **head)
            if self._measured.peak(job, with_head) > limit:
                continue
            for share in BLOCKS_SHARES:
                plan = self.predict(job, self._fill(job, with_head, share, limit))
                yield plan
                if plan.step_s <= WAITING * plan.compute_s:
                    break
                if temporary := self.temporary_room(job, plan.schedule, limit):
                    yield self.predict(job, replace(plan.schedule, temporary_nbytes=temporary))

    def _fill(self, job: Job, schedule: Schedule, share_of_blocks: float, limit: float) -> Schedule:
        """With a share of the room given to blocks, then the rest to outputs, then to more blocks."""
        room = self._room_to_fill(job, schedule, limit)
        if share_of_blocks:
            schedule = _with_blocks(job, schedule, share_of_blocks * room)
            room -= schedule.resident_nbytes
        if schedule.group_nbytes is None:
            schedule = self._with_outputs(job, schedule, room)
            kept = (visit.kept(schedule.kept_at(position))[0] for position, visit in enumerate(job.visits))
            room -= job.micro_batches * sum(kept)
        return _with_blocks(job, schedule, schedule.resident_nbytes + room)

    def _room(self, job: Job, schedule: Schedule, limit: float) -> float:
        """Bytes that the schedule leaves free, less the slack of what they will be used for."""
        return (limit - self._measured.peak(job, schedule)) / (1 + SLACK_SHARE)

    def _room_to_fill(self, job: Job, schedule: Schedule, limit: float) -> float:
        """Bytes that the schedule leaves free, less those that freed buffers get before anything else."""
        room = self._room(job, schedule, limit)
        return room - min(FREED_SHARE * room, self._measured.workspace_nbytes(job))

    def _with_outputs(self, job: Job, schedule: Schedule, room: float) -> Schedule:
        """With as many kept outputs as there is room for, those first that save the most seconds per byte."""
        outputs = []
        for position, visit in enumerate(job.visits):
            for output in visit.outputs:
                saved_s = output.flops / flops_per_s(job, visit.kind, BACKWARD, self.rates, self._experience)
                outputs.append((round(1e12 * saved_s / output.nbytes), output.nbytes, position, output.name))
        kept: list[list[str]] = [[] for _ in job.visits]
        # (of equal ones larger ones come first, then those of later visits, which need the room for a shorter time)
        for _, nbytes, position, name in sorted(outputs, reverse=True):
            room -= nbytes * job.micro_batches
            if room < 0:
                break
            kept[position].append(name)
        return replace(schedule, kept=tuple(map(tuple, kept))) if any(kept) else schedule

    def temporary_room(self, job: Job, schedule: Schedule, limit: float) -> tuple[int, ...]:
        """Bytes that blocks may take at each visit, both ways, until outputs and inputs of later visits exist there."""
        if math.isinf(limit) or not _is_predictable(schedule):
            return ()
        phases = self._measured.phases(job, schedule)
        largest = [max(nbytes_of(phase) for phase in pair if phase) for pair in zip(phases.forward, phases.backward)]
        # the head comes right after the last visit, and the optimizer right after the backward pass of the first
        largest[-1] = max(largest[-1], nbytes_of(phases.head))
        largest[0] = max(largest[0], nbytes_of(phases.optimizer))
        within = limit - SLACK_NBYTES + SLACK_SHARE * self._measured.process_nbytes
        within = within / (1 + SLACK_SHARE) - nbytes_of(phases.always)
        sizes = streamed_nbytes(job, schedule)
        missing = sum(sizes) - schedule.slots * max(sizes) - schedule.resident_nbytes
        rooms = (int(min(max(within - nbytes, 0), max(missing, 0))) for nbytes in largest)
        rooms = list(itertools.accumulate(rooms, min))  # what is kept only grows from visit to visit
        return tuple(rooms) if any(rooms) else ()

    # --- MLX's limits ---------------------------------------------------------------------------------

    def _with_limits(self, job: Job, s: Schedule, memory: float, memory_use: MemoryUse) -> Plan:
        """The plan of a schedule with MLX's limits. Freed buffers get what is left of `memory`, if that is of use."""
        workspace = memory_use.workspace_nbytes(job)
        if not _is_predictable(s) and (room := memory - memory_use.peak(job, s)) > 0:
            s = replace(s, cache_nbytes=int(min(room / (1 + SLACK_SHARE), workspace)))
        plan = self.predict(job, s, memory_use)
        head, left = memory_use.head_nbytes(job, s), 0
        if _is_predictable(s) and not plan.is_ordinary:
            left = int(min(max(memory - plan.peak_nbytes, 0), max(head, workspace)))
        slack, cache = plan.parts["slack"], s.cache_nbytes or 0
        arrays = plan.peak_nbytes + left - self._outside_arrays_nbytes
        if s.keep_buffers:  # MLX gets what the graph was planned to take: to compute further ahead takes more buffers
            total = arrays - slack // 2
            active = head_active = total - cache
        else:  # twice the slack is left: freed buffers must never be what breaks the ceiling
            total = arrays - 2 * slack
            active = int(memory) - self._outside_arrays_nbytes - cache
            head_active = active - slack  # MLX waits once more than that is in use, so what is made last comes on top
        schedule = replace(
            s,
            active_nbytes=max(active, 1 << 20),
            head_active_nbytes=max(head_active, 1 << 20),
            total_nbytes=total if _is_predictable(s) else 0,
            workspace_nbytes=int(AHEAD_SHARE * workspace),
            head_workspace_nbytes=int(AHEAD_SHARE * head) + (0 if s.keep_head else job.head_compute_nbytes),
        )
        reused = left - min(left, slack)  # one of the two slacks is in the plan already
        parts = plan.parts | ({"freed buffers": cache + reused} if cache + reused else {})
        peak, least = plan.peak_nbytes + reused, min(self.least().peak_nbytes, plan.peak_nbytes + reused)
        return replace(plan, schedule=schedule, memory=memory, peak_nbytes=peak, parts=parts, least_nbytes=least)

    # --- What a step takes ----------------------------------------------------------------------------

    def predict(self, job: Job, schedule: Schedule, memory_use: MemoryUse | None = None) -> Plan:
        """What a step under `schedule` will take, in memory by what was measured or by `memory_use`."""
        if not job.is_chain and (m := job.micro_batches) > 1:  # micro-batches go through the model one after the other
            one = self.predict(replace(job, micro_batches=1), schedule, memory_use)
            sums = ("read_nbytes", "written_nbytes", "compute_s", "read_s", "step_s")
            return replace(one, job=job, **{name: m * getattr(one, name) for name in sums})
        peak, parts = (memory_use or self._measured).peak_and_parts(job, schedule)
        read_rate = self.rates.read
        write_rate = self.machine.write_bytes_per_s or read_rate
        reads, works = reads_of_blocks(job, schedule), works_of(job, schedule, self.rates, self._experience)
        read = sum(read.nbytes for read in reads) + sum(work.read_nbytes for work in works)
        read += job.rows_nbytes * job.micro_batches
        written = sum(work.written_nbytes for work in works)
        return Plan(
            schedule,
            job,
            memory=None,
            peak_nbytes=peak,
            read_nbytes=read,
            written_nbytes=written,
            compute_s=sum(work.seconds for work in works),
            read_s=read / read_rate + written / write_rate,
            step_s=step_seconds(reads, works, read_rate, write_rate),
            parts=parts,
            is_for_assumed_machine=self._experience.rates.over(self.machine.rates).forward is None,
        )


def enough(peak_nbytes: int) -> int:
    """Memory to give for a plan that takes `peak_nbytes` here, in whole 10 MB: another process may begin with more.

    It is always more than `peak_nbytes`, as a user's "2.01GB" is 2.01 x 1e9, which is less than 2010000000.
    """
    return ((peak_nbytes + PROCESSES_DIFFER_NBYTES) // 10**7 + 1) * 10**7


def _least_spilled(job: Job, schedule: Schedule, limit: float, memory_use: MemoryUse) -> Schedule:
    """With as few inputs spilled as fit. To spill only a few takes more than none, as they are written and read."""

    def fits(spilled: int) -> bool:
        return memory_use.peak(job, replace(schedule, spilled=spilled)) <= limit

    if fits(0) or not job.is_chain:
        return replace(schedule, spilled=0)
    least, most = min(job.first_kept + 1, len(job.visits) + 1), len(job.visits) + 1
    return replace(schedule, spilled=least + bisect.bisect_left(range(least, most), True, key=fits))


def _with_slots(job: Job, schedule: Schedule, limit: float, memory_use: MemoryUse) -> Schedule:
    """With two buffers, if a block needs its own while it computes and there is room for the next block's."""
    if _are_copied(job):
        return schedule
    two = replace(schedule, slots=2)
    return two if memory_use.peak(job, two) <= limit else schedule


def _with_blocks(job: Job, schedule: Schedule, room: float) -> Schedule:
    """With as many bytes of resident blocks as there is room for."""
    sizes = streamed_nbytes(job, schedule)
    nbytes = int(min(room, sum(sizes)))
    if len(set(sizes)) == 1:  # room that holds no whole block is of no use
        nbytes = nbytes // sizes[0] * sizes[0]
    return replace(schedule, resident_nbytes=nbytes) if sizes and nbytes >= min(sizes) else schedule


def _is_predictable(s: Schedule) -> bool:
    """Whether what a step takes is known well enough to give all that it leaves to freed buffers, or to blocks."""
    return not (s.spilled or s.group_nbytes or s.mlp_tokens)


def _may_be_graph(job: Job, s: Schedule) -> bool:
    """Whether all blocks and the head may form one graph, as in ordinary training."""
    return job.is_chain and job.chunking.mlp_tokens is None and s.group_nbytes is None


def _are_copied(job: Job) -> bool:
    """Whether each block, on arrival, leaves its buffer to the next one, as it is cast or dequantized."""
    return all(visit.is_copied for visit in job.visits)
