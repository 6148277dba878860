"""A unit's call inside of somebody else's trace: a function MLX can differentiate, whose weights come and go.

Streaming as a custom vjp: what mlx-lm's `grad_checkpoint` does, one step further. The primal has the unit's weights
brought, runs it, and keeps only its output; the vjp has them brought again, recomputes, and returns the cotangents of
all inputs and of the adapter's arrays. Values handed from block to block, tuples, what blocks write into containers
they share (see `models.calls`) and arithmetic between blocks need nothing more: MLX's autodiff of the model's own call
connects them. For a user's own `nn.value_and_grad(model, loss)`, for generation, and for steps on models whose blocks
form no chain; on the others `step` gives the same bits with fewer reads.
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from ..errors import SlowftError
from ..models.calls import Arguments
from .block import BlockFunction
from .trees import attach, detach

# run(job, backward) -> job's result, called on a thread where nothing is traced, with the unit's weights in place
Run = Callable[[Callable[[], Any], bool], Any]


class TracedCall:
    """One call of a unit.

    Args:
        function: the call as a function of arrays.
        arguments: of the call.
        params: the adapter's arrays as the trace knows them.
        differentiated: as the function has it.
        in_training: see `BlockFunction.forward`.
    """

    def __init__(
        self,
        function: BlockFunction,
        arguments: Arguments,
        params: list[mx.array],
        differentiated: list[int],
        in_training: bool,
        run: Run,
    ):
        self._function, self._arguments, self._params = function, arguments, params
        self._differentiated, self._in_training, self._run = differentiated, in_training, run
        self._states = [leaf for leaf in arguments.objects if hasattr(leaf, "state")]  # key-value caches

    def __call__(self) -> Any:
        function = mx.custom_function(self._primal)
        function.vjp(self._vjp)
        function.jvp(_refuse("forward-mode derivatives"))
        outputs = function(*self._arguments.arrays, *self._params)
        return self._arguments.take_over(self._function.outcome, _as_list(outputs))

    def _primal(self, *xs: mx.array) -> tuple[mx.array, ...]:
        detached = [detach(x) for x in xs]

        def forward() -> list[mx.array]:
            outputs = self._function.forward([attach(d) for d in detached], self._in_training)
            mx.eval(outputs, [cache.state for cache in self._states])
            return outputs

        outputs = self._run(forward, False)
        for at, i in self._function.outcome.handed_on:
            outputs[at] = xs[i]  # no second copy
        return tuple(outputs)

    def _vjp(self, primals, cotangents, _):
        if self._states:
            raise SlowftError("gradients through a key-value cache cannot be streamed. Call the model without a cache")
        primals = _as_list(primals)
        detached, detached_cotangents = [detach(x) for x in primals], [detach(c) for c in _as_list(cotangents)]

        def backward() -> list[mx.array]:
            xs, cotangents = ([attach(d) for d in ds] for ds in (detached, detached_cotangents))
            gradients = self._function.gradients(xs, cotangents)
            mx.eval(gradients)
            return gradients

        result = [mx.zeros_like(x) for x in primals]  # lazy: nobody evaluates those that are not wanted
        for i, gradient in zip(self._differentiated, self._run(backward, True) if self._differentiated else []):
            result[i] = gradient
        n = len(self._arguments.arrays)
        # inputs and parameters apart, or each block's cotangent would live as long as the gradients of its adapters
        return *_differentiable_once(result[:n], primals), *_differentiable_once(result[n:], primals)


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
