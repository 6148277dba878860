"""Arrays out of a trace and a thread, and into another."""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..errors import SlowftError


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
