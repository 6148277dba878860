"""From what a job needs and what the machine does to what is kept in memory.

Comes in: `Job`s (one for each chunking), a `Machine`, a ceiling in bytes, and what the run's steps have taught. Goes
out: a `Plan`, which is a `Schedule` with its predicted memory, reads, writes and seconds; or the least memory that
would do. Only calculates: nothing is measured, read or computed here.

In order: arithmetic says how the work has to be cut for anything to fit (`Planner.chunked`), and the first step keeps
next to nothing (`Planner.first`). It is the measurement. After it, memory is filled by rule (`Planner.choose`):
everything stays, if it fits, as in ordinary training; else blocks stay until reads are no longer waited for; what is
left goes to outputs that save the most seconds per byte, then to more blocks, then to freed buffers.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from ..weights.sources import pieces_nbytes
from .experts import GROUP_NBYTES
from .job import Chunking, Job, Visit
from .machine import ASSUMED, Machine
from .measure import ARRIVAL, BACKWARD, FORWARD, GRAPH, HEAD, Experience, graph_nbytes, head_nbytes, kept_of
from .schedule import Schedule
from .timeline import Read, Work, reads_of, step_seconds

PIECES = (2048, 1024, 512, 256)  # tokens and queries at a time, to choose from
LOGITS_NBYTES = 64 << 20  # of logits that may exist at once where nothing else is said
HEAD_TOKENS = (256, 128, 64)  # whose logits exist at once, to choose from: more than that is hardly faster
GROUPS = (256 << 20, 128 << 20, 64 << 20, GROUP_NBYTES, 16 << 20)  # bytes of a layer of experts at once
SLACK_NBYTES = 8 << 20  # what the process takes besides: Python's heap, stacks, small arrays
SLACK_SHARE = 0.03
PROCESSES_DIFFER_NBYTES = 3_000_000  # in what they take before the first step (1.7 MB in 24 runs of one job)
BLOCKS_SHARES = (0, 0.25, 0.5, 0.75, 1)  # of the room, for blocks, tried in turn until reads are not waited for
# of what computing needs: a buffer that MLX hands out again ahead of time is in memory already, a new one is not yet
AHEAD_SHARE = 1.3
WAITING = 1.02  # times the seconds of computing: a step that takes more waits for reads
FASTER = 0.97  # times the seconds of what was found first: less of a difference cannot be told
# of the room, for freed buffers before anything else, up to what computing a block takes: fresh pages cost ten times
# the cast that fills them, but memory that is short does more elsewhere
FREED_SHARE = 0.25


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
        is_for_assumed_machine: nothing was measured on this machine yet, so only bytes are predicted.
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
        """Blocks that stay between visits, ordinary training's left out."""
        sizes = [_streamed_nbytes(visit, self.schedule) for visit in _streamed(self.job, self.schedule)]
        return min(len(sizes), self.schedule.resident_nbytes // max(sizes)) if sizes else 0

    @property
    def is_ordinary(self) -> bool:
        """Whether everything stays in memory, as in ordinary training."""
        return self.schedule.in_memory


@dataclass(frozen=True)
class _Phase:
    """What is in memory in one phase of a step beyond what always is, name -> bytes."""

    parts: dict[str, int]

    @functools.cached_property
    def nbytes(self) -> int:
        return sum(self.parts.values())


class Planner:
    """Makes plans for one job on one machine.

    Args:
        job_of: the job under a chunking; called only for those that are tried.
        base_nbytes: what the process takes before the first step: libraries, adapter, small layers, data.
        rows, tokens: of a micro-batch as it is given.
        held_nbytes: of `base_nbytes`, what is in arrays, which count where MLX is held to a limit.
        experience: what the run's steps have taught; None: nothing yet.
        cut_like: a schedule by which the work is to be cut, and no other way; None: as little as fits.
        groups_alike: that holds for groups of experts too.

    Attributes:
        rates: by which seconds are predicted: measured in this run, else remembered, else assumed.
    """

    def __init__(
        self,
        job_of: Callable[[Chunking], Job],
        machine: Machine,
        base_nbytes: int,
        rows: int,
        tokens: int,
        held_nbytes: int = 0,
        experience: Experience | None = None,
        cut_like: Schedule | None = None,
        groups_alike: bool = False,
    ):
        self.machine, self.job_of = machine, job_of
        self._base, self._held = base_nbytes, held_nbytes
        self._rows, self._tokens = rows, tokens
        self._taught, self._cut_like = experience or Experience(), cut_like
        self._groups: tuple[int | None, ...] = (None, *GROUPS) if not groups_alike else (cut_like.group_nbytes,)
        self._bounds = Experience()
        self.rates = self._taught.rates.over(machine.rates).over(ASSUMED)

    # --- How the work is cut: by arithmetic alone -----------------------------------------------------

    def least(self) -> Plan:
        """The plan that takes the least memory of all."""
        least = ((self._peak(job, s, self._bounds), job, s) for job, s in self.ways())
        peak, job, schedule = min(least, key=lambda found: found[0])
        return replace(self.predict(job, schedule, self._bounds), least_nbytes=peak)

    def chunked(self, memory: float) -> tuple[Job, Schedule] | None:
        """The job under the least chunking, and the least schedule for it, of which an upper bound is within `memory`.

        Whole blocks are cut as far as they must be; only then experts come apart from their blocks, which are read up
        to three times then. But a block of experts that leaves no room to read the next one while it computes comes
        apart first.
        """
        for is_read_ahead in (True, False):
            for job, schedule in self.ways():
                has_experts = any(visit.layers for visit in job.visits)
                if is_read_ahead and has_experts and schedule.group_nbytes is None and not _are_copied(job):
                    schedule = replace(schedule, slots=2)
                if self._peak(job, schedule, self._bounds) <= memory:
                    return job, self._with_head_tokens(job, replace(schedule, slots=1), memory)
        return None

    def _with_head_tokens(self, job: Job, schedule: Schedule, memory: float) -> Schedule:
        """With more tokens' logits at once.

        All of them, where they are small, as without a ceiling; else as many as leave room for everything else.
        """
        if self._cut_like is not None:
            return schedule
        n_tokens = job.rows * job.tokens
        whole = replace(schedule, head_tokens=None)
        if 4 * n_tokens * job.vocab_size <= LOGITS_NBYTES and self._peak(job, whole, self._bounds) <= memory:
            return whole
        for n in HEAD_TOKENS if job.head_in_chunks and _has_graph(job, schedule) else ():
            everything = replace(schedule, head_tokens=n, in_memory=True, keep_head=True, spilled=0)
            if n < n_tokens and self._peak(job, everything, self._bounds) <= memory:
                return replace(schedule, head_tokens=n)
        return schedule

    def ways(self) -> Iterator[tuple[Job, Schedule]]:
        """Every way to do the work in less memory than the one before, with what keeps the least."""
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
            yield (job := self.job_of(chunking)), self._least_of(job)
        for chunking, group_nbytes in itertools.product(chunkings, [n for n in self._groups if n is not None]):
            job = self.job_of(chunking)
            shares = [layer.group_share(group_nbytes) for visit in job.visits for layer in visit.layers]
            if any(share < 1 for share in shares):
                yield job, self._least_of(job, group_nbytes)

    def _least_of(self, job: Job, group_nbytes: int | None = None) -> Schedule:
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
        # of few blocks, spilling takes more than it saves
        return min(spilled, schedule, key=lambda s: self._peak(job, s, self._bounds))

    # --- What is kept ---------------------------------------------------------------------------------

    def first(self, memory: int) -> Plan | None:
        """The plan for a step of which nothing is measured yet; None if none fits."""
        if (found := self.chunked(memory)) is None:
            return None
        job, least = found
        schedule = self._with_slots(job, self._least_spilled(job, least, memory, self._bounds), memory, self._bounds)
        return self._with_limits(job, schedule, memory, self._bounds)

    def choose(self, memory: int | None) -> Plan | None:
        """The plan for `memory` bytes, by what was measured so far; None if there is none."""
        limit = math.inf if memory is None else memory
        if (found := self.chunked(limit)) is None:
            return None
        job, least = found
        if (everything := self._everything(job, least, limit)) is not None:
            return replace(everything, memory=memory)
        base = self._least_spilled(job, least, limit, self._taught)
        best = None
        for schedule in self._filled(job, base, limit):
            plan = self.predict(job, schedule, self._taught)
            if best is None or plan.step_s < FASTER * best.step_s:
                best = plan
        nbytes = best.peak_nbytes if memory is None else memory
        return replace(self._with_limits(job, best.schedule, nbytes, self._taught), memory=memory)

    def forward_only(self, memory: int) -> Plan | None:
        """The plan for passes that nothing comes back from, of which many follow each other; None if there is none.

        They read every block that does not stay, so all the room is for blocks.
        """
        if (found := self.chunked(memory)) is None:
            return None
        job, least = found
        if (everything := self._everything(job, least, memory)) is not None:
            return replace(everything, memory=memory)
        schedule = self._with_slots(job, replace(least, spilled=0), memory, self._taught)
        with_head = replace(schedule, keep_head=True)
        if self._peak(job, with_head, self._taught) <= memory:
            schedule = with_head
        room = (memory - self._peak(job, schedule, self._taught)) / (1 + SLACK_SHARE)
        room -= min(FREED_SHARE * room, self._workspace(job, self._taught))
        schedule = self._with_blocks(job, schedule, room)
        return replace(self._with_limits(job, schedule, memory, self._taught), memory=memory)

    def most(self) -> Plan:
        """The plan that keeps everything, however much it takes."""
        return self.choose(None)

    def too_little(self, memory: int) -> str:
        """What to say where there is no plan."""
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
        """Ordinary training, if there is room for it."""
        if not _has_graph(job, least):
            return None
        schedule = replace(least, in_memory=True, keep_head=True, spilled=0)
        peak = self._peak(job, schedule, self._taught)
        if peak > limit:
            return None
        # All that is freed stays for the next step, if there is room for as much again: a buffer finds a use only for
        # nearly its own size (a graph of 314 MB took 600 MB). Else as much as the last step left.
        again = self._graph(job, schedule, self._taught)
        room = again if math.isinf(limit) else int((limit - peak) / (1 + SLACK_SHARE))
        schedule = replace(schedule, cache_nbytes=min(room, again), keep_buffers=room >= again)
        return self._with_limits(job, schedule, limit, self._taught)

    def _least_spilled(self, job: Job, schedule: Schedule, limit: float, figures: Experience) -> Schedule:
        """The schedule with as few inputs spilled as fit: the first few take more than none, being written and read."""
        if self._peak(job, replace(schedule, spilled=0), figures) <= limit or not job.is_chain:
            return replace(schedule, spilled=0)
        low, high = min(_first_kept(job) + 1, len(job.visits) + 1), len(job.visits) + 1
        while low < high:
            middle = (low + high) // 2
            if self._peak(job, replace(schedule, spilled=middle), figures) <= limit:
                high = middle
            else:
                low = middle + 1
        return replace(schedule, spilled=low)

    def _with_slots(self, job: Job, schedule: Schedule, limit: float, figures: Experience) -> Schedule:
        """With two buffers, where a block needs its own while it computes and there is room for the next one's."""
        if _are_copied(job):
            return schedule
        two = replace(schedule, slots=2)
        return two if self._peak(job, two, figures) <= limit else schedule

    def _filled(self, job: Job, base: Schedule, limit: float) -> Iterator[Schedule]:
        """The schedule, and with its room filled: a handful of ways, those first that wait for nothing else."""
        base = self._with_slots(job, base, limit, self._taught)
        if not job.is_chain:  # of which nothing but blocks can be kept
            yield self._with_blocks(job, base, (limit - self._peak(job, base, self._taught)) / (1 + SLACK_SHARE))
            return
        yield base
        if base.spilled:
            return
        for head in ({"keep_head": True}, {"head_ahead": True}, {}):
            with_head = replace(base, **head)
            if self._peak(job, with_head, self._taught) > limit or (head and not job.is_chain):
                continue
            for share in BLOCKS_SHARES:
                schedule = self._fill(job, with_head, share, limit)
                plan = self.predict(job, schedule, self._taught)
                waits = plan.step_s > WAITING * plan.compute_s
                yield schedule
                if waits and (temporary := self.temporary_room(job, schedule, limit)):
                    yield replace(schedule, temporary_nbytes=temporary)
                if not waits:
                    break

    def _fill(self, job: Job, schedule: Schedule, share_of_blocks: float, limit: float) -> Schedule:
        """The schedule with a share of the room given to blocks, then to outputs, then to more blocks."""
        room = (limit - self._peak(job, schedule, self._taught)) / (1 + SLACK_SHARE)
        room -= min(FREED_SHARE * room, self._workspace(job, self._taught))
        if share_of_blocks:
            schedule = self._with_blocks(job, schedule, share_of_blocks * room)
            room -= schedule.resident_nbytes
        if schedule.group_nbytes is None:
            schedule = self._with_outputs(job, schedule, room)
            room -= job.micro_batches * sum(v.kept(kept_of(schedule, i))[0] for i, v in enumerate(job.visits))
        return self._with_blocks(job, schedule, schedule.resident_nbytes + room)

    def _with_blocks(self, job: Job, schedule: Schedule, room: float) -> Schedule:
        sizes = [_streamed_nbytes(visit, schedule) for visit in _streamed(job, schedule)]
        nbytes = int(min(room, sum(sizes)))
        if len(set(sizes)) == 1:  # what holds no whole block is of no use
            nbytes = nbytes // sizes[0] * sizes[0]
        return replace(schedule, resident_nbytes=nbytes) if sizes and nbytes >= min(sizes) else schedule

    def _with_outputs(self, job: Job, schedule: Schedule, room: float) -> Schedule:
        """As many outputs as there is room for, by the seconds that each byte of them saves.

        Of equals those of later visits, whose room is needed for the shortest time.
        """
        if not job.is_chain:
            return schedule
        found = []
        for position, visit in enumerate(job.visits):
            for output in visit.outputs:
                saved_s = output.flops / self._flops_per_s(job, visit.kind, BACKWARD)
                found.append((round(1e12 * saved_s / output.nbytes), output.nbytes, position, output.name))
        kept: list[list[str]] = [[] for _ in job.visits]
        for _, nbytes, position, name in sorted(found, reverse=True):
            room -= nbytes * job.micro_batches
            if room < 0:
                break
            kept[position].append(name)
        return replace(schedule, kept=tuple(map(tuple, kept))) if any(kept) else schedule

    def temporary_room(self, job: Job, schedule: Schedule, limit: float) -> tuple[int, ...]:
        """For each visit, both ways, bytes that blocks may take until outputs and inputs of later visits are made."""
        n = len(job.visits)
        if math.isinf(limit) or not _is_plain(schedule):
            return ()
        fixed, (head, forward, backward, optimizer) = self._phases(job, schedule, self._taught)
        within = (limit - SLACK_NBYTES + SLACK_SHARE * self._base) / (1 + SLACK_SHARE) - sum(fixed.values())
        rooms = [within - max(there.nbytes, back.nbytes if back else 0) for there, back in zip(forward, backward)]
        rooms[-1], rooms[0] = min(rooms[-1], within - head.nbytes), min(rooms[0], within - optimizer.nbytes)
        sizes = [_streamed_nbytes(visit, schedule) for visit in _streamed(job, schedule)]
        missing = sum(sizes) - schedule.slots * max(sizes) - schedule.resident_nbytes
        # (a room grows smaller from visit to visit, as what is kept only grows)
        rooms = list(itertools.accumulate((int(min(max(room, 0), max(missing, 0))) for room in rooms), min))
        return tuple(rooms) if len(rooms) == n and any(rooms) else ()

    def _with_limits(self, job: Job, s: Schedule, memory: float, figures: Experience) -> Plan:
        """The plan of a schedule with MLX's limits; what is left of `memory` goes to freed buffers, if of use."""
        if not _is_plain(s) and (room := memory - self._peak(job, s, figures)) > 0:
            s = replace(s, cache_nbytes=int(min(room / (1 + SLACK_SHARE), self._workspace(job, figures))))
        plan = self.predict(job, s, figures)
        work, head = self._workspace(job, figures), self._head(job, s, figures)
        slack, left = plan.parts["slack"], 0
        if _is_plain(s) and not plan.is_ordinary:
            left = int(min(max(memory - plan.peak_nbytes, 0), max(head, work)))
        beside = self._base - self._held  # what is in no array
        arrays = plan.peak_nbytes + left - beside
        if s.keep_buffers:  # computes no further ahead than the graph has it: that would ask for more buffers
            total = arrays - slack // 2
            active = total - (s.cache_nbytes or 0)
        else:  # twice the slack: what freed buffers take must never be what breaks the ceiling
            total = arrays - 2 * slack
            active = (plan.peak_nbytes + left if math.isinf(memory) else int(memory)) - beside - (s.cache_nbytes or 0)
        schedule = replace(
            s,
            active_nbytes=max(active, 1 << 20),
            # MLX waits once more than that is in use, so what the head makes last comes on top
            head_active_nbytes=max(active - (0 if s.keep_buffers else slack), 1 << 20),
            total_nbytes=total if _is_plain(s) else 0,
            workspace_nbytes=int(AHEAD_SHARE * work),
            head_workspace_nbytes=int(AHEAD_SHARE * head) + (0 if s.keep_head else job.head_compute_nbytes),
            head_reuses_blocks=plan.is_ordinary,
            head_cache_nbytes=s.cache_nbytes,
        )
        reused = left - min(left, slack)  # of the two slacks one is in the plan already
        freed = plan.parts.get("freed buffers", 0) + reused
        parts = plan.parts | ({"freed buffers": freed} if freed else {})
        least = self.least().peak_nbytes
        peak = plan.peak_nbytes + reused
        return replace(
            plan, schedule=schedule, memory=memory, peak_nbytes=peak, parts=parts, least_nbytes=min(least, peak)
        )

    # --- Memory ---------------------------------------------------------------------------------------

    def _peak(self, job: Job, schedule: Schedule, figures: Experience) -> int:
        return self._worst(job, schedule, figures)[0]

    def _worst(self, job: Job, schedule: Schedule, figures: Experience) -> tuple[int, dict[str, int]]:
        """(the most bytes that a step takes, what they are made of)."""
        fixed, (head, forward, backward, optimizer) = self._phases(job, schedule, figures)
        phases = [head, *forward, *(phase for phase in backward if phase is not None), optimizer]
        worst = max(phases, key=lambda phase: phase.nbytes)
        parts = fixed | worst.parts
        total = sum(parts.values())
        parts["slack"] = SLACK_NBYTES + int(SLACK_SHARE * (total - self._base))
        return total + parts["slack"], {name: nbytes for name, nbytes in parts.items() if nbytes}

    def _phases(self, job: Job, s: Schedule, figures: Experience):
        """(what is in memory all the time, (head, forward passes, backward passes or None, optimizer) as phases)."""
        m, n, hidden = job.micro_batches, 0 if s.in_memory else len(job.visits), job.hidden_nbytes
        streamed = [_streamed_nbytes(visit, s) for visit in _streamed(job, s)]
        sizes = streamed + ([job.head_stored_nbytes] if s.head_ahead else [])
        slots = s.slots * max(sizes, default=0)
        buffers, built = _groups(job, s)
        fixed = {
            "process": self._base,
            "optimizer": job.optimizer_nbytes,
            "all blocks": sum(visit.compute_nbytes for visit in job.blocks) if s.in_memory else 0,
            "head": job.head_compute_nbytes if s.keep_head else 0,
            "block buffers": slots,
            "resident blocks": min(s.resident_nbytes, max(0, sum(sizes) - slots)),
            # masks, the first block's input and its own copy, the cotangent on its way down
            "trace": m * (2 * hidden + job.side_nbytes),
            "groups of experts": buffers,
        }
        cache = s.cache_nbytes or 0
        made = job.trainable_nbytes + job.optimizer_nbytes  # anew, before the old ones are freed
        optimizer = _Phase({"computing": made, "gradients": job.trainable_nbytes, "freed buffers": cache})
        if s.in_memory:
            graph = self._graph(job, s, figures) + 2 * hidden
            return fixed, (_Phase({"computing": graph, "freed buffers": cache}), [], [], optimizer)
        # of spilled inputs, those of one visit are in memory, those being written, and the one read ahead
        window = (m + 3) * hidden if s.spilled else 0
        forward, backward, kept, first = [], [], 0, max(s.spilled, _first_kept(job)) if job.is_chain else 0
        above = sum(visit.trainable_nbytes for visit in job.visits)
        for position, visit in enumerate(job.visits):
            names = kept_of(s, position)
            kept += m * visit.kept(names)[0]
            inputs = m * hidden * max(position + (1 if job.is_chain else 0) - first, 0) + window
            offloaded = visit.layers if s.group_nbytes is not None else ()
            weights = visit.compute_nbytes if visit.is_copied else 0
            if offloaded:
                weights = max(0, weights - sum(layer.compute_nbytes for layer in offloaded)) + built
            shared = {
                "weights": weights,
                "kept outputs": kept,
                "blocks ahead of outputs": s.temporary_nbytes[position] if s.temporary_nbytes else 0,
                "freed buffers": cache,
            }
            computing = figures.nbytes(job, visit.kind, FORWARD, visit.forward_nbytes) + 2 * hidden
            computing += max((layer.input_nbytes + layer.output_nbytes for layer in offloaded), default=0)
            forward.append(_Phase({"activations": inputs + hidden, "computing": computing} | shared))
            above -= visit.trainable_nbytes
            if not visit.comes_back:
                backward.append(None)
                continue
            computing = figures.nbytes(job, visit.kind, BACKWARD, visit.backward_nbytes) + 2 * hidden
            computing += sum(layer.input_nbytes for layer in offloaded)
            of_backward = {"activations": inputs, "computing": computing, "gradients": above}
            backward.append(_Phase(of_backward | shared))
        computing = self._head(job, s, figures) + 2 * hidden
        if not (s.keep_head or s.head_ahead):  # brought in pieces before anything is computed
            computing = max(computing, pieces_nbytes(job.head_stored_nbytes, job.head_compute_nbytes))
        head = {
            "activations": m * hidden * max(n + (1 if job.is_chain else 0) - first, 0) + window,
            "computing": computing,
            "weights": 0 if s.keep_head else job.head_compute_nbytes,
            "kept outputs": kept,
            "blocks ahead of outputs": s.temporary_nbytes[-1] if s.temporary_nbytes else 0,
            "freed buffers": cache,
        }
        if s.temporary_nbytes:
            optimizer.parts["blocks ahead of outputs"] = s.temporary_nbytes[0]
        return fixed, (_Phase(head), forward, backward, optimizer)

    def _workspace(self, job: Job, figures: Experience) -> int:
        """Bytes that a block's pass, or the optimizer, makes at most."""
        passes = [figures.nbytes(job, v.kind, FORWARD, v.forward_nbytes) for v in job.visits]
        passes += [figures.nbytes(job, v.kind, BACKWARD, v.backward_nbytes) for v in job.visits if v.comes_back]
        return max(*passes, job.trainable_nbytes + job.optimizer_nbytes)

    def _head(self, job: Job, s: Schedule, figures: Experience) -> int:
        if s.in_memory:
            return self._graph(job, s, figures)
        return figures.nbytes(job, HEAD, FORWARD, head_nbytes(job, s.head_tokens))

    def _graph(self, job: Job, s: Schedule, figures: Experience) -> int:
        return figures.nbytes(job, GRAPH, FORWARD, graph_nbytes(job, s))

    # --- Reads and seconds ----------------------------------------------------------------------------

    def predict(self, job: Job, schedule: Schedule, figures: Experience | None = None) -> Plan:
        """What a step under `schedule` will take."""
        if not job.is_chain and (m := job.micro_batches) > 1:  # which go through the model one after the other
            one = self.predict(replace(job, micro_batches=1), schedule, figures)
            sums = ("read_nbytes", "written_nbytes", "compute_s", "read_s", "step_s")
            return replace(one, job=job, **{name: m * getattr(one, name) for name in sums})
        peak, parts = self._worst(job, schedule, figures or self._taught)
        read_rate = self.rates.read
        write_rate = self.machine.write_bytes_per_s or read_rate
        reads, works = _reads_of_blocks(job, schedule), self._works(job, schedule)
        nbytes = sum(read.nbytes for read in reads) + sum(work.read_nbytes for work in works)
        nbytes += job.rows_nbytes * job.micro_batches
        written = sum(work.written_nbytes for work in works)
        return Plan(
            schedule,
            job,
            memory=None,
            peak_nbytes=peak,
            read_nbytes=nbytes,
            written_nbytes=written,
            compute_s=sum(work.seconds for work in works),
            read_s=nbytes / read_rate + written / write_rate,
            step_s=step_seconds(reads, works, read_rate, write_rate),
            parts=parts,
            is_for_assumed_machine=self._taught.rates.over(self.machine.rates).forward is None,
        )

    def _flops_per_s(self, job: Job, kind: str, direction: str) -> float:
        rates = self.rates
        usual = {HEAD: rates.head, GRAPH: rates.backward}.get(kind)
        usual = usual or (rates.forward if direction == FORWARD else rates.backward)
        return self._taught.per_s(job, kind, direction) or usual

    def _works(self, job: Job, s: Schedule) -> list[Work]:
        """What is done at each visit to a block, at the head (with all blocks in ordinary training), and back."""
        m, hidden = job.micro_batches, job.hidden_nbytes
        if s.in_memory:
            flops = job.head_flops + sum(v.graph_flops if v.comes_back else v.forward_flops for v in job.visits)
            seconds = m * flops / self._flops_per_s(job, GRAPH, FORWARD)
            return [Work(seconds, seconds)]
        there, back = [], []
        for position, visit in enumerate(job.visits):
            arrival_s = 0.0
            if visit.is_copied:
                arrival_s = visit.compute_nbytes / (self._taught.per_s(job, visit.kind, ARRIVAL) or self.rates.cast)
            spilled = m * hidden if _first_kept(job) <= position < s.spilled else 0
            apart_there, apart_back = _reads_of_groups(job, s, visit)
            seconds = arrival_s + m * visit.forward_flops / self._flops_per_s(job, visit.kind, FORWARD)
            there.append(Work(arrival_s if visit.is_copied else seconds, seconds, apart_there, spilled))
            if visit.comes_back:
                flops = visit.backward_flops - visit.kept(kept_of(s, position))[1]
                seconds = arrival_s + m * flops / self._flops_per_s(job, visit.kind, BACKWARD)
                back.append(Work(arrival_s if visit.is_copied else seconds, seconds, apart_back + spilled))
        seconds = m * job.head_flops / self._flops_per_s(job, HEAD, FORWARD)
        is_copied = job.head_compute_nbytes != job.head_stored_nbytes
        cast_s = 0.0 if s.keep_head or not is_copied else job.head_compute_nbytes / self.rates.cast
        spilled = m * hidden if len(job.visits) < s.spilled else 0
        # in pieces: each is read, cast, and copied to where the layer is whole, while nothing is computed
        read = 0 if s.keep_head or s.head_ahead else job.head_stored_nbytes
        cast_s *= 2 if read else 1
        freed_s = cast_s if is_copied else cast_s + seconds
        head = Work(freed_s, cast_s + seconds, read + spilled, spilled, inline_rate=1.0)
        return [*there, head, *reversed(back)]


def enough(peak_nbytes: int) -> int:
    """Memory to give for a plan that takes `peak_nbytes` here, in whole 10 MB: another process begins with more.

    Always more, as 2.01 x 1e9 is less than 2010000000.
    """
    return ((peak_nbytes + PROCESSES_DIFFER_NBYTES) // 10**7 + 1) * 10**7


def _is_plain(s: Schedule) -> bool:
    """Whether what a step holds is known well enough to give all that it leaves to freed buffers."""
    return not (s.spilled or s.group_nbytes or s.mlp_tokens)


def _has_graph(job: Job, s: Schedule) -> bool:
    """Whether all blocks and the head may form one graph, as in ordinary training."""
    return job.is_chain and job.chunking.mlp_tokens is None and s.group_nbytes is None


def _are_copied(job: Job) -> bool:
    """Whether blocks leave their buffers to the next ones as they arrive: they are cast or dequantized."""
    return all(visit.is_copied for visit in job.visits)


def _first_kept(job: Job) -> int:
    """The first visit whose input is kept for the backward pass; that of the very first is in the trace anyway."""
    return max(job.lowest_trained, 1)


def _streamed(job: Job, s: Schedule) -> list[Visit]:
    """One visit of each block that comes and goes."""
    return [] if s.in_memory else job.blocks


def _streamed_nbytes(visit: Visit, s: Schedule) -> int:
    """Bytes on disk of what comes with the block."""
    offloaded = visit.layers if s.group_nbytes is not None else ()
    return visit.stored_nbytes - sum(layer.stored_nbytes for layer in offloaded)


def _groups(job: Job, s: Schedule) -> tuple[int, int]:
    """Bytes of (buffers for groups of experts, the group in use as it is computed with)."""
    if s.group_nbytes is None:
        return 0, 0
    layers = [(layer, layer.group_share(s.group_nbytes)) for visit in job.visits for layer in visit.layers]
    buffers = 2 * max((int(share * layer.stored_nbytes) for layer, share in layers), default=0)
    return buffers, max((int(share * layer.compute_nbytes) for layer, share in layers), default=0)


def _reads_of_groups(job: Job, s: Schedule, visit: Visit) -> tuple[int, int]:
    """Bytes of experts that are read apart from their block, (forward, backward).

    They come anew for each micro-batch, and twice on the way back: for the recomputation, and for the cotangents.
    """
    layers = visit.layers if s.group_nbytes is not None else ()
    tokens = job.rows * job.tokens
    nbytes = sum(int(job.micro_batches * layer.read_share(tokens) * layer.stored_nbytes) for layer in layers)
    return nbytes, 2 * nbytes if visit.comes_back else 0


def _reads_of_blocks(job: Job, s: Schedule) -> tuple[Read, ...]:
    """Reads of a step through the block buffers."""
    streamed = _streamed(job, s)
    if not streamed:
        return ()
    numbers = {visit.block: number for number, visit in enumerate(streamed)}
    sizes = [_streamed_nbytes(visit, s) for visit in streamed] + [job.head_stored_nbytes] * s.head_ahead
    there = [numbers[visit.block] for visit in job.visits]
    back = [numbers[visit.block] for visit in reversed(job.visits) if visit.comes_back]
    order = [*there, len(streamed) if s.head_ahead else None, *back]
    temporary = s.temporary_nbytes or (0,) * len(job.visits)
    back_temporary = [nbytes for nbytes, visit in zip(reversed(temporary), reversed(job.visits)) if visit.comes_back]
    capacities = [s.resident_nbytes + nbytes for nbytes in [*temporary, temporary[-1], *back_temporary]]
    if len(set(sizes[: len(streamed)])) == 1:  # so many places, of which the head takes one
        held, capacities = [1] * len(sizes), [s.slots + nbytes // sizes[0] for nbytes in capacities]
    else:
        held, capacities = sizes, [s.slots * max(sizes) + nbytes for nbytes in capacities]
    return reads_of(order, sizes, held, capacities, s.slots)
