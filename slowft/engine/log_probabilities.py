"""From logits to log-probabilities: of targets, of the most probable tokens, and of given tokens.

Comes in: functions that give the logits of some targets, and which targets count. Goes out: NumPy arrays. Logits exist
for a chunk of tokens at a time, and only for tokens that count.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .cores import by_rows

# numbers `[n]` among all `B * T` targets -> a passenger's logits `[n, V]` of these, unevaluated
LogitsOf = Callable[[mx.array], mx.array]
# (such numbers, the logits of each passenger) -> the logits that are scored
Mix = Callable[[np.ndarray, Sequence[mx.array]], Sequence[mx.array]]

WHOLE_PIECES = 4  # where all logits exist, they are scored in so many pieces: arrays made of a piece are smaller
TOP_SHARE = 3  # with top_k, one in so many tokens is scored at once: its partition of all logits takes memory too
RESULT_NBYTES = 20  # bytes of a target's results; each of the top k tokens takes 8 more, each of `token_ids` 4 more

_log_softmax = by_rows(nn.log_softmax)
_others = by_rows(lambda each, ids: mx.logsumexp(mx.put_along_axis(each, ids, mx.array(-mx.inf), axis=-1), axis=-1))
_argmax = by_rows(lambda logits: mx.argmax(logits, axis=-1))


@dataclass(frozen=True)
class Mixing:
    """Makes the logits that are scored of the logits of several passengers, a chunk of tokens at a time.

    Attributes:
        passengers: how many there are in a group. They have the same tokens, and come one after the other.
        results: how many logits are made of a group's.
        begin: is given tokens `[B, T]`, and returns the function that mixes. That is called with rising numbers.
        chunk_tokens: the most tokens at a time; None for as many as without mixing.
        nbytes: bytes that mixing takes.
    """

    passengers: int
    results: int
    begin: Callable[[mx.array], Mix]
    chunk_tokens: int | None
    nbytes: int

    def at_once(self, tokens: int, chunk: int | None) -> int:
        """How many of `tokens` are scored at a time, if logits are computed for `chunk` at a time (None: for all)."""
        if self.chunk_tokens is None:
            return chunk or -(-tokens // WHOLE_PIECES)
        return min(chunk or tokens, self.chunk_tokens)


PLAIN = Mixing(1, 1, lambda tokens: lambda numbers, logits: logits, None, 0)  # scores each passenger's own logits


@dataclass(frozen=True)
class LogProbabilities:
    """Log-probabilities at the targets that count, row after row, as NumPy arrays.

    Attributes:
        per_row: int64 `[B]`, how many targets of each row count; n is their sum.
        target: float32 `[n]`, log-probability of each target.
        is_greedy: bool `[n]`, whether the target is the most probable token.
        top_ids, top: int32 and float32 `[n, k]`, ids and log-probabilities of the k most probable tokens, the most
            probable first.
        of_tokens: float32 `[n, m]`, log-probabilities of the m given token ids.
        others: float32 `[n]`, log-probability of all other tokens than the k most probable together. Minus infinity
            where there are none, and if k is 0.
    """

    per_row: np.ndarray
    target: np.ndarray
    is_greedy: np.ndarray
    top_ids: np.ndarray
    top: np.ndarray
    of_tokens: np.ndarray
    others: np.ndarray

    def rows(self) -> "list[LogProbabilities]":
        """The same for each row alone."""
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
    each: Sequence[LogitsOf],
    mixing: Mixing,
    mix: Mix,
    targets: mx.array,
    mask: mx.array,
    chunk: int | None,
    top_k: int,
    token_ids: Sequence[int],
) -> list[LogProbabilities]:
    """Log-probabilities at the targets in `mask`, as mlx-lm's evaluate.py computes them: log_softmax in float32.

    Args:
        each: gives the logits of each passenger of a group.
        mix: mixes them, from `mixing.begin`.
        targets, mask: `[B, T]`, of all passengers.
        chunk: how many tokens' logits are computed at a time; None if all are.
    """
    is_counted = np.asarray(mask)
    counted, flat = np.flatnonzero(is_counted), targets.reshape(-1)
    results: list[list[list[np.ndarray]]] = [[] for _ in range(mixing.results)]
    at_once = mixing.at_once(mask.size, chunk)
    at_once = max(1, at_once // TOP_SHARE) if top_k else at_once
    for start in range(0, len(counted), at_once):
        numbers = counted[start : start + at_once]
        chunk_targets = flat[mx.array(numbers)][:, None]
        logits = list(mix(numbers, [logits_of(mx.array(numbers)) for logits_of in each]))
        for result in results:  # `pop`: logits that were scored leave memory
            result.append(_of_chunk(logits.pop(0), chunk_targets, top_k, token_ids))
    if not len(counted):
        top, of_tokens = np.zeros((0, top_k), np.float32), np.zeros((0, len(token_ids)), np.float32)
        none = np.zeros(0, np.float32)
        results = [[[none, np.zeros(0, bool), top.astype(np.int32), top, of_tokens, none]]] * mixing.results
    per_row = is_counted.sum(axis=1)
    return [LogProbabilities(per_row, *map(np.concatenate, zip(*result))) for result in results]


def _of_chunk(logits: mx.array, targets: mx.array, top_k: int, token_ids: Sequence[int]) -> list[np.ndarray]:
    """The arrays of a `LogProbabilities` after `per_row`, from logits `[n, V]` and targets `[n, 1]`."""
    n, k, logits = len(logits), min(top_k, logits.shape[-1]), logits.astype(mx.float32)
    each = _log_softmax(logits)
    ids = _top(each, k) if k else mx.zeros((n, 0), mx.uint32)
    columns = [targets, ids, mx.broadcast_to(mx.array(list(token_ids), mx.int32), (n, len(token_ids)))]
    values = [mx.take_along_axis(each, indices, axis=-1) for indices in columns]
    is_greedy = _argmax(logits) == targets[:, 0]
    others = _others(each, ids) if 0 < k < logits.shape[-1] else mx.full(n, -mx.inf)
    mx.eval(values, ids, is_greedy, others)  # so that the next chunk's logits may use the memory of these
    target, top, of_tokens = (np.array(value) for value in values)
    ids, is_greedy = np.array(ids).astype(np.int32), np.array(is_greedy)
    order = np.lexsort((ids, -top))
    top, ids = np.take_along_axis(top, order, -1), np.take_along_axis(ids, order, -1)
    return [target[:, 0], is_greedy, ids, top, of_tokens, np.array(others)]


def _top(values: mx.array, k: int) -> mx.array:
    """Ids of the k largest values of each row, in no order."""
    return by_rows(lambda part: mx.argpartition(part, kth=-k, axis=-1)[:, -k:])(values)
