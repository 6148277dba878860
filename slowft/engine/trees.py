"""Arrays in modules, traces and threads: takes them out and puts them in; has MLX compute outside a trace as inside."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np

from ..errors import SlowftError

T = TypeVar("T")


def arrays_of(entries: Sequence[tuple]) -> list[Any]:
    """The arrays at (owner, key), or at (name, owner, key)."""
    return [owner[key] for *_, owner, key in entries]


def put(entries: Sequence[tuple], arrays: Sequence[Any]) -> None:
    """Put the arrays there."""
    for (*_, owner, key), array in zip(entries, arrays, strict=True):
        owner[key] = array


@dataclass(frozen=True)
class Detached:
    """The values of an array, which belong to no trace and no thread. `attach` makes an array of them again."""

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
    """An array of the calling thread. The values are copied by the host: a few MB for a block's input."""
    array = mx.array(detached.values)
    return array if array.dtype == detached.dtype else array.view(detached.dtype)


# --- As in memory, where the whole of a training step is one trace ---------------------------------------


def in_trace(function: Callable[[], T]) -> T:
    """The result of `function()`, called while MLX traces the gradient of an array that it does not use.

    Some calls choose other kernels while a gradient is traced (`in_grad_tracing` in mlx/fast.cpp): attention on Metal
    does, and its last bits differ. Evaluating arrays in `function` keeps no graph, because none of them is traced.
    """
    results: list[T] = []

    def traced(unused: mx.array) -> mx.array:
        results.append(function())
        return mx.stop_gradient(unused)  # `mx.vjp` needs no cotangent for it

    mx.vjp(traced, [mx.zeros(())], [])
    return results[0]


_lock = threading.Lock()
_n_uncompiled, _was_compiling = 0, False  # entered contexts of `uncompiled`; whether MLX compiled before the first


@contextmanager
def uncompiled() -> Iterator[None]:
    """While this is entered, functions that were compiled run as they were written, on every thread.

    In memory they do so too when they are called with traced arrays (mlx/compile.cpp). Every hidden state is traced
    there, because `mx.value_and_grad` traces all arguments of the loss, the tokens too.
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
            if _n_uncompiled == 0 and _was_compiling:  # else the user had disabled it
                mx.enable_compile()


def is_compiling() -> bool:
    """Whether functions that mlx-lm compiles, such as SwiGLU, run compiled outside of `uncompiled`."""
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
