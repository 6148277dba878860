"""Parts of a model's own call: the blocks from some visit on, or what follows the last block.

While a part runs, these answer for the units: blocks that do not belong to it hand on what they are given.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map

from ..models.calls import pack, unpack
from ..models.seams import Cut, Unit
from .layers import inner_call


@dataclass
class TailCall:
    """A block's call in a micro-batch's trace that is left to the tail; `seed` is that of its dropout masks."""

    unit: Unit
    args: tuple
    kwargs: dict
    seed: int


class Tail:
    """The blocks of a tail as one function of flat arrays: the hidden state first, then what they are handed besides.

    With no calls, it hands the hidden state (a tree, then) on.

    Args:
        calls: of the blocks of the tail, in order.
        hidden: input of the first of them, or output of the last block if there are none.

    Attributes:
        arrays: the function's arguments as they are now.
        entries: (owner, key) of the arrays of the tail's adapters.
    """

    def __init__(self, cut: Cut, calls: Sequence[TailCall], hidden: Any):
        self._cut, self._calls = cut, list(calls)
        self.arrays: list[mx.array] = []
        self._spec = pack([hidden, [(call.args[1:], call.kwargs) for call in calls]], self.arrays, cut.carriers)
        self.units = list({call.unit: None for call in calls})
        self.entries = [entry for unit in self.units for entry in unit.adapter()]
        self.first = len(cut.order) - len(self._calls)

    def hidden(self, values: list[mx.array]) -> Any:
        return unpack(self._spec, values)[0]

    def run(self, values: list[mx.array], model: Any, running_part: Callable, shape: tuple[int, int]) -> Any:
        """Output of the last block, unevaluated: the model's own call on tokens of `shape` computes it."""
        hidden, arguments = unpack(self._spec, values)
        if not self._calls:
            return hidden
        calls = [TailCall(c.unit, (None, *args), kwargs, c.seed) for c, (args, kwargs) in zip(self._calls, arguments)]
        with running_part(_TailPart(self._cut, calls, hidden)) as part:
            model(mx.zeros(shape, mx.int32))
        return part.output

    def wanted(self, hidden: bool, besides: bool) -> list[bool]:
        """Whose gradient is asked for, of the arrays (the hidden state's, the others') and then of the entries."""
        trainable = {(id(owner), key) for unit in self.units for _, owner, key in unit.trainable()}
        of_arrays = [hidden if not self._calls or i == 0 else besides for i in range(len(self.arrays))]
        return of_arrays + [(id(owner), key) in trainable for owner, key in self.entries]


class _TailPart:
    """Computes the blocks from some visit on, in one graph; after the model's call `output` is the last one's."""

    def __init__(self, cut: Cut, calls: Sequence[TailCall], hidden: mx.array):
        self._first = len(cut.order) - len(calls)
        self._calls, self.output, self._visits = calls, hidden, -1

    def on_block(self, unit: Unit, inner: Callable, args: tuple, kwargs: dict) -> Any:
        self._visits += 1
        if self._visits < self._first:
            return args[0]
        call = self._calls[self._visits - self._first]
        mx.random.seed(call.seed)
        self.output = inner_call(call.unit)(self.output, *call.args[1:], **call.kwargs)
        return alias(self.output)

    def on_rows(self, unit: Unit, inner: Callable, args: tuple, kwargs: dict) -> Any:
        return unevaluated_zeros(inner(*args, **kwargs))

    on_matmul = on_rows


class HeadPart:
    """Computes what follows the last block, which hands over `hidden`.

    Args:
        bring: called with each outside layer that the head multiplies with, before it does.
    """

    def __init__(self, cut: Cut, hidden: Any, bring: Callable[[Unit], None]):
        self._last, self._visits = len(cut.order) - 1, -1
        self._hidden, self._plain, self._bring = hidden, cut.plain_blocks, bring

    def on_block(self, unit: Unit, inner: Callable, args: tuple, kwargs: dict) -> Any:
        self._visits += 1
        if self._visits == self._last:
            return alias(self._hidden)
        return args[0] if self._plain else unevaluated_zeros(inner(*args, **kwargs))

    def on_rows(self, unit: Unit, inner: Callable, args: tuple, kwargs: dict) -> Any:
        return unevaluated_zeros(inner(*args, **kwargs))

    def on_matmul(self, unit: Unit, inner: Callable, args: tuple, kwargs: dict) -> Any:
        self._bring(unit)
        return inner(*args, **kwargs)


def alias(tree: Any) -> Any:
    """The same arrays as objects of their own, so that the model may write into them."""
    return tree_map(lambda a: mx.array(a) if isinstance(a, mx.array) else a, tree)


def unevaluated_zeros(tree: Any) -> Any:
    return tree_map(lambda a: mx.zeros(a.shape, a.dtype) if isinstance(a, mx.array) else a, tree)
