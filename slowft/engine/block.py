"""One unit as a function MLX can differentiate: forward, and backward with recomputation.

Streaming as a custom vjp: what mlx-lm's `grad_checkpoint` does, one step further. The primal has the unit's
weights brought, runs it, and keeps only its output; the vjp has them brought again, recomputes, and returns
the cotangents of all inputs and of the trainable parameters. Values handed from block to block, tuples and
arithmetic between blocks need nothing more: MLX's autodiff of the model's own call connects them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from ..errors import SlowftError
from ..models.seams import FLOATS
from .trees import attach, detach, pack, unpack

# serve(job, backward) -> job's result, called on the compute thread with the unit's weights in place
Serve = Callable[[Callable[[], Any], bool], Any]


class UnitCall:
    """One call of a unit in one micro-batch's trace.

    Args:
        inner: the module's own method, bound.
        entries: (owner, key) of the unit's own arrays, adapters above all; their traced values are `params`.
        trained: for each of them, whether anybody asks for its gradient.
        seed: random seed of this call, so that the recomputation draws the same dropout masks.
        inputs_need_gradient: False below the lowest trained block, where nobody asks for it.
    """

    def __init__(
        self,
        inner: Callable,
        args: tuple,
        kwargs: dict,
        entries: Sequence[tuple[Any, Any]],
        params: Sequence[mx.array],
        trained: Sequence[bool],
        serve: Serve,
        seed: int,
        inputs_need_gradient: bool,
    ):
        self._inner, self._entries, self._params = inner, list(entries), list(params)
        self._serve, self._seed = serve, seed
        self._inputs: list[mx.array] = []
        self._in_spec = pack((args, kwargs), self._inputs)
        self._n = len(self._inputs)
        wanted = [inputs_need_gradient] * self._n + list(trained)
        arrays = [*self._inputs, *self._params]
        self._wrt = [i for i, a in enumerate(arrays) if wanted[i] and a.dtype in FLOATS]
        self._states = [leaf for leaf in _static_leaves(self._in_spec) if hasattr(leaf, "state")]  # key-value caches
        self._out_spec: Any = None

    def __call__(self) -> Any:
        function = mx.custom_function(self._primal)
        function.vjp(self._vjp)
        function.jvp(_refuse("forward-mode derivatives"))
        outputs = function(*self._inputs, *self._params)
        return unpack(self._out_spec, _as_list(outputs))

    def _primal(self, *xs: mx.array) -> tuple[mx.array, ...]:
        detached = [detach(x) for x in xs]

        def forward():
            xs = [attach(x) for x in detached]
            mx.random.seed(self._seed)
            outputs = self._run(xs[: self._n], xs[self._n :])
            mx.eval(outputs, [cache.state for cache in self._states])
            return outputs

        return tuple(self._serve(forward, False))

    def _vjp(self, primals, cotangents, _):
        if self._states:
            raise SlowftError("gradients through a key-value cache cannot be streamed. Call the model without a cache")
        primals, cotangents = _as_list(primals), _as_list(cotangents)
        detached = [detach(x) for x in primals], [detach(c) for c in cotangents]
        wrt, n = self._wrt, self._n

        def backward():
            xs, cts = ([attach(d) for d in part] for part in detached)

            def recompute(*variables: mx.array) -> list[mx.array]:
                arrays = list(xs)
                for i, value in zip(wrt, variables):
                    arrays[i] = value
                return self._run(arrays[:n], arrays[n:])

            mx.random.seed(self._seed)
            # the outputs are never evaluated: MLX then skips what only they need, such as the last matmul
            _, gradients = mx.vjp(recompute, [xs[i] for i in wrt], cts)
            mx.eval(gradients)
            return gradients

        gradients = self._serve(backward, True) if wrt else []
        result = [mx.zeros_like(x) for x in primals]  # lazy: nobody evaluates those that are not wanted
        for i, gradient in zip(wrt, gradients):
            result[i] = gradient
        # inputs and parameters apart, or each block's cotangent would live as long as the gradients of its adapters
        return *_differentiable_once(result[:n], primals), *_differentiable_once(result[n:], primals)

    def _run(self, inputs: Sequence[mx.array], params: Sequence[mx.array]) -> list[mx.array]:
        for (owner, key), value in zip(self._entries, params):
            owner[key] = value
        args, kwargs = unpack(self._in_spec, inputs)
        outputs: list[mx.array] = []
        self._out_spec = pack(self._inner(*args, **kwargs), outputs)
        return outputs


def _differentiable_once(gradients: list[mx.array], primals: list[mx.array]) -> list[mx.array]:
    """The same gradients, but refusing to be differentiated: constants to MLX, a second derivative would be zero."""
    if not gradients:
        return []
    guard = mx.custom_function(lambda *_: tuple(gradients))
    guard.vjp(_refuse("second derivatives"))
    return _as_list(guard(*primals))


def _refuse(what: str) -> Callable:
    def refuse(*_, **__):
        raise SlowftError(f"{what} cannot be streamed, only gradients")

    return refuse


def _as_list(arrays) -> list[mx.array]:
    return list(arrays) if isinstance(arrays, (tuple, list)) else [arrays]


def _static_leaves(spec):
    kind, value = spec
    if kind == "static":
        yield value
    elif kind is dict:
        for v in value.values():
            yield from _static_leaves(v)
    elif kind != "array":
        for v in value:
            yield from _static_leaves(v)
