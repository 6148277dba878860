"""Which items give their place up, and when, where the visits to come are known: Belady's evictions.

Comes in: visits to items, sizes, a capacity at each visit. Goes out: what is missing when it is visited, and what stays
until it is visited again. (Belady, IBM Systems Journal 5(2), 1966: who is used furthest in the future goes.)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Evictions:
    """What becomes of the items.

    Attributes:
        missing: at each visit, whether its item is not in memory and has to be read.
        stays: at each visit, whether its item stays in memory until it is visited next.
        given_up: of what was in memory at first, what goes before it is visited, or is not.
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
    """The fewest reads for these visits.

    Args:
        visits: items; None for one that needs none.
        nbytes: of each item, what it takes of the capacity.
        capacities: at each visit. One that finds its item in memory may leave it until then at no more than before.
        slots: 2 if an item is in use until the next one is there, 1 if it makes room at once.
        content: items in memory at first, with the bytes they take.
    """
    content = dict(content or {})
    following, next_seen = [0] * len(visits), {}
    for at in reversed(range(len(visits))):
        following[at] = next_seen.get(visits[at], len(visits))
        next_seen[visits[at]] = at
    wanted = {item: next_seen.get(item, len(visits)) for item in content}  # in memory -> when it is visited next
    missing, stays = [False] * len(visits), [False] * len(visits)
    given_up = content.keys() - next_seen.keys()
    last_visit: dict[int, int] = {}
    used = sum(content.values())
    for at, item in enumerate(visits):
        if item is None:
            continue
        if item in wanted:
            if item in last_visit:
                stays[last_visit[item]] = True
        else:
            missing[at] = True
            content[item] = nbytes[item]
            used += content[item]
        wanted[item], last_visit[item] = following[at], at
        spared = {item} if missing[at] or slots > 1 else set()
        in_use = visits[at - 1] if slots > 1 and missing[at] and at else None
        places = []
        while used > capacities[at] and len(wanted) > len(spared):
            others = [other for other in wanted if other not in spared]
            victim = max([other for other in others if other != in_use] or others, key=wanted.get)
            del wanted[victim]
            places.append(content.pop(victim))
            used -= places[-1]
            if victim not in last_visit:
                given_up.add(victim)
        if missing[at] and (larger := min((place for place in places if place >= nbytes[item]), default=0)):
            used += larger - content[item]  # it is read to where that was
            content[item] = larger
    return Evictions(missing, stays, given_up)
