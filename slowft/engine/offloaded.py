"""Layers of experts that are not brought with their block: the products come by groups of experts.

A group's weights come, its part of the product is computed, they go. Only those experts come that an input goes to.
What an expert gives for an input depends on no other, so results are the same to the last bit.

Nothing can be evaluated while MLX traces without keeping its graph (721 MB for a block whose backward pass takes 139).
So a block's vjp is taken in stages: first its forward pass, none of its arrays traced, for these layers' outputs; then,
with those in place, its vjp once for each of their calls, the last call first, as far as the cotangent of that call's
output. From that the cotangent of the call's input is computed by groups, and the next stage goes on from there.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from ..models.layers import Layer, expert_layers
from ..models.seams import Unit, intercept
from ..planning.experts import GROUP_NBYTES, is_read_on_demand
from ..weights.groups import Group
from ..weights.residency import Residency
from ..weights.sources import placeholder
from .kept import LayerOutputs
from .trees import Detached, attach, detach


@dataclass(frozen=True)
class LayerCall:
    """Sizes of a layer's call: bytes of its input and output, and how many pairs of input and expert there are."""

    layer: Layer
    input_nbytes: int
    output_nbytes: int
    n_routed: int


class OffloadedExperts:
    """Answers the calls of layers whose weights are not in place."""

    def __init__(self, residency: Residency):
        self._group_nbytes = GROUP_NBYTES
        self._residency = residency
        self._layers: dict[Unit, list[Layer]] = {}
        self._order = _Order()
        self._kept_outputs: LayerOutputs = {}
        self._recomputed: list[_Recomputed] | None = None
        self._traced: Iterator[_Recomputed] | None = None
        self._noted: dict[Layer, LayerCall] | None = None
        self._routed: dict[Layer, tuple[int, float]] = {}  # of the last call: (inputs and experts, share of experts)
        self._per_token: dict[Layer, float] = {}  # experts of each layer that a token goes to

    def use_groups_of(self, nbytes: int) -> None:
        """From now on groups have so many bytes, as they are computed with; a single expert may have more."""
        self._group_nbytes = nbytes

    def watch(self, unit: Unit) -> None:
        """From now on this block may come without its layers of experts."""
        if unit not in self._layers:
            self._layers[unit] = expert_layers(unit)
            for layer in self._layers[unit]:
                intercept(layer.module, "__call__", layer, self._on_call)

    def of(self, unit: Unit) -> list[Layer]:
        """The block's layers of experts."""
        return self._layers[unit]

    def by_block(self) -> dict[int, list[Layer]]:
        """All layers of experts, by the block's index."""
        return {unit.index: layers for unit, layers in self._layers.items() if layers}

    def learn_routing(self, calls: Mapping[Layer, LayerCall], tokens: int) -> None:
        """These calls over so many tokens tell how many experts a token goes to."""
        self._per_token = {layer: call.n_routed / tokens for layer, call in calls.items()}

    def on_demand(self, tokens: int, passes: int) -> dict[int, list[Layer]]:
        """The layers, by the block's index, of which an evaluation does better to read only the experts it needs.

        Args:
            tokens: of each of the `passes` through a block.
        """
        found = {}
        for unit, layers in self._layers.items():
            layers = [layer for layer in layers if layer in self._per_token]
            pairs = [(layer, tokens * self._per_token[layer]) for layer in layers]
            experts = [(layer.nbytes, layer.n, self._per_token[layer]) for layer in layers]
            seen = max((share for pair in pairs if (share := self._routed_share(*pair)) is not None), default=None)
            if is_read_on_demand(experts, tokens, passes, seen):
                found[unit.index] = layers
        return found

    def _routed_share(self, layer: Layer, n: float) -> float | None:
        """Of the layer's experts, the share that `n` pairs of input and expert, or fewer, went to the last time."""
        pairs, share = self._routed.get(layer, (n + 1, 0.0))
        return share if pairs <= n else None

    @property
    def are_offloaded(self) -> bool:
        """Whether the block in place lacks some of its layers."""
        return bool(self._residency.offloaded)

    def begin(self, backward: bool) -> None:
        """A pass through the block in place begins, in which the order of the layers' calls is learnt or known."""
        self._order.begin((tuple(layer.name for layer in self._residency.offloaded), backward))

    @contextmanager
    def noting(self) -> Iterator[dict[Layer, LayerCall]]:
        """Calls of layers of experts, the last of each, while this is entered and their weights are no matter."""
        self._noted, noted = {}, self._noted
        try:
            yield self._noted
        finally:
            self._noted = noted

    @contextmanager
    def replaying(self, outputs: LayerOutputs) -> Iterator[None]:
        """While this is entered, these outputs kept from the forward pass need not be computed again."""
        self._kept_outputs = outputs
        try:
            yield
        finally:
            self._kept_outputs = {}

    def gradients(self, recompute: Callable[[], Any], differentiate: Callable[[], list[mx.array]]) -> list[mx.array]:
        """What `differentiate` returns, unevaluated, some of the block's layers being offloaded.

        Args:
            recompute: calls the block on arrays that are not traced.
            differentiate: calls it within `mx.vjp`, the same each time.
        """
        calls = self._recompute(recompute)
        for call in reversed(calls):
            self._trace(calls, differentiate)
            cotangent = call.cotangent
            for other in calls:
                other.cotangent = None
            if cotangent is not None:
                mx.eval(cotangent)
                call.of_input = self._by_groups(call.product, True, call.product.backward(detach(cotangent)))
        return self._trace(calls, differentiate)

    def _recompute(self, recompute: Callable[[], Any]) -> "list[_Recomputed]":
        self._recomputed, outputs = [], self._kept_outputs
        self._kept_outputs = {name: list(arrays) for name, arrays in outputs.items()}
        try:
            recompute()
            return self._recomputed
        finally:
            self._recomputed, self._kept_outputs = None, outputs

    def _trace(self, calls: "list[_Recomputed]", differentiate: Callable[[], list[mx.array]]) -> list[mx.array]:
        self._traced = iter(calls)
        try:
            return differentiate()
        finally:
            self._traced = None

    def _on_call(self, layer: Layer, inner: Callable, args: tuple, kwargs: dict) -> mx.array:
        if "indices" in kwargs:
            kwargs = dict(kwargs)
            args = (args[0], kwargs.pop("indices"), *args[1:])
        if layer not in self._residency.offloaded:
            output = inner(*args, **kwargs)
            if self._noted is not None:
                self._noted[layer] = LayerCall(layer, args[0].nbytes, output.nbytes, args[1].size)
            return output
        if self._traced is not None:
            return next(self._traced).in_trace(layer, args[0])
        product = _Call(layer, inner, args, kwargs)
        self._routed[layer] = product.n_pairs, len(product.entries) / layer.n
        if self._recomputed is None:
            return self._by_groups(product, False, product.forward(detach(args[0])))
        if kept := self._kept_outputs.get(layer.name):
            output = kept.pop(0)
        else:
            output = self._by_groups(product, False, product.forward(detach(args[0])))
        self._recomputed.append(_Recomputed(product, output))
        return output

    def _by_groups(self, product: "_Call", backward: bool, job: "_Job") -> mx.array:
        groups = self._groups(product.layer, product.entries, backward)
        self._order.arrive((product.layer.name, backward), product.entries)
        self._residency.with_groups(groups, self._following(), job.on_group)
        return self._residency.on_layer_thread(job.result)

    def _groups(self, layer: Layer, entries: np.ndarray, backward: bool) -> list[Group]:
        """Experts in order, as many together as may be; the other way round backward."""
        most = max(1, self._group_nbytes * layer.n // layer.compute_nbytes)
        groups = [Group.of(layer, entries[start : start + most]) for start in range(0, len(entries), most)]
        return groups[::-1] if backward else groups

    def _following(self) -> Group | None:
        """The group that is likely to be asked for after this call: of the same experts of another layer."""
        if (following := self._order.following()) is None:
            return None
        name, backward = following
        layer = next(layer for layer in self._residency.offloaded if layer.name == name)
        groups = self._groups(layer, self._order.entries[self._order.entries < layer.n], backward)
        return groups[0] if groups else None


class _Recomputed:
    """A layer's call in the recomputation of a block: its output, and what is known of its cotangents.

    Attributes:
        cotangent: the output's in the last trace; None if nobody asks for it. What lies behind calls whose `of_input`
            is not known yet is missing in it.
        of_input: the cotangent of the input.
    """

    def __init__(self, product: "_Call", output: mx.array):
        self.product, self.output = product, output
        self.cotangent: mx.array | None = None
        self.of_input: mx.array | None = None

    def in_trace(self, layer: Layer, x: mx.array) -> mx.array:
        assert layer is self.product.layer, "the recomputation takes another way than the forward pass"
        function = mx.custom_function(lambda _: self.output)

        @function.vjp
        def vjp(x, cotangent, _):
            if self.of_input is not None:
                return self.of_input
            self.cotangent = cotangent
            return mx.zeros_like(x)

        return function(x)


class _Order:
    """Learns in which order the layers of a block are called.

    Attributes:
        entries: experts that the last call in this job went to.
    """

    def __init__(self):
        self._following: dict[tuple, tuple[str, bool]] = {}
        self._kind: Any = None
        self._last: tuple[str, bool] | None = None
        self._n = 0
        self.entries = np.empty(0, int)

    def begin(self, kind: Any) -> None:
        """A job of this kind begins: all of a kind call the same layers."""
        self._kind, self._last, self._n = kind, None, 0

    def arrive(self, call: tuple[str, bool], entries: np.ndarray) -> None:
        self._following[self._kind, self._n, self._last] = call
        self._last, self._n, self.entries = call, self._n + 1, entries

    def following(self) -> tuple[str, bool] | None:
        return self._following.get((self._kind, self._n, self._last))


@dataclass
class _Job:
    """What is done with each group, and what comes out when all were there."""

    on_group: Callable[[Group], None]
    result: Callable[[], mx.array]


class _Call:
    """One call of a layer of experts: mlx-lm's `SwitchLinear`.

    x `[..., M, D]`, indices that broadcast against its leading axes -> `[..., M, N]`.

    Attributes:
        entries: the sorted experts that it needs.
        n_pairs: of input and expert.
    """

    def __init__(self, layer: Layer, inner: Callable, args: tuple, kwargs: dict):
        (x, indices, *self._rest), self._kwargs = args, dict(kwargs)
        self.layer, self._inner = layer, inner
        self._x_shape, self._x_dtype = x.shape, x.dtype
        output = inner(*args, **kwargs)  # never evaluated
        self._shape, self._dtype = output.shape, output.dtype
        lead = self._x_shape[:-2]
        experts, inputs = detach(indices).values, np.arange(int(np.prod(lead))).reshape(lead)
        self._inputs, self._experts = (a.reshape(-1) for a in np.broadcast_arrays(inputs, experts))
        self.entries = np.unique(self._experts)
        self.n_pairs = len(self._experts)

    def forward(self, x: Detached) -> _Job:
        output = _HostArray((len(self._inputs), *self._shape[-2:]), self._dtype)
        values = x.values.reshape(-1, *self._x_shape[-2:])

        def on_group(group: Group) -> None:
            chosen = self._chosen(group)
            taken = _attach_as(x, values[self._inputs[chosen]])
            output.values[chosen] = detach(self._of_group(group, chosen)(taken)).values

        return _Job(on_group, lambda: _evaluated(output.array().reshape(self._shape)))

    def backward(self, cotangent: Detached) -> _Job:
        """As `mx.gather_mm`'s own: the products with the transposed experts are added up by input."""
        parts = _HostArray((len(self._inputs), *self._x_shape[-2:]), self._x_dtype)
        values = cotangent.values.reshape(-1, *self._shape[-2:])

        def on_group(group: Group) -> None:
            chosen = self._chosen(group)
            nothing = placeholder((len(chosen), *self._x_shape[-2:]), self._x_dtype)
            part = _attach_as(cotangent, values[chosen])
            parts.values[chosen] = detach(mx.vjp(self._of_group(group, chosen), [nothing], [part])[1][0]).values

        def result() -> mx.array:
            n = int(np.prod(self._x_shape[:-2]))
            array = parts.array()
            if n != len(self._inputs) or (self._inputs != np.arange(n)).any():
                zeros = mx.zeros((n, *self._x_shape[-2:]), self._x_dtype)
                array = zeros.at[mx.array(self._inputs)].add(array)
            return _evaluated(array.reshape(self._x_shape))

        return _Job(on_group, result)

    def _chosen(self, group: Group) -> np.ndarray:
        """Which of the (input, expert) pairs the group has to do with."""
        return np.flatnonzero(np.isin(self._experts, group.entries))

    def _of_group(self, group: Group, chosen: np.ndarray) -> Callable[[mx.array], mx.array]:
        indices = mx.array(np.searchsorted(group.entries, self._experts[chosen]).astype(np.uint32))
        return lambda x: self._inner(x, indices, *self._rest, **self._kwargs)


class _HostArray:
    """An array that is written to in place, through the host."""

    def __init__(self, shape: Sequence[int], dtype: mx.Dtype):
        self._shape, self._dtype = shape, dtype
        self._is_bfloat16 = dtype == mx.bfloat16  # which numpy does not have
        self._array: mx.array | None = None
        self._values: np.ndarray | None = None

    @property
    def values(self) -> np.ndarray:
        if self._values is None:  # made by the thread that uses it
            self._array = _evaluated(mx.zeros(self._shape, mx.uint16 if self._is_bfloat16 else self._dtype))
            self._values = np.asarray(memoryview(self._array))
        return self._values

    def array(self) -> mx.array:
        assert self._array is not None, "nothing was written to it"
        self._values = None
        return _evaluated(self._array.view(self._dtype) if self._is_bfloat16 else self._array)


def _attach_as(original: Detached, values: np.ndarray) -> mx.array:
    """Values of `original`, its matrices (the last two axes) laid out as they are there, by rows or by columns.

    MLX multiplies the two by different routines, whose results differ in the last bit; a single row that comes out of
    `mx.expand_dims` counts as a column.
    """
    strides, nbytes = original.values.strides, original.values.itemsize
    by_columns = values.ndim > 1 and strides[-2] == nbytes and values.shape[-1] > 1
    if not by_columns:
        return attach(Detached(values, original.dtype))
    if values.shape[-2] == 1:
        return mx.expand_dims(attach(Detached(np.ascontiguousarray(values[..., 0, :]), original.dtype)), -2)
    columns = np.ascontiguousarray(values.swapaxes(-1, -2))
    return attach(Detached(columns, original.dtype)).swapaxes(-1, -2)


def _evaluated(array: mx.array) -> mx.array:
    mx.eval(array)
    return array
