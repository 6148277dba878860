"""Key-value caches on disk, where memory has no room for them: all of a row's tokens but the last few hundred.

Comes in: mlx-lm's caches of single rows, before and after each block. Goes out: the same caches with the very same
values. Tokens are written once, in pieces of as many tokens as a cache grows by. Each pass reads them back, the next
block's while this one computes. When a cache drops tokens again (drafts), the piece that they were in is rewritten.
"""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..weights.spill import SpillFile


@dataclass(eq=False)
class _OnDisk:
    """The part on disk of one row's cache of one block."""

    offset: int  # where its place in the file begins
    piece_nbytes: int = 0
    n_tokens: int = 0  # in the file
    offset_before: int = 0  # the cache's own offset before the pass under way: how many tokens it had
    read: Future | None = None  # the read that is under way


class SpilledCaches:
    """Caches of up to `rows` rows, of `tokens` tokens each, in one file without a name in `directory`.

    Args:
        token_nbytes: bytes of one token's keys and values, for each block; 0 for blocks whose caches stay in memory.

    Raises:
        SlowftError: the directory cannot be used or has no room.
    """

    def __init__(self, directory: Path, rows: int, tokens: int, token_nbytes: Sequence[int]):
        from mlx_lm.models.cache import KVCache

        self._kind, self._piece = KVCache, KVCache.step
        n_pieces = -(-tokens // self._piece)
        self._places = [n_pieces * self._piece * nbytes for nbytes in token_nbytes]
        self._row_nbytes = sum(self._places)
        self._free = list(range(rows))[::-1]
        self._slots: dict[Any, int] = {}
        self._on_disk: dict[Any, _OnDisk] = {}
        self._file = SpillFile(directory, rows * self._row_nbytes)

    def add(self, caches: Sequence[Any]) -> None:
        """Give a new row's empty caches, one for each block, their places in the file."""
        slot = self._slots[caches[0]] = self._free.pop()
        offset = slot * self._row_nbytes
        for cache, nbytes in zip(caches, self._places):
            if nbytes and type(cache) is self._kind:
                self._on_disk[cache] = _OnDisk(offset)
            offset += nbytes

    def remove(self, caches: Sequence[Any]) -> None:
        """Free the places of a finished row's caches."""
        self._free.append(self._slots.pop(caches[0]))
        for cache in caches:
            self._on_disk.pop(cache, None)

    def read_ahead(self, caches: Sequence[Any]) -> None:
        """Start to read what these caches have on disk: they are loaded next."""
        for cache in caches:
            place = self._on_disk.get(cache)
            if place is not None and place.n_tokens and place.read is None:
                nbytes = place.n_tokens // self._piece * place.piece_nbytes
                place.read = self._file.read(place.offset, nbytes)

    def load(self, cache: Any) -> None:
        """Put the tokens that are on disk back into their cache."""
        place = self._on_disk.get(cache)
        if place is None:
            return
        place.offset_before = cache.offset
        if not place.n_tokens:
            return
        self.read_ahead([cache])
        raw, place.read = mx.array(place.read.result()), None
        n = place.n_tokens // self._piece
        parts = raw.reshape(n, place.piece_nbytes)
        split = self._piece_of(cache.keys).nbytes
        cache.keys = self._joined(parts[:, :split], cache.keys)
        cache.values = self._joined(parts[:, split:], cache.values)
        mx.eval(cache.keys, cache.values)

    def store(self, cache: Any) -> None:
        """Write the new tokens of an evaluated cache, and keep only its last piece in memory."""
        place = self._on_disk.get(cache)
        if place is None:
            return
        n, first = cache.offset // self._piece, place.offset_before // self._piece
        for i in range(first, n):
            pair = [self._piece_of(array, i).reshape(-1).view(mx.uint8) for array in (cache.keys, cache.values)]
            piece = mx.concatenate(pair)
            mx.eval(piece)
            place.piece_nbytes = piece.nbytes
            self._file.write(place.offset + i * piece.nbytes, memoryview(piece))
        place.n_tokens = n * self._piece
        if n:
            cache.keys, cache.values = (
                mx.contiguous(array[:, :, place.n_tokens :]) for array in (cache.keys, cache.values)
            )
            mx.eval(cache.keys, cache.values)

    @property
    def bytes_read(self) -> int:
        return self._file.bytes_read

    @property
    def bytes_written(self) -> int:
        return self._file.bytes_written

    def close(self) -> None:
        self._file.close()

    def _piece_of(self, array: mx.array, i: int = 0) -> mx.array:
        """The i-th piece of keys or values `[1, H, S, D]`. If the array is shorter than a piece: zeros of that size."""
        if array.shape[2] < self._piece:
            return mx.zeros((*array.shape[:2], self._piece, array.shape[3]), array.dtype)
        return mx.contiguous(array[:, :, i * self._piece : (i + 1) * self._piece])

    def _joined(self, pieces: mx.array, last: mx.array) -> mx.array:
        """Keys or values of all tokens, from the pieces on disk (bytes `[n, nbytes]`) and the last one, in memory."""
        _, heads, _, width = last.shape
        full = mx.contiguous(pieces).view(last.dtype).reshape(-1, 1, heads, self._piece, width)
        return mx.concatenate([*full, last], axis=2)
