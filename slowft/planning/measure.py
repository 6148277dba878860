"""What a run has measured: the memory and the seconds of each kind of pass, and how fast the drive is read.

The engine notes each pass of a step in `Measurements`. `Experience` sums up a run's steps, compares them with what
arithmetic said, and corrects it. A machine's rates are remembered between runs, for `slowft plan`. It is never an error
if their file cannot be read or written.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import mlx.core as mx

from .. import platform
from ..memory import limits
from .job import Job
from .schedule import Schedule

FORWARD, BACKWARD, ARRIVAL = "forward", "backward", "arrival"
# these two take the place of a block's kind: the head alone, and the head with all blocks in one graph
HEAD, GRAPH = "head", "graph"
# The same work may take so many times the bytes measured, as it may be evaluated in a slightly different order.
SAME_WORK = 1.05
# Other work may take so many times what the ratio of measured bytes to arithmetic's bound says. Within one architecture
# that ratio differs by 10% either way. It says little of work more than COMPARABLE times as large as what was measured.
OTHER_WORK, COMPARABLE = 1.25, 4
MATRIX_SIZES_RATIO = 4  # rates are remembered by the size of matrices, in classes each this many times the one before


@dataclass
class Pass:
    """Passes of one kind and direction in one step.

    Attributes:
        n, seconds: how many passes were timed, and what they took together.
        nbytes: the most bytes that a pass needed.
    """

    n: int = 0
    seconds: float = 0.0
    nbytes: int = 0


class Measurements:
    """What the engine measures in one step.

    Args:
        known: (kind, direction) of passes whose memory was measured before. What is measured now is added to it.

    Attributes:
        passes: the passes measured, by (kind, direction).
        read_nbytes, read_s: bytes read from the drive, and seconds that it was busy with them.
        wait_s, step_s: seconds that the computation waited for reads, and seconds of the whole step.
        peak_nbytes: the most bytes that the process took, as the operating system counts them.
    """

    def __init__(self, known: set[tuple[str, str]] | None = None):
        self.passes: dict[tuple[str, str], Pass] = {}
        self._known = set() if known is None else known
        self.read_nbytes = self.peak_nbytes = 0
        self.read_s = self.wait_s = self.step_s = 0.0

    def finish(self, read_nbytes: int, read_s: float, wait_s: float, peak_nbytes: int, step_s: float) -> None:
        """Note the totals of a step that is over. The arguments are the attributes of these names."""
        self.read_nbytes, self.read_s, self.wait_s, self.step_s = read_nbytes, read_s, wait_s, step_s
        self.peak_nbytes = peak_nbytes

    def note(self, kind: str, direction: str, seconds: float | None = None, nbytes: int = 0) -> None:
        """Note the seconds, or the bytes, of one micro-batch's pass or of the arrival of a block's weights."""
        passes = self.passes.setdefault((kind, direction), Pass())
        passes.nbytes = max(passes.nbytes, nbytes)
        if seconds is not None:
            passes.n, passes.seconds = passes.n + 1, passes.seconds + seconds

    @contextmanager
    def measuring(self, kind: str, direction: str, waited: Callable[[], float] = lambda: 0.0) -> Iterator[None]:
        """Note a pass that is evaluated while this is entered.

        The first pass of a kind is measured in bytes: how many it needs beyond those that were there before or stay.
        MLX then makes no buffer ahead of the computation, which takes longer. So of later passes seconds are noted.
        A whole graph is measured as it runs: an operation at a time it takes four times as long, and less memory than
        it does later (383 of 460 MB), when MLX allocates ahead as far as the ceiling lets it.

        Args:
            waited: gives the seconds that were waited for reads so far. They are left out of the pass's seconds.
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
        with nullcontext() if kind == GRAPH else limits().one_at_a_time():
            yield
        mx.synchronize()
        self.note(kind, direction, None, max(0, mx.get_peak_memory() - max(before, mx.get_active_memory())))


@dataclass(frozen=True)
class Rates:
    """What a machine does per second. None stands for a rate that is not known.

    Attributes:
        forward, backward, head: floating point operations of blocks' passes and of the head.
        cast: bytes that weights have after they are cast or dequantized.
        read: bytes read from the drive.
    """

    forward: float | None = None
    backward: float | None = None
    head: float | None = None
    cast: float | None = None
    read: float | None = None

    def over(self, other: "Rates") -> "Rates":
        """These rates, and the other's where one of these is not known."""
        return replace(other, **{name: rate for name, rate in asdict(self).items() if rate is not None})


class Experience:
    """What the steps of a run have taught. Before the first step that is nothing, and arithmetic's bounds hold."""

    def __init__(self):
        # (chunking, kind, direction) -> of the largest work measured, (arithmetic's bound, the bytes it needed)
        self._nbytes: dict[tuple, tuple[int, int]] = {}
        # the same key -> the most floating point operations a second (of an arrival, bytes a second)
        self._per_s: dict[tuple, float] = {}
        self._read: tuple[int, float] = (0, 0.0)  # (bytes, seconds) of the last step's reads

    def learn(self, job: Job, schedule: Schedule, step: Measurements) -> bool:
        """Learn from a step of this job under this schedule. Returns whether a figure of memory is new."""
        is_news = False
        for (kind, direction), passes in step.passes.items():
            work, bound = _work_and_bound(job, schedule, kind, direction)
            if not work:
                continue
            key = job.chunking, kind, direction
            if passes.n:
                self._per_s[key] = max(self._per_s.get(key, 0.0), passes.n * work / max(passes.seconds, 1e-9))
            if passes.nbytes and bound >= self._nbytes.get(key, (0, 0))[0]:
                self._nbytes[key] = bound, passes.nbytes
                is_news = True
        if step.read_s > 0:
            self._read = step.read_nbytes, step.read_s
        return is_news

    def knows(self, job: Job) -> bool:
        """Whether, for each pass of the job, one like it was measured."""
        passes = {(visit.kind, FORWARD, visit.forward_nbytes) for visit in job.visits}
        passes |= {(visit.kind, BACKWARD, visit.backward_nbytes) for visit in job.visits if visit.comes_back}
        largest = {key: COMPARABLE * bound for key, (bound, _) in self._nbytes.items()}
        return all(bound <= largest.get((job.chunking, *kind), -1) for *kind, bound in passes)

    def nbytes(self, job: Job, kind: str, direction: str, bound: int) -> int:
        """The most bytes that a pass needs at once. Never more than `bound`, which arithmetic says.

        MLX was seen to make more than the bound, as it makes some buffers before those they follow are freed.
        """
        measured_bound, nbytes = self._nbytes.get((job.chunking, kind, direction), (0, 0))
        if bound > COMPARABLE * measured_bound:
            return bound
        margin = SAME_WORK if bound == measured_bound else OTHER_WORK
        return min(bound, int(margin * nbytes * bound / measured_bound))

    def per_s(self, job: Job, kind: str, direction: str) -> float | None:
        """Floating point operations a second of such passes (of an arrival, bytes); None if none was measured."""
        return self._per_s.get((job.chunking, kind, direction))

    @property
    def rates(self) -> Rates:
        """What the machine did in these steps."""

        def best(*directions: str, head: bool = False) -> float | None:
            kinds = {HEAD} if head else {kind for _, kind, _ in self._per_s} - {HEAD, GRAPH}
            measured = [per_s for key, per_s in self._per_s.items() if key[1] in kinds and key[2] in directions]
            return max(measured, default=None)

        nbytes, seconds = self._read
        read = nbytes / seconds if seconds > 0 and nbytes > 0 else None
        return Rates(best(FORWARD), best(BACKWARD), best(FORWARD, BACKWARD, head=True), best(ARRIVAL), read)


def _work_and_bound(job: Job, schedule: Schedule, kind: str, direction: str) -> tuple[float, int]:
    """(flops of such a pass on average, or bytes of an arrival; arithmetic's bound of the bytes that it needs)."""
    if kind == HEAD:
        return job.head_flops, job.head_arrays_nbytes(schedule.head_tokens)
    if kind == GRAPH:
        return job.graph_flops, job.graph_arrays_nbytes(schedule.head_tokens)
    alike = [(position, visit) for position, visit in enumerate(job.visits) if visit.kind == kind]
    if direction == BACKWARD:
        alike = [(position, visit) for position, visit in alike if visit.comes_back]
    if not alike:
        return 0, 0
    if direction == ARRIVAL:
        return alike[0][1].compute_nbytes, 0
    if direction == FORWARD:
        flops = [visit.forward_flops for _, visit in alike]
        return sum(flops) / len(flops), max(visit.forward_nbytes for _, visit in alike)
    flops = [visit.backward_flops - visit.kept(schedule.kept_at(position))[1] for position, visit in alike]
    return sum(flops) / len(flops), max(visit.backward_nbytes for _, visit in alike)


# --- Between runs -------------------------------------------------------------------------------------


def remember(device: str, compute_dtype: str, matrix: tuple[int, int], rates: Rates) -> None:
    """Keep a machine's rates for later runs.

    Args:
        matrix: rows and columns of the largest matrix in a block. Large ones are multiplied faster than small ones:
            576 x 1536 at 70 GFLOP/s, 2048 x 5632 at 140 to 170, 4096 x 14336 at 200.
    """
    file = _file()
    entries = _read_entries(file)
    rates = rates.over(remembered(device, compute_dtype, matrix))
    for entry, names in _rates_by_entry(device, compute_dtype, matrix).items():
        entries[entry] = {name: getattr(rates, name) for name in names}
    unfinished = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            unfinished.write_text(json.dumps(entries, indent=1))
            os.replace(unfinished, file)
        finally:
            unfinished.unlink(missing_ok=True)


def remembered(device: str, compute_dtype: str, matrix: tuple[int, int]) -> Rates:
    """What earlier runs on this machine measured, with matrices of about this size."""
    entries, rates = _read_entries(_file()), {}
    for entry, names in _rates_by_entry(device, compute_dtype, matrix).items():
        content = entries.get(entry)
        for name in names if isinstance(content, dict) else ():
            rate = content.get(name)
            if isinstance(rate, int | float) and 0 < rate < float("inf"):
                rates[name] = float(rate)
    return Rates(**rates)


def _rates_by_entry(device: str, compute_dtype: str, matrix: tuple[int, int]) -> dict[str, tuple[str, ...]]:
    """Name of an entry in the file -> names of the rates in it."""
    machine = f"{device}, {compute_dtype}"
    size = MATRIX_SIZES_RATIO ** round(math.log(math.prod(matrix), MATRIX_SIZES_RATIO))
    return {machine: ("cast", "read"), f"{machine}, matrices of {size} values": ("forward", "backward", "head")}


def _file() -> Path:
    return platform.cache_directory() / "rates.json"


def _read_entries(file: Path) -> dict:
    try:
        entries = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return entries if isinstance(entries, dict) else {}
