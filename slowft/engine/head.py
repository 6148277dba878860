"""From the last block's output to the loss, and from the loss to gradients.

The head is the model's own call with its blocks skipped: whatever norm, projection and soft cap follow the last block.
All logits `[tokens, vocab]` exist at once where there is memory for them; else a chunk at a time, and only for tokens
that count. Weights have to be in place. In ordinary training the blocks are part of the same graph.
"""

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from .. import platform
from ..planning.plan import LOGITS_NBYTES
from .distillation import Teacher, cross_entropy
from .pieces import after
from .trees import put

# head(hidden, n_rows, n_tokens) -> logits [n_rows, n_tokens, V]
Head = Callable[[mx.array, int, int], mx.array]
# blocks(hidden) -> the last block's output
Blocks = Callable[[mx.array], mx.array]
Entries = Sequence[tuple[Any, Any]]  # (owner, key) of arrays


def usual_chunk(vocab_size: int) -> int:
    """How many tokens' logits may exist at once in a forward pass alone if neither user nor schedule says so."""
    return max(1, LOGITS_NBYTES // (4 * vocab_size))


def unbounded_chunk(vocab_size: int) -> int:
    """How many may exist at once without a ceiling. The head makes up to four such arrays: a quarter of the memory."""
    return max(usual_chunk(vocab_size), platform.memory_limit() // 16 // (4 * vocab_size))


def loss_mask(lengths: mx.array, n_targets: int) -> mx.array:
    """Which targets count, bool `[B, n_targets]`, as in mlx-lm's `default_loss`.

    `lengths` `[B, 2]` are each sample's (prompt offset, tokens). A sample of n tokens has n - 1 targets of its own, but
    n count: as in mlx-lm, so does one padding token after it, if the row has room for one.

    With lengths `[B, 2n]`, targets count that any of the n pairs (first, last) includes.
    """
    steps = mx.arange(1, n_targets + 1)
    counts = mx.logical_and(steps >= lengths[:, 0:1], steps <= lengths[:, 1:2])
    for i in range(2, lengths.shape[1], 2):
        counts = counts | mx.logical_and(steps >= lengths[:, i : i + 1], steps <= lengths[:, i + 1 : i + 2])
    return counts


def token_loss(
    logits: mx.array, targets: mx.array, mask: mx.array, total: mx.array, teacher: Teacher | None = None
) -> mx.array:
    """Cross-entropy over the tokens in `mask`, divided by `total`: mlx-lm's `default_loss` if total is their number.

    With a teacher, the loss is that of `distillation`.
    """
    losses = cross_entropy if teacher is None else teacher.losses
    each = losses(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)).reshape(mask.shape) * mask
    return each.astype(mx.float32).sum() / total


class HeadLoss:
    """Loss of one micro-batch and its gradients, as one lazy graph.

    Args:
        targets, mask: `[B, T]`.
        total: tokens that the whole step's loss is divided by.
        chunk_tokens: the most tokens whose logits may exist at once; None computes all at once.
        head_entries: the adapters' arrays outside the blocks.
        blocks: computes the blocks before the head, if they are in the same graph.
        block_entries: the adapters' arrays in these.
        teacher: the loss is taken against its probabilities too.
    """

    def __init__(
        self,
        head: Head,
        targets: mx.array,
        mask: mx.array,
        total: mx.array,
        chunk_tokens: int | None,
        head_entries: Entries,
        blocks: Blocks = lambda hidden: hidden,
        block_entries: Entries = (),
        teacher: Teacher | None = None,
    ):
        self._teacher = teacher
        self._head, self._targets, self._mask, self._total = head, targets, mask, total
        self._chunk_tokens, self._head_entries = chunk_tokens, list(head_entries)
        self._blocks, self._block_entries = blocks, list(block_entries)

    def loss(self, hidden: mx.array, params: Sequence[mx.array]) -> mx.array:
        """The loss, unevaluated. `params` are the values of the blocks' entries, then of the head's."""
        return self._loss(hidden, params, gradients=False)[1]

    def loss_and_grads(
        self, hidden: mx.array, params: Sequence[mx.array], differentiated: Sequence[int]
    ) -> tuple[mx.array, list[mx.array]]:
        """(loss, gradients), unevaluated. In `differentiated`, 0 is `hidden`, and the params count from 1 on."""
        inputs = [hidden, *params]

        def loss(variables: list[mx.array]) -> tuple[mx.array, mx.array]:
            arrays = list(inputs)
            for i, variable in zip(differentiated, variables):
                arrays[i] = variable
            return self._loss(arrays[0], arrays[1:], gradients=True)

        (_, value), gradients = mx.value_and_grad(loss)([inputs[i] for i in differentiated])
        return value, gradients

    def _loss(self, hidden: mx.array, params: Sequence[mx.array], gradients: bool) -> tuple[mx.array, mx.array]:
        """(a scalar whose gradients are the loss's, the loss)."""
        n = len(self._block_entries)
        put(self._block_entries, params[:n])
        put(self._head_entries, params[n:])
        hidden = self._blocks(hidden)
        if self._chunk_tokens is not None:
            return self._chunked(hidden, params[n:], gradients)
        logits = self._head(hidden, *self._targets.shape)
        loss = token_loss(logits, self._targets, self._mask, self._total, self._teacher)
        return loss, loss

    def _chunked(self, hidden: mx.array, params: Sequence[mx.array], gradients: bool) -> tuple[mx.array, mx.array]:
        """The same as `_loss`, with logits of `chunk_tokens` tokens at a time.

        For each token this computes what the whole head computes. Only gradients of the head's own parameters have
        another order of sums over tokens.
        """
        counted = np.flatnonzero(np.asarray(self._mask))  # so padding and prompts cost nothing
        targets, shape = self._targets.reshape(-1), hidden.shape

        def losses(h: mx.array, params: Sequence[mx.array], tokens: mx.array) -> mx.array:
            put(self._head_entries, params)
            logits = self._head(h[None], 1, h.shape[0])[0]
            if self._teacher is not None:
                return self._teacher.losses(logits, targets[tokens], tokens)
            return cross_entropy(logits, targets[tokens])

        def at_all_tokens(parts: list[mx.array], shape: tuple[int, ...]) -> mx.array:
            values = mx.concatenate(parts)
            whole = mx.zeros((self._mask.size, *values.shape[1:]), values.dtype)
            whole[mx.array(counted)] = values
            return whole.reshape(shape)

        def compute(hidden: mx.array, params: Sequence[mx.array]):
            flat = hidden.reshape(-1, shape[-1])
            of_tokens: list[mx.array] = []
            of_hidden: list[mx.array] = []
            of_params: list[mx.array] = []
            for start in range(0, len(counted), self._chunk_tokens):
                chunk = counted[start : start + self._chunk_tokens]
                tokens = mx.array(chunk)
                h = after(flat[tokens], [*of_tokens[-1:], *of_hidden[-1:], *of_params])  # one chunk after the other
                if not gradients:
                    of_tokens.append(losses(h, params, tokens))
                    continue
                one = mx.ones((len(chunk),)) / self._total
                (ce,), (of_h, *of_ps) = mx.vjp(
                    lambda h, *ps, tokens=tokens: losses(h, ps, tokens).astype(mx.float32), [h, *params], [one]
                )
                of_tokens.append(ce)
                of_hidden.append(of_h)
                of_params = [a + b for a, b in zip(of_params, of_ps)] or list(of_ps)
            loss = at_all_tokens(of_tokens, self._mask.shape).astype(mx.float32).sum() / self._total
            return loss, at_all_tokens(of_hidden, shape) if gradients else None, of_params

        loss, of_hidden, of_params = compute(mx.stop_gradient(hidden), [mx.stop_gradient(p) for p in params])
        if not gradients:
            return loss, loss
        # The sum below has these gradients, and its value is never computed
        pairs = zip([of_hidden, *of_params], [hidden, *params])
        return sum((mx.stop_gradient(g) * x).sum().astype(mx.float32) for g, x in pairs), loss
