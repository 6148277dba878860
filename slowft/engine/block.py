"""One call of a block as a function of arrays: its output, and its gradients with recomputation.

Comes in: the block's own method, its arguments, and its adapter's arrays. Goes out: unevaluated arrays. The block's
weights have to be in place. Never decides when anything is computed, and keeps nothing.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx

from ..models.calls import Arguments, Outcome
from .offloaded import OffloadedExperts
from .trees import arrays_of, in_trace, put, uncompiled


class BlockFunction:
    """A block's call as a function of a flat list of arrays: those in its arguments, then its adapter's.

    Args:
        call: the block's own method.
        arguments: the call's arguments; the hidden state `[B, T, D]` is the first of their arrays.
        entries: (owner, key) of the adapter's arrays that are variables.
        differentiated: numbers in the list of the arrays whose gradients are needed.
        seed: is set before each call, so that the recomputation draws the same dropout masks.
        layers: computes the block's layers of experts that are offloaded.

    Attributes:
        outcome: what the last call returned, without its arrays (see `Arguments.take_over`).
    """

    def __init__(
        self,
        call: Callable,
        arguments: Arguments,
        entries: Sequence[tuple[Any, Any]],
        differentiated: Sequence[int],
        seed: int,
        layers: OffloadedExperts,
    ):
        self._call, self._arguments, self._entries = call, arguments, list(entries)
        self._differentiated, self._seed = list(differentiated), seed
        self._layers = layers
        self.outcome: Outcome | None = None

    def forward(self, arrays: Sequence[mx.array], in_training: bool) -> list[mx.array]:
        """The call's outputs.

        Args:
            in_training: a backward pass follows. Then the outputs have to be those that it recomputes, and those of
                training in memory, to the last bit.
        """
        with self._restoring_entries():
            mx.random.seed(self._seed)
            if not in_training:
                return self._run(arrays)
            with uncompiled():
                return in_trace(lambda: self._run(arrays))

    def gradients(self, arrays: Sequence[mx.array], cotangents: Sequence[mx.array]) -> list[mx.array]:
        """The gradients of the arrays `differentiated`, in that order.

        The recomputation's outputs are never evaluated: MLX then skips what only they need, such as the last matmul.
        Nor are they kept: that would keep a buffer of the hidden state's size.
        """

        def differentiate() -> list[mx.array]:
            mx.random.seed(self._seed)
            return mx.vjp(self._of_variables(arrays), [arrays[i] for i in self._differentiated], cotangents)[1]

        def recompute() -> None:
            mx.random.seed(self._seed)
            in_trace(lambda: self._run(arrays))

        with self._restoring_entries(), uncompiled():
            if not self._layers.are_offloaded:
                return differentiate()
            return self._layers.gradients(recompute, differentiate)

    def _of_variables(self, arrays: Sequence[mx.array]) -> Callable[..., list[mx.array]]:
        def function(*variables: mx.array) -> list[mx.array]:
            inputs = list(arrays)
            for i, value in zip(self._differentiated, variables):
                inputs[i] = value
            return self._run(inputs)

        return function

    def _run(self, arrays: Sequence[mx.array]) -> list[mx.array]:
        n = len(self._arguments.arrays)
        put(self._entries, arrays[n:])
        self.outcome = self._arguments.call(self._call, arrays[:n])
        outputs, self.outcome.arrays = self.outcome.arrays, []  # the caller alone keeps them
        return outputs

    @contextmanager
    def _restoring_entries(self) -> Iterator[None]:
        """Put back into the modules, on leaving, the arrays that are there now: no traced array stays behind."""
        arrays = arrays_of(self._entries)
        try:
            yield
        finally:
            put(self._entries, arrays)
