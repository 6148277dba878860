"""Kept outputs: a frozen layer's output is kept from the forward pass, and replaces the layer's recomputation.

The gradient of the layer's input needs only its weights, so its product is not computed again. If LoRA is around the
layer, the output of both together is kept, and gradients need the adapter as well. The recomputation's results are the
same to the last bit. Used on the compute thread, and while a plan is made.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from ..models.layers import name_of
from ..models.seams import intercept

ADAPTER = ("lora_a", "lora_b")

LayerOutputs = dict[str, list[mx.array]]  # the kept outputs by the layer's name, in the order of its calls


@dataclass(frozen=True)
class _Watched:
    """A layer whose calls are intercepted.

    Attributes:
        name: the same for a frozen layer and for LoRA around it.
        lora: the layer itself, if it is LoRA.
        is_inside_lora: whether it is the frozen layer inside such a LoRA layer.
    """

    name: str
    lora: nn.Module | None = None
    is_inside_lora: bool = False


class KeptOutputs:
    """Records and replays the outputs of frozen layers in blocks."""

    def __init__(self):
        self._watched: list[nn.Module] = []
        self._recorded: LayerOutputs | None = None
        self._replayed: LayerOutputs | None = None
        self._recorded_names: set[str] | None = None  # None: all
        self._with_lora = True
        self._frozen_output: mx.array | None = None  # replaces the frozen layer while LoRA around it is differentiated

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
                watched = _Watched(name_of(name), is_inside_lora=id(layer) in inside)
                intercept(layer, "__call__", watched, self._on_call)

    @contextmanager
    def recording(self, names: Sequence[str] | None, with_lora: bool = True) -> Iterator[LayerOutputs]:
        """Give a dict that the outputs of the named layers (None: of all that are watched) are put into.

        Args:
            with_lora: record the output of a layer and the LoRA around it together, unless LoRA has dropout.
        """
        self._recorded, self._recorded_names = {}, None if names is None else set(names)
        self._with_lora = with_lora
        try:
            yield self._recorded
        finally:
            self._recorded = None

    @contextmanager
    def replaying(self, outputs: LayerOutputs | None) -> Iterator[None]:
        """While this is entered, outputs that were recorded with LoRA replace their layers' calls."""
        self._replayed = {name: list(arrays) for name, arrays in (outputs or {}).items()}
        self._with_lora = True
        try:
            yield
        finally:
            self._replayed = None

    def _on_call(self, layer: _Watched, inner: Callable, args: tuple, kwargs: dict) -> mx.array:
        if self._frozen_output is not None and layer.is_inside_lora:
            return self._frozen_output
        if layer.is_inside_lora if self._with_lora else layer.lora is not None:
            return inner(*args, **kwargs)
        if self._replayed and self._replayed.get(layer.name):
            return self._replay(self._replayed[layer.name].pop(0), layer.lora, inner, args, kwargs)
        output = inner(*args, **kwargs)
        if self._recorded is not None and (self._recorded_names is None or layer.name in self._recorded_names):
            self._recorded.setdefault(layer.name, []).append(output)
        return output

    def _replay(self, kept: mx.array, lora: nn.Module | None, inner: Callable, args: tuple, kwargs: dict) -> mx.array:
        """`kept` as a function of the layer's input and of the adapter, with the layer's own derivatives.

        Those come with outputs of the layer, which are never computed: MLX is lazy.
        """
        x, *rest = args
        function = mx.custom_function(lambda *_: kept)
        if lora is None:

            @function.vjp
            def vjp(x, cotangent, _):
                return mx.vjp(lambda x: inner(x, *rest, **kwargs), [x], [cotangent])[1][0]

            return function(x)

        def lora_call(x: mx.array, *adapter: mx.array) -> mx.array:
            before = {key: lora[key] for key in ADAPTER}
            dict.update(lora, zip(ADAPTER, adapter))
            self._frozen_output = kept
            try:
                return inner(x, *rest, **kwargs)
            finally:
                self._frozen_output = None
                dict.update(lora, before)

        # The input comes twice, so that MLX adds LoRA's gradient of it and the frozen layer's in the usual order
        @function.vjp
        def vjp_of_both(primals, cotangent, _):
            x, _, *adapter = primals
            of_x, *of_adapter = mx.vjp(lora_call, [x, *adapter], [cotangent])[1]
            of_frozen = mx.vjp(lambda x: lora.linear(x, *rest, **kwargs), [x], [cotangent])[1]
            return of_x, *of_frozen, *of_adapter

        return function(x, x, *(lora[key] for key in ADAPTER))


def _is_plain_lora(layer: nn.Module) -> bool:
    """Whether this is LoRA around a linear layer, without dropout, which would have to be drawn again."""
    from mlx_lm.tuner.lora import LoRALinear, LoRASwitchLinear

    return isinstance(layer, (LoRALinear, LoRASwitchLinear)) and layer.dropout._p_1 == 1


def _is_candidate(layer: nn.Module) -> bool:
    """Whether this is a frozen layer that multiplies its input by a matrix, or by one of each expert."""
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

    kinds = (nn.Linear, nn.QuantizedLinear, SwitchLinear, QuantizedSwitchLinear)
    return isinstance(layer, kinds) and not layer.trainable_parameters()
