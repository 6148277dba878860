"""When blocks are read while others compute: what every step reads again, and how long a step takes.

Takes the order in which a step visits blocks, their sizes, seconds of computing, and the drive's rate. Gives `Read`s
and seconds of a round, which is one of many equal steps. Only calculates, by the rules of `weights.cache.BlockCache`.
"""

import functools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from ..weights.evictions import evictions

ROUNDS = 3  # rounds are gone through, and the last is reported: by then each round is like the one before


@dataclass(frozen=True)
class Read:
    """A read of `nbytes` bytes for the visit number `visit` of a round.

    Attributes:
        after: the visit that makes room for it when it is done with its buffer; below 0 in the round before.
        at_once: whether there is room as soon as that visit begins.
    """

    visit: int
    nbytes: int
    after: int
    at_once: bool = False


@dataclass(frozen=True)
class Work:
    """What a visit does besides reading its item.

    Attributes:
        freed_s, seconds: seconds of computing until the item's buffer may take another item, and in all.
        read_nbytes, written_nbytes: bytes that go from and to the drive besides.
        inline_rate: the share of the drive's rate that these get while nothing is computed; None if something is.
    """

    freed_s: float
    seconds: float
    read_nbytes: int = 0
    written_nbytes: int = 0
    inline_rate: float | None = None


def reads_of(
    order: Sequence[int | None], sizes: Sequence[int], footprints: Sequence[int], capacities: Sequence[int], slots: int
) -> tuple[Read, ...]:
    """Reads of one round, if rounds follow each other for ever and evictions are the best there are (Belady's).

    Args:
        order: the item of each visit; None for a visit that needs no item.
        sizes: bytes of each item.
        footprints: what each item takes of the capacity.
        capacities: the capacity at each visit.
        slots: 2 if an item is in use until the next one is there, 1 if it makes room at once.
    """
    if sum(footprints[item] for item in {*order} - {None}) <= min(capacities):
        return ()
    return _reads_of(tuple(order), tuple(sizes), tuple(footprints), tuple(capacities), slots)


@functools.lru_cache(4096)
def _reads_of(order, sizes, footprints, capacities, slots) -> tuple[Read, ...]:
    n = len(order)
    visits, capacities = order * (ROUNDS + 1), capacities * (ROUNDS + 1)
    best = evictions(visits, footprints, capacities, slots)

    # what has to be in memory during each visit, and after it is done with its item
    during, after, used = [], [], 0
    for at, item in enumerate(visits):
        used += footprints[item] if best.missing[at] else 0
        during.append(used)
        used -= footprints[item] if item is not None and not best.stays[at] else 0
        after.append(used)
    reads, last_round = [], (ROUNDS - 1) * n
    for at, item in enumerate(visits[: ROUNDS * n]):
        if best.missing[at]:
            begin, at_once = _read_early(at, footprints[item], during, after, capacities, slots)
            if at >= last_round:
                reads.append(Read(at - last_round, sizes[item], max(begin - last_round, -n), at_once))
    return tuple(reads)


def _read_early(
    at: int, footprint: int, during: list[int], after: list[int], capacities: Sequence[int], slots: int
) -> tuple[int, bool]:
    """(the first visit since which there is room for the missing item of visit `at`, whether as soon as it begins).

    The item is added to what is in memory between the two visits.
    """
    for early in reversed(range(at)):
        if after[early] + footprint > capacities[early]:
            return early + 1, True
        after[early] += footprint
        # (a block that does not stay gives its place up once the capacity is less)
        capacity = capacities[early] if slots > 1 else max(capacities[max(early - 1, 0) : early + 1])
        if during[early] + footprint > capacity:
            return early, False
        during[early] += footprint
    return 0, False


def step_seconds(
    reads: Sequence[Read], works: Sequence[Work], read_bytes_per_s: float, write_bytes_per_s: float
) -> float:
    """Seconds of one round. Each read starts as soon as the one before is done and there is room for it."""
    n, now, begin = len(works), 0.0, 0.0
    drive = 0.0  # when the drive has done what it was asked to
    room = {(visit, at_once): 0.0 for visit in range(-n, 0) for at_once in (False, True)}  # -> when there is room
    for _ in range(ROUNDS):
        begin, waiting, done = now, deque(reads), {}
        for visit, work in enumerate(works):
            # Reads that could start by now have started. The visit waits for the reads that it needs.
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
