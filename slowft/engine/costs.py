"""What a step on this model costs, from its graphs: MLX traces the very calls of a step, on placeholders.

Comes in: an opened model with its adapter, and the shape of a step. Goes out: a `Job` of numbers. Reads no
weights and computes nothing.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from ..errors import PlanError
from ..models.calls import Arguments
from ..models.seams import FLOATS, Probe, Unit, Use, trainable_entries
from ..models.weights import Packed, Rounded, placeholder
from ..planning import graph
from ..planning.graph import Cost, CostUnknown
from ..planning.job import Cut, Job, LayerCost, Product, Visit
from .head import HeadLoss, usual_chunk
from .layers import LayerCall, inner_call
from .parts import HeadPart, Tail, TailCall
from .pieces import Pieces, ordering_by_sums


class Costing:
    """Costs of steps on the model that `engine` (an `Engine`) runs; equal blocks are looked at once.

    Everything here runs on the compute thread, whose random state every block sets anew.
    """

    def __init__(self, engine):
        self._model, self._cut, self._kept, self._pieces = engine.model, engine.cut, engine.kept, engine.pieces
        self._layers, self._layers_apart = engine.layers, engine.layers_apart
        self._cores, self._running_part, self._on_thread = engine.cores, engine.running_part, engine.on_thread
        in_blocks = {(id(o), k) for unit in self._cut.blocks for _, o, k in unit.trainable()}
        entries = trainable_entries(self._model)
        self._outside = [(o, k) for _, o, k in entries if (id(o), k) not in in_blocks]

    def job(
        self, rows: int, tokens: int, micro_batches: int, cut: Cut, optimizer_copies: int, head_in_chunks: bool
    ) -> Job:
        """A step over `micro_batches` of `[rows, tokens]`, cut as `cut` says.

        Args:
            optimizer_copies: how many times the trainable parameters the optimizer keeps.
            head_in_chunks: whether logits may be computed some tokens at a time.
        Raises:
            PlanError: MLX cannot show the graph of this model, or not when it is cut so.
        """
        n = -(-rows // cut.rows) if cut.rows else 1
        rows = min(cut.rows or rows, rows)
        try:
            return self._job(rows, tokens, micro_batches * n, cut, optimizer_copies, head_in_chunks)
        except CostUnknown as e:
            raise PlanError(f"no memory plan can be made for this model: {e}") from None

    def _job(self, rows, tokens, micro_batches, cut: Cut, optimizer_copies, head_in_chunks) -> Job:
        order = self._cut.order
        probe = Probe(self._cut, 0.25)
        with self._running_part(probe):
            logits = self._model(mx.zeros((rows, tokens), mx.int32))
        trained = {unit.index: unit.trainable() for unit in self._cut.blocks}
        lowest = next((p for p, index in enumerate(order) if trained[index]), len(order))
        visits, seen, side = [], {}, {}
        for position, index in enumerate(order):
            unit, arguments = self._cut.blocks[index], probe.calls[position]
            comes_back = position >= lowest or bool(self._outside)
            of_input = position > lowest or bool(self._outside)
            key = (signature(unit), arguments.signature(), comes_back, of_input)
            if key not in seen:
                seen[key] = self._visit(unit, arguments, cut, comes_back, of_input)
            forward, backward, products, backward_kept, calls = seen[key]
            trainable = sum(owner[k].nbytes for _, owner, k in trained[index])
            copied = all(p.source.is_copied for p in unit.params)
            sizes = index, unit.nbytes, unit.compute_nbytes, copied
            kinds = _nbytes_by_kind(unit, Packed), _nbytes_by_kind(unit, Rounded)
            held = sum(p.source.held_nbytes for p in unit.params)
            layers = self._layer_costs(unit, calls, products, rows * tokens)
            costs = forward, backward, products, backward_kept, layers
            visits.append(Visit(*sizes, *kinds, held, trainable, *costs))
            hidden, *others = arguments.arrays
            side |= {id(array): array.nbytes for array in others}
        rows_units = self._cut.outside[Use.ROWS]
        trainable = sum(array.nbytes for _, array in tree_flatten(self._model.trainable_parameters()))
        return Job(
            cut,
            micro_batches,
            rows,
            tokens,
            tuple(visits),
            hidden.nbytes,
            sum(side.values()),
            self._head_cost(probe.calls, rows, tokens, logits.shape[-1], cut, lowest, head_in_chunks),
            logits.shape[-1],
            sum(unit.nbytes for unit in self._cut.head),
            sum(unit.compute_nbytes for unit in self._cut.head),
            sum(rows * tokens * u.params[0].source.extents[0].row_nbytes for u in rows_units),
            trainable,
            optimizer_copies * trainable,
            self._cut.is_chain,
        )

    def _visit(self, unit: Unit, arguments: Arguments, cut: Cut, comes_back: bool, of_input: bool):
        """(forward, backward, products, backward with all of them kept, calls of layers) of one visit to a block."""
        inputs = [placeholder(a.shape, a.dtype) for a in arguments.arrays]
        n, entries = len(inputs), unit.adapter()
        originals = [owner[key] for owner, key in entries]
        trainable = {(id(owner), key) for _, owner, key in unit.trainable()}
        everything = [*inputs, *originals]
        wanted = [of_input] * n + [(id(owner), key) in trainable for owner, key in entries]
        wrt = [i for i, (a, w) in enumerate(zip(everything, wanted)) if w and a.dtype in FLOATS]
        shapes: dict[str, list[mx.array]] = {}
        out_shapes: list[mx.array] = []
        calls: dict[str, LayerCall] = {}

        def run(xs: Sequence[mx.array]) -> list[mx.array]:
            for (owner, key), value in zip(entries, xs[n:]):
                owner[key] = value
            return arguments.call(inner_call(unit), xs[:n]).arrays

        def forward(*xs: mx.array) -> list[mx.array]:
            with self._as_computed(cut):
                with self._kept.recording(None) as products, self._layers.noting() as noted:
                    outputs = run(xs)
                shapes.update(products)
                calls.update({layer.name: call for layer, call in noted.items()})
                out_shapes[:] = outputs
                return outputs

        def backward_keeping(names: Sequence[str]) -> Cost:
            kept = {name: [placeholder(a.shape, a.dtype) for a in shapes[name]] for name in names}
            cotangents = [placeholder(a.shape, a.dtype) for a in out_shapes]

            def backward(xs, cts):
                def recompute(*variables):
                    arrays = list(xs)
                    for i, value in zip(wrt, variables):
                        arrays[i] = value
                    return run(arrays)

                with self._as_computed(cut), self._kept.replaying(kept):
                    return mx.vjp(recompute, [xs[i] for i in wrt], cts)[1]

            return cost(backward, everything, cotangents)

        self._kept.watch(unit.module)
        if cut.mlp_tokens is not None:
            self._pieces.watch(unit.module)
        try:
            of_forward = cost(forward, *everything)
            if not (comes_back and wrt):
                return of_forward, None, (), None, calls
            plain, products = backward_keeping(()), []
            if cut.mlp_tokens is not None:  # memory is short, and looking at the graph of many pieces takes long
                return of_forward, plain, (), None, calls
            try:
                for name, arrays in shapes.items():
                    kept = backward_keeping([name])
                    if kept.flops < plain.flops:
                        products.append(Product(name, sum(a.nbytes for a in arrays), kept))
                return of_forward, plain, tuple(products), backward_keeping([p.name for p in products]), calls
            except CostUnknown:  # experts' products have no vmap, which looking through what replaces a layer takes
                return of_forward, plain, (), None, calls
        finally:
            for (owner, key), value in zip(entries, originals):
                owner[key] = value

    def _layer_costs(
        self, unit: Unit, calls: dict[str, LayerCall], products: Sequence[Product], tokens: int
    ) -> tuple[LayerCost, ...]:
        """What may come apart from the block. Where no products can be told, all outputs count as needed."""
        needed = {product.name for product in products}
        costs = []
        for layer in self._layers_apart(unit):
            if (call := calls.get(layer.name)) is not None:
                per_token = None if call.n_routed is None else call.n_routed / tokens
                sizes = layer.nbytes, layer.compute_nbytes, layer.n, per_token, call.input_nbytes, call.output_nbytes
                costs.append(LayerCost(layer.name, *sizes, not products or layer.name in needed))
        return tuple(costs)

    def _head_cost(self, calls, rows: int, tokens: int, vocab_size: int, cut: Cut, lowest: int, in_chunks: bool):
        order = self._cut.order
        units = [self._cut.blocks[index] for index in order]
        mask, total = mx.ones((rows, tokens), mx.bool_), mx.array(rows * tokens)
        targets = placeholder((rows, tokens), mx.int32)
        mx.eval(mask, total)

        @functools.cache
        def head(n_tail: int, head_tokens: int | None) -> Cost:
            first = len(order) - n_tail
            tail_calls = [TailCall(unit, *_arguments(call), 0) for unit, call in zip(units[first:], calls[first:])]
            tail = Tail(self._cut, tail_calls, tail_calls[0].args[0] if n_tail else self._last_output(calls))
            entries = [*tail.entries, *self._outside]
            arrays, params = (
                [placeholder(a.shape, a.dtype) for a in tail.arrays],
                [owner[key] for owner, key in entries],
            )
            wanted = tail.wanted(first > lowest or bool(self._outside) or not n_tail, besides=False)
            wanted += [True] * len(self._outside)
            wrt = [i for i, (a, w) in enumerate(zip([*arrays, *params], wanted)) if w and a.dtype in FLOATS]
            chunk = head_tokens or usual_chunk(vocab_size)
            chunk = chunk if in_chunks and chunk < rows * tokens else None

            def run_tail(values: list[mx.array]) -> Any:
                return tail.run(values, self._model, self._running_part, (rows, tokens))

            def logits(hidden: Any, n_rows: int, n_tokens: int) -> mx.array:
                with self._running_part(HeadPart(self._cut, hidden, lambda unit: None)):
                    return self._model(mx.zeros((n_rows, n_tokens), mx.int32))

            loss = HeadLoss(run_tail, logits, targets, mask, total, tail.entries, self._outside, chunk)

            def function(values, param_values):
                with self._as_computed(cut):
                    return loss.loss_and_grads(values, param_values, wrt)

            try:
                return self._on_thread(lambda: cost(function, arrays, params, in_part=True))
            finally:
                for (owner, key), value in zip(entries, params):
                    owner[key] = value

        return head

    @contextmanager
    def _as_computed(self, cut: Cut) -> Iterator[None]:
        with self._cores.shared(), self._pieces.cutting(Pieces(cut.mlp_tokens, cut.attention_queries)):
            yield

    def _last_output(self, calls) -> Any:
        args, kwargs = _arguments(calls[-1])
        return inner_call(self._cut.blocks[self._cut.order[-1]])(*args, **kwargs)


def cost(function: Callable, *args, in_part: bool = False) -> Cost:
    """See `planning.graph.cost`; pieces are put in order in a way it can see through."""
    with ordering_by_sums():
        if in_part:
            try:
                return graph.cost(function, *args, in_part=True)
            except CostUnknown:  # no part of it can be seen
                pass
        return graph.cost(function, *args)


def signature(unit: Unit) -> str:
    """Equal for blocks that compute the same: kinds, shapes, dtypes and plain settings of their modules."""
    arrays = tuple((p.name.removeprefix(unit.name), p.source.shape, p.source.result_dtype) for p in unit.params)
    adapters = tuple((key, owner[key].shape, owner[key].dtype) for owner, key in unit.adapter())
    settings = [
        (name, type(module).__name__, [(k, v) for k, v in vars(module).items() if isinstance(v, (int, float, str))])
        for name, module in unit.module.named_modules()
    ]
    trainable = tuple(key for _, _, key in unit.trainable())
    return str((arrays, adapters, settings, trainable))


def _nbytes_by_kind(unit: Unit, source_class: type) -> dict[tuple[int, int, str], int]:
    nbytes: dict[tuple[int, int, str], int] = {}
    for param in unit.params:
        if isinstance(source := param.source, source_class):
            nbytes[source.kind] = nbytes.get(source.kind, 0) + param.compute_nbytes
    return nbytes


def _arguments(call: Arguments) -> tuple[tuple, dict]:
    args, kwargs, _ = call.with_arrays(call.arrays)
    return args, kwargs
