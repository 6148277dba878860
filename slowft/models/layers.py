"""Finds the layers of experts in a block. Their weights can be offloaded: read apart from the block's other weights.

Comes in: a unit. Goes out: its layers of experts, whose weights have one entry on the first axis for each expert. Never
reads weights.
"""

from dataclasses import dataclass

import mlx.nn as nn

from ..weights.sources import Param
from .seams import Unit

MATRIX = ("weight", "scales", "biases")  # the parameters that are read by groups of experts; the others are small


@dataclass(frozen=True, eq=False)
class Layer:
    """A layer of experts in a block. Each input goes to some of the experts.

    Attributes:
        name: its name within the block; see `name_of`.
        params: the parts of its matrices. All have `n` entries on the first axis.
    """

    name: str
    module: nn.Module
    params: tuple[Param, ...]

    @property
    def n(self) -> int:
        """Number of experts."""
        return self.params[0].source.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return sum(param.nbytes for param in self.params)

    @property
    def compute_nbytes(self) -> int:
        """Bytes as arrays to compute with."""
        return sum(param.compute_nbytes for param in self.params)


def expert_layers(unit: Unit) -> list[Layer]:
    """The layers of experts of a block."""
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

    by_owner: dict[int, list[Param]] = {}
    for param in unit.params:
        if param.key in MATRIX:
            by_owner.setdefault(id(param.owner), []).append(param)
    return [
        Layer(name_of(name), module, tuple(by_owner[id(module)]))
        for name, module in unit.module.named_modules()
        if _original_class(module) in (SwitchLinear, QuantizedSwitchLinear) and id(module) in by_owner
    ]


def name_of(path: str) -> str:
    """A frozen layer's name, from its path within the block. An adapter around the layer does not change the name."""
    return path.removesuffix(".linear")


def _original_class(module: nn.Module) -> type:
    """The module's class before its calls were intercepted."""
    kind = type(module)
    while (base := kind.__base__) is not None and (base.__name__, base.__module__) == (kind.__name__, kind.__module__):
        kind = base
    return kind
