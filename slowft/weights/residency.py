"""Puts the weights of blocks and of other layers into their modules while they are used, and takes them away again.

Comes in: a unit (a block, or a layer outside the blocks), and the order in which a step visits the blocks. Goes out:
the unit's module with its weights, on the thread that computes. The order decides what is read next. This file knows
nothing of gradients.
"""

import itertools
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx

from .. import platform, tracing
from ..errors import SlowftError
from ..memory import computes_on_gpu, limits
from ..models.layers import Layer
from ..models.seams import Unit
from ..planning.measure import ARRIVAL, HEAD, Measurements
from ..planning.schedule import Schedule
from .cache import BlockCache
from .groups import Group, GroupReader
from .reader import Reader
from .reuse import Reuse
from .sources import Layout, Param, Source, read_rows, read_whole
from .threads import Worker

# Block index -> the layers whose weights are not read with their block.
Offloaded = Mapping[int, Sequence[Layer]]
# (block index, bytes of blocks that may be temporarily resident then, beyond what `Residency.resize` allows)
Visit = tuple[int, int]


class Residency:
    """The weights of a model's units, in memory only while they are used (or while there is room).

    Attributes:
        compute_s: seconds spent computing. Casting counts, waiting for reads does not.
        offloaded: layers of the block in place whose weights are not in it: `with_groups` brings them.
        reuse: decides which freed buffers are kept.
    """

    def __init__(self, blocks: Sequence[Unit], reader: Reader):
        self.reader = reader
        self._blocks = list(blocks)
        self._layouts = [Layout(unit.params) for unit in blocks]  # one for each item of the cache, whole blocks first
        self._items: dict[tuple, int] = {}  # (block index, names of the offloaded layers) -> item
        self._head: list[Unit] = []  # layers outside the blocks that are read ahead together, like one more block
        self._head_item: int | None = None  # the cache's item of those layers
        self._expects_offloaded: Offloaded = {}
        self.offloaded: Collection[Layer] = ()
        self.cache = BlockCache(reader, [layout.ranges for layout in self._layouts])
        # Alignment adds a few KB to each item's buffer, of which a plan does not know.
        self._padding_nbytes = max(0, self.cache.largest_capacity - sum(unit.nbytes for unit in blocks))
        # Layers have their own thread: on one that traces, what is evaluated keeps its graph and so the weights.
        self._layer_thread = Worker("slowft-layers")
        self._groups = GroupReader(reader)
        self._is_gpu = computes_on_gpu()
        self._visits: list[tuple[int, int]] = []  # (item, bytes that the cache may hold then beyond its capacity)
        self._position = -1  # of the visit under way
        self._is_before_head = True  # the pass under way has not come to the head
        self._last_before_head: int | None = None  # the last block before the head whose weights are not resident
        self._outside: list[Unit] = []  # layers outside the blocks whose weights are in place now
        self._resident: dict[Unit, list[mx.array]] = {}  # units that stay in memory, as arrays to compute with
        self._handed_over: list[tuple] = []  # results that the GPU was given to compute with what is in place now
        self._previous_pass: tuple[int, list] | None = None  # (item, results handed over) of the block before
        self._measurements: Measurements | None = None
        self._kind_of: Callable[[Unit], str] = lambda unit: unit.name
        self.compute_s = 0.0
        self.reuse = Reuse(Schedule(cache_nbytes=limits().found_cache_nbytes))

    def expect(
        self, forward: Iterable[Visit], backward: Iterable[Visit] = (), offloaded: Offloaded | None = None
    ) -> None:
        """Set the order of the visits to come: the blocks of `forward`, the head, those of `backward`, and again.

        Args:
            offloaded: layers whose weights are not read with their block.
        """
        forward, backward = list(forward), list(backward)
        if self._expects_offloaded and not offloaded:
            self._layer_thread.run(self._groups.clear)
        self._is_before_head = True
        self._last_before_head = next((i for i, _ in reversed(forward) if self._blocks[i] not in self._resident), None)
        resident = {unit.index for unit in self._resident}
        if offloaded:  # a block that is in memory with all its layers needs none of them read
            cached = {unit.index for unit in self._blocks if self.cache.holds(unit.index)}
            offloaded = {i: layers for i, layers in offloaded.items() if i not in resident | cached}
        self._expects_offloaded = offloaded or {}
        forward, backward = (
            [(self._item_of(i), temporary) for i, temporary in visits if i not in resident]
            for visits in (forward, backward)
        )
        head = [(self._head_item, forward[-1][1] if forward else 0)] if self._head else []
        visits = [*forward, *head, *backward]
        if visits != self._visits:
            self._visits, self._position = visits, -1

    def keep_resident(self, units: Sequence[Unit]) -> None:
        """Make exactly these units resident: their weights stay in memory as arrays to compute with."""
        for unit in [unit for unit in self._resident if unit not in units]:
            del self._resident[unit]
        if any(unit not in self._resident for unit in units):
            # Else the freed buffers of earlier steps stay beside these: up to a head's memory, depending on timing.
            limits().give_back()
            platform.release_freed_memory()
        for unit in units:
            if unit not in self._resident:
                self._resident[unit] = [read_whole(self.reader, param.source) for param in unit.params]
        limits().give_back()  # the pieces' buffers are of no size that a step asks for

    def follow(self, reuse: Reuse) -> None:
        """From now on `reuse` decides which freed buffers are kept."""
        self.reuse = reuse

    def resize(
        self,
        slots: int,
        resident_nbytes: int,
        reads_in_flight: int,
        offloaded: Offloaded | None = None,
        head: Sequence[Unit] = (),
    ) -> None:
        """Stream blocks through `slots` buffers, and keep `resident_nbytes` more of them between visits.

        Args:
            offloaded: layers that need no room in the blocks' buffers.
            head: layers outside the blocks that are read ahead as a block is. Others are read when they are used.
        """
        self.reader.reads_in_flight = reads_in_flight
        self._expects_offloaded = offloaded or {}
        self._head = list(head)
        items = [self._item_of(unit.index) for unit in self._blocks]
        self.cache.slots = slots
        self.cache.use(items + ([self._item_of_head()] if head else []))
        self.cache.capacity = self.cache.least_capacity + resident_nbytes + self._padding_nbytes
        self.cache.trim()

    @contextmanager
    def in_place(self, unit: Unit) -> Iterator[None]:
        """While this is entered, the block's weights are in its module. Meanwhile the next block's are read."""
        if unit in self._resident:
            with self._outside_in_place(is_head=False):
                self.bring(unit)
                yield
            return
        with self._timed():
            item = self._item_of(unit.index)
            layout = self._layouts[item]
            if not self.cache.is_read(item) or (self._previous_pass and self._previous_pass[0] == item):
                self._finish_previous_pass()  # gives that block's buffer to the drive, which must not stand idle
            buffer = self.cache.take(item, *self._upcoming(item))
            try:
                with tracing.span("cast", unit.name, bytes=layout.compute_nbytes):
                    arrays = layout.fill(buffer)
                    unit.restore_constants()
                    begin = time.perf_counter()
                    if layout.is_copied or not self._is_gpu:
                        mx.eval(arrays)
                    if self._measurements is not None:
                        self._measurements.note(self._kind_of(unit), ARRIVAL, time.perf_counter() - begin)
                if layout.is_copied:  # cast or dequantized: the bytes they were made from are no longer needed
                    self.cache.release(item)
                del buffer, arrays
                self.offloaded = self._expects_offloaded.get(unit.index, ())
                yield
            finally:
                self.offloaded = ()
                previous, self._previous_pass = self._previous_pass, (item, self._handed_over)
                self._handed_over = []
                try:
                    self._finish(previous)
                finally:
                    self._take_away(unit, layout)
                    if not self._may_run_ahead(layout):
                        self._finish_previous_pass()

    def _take_away(self, unit: Unit, layout: Layout) -> None:
        """Take a block's weights out of its module."""
        # The next block's weights take these buffers: a cast into fresh pages costs ten times as much (0.137 against
        # 0.015 s for 176 MB). Weights that are views of what was read have no buffers of their own.
        freed_nbytes = layout.compute_nbytes if layout.is_copied else 0
        if self._is_before_head and unit.index == self._last_before_head:
            self.reuse.before_head(freed_nbytes)
        else:
            self.reuse.before_freeing(freed_nbytes, freed_nbytes, are_alike=True)
        for param in unit.params:
            param.clear()

    def with_groups(self, groups: Sequence[Group], following: Group | None, job: Callable[[Group], Any]) -> None:
        """Call `job` with each group of experts in turn, while the layer holds the weights of that group alone.

        `job` runs on a separate thread, on which nothing is traced. It has to evaluate what it makes, and must keep no
        array of the layer's.

        Args:
            following: the group that will be asked for next, if that is known.
        """

        def work():
            for group, next_group in zip(groups, [*groups[1:], following]):
                module, original = group.layer.module, dict(group.layer.module)
                with tracing.span("cast", group.layer.name, entries=len(group)):
                    arrays = self._groups.arrays(group, next_group)
                for param, array in zip(group.layer.params, arrays):
                    param.set(array)
                keys = {param.key for param in group.layer.params}
                for key, array in original.items():  # biases
                    if key not in keys and isinstance(array, mx.array) and array.shape[:1] == (group.layer.n,):
                        module[key] = array[mx.array(group.entries)]
                del arrays
                try:
                    job(group)
                finally:
                    for key, array in original.items():
                        module[key] = array

        if groups:
            self._layer_thread.run(work)

    def on_layer_thread(self, job: Callable[[], Any]) -> Any:
        """Returns `job()`, called on the thread that `with_groups` uses."""
        return self._layer_thread.run(job)

    def hand_over(self, *results: Any) -> None:
        """Compute these trees of arrays: on a CPU now, on a GPU while the caller goes on to the next pass."""
        if self._is_gpu and self._measurements is None:
            mx.async_eval(*results)
            self._handed_over.append(results)
        else:
            mx.eval(*results)

    @contextmanager
    def head_in_place(self, units: Sequence[Unit]) -> Iterator[None]:
        """While this is entered, these layers outside the blocks are in place, and so is any that `bring` adds."""
        with self._timed(), self._outside_in_place(is_head=True):
            with self.reuse.computing(is_head=True):  # gives back what lies free between the blocks' small buffers
                for unit in units:
                    self.bring(unit)
            yield

    @contextmanager
    def _outside_in_place(self, is_head: bool) -> Iterator[None]:
        self._finish_previous_pass()
        try:
            self._is_before_head = self._is_before_head and not is_head
            yield
        finally:
            try:
                mx.eval(self._handed_over)
            finally:
                self._handed_over = []
                freed_nbytes = sum(unit.compute_nbytes for unit in self._outside if unit not in self._resident)
                next_nbytes = max((layout.compute_nbytes for layout in self._layouts), default=0)
                self.reuse.before_freeing(freed_nbytes, next_nbytes, are_alike=False)
                for unit in self._outside:
                    for param in unit.params:
                        param.clear()
                self._outside.clear()
                if self._head:
                    self.cache.release(self._head_item)

    @contextmanager
    def everything_in_place(self) -> Iterator[None]:
        """While this is entered, all units that `keep_resident` keeps have their weights in their modules."""
        with self._timed(), self._outside_in_place(is_head=True):
            for unit in self._resident:
                self.bring(unit)
            yield

    def measure(self, measurements: Measurements | None, kind_of: Callable[[Unit], str]) -> None:
        """From now on note in `measurements` what each pass and each arrival takes. None, or `rest`, ends this.

        Args:
            kind_of: the kind of a block, by which measurements are summed up.
        """
        self._measurements, self._kind_of = measurements, kind_of

    @contextmanager
    def computing(
        self, name: str, kind: str, direction: str, micro_batch: int, is_head: bool = False
    ) -> Iterator[None]:
        """While this is entered, one micro-batch goes through what is in place. MLX keeps the freed buffers that fit.

        Args:
            kind: the kind of block that the pass is measured as.
        """
        with tracing.span("compute", name, **{"pass": HEAD if is_head else direction, "micro-batch": micro_batch}):
            with self.reuse.computing(is_head):
                if self._measurements is None:
                    yield
                    return
                with self._measurements.measuring(kind, direction, waited=lambda: self.reader.wait_s):
                    yield

    def _may_run_ahead(self, layout: Layout) -> bool:
        """Whether the next block may be put in place while a GPU still computes this one: it needs another buffer."""
        return self._is_gpu and (layout.is_copied or self.cache.slots > 1)

    def _finish_previous_pass(self) -> None:
        """Wait for what the GPU computes with the previous block. Its buffer may then take another item."""
        previous, self._previous_pass = self._previous_pass, None
        self._finish(previous)

    def _finish(self, block_pass: tuple[int, list] | None) -> None:
        """Wait for a block's pass. Its buffer is free even if the GPU fails, as nobody wants the results any more."""
        if block_pass is not None:
            item, results = block_pass
            try:
                mx.eval(results)
            finally:
                self.cache.release(item)

    def bring(self, unit: Unit) -> None:
        """Put a layer outside the blocks in place if it is not. It stays until the context under way ends."""
        if unit in self._outside:
            return
        if unit in self._head and unit not in self._resident:
            self._bring_head()
            return
        arrays = self._resident.get(unit)
        if arrays is None:  # reads and casts take turns here
            with tracing.span("cast", unit.name, bytes=unit.compute_nbytes):
                arrays = [read_whole(self.reader, param.source) for param in unit.params]
        for param, array in zip(unit.params, arrays):
            param.set(array)
        unit.restore_constants()
        self._outside.append(unit)

    def _bring_head(self) -> None:
        item, layout = self._head_item, self._layouts[self._head_item]
        self._outside += self._head
        buffer = self.cache.take(item, *self._upcoming(item))
        with tracing.span("cast", self._head[0].name, bytes=layout.compute_nbytes):
            mx.eval(layout.fill(buffer))
        for unit in self._head:
            unit.restore_constants()
        if layout.is_copied:
            self.cache.release(item)  # the next block is read there while the head computes

    def look_up(self, unit: Unit, rows: list[int], job: Callable[[], Any]) -> Any:
        """Returns `job()`, called while the parameters hold only these rows (sorted, distinct) of their first axis."""
        return self._with_read(unit.params, lambda source: read_rows(self.reader, source, rows), job)

    def with_params(self, params: Sequence[Param], job: Callable[[], Any]) -> Any:
        """Returns `job()`, called while only these parameters are in place."""
        return self._with_read(params, lambda source: read_whole(self.reader, source), job)

    def _with_read(self, params: Sequence[Param], read: Callable[[Source], mx.array], job: Callable[[], Any]) -> Any:
        with self._timed():
            for param in params:
                param.set(read(param.source))
            try:
                return job()
            finally:
                for param in params:
                    param.clear()

    def rest(self) -> None:
        """A step is over: give back the buffers that were kept for the next block's weights."""
        self._finish_previous_pass()
        self._measurements = None
        with self.reuse.computing():
            pass
        self._layer_thread.run(self._groups.clear)

    @property
    def is_open(self) -> bool:
        return self._layer_thread.is_open

    def close(self) -> None:
        if not self.is_open:
            return
        self._previous_pass = None
        self._resident.clear()
        self.cache.clear()
        self._layer_thread.run(self._groups.clear)
        self._layer_thread.close()
        self.reader.close()

    @contextmanager
    def _timed(self) -> Iterator[None]:
        if not self.is_open:
            raise SlowftError("the model is closed. Open it again")
        begin, waited = time.perf_counter(), self.reader.wait_s
        try:
            yield
        finally:
            self.compute_s += time.perf_counter() - begin - (self.reader.wait_s - waited)

    def _item_of(self, index: int) -> int:
        """The cache's item of this block, without the layers that are expected to be offloaded."""
        offloaded = self._expects_offloaded.get(index, ())
        if not offloaded:
            return index
        key = index, tuple(layer.name for layer in offloaded)
        if key not in self._items:
            left_out = {id(param) for layer in offloaded for param in layer.params}
            layout = Layout([param for param in self._blocks[index].params if id(param) not in left_out])
            self._layouts.append(layout)
            self._items[key] = self.cache.add(layout.ranges)
        return self._items[key]

    def _item_of_head(self) -> int:
        """The cache's item of the layers outside the blocks that are read ahead."""
        if self._head_item is None:
            layout = Layout([param for unit in self._head for param in unit.params])
            self._layouts.append(layout)
            self._head_item = self.cache.add(layout.ranges)
            self._padding_nbytes += max(0, self.cache.nbytes[self._head_item] - sum(u.nbytes for u in self._head))
        return self._head_item

    def _upcoming(self, item: int) -> tuple[Iterable[int], Iterable[int]]:
        """(items of the visits after this one, bytes that may be temporarily resident at this one and at those).

        After a visit out of order, the order goes on from the next visit to its item.
        """
        n = len(self._visits)
        for step in range(1, n + 1):
            place = (self._position + step) % n
            if self._visits[place][0] == item:
                self._position = place
                upcoming, temporary = (itertools.cycle([visit[i] for visit in self._visits]) for i in (0, 1))
                return itertools.islice(upcoming, place + 1, None), itertools.islice(temporary, place, None)
        return (), ()
