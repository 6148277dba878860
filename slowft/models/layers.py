"""The large layers of a block, whose weights may come apart from the block's others.

Comes in: a unit. Goes out: its linear layers, dense ones and those of experts, whose outputs are made entry by
entry of the first axis of their weights: rows of a matrix, or experts. Never reads weights.
"""

from dataclasses import dataclass

import mlx.nn as nn

from .seams import Unit
from .weights import Param

MATRIX = ("weight", "scales", "biases")  # what of a layer comes in groups; the rest is small
SMALL_SHARE = 0.01  # of a block's bytes; layers below stay with the block


@dataclass(frozen=True, eq=False)
class Layer:
    """A linear layer of a block.

    Attributes:
        name: within the block; see `name_of`.
        params: the parts of its matrix, all of `n` entries on the first axis.
        is_experts: whether those are experts, of which each input goes to some; else rows, each one of the outputs.
    """

    name: str
    module: nn.Module
    params: tuple[Param, ...]
    is_experts: bool

    @property
    def n(self) -> int:
        return self.params[0].source.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return sum(param.nbytes for param in self.params)

    @property
    def compute_nbytes(self) -> int:
        """Bytes once they are arrays to compute with."""
        return sum(param.compute_nbytes for param in self.params)

    @property
    def is_copied(self) -> bool:
        """Whether those have memory of their own, apart from the bytes they are built from."""
        return all(param.source.is_copied for param in self.params)


def large_layers(unit: Unit) -> list[Layer]:
    """The linear layers of a block that hold a share of its bytes worth bringing apart."""
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

    dense, experts = (nn.Linear, nn.QuantizedLinear), (SwitchLinear, QuantizedSwitchLinear)
    by_owner: dict[int, list[Param]] = {}
    for param in unit.params:
        if param.key in MATRIX:
            by_owner.setdefault(id(param.owner), []).append(param)
    layers = []
    for name, module in unit.module.named_modules():
        params = by_owner.get(id(module), [])
        kind = _original_class(module)
        if kind not in dense + experts or not params or len({param.source.shape[0] for param in params}) > 1:
            continue
        layer = Layer(name_of(name), module, tuple(params), kind in experts)
        if layer.compute_nbytes >= SMALL_SHARE * unit.compute_nbytes:
            layers.append(layer)
    return layers


def name_of(path: str) -> str:
    """A frozen layer's name, from its path within the block: the same with an adapter around it as without."""
    return path.removesuffix(".linear")


def _original_class(module: nn.Module) -> type:
    """Its class as it was before calls of the module were intercepted."""
    kind = type(module)
    while (base := kind.__base__) is not None and (base.__name__, base.__module__) == (kind.__name__, kind.__module__):
        kind = base
    return kind
