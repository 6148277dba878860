"""Parts of a model's own call: the blocks from some visit on, or what follows the last block.

While a part runs, these answer for the units: blocks that do not belong to it hand on what they are given.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map

from ..models.seams import Cut, Unit


@dataclass
class TailCall:
    """A block's call in a micro-batch's trace that is left to the tail; `seed` is that of its dropout masks."""

    unit: Unit
    args: tuple
    kwargs: dict
    seed: int


class TailPart:
    """Computes the blocks from some visit on, in one graph; after the model's call `output` is the last one's.

    Args:
        calls: of the blocks of the tail, in order, with what each is handed besides the hidden state.
        hidden: input of the first of them.
    """

    def __init__(self, cut: Cut, calls: Sequence[TailCall], hidden: mx.array):
        self._first = len(cut.order) - len(calls)
        self._calls, self.output, self._visits = calls, hidden, -1

    def on_block(self, unit: Unit, inner: Callable, args: tuple, kwargs: dict) -> Any:
        self._visits += 1
        if self._visits < self._first:
            return args[0]
        call = self._calls[self._visits - self._first]
        mx.random.seed(call.seed)
        self.output = inner(self.output, *call.args[1:], **call.kwargs)
        return self.output

    def on_rows(self, unit: Unit, inner: Callable, args: tuple, kwargs: dict) -> Any:
        return _unevaluated_zeros(inner(*args, **kwargs))

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
            return self._hidden
        return args[0] if self._plain else _unevaluated_zeros(inner(*args, **kwargs))

    def on_rows(self, unit: Unit, inner: Callable, args: tuple, kwargs: dict) -> Any:
        return _unevaluated_zeros(inner(*args, **kwargs))

    def on_matmul(self, unit: Unit, inner: Callable, args: tuple, kwargs: dict) -> Any:
        self._bring(unit)
        return inner(*args, **kwargs)


def _unevaluated_zeros(tree: Any) -> Any:
    return tree_map(lambda a: mx.zeros(a.shape, a.dtype) if isinstance(a, mx.array) else a, tree)
