"""Parts of a model's own call: what comes before the first block, and what follows the last one.

While a part runs, it answers the calls of the model's units: blocks return their input. `EmbedPart` and `HeadPart` are
for models whose blocks form a chain.
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map

from ..models.calls import Arguments
from ..models.seams import CutModel, Unit, inner_call


class EmbedPart:
    """Computes the first block's input, and notes every block's arguments.

    Args:
        look_up: `look_up(unit, inner, args, kwargs)` answers an embedding's call.
        multiply: answers the call of a large layer before the blocks, likewise.

    Attributes:
        calls: the blocks' arguments, by visit. The hidden state is the first array of each.
    """

    def __init__(self, cut: CutModel, look_up: Callable, multiply: Callable):
        self._cut, self._multiply = cut, multiply
        self.on_rows = look_up
        self.calls: list[Arguments] = []

    def on_block(self, unit: Unit, inner: Callable, args: tuple, kwargs: dict) -> Any:
        self.calls.append(Arguments(args, kwargs, self._cut.state_objects))
        return shallow_copy(args[0])

    def on_matmul(self, unit: Unit, inner: Callable, args: tuple, kwargs: dict) -> Any:
        if len(self.calls) < len(self._cut.order):
            return self._multiply(unit, inner, args, kwargs)
        return mx.zeros(inner(*args, **kwargs).shape)  # after the last block: never evaluated


class HeadPart:
    """Computes what follows the last block, whose output is `hidden`."""

    def __init__(self, cut: CutModel, hidden: mx.array):
        self._last, self._visits, self._hidden = len(cut.order) - 1, -1, hidden

    def on_block(self, unit: Unit, inner: Callable, args: tuple, kwargs: dict) -> Any:
        self._visits += 1
        return shallow_copy(self._hidden) if self._visits == self._last else args[0]

    def on_rows(self, unit: Unit, inner: Callable, args: tuple, kwargs: dict) -> Any:
        return unevaluated_zeros(inner(*args, **kwargs))

    def on_matmul(self, unit: Unit, inner: Callable, args: tuple, kwargs: dict) -> Any:
        return inner(*args, **kwargs)


class CachedProbe:
    """Runs every unit on placeholders, for the shapes of blocks' outputs and of what they leave in their caches."""

    def on_block(self, unit: Unit, inner: Callable, args: tuple, kwargs: dict) -> Any:
        return inner_call(unit)(*args, **kwargs)

    def on_rows(self, unit: Unit, inner: Callable, args: tuple, kwargs: dict) -> Any:
        return unevaluated_zeros(inner(*args, **kwargs))

    def on_matmul(self, unit: Unit, inner: Callable, args: tuple, kwargs: dict) -> Any:
        return unevaluated_zeros(inner(*args, **kwargs))


def shallow_copy(tree: Any) -> Any:
    """The same arrays as objects of their own, so that the model may write into them."""
    return tree_map(lambda a: mx.array(a) if isinstance(a, mx.array) else a, tree)


def unevaluated_zeros(tree: Any) -> Any:
    return tree_map(lambda a: mx.zeros(a.shape, a.dtype) if isinstance(a, mx.array) else a, tree)
