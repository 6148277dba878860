"""Softmax, activations and attention on all cores: MLX's CPU backend uses one core for each stream.

Rows (in attention: batch rows or heads) are shared out among streams, one for each core, and the results are put
together again. Each part is MLX's own operation on some of the rows, so results and gradients stay the same to the last
bit. A part's vjp runs on the part's stream. On a GPU, or with one core, nothing changes. Products of matrices are left
alone: OpenBLAS uses all cores for each.
"""

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..weights.sources import casting_streams

LEAST_ELEMENTS = 1 << 16  # smaller arrays stay whole: these take 0.8 ms of exponentials, waiting for a stream 0.05 ms
# Compiled functions of MLX and mlx-lm that compute an exponential or the like of each element
ACTIVATIONS = (
    *("silu", "gelu", "gelu_approx", "gelu_fast_approx", "softplus", "swiglu", "precise_swiglu", "swiglu_oai"),
    *("clamped_swiglu", "geglu", "logit_softcap", "softcap", "_silu_mul", "_situ"),
)
_COMPILED = type(nn.silu)

_local = threading.local()  # .streams: the calling thread's work is shared out among these; None for not at all
_lock = threading.Lock()
_n_sharing = 0  # entered contexts of `shared`; above 0, functions are replaced
_replaced: list[tuple[Any, str, Callable, Callable]] = []  # see _replacements
_n_modules = 0  # how many modules there were when _replaced was made


@contextmanager
def shared(streams: Sequence[mx.Stream] | None = None) -> Iterator[None]:
    """While this is entered, share out among its own streams what the calling thread gives MLX to compute."""
    streams = list(streams or casting_streams())
    if len(streams) == 1:
        yield
        return
    before = getattr(_local, "streams", None)
    _install()
    _local.streams = streams
    try:
        yield
    finally:
        _local.streams = before
        _uninstall()


def by_rows(function: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """`function`, with the rows of its arguments shared out. The first axis of each has to be independent rows."""

    def call(*arrays: mx.array) -> mx.array:
        with _whole() as streams:
            if streams is None or arrays[0].size < LEAST_ELEMENTS:
                return function(*arrays)
            return in_parts(function, arrays, [0] * len(arrays), arrays[0].shape[0], streams)

    return call


def in_parts(
    function: Callable[..., mx.array],
    arrays: Sequence[mx.array],
    axes: Sequence[int],
    size: int,
    streams: list[mx.Stream],
    axis=0,
) -> mx.array:
    """`function(*arrays)`, computed in one part for each stream.

    Args:
        axes: along which each argument is cut; its length there is `size` or a multiple of it.
        axis: along which the results of the parts are put together.
    """
    n = min(len(streams), size)
    if n < 2:
        return function(*arrays)
    cuts = [size * i // n for i in range(1, n)]
    parts = [mx.split(a, [c * (a.shape[x] // size) for c in cuts], x) for a, x in zip(arrays, axes)]
    results = []
    for stream, *part in zip(streams, *parts):
        with mx.stream(stream):
            results.append(function(*part))
    return mx.concatenate(results, axis)


@contextmanager
def _whole() -> Iterator[list[mx.Stream] | None]:
    """Give the streams to share out among. While this is entered, other calls of this thread stay whole."""
    streams = getattr(_local, "streams", None)
    _local.streams = None
    try:
        yield streams
    finally:
        _local.streams = streams


# --- Replacements of MLX's and mlx-lm's functions -----------------------------------------------------


def _install() -> None:
    global _n_sharing
    with _lock:
        _n_sharing += 1
        if _n_sharing == 1:
            for owner, name, _, replacement in _replacements():
                setattr(owner, name, replacement)


def _uninstall() -> None:
    global _n_sharing
    with _lock:
        _n_sharing -= 1
        if _n_sharing == 0:
            for owner, name, original, _ in _replaced:
                setattr(owner, name, original)


def _replacements() -> list[tuple[Any, str, Callable, Callable]]:
    """(owner, name, function, its replacement). Models find their compiled functions in their modules."""
    global _n_modules
    if _n_modules != len(sys.modules):
        _n_modules = len(sys.modules)
        attention = mx.fast.scaled_dot_product_attention
        _replaced[:] = [(mx.fast, "scaled_dot_product_attention", attention, _attention(attention))]
        _replaced.append((mx, "softmax", mx.softmax, _softmax(mx.softmax)))
        _replaced.extend((mx, f.__name__, f, _activation(f)) for f in (mx.sigmoid, mx.tanh, mx.exp))
        by_function: dict[int, Callable] = {}
        for module in [m for name, m in list(sys.modules.items()) if name.startswith(("mlx_lm.models.", "mlx.nn"))]:
            for name, value in list(vars(module).items()):
                if type(value) is _COMPILED:
                    replacement = (_activation if name in ACTIVATIONS else _as_a_whole)(value)
                    _replaced.append((module, name, value, by_function.setdefault(id(value), replacement)))
    return _replaced


def _activation(function: Callable) -> Callable:
    def call(*args, **kwargs):
        with _whole() as streams:
            arrays = [a for a in args if isinstance(a, mx.array)]
            alike = len({a.shape for a in arrays}) == 1 and arrays[0].ndim > 1
            alike = alike and not any(isinstance(value, mx.array) for value in kwargs.values())
            if streams is None or not alike or "stream" in kwargs or arrays[0].size < LEAST_ELEMENTS:
                return function(*args, **kwargs)

            def of(*rows: mx.array) -> mx.array:
                rest = iter(rows)
                return function(*[next(rest) if isinstance(a, mx.array) else a for a in args], **kwargs)

            return _rows_in_parts(of, arrays, streams)

    return call


def _as_a_whole(function: Callable) -> Callable:
    """A compiled function that MLX must not compile with the replacements inside: everything in it stays whole."""

    def call(*args, **kwargs):
        with _whole():
            return function(*args, **kwargs)

    return call


def _softmax(softmax: Callable) -> Callable:
    def call(a, axis=None, **kwargs):
        with _whole() as streams:
            last = a.ndim > 1 and axis in (-1, a.ndim - 1)
            if streams is None or not last or "stream" in kwargs or a.size < LEAST_ELEMENTS:
                return softmax(a, axis, **kwargs)
            return _rows_in_parts(lambda rows: softmax(rows, -1, **kwargs), [a], streams)

    return call


def _rows_in_parts(function: Callable, arrays: Sequence[mx.array], streams: list[mx.Stream]) -> mx.array:
    """`function` of arrays `[..., D]`, whose shape the result has too, in one part for each stream."""
    flat = [a.reshape(-1, a.shape[-1]) for a in arrays]
    return in_parts(function, flat, [0] * len(flat), flat[0].shape[0], streams).reshape(arrays[0].shape)


def _attention(attention: Callable) -> Callable:
    """`mx.fast.scaled_dot_product_attention`, with batch rows or groups of heads shared out."""

    def call(q, k, v, *, scale, mask=None, sinks=None, **kwargs):
        with _whole() as streams:
            rows, heads, length, _ = q.shape
            groups = k.shape[1]
            if streams is None or kwargs or rows * heads * length * k.shape[2] < LEAST_ELEMENTS:
                return attention(q, k, v, scale=scale, mask=mask, sinks=sinks, **kwargs)
            # Parts of rows need no copy. But sinks' gradients are sums over rows, which must not be taken in parts
            axis, size = (0, rows) if rows % len(streams) == 0 and sinks is None else (1, groups)
            if size == 1:
                return attention(q, k, v, scale=scale, mask=mask, sinks=sinks)
            arrays, axes = [q, k, v], [axis] * 3
            cut_mask = isinstance(mask, mx.array) and mask.ndim >= 4 - axis and mask.shape[axis - 4] > 1
            if isinstance(mask, mx.array) and not cut_mask and mask.dtype != mx.bool_:
                return attention(q, k, v, scale=scale, mask=mask, sinks=sinks)
            if cut_mask:
                arrays.append(mask)
                axes.append(axis + mask.ndim - 4)
            if sinks is not None:
                arrays.append(sinks)
                axes.append(0)

            def of(q, k, v, *rest):
                rest = list(rest)
                m = rest.pop(0) if cut_mask else mask
                return attention(q, k, v, scale=scale, mask=m, sinks=rest[0] if rest else None)

            return in_parts(of, arrays, axes, size, streams, axis)

    return call
