"""A layer's weights some at a time: groups of rows, or of experts, through two buffers.

Comes in: a group and the one that will be asked for next. Goes out: the group's arrays; the next is read
meanwhile. Knows nothing of what is computed with them. Everything here is called by one thread.
"""

from concurrent.futures import Future
from dataclasses import dataclass

import mlx.core as mx

from ..models.layers import Layer
from ..models.weights import ALIGNMENT
from ..platform import DIRECT_ALIGNMENT
from ..storage.buffers import read_buffer, reads_directly
from ..storage.reader import ByteRange, Reader


@dataclass(frozen=True)
class Group:
    """Entries `start` to `stop` (not included) of the first axis of a layer's matrix."""

    layer: Layer
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass
class _Slot:
    buffer: mx.array | None = None
    group: Group | None = None
    read: Future | None = None
    places: tuple[int, ...] = ()


class GroupReader:
    """Brings groups, one ahead of the one that is in use."""

    def __init__(self, reader: Reader):
        self._reader = reader
        self._slots = [_Slot(), _Slot()]

    def arrays(self, group: Group, following: Group | None) -> list[mx.array]:
        """The group's part of each of its layer's parameters, unevaluated. Starts to read `following`.

        They may lie in a buffer, so nobody may use them after the next call.
        """
        slot = self._find(group) or self._start(group, self._slots[0])
        self._slots = [other for other in self._slots if other is not slot] + [slot]  # the first is the free one
        try:
            self._reader.wait(slot.read)
        except BaseException:
            slot.group = None
            raise
        if following is not None and self._find(following) is None:
            self._start(following, self._slots[0])
        arrays, places = [], iter(slot.places)
        for param in group.layer.params:
            raw = [slot.buffer[a : a + e.row_nbytes * len(group)] for e, a in zip(param.source.extents, places)]
            arrays.append(param.source.build(raw, n_rows=len(group)))
        return arrays

    def start(self, group: Group) -> None:
        """Begin to read what will be asked for first."""
        if self._find(group) is None:
            self._start(group, self._slots[0])

    def clear(self) -> None:
        """Give the memory back, after what is being read."""
        for slot in self._slots:
            _settle(slot)
        self._slots = [_Slot(), _Slot()]

    def _find(self, group: Group) -> _Slot | None:
        return next((slot for slot in self._slots if slot.group == group), None)

    def _start(self, group: Group, slot: _Slot) -> _Slot:
        _settle(slot)
        ranges = _ranges(group)
        nbytes = max(r.at + r.nbytes for r in ranges)
        if slot.buffer is None or slot.buffer.nbytes < nbytes:
            slot.buffer = None
            slot.buffer = read_buffer(nbytes)
        slot.group, slot.places = group, tuple(r.at for r in ranges)
        slot.read = self._reader.submit(ranges, memoryview(slot.buffer))
        return slot


def _settle(slot: _Slot) -> None:
    """Nothing is being read into it any more."""
    if slot.read is not None and not slot.read.cancel():
        slot.read.exception()
    slot.group = slot.read = None


def _ranges(group: Group) -> list[ByteRange]:
    """Where the group lies, extent by extent, and where it goes to."""
    ranges: list[ByteRange] = []
    at = 0
    for e in (e for param in group.layer.params for e in param.source.extents):
        offset, at = e.offset + group.start * e.row_nbytes, -(-at // ALIGNMENT) * ALIGNMENT
        if reads_directly() and offset % getattr(mx, e.dtype).size == 0:
            at += (offset - at) % DIRECT_ALIGNMENT
        ranges.append(ByteRange(e.file, offset, e.row_nbytes * len(group), at))
        at += ranges[-1].nbytes
    return ranges
