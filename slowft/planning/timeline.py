"""When blocks are read while others compute: what is read again in every step, and how long a step takes.

Comes in: the order in which a step visits blocks, their sizes, seconds of computing, the drive's rate. Goes out:
`Read`s and seconds. Follows the rules of `storage.cache.BlockCache`. Only calculates.
"""

import functools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from ..weights.evictions import evictions

ROUNDS = 3  # gone through: what is told of the last has settled


@dataclass(frozen=True)
class Read:
    """A read for the visit number `visit` of a round, of `nbytes` bytes.

    Attributes:
        after: the visit whose item makes room for it, which is done with its buffer then; below 0 in the round before.
        at_once: there is room for it as soon as that visit begins.
    """

    visit: int
    nbytes: int
    after: int
    at_once: bool = False


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
    capacities: Sequence[int],
    slots: int,
) -> tuple[Read, ...]:
    """Reads of one round of a visit order that is gone through for ever, with the best evictions (Belady's).

    Args:
        order: of items; None for a visit that needs none.
        sizes: of each item, in bytes; held: what it takes of the capacity.
        capacities: at each visit.
        slots: 2 if an item is in use until the next one is there, 1 if it makes room at once.
    """
    if sum(held[item] for item in {*order} - {None}) <= min(capacities):
        return ()
    return _reads_of(tuple(order), tuple(sizes), tuple(held), tuple(capacities), slots)


@functools.lru_cache(4096)
def _reads_of(order, sizes, held, capacities, slots) -> tuple[Read, ...]:
    n = len(order)
    visits, capacities = order * (ROUNDS + 1), capacities * (ROUNDS + 1)
    found = evictions(visits, held, capacities, slots)

    # what has to be in memory at each visit, and from when its item is done with
    least, rest, used = [], [], 0
    for at, item in enumerate(visits):
        used += held[item] if found.missing[at] else 0
        least.append(used)
        used -= held[item] if item is not None and not found.stays[at] else 0
        rest.append(used)
    reads, settled = [], (ROUNDS - 1) * n
    for at, item in enumerate(visits[: ROUNDS * n]):
        if found.missing[at]:
            after, at_once = _read_early(at, held[item], least, rest, capacities, slots)
            if at >= settled:
                reads.append(Read(at - settled, sizes[item], max(after - settled, -n), at_once))
    return tuple(reads)


def _read_early(
    at: int, held: int, least: list[int], rest: list[int], capacities: Sequence[int], slots: int
) -> tuple[int, bool]:
    """The visit from which on there is room for the missing item of visit `at`, and whether as soon as that begins.

    Adds the item to what is in memory between.
    """
    for early in reversed(range(at)):
        if rest[early] + held > capacities[early]:
            return early + 1, True
        rest[early] += held
        # (a block that does not stay gives its place up once the capacity is less)
        capacity = capacities[early] if slots > 1 else max(capacities[max(early - 1, 0) : early + 1])
        if least[early] + held > capacity:
            return early, False
        least[early] += held
    return 0, False


def step_seconds(
    reads: Sequence[Read], works: Sequence[Work], read_bytes_per_s: float, write_bytes_per_s: float
) -> float:
    """Seconds of one round: each read starts as soon as the one before is done and there is room for it."""
    n, now, drive, begin = len(works), 0.0, 0.0, 0.0  # drive: when it has done what it was asked to
    room = {(visit, at_once): 0.0 for visit in range(-n, 0) for at_once in (False, True)}  # -> when it is there
    for _ in range(ROUNDS):
        begin, waiting, done = now, deque(reads), {}
        for visit, work in enumerate(works):
            # what could start by now has; what this visit needs holds it up
            while waiting:
                read = waiting[0]
                start = max(drive, room.get((read.after, read.at_once), now))
                if read.visit != visit and start >= now:
                    break
                done[read.visit] = drive = start + waiting.popleft().nbytes / read_bytes_per_s
            room[visit, True] = now
            now = max(now, done.get(visit, now))
            drive_s = work.read_nbytes / read_bytes_per_s + work.written_nbytes / write_bytes_per_s
            if work.inline_rate is not None and drive_s:
                now = drive = max(now, drive) + drive_s / work.inline_rate
                drive_s = 0.0
            room[visit, False] = now + work.freed_s
            if drive_s:
                drive = max(drive, now) + drive_s
            now = max(now + work.seconds, drive if drive_s else 0.0)
        room = {(visit - n, at_once): at for (visit, at_once), at in room.items() if visit >= 0}
    return now - begin
