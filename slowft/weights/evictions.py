"""Decides which items are evicted and when, where the visits to come are known: Belady's evictions.

Comes in: visits to items, sizes, a capacity at each visit. Goes out: which items are missing when they are visited, and
which stay until they are visited again. (Belady, IBM Systems Journal 5(2), 1966: the item that is used furthest in the
future is evicted.)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Evictions:
    """What happens to the items.

    Attributes:
        missing: for each visit, whether its item is not in memory and has to be read.
        stays: for each visit, whether its item stays in memory until its next visit.
        given_up: the items in memory at first that are evicted before their first visit, or have no visit.
    """

    missing: list[bool]
    stays: list[bool]
    given_up: set[int]


def evictions(
    visits: Sequence[int | None],
    nbytes: Sequence[int],
    capacities: Sequence[int],
    slots: int,
    content: Mapping[int, int] | None = None,
) -> Evictions:
    """The evictions that need the fewest reads for these visits.

    Args:
        visits: the item of each visit; None for a visit that needs none.
        nbytes: bytes of capacity that each item takes.
        capacities: the capacity at each visit. If the visit's item is in memory by then, a lower capacity than before
            may come to count only after the visit.
        slots: 2 if an item is in use until the next one is there, 1 if it makes room at once.
        content: items in memory at first, with the bytes they take.
    """
    content = dict(content or {})
    following, first_visit = [0] * len(visits), {}  # for each visit, the next one to its item; for each item, its first
    for at in reversed(range(len(visits))):
        following[at] = first_visit.get(visits[at], len(visits))
        first_visit[visits[at]] = at
    next_visit = {item: first_visit.get(item, len(visits)) for item in content}  # of each item in memory
    missing, stays = [False] * len(visits), [False] * len(visits)
    given_up = content.keys() - first_visit.keys()
    last_visit: dict[int, int] = {}
    used = sum(content.values())
    for at, item in enumerate(visits):
        if item is None:
            continue
        if item in next_visit:
            if item in last_visit:
                stays[last_visit[item]] = True
        else:
            missing[at] = True
            content[item] = nbytes[item]
            used += content[item]
        next_visit[item], last_visit[item] = following[at], at
        pinned = {item} if missing[at] or slots > 1 else set()
        in_use = visits[at - 1] if slots > 1 and missing[at] and at else None
        freed = []  # bytes of the buffers that victims leave
        while used > capacities[at] and len(next_visit) > len(pinned):
            others = [other for other in next_visit if other not in pinned]
            victim = max([other for other in others if other != in_use] or others, key=next_visit.get)
            del next_visit[victim]
            freed.append(content.pop(victim))
            used -= freed[-1]
            if victim not in last_visit:
                given_up.add(victim)
        if missing[at] and (buffer_nbytes := min((n for n in freed if n >= nbytes[item]), default=0)):
            used += buffer_nbytes - content[item]  # the item is read into that victim's buffer, and takes all of it
            content[item] = buffer_nbytes
    return Evictions(missing, stays, given_up)
