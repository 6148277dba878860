"""From logits to the log-probabilities that are asked for: of targets, of the most probable tokens, of given tokens.

Comes in: a function that gives logits of some targets, and which of them count. Goes out: NumPy arrays. Logits exist
a chunk of tokens at a time, and only of tokens that count.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .cores import by_rows

# of numbers among all `B * T` targets, logits `[n, V]` of all that is scored, unevaluated
LogitsOf = Callable[[np.ndarray], Sequence[mx.array]]
Mix = Callable[[np.ndarray, Sequence[mx.array]], Sequence[mx.array]]  # (numbers, passengers' logits) -> what is scored

WHOLE_PIECES = 4  # in which logits that all exist are looked at, so that what is made of them takes less than they do
TOP_SHARE = 3  # of the tokens that are computed at once, one in so many where a partition of all logits is made too
FOUND_NBYTES = 20  # of a target's, without what is asked for: an entry of that takes 8 more, or 4

_log_softmax = by_rows(nn.log_softmax)
_others = by_rows(lambda each, ids: mx.logsumexp(mx.put_along_axis(each, ids, mx.array(-mx.inf), axis=-1), axis=-1))
_argmax = by_rows(lambda logits: mx.argmax(logits, axis=-1))


@dataclass(frozen=True)
class Mixing:
    """Has what is scored made of the logits of several passengers, which have the same tokens, a chunk at a time.

    Attributes:
        passengers: that come after each other. results: that are made of them.
        begin: is given tokens `[B, T]`, and gives the function that mixes; its numbers rise.
        chunk_tokens: the most tokens at a time; None: as many as without mixing.
        nbytes: what mixing takes, in bytes.
    """

    passengers: int
    results: int
    begin: Callable[[mx.array], Mix]
    chunk_tokens: int | None
    nbytes: int

    def at_once(self, tokens: int, chunk: int | None) -> int:
        """How many tokens are looked at at a time. `chunk`: whose logits are computed at a time; None: of all."""
        if self.chunk_tokens is None:
            return chunk or -(-tokens // WHOLE_PIECES)
        return min(chunk or tokens, self.chunk_tokens)


PLAIN = Mixing(1, 1, lambda tokens: lambda numbers, logits: logits, None, 0)  # each passenger is scored itself


@dataclass(frozen=True)
class LogProbabilities:
    """What a model holds for probable at the targets that count, row after row; NumPy arrays.

    Attributes:
        per_row: int64 `[B]`, how many targets of each row count; n is their sum.
        target: float32 `[n]`, log-probability of each target.
        is_greedy: bool `[n]`, whether it is the most probable token.
        top_ids, top: int32 and float32 `[n, k]`, the k most probable tokens, the most probable first.
        of_tokens: float32 `[n, m]`, of the m token ids that were asked for.
        others: float32 `[n]`, of all tokens together but the k most probable; minus infinity where there are none.
            Only with k.
    """

    per_row: np.ndarray
    target: np.ndarray
    is_greedy: np.ndarray
    top_ids: np.ndarray
    top: np.ndarray
    of_tokens: np.ndarray
    others: np.ndarray

    def rows(self) -> "list[LogProbabilities]":
        """Each row's own."""
        ends = np.cumsum(self.per_row)[:-1]
        parts = zip(self.per_row.reshape(-1, 1), *(np.split(array, ends) for array in self._arrays()[1:]))
        return [LogProbabilities(*part) for part in parts]

    @classmethod
    def joined(cls, parts: "Sequence[LogProbabilities]") -> "LogProbabilities":
        if len(parts) == 1:  # no second copy
            return parts[0]
        return cls(*(np.concatenate(arrays) for arrays in zip(*(part._arrays() for part in parts))))

    def _arrays(self) -> list[np.ndarray]:
        return [getattr(self, field.name) for field in fields(self)]


def log_probabilities(
    logits_of: LogitsOf,
    n_results: int,
    targets: mx.array,
    mask: mx.array,
    chunk_tokens: int,
    top_k: int,
    token_ids: Sequence[int],
) -> list[LogProbabilities]:
    """Log-probabilities at the targets in `mask`, as mlx-lm's evaluate.py computes them: log_softmax in float32.

    Args:
        n_results: that `logits_of` gives logits of.
        targets, mask: `[B, T]`.
        chunk_tokens: the most tokens whose logits are asked for at once.
    """
    is_counted = np.asarray(mask)
    counted, flat = np.flatnonzero(is_counted), targets.reshape(-1)
    found: list[list[list[np.ndarray]]] = [[] for _ in range(n_results)]
    step = max(1, chunk_tokens // TOP_SHARE) if top_k else chunk_tokens
    for start in range(0, len(counted), step):
        chunk = counted[start : start + step]
        wanted = flat[mx.array(chunk)][:, None]
        logits = list(logits_of(chunk))
        for of_result in found:  # what was looked at is let go
            of_result.append(_of_chunk(logits.pop(0), wanted, top_k, token_ids))
    if not len(counted):
        empty = np.zeros((0, top_k), np.int32), np.zeros((0, top_k), np.float32)
        of_none = np.zeros((0, len(token_ids)), np.float32)
        found = [[[np.zeros(0, np.float32), np.zeros(0, bool), *empty, of_none, np.zeros(0, np.float32)]]] * n_results
    per_row = is_counted.sum(axis=1)
    return [LogProbabilities(per_row, *map(np.concatenate, zip(*of_result))) for of_result in found]


def _of_chunk(logits: mx.array, wanted: mx.array, top_k: int, token_ids: Sequence[int]) -> list[np.ndarray]:
    """Arrays of a `LogProbabilities`, but for the first, of logits `[n, V]` and targets `[n, 1]`."""
    n, k, logits = len(logits), min(top_k, logits.shape[-1]), logits.astype(mx.float32)
    each = _log_softmax(logits)
    ids = _top(each, k) if k else mx.zeros((n, 0), mx.uint32)
    at = [wanted, ids, mx.broadcast_to(mx.array(list(token_ids), mx.int32), (n, len(token_ids)))]
    values = [mx.take_along_axis(each, indices, axis=-1) for indices in at]
    is_greedy = _argmax(logits) == wanted[:, 0]
    others = _others(each, ids) if 0 < k < logits.shape[-1] else mx.full(n, -mx.inf)
    mx.eval(values, ids, is_greedy, others)  # so that the next chunk's logits take the place of these
    target, top, of_tokens = (np.array(value) for value in values)
    ids, is_greedy = np.array(ids).astype(np.int32), np.array(is_greedy)
    order = np.lexsort((ids, -top))
    top, ids = np.take_along_axis(top, order, -1), np.take_along_axis(ids, order, -1)
    return [target[:, 0], is_greedy, ids, top, of_tokens, np.array(others)]


def _top(values: mx.array, k: int) -> mx.array:
    """Ids of the k largest of each row, in no order."""
    return by_rows(lambda part: mx.argpartition(part, kth=-k, axis=-1)[:, -k:])(values)
