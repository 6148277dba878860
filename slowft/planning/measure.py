"""What a run has measured: the memory and the seconds of each kind of pass, and how fast the drive is read.

Comes in from the engine, which notes each pass of a step in `Measurements`. `Experience` sums up the steps beside what
arithmetic said of them, and corrects it. Rates are kept between runs, per machine, for `slowft plan`. A file that
cannot be read or written is never an error.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import mlx.core as mx

from .. import platform
from ..memory import limits
from .job import Job, Visit
from .schedule import Schedule

FORWARD, BACKWARD, ARRIVAL = "forward", "backward", "arrival"
HEAD = "head"  # stands for a kind of block
GRAPH = "graph"  # the same for the head with all blocks in one graph
# times what was measured: the same work again may be evaluated in a slightly different order
SAME_WORK = 1.05
# times what the ratio to arithmetic says of other work: within one architecture that ratio differs by 10% either way
OTHER_WORK = 1.25
SIZES_APART = 4  # times as large as the next smaller ones: sizes of matrices that rates are remembered of
LIKE = 4  # times as large as what was measured, at most: else the ratio says little


@dataclass
class Pass:
    """Passes of a kind and direction in one step: how many were timed, their seconds, and the bytes that one needs."""

    n: int = 0
    seconds: float = 0.0
    nbytes: int = 0


class Measurements:
    """What the engine measures in one step.

    Args:
        known: (kind, direction) of passes whose memory was measured before; what is measured now is added.

    Attributes:
        passes: by (kind, direction).
        read_nbytes, read_s: read from the drive, and the seconds that it was busy with it.
        wait_s: seconds that the computation waited for reads; step_s: of the whole step.
        peak_nbytes: the most that the process took, as the operating system counts it.
    """

    def __init__(self, known: set[tuple[str, str]] | None = None):
        self.passes: dict[tuple[str, str], Pass] = {}
        self._known = set() if known is None else known
        self.read_nbytes = 0
        self.read_s = self.wait_s = self.step_s = 0.0
        self.peak_nbytes = 0

    def finish(self, read_nbytes: int, read_s: float, wait_s: float, peak_nbytes: int, step_s: float) -> None:
        """The step is over; see the attributes."""
        self.read_nbytes, self.read_s, self.wait_s, self.step_s = read_nbytes, read_s, wait_s, step_s
        self.peak_nbytes = peak_nbytes

    def note(self, kind: str, direction: str, seconds: float | None = None, nbytes: int = 0) -> None:
        """One micro-batch's pass, or the arrival of a block's weights, took so long, or so many bytes."""
        found = self.passes.setdefault((kind, direction), Pass())
        found.nbytes = max(found.nbytes, nbytes)
        if seconds is not None:
            found.n, found.seconds = found.n + 1, found.seconds + seconds

    @contextmanager
    def measuring(self, kind: str, direction: str, waited: Callable[[], float] = lambda: 0.0) -> Iterator[None]:
        """Notes what is evaluated while this is entered.

        The first pass of a kind tells how many bytes it needs beyond what was there before or stays: MLX makes no
        buffer ahead of the computation then, which takes longer. Of the others, seconds are noted.

        Args:
            waited: seconds that were waited for reads so far, which are left out.
        """
        if (kind, direction) in self._known:
            begin = time.perf_counter() - waited()
            yield
            self.note(kind, direction, time.perf_counter() - waited() - begin)
            return
        self._known.add((kind, direction))
        mx.synchronize()  # a GPU frees what a command buffer used a moment after its results are there
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        with limits().one_at_a_time():
            yield
        mx.synchronize()
        self.note(kind, direction, None, max(0, mx.get_peak_memory() - max(before, mx.get_active_memory())))


@dataclass(frozen=True)
class Rates:
    """What a machine does per second. None where it is not known.

    Attributes:
        forward, backward, head: floating point operations, of blocks' passes and of the head.
        cast: bytes of weights, as they are computed with, that are cast or dequantized.
        read: bytes read from the drive.
    """

    forward: float | None = None
    backward: float | None = None
    head: float | None = None
    cast: float | None = None
    read: float | None = None

    def over(self, other: "Rates") -> "Rates":
        """These, and of the other what these do not know."""
        return replace(other, **{name: rate for name, rate in asdict(self).items() if rate is not None})


class Experience:
    """What the steps of a run have taught, beside what arithmetic says."""

    def __init__(self):
        # by (chunking, kind, direction): the largest work that was measured, as (arithmetic's bound, bytes it needed)
        self._nbytes: dict[tuple, tuple[int, int]] = {}
        self._per_s: dict[tuple, float] = {}  # by the same: flops a second at best; of an arrival, bytes
        self._read: tuple[int, float] = (0, 0.0)

    def learn(self, job: Job, schedule: Schedule, step: Measurements) -> bool:
        """Take note of a step of this job; returns whether a figure of memory is new."""
        is_news = False
        for (kind, direction), found in step.passes.items():
            work, bound = _work_of(job, schedule, kind, direction)
            if not work:
                continue
            key = job.chunking, kind, direction
            if found.n:
                self._per_s[key] = max(self._per_s.get(key, 0.0), found.n * work / max(found.seconds, 1e-9))
            if found.nbytes and bound >= self._nbytes.get(key, (0, 0))[0]:
                self._nbytes[key] = bound, found.nbytes
                is_news = True
        if step.read_s > 0:
            self._read = step.read_nbytes, step.read_s
        return is_news

    def knows(self, job: Job) -> bool:
        """Whether passes like those of the job were measured, all of them."""
        wanted = {(visit.kind, FORWARD, visit.forward_nbytes) for visit in job.visits}
        wanted |= {(visit.kind, BACKWARD, visit.backward_nbytes) for visit in job.visits if visit.comes_back}
        found = ((self._nbytes.get((job.chunking, kind, direction)), bound) for kind, direction, bound in wanted)
        return all(known is not None and bound <= LIKE * known[0] for known, bound in found)

    def nbytes(self, job: Job, kind: str, direction: str, bound: int) -> int:
        """The most bytes that a pass needs at once, of which arithmetic says `bound`.

        What MLX was seen to make may be more, as it makes some buffers before those they follow are freed.
        """
        known_bound, nbytes = self._nbytes.get((job.chunking, kind, direction), (0, 0))
        if bound > LIKE * known_bound:
            return bound
        margin = SAME_WORK if bound == known_bound else OTHER_WORK
        return min(bound, int(margin * nbytes * bound / known_bound))

    def per_s(self, job: Job, kind: str, direction: str) -> float | None:
        """Floating point operations a second of such passes; of an arrival, bytes. None if none was measured."""
        return self._per_s.get((job.chunking, kind, direction))

    @property
    def rates(self) -> Rates:
        """What the machine did in these steps."""

        def best(*directions: str, head: bool = False) -> float | None:
            found = [
                per_s
                for (_, kind, direction), per_s in self._per_s.items()
                if direction in directions and (kind == HEAD) == head and kind != GRAPH
            ]
            return max(found, default=None)

        nbytes, seconds = self._read
        read = nbytes / seconds if seconds > 0 and nbytes > 0 else None
        return Rates(best(FORWARD), best(BACKWARD), best(FORWARD, BACKWARD, head=True), best(ARRIVAL), read)


def _work_of(job: Job, schedule: Schedule, kind: str, direction: str) -> tuple[float, int]:
    """(flops of such a pass on average, or bytes of an arrival; arithmetic's bound of its bytes)."""
    if kind == HEAD:
        return job.head_flops, head_nbytes(job, schedule.head_tokens)
    if kind == GRAPH:
        return job.head_flops + sum(
            v.graph_flops if v.comes_back else v.forward_flops for v in job.visits
        ), graph_nbytes(job, schedule)
    alike = [(position, visit) for position, visit in enumerate(job.visits) if visit.kind == kind]
    if direction == BACKWARD:
        alike = [(position, visit) for position, visit in alike if visit.comes_back]
    if not alike:
        return 0, 0
    if direction == ARRIVAL:
        return alike[0][1].compute_nbytes, 0
    flops = [_flops(visit, direction, kept_of(schedule, position)) for position, visit in alike]
    bounds = [visit.forward_nbytes if direction == FORWARD else visit.backward_nbytes for _, visit in alike]
    return sum(flops) / len(flops), max(bounds)


def _flops(visit: Visit, direction: str, kept: tuple[str, ...]) -> int:
    return visit.forward_flops if direction == FORWARD else visit.backward_flops - visit.kept(kept)[1]


def kept_of(schedule: Schedule, position: int) -> tuple[str, ...]:
    """The layers of the visit at `position` whose outputs are kept."""
    return schedule.kept[position] if position < len(schedule.kept) else ()


def head_nbytes(job: Job, head_tokens: int | None) -> int:
    """An upper bound of what the head makes: logits, what is made of them in float32, and hidden states."""
    tokens = job.rows * job.tokens
    at_once = min(head_tokens, tokens) if head_tokens and job.head_in_chunks else tokens
    return int(1.05 * job.logits_arrays * at_once * job.vocab_size * 4) + 3 * job.hidden_nbytes


def graph_nbytes(job: Job, schedule: Schedule) -> int:
    """An upper bound of what all blocks and the head make as one graph."""
    last = max(visit.backward_nbytes - visit.graph_nbytes for visit in job.visits)
    return sum(visit.graph_nbytes for visit in job.visits) + max(last, head_nbytes(job, schedule.head_tokens))


# --- Between runs -------------------------------------------------------------------------------------


def remember(device: str, compute_dtype: str, matrix: tuple[int, int], rates: Rates) -> None:
    """Keep a machine's rates for later runs.

    Args:
        matrix: rows and columns of the largest matrix in a block. What large ones are multiplied at says nothing of
            small ones: 576 x 1536 at 70 GFLOP/s, 2048 x 5632 at 140 to 170, 4096 x 14336 at 200.
    """
    file = _file()
    everything = _read_all(file)
    rates = rates.over(remembered(device, compute_dtype, matrix))
    for name, of_name in _names(device, compute_dtype, matrix).items():
        everything[name] = {kind: getattr(rates, kind) for kind in of_name}
    unfinished = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            unfinished.write_text(json.dumps(everything, indent=1))
            os.replace(unfinished, file)
        finally:
            unfinished.unlink(missing_ok=True)


def remembered(device: str, compute_dtype: str, matrix: tuple[int, int]) -> Rates:
    """What earlier runs on this machine measured, with matrices of about this size."""
    everything, rates = _read_all(_file()), {}
    for name, of_name in _names(device, compute_dtype, matrix).items():
        found = everything.get(name)
        for kind in of_name if isinstance(found, dict) else ():
            rate = found.get(kind)
            if isinstance(rate, int | float) and 0 < rate < float("inf"):
                rates[kind] = float(rate)
    return Rates(**rates)


def _names(device: str, compute_dtype: str, matrix: tuple[int, int]) -> dict[str, tuple[str, ...]]:
    """Name in the file -> the rates that are there."""
    machine, size = f"{device}, {compute_dtype}", SIZES_APART ** round(math.log(math.prod(matrix), SIZES_APART))
    return {machine: ("cast", "read"), f"{machine}, matrices of {size} values": ("forward", "backward", "head")}


def _file() -> Path:
    return platform.cache_directory() / "rates.json"


def _read_all(file: Path) -> dict:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
