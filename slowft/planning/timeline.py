"""When blocks are read while others compute: what is read again in every step, and how long a step takes.

Comes in: the order in which a step visits blocks, their sizes, seconds of computing, the drive's rate. Goes out:
`Read`s and seconds. Follows the rules of `storage.cache.BlockCache`. Only calculates.
"""

import functools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

ROUNDS = 3  # gone through: what is told of the last has settled


@dataclass(frozen=True)
class Read:
    """A read for the visit number `visit` of a round, of `nbytes` bytes.

    Attributes:
        after: the visit whose item makes room for it, which is done with its buffer then; below 0 in the round before.
    """

    visit: int
    nbytes: int
    after: int


@dataclass(frozen=True)
class Work:
    """What is done at a visit, but for reading its item.

    Attributes:
        freed_s: seconds of computing until its item's buffer may take another; seconds: until it is done.
        read_nbytes, written_nbytes: that go from and to the drive meanwhile.
        inline_rate: of the drive's rate, what is read with nothing computed beside; None: it is read beside.
    """

    freed_s: float
    seconds: float
    read_nbytes: int = 0
    written_nbytes: int = 0
    inline_rate: float | None = None


def reads_of(
    order: Sequence[int | None],
    sizes: Sequence[int],
    held: Sequence[int],
    capacity: int,
    spares_last: bool = False,
) -> tuple[Read, ...]:
    """Reads of one round of a visit order that is gone through for ever, with the best evictions (Belady's).

    Args:
        order: of items; None for a visit that needs none.
        sizes: of each item, in bytes; held: what it takes of `capacity`.
        spares_last: whether the item of the visit before is still in use when an item is read.
    """
    if sum(held[item] for item in {*order} - {None}) <= capacity:
        return ()
    return _belady(tuple(order), tuple(sizes), tuple(held), capacity, spares_last)


@functools.lru_cache(4096)
def _belady(order, sizes, held, capacity, spares_last) -> tuple[Read, ...]:
    n = len(order)
    visits = order * (ROUNDS + 1)
    following, next_seen = [0] * len(visits), {}
    for at in reversed(range(len(visits))):
        following[at] = next_seen.get(visits[at], len(visits))
        next_seen[visits[at]] = at
    wanted: dict[int, int] = {}  # item in memory -> when it is wanted next
    last_visit: dict[int, int] = {}
    used, reads, settled = 0, [], (ROUNDS - 1) * n
    for at, item in enumerate(visits[: ROUNDS * n]):
        if item is None:
            continue
        if item not in wanted:
            used += held[item]
            after = settled - n
            while wanted and used > capacity:
                before = visits[at - 1] if spares_last and at else None
                victims = [other for other in wanted if other != before] or list(wanted)
                victim = max(victims, key=wanted.get)
                del wanted[victim]
                used -= held[victim]
                after = max(after, last_visit[victim])
            if at >= settled:
                reads.append(Read(at - settled, sizes[item], after - settled))
        wanted[item], last_visit[item] = following[at], at
    return tuple(reads)


def step_seconds(
    reads: Sequence[Read], works: Sequence[Work], read_bytes_per_s: float, write_bytes_per_s: float
) -> float:
    """Seconds of one round: each read starts as soon as the one before is done and there is room for it."""
    n, now, drive, begin = len(works), 0.0, 0.0, 0.0  # drive: when it has done what it was asked to
    freed = dict.fromkeys(range(-n, 0), 0.0)  # visit -> when its item's buffer may take another
    for _ in range(ROUNDS):
        begin, waiting, done = now, deque(reads), {}
        for visit, work in enumerate(works):
            # what could start by now has; what this visit needs holds it up
            while waiting and (waiting[0].visit == visit or max(drive, freed.get(waiting[0].after, now)) < now):
                read = waiting.popleft()
                done[read.visit] = drive = max(drive, freed[read.after]) + read.nbytes / read_bytes_per_s
            now = max(now, done.get(visit, now))
            drive_s = work.read_nbytes / read_bytes_per_s + work.written_nbytes / write_bytes_per_s
            if work.inline_rate is not None and drive_s:
                now = drive = max(now, drive) + drive_s / work.inline_rate
                drive_s = 0.0
            freed[visit] = now + work.freed_s
            if drive_s:
                drive = max(drive, now) + drive_s
            now = max(now + work.seconds, drive if drive_s else 0.0)
        freed = {visit - n: at for visit, at in freed.items() if visit >= 0}
    return now - begin
