"""Puts a unit's weights in place on the compute thread, runs what was asked, and takes them away again.

Comes in: a unit and the jobs that want its weights. Goes out: the jobs' results. Decides what is read next
from the order in which a step visits the blocks. Knows nothing of gradients.
"""

import itertools
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx

from .. import platform, tracing
from ..errors import SlowftError
from ..memory import limits
from ..models.layers import Layer
from ..models.seams import Unit
from ..planning.measure import ARRIVAL, HEAD, Measurements
from ..planning.schedule import Schedule
from .cache import BlockCache
from .groups import Group, GroupReader
from .reader import Reader
from .reuse import Reuse
from .sources import Layout, Param, Source, casting_streams, read_rows, read_whole
from .threads import Worker

# Which layers do not come with their block, by its index.
Offloaded = Mapping[int, Sequence[Layer]]
# (a block's index, bytes of blocks that may be in memory then beyond what `Residency.resize` was told).
Visit = tuple[int, int]


class Residency:
    """The weights of a model's units, in memory only while they are used (or while there is room).

    Attributes:
        compute_s: seconds spent computing, casting included, waiting for reads left out.
        offloaded: layers of the block in place whose weights are not there, but come by `with_groups`.
    """

    def __init__(self, blocks: Sequence[Unit], reader: Reader):
        self.reader = reader
        self._blocks = list(blocks)
        self._layouts = [Layout(unit.params) for unit in blocks]  # of the cache's items: first the whole blocks
        self._items: dict[tuple, int] = {}  # (block, names of the layers offloaded) -> item
        self._head: list[Unit] = []  # outside layers that are read ahead, together, like one more block
        self._head_item: int | None = None
        self._expects_offloaded: Offloaded = {}
        self.offloaded: Collection[Layer] = ()
        self.cache = BlockCache(reader, [layout.ranges for layout in self._layouts])
        # what alignment adds to items in buffers, of which a plan does not know: a few KB each
        self._padding_nbytes = max(0, self.cache.largest_capacity - sum(unit.nbytes for unit in blocks))
        # Of its own: on a thread that traces, everything evaluated would keep its graph, and with it the weights.
        self._layer_thread = Worker("slowft-layers")
        self._groups = GroupReader(reader)
        self._is_gpu = mx.default_device() != mx.Device(mx.cpu)
        self._visits: list[tuple[int, int]] = []  # (item, bytes of items then in memory beyond the cache's capacity)
        self._position = -1
        self._is_below_head = True  # in a pass, before the head
        self._last_block: int | None = None  # that is visited before the head, of those whose weights come and go
        self._outside: list[Unit] = []  # large layers outside the blocks whose weights are in place now
        self._resident: dict[Unit, list[mx.array]] = {}  # units whose weights, ready to compute with, stay in memory
        self._under_way: list[tuple] = []  # what was handed over to the GPU since a block is in place
        self._pass_before: tuple[int, list] | None = None  # the last block's item, and what was handed over then
        self._measurements: Measurements | None = None
        self._kind_of: Callable[[Unit], str] = lambda unit: unit.name
        self.compute_s = 0.0
        self.reuse = Reuse(Schedule(cache_nbytes=limits().found_cache_nbytes))

    def expect(
        self, forward: Iterable[Visit], backward: Iterable[Visit] = (), offloaded: Offloaded | None = None
    ) -> None:
        """From now on blocks are visited in this order, and the head between the two, again and again.

        Args:
            offloaded: layers without which blocks come.
        """
        forward, backward = list(forward), list(backward)
        if self._expects_offloaded and not offloaded:
            self._layer_thread.run(self._groups.clear)
        self._is_below_head = True
        self._last_block = next((i for i, _ in reversed(forward) if self._blocks[i] not in self._resident), None)
        in_memory = {unit.index for unit in self._resident}
        if offloaded:  # blocks that are in memory with all their layers need no part of them read
            in_memory_as_read = {unit.index for unit in self._blocks if self.cache.holds(unit.index)}
            offloaded = {i: layers for i, layers in offloaded.items() if i not in in_memory | in_memory_as_read}
        self._expects_offloaded = offloaded or {}
        there, back = ([(self._item(i), more) for i, more in way if i not in in_memory] for way in (forward, backward))
        head = [(self._head_item, there[-1][1] if there else 0)] if self._head else []
        visits = [*there, *head, *back]
        if visits != self._visits:
            self._visits, self._position = visits, -1

    def keep_resident(self, units: Sequence[Unit]) -> None:
        """Keep these units' weights in memory, as they are computed with, and no others'."""
        for unit in [unit for unit in self._resident if unit not in units]:
            del self._resident[unit]
        if any(unit not in self._resident for unit in units):
            # What the steps so far left to be used again is beside these otherwise: up to a head's memory, by timing.
            limits().give_back()
            platform.release_freed_memory()
        for unit in units:
            if unit not in self._resident:
                self._resident[unit] = [read_whole(self.reader, param.source) for param in unit.params]
        limits().give_back()  # of the pieces that were cast: of no size that a step asks for

    def follow(self, reuse: Reuse) -> None:
        """From now on freed buffers are kept by this."""
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
            offloaded: layers without which the blocks have to fit their buffers.
            head: layers outside the blocks that are read ahead as a block is; the others are read when they are used.
        """
        self.reader.reads_in_flight = reads_in_flight
        self._expects_offloaded = offloaded or {}
        self._head = list(head)
        items = [self._item(unit.index) for unit in self._blocks]
        self.cache.slots = slots
        self.cache.use(items + ([self._find_head_item()] if head else []))
        self.cache.capacity = self.cache.least_capacity + resident_nbytes + self._padding_nbytes
        self.cache.trim()

    @contextmanager
    def in_place(self, unit: Unit) -> Iterator[None]:
        """While this is entered, the block's weights are in its module; meanwhile the next block's are read."""
        if unit in self._resident:
            with self._outside_in_place(is_head=False):
                self.bring(unit)
                yield
            return
        with self._timed():
            item = self._item(unit.index)
            layout = self._layouts[item]
            if not self.cache.is_read(item) or (self._pass_before and self._pass_before[0] == item):
                self._finish_pass_before()  # the drive waits for nobody: it goes on with that block's buffer
            buffer = self.cache.take(item, *self._upcoming(item))
            try:
                with tracing.span("cast", unit.name, bytes=layout.compute_nbytes):
                    arrays = layout.fill(buffer, self.streams)
                    unit.restore_constants()
                    begin = time.perf_counter()
                    if layout.is_copied or not self._is_gpu:
                        mx.eval(arrays)
                    if self._measurements is not None:
                        self._measurements.note(self._kind_of(unit), ARRIVAL, time.perf_counter() - begin)
                # what was cast or dequantized no longer needs the bytes it came from
                if layout.is_copied:
                    self.cache.release(item)
                del buffer, arrays
                self.offloaded = self._expects_offloaded.get(unit.index, ())
                yield
            finally:
                self.offloaded = ()
                # The next block's weights take these buffers: fresh pages cost ten times the cast (0.137 against
                # 0.015 s for 176 MB).
                if self._is_below_head and unit.index == self._last_block:
                    self.reuse.before_head(layout.compute_nbytes)
                else:
                    self.reuse.before_freeing(layout.compute_nbytes, layout.compute_nbytes, are_alike=True)
                for param in unit.params:
                    param.clear()
                self._finish_pass_before()
                self._pass_before, self._under_way = (item, self._under_way), []
                if not self._runs_ahead_of(layout):
                    self._finish_pass_before()

    def with_groups(self, groups: Sequence[Group], following: Group | None, job: Callable[[Group], Any]) -> None:
        """Call `job` with each of the groups of a layer in turn, while the layer's weights are the group's alone.

        It runs on a thread of its own, on which nothing is traced, has to evaluate what it makes, and keeps no array of
        the layer's.

        Args:
            following: the group that will be asked for next, if that is known.
        """

        def work():
            for group, after in zip(groups, [*groups[1:], following]):
                module, whole = group.layer.module, dict(group.layer.module)
                with tracing.span("cast", group.layer.name, entries=len(group)):
                    arrays = self._groups.arrays(group, after)
                for param, array in zip(group.layer.params, arrays):
                    param.set(array)
                keys = {param.key for param in group.layer.params}
                for key, array in whole.items():  # biases
                    if key not in keys and isinstance(array, mx.array) and array.shape[:1] == (group.layer.n,):
                        module[key] = array[mx.array(group.entries)]
                del arrays
                try:
                    job(group)
                finally:
                    for key, array in whole.items():
                        module[key] = array

        if groups:
            self._layer_thread.run(work)

    def on_layer_thread(self, job: Callable[[], Any]) -> Any:
        """`job()` on the thread that groups are used on."""
        return self._layer_thread.run(job)

    def hand_over(self, *results: Any) -> None:
        """Have these trees of arrays computed: now, or on a GPU while the caller goes on to the next pass."""
        if self._is_gpu and self._measurements is None:
            mx.async_eval(*results)
            self._under_way.append(results)
        else:
            mx.eval(*results)

    @contextmanager
    def head_in_place(self, units: Sequence[Unit] = ()) -> Iterator[None]:
        """The same for layers outside the blocks: for these, and any that `bring` is called with meanwhile."""
        with self._timed(), self._outside_in_place(is_head=True):
            with self.reuse.computing(is_head=True):  # what small buffers of blocks left free goes back to the system
                for unit in units:
                    self.bring(unit)
            yield

    @contextmanager
    def _outside_in_place(self, is_head: bool) -> Iterator[None]:
        self._finish_pass_before()
        try:
            self._is_below_head = self._is_below_head and not is_head
            yield
        finally:
            try:
                mx.eval(self._under_way)
            finally:
                self._under_way = []
                freed = sum(unit.compute_nbytes for unit in self._outside if unit not in self._resident)
                wanted = max((layout.compute_nbytes for layout in self._layouts), default=0)
                self.reuse.before_freeing(freed, wanted, are_alike=False)
                for unit in self._outside:
                    for param in unit.params:
                        param.clear()
                self._outside.clear()
                if self._head:
                    self.cache.release(self._head_item)

    @contextmanager
    def everything_in_place(self) -> Iterator[None]:
        """While this is entered, whatever `keep_resident` keeps is in its modules."""
        with self._timed(), self._outside_in_place(is_head=True):
            for unit in self._resident:
                self.bring(unit)
            yield

    def measure(self, measurements: Measurements | None, kind_of: Callable[[Unit], str]) -> None:
        """From now on note what passes and arrivals take, or do not; `rest` ends it.

        Args:
            kind_of: of a block, as measurements are summed up by it.
        """
        self._measurements, self._kind_of = measurements, kind_of

    @contextmanager
    def computing(
        self, name: str, kind: str, direction: str, micro_batch: int, is_head: bool = False
    ) -> Iterator[None]:
        """Around one micro-batch's pass through what is in place: MLX keeps freed buffers as far as that has room.

        Args:
            kind: under which it is measured.
        """
        with tracing.span("compute", name, **{"pass": HEAD if is_head else direction, "micro-batch": micro_batch}):
            with self.reuse.computing(is_head):
                if self._measurements is None:
                    yield
                    return
                with self._measurements.measuring(kind, direction, waited=lambda: self.reader.wait_s):
                    yield

    def _runs_ahead_of(self, layout: Layout) -> bool:
        """Whether the next block may be brought while this one is still computed: on a GPU, beside its buffer."""
        return self._is_gpu and (layout.is_copied or self.cache.slots > 1)

    def _finish_pass_before(self) -> None:
        """Wait for what was handed over while the last block was in place; its buffer may then take another.

        So it may when the GPU did not finish: nobody wants these results any more, and the next step may be well.
        """
        if self._pass_before is not None:
            item, results = self._pass_before
            self._pass_before = None
            try:
                mx.eval(results)
            finally:
                self.cache.release(item)

    def bring(self, unit: Unit) -> None:
        """Put the weights of a layer outside the blocks in place (once), until the jobs under way are done."""
        if any(unit is other for other in self._outside):
            return
        if unit in self._head and unit not in self._resident:
            self._bring_head()
            return
        arrays = self._resident.get(unit)
        if arrays is None:  # (read and cast in turns)
            with tracing.span("cast", unit.name, bytes=unit.compute_nbytes):
                arrays = [read_whole(self.reader, param.source) for param in unit.params]
        for param, array in zip(unit.params, arrays):
            param.set(array)
        unit.restore_constants()
        self._outside.append(unit)

    def _bring_head(self) -> None:
        item = self._head_item
        self._outside += self._head
        buffer = self.cache.take(item, *self._upcoming(item))
        with tracing.span("cast", self._head[0].name, bytes=sum(unit.compute_nbytes for unit in self._head)):
            mx.eval(self._layouts[item].fill(buffer, self.streams))
        for unit in self._head:
            unit.restore_constants()
        if all(p.source.is_copied for unit in self._head for p in unit.params):
            self.cache.release(item)  # the first block of the backward pass is read while the head computes

    def look_up(self, unit: Unit, rows: list[int], job: Callable[[], Any]) -> Any:
        """`job()` while the unit's parameters hold only these entries (sorted, distinct) of their first axis."""
        return self._with_read(unit.params, lambda source: read_rows(self.reader, source, rows), job)

    def with_params(self, params: Sequence[Param], job: Callable[[], Any]) -> Any:
        """`job()` while only these parameters are in place."""
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
        self._finish_pass_before()
        self._measurements = None
        with self.reuse.computing():
            pass
        self._layer_thread.run(self._groups.clear)

    @property
    def streams(self) -> list[mx.Stream]:
        """Of the calling thread, its default one first: one a core on a CPU, which uses one core for each."""
        return casting_streams()

    @property
    def is_open(self) -> bool:
        return self._layer_thread.is_open

    def close(self) -> None:
        if not self.is_open:
            return
        self._pass_before = None
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

    def _item(self, index: int) -> int:
        """Which of the cache's items is this block as it is to come now."""
        offloaded = self._expects_offloaded.get(index, ())
        if not offloaded:
            return index
        key = index, tuple(layer.name for layer in offloaded)
        if key not in self._items:
            without = {id(param) for layer in offloaded for param in layer.params}
            layout = Layout([param for param in self._blocks[index].params if id(param) not in without])
            self._layouts.append(layout)
            self._items[key] = self.cache.add(layout.ranges)
        return self._items[key]

    def _find_head_item(self) -> int:
        """The cache's item of the layers that are read ahead."""
        if self._head_item is None:
            layout = Layout([param for unit in self._head for param in unit.params])
            self._layouts.append(layout)
            self._head_item = self.cache.add(layout.ranges)
            self._padding_nbytes += max(0, self.cache.nbytes[self._head_item] - sum(u.nbytes for u in self._head))
        return self._head_item

    def _upcoming(self, item: int) -> tuple[Iterable[int], Iterable[int]]:
        """The items of the visits after this one, and what is temporary at this one and at those.

        Finds its place anew if the model took an unexpected way.
        """
        n = len(self._visits)
        for step in range(1, n + 1):
            place = (self._position + step) % n
            if self._visits[place][0] == item:
                self._position = place
                upcoming, temporary = (itertools.cycle([visit[i] for visit in self._visits]) for i in (0, 1))
                return itertools.islice(upcoming, place + 1, None), itertools.islice(temporary, place, None)
        return (), ()
