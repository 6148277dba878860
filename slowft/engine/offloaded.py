"""Offloaded layers of experts, which are not read with their block: their calls are computed by groups of experts.

A group's weights are read, its part of the output is computed, and the weights leave memory. Only experts that an input
goes to are read. What an expert computes of an input depends on no other expert, so results are the same to the last
bit.

Whatever is evaluated while MLX traces keeps its graph (721 MB for a block whose backward pass takes 139). So a block's
vjp is taken in stages. The first one is its forward pass, untraced, for these layers' outputs. Then, with those outputs
in place, there is a vjp for each of the layers' calls, the last call first, as far as the cotangent of that call's
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
    """Sizes of a layer's call: bytes of its input and output, and the number of pairs of input and expert."""

    layer: Layer
    input_nbytes: int
    output_nbytes: int
    n_routed: int


class OffloadedExperts:
    """Answers the calls of layers of experts whose weights are not in place."""

    def __init__(self, residency: Residency):
        self._group_nbytes = GROUP_NBYTES
        self._residency = residency
        self._layers: dict[Unit, list[Layer]] = {}
        self._order = _Order()
        self._kept_outputs: LayerOutputs = {}
        self._recomputed: list[_Recomputed] | None = None
        self._traced: Iterator[_Recomputed] | None = None
        self._noted: dict[Layer, LayerCall] | None = None
        self._routed: dict[Layer, tuple[int, float]] = {}  # in the last call: (pairs, share of the experts)
        self._per_token: dict[Layer, float] = {}  # to how many experts of the layer a token goes

    def use_groups_of(self, nbytes: int) -> None:
        """From now on groups take at most so many bytes when they are computed with; a single expert may take more."""
        self._group_nbytes = nbytes

    def watch(self, unit: Unit) -> None:
        """From now on this block's layers of experts may be offloaded."""
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
        """Learn from these calls, over so many tokens, to how many experts a token goes."""
        self._per_token = {layer: call.n_routed / tokens for layer, call in calls.items()}

    def on_demand(self, tokens: int, passes: int) -> dict[int, list[Layer]]:
        """The layers, by the block's index, of which an evaluation should read only the experts that it needs.

        Args:
            tokens: of each of the `passes` through a block.
        """
        by_block = {}
        for unit, layers in self._layers.items():
            layers = [layer for layer in layers if layer in self._per_token]
            pairs = [(layer, tokens * self._per_token[layer]) for layer in layers]
            experts = [(layer.nbytes, layer.n, self._per_token[layer]) for layer in layers]
            shares = [share for pair in pairs if (share := self._routed_share(*pair)) is not None]
            if is_read_on_demand(experts, tokens, passes, max(shares, default=None)):
                by_block[unit.index] = layers
        return by_block

    def _routed_share(self, layer: Layer, n: float) -> float | None:
        """The share of the layer's experts that the last call needed, if it had `n` pairs or fewer; else None."""
        pairs, share = self._routed.get(layer, (n + 1, 0.0))
        return share if pairs <= n else None

    @property
    def are_offloaded(self) -> bool:
        """Whether the block in place lacks some of its layers."""
        return bool(self._residency.offloaded)

    def begin(self, backward: bool) -> None:
        """Begin a pass through the block in place: from here on the order of its layers' calls is learnt."""
        self._order.begin((tuple(layer.name for layer in self._residency.offloaded), backward))

    @contextmanager
    def noting(self) -> Iterator[dict[Layer, LayerCall]]:
        """Give a dict that the last call of each layer of experts is put into. Their weights may be placeholders."""
        self._noted, outer = {}, self._noted
        try:
            yield self._noted
        finally:
            self._noted = outer

    @contextmanager
    def replaying(self, outputs: LayerOutputs) -> Iterator[None]:
        """While this is entered, use these outputs, kept from the forward pass, in place of recomputing them."""
        self._kept_outputs = outputs
        try:
            yield
        finally:
            self._kept_outputs = {}

    def gradients(self, recompute: Callable[[], Any], differentiate: Callable[[], list[mx.array]]) -> list[mx.array]:
        """What `differentiate` returns, unevaluated, while some of the block's layers are offloaded.

        Args:
            recompute: calls the block on arrays that are not traced.
            differentiate: calls it within `mx.vjp`, the same way each time.
        """
        recomputed = self._recompute(recompute)
        for stage in reversed(recomputed):
            self._trace(recomputed, differentiate)
            cotangent = stage.cotangent
            for other in recomputed:
                other.cotangent = None
            if cotangent is not None:
                mx.eval(cotangent)
                stage.input_cotangent = self._by_groups(stage.call, True, stage.call.backward(detach(cotangent)))
        return self._trace(recomputed, differentiate)

    def _recompute(self, recompute: Callable[[], Any]) -> "list[_Recomputed]":
        self._recomputed, outputs = [], self._kept_outputs
        self._kept_outputs = {name: list(arrays) for name, arrays in outputs.items()}
        try:
            recompute()
            return self._recomputed
        finally:
            self._recomputed, self._kept_outputs = None, outputs

    def _trace(self, recomputed: "list[_Recomputed]", differentiate: Callable[[], list[mx.array]]) -> list[mx.array]:
        self._traced = iter(recomputed)
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
        call = _ExpertCall(layer, inner, args, kwargs)
        self._routed[layer] = call.n_pairs, len(call.entries) / layer.n
        if self._recomputed is not None and (kept := self._kept_outputs.get(layer.name)):
            output = kept.pop(0)
        else:
            output = self._by_groups(call, False, call.forward(detach(args[0])))
        if self._recomputed is not None:
            self._recomputed.append(_Recomputed(call, output))
        return output

    def _by_groups(self, call: "_ExpertCall", backward: bool, work: "_GroupWork") -> mx.array:
        groups = self._groups(call.layer, call.entries, backward)
        self._order.add((call.layer.name, backward), call.entries)
        self._residency.with_groups(groups, self._next_group(), work.on_group)
        return self._residency.on_layer_thread(work.result)

    def _groups(self, layer: Layer, entries: np.ndarray, backward: bool) -> list[Group]:
        """These experts in groups, each as large as it may be; in reverse order for a backward pass."""
        most = max(1, self._group_nbytes * layer.n // layer.compute_nbytes)
        groups = [Group.of(layer, entries[start : start + most]) for start in range(0, len(entries), most)]
        return groups[::-1] if backward else groups

    def _next_group(self) -> Group | None:
        """The group that is probably needed after this call: the first of another layer, of the same experts."""
        if (following := self._order.following()) is None:
            return None
        name, backward = following
        layer = next(layer for layer in self._residency.offloaded if layer.name == name)
        groups = self._groups(layer, self._order.entries[self._order.entries < layer.n], backward)
        return groups[0] if groups else None


class _Recomputed:
    """A layer's call in the recomputation of a block: its output, and its cotangents as far as they are known.

    Attributes:
        cotangent: the output's, from the last trace; None if it is not needed. It lacks the part that comes through
            calls whose `input_cotangent` is not known yet.
        input_cotangent: the input's.
    """

    def __init__(self, call: "_ExpertCall", output: mx.array):
        self.call, self.output = call, output
        self.cotangent: mx.array | None = None
        self.input_cotangent: mx.array | None = None

    def in_trace(self, layer: Layer, x: mx.array) -> mx.array:
        assert layer is self.call.layer, "the recomputation calls other layers than the forward pass"
        function = mx.custom_function(lambda _: self.output)

        @function.vjp
        def vjp(x, cotangent, _):
            if self.input_cotangent is not None:
                return self.input_cotangent
            self.cotangent = cotangent
            return mx.zeros_like(x)

        return function(x)


class _Order:
    """Learns in which order the layers of a block are called.

    Attributes:
        entries: the experts that the last call needed.
    """

    def __init__(self):
        self._following: dict[tuple, tuple[str, bool]] = {}
        self._kind: Any = None
        self._last: tuple[str, bool] | None = None
        self._n = 0
        self.entries = np.empty(0, int)

    def begin(self, kind: Any) -> None:
        """Begin a pass of this kind. All passes of a kind call the same layers."""
        self._kind, self._last, self._n = kind, None, 0

    def add(self, call: tuple[str, bool], entries: np.ndarray) -> None:
        self._following[self._kind, self._n, self._last] = call
        self._last, self._n, self.entries = call, self._n + 1, entries

    def following(self) -> tuple[str, bool] | None:
        """(the layer's name, whether backward) of the next call; None if it is not known."""
        return self._following.get((self._kind, self._n, self._last))


@dataclass
class _GroupWork:
    """What is computed with each group, and the result once all groups were there."""

    on_group: Callable[[Group], None]
    result: Callable[[], mx.array]


class _ExpertCall:
    """One call of a layer of experts: mlx-lm's `SwitchLinear`.

    It takes x `[..., M, D]` and indices that broadcast against the leading axes of x, and gives `[..., M, N]`.

    Attributes:
        entries: the numbers of the experts that it needs, sorted.
        n_pairs: the number of pairs of input and expert.
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

    def forward(self, x: Detached) -> _GroupWork:
        output = _HostArray((len(self._inputs), *self._shape[-2:]), self._dtype)
        values = x.values.reshape(-1, *self._x_shape[-2:])

        def on_group(group: Group) -> None:
            chosen = self._chosen(group)
            group_input = _attach_as(x, values[self._inputs[chosen]])
            output.values[chosen] = detach(self._of_group(group, chosen)(group_input)).values

        return _GroupWork(on_group, lambda: _evaluated(output.array().reshape(self._shape)))

    def backward(self, cotangent: Detached) -> _GroupWork:
        """As in the vjp of `mx.gather_mm`, products with the transposed experts are added up for each input."""
        parts = _HostArray((len(self._inputs), *self._x_shape[-2:]), self._x_dtype)
        values = cotangent.values.reshape(-1, *self._shape[-2:])

        def on_group(group: Group) -> None:
            chosen = self._chosen(group)
            unused_input = placeholder((len(chosen), *self._x_shape[-2:]), self._x_dtype)
            part = _attach_as(cotangent, values[chosen])
            parts.values[chosen] = detach(mx.vjp(self._of_group(group, chosen), [unused_input], [part])[1][0]).values

        def result() -> mx.array:
            n = int(np.prod(self._x_shape[:-2]))
            array = parts.array()
            if n != len(self._inputs) or (self._inputs != np.arange(n)).any():
                zeros = mx.zeros((n, *self._x_shape[-2:]), self._x_dtype)
                array = zeros.at[mx.array(self._inputs)].add(array)
            return _evaluated(array.reshape(self._x_shape))

        return _GroupWork(on_group, result)

    def _chosen(self, group: Group) -> np.ndarray:
        """The numbers of the (input, expert) pairs whose expert is in the group."""
        return np.flatnonzero(np.isin(self._experts, group.entries))

    def _of_group(self, group: Group, chosen: np.ndarray) -> Callable[[mx.array], mx.array]:
        """The layer's function of the inputs of these pairs, while the group's experts alone are in place."""
        indices = mx.array(np.searchsorted(group.entries, self._experts[chosen]).astype(np.uint32))
        return lambda x: self._inner(x, indices, *self._rest, **self._kwargs)


class _HostArray:
    """An array that the host writes to in place."""

    def __init__(self, shape: Sequence[int], dtype: mx.Dtype):
        self._shape, self._dtype = shape, dtype
        self._is_bfloat16 = dtype == mx.bfloat16  # numpy has no such dtype
        self._array: mx.array | None = None
        self._values: np.ndarray | None = None

    @property
    def values(self) -> np.ndarray:
        if self._values is None:  # so the thread that uses it makes it
            self._array = _evaluated(mx.zeros(self._shape, mx.uint16 if self._is_bfloat16 else self._dtype))
            self._values = np.asarray(memoryview(self._array))
        return self._values

    def array(self) -> mx.array:
        assert self._array is not None, "nothing was written to it"
        self._values = None
        return _evaluated(self._array.view(self._dtype) if self._is_bfloat16 else self._array)


def _attach_as(original: Detached, values: np.ndarray) -> mx.array:
    """An array of `values`, with its matrices (the last two axes) laid out as those of `original`: by rows or columns.

    MLX multiplies the two layouts by different routines, whose results differ in the last bit. A single row that
    `mx.expand_dims` makes counts as laid out by columns.
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
