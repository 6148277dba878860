"""Reads a layer's experts a group at a time, through two buffers.

Comes in: a group, and the one that will be asked for next. Goes out: the group's arrays, while the next group is read.
This file knows nothing of what is computed with them. One thread calls everything here.
"""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..models.layers import Layer
from ..platform import DIRECT_ALIGNMENT
from .buffers import lies_as_in_file, read_buffer
from .reader import ByteRange, Reader
from .sources import ALIGNMENT


@dataclass(frozen=True)
class Group:
    """Some of a layer's experts, as runs of neighbours, in order."""

    layer: Layer
    runs: tuple[range, ...]

    @classmethod
    def of(cls, layer: Layer, entries: Sequence[int] | np.ndarray) -> "Group":
        """The group of these experts, which are sorted and distinct."""
        runs = np.split(entries, np.flatnonzero(np.diff(entries) > 1) + 1)
        return cls(layer, tuple(range(int(run[0]), int(run[-1]) + 1) for run in runs))

    @property
    def entries(self) -> np.ndarray:
        return np.concatenate([np.arange(run.start, run.stop) for run in self.runs])

    def __len__(self) -> int:
        return sum(map(len, self.runs))


@dataclass
class _Slot:
    group: Group
    buffer: mx.array
    read: Future
    places: tuple[int, ...]


class GroupReader:
    """Reads groups, one ahead of the one in use."""

    def __init__(self, reader: Reader):
        self._reader = reader
        self._slots: list[_Slot] = []  # the one used most recently is last

    def arrays(self, group: Group, following: Group | None) -> list[mx.array]:
        """The group's rows of each of its layer's parameters, unevaluated. Starts to read `following`.

        The arrays may be views of a buffer, so nobody may use them after the next call.
        """
        self.start(group)
        slot = self._find(group)
        self._slots = [other for other in self._slots if other is not slot] + [slot]
        try:
            self._reader.wait(slot.read)
        except BaseException:
            self._slots.remove(slot)
            raise
        if following is not None:
            self.start(following)
        arrays, places = [], iter(slot.places)
        for param in group.layer.params:
            raw = [slot.buffer[at : at + e.row_nbytes * len(group)] for e, at in zip(param.source.extents, places)]
            arrays.append(param.source.build(raw, len(group)))
        return arrays

    def start(self, group: Group) -> None:
        """Begin to read the group that will be asked for first, unless it is in memory already."""
        if self._find(group) is None:
            places, ranges = _ranges(group)
            buffer = self._buffer(max(r.at + r.nbytes for r in ranges))
            self._slots.append(_Slot(group, buffer, self._reader.submit(ranges, memoryview(buffer)), places))

    def clear(self) -> None:
        """Give the memory back, once reads under way have ended."""
        while self._slots:
            self._give_up_oldest()

    def _find(self, group: Group) -> _Slot | None:
        return next((slot for slot in self._slots if slot.group == group), None)

    def _buffer(self, nbytes: int) -> mx.array:
        """The older group's buffer if there are two groups and it is large enough; else a new one."""
        buffer = self._give_up_oldest() if len(self._slots) > 1 else None
        return buffer if buffer is not None and buffer.nbytes >= nbytes else read_buffer(nbytes)

    def _give_up_oldest(self) -> mx.array:
        """Forget the oldest group. Returns its buffer, into which nothing is read any more."""
        slot = self._slots.pop(0)
        if not slot.read.cancel():
            slot.read.exception()
        return slot.buffer


def _ranges(group: Group) -> tuple[tuple[int, ...], list[ByteRange]]:
    """(where each of the group's extents begins in a buffer, the ranges of files that fill the buffer)."""
    places, ranges = [], []
    at = 0
    for e in (e for param in group.layer.params for e in param.source.extents):
        offset, at = e.offset + group.runs[0].start * e.row_nbytes, -(-at // ALIGNMENT) * ALIGNMENT
        if lies_as_in_file(offset, getattr(mx, e.dtype).size):
            at += (offset - at) % DIRECT_ALIGNMENT
        places.append(at)
        for run in group.runs:
            ranges.append(ByteRange(e.file, e.offset + run.start * e.row_nbytes, e.row_nbytes * len(run), at))
            at += ranges[-1].nbytes
    return tuple(places), ranges
