"""One unit as a function MLX can differentiate: forward, and backward with recomputation.

Streaming as a custom vjp: what mlx-lm's `grad_checkpoint` does, one step further. The primal has the unit's
weights brought, runs it, and keeps only its output; the vjp has them brought again, recomputes, and returns
the cotangents of all inputs and of the trainable parameters. Values handed from block to block, tuples, what blocks
write into containers they share (see `models.calls`) and arithmetic between blocks need nothing more: MLX's autodiff
of the model's own call connects them.
"""

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import mlx.core as mx

from ..errors import SlowftError
from ..models.calls import Arguments, Outcome
from ..models.seams import FLOATS
from .layers import LayerWork
from .trees import attach, detach, in_trace, uncompiled

# serve(job, backward) -> job's result, called on the compute thread with the unit's weights in place
Serve = Callable[[Callable[[], Any], bool], Any]


class Memory:
    """What a step keeps of one visit of one micro-batch to a block, apart from the trace. This one keeps nothing.

    Everything here is called on the compute thread.

    Attributes:
        hides_input, hides_output: the hidden state stays out of the trace, which has a placeholder for it.
    """

    hides_input = hides_output = False

    def input(self, backward: bool) -> mx.array:
        """The hidden state that the trace does not have."""
        raise NotImplementedError

    def output(self, array: mx.array) -> mx.array:
        """Take over the hidden state that the block put out; returns the trace's placeholder for it."""
        raise NotImplementedError

    def gradient(self, owner: Any, key: Any, gradient: mx.array) -> mx.array:
        """Take over the (evaluated) gradient of one of the unit's own arrays; returns what the trace has for it."""
        return gradient

    def recording(self) -> AbstractContextManager[list[mx.array]]:
        """Around building the forward pass: gives what is to be evaluated along with its outputs."""
        return nullcontext([])

    def replaying(self) -> AbstractContextManager[None]:
        """Around building the recomputation."""
        return nullcontext()


class UnitCall:
    """One call of a unit in one micro-batch's trace.

    Args:
        inner: the module's own method, bound.
        entries: (owner, key) of the unit's own arrays, adapters above all; their traced values are `params`.
        trained: for each of them, whether anybody asks for its gradient.
        seed: random seed of this call, so that the recomputation draws the same dropout masks.
        inputs_need_gradient: False below the lowest trained block, where nobody asks for it.
        memory: what the step keeps of this call.
        carriers: see `Arguments`.
        layers: computes the unit's layers that are not brought with it; None if there are none.
        in_training: a backward pass follows, so that the forward pass has to be what it will recompute.
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
        memory: Memory,
        carriers: Collection[type] = (),
        layers: LayerWork | None = None,
        in_training: bool = False,
    ):
        self._inner, self._entries, self._params = inner, list(entries), list(params)
        self._serve, self._seed, self._memory = serve, seed, memory
        self._layers, self._in_training = layers, in_training
        self._arguments = Arguments(args, kwargs, carriers)
        self._inputs = self._arguments.arrays
        self._n = len(self._inputs)
        wanted = [inputs_need_gradient] * self._n + list(trained)
        arrays = [*self._inputs, *self._params]
        self._wrt = [i for i, a in enumerate(arrays) if wanted[i] and a.dtype in FLOATS]
        self._states = [leaf for leaf in self._arguments.objects if hasattr(leaf, "state")]  # key-value caches
        self._outcome: Outcome | None = None

    def __call__(self) -> Any:
        function = mx.custom_function(self._primal)
        function.vjp(self._vjp)
        function.jvp(_refuse("forward-mode derivatives"))
        outputs = function(*self._inputs, *self._params)
        return self._arguments.take_over(self._outcome, _as_list(outputs))

    def _primal(self, *xs: mx.array) -> tuple[mx.array, ...]:
        detached = self._detach(xs)

        def forward():
            xs = self._attach(detached, backward=False)
            mx.random.seed(self._seed)
            with self._memory.recording() as kept:
                outputs = self._forward(xs)
                del xs
                mx.eval(outputs, kept, [cache.state for cache in self._states])
            return [self._memory.output(*outputs)] if self._memory.hides_output else outputs

        outputs = self._serve(forward, False)
        if not self._memory.hides_input:
            for at, i in self._outcome.handed_on:
                outputs[at] = xs[i]  # no second copy
        return tuple(outputs)

    def _forward(self, xs: list[mx.array]) -> list[mx.array]:
        """The outputs, unevaluated; in training those that the backward pass recomputes, to the last bit."""

        def run() -> list[mx.array]:
            return self._run(xs[: self._n], xs[self._n :])

        if not self._in_training:
            return run()
        with uncompiled():
            return in_trace(run)

    def _detach(self, xs: Sequence[mx.array]) -> list:
        """Values apart from the trace; None for a hidden state that is not in it."""
        hidden = [True] + [False] * (len(xs) - 1) if self._memory.hides_input else [False] * len(xs)
        return [None if hides else detach(x) for x, hides in zip(xs, hidden)]

    def _attach(self, detached: list, backward: bool) -> list[mx.array]:
        return [self._memory.input(backward) if d is None else attach(d) for d in detached]

    def _vjp(self, primals, cotangents, _):
        if self._states:
            raise SlowftError("gradients through a key-value cache cannot be streamed. Call the model without a cache")
        primals, cotangents = _as_list(primals), _as_list(cotangents)
        detached, detached_cotangents = self._detach(primals), [detach(c) for c in cotangents]
        wrt, n = self._wrt, self._n

        def backward():
            with self._memory.replaying(), uncompiled():
                if self._layers is not None and self._layers.are_apart:
                    gradients = self._gradients_in_stages(detached, detached_cotangents)
                else:
                    gradients = self._gradients(
                        self._attach(detached, backward=True), [attach(c) for c in detached_cotangents]
                    )
            mx.eval(gradients)
            for at, i in enumerate(wrt):
                if i >= n:
                    gradients[at] = self._memory.gradient(*self._entries[i - n], gradients[at])
            return gradients

        gradients = self._serve(backward, True) if wrt else []
        result = [mx.zeros_like(x) for x in primals]  # lazy: nobody evaluates those that are not wanted
        for i, gradient in zip(wrt, gradients):
            result[i] = gradient
        # inputs and parameters apart, or each block's cotangent would live as long as the gradients of its adapters
        return *_differentiable_once(result[:n], primals), *_differentiable_once(result[n:], primals)

    def _gradients(self, xs: list[mx.array], cotangents: list[mx.array]) -> list[mx.array]:
        """The recomputation and its vjp, unevaluated.

        The outputs are never evaluated: MLX then skips what only they need, such as the last matmul. Nor are they
        held: they share a buffer of the hidden state's size with what is.
        """

        def recompute(*variables: mx.array) -> list[mx.array]:
            arrays = list(xs)
            for i, value in zip(self._wrt, variables):
                arrays[i] = value
            return self._run(arrays[: self._n], arrays[self._n :])

        mx.random.seed(self._seed)
        return mx.vjp(recompute, [xs[i] for i in self._wrt], cotangents)[1]

    def _gradients_in_stages(self, detached: list, detached_cotangents: list) -> list[mx.array]:
        xs, cotangents = self._attach(detached, backward=True), [attach(c) for c in detached_cotangents]

        def recompute() -> None:
            mx.random.seed(self._seed)
            in_trace(lambda: self._run(xs[: self._n], xs[self._n :]))

        return self._layers.gradients(recompute, lambda: self._gradients(xs, cotangents))

    def _run(self, inputs: Sequence[mx.array], params: Sequence[mx.array]) -> list[mx.array]:
        for (owner, key), value in zip(self._entries, params):
            owner[key] = value
        self._outcome = self._arguments.call(self._inner, inputs)
        outputs, self._outcome.arrays = self._outcome.arrays, []  # not held: the trace has them, or nobody
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
