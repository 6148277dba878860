"""Long sequences within a block: attention in pieces of queries, feed-forward layers in pieces of tokens.

A piece's intermediate values exist only while it is computed: in the forward pass, and again in the backward pass,
which recomputes it. The pieces are one lazy MLX graph. `mx.depends` puts them in order, so that each is done before the
next begins. Sums over tokens are taken piece by piece, so gradients equal those of the whole up to rounding.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..models.seams import array_entries, intercept
from ..planning.shapes import FEED_FORWARD
from .randomness import dropout_seed
from .trees import arrays_of, put

TOLERANCE, TOLERANCE_16_BITS = 1e-4, 3e-2  # relative, between a token's output alone and among others


@dataclass
class Pieces:
    """How much of a block is computed at once; None for all of it."""

    mlp_tokens: int | None = None
    attention_queries: int | None = None


class _FeedForward:
    """A feed-forward layer whose calls are intercepted."""

    def __init__(self, layer: nn.Module):
        self.layer = layer
        self._is_tokenwise: bool | None = None  # not known before its weights are in place

    def is_tokenwise(self, inner: Callable, x: mx.array) -> bool:
        """Whether the layer treats tokens one by one. It is tried once, with the layer's weights."""
        if self._is_tokenwise is None:
            training = self.layer.training
            self.layer.eval()  # without dropout, whose masks would differ
            tokens = mx.sin(mx.arange(3 * x.shape[-1])).reshape(1, 3, -1).astype(x.dtype)
            self._is_tokenwise = treats_tokens_alike(inner, tokens)
            self.layer.train(training)
        return self._is_tokenwise


class PieceWork:
    """Cuts blocks' feed-forward layers and attention into pieces while `cutting` is entered."""

    def __init__(self):
        self._pieces = Pieces()
        self._watched: list[nn.Module] = []
        self._inside = False
        self._seed = self._n_calls = 0

    def watch(self, block: nn.Module) -> None:
        if any(block is other for other in self._watched):
            return
        self._watched.append(block)
        for name, layer in block.items():
            if name in FEED_FORWARD and isinstance(layer, nn.Module):
                intercept(layer, "__call__", _FeedForward(layer), self._on_feed_forward)

    @contextmanager
    def cutting(self, pieces: Pieces, seed: int = 0) -> Iterator[None]:
        """While this is entered, cut the blocks' calls into such pieces, whose dropout is drawn from `seed`."""
        before, self._pieces = self._pieces, pieces
        self._seed, self._n_calls = seed % 2**32, 0
        attention = mx.fast.scaled_dot_product_attention
        if pieces.attention_queries is not None:
            mx.fast.scaled_dot_product_attention = _attention_in_pieces(attention, pieces.attention_queries)
        try:
            yield
        finally:
            self._pieces = before
            mx.fast.scaled_dot_product_attention = attention

    def _on_feed_forward(self, watched: "_FeedForward", inner: Callable, args: tuple, kwargs: dict) -> Any:
        n, (x, *rest) = self._pieces.mlp_tokens, args
        plain = not rest and not kwargs and isinstance(x, mx.array) and x.ndim == 3
        if n is None or self._inside or not plain or x.shape[1] <= n:
            return inner(*args, **kwargs)
        self._inside, self._n_calls = True, self._n_calls + 1
        try:
            if not watched.is_tokenwise(inner, x):
                return inner(x)
            return _tokens_in_pieces(inner, watched.layer, x, n, self._seed, self._n_calls)
        finally:
            self._inside = False


def _tokens_in_pieces(inner: Callable, layer: nn.Module, x: mx.array, n: int, seed: int, layer_number: int) -> mx.array:
    """`inner(x)` of x `[B, T, D]`, at most `n` of the T tokens at a time. Each piece has its own dropout masks."""
    entries = [(owner, key) for owner, key, _ in array_entries(layer)]
    trainable = [(o, k) for o, k in entries if _needs_gradient(o, k)]
    values = arrays_of(trainable)
    starts = range(0, x.shape[1], n)

    def call(piece: mx.array, params, start: int) -> mx.array:
        put(trainable, params)
        mx.random.seed(dropout_seed(seed, layer_number, start, 0))
        return inner(piece)

    @mx.custom_function
    def whole(x, *params):
        outputs: list[mx.array] = []
        for start in starts:
            outputs.append(call(after(x[:, start : start + n], outputs[-1:]), params, start))
        return mx.concatenate(outputs, axis=1)

    @whole.vjp
    def whole_vjp(primals, cotangent, _):
        x, *params = primals if isinstance(primals, (tuple, list)) else [primals]
        of_x: list[mx.array] = []
        of_params: list[mx.array] = []
        for start in starts:
            piece = after(x[:, start : start + n], of_x[-1:])
            _, (of_piece, *of_piece_params) = mx.vjp(
                lambda p, *params, s=start: call(p, params, s), [piece, *params], [cotangent[:, start : start + n]]
            )
            of_x.append(of_piece)
            of_params = [a + b for a, b in zip(of_params, of_piece_params)] or of_piece_params
        gradients = (mx.concatenate(of_x, axis=1), *of_params)
        return gradients if params else gradients[0]

    output = whole(x, *values)
    put(trainable, values)
    return output


def _attention_in_pieces(attention: Callable, n: int) -> Callable:
    """`mx.fast.scaled_dot_product_attention`, at most `n` queries at a time."""

    def in_pieces(q, k, v, *, scale, mask=None, sinks=None, **kwargs):
        length, offset = q.shape[2], k.shape[2] - q.shape[2]
        if length <= n:
            return attention(q, k, v, scale=scale, mask=mask, sinks=sinks, **kwargs)
        starts = range(0, length, n)
        is_causal = isinstance(mask, str)

        def call(q, k, v, sinks, start):
            end = min(start + n, length)
            visible = offset + end if is_causal else k.shape[2]
            piece_mask = mask
            if isinstance(mask, mx.array) and mask.ndim >= 2 and mask.shape[-2] != 1:
                piece_mask = mask[..., start:end, :]
            sink = {} if sinks is None else {"sinks": sinks}
            return attention(q, k[:, :, :visible], v[:, :, :visible], scale=scale, mask=piece_mask, **sink, **kwargs)

        @mx.custom_function
        def whole(q, k, v, *sinks):
            outputs: list[mx.array] = []
            for start in starts:
                piece = after(q[:, :, start : start + n], outputs[-1:])
                outputs.append(call(piece, k, v, sinks[0] if sinks else None, start))
            return mx.concatenate(outputs, axis=2)

        @whole.vjp
        def whole_vjp(primals, cotangent, _):
            q, *others = primals
            of_q: list[mx.array] = []
            of_others: list[mx.array] = []
            for start in starts:
                piece = after(q[:, :, start : start + n], [*of_q[-1:], *of_others])
                _, (of_piece, *of_piece_others) = mx.vjp(
                    lambda q, k, v, *sinks, s=start: call(q, k, v, sinks[0] if sinks else None, s),
                    [piece, *others],
                    [cotangent[:, :, start : start + n]],
                )
                of_q.append(of_piece)
                of_others = [a + b for a, b in zip(of_others, of_piece_others)] or of_piece_others
            return (mx.concatenate(of_q, axis=2), *of_others)

        return whole(q, k, v, *([] if sinks is None else [sinks]))

    return in_pieces


def after(array: mx.array, others: list[mx.array]) -> mx.array:
    """The same array, which MLX computes after the others."""
    if not others:
        return array
    return mx.depends([array], others)[0]


def _needs_gradient(owner: Any, key: Any) -> bool:
    return not isinstance(owner, nn.Module) or key in owner.trainable_parameters()


def treats_tokens_alike(function: Callable[[mx.array], mx.array], tokens: mx.array) -> bool:
    """Whether `function` gives a token of `tokens`, `[1, n, D]`, the same output alone as among the others.

    Only then may it be computed in pieces. Runs on the compute thread with its weights in place.
    """
    together = function(tokens).astype(mx.float32)
    alone = [function(tokens[:, i : i + 1]) for i in range(tokens.shape[1])]
    difference = mx.abs(together - mx.concatenate(alone, axis=1).astype(mx.float32)).max()
    tolerance = TOLERANCE if tokens.dtype == mx.float32 else TOLERANCE_16_BITS
    return bool((difference <= tolerance * (mx.abs(together).max() + 1e-6)).item())
