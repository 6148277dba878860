"""From a hidden state to the loss, and back: the tail's blocks, if there are any, and the head.

The head is the model's own call with its blocks skipped: whatever norm, projection and soft cap follow the
last block. Logits `[tokens, vocab]` exist whole only when they are small; otherwise a chunk at a time, and
only for tokens that count. The tail and the head are one lazy graph, neither read twice nor recomputed; weights
are in place throughout. Runs on the compute thread, and while a plan is made.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .cores import by_rows
from .pieces import after

# tail(arrays) -> the last block's output; arrays are what goes into the tail, in a fixed order
Tail = Callable[[list[mx.array]], Any]
# head(hidden, n_rows, n_tokens) -> logits [n_rows, n_tokens, V]; hidden is a tree as the last block returned it
Head = Callable[[Any, int, int], mx.array]


_cross_entropy = by_rows(nn.losses.cross_entropy)  # of logits [n, V] and targets [n]

LOGITS_NBYTES = 64 << 20  # of logits that may exist at once where nothing else is said


def usual_chunk(vocab_size: int) -> int:
    """How many tokens' logits may exist at once where nothing else is said."""
    return max(1, LOGITS_NBYTES // (4 * vocab_size))


def loss_mask(lengths: mx.array, n_targets: int) -> mx.array:
    """Which targets count, bool `[B, n_targets]`: mlx-lm's `default_loss`, from lengths `[B, 2]`."""
    steps = mx.arange(1, n_targets + 1)
    return mx.logical_and(steps >= lengths[:, 0:1], steps <= lengths[:, 1:])


def token_loss(logits: mx.array, targets: mx.array, mask: mx.array, total: mx.array) -> mx.array:
    """Cross-entropy over the tokens in `mask`, divided by `total`: mlx-lm's `default_loss` when total is theirs."""
    ce = _cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)).reshape(mask.shape) * mask
    return ce.astype(mx.float32).sum() / total


class HeadLoss:
    """Loss of one micro-batch and its gradients, as one lazy graph.

    Args:
        targets, mask: `[B, T]`; total: tokens that the whole step's loss is divided by.
        tail_entries, head_entries: (owner, key) of the adapters' arrays in the tail and outside the blocks; `params`
            are their values, in this order.
        chunk_tokens: the most tokens whose logits may exist at once; None computes all at once.
        left_out: so many chunks before the last one, each number of them together, leave zeros instead of being
            computed. For plans, which need no more of the graph.
    """

    def __init__(
        self,
        tail: Tail,
        head: Head,
        targets: mx.array,
        mask: mx.array,
        total: mx.array,
        tail_entries: Sequence[tuple[Any, Any]],
        head_entries: Sequence[tuple[Any, Any]],
        chunk_tokens: int | None,
        left_out: Sequence[int] = (),
    ):
        self._tail, self._head = tail, head
        self._targets, self._mask, self._total = targets, mask, total
        self._tail_entries, self._head_entries = list(tail_entries), list(head_entries)
        self._chunk_tokens, self._left_out = chunk_tokens, list(left_out)

    def loss(self, arrays: list[mx.array], params: Sequence[mx.array]) -> mx.array:
        """The loss, unevaluated."""
        return self._loss(arrays, params, gradients=False)[1]

    def loss_and_grads(
        self, arrays: list[mx.array], params: Sequence[mx.array], wrt: Sequence[int]
    ) -> tuple[mx.array, list[mx.array]]:
        """(loss, gradients), unevaluated. `wrt` counts through the arrays, then the params."""
        if not wrt:
            return self.loss(arrays, params), []
        everything = [*arrays, *params]

        def loss(variables: list[mx.array]) -> tuple[mx.array, mx.array]:
            inputs = list(everything)
            for i, value in zip(wrt, variables):
                inputs[i] = value
            return self._loss(inputs[: len(arrays)], inputs[len(arrays) :], gradients=True)

        (_, value), gradients = mx.value_and_grad(loss)([everything[i] for i in wrt])
        return value, gradients

    def _loss(self, arrays: list[mx.array], params: Sequence[mx.array], gradients: bool) -> tuple[mx.array, mx.array]:
        """(what has the loss's gradients, the loss)."""
        n_tail = len(self._tail_entries)
        _put(self._tail_entries, params[:n_tail])
        _put(self._head_entries, params[n_tail:])
        hidden = self._tail(arrays)
        if self._chunk_tokens is not None:
            return self._chunked(hidden, params[n_tail:], gradients)
        logits = self._head(hidden, *self._targets.shape)
        loss = token_loss(logits, self._targets, self._mask, self._total)
        return loss, loss

    def _chunked(self, hidden: mx.array, params: Sequence[mx.array], gradients: bool) -> tuple[mx.array, mx.array]:
        """The loss with logits of `chunk_tokens` at a time; its gradients are computed along with it.

        Per token, what is computed is what the whole head computes; the order of sums over tokens differs only in
        the gradients of the head's own parameters.
        """
        counted = np.flatnonzero(np.asarray(self._mask))  # padding and prompts cost nothing
        targets, shape = self._targets.reshape(-1), hidden.shape

        def losses(h: mx.array, params: Sequence[mx.array], tokens: mx.array) -> mx.array:
            _put(self._head_entries, params)
            return _cross_entropy(self._head(h[None], 1, h.shape[0])[0], targets[tokens])

        def spread(parts: list[mx.array], shape: tuple[int, ...]) -> mx.array:
            values = mx.concatenate(parts)
            whole = mx.zeros((self._mask.size, *values.shape[1:]), values.dtype)
            whole[mx.array(counted)] = values
            return whole.reshape(shape)

        def compute(hidden: mx.array, params: Sequence[mx.array]):
            flat = hidden.reshape(-1, shape[-1])
            of_tokens: list[mx.array] = []
            of_hidden: list[mx.array] = []
            of_params: list[mx.array] = []
            for chunk, is_computed in self._chunks(counted):
                tokens = mx.array(chunk)
                before = [*of_tokens[-1:], *of_hidden[-1:], *of_params]  # one chunk after the other
                if not is_computed:
                    of_tokens.append(after(mx.zeros((len(chunk),)), before))
                    of_hidden.append(after(mx.zeros((len(chunk), shape[-1]), hidden.dtype), before))
                    continue
                h = after(flat[tokens], before)
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
            loss = spread(of_tokens, self._mask.shape).astype(mx.float32).sum() / self._total
            return loss, spread(of_hidden, shape) if gradients else None, of_params

        loss, of_hidden, of_params = compute(mx.stop_gradient(hidden), [mx.stop_gradient(p) for p in params])
        if not gradients:
            return loss, loss
        # a function that has these gradients; its value is never computed
        pairs = zip([of_hidden, *of_params], [hidden, *params])
        return sum((mx.stop_gradient(g) * x).sum().astype(mx.float32) for g, x in pairs), loss

    def _chunks(self, counted: np.ndarray) -> Iterator[tuple[np.ndarray, bool]]:
        """(numbers of the tokens, whether they are computed) of each chunk; what is left out together is one."""
        n = -(-len(counted) // self._chunk_tokens)
        left_out = [(m, False) for m in self._left_out]
        start = 0
        for n_together, is_computed in [(1, True)] * (n - 1 - sum(self._left_out)) + left_out + [(1, True)]:
            end = start + n_together * self._chunk_tokens
            yield counted[start:end], is_computed
            start = end


def _put(entries: Sequence[tuple[Any, Any]], values: Sequence[mx.array]) -> None:
    for (owner, key), value in zip(entries, values):
        owner[key] = value


def treats_tokens_alike(head: Head, hidden: mx.array) -> bool:
    """Whether the head gives a token the same logits alone as among others, tried on `hidden` `[B, T, D]`.

    Only then may it be computed in chunks. Runs on the compute thread with the head's weights in place.
    """
    tokens = hidden.reshape(1, -1, hidden.shape[-1])[:, :3]
    n = tokens.shape[1]
    together = head(tokens, 1, n).astype(mx.float32)
    alone = mx.concatenate([head(tokens[:, i : i + 1], 1, 1) for i in range(n)], axis=1).astype(mx.float32)
    scale = mx.abs(together).max() + 1e-6
    return (mx.abs(together - alone).max() / scale).item() < (1e-4 if hidden.dtype == mx.float32 else 3e-2)
