"""Puts a unit's weights in place on the compute thread, runs what was asked, and takes them away again.

Comes in: a unit and the jobs that want its weights. Goes out: the jobs' results. Decides what is read next
from the order in which a step visits the blocks. Knows nothing of gradients.
"""

import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx

from ..models.seams import Unit
from ..models.weights import Layout, read_rows, read_whole
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
        self._layouts = [Layout(unit.params) for unit in blocks]
        self._cache = BlockCache(reader, [layout.ranges for layout in self._layouts])
        self._thread = Worker("slowft-compute")
        self._streams = self._thread.run(_streams)
        self._order: list[int] = []
        self._position = -1
        self._outside: list[Unit] = []  # large layers outside the blocks whose weights are in place now
        self.compute_s = 0.0

    def expect(self, order: Sequence[int]) -> None:
        """From now on blocks are visited in this order (indices), again and again."""
        if list(order) != self._order:
            self._order, self._position = list(order), -1

    def with_block(self, unit: Unit, jobs: Sequence[Callable[[], Any]]) -> list:
        """The results of `jobs`, called on the compute thread while the block's weights are in place."""

        def work():
            buffer = self._cache.take(unit.index, self._upcoming(unit.index))
            try:
                arrays = self._layouts[unit.index].fill(buffer, self._streams)
                unit.restore_constants()
                mx.eval(arrays)
                # what was cast or dequantized no longer needs the bytes it came from
                if all(p.source.is_copied for p in unit.params):
                    self._cache.release(unit.index)
                del buffer, arrays
                return [job() for job in jobs]
            finally:
                for param in unit.params:
                    param.clear()
                self._cache.release(unit.index)

        return self._timed(work)

    def with_outside(self, jobs: Sequence[Callable[[], Any]]) -> list:
        """The same for layers outside the blocks: jobs call `bring` for each layer they come to use."""

        def work():
            try:
                return [job() for job in jobs]
            finally:
                for unit in self._outside:
                    for param in unit.params:
                        param.clear()
                self._outside.clear()

        return self._timed(work)

    def bring(self, unit: Unit) -> None:
        """Put the weights of a layer outside the blocks in place (once), until the jobs under way are done."""
        if not any(unit is other for other in self._outside):
            for param in unit.params:
                param.set(read_whole(self.reader, param.source))
            self._outside.append(unit)

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

    def keep_within(self, spare_nbytes: int) -> bool:
        """Keep that many more bytes of blocks in memory between visits (fewer if negative), if there are so many.

        Returns:
            Whether that changed anything.
        """
        before, wanted = self._cache.capacity, self._cache.capacity + spare_nbytes
        self._cache.capacity = max(self._cache.least_capacity, min(wanted, self._cache.largest_capacity))
        return self._cache.capacity != before

    def on_thread(self, job: Callable[[], Any]) -> Any:
        """`job()` on the compute thread, with nothing put in place."""
        return self._thread.run(job)

    def close(self) -> None:
        if not self._thread.is_open:
            return
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


def _streams() -> list[mx.Stream]:
    """Streams to cast and dequantize on: MLX runs such work on one core per stream, so one a core on a CPU."""
    device = mx.default_device()
    if device != mx.Device(mx.cpu):
        return [mx.default_stream(device)]
    return [mx.default_stream(device)] + [mx.new_stream(device) for _ in range(min(os.cpu_count() or 1, 4) - 1)]
