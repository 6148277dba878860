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

from .. import tracing
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
        # what alignment adds to blocks in buffers, of which a plan does not know: a few KB each
        self._padding_nbytes = max(0, self._cache.largest_capacity - sum(unit.nbytes for unit in blocks))
        self._thread = Worker("slowft-compute")
        self._streams = self._thread.run(_streams)
        self._order: list[int] = []
        self._position = -1
        self._outside: list[Unit] = []  # large layers outside the blocks whose weights are in place now
        self._whole: dict[Unit, list[mx.array]] = {}  # units whose weights, ready to compute with, stay in memory
        self.compute_s = 0.0
        self.cache_nbytes = mx.set_cache_limit(0)  # of freed buffers that MLX keeps while a block is computed
        mx.set_cache_limit(self.cache_nbytes)

    def expect(self, order: Sequence[int]) -> None:
        """From now on blocks are visited in this order (indices), again and again."""
        whole = {unit.index for unit in self._whole}
        order = [index for index in order if index not in whole]
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

    def resize(self, slots: int, resident_nbytes: int, reads_in_flight: int) -> None:
        """Stream blocks through `slots` buffers, and keep `resident_nbytes` more of them between visits."""
        self.reader.reads_in_flight = reads_in_flight

        def work():
            self._cache.slots = slots
            self._cache.capacity = self._cache.least_capacity + resident_nbytes + self._padding_nbytes
            self._cache.trim()

        self._thread.run(work)

    def with_block(self, unit: Unit, jobs: Sequence[Callable[[], Any]]) -> list:
        """The results of `jobs`, called on the compute thread while the block's weights are in place."""

        if unit in self._whole:
            return self.with_outside([lambda job=job: (self.bring(unit), job())[1] for job in jobs])

        def work():
            buffer = self._cache.take(unit.index, self._upcoming(unit.index))
            try:
                with tracing.span("cast", unit.name, bytes=unit.compute_nbytes):
                    arrays = self._layouts[unit.index].fill(buffer, self._streams)
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

        return self._timed(work)

    def bring(self, unit: Unit) -> None:
        """Put the weights of a layer outside the blocks in place (once), until the jobs under way are done."""
        if not any(unit is other for other in self._outside):
            arrays = self._whole.get(unit)
            if arrays is None:  # (read and cast in turns)
                with tracing.span("cast", unit.name, bytes=unit.compute_nbytes):
                    arrays = [read_whole(self.reader, param.source) for param in unit.params]
            for param, array in zip(unit.params, arrays):
                param.set(array)
            unit.restore_constants()
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
