"""Calls as flat lists of arrays: what goes into a unit and what comes out, as MLX's transformations want it."""

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import SlowftError


def pack(tree: Any, arrays: list[mx.array]) -> Any:
    """Append the arrays of a tree of arguments to `arrays`; returns what `unpack` needs to put them back."""
    if isinstance(tree, mx.array):
        arrays.append(tree)
        return ("array", len(arrays) - 1)
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):  # a named tuple
        return (type(tree), [pack(v, arrays) for v in tree])
    if type(tree) in (tuple, list):
        return (type(tree), [pack(v, arrays) for v in tree])
    if type(tree) is dict:
        return (dict, {k: pack(v, arrays) for k, v in tree.items()})
    return ("static", tree)


def unpack(spec: Any, arrays: list[mx.array]) -> Any:
    kind, value = spec
    if kind == "array":
        return arrays[value]
    if kind == "static":
        return value
    if kind is dict:
        return {k: unpack(v, arrays) for k, v in value.items()}
    parts = [unpack(v, arrays) for v in value]
    return kind(*parts) if hasattr(kind, "_fields") else kind(parts)


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
