"""From the last block's output to the loss, and back: the head, in chunks of tokens.

The head is the model's own call with its blocks skipped: whatever norm, projection and soft cap follow the
last block. Logits `[tokens, vocab]` exist whole only when they are small; otherwise a chunk at a time, and
only for tokens that count. Weights are in place throughout, so they are read once however many chunks.
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..models.seams import FLOATS
from .trees import pack, unpack

# head(hidden, n_rows, n_tokens) -> logits [n_rows, n_tokens, V]; hidden is a tree as the last block returned it
Head = Callable[[Any, int, int], mx.array]


def loss_mask(lengths: mx.array, n_targets: int) -> mx.array:
    """Which targets count, bool `[B, n_targets]`: mlx-lm's `default_loss`, from lengths `[B, 2]`."""
    steps = mx.arange(1, n_targets + 1)
    return mx.logical_and(steps >= lengths[:, 0:1], steps <= lengths[:, 1:])


def token_loss(logits: mx.array, targets: mx.array, mask: mx.array, total: mx.array) -> mx.array:
    """Cross-entropy over the tokens in `mask`, divided by `total`: mlx-lm's `default_loss` when total is theirs."""
    ce = nn.losses.cross_entropy(logits, targets) * mask
    return ce.astype(mx.float32).sum() / total


class HeadLoss:
    """Loss of one micro-batch and its gradients with respect to the hidden state and the head's parameters.

    Args:
        targets, mask: `[B, T]`; total: tokens that the whole step's loss is divided by.
        entries: (owner, key) of trainable parameters outside the blocks.
        chunk_tokens: the most tokens whose logits may exist at once; None computes all at once.
    """

    def __init__(
        self, head: Head, targets: mx.array, mask: mx.array, total: mx.array, entries, chunk_tokens: int | None
    ):
        self._head, self._targets, self._mask, self._total = head, targets, mask, total
        self._entries, self._chunk_tokens = list(entries), chunk_tokens

    def compute(self, hidden: Any, params: list[mx.array], gradients: bool) -> tuple[mx.array, list, list]:
        """(loss, cotangents of the hidden arrays, gradients of `params`), evaluated. Runs on the compute thread."""
        arrays: list[mx.array] = []
        spec = pack(hidden, arrays)
        if self._chunk_tokens is None or len(arrays) != 1:
            return self._whole(spec, arrays, params, gradients)
        return self._chunked(arrays[0], params, gradients)

    def _whole(self, spec, arrays, params, gradients):
        wrt = [i for i, a in enumerate(arrays) if a.dtype in FLOATS]

        def loss(*variables):
            inputs = list(arrays)
            for i, value in zip(wrt, variables):
                inputs[i] = value
            self._set_params(variables[len(wrt) :])
            logits = self._head(unpack(spec, inputs), *self._targets.shape)
            return token_loss(logits, self._targets, self._mask, self._total)

        variables = [arrays[i] for i in wrt] + list(params)
        if not gradients:
            value = loss(*variables)
            mx.eval(value)
            return value, [], []
        value, of_variables = _value_and_grads(loss, variables)
        of_arrays = [mx.zeros_like(a) for a in arrays]
        for i, gradient in zip(wrt, of_variables):
            of_arrays[i] = gradient
        return value, of_arrays, of_variables[len(wrt) :]

    def _chunked(self, hidden, params, gradients):
        counted = np.flatnonzero(np.asarray(self._mask))  # padding and prompts cost nothing
        flat, targets = hidden.reshape(-1, hidden.shape[-1]), self._targets.reshape(-1)
        value = mx.array(0.0)
        of_hidden = np.zeros(flat.shape, np.float32) if gradients else None
        of_params: list[mx.array] = []
        for start in range(0, len(counted), self._chunk_tokens):
            tokens = counted[start : start + self._chunk_tokens]
            index = mx.array(tokens)
            ones = mx.ones((1, len(tokens)), mx.bool_)

            def loss(h, *ps):
                self._set_params(ps)
                return token_loss(self._head(h, 1, len(tokens)), targets[index][None], ones, self._total)  # noqa: B023

            variables = [flat[index][None], *params]
            if not gradients:
                part = loss(*variables)
                mx.eval(part)
            else:
                part, (of_chunk, *of_chunk_params) = _value_and_grads(loss, variables)
                of_hidden[tokens] = np.asarray(of_chunk[0].astype(mx.float32))
                of_params = [a + b for a, b in zip(of_params, of_chunk_params)] or of_chunk_params
                mx.eval(of_params)
            value = value + part
            mx.eval(value)
        if not gradients:
            return value, [], []
        of_hidden = mx.array(of_hidden).reshape(hidden.shape).astype(hidden.dtype)
        of_params = of_params or [mx.zeros_like(p) for p in params]
        mx.eval(of_hidden, of_params)
        return value, [of_hidden], of_params

    def _set_params(self, params) -> None:
        for (owner, key), value in zip(self._entries, params):
            owner[key] = value


def _value_and_grads(function, variables):
    value, gradients = mx.value_and_grad(lambda vs: function(*vs))(variables)
    mx.eval(value, gradients)
    return value, gradients


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
