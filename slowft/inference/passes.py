"""Takes rows of tokens through an opened model, as many at a time as memory has room for, with several adapters.

Comes in: rows, and which of their tokens count. Goes out: log-probabilities of each row with each adapter, as passes
over the weights give them. Knows nothing of texts.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..data.batches import PADDING
from ..engine.log_probabilities import LogProbabilities
from ..engine.model import MicroBatch
from .decoder import Decoder

# Tokens of a micro-batch. Matrix products run at full speed with so many, and most of the memory is still left for the
# hidden states of other micro-batches.
BATCH_TOKENS = 2048


@dataclass(frozen=True)
class Row:
    """Tokens, and pairs (first, last) of those that count, numbered from 0; the token at 0 has no probability."""

    tokens: Sequence[int]
    pairs: Sequence[tuple[int, int]]

    @classmethod
    def answer(cls, tokens: Sequence[int], n_prompt: int) -> "Row":
        """A row in which all tokens count but the first `n_prompt`."""
        return cls(tokens, [(n_prompt, len(tokens) - 1)])

    @property
    def n_counted(self) -> int:
        n = len(self.tokens)
        return sum(max(0, min(last, n - 1) - max(first, 1) + 1) for first, last in self.pairs)


def log_probabilities(
    model: Decoder,
    rows: Sequence[Row],
    adapters: Sequence[bool | str] = (True,),
    top_k: int = 0,
    token_ids: Sequence[int] = (),
    on_visit: Callable[[int], object] = lambda n: None,
    first: int = 0,
) -> Iterator[tuple[int, bool | str, LogProbabilities]]:
    """(number of a row, adapter, log-probabilities) of every row with every adapter, the longest rows first.

    Args:
        rows: each has at least one token that counts.
        adapters: False: none; True: the attached one; or names of adapters that were added.
        top_k, token_ids, on_visit: see `Decoder.log_probabilities`.
        first: number of the first of `batches_of` to compute. Results do not depend on it, to the last bit.
    """
    batches = batches_of([len(row.tokens) for row in rows])
    micro_batches = []
    for numbers in batches:
        batch = _padded([rows[number] for number in numbers])
        micro_batches += [MicroBatch(*batch, adapter) for adapter in adapters]
    options = {"top_k": top_k, "token_ids": token_ids, "on_visit": on_visit, "first": first * len(adapters)}
    results = model.log_probabilities(micro_batches, **options) if micro_batches else iter(())
    for numbers in batches[first:]:
        for adapter in adapters:
            for number, of_row in zip(numbers, next(results).rows()):
                yield number, adapter, of_row


def n_visits(model: Decoder, rows: Sequence[Row], adapters: Sequence[bool | str]) -> int:
    """Block passes of all micro-batches in `log_probabilities`: the sum of the numbers that `on_visit` is given."""
    return len(batches_of([len(row.tokens) for row in rows])) * model.block_passes(adapters)


def batches_of(lengths: Sequence[int]) -> list[list[int]]:
    """Numbers of the rows of each micro-batch: rows of similar length go together, the longest first.

    No micro-batch has more tokens, padding included, than the one with the longest row.
    """
    order = np.argsort(-np.asarray(lengths, np.int64), kind="stable").tolist()
    batches: list[list[int]] = []
    limit = 0
    while order:
        tokens = _targets(lengths[order[0]])
        limit = limit or max(tokens, BATCH_TOKENS // tokens * tokens)
        n = limit // tokens
        batches.append(order[:n])
        order = order[n:]
    return batches


def _targets(n_tokens: int) -> int:
    """Targets in each row of a batch whose longest row has so many tokens. Few widths let buffers be reused."""
    return max(1, -(-(n_tokens - 1) // PADDING)) * PADDING


def _padded(rows: Sequence[Row]) -> tuple[mx.array, mx.array]:
    """(token ids `[B, T+1]`, lengths `[B, 2n]`). Rows with fewer than n pairs are filled up with pairs of no token."""
    ids = np.zeros((len(rows), _targets(max(len(row.tokens) for row in rows)) + 1), np.int32)
    lengths = np.tile(np.array([1, 0], np.int32), (len(rows), max(len(row.pairs) for row in rows)))
    for i, row in enumerate(rows):
        n = len(row.tokens)
        ids[i, :n] = row.tokens
        within = [(max(first, 1), min(last, n - 1)) for first, last in row.pairs]
        lengths[i, : 2 * len(within)] = np.array(within, np.int32).reshape(-1)
    return mx.array(ids), mx.array(lengths)
