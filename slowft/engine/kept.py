"""Kept products: the output of a frozen layer, kept from the forward pass, stands for it in the recomputation.

Its gradient with respect to its input needs only its weights, so the multiplication is not done again. Inside
LoRA the layer is the inner `linear`. The recomputation's results are the same to the last bit: what is kept is
what would be computed. Used on the compute thread, and while a plan is made.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn

from ..models.layers import name_of
from ..models.seams import intercept

# Kept, in the order of the calls, by layer.
Products = dict[str, list[mx.array]]


class KeptProducts:
    """Records and replays the outputs of frozen layers in blocks."""

    def __init__(self):
        self._layers: dict[int, dict[str, nn.Module]] = {}  # by id of the block: name -> layer
        self._recorded: Products | None = None
        self._replayed: Products | None = None
        self._names: dict[int, str] = {}
        self._wanted: set[str] | None = None

    def watch(self, block: nn.Module) -> None:
        """From now on calls of the block's frozen linear layers can be recorded and replayed."""
        if id(block) in self._layers:
            return
        self._layers[id(block)] = {}
        for name, layer in block.named_modules():
            if layer is not block and _is_candidate(layer):
                name = name_of(name)
                self._names[id(layer)] = name
                intercept(layer, "__call__", name, self._on_call)
                self._layers[id(block)][name] = layer

    @contextmanager
    def recording(self, names: Sequence[str] | None) -> Iterator[Products]:
        """What the named layers (None: all that are watched) put out goes into the dict this gives."""
        self._recorded, self._wanted = {}, None if names is None else set(names)
        try:
            yield self._recorded
        finally:
            self._recorded = None

    @contextmanager
    def replaying(self, products: Products | None) -> Iterator[None]:
        self._replayed = {name: list(arrays) for name, arrays in (products or {}).items()}
        try:
            yield
        finally:
            self._replayed = None

    def _on_call(self, name: str, inner: Callable, args: tuple, kwargs: dict) -> mx.array:
        if self._replayed and self._replayed.get(name):
            return _in_its_stead(self._replayed[name].pop(0), inner, args, kwargs)
        output = inner(*args, **kwargs)
        if self._recorded is not None and (self._wanted is None or name in self._wanted):
            self._recorded.setdefault(name, []).append(output)
        return output


def _in_its_stead(kept: mx.array, inner: Callable, args: tuple, kwargs: dict) -> mx.array:
    x, *rest = args
    function = mx.custom_function(lambda _: kept)

    @function.vjp
    def vjp(x, cotangent, _):
        # the layer's own derivative; MLX is lazy, so the output that comes with it is never computed
        return mx.vjp(lambda x: inner(x, *rest, **kwargs), [x], [cotangent])[1][0]

    return function(x)


def _is_candidate(layer: nn.Module) -> bool:
    """A frozen layer that multiplies its input by a matrix (of each expert)."""
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

    kinds = (nn.Linear, nn.QuantizedLinear, SwitchLinear, QuantizedSwitchLinear)
    return isinstance(layer, kinds) and not layer.trainable_parameters()
