"""Decides which blocks' bytes are in memory: a capacity, a known visit order, reads ahead, Belady's evictions.

Comes in: items (each a list of byte ranges) and, at every visit, the order of the visits to come. Goes out: one filled
MLX byte buffer per item. Buffers are handed on from item to item, because fresh pages are slow: a block's cast takes
0.137 s into fresh memory, 0.015 s into warm. The cache never knows what the bytes mean.

It reads ahead the missing item that is visited soonest. That item takes the place of one which would be evicted anyway
before its own next visit (`evictions`), as soon as that one has served its last visit. No other item is evicted for it,
so reading ahead reads no more than reading on demand with perfect foresight does ("Conservative" in Cao, Felten,
Karlin, Li: A study of integrated prefetching and caching strategies, SIGMETRICS 1995). The capacity may differ from
visit to visit.

All methods are called by the thread that computes. Reads happen on the reader's thread.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import mlx.core as mx

from ..memory import limits
from .buffers import read_buffer
from .evictions import evictions
from .reader import ByteRange, Reader

NEVER = float("inf")
READS_AHEAD = 2  # one under way and one waiting: the cache can ask for more only when it is called, once a visit


@dataclass
class _Resident:
    buffer: mx.array
    read: Future
    pinned: bool = False


class BlockCache:
    """Keeps items in at most `capacity` bytes and reads the next one while the present one computes.

    Attributes:
        capacity: bytes for all buffers together. It may be changed at any time, down to `least_capacity`; more than
            `largest_capacity` is of no use. If it is lowered, `trim` or the next visit gives the memory back.
        slots: 2 if the caller computes with the buffer itself. The next visit's item is then read beside it even where
            this buffer would be the best one to evict. That costs up to one read more per pass, but no read waits
            for `release`. 1 if the caller copies what it needs out of the buffer and calls `release` before it
            computes. The same buffer then takes the next item meanwhile, and reads are the fewest that the capacity
            allows. It may be changed at any time.

    Args:
        items: for each item, the byte ranges that fill its buffer.
        capacity: at least `slots` times the largest item is always allowed. (A buffer may hold a smaller item than it
            was made for.)
    """

    def __init__(self, reader: Reader, items: Sequence[Sequence[ByteRange]], capacity: int = 0, slots: int = 2):
        self._reader = reader
        self._items: list[list[ByteRange]] = []
        self.nbytes: list[int] = []
        for ranges in items:
            self.add(ranges)
        self.largest_capacity = sum(self.nbytes)
        self.slots = slots
        self._used_items = range(len(self._items))
        self.capacity = max(capacity, self.least_capacity)
        self._residents: dict[int, _Resident] = {}
        self._free: list[mx.array] = []
        self._upcoming: list[int] = []  # the items of the visits to come
        self._temporary: list[int] = []  # bytes allowed beyond `capacity`: at the present visit, then at each to come

    @property
    def least_capacity(self) -> int:
        """Bytes of `slots` buffers for the largest item."""
        return self.slots * max((self.nbytes[item] for item in self._used_items), default=0)

    def add(self, ranges: Iterable[ByteRange]) -> int:
        """Add an item. Returns its number."""
        self._items.append(list(ranges))
        self.nbytes.append(max((r.at + r.nbytes for r in self._items[-1]), default=0))
        return len(self._items) - 1

    def use(self, items: Sequence[int]) -> None:
        """From now on `least_capacity` is what these items need. (Others may be visited if they fit.)"""
        self._used_items = list(items)

    def holds(self, item: int) -> bool:
        """Whether `item` is in memory or is being read."""
        return item in self._residents

    def is_read(self, item: int) -> bool:
        """Whether `take` would find `item` in memory without waiting."""
        return item in self._residents and self._residents[item].read.done()

    def take(self, item: int, upcoming: Iterable[int], temporary: Iterable[int] = ()) -> mx.array:
        """The filled uint8 buffer of `item`, in use until `release`. Starts reading what comes next if it may.

        Args:
            upcoming: the items to be visited after this one, soonest first; may be endless.
            temporary: bytes that may be held beyond `capacity`: from this visit on, then from each visit to come on.
                (With one slot and an item in memory, a lower number counts only once the item is released.)
        """
        self._upcoming = list(itertools.islice(upcoming, 8 * len(self._items)))
        previous = self._temporary_at(0)
        self._temporary = list(itertools.islice(temporary, len(self._upcoming) + 1))
        if item in self._residents:
            self._residents[item].pinned = True
            if self.slots > 1 or self._temporary_at(0) >= previous:
                self._shrink()
        else:
            self._shrink()
            victims = self._victims(item, self._unpinned())
            if victims is None:
                raise RuntimeError("every block buffer is in use: release one first")
            self._start(item, victims)
        resident = self._residents[item]
        resident.pinned = True
        try:
            self._reader.wait(resident.read)
        except BaseException:
            del self._residents[item]
            raise
        self._read_ahead()
        return resident.buffer

    def release(self, item: int) -> None:
        """From now on the buffer may take another item. It does so at once if that is the best use of it."""
        if item in self._residents:
            self._residents[item].pinned = False
        self._shrink()
        self._read_ahead()

    def trim(self) -> None:
        """Give back what is held beyond `capacity`, except for what is in use."""
        self._temporary = []
        self._shrink()

    def clear(self) -> None:
        """Forget every item and give the memory back."""
        self._upcoming, self._temporary = [], []
        for item in list(self._residents):
            self._evict(item)
        self._free.clear()

    def _shrink(self) -> None:
        """Give memory back to the system if the capacity was lowered: free buffers, then items visited latest."""
        if self.held_nbytes() <= self._capacity_at(0):
            return
        next_use = self._next_use()
        with limits().freeing_to_the_system():
            while self.held_nbytes() > self._capacity_at(0) and (self._free or self._unpinned()):
                if self._free:
                    self._free.pop()
                else:
                    self._evict(max(self._unpinned(), key=lambda i: next_use.get(i, NEVER)))

    def _read_ahead(self) -> None:
        """Read the missing items that are visited soonest, at most `READS_AHEAD`, where that costs no other read."""
        while sum(not resident.read.done() for resident in self._residents.values()) < READS_AHEAD:
            if self.held_nbytes() > self._capacity_at(0):
                return  # until `release`
            item = next((item for item in self._upcoming if item not in self._residents), None)
            if item is None:
                return
            content = {i: r.buffer.nbytes for i, r in self._residents.items()}
            given_up = self._given_up(content)
            victims = self._victims(item, [i for i in given_up if not self._residents[i].pinned])
            if victims is None:
                return
            new_content = {i: nbytes for i, nbytes in content.items() if i not in victims} | {item: self.nbytes[item]}
            if not self._given_up(new_content) <= given_up:
                return
            self._start(item, victims)

    def _given_up(self, content: Mapping[int, int]) -> set[int]:
        """The items of `content` (item -> bytes it takes) that would be evicted before their next visit."""
        next_use = self._next_use()
        visits = self._upcoming[: 1 + max((next_use.get(item, -1) for item in content), default=-1)]
        capacities = [self._capacity_at(1 + at) for at in range(len(visits))]
        return evictions(visits, self.nbytes, capacities, self.slots, content).given_up

    def _capacity_at(self, visit: int) -> int:
        """The capacity at the present visit (0) or at a later one, temporary bytes included."""
        return self.capacity + self._temporary_at(visit)

    def _temporary_at(self, visit: int) -> int:
        return self._temporary[visit] if visit < len(self._temporary) else 0

    def _victims(self, item: int, candidates: Iterable[int]) -> list[int] | None:
        """The candidates to evict for `item`: those visited latest, until it fits. None if nothing makes it fit."""
        needed, victims = self.nbytes[item], []
        room = self._capacity_at(0) - sum(r.buffer.nbytes for r in self._residents.values())
        if room >= needed or any(b.nbytes >= needed for b in self._free):
            return victims
        next_use = self._next_use()
        for victim in sorted(candidates, key=lambda i: next_use.get(i, NEVER), reverse=True):
            victims.append(victim)
            nbytes = self._residents[victim].buffer.nbytes
            room += nbytes
            if room >= needed or nbytes >= needed:
                return victims
        return None

    def _start(self, item: int, victims: list[int]) -> None:
        """Evict `victims` and begin to read `item`."""
        self._free += [self._evict(victim) for victim in victims]
        buffer = self._free_buffer(self.nbytes[item])
        self._residents[item] = _Resident(buffer, self._reader.submit(self._items[item], memoryview(buffer)))

    def _free_buffer(self, nbytes: int) -> mx.array:
        fitting = [b for b in self._free if b.nbytes >= nbytes]
        if fitting:
            buffer = min(fitting, key=lambda b: b.nbytes)
            self._free = [b for b in self._free if b is not buffer]
            return buffer
        while self._free and self.held_nbytes() + nbytes > self._capacity_at(0):  # those that are free are too small
            self._free.pop(0)
        return read_buffer(nbytes)

    def _evict(self, item: int) -> mx.array:
        """Forget `item`, once its read has ended if it had begun. Returns its buffer."""
        resident = self._residents.pop(item)
        if not resident.read.cancel():
            resident.read.exception()
        return resident.buffer

    def _unpinned(self) -> list[int]:
        return [i for i, r in self._residents.items() if not r.pinned]

    def held_nbytes(self) -> int:
        """Bytes of all buffers, in use or free."""
        return sum(b.nbytes for b in self._free) + sum(r.buffer.nbytes for r in self._residents.values())

    def _next_use(self) -> dict[int, int]:
        """Item -> how many visits come before its next one."""
        next_use: dict[int, int] = {}
        for visit, item in enumerate(self._upcoming):
            next_use.setdefault(item, visit)
        return next_use
