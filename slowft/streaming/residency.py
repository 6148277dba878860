"""Puts a unit's weights in place on the compute thread, runs what was asked, and takes them away again.

Comes in: a unit and the jobs that want its weights. Goes out: the jobs' results. Decides what is read next
from the order in which a step visits the blocks. Knows nothing of gradients.
"""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx

from .. import tracing
from ..models.seams import Unit
from ..models.weights import Layout, casting_streams, read_held, read_rows, read_whole
from ..storage.cache import BlockCache
from ..storage.reader import Reader
from .threads import Worker


class Residency:
    """The weights of a model's units, in memory only while they are used (or while there is room).

    Attributes:
        compute_s: seconds spent computing, casting included, waiting for reads left out.
    """

    def __init__(self, blocks: Sequence[Unit], reader: Reader):
        self.reader = reader
        self._blocks = list(blocks)
        self._head: list[Unit] = []  # outside layers that are read together, as one more block
        self._stream([])
        self._thread = Worker("slowft-compute")
        self._streams = self._thread.run(casting_streams)
        self._order: list[int] = []
        self._position = -1
        self._outside: list[Unit] = []  # large layers outside the blocks whose weights are in place now
        self._whole: dict[Unit, list[mx.array]] = {}  # units whose weights, ready to compute with, stay in memory
        self._held: dict[Unit, list[list[mx.array]]] = {}  # of blocks that stay in memory packed: each param's parts
        self.compute_s = 0.0
        self.cache_nbytes = mx.set_cache_limit(0)  # of freed buffers that MLX keeps while a block is computed
        mx.set_cache_limit(self.cache_nbytes)

    def _stream(self, head: Sequence[Unit]) -> None:
        """Begin with an empty cache, of blocks and, if there are any, of these layers, as the item behind the last."""
        self._head = list(head)
        params = [unit.params for unit in self._blocks] + ([[p for u in head for p in u.params]] if head else [])
        self._layouts = [Layout(of_item) for of_item in params]
        self._cache = BlockCache(self.reader, [layout.ranges for layout in self._layouts])
        # what alignment adds to items in buffers, of which a plan does not know: a few KB each
        nbytes = sum(p.nbytes for of_item in params for p in of_item)
        self._padding_nbytes = max(0, self._cache.largest_capacity - nbytes)

    def expect(self, forward: Sequence[int], backward: Sequence[int] = ()) -> None:
        """From now on blocks are visited in this order (indices), and the head between the two, again and again."""
        in_memory = {unit.index for unit in [*self._whole, *self._held]}
        head = [len(self._blocks)] if self._head else []
        order = [index for index in [*forward, *head, *backward] if index not in in_memory]
        if order != self._order:
            self._order, self._position = order, -1

    def keep_whole(self, units: Sequence[Unit]) -> None:
        """Keep these units' weights in memory, as they are computed with, and no others'."""
        for unit in [unit for unit in self._whole if unit not in units]:
            self._thread.run(lambda unit=unit: self._whole.pop(unit))
        for unit in units:
            if unit not in self._whole:
                self._whole[unit] = self._thread.run(
                    lambda unit=unit: [read_whole(self.reader, param.source) for param in unit.params]
                )
        self._thread.run(mx.clear_cache)  # of the pieces that were cast: of no size that a step asks for

    def keep_held(self, blocks: Sequence[Unit]) -> None:
        """Keep these blocks' weights in memory, packed, and no others'."""
        for unit in [unit for unit in self._held if unit not in blocks]:
            self._thread.run(lambda unit=unit: self._held.pop(unit))
        for unit in blocks:
            if unit not in self._held:
                self._held[unit] = self._thread.run(
                    lambda unit=unit: [read_held(self.reader, param.source) for param in unit.params]
                )
        self._thread.run(mx.clear_cache)

    def resize(self, slots: int, resident_nbytes: int, reads_in_flight: int, head: Sequence[Unit] = ()) -> None:
        """Stream blocks through `slots` buffers, and keep `resident_nbytes` more of them between visits.

        Args:
            head: layers outside the blocks that are read ahead as a block is; the others are read when they are used.
        """
        self.reader.reads_in_flight = reads_in_flight

        def work():
            if list(head) != self._head:
                self._cache.clear()
                self._stream(head)
            self._cache.slots = slots
            self._cache.capacity = self._cache.least_capacity + resident_nbytes + self._padding_nbytes
            self._cache.trim()

        self._thread.run(work)

    def with_block(self, unit: Unit, jobs: Sequence[Callable[[], Any]]) -> list:
        """The results of `jobs`, called on the compute thread while the block's weights are in place."""

        if unit in self._whole:
            return self.with_outside([lambda job=job: (self.bring(unit), job())[1] for job in jobs])

        def work():
            held, layout = self._held.get(unit), self._layouts[unit.index]
            buffer = None if held else self._cache.take(unit.index, self._upcoming(unit.index))
            try:
                with tracing.span("cast", unit.name, bytes=unit.compute_nbytes):
                    arrays = layout.put(held, self._streams) if held else layout.fill(buffer, self._streams)
                    unit.restore_constants()
                    mx.eval(arrays)
                mx.set_cache_limit(self.cache_nbytes)
                # what was cast or dequantized no longer needs the bytes it came from
                if all(p.source.is_copied for p in unit.params):
                    self._cache.release(unit.index)
                del buffer, arrays
                return [job() for job in jobs]
            finally:
                # The next block's weights take these buffers: fresh pages cost ten times the cast (0.137 against
                # 0.015 s for 176 MB). MLX keeps what is freed first, so nothing else may fill its cache now.
                mx.clear_cache()
                mx.set_cache_limit(max(self.cache_nbytes, unit.compute_nbytes))
                for param in unit.params:
                    param.clear()
                self._cache.release(unit.index)

        return self._timed(work)

    def with_outside(self, jobs: Sequence[Callable[[], Any]]) -> list:
        """The same for layers outside the blocks: jobs call `bring` for each layer they come to use."""

        def work():
            mx.set_cache_limit(self.cache_nbytes)
            try:
                return [job() for job in jobs]
            finally:
                for unit in self._outside:
                    for param in unit.params:
                        param.clear()
                self._outside.clear()
                if self._head:
                    self._cache.release(len(self._blocks))

        return self._timed(work)

    def bring(self, unit: Unit) -> None:
        """Put the weights of a layer outside the blocks in place (once), until the jobs under way are done."""
        if any(unit is other for other in self._outside):
            return
        if unit in self._head and unit not in self._whole:
            self._bring_head()
            return
        arrays = self._whole.get(unit)
        if arrays is None:  # (read and cast in turns)
            with tracing.span("cast", unit.name, bytes=unit.compute_nbytes):
                arrays = [read_whole(self.reader, param.source) for param in unit.params]
        for param, array in zip(unit.params, arrays):
            param.set(array)
        unit.restore_constants()
        self._outside.append(unit)

    def _bring_head(self) -> None:
        item = len(self._blocks)
        self._outside += self._head
        buffer = self._cache.take(item, self._upcoming(item))
        with tracing.span("cast", self._head[0].name, bytes=sum(unit.compute_nbytes for unit in self._head)):
            mx.eval(self._layouts[item].fill(buffer, self._streams))
        for unit in self._head:
            unit.restore_constants()
        if all(p.source.is_copied for unit in self._head for p in unit.params):
            self._cache.release(item)  # the first block of the backward pass is read while the head computes

    def look_up(self, unit: Unit, rows: list[int], job: Callable[[], Any]) -> Any:
        """`job()` while the unit's parameters hold only these entries (sorted, distinct) of their first axis."""

        def work():
            for param in unit.params:
                param.set(read_rows(self.reader, param.source, rows))
            try:
                return job()
            finally:
                for param in unit.params:
                    param.clear()

        return self._timed(work)

    def rest(self) -> None:
        """A step is over: give back the buffers that were kept for the next block's weights."""
        mx.set_cache_limit(self.cache_nbytes)

    def on_thread(self, job: Callable[[], Any]) -> Any:
        """`job()` on the compute thread, with nothing put in place."""
        return self._thread.run(job)

    @property
    def is_open(self) -> bool:
        return self._thread.is_open

    def close(self) -> None:
        if not self.is_open:
            return
        self._thread.run(self._whole.clear)
        self._thread.run(self._held.clear)
        self._thread.run(self._cache.clear)
        self._thread.close()
        self.reader.close()

    def _timed(self, work: Callable[[], Any]) -> Any:
        def timed():
            begin, waited = time.perf_counter(), self.reader.wait_s
            try:
                return work()
            finally:
                self.compute_s += time.perf_counter() - begin - (self.reader.wait_s - waited)

        return self._thread.run(timed)

    def _upcoming(self, index: int) -> Iterator[int]:
        """The visits after this one. Finds its place anew if the model took an unexpected way."""
        n = len(self._order)
        for step in range(1, n + 1):
            place = (self._position + step) % n
            if self._order[place] == index:
                self._position = place
                return itertools.islice(itertools.cycle(self._order), place + 1, None)
        return iter(())
