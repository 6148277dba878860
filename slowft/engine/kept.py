"""Kept outputs: the output of a frozen layer, kept from the forward pass, stands for it in the recomputation.

Its gradient with respect to its input needs only its weights, so the multiplication is not done again. With LoRA around
the layer it is the output of both, whose gradients need the adapter besides. The recomputation's results are the same
to the last bit: what is kept is what would be computed. Used on the compute thread, and while a plan is made.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from ..models.layers import name_of
from ..models.seams import intercept

ADAPTER = ("lora_a", "lora_b")

# Kept, in the order of the calls, by layer.
LayerOutputs = dict[str, list[mx.array]]


@dataclass(frozen=True)
class _Watched:
    """A layer whose calls are seen.

    Attributes:
        name: the same for a frozen layer and for LoRA around it.
        lora: if it is LoRA; stays_inside: if it is the frozen layer in one whose output is kept with it.
    """

    name: str
    lora: nn.Module | None = None
    stays_inside: bool = False


class KeptOutputs:
    """Records and replays the outputs of frozen layers in blocks."""

    def __init__(self):
        self._watched: list[nn.Module] = []
        self._recorded: LayerOutputs | None = None
        self._replayed: LayerOutputs | None = None
        self._wanted: set[str] | None = None
        self._with_lora = True
        self._inside: mx.array | None = None  # stands for the frozen layer while LoRA around it is differentiated

    def watch(self, block: nn.Module) -> None:
        """From now on calls of the block's frozen linear layers can be recorded and replayed."""
        if any(block is other for other in self._watched):
            return
        self._watched.append(block)
        inside = set()
        for name, layer in block.named_modules():
            if _is_plain_lora(layer) and _is_candidate(layer.linear):
                inside.add(id(layer.linear))
                intercept(layer, "__call__", _Watched(name, lora=layer), self._on_call)
        for name, layer in block.named_modules():
            if layer is not block and _is_candidate(layer):
                watched = _Watched(name_of(name), stays_inside=id(layer) in inside)
                intercept(layer, "__call__", watched, self._on_call)

    @contextmanager
    def recording(self, names: Sequence[str] | None, with_lora: bool = True) -> Iterator[LayerOutputs]:
        """What the named layers (None: all that are watched) put out goes into the dict this gives.

        Args:
            with_lora: of layers with LoRA around them, both together, where no dropout is drawn in between.
        """
        self._recorded, self._wanted = {}, None if names is None else set(names)
        self._with_lora = with_lora
        try:
            yield self._recorded
        finally:
            self._recorded = None

    @contextmanager
    def replaying(self, outputs: LayerOutputs | None) -> Iterator[None]:
        """What was recorded, with LoRA, stands for its layers."""
        self._replayed = {name: list(arrays) for name, arrays in (outputs or {}).items()}
        self._with_lora = True
        try:
            yield
        finally:
            self._replayed = None

    def _on_call(self, layer: _Watched, inner: Callable, args: tuple, kwargs: dict) -> mx.array:
        if self._inside is not None and layer.stays_inside:
            return self._inside
        if layer.stays_inside if self._with_lora else layer.lora is not None:
            return inner(*args, **kwargs)
        if self._replayed and self._replayed.get(layer.name):
            return self._in_its_stead(self._replayed[layer.name].pop(0), layer.lora, inner, args, kwargs)
        output = inner(*args, **kwargs)
        if self._recorded is not None and (self._wanted is None or layer.name in self._wanted):
            self._recorded.setdefault(layer.name, []).append(output)
        return output

    def _in_its_stead(
        self, kept: mx.array, lora: nn.Module | None, inner: Callable, args: tuple, kwargs: dict
    ) -> mx.array:
        """`kept` as a function of the layer's input, and of the adapter.

        Derivatives are the layer's own; MLX is lazy, so the outputs that come with them are never computed.
        """
        x, *rest = args
        function = mx.custom_function(lambda *_: kept)
        if lora is None:

            @function.vjp
            def vjp(x, cotangent, _):
                return mx.vjp(lambda x: inner(x, *rest, **kwargs), [x], [cotangent])[1][0]

            return function(x)

        def around(x: mx.array, *adapter: mx.array) -> mx.array:
            before = {key: lora[key] for key in ADAPTER}
            dict.update(lora, zip(ADAPTER, adapter))
            self._inside = kept
            try:
                return inner(x, *rest, **kwargs)
            finally:
                self._inside = None
                dict.update(lora, before)

        # the input twice, in the order in which MLX adds up what LoRA and the frozen layer make of it
        @function.vjp
        def vjp_of_both(primals, cotangent, _):
            x, _, *adapter = primals
            of_x, *of_adapter = mx.vjp(around, [x, *adapter], [cotangent])[1]
            of_frozen = mx.vjp(lambda x: lora.linear(x, *rest, **kwargs), [x], [cotangent])[1]
            return of_x, *of_frozen, *of_adapter

        return function(x, x, *(lora[key] for key in ADAPTER))


def _is_plain_lora(layer: nn.Module) -> bool:
    """Whether it is LoRA around a linear layer, with no dropout to be drawn again."""
    from mlx_lm.tuner.lora import LoRALinear, LoRASwitchLinear

    return isinstance(layer, (LoRALinear, LoRASwitchLinear)) and layer.dropout._p_1 == 1


def _is_candidate(layer: nn.Module) -> bool:
    """A frozen layer that multiplies its input by a matrix (of each expert)."""
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

    kinds = (nn.Linear, nn.QuantizedLinear, SwitchLinear, QuantizedSwitchLinear)
    return isinstance(layer, kinds) and not layer.trainable_parameters()
