"""Arrays out of a trace and a thread, and into another; what a trace changes in what MLX computes."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import mlx.core as mx
import numpy as np

from ..errors import SlowftError

T = TypeVar("T")


@dataclass(frozen=True)
class Detached:
    """The values of an array, apart from any trace and any thread. `attach` makes an array of them again."""

    values: np.ndarray
    dtype: mx.Dtype


def detach(array: mx.array) -> Detached:
    """Evaluate `array` and take its values out of its trace, without copying them.

    Raises:
        SlowftError: inside `mx.compile`, where nothing can be evaluated, so nothing can be streamed.
    """
    try:
        mx.eval(array)
    except (ValueError, RuntimeError) as e:
        if "compile" not in str(e):
            raise
        raise SlowftError(
            "a streamed model cannot run inside mx.compile (or mx.vmap), which forbids evaluation. Call "
            "mx.disable_compile() before the compiled function is first called (pieces compiled inside mlx-lm's own "
            "layers then run uncompiled too)"
        ) from None
    readable = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array  # numpy has no bfloat16
    return Detached(np.asarray(readable), array.dtype)


def attach(detached: Detached) -> mx.array:
    """An array of the calling thread, a copy through the host: a few MB for a block's input."""
    array = mx.array(detached.values)
    return array if array.dtype == detached.dtype else array.view(detached.dtype)


# --- As in memory, where the whole of a training step is one trace ---------------------------------------


def in_trace(function: Callable[[], T]) -> T:
    """`function()`, called where MLX traces gradients, though of nothing that it uses.

    MLX makes of some calls something else there than outside (`in_grad_tracing` in mlx/fast.cpp): on Metal, attention
    is then another kernel, of other last bits. What is evaluated in `function` keeps no graph: nothing in it is traced.
    """
    results: list[T] = []

    def traced(nothing: mx.array) -> mx.array:
        results.append(function())
        return mx.stop_gradient(nothing)  # for which `mx.vjp` wants no cotangent

    mx.vjp(traced, [mx.zeros(())], [])
    return results[0]


_lock = threading.Lock()
_n_uncompiled, _was_compiling = 0, False  # contexts of `uncompiled`, and what was before the first


@contextmanager
def uncompiled() -> Iterator[None]:
    """While this is entered, functions that were compiled run as they were written, on every thread.

    So they do in memory when they are called with what is traced (mlx/compile.cpp), which there is every hidden state:
    `mx.value_and_grad` traces all arguments of the loss, the tokens too.
    """
    global _n_uncompiled, _was_compiling
    with _lock:
        _n_uncompiled += 1
        if _n_uncompiled == 1:
            _was_compiling = _runs_compiled()
            mx.disable_compile()
    try:
        yield
    finally:
        with _lock:
            _n_uncompiled -= 1
            if _n_uncompiled == 0 and _was_compiling:  # or else the user wants it so
                mx.enable_compile()


def is_compiling() -> bool:
    """Whether functions that mlx-lm compiles, such as SwiGLU, run compiled, but for `uncompiled`."""
    with _lock:
        return _was_compiling if _n_uncompiled else _runs_compiled()


def _runs_compiled() -> bool:
    calls = []

    def function(x: mx.array) -> mx.array:
        calls.append(x)
        return x + 1

    compiled, x = mx.compile(function), mx.zeros((2,))
    compiled(x), compiled(x)
    return len(calls) == 1
