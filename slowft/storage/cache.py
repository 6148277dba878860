"""Which blocks' bytes are in memory: a capacity, a known visit order, reads ahead, Belady's eviction.

Comes in: items (each a list of byte ranges) and, at every visit, the order of the visits to come. Goes out:
one MLX byte buffer per item, filled. Buffers are handed on from item to item, because fresh pages are
dear (DESIGN.md: 0.137 s against 0.015 s for a block's cast). Never knows what the bytes mean.

What is missing soonest is read next, into the place of what Belady (IBM Systems Journal 5(2), 1966) would evict
at the visit that needs it: the item used furthest after that visit. The read starts as soon as that item has
served its last visit before, and never takes another's place to start sooner ("Conservative" in Cao, Felten,
Karlin, Li: A study of integrated prefetching and caching strategies, SIGMETRICS 1995), so reading ahead reads no
more than reading on demand with perfect foresight does.

All methods are called by one thread, the one that computes; the reads happen on the reader's.
"""

import itertools
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import mlx.core as mx

from .buffers import read_buffer
from .reader import ByteRange, Reader

NEVER = float("inf")
READS_AHEAD = 2  # under way and waiting: calls of the cache, at which it could ask for more, are a visit apart


@dataclass
class _Resident:
    buffer: mx.array
    read: Future
    pinned: bool = False


class BlockCache:
    """Keeps items in at most `capacity` bytes and reads the next one while the present one computes.

    Attributes:
        capacity: may be changed at any time, down to `least_capacity`; more than `largest_capacity` is no use. If
            lowered, `trim` or the next visit gives the memory back.
        slots: 2 if an item is in use while it computes: the next visit's is read beside it even where its buffer
            would be the best to give up, which costs up to one read more a pass, but no read waits for `release`.
            1 if the caller copies what it needs out of the buffer and calls `release` before it computes: the
            same buffer takes the next item meanwhile, and reads are the fewest that the capacity allows. May be
            changed at any time.

    Args:
        items: for each item, the byte ranges that fill its buffer.
        capacity: bytes for all buffers together; at least `slots` times the largest item is always allowed. (A
            buffer may hold a smaller item than it was made for.)
    """

    def __init__(self, reader: Reader, items: Sequence[Sequence[ByteRange]], capacity: int = 0, slots: int = 2):
        self._reader = reader
        self._items: list[list[ByteRange]] = []
        self.nbytes: list[int] = []
        for ranges in items:
            self.add(ranges)
        self.largest_capacity = sum(self.nbytes)
        self.slots = slots
        self._in_use = range(len(self._items))
        self.capacity = max(capacity, self.least_capacity)
        self._residents: dict[int, _Resident] = {}
        self._free: list[mx.array] = []
        self._upcoming: list[int] = []  # the visits after the last one

    @property
    def least_capacity(self) -> int:
        return self.slots * max((self.nbytes[item] for item in self._in_use), default=0)

    def add(self, ranges: Iterable[ByteRange]) -> int:
        """One more item; returns its number."""
        self._items.append(list(ranges))
        self.nbytes.append(max((r.at + r.nbytes for r in self._items[-1]), default=0))
        return len(self._items) - 1

    def use(self, items: Sequence[int]) -> None:
        """From now on `least_capacity` is what these items need. (Others may be visited if they fit.)"""
        self._in_use = list(items)

    def holds(self, item: int) -> bool:
        """Whether `item` is in memory, or being read."""
        return item in self._residents

    def take(self, item: int, upcoming: Iterable[int]) -> mx.array:
        """The filled uint8 buffer of `item`, in use until `release`. Starts reading what comes next, if it may.

        Args:
            upcoming: the items to be visited after this one, soonest first; may be endless.
        """
        self._upcoming = list(itertools.islice(upcoming, 8 * len(self._items)))
        if item in self._residents:
            self._residents[item].pinned = True
        self._shrink()
        if item not in self._residents:
            victims = self._victims(item)
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
        """The buffer may take another item from now on, and does at once if that is the best use of it."""
        if item in self._residents:
            self._residents[item].pinned = False
        self._read_ahead()

    def trim(self) -> None:
        """Give back what is held beyond `capacity` now, but for what is in use; to the system, not to MLX's cache."""
        if self._shrink():
            mx.clear_cache()

    def clear(self) -> None:
        """Forget every item and give the memory back."""
        self._upcoming = []
        for item in list(self._residents):
            self._evict(item)
        self._free.clear()

    def _shrink(self) -> bool:
        """Give memory back if the capacity was lowered: free buffers first, then what is used last."""
        next_use, shrunk = self._next_use(), False
        while self._held() > self.capacity and (self._free or self._unpinned()):
            shrunk = True
            if self._free:
                self._free.pop()
            else:
                self._evict(max(self._unpinned(), key=lambda i: next_use.get(i, NEVER)))
        return shrunk

    def _read_ahead(self) -> None:
        """Have the reader read what is missing soonest, and one thing more, unless what to evict is needed before."""
        while sum(not resident.read.done() for resident in self._residents.values()) < READS_AHEAD:
            missing = ((visit, item) for visit, item in enumerate(self._upcoming) if item not in self._residents)
            visit, item = next(missing, (-1, -1))  # the visit that needs it, counted from now
            if item < 0:
                return
            in_use = {i for i, r in self._residents.items() if r.pinned}
            spared = set()
            if self.slots > 1:  # in use when `item` is read at the latest
                spared = {self._upcoming[visit - 1]} if visit else in_use
            victims = self._victims(item, visit, spared)
            if victims is None or not in_use.union(self._upcoming[:visit]).isdisjoint(victims):
                return
            self._start(item, victims)

    def _victims(self, item: int, visit: int = -1, spared: Iterable[int] = ()) -> list[int] | None:
        """What to evict for `item`: whatever is used furthest after the `visit`-th visit from now, until it fits.

        For a visit to come (not -1), that may be what is still in use now. None if nothing makes it fit.
        """
        need, victims = self.nbytes[item], []
        room = self.capacity - sum(r.buffer.nbytes for r in self._residents.values())
        if room >= need or any(b.nbytes >= need for b in self._free):
            return victims
        next_use, later = self._next_use(), self._next_use(visit + 1)
        order = [i for i, r in self._residents.items() if i not in spared and not (visit < 0 and r.pinned)]
        # of several that are never used after it, first what is not used before it either
        order.sort(key=lambda i: (later.get(i, NEVER), next_use.get(i, NEVER), not self._residents[i].pinned))
        while order:
            victims.append(order.pop())
            nbytes = self._residents[victims[-1]].buffer.nbytes
            room += nbytes
            if room >= need or nbytes >= need:
                return victims
        return None

    def _start(self, item: int, victims: list[int]) -> None:
        """Begin to read `item` in place of `victims`."""
        self._free += [self._evict(victim) for victim in victims]
        buffer = self._free_buffer(self.nbytes[item])
        self._residents[item] = _Resident(buffer, self._reader.submit(self._items[item], memoryview(buffer)))

    def _free_buffer(self, nbytes: int) -> mx.array:
        fitting = [b for b in self._free if b.nbytes >= nbytes]
        if fitting:
            buffer = min(fitting, key=lambda b: b.nbytes)
            self._free = [b for b in self._free if b is not buffer]
            return buffer
        while self._free and self._held() + nbytes > self.capacity:  # all too small
            self._free.pop(0)
        return read_buffer(nbytes)

    def _evict(self, item: int) -> mx.array:
        """Forget `item`, after its read if that has begun. Returns its buffer."""
        resident = self._residents.pop(item)
        if not resident.read.cancel():
            resident.read.exception()
        return resident.buffer

    def _unpinned(self) -> list[int]:
        return [i for i, r in self._residents.items() if not r.pinned]

    def _held(self) -> int:
        return sum(b.nbytes for b in self._free) + sum(r.buffer.nbytes for r in self._residents.values())

    def _next_use(self, start: int = 0) -> dict[int, int]:
        """Item -> which visit from now first uses it, not counting those before the `start`-th."""
        next_use: dict[int, int] = {}
        for visit in range(start, len(self._upcoming)):
            next_use.setdefault(self._upcoming[visit], visit)
        return next_use
