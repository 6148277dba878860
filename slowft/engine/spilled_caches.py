"""Key-value caches of rows on disk while memory lacks room for them: all but the last few hundred tokens.

Comes in: mlx-lm's caches of single rows, before and after each block. Goes out: the same caches with the very same
values. Tokens are written once, in pieces of as many as a cache grows by; each pass reads them back, the next block's
while this one computes. A cache that forgets tokens again (drafts) has the piece that they were in written anew.
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
    """Of one row's cache of one block: where its place in the file begins, and how many tokens are in it."""

    offset: int
    piece_nbytes: int = 0
    n_tokens: int = 0
    was: int = 0
    ahead: Future | None = None


class SpilledCaches:
    """Caches of up to `rows` rows, of `tokens` tokens each, in one file without a name in `directory`.

    Args:
        token_nbytes: of keys and values of one token, for each block; 0 for blocks whose caches stay in memory.

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
        """A new row's, one for each block, empty."""
        slot = self._slots[caches[0]] = self._free.pop()
        offset = slot * self._row_nbytes
        for cache, nbytes in zip(caches, self._places):
            if nbytes and type(cache) is self._kind:
                self._on_disk[cache] = _OnDisk(offset)
            offset += nbytes

    def remove(self, caches: Sequence[Any]) -> None:
        """A row is finished."""
        self._free.append(self._slots.pop(caches[0]))
        for cache in caches:
            self._on_disk.pop(cache, None)

    def ahead(self, caches: Sequence[Any]) -> None:
        """These will be brought next: reading them starts now."""
        for cache in caches:
            place = self._on_disk.get(cache)
            if place is not None and place.n_tokens and place.ahead is None:
                nbytes = place.n_tokens // self._piece * place.piece_nbytes
                place.ahead = self._file.read(place.offset, nbytes)

    def bring(self, cache: Any) -> None:
        """Put a cache's tokens back into it."""
        place = self._on_disk.get(cache)
        if place is None:
            return
        place.was = cache.offset
        if not place.n_tokens:
            return
        self.ahead([cache])
        raw, place.ahead = mx.array(place.ahead.result()), None
        n = place.n_tokens // self._piece
        parts = raw.reshape(n, place.piece_nbytes)
        split = self._piece_of(cache.keys).nbytes
        cache.keys = self._joined(parts[:, :split], cache.keys)
        cache.values = self._joined(parts[:, split:], cache.values)
        mx.eval(cache.keys, cache.values)

    def put_away(self, cache: Any) -> None:
        """Write what is new of an evaluated cache, and keep no more of it in memory than its last piece."""
        place = self._on_disk.get(cache)
        if place is None:
            return
        n, first = cache.offset // self._piece, place.was // self._piece
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
        """The i-th piece of `[1, H, S, D]` keys or values; of a shorter array, one of its size."""
        if array.shape[2] < self._piece:
            return mx.zeros((*array.shape[:2], self._piece, array.shape[3]), array.dtype)
        return mx.contiguous(array[:, :, i * self._piece : (i + 1) * self._piece])

    def _joined(self, pieces: mx.array, last: mx.array) -> mx.array:
        """Keys or values of all tokens, from bytes of the pieces on disk `[n, nbytes]` and the last one in memory."""
        _, heads, _, width = last.shape
        found = mx.contiguous(pieces).view(last.dtype).reshape(-1, 1, heads, self._piece, width)
        return mx.concatenate([*found, last], axis=2)
