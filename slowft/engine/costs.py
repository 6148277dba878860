"""What a step on this model costs, from its graphs: MLX traces the very calls of a step, on placeholders.

Comes in: an opened model with its adapter, and the shape of a step. Goes out: a `Job` of numbers. Reads no
weights and computes nothing.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from ..errors import PlanError
from ..models.calls import Arguments
from ..models.seams import FLOATS, Probe, Unit, Use, trainable_entries
from ..models.weights import Packed, Plain, placeholder
from ..planning import graph
from ..planning.graph import Cost, CostUnknown
from ..planning.job import Cut, Job, LayerCost, Product, Products, Visit
from .head import HeadLoss, usual_chunk
from .layers import LayerCall, inner_call
from .parts import HeadPart, Tail, TailCall
from .pieces import Pieces, ordering_by_sums
from .trees import uncompiled

LONGEST_PERIOD = 8  # of blocks that alternate
REPETITIONS = 2  # of it that a long tail's graph is made with
CHUNKS = 4  # of tokens that the head's graph is made with


class Costing:
    """Costs of steps on the model that `engine` (an `Engine`) runs; equal blocks are looked at once.

    Everything here runs on the compute thread, whose random state every block sets anew.
    """

    def __init__(self, engine):
        self._model, self._cut, self._kept, self._pieces = engine.model, engine.cut, engine.kept, engine.pieces
        self._layers = engine.layers
        self._cores, self._running_part, self._on_thread = engine.cores, engine.running_part, engine.on_thread
        self._trained = {unit.index: unit.trainable() for unit in self._cut.blocks}
        in_blocks = {(id(o), k) for of_block in self._trained.values() for _, o, k in of_block}
        entries = trainable_entries(self._model)
        self._outside = [(o, k) for _, o, k in entries if (id(o), k) not in in_blocks]

    @functools.cached_property
    def _signatures(self) -> dict[int, str]:
        """Of each block; for all jobs, none of which changes them."""
        return {unit.index: signature(unit) for unit in self._cut.blocks}

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
        lowest = next((p for p, index in enumerate(order) if self._trained[index]), len(order))
        visits, seen, kinds, side = [], {}, [], {}
        for position, index in enumerate(order):
            unit, arguments = self._cut.blocks[index], probe.calls[position]
            comes_back = position >= lowest or bool(self._outside)
            of_input = position > lowest or bool(self._outside)
            key = (self._signatures[index], arguments.signature(), comes_back, of_input)
            if key not in seen:
                seen[key] = self._visit(unit, arguments, cut, comes_back, of_input)
            kinds.append(key)
            forward, backward, look_at_products, calls = seen[key]
            trainable = sum(owner[k].nbytes for _, owner, k in self._trained[index])
            copied = all(p.source.is_copied for p in unit.params)
            sizes = index, unit.nbytes, unit.compute_nbytes, copied, _dequantized_nbytes(unit), _saved_nbytes(unit)
            layers = self._layer_costs(unit, calls, rows * tokens)
            visits.append(Visit(*sizes, trainable, forward, backward, look_at_products, layers))
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
            self._head_cost(probe.calls, kinds, rows, tokens, logits.shape[-1], cut, lowest, head_in_chunks),
            logits.shape[-1],
            sum(unit.nbytes for unit in self._cut.head),
            sum(unit.compute_nbytes for unit in self._cut.head),
            sum(rows * tokens * u.params[0].source.extents[0].row_nbytes for u in rows_units),
            trainable,
            optimizer_copies * trainable,
            self._cut.is_chain,
        )

    def _visit(self, unit: Unit, arguments: Arguments, cut: Cut, comes_back: bool, of_input: bool):
        """(forward, backward, a function that looks at what could be kept, calls of layers) of one visit to a block."""
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

        def gradients(xs: Sequence[mx.array], cotangents: Sequence[mx.array]) -> list[mx.array]:
            def recompute(*variables):
                arrays = list(xs)
                for i, value in zip(wrt, variables):
                    arrays[i] = value
                return run(arrays)

            return mx.vjp(recompute, [xs[i] for i in wrt], cotangents)[1]

        def backward_keeping(names: Sequence[str]) -> Cost:
            kept = {name: [placeholder(a.shape, a.dtype) for a in shapes[name]] for name in names}
            cotangents = [placeholder(a.shape, a.dtype) for a in out_shapes]

            def backward(xs, cts):
                with self._as_computed(cut), self._kept.replaying(kept):
                    return gradients(xs, cts)

            return cost(backward, everything, cotangents)

        def products_apart() -> list[Product]:
            """Those that would save the backward pass a multiplication."""
            cotangents = [placeholder(a.shape, a.dtype) for a in out_shapes]

            def backward(xs, cts):
                with self._as_computed(cut), self._kept.recording(list(shapes)) as made:
                    wanted = gradients(xs, cts)
                return wanted, [made[name] for name in shapes]

            plain, *kept = costs_without(backward, everything, cotangents)
            sizes = [sum(a.nbytes for a in arrays) for arrays in shapes.values()]
            products = [Product(*found) for found in zip(shapes, sizes, kept)]
            return [product for product in products if product.backward.flops < plain.flops]

        @contextmanager
        def adapter_as_it_is() -> Iterator[None]:
            try:
                yield
            finally:
                for (owner, key), value in zip(entries, originals):
                    owner[key] = value

        self._kept.watch(unit.module)
        if cut.mlp_tokens is not None:
            self._pieces.watch(unit.module)
        with adapter_as_it_is():
            of_forward = cost(forward, *everything)
            comes_back = comes_back and bool(wrt)
            plain = backward_keeping(()) if comes_back else None

        def products() -> Products:
            with adapter_as_it_is():
                try:
                    products = products_apart()
                    return Products(tuple(products), backward_keeping([product.name for product in products]))
                except CostUnknown:  # experts' products have no vmap, which looking through what replaces a layer takes
                    return Products()

        @functools.cache
        def look_at_products() -> Products:
            # in pieces memory is short, and looking at the graph of many takes long
            return self._on_thread(products) if comes_back and cut.mlp_tokens is None else Products()

        return of_forward, plain, look_at_products, calls

    def _layer_costs(self, unit: Unit, calls: dict[str, LayerCall], tokens: int) -> tuple[LayerCost, ...]:
        """What may come apart from the block."""
        costs = []
        for layer in self._layers.of(unit):
            if (call := calls.get(layer.name)) is not None:
                sizes = (
                    layer.nbytes,
                    layer.compute_nbytes,
                    layer.n,
                    call.n_routed / tokens,
                    call.input_nbytes,
                    call.output_nbytes,
                )
                costs.append(LayerCost(layer.name, *sizes))
        return tuple(costs)

    def _head_cost(self, calls, kinds, rows: int, tokens: int, vocab_size: int, cut: Cut, lowest: int, in_chunks: bool):
        order = self._cut.order
        units = [self._cut.blocks[index] for index in order]
        mask, total = mx.ones((rows, tokens), mx.bool_), mx.array(rows * tokens)
        targets = placeholder((rows, tokens), mx.int32)
        mx.eval(mask, total)

        @functools.cache
        def head(n_tail: int, head_tokens: int | None) -> Cost:
            """Of a long tail, what the repetitions of its blocks add is counted by the last of a few of them."""
            positions = list(range(len(order) - n_tail, len(order)))
            runs = repetitions([kinds[position] for position in positions], REPETITIONS)
            surplus = [n - REPETITIONS for _, _, n in runs]

            def without(counts: Sequence[int]) -> tuple[int, ...]:
                """The tail less the first so many repetitions of each run."""
                left_out = {at + i for (at, period, _), n in zip(runs, counts) for i in range(n * period)}
                return tuple(position for i, position in enumerate(positions) if i not in left_out)

            base = whole = of_positions(without(surplus), head_tokens)
            for i, n in enumerate(surplus):
                shorter = of_positions(without([m + (i == j) for j, m in enumerate(surplus)]), head_tokens)
                whole = whole.lengthened(base, shorter, n)
            return whole

        def of_positions(positions: tuple[int, ...], head_tokens: int | None) -> Cost:
            """Of many chunks of tokens, what most of them add is counted by one, which is the same below any tail."""
            chunk = head_tokens or usual_chunk(vocab_size)
            if not in_chunks or chunk >= rows * tokens:
                return of_chunks(positions, None)
            n = -(-rows * tokens // chunk) - CHUNKS
            if n <= 0:
                return of_chunks(positions, chunk)
            shown = of_chunks(positions, chunk, n)
            whole = shown.lengthened(of_chunks((), chunk, n), of_chunks((), chunk, n, 1), n)
            # what chunks leave is in the graph of all of them, and no chunk computes while another does
            same = ("peak_nbytes", "output_nbytes", "reserved_nbytes")
            return replace(whole, **{name: getattr(shown, name) for name in same})

        @functools.cache
        def of_chunks(positions: tuple[int, ...], chunk: int | None, *left_out: int) -> Cost:
            n_tail, first = len(positions), min(positions, default=len(order))
            tail_calls = [TailCall(units[position], *_arguments(calls[position]), 0) for position in positions]
            tail = Tail(self._cut, tail_calls, tail_calls[0].args[0] if n_tail else self._last_output(calls))
            entries = [*tail.entries, *self._outside]
            arrays, params = (
                [placeholder(a.shape, a.dtype) for a in tail.arrays],
                [owner[key] for owner, key in entries],
            )
            wanted = tail.wanted(first > lowest or bool(self._outside) or not n_tail, besides=False)
            wanted += [True] * len(self._outside)
            wrt = [i for i, (a, w) in enumerate(zip([*arrays, *params], wanted)) if w and a.dtype in FLOATS]

            def run_tail(values: list[mx.array]) -> Any:
                return tail.run(values, self._model, self._running_part, (rows, tokens))

            def logits(hidden: Any, n_rows: int, n_tokens: int) -> mx.array:
                with self._running_part(HeadPart(self._cut, hidden, lambda unit: None)):
                    return self._model(mx.zeros((n_rows, n_tokens), mx.int32))

            loss = HeadLoss(run_tail, logits, targets, mask, total, tail.entries, self._outside, chunk, left_out)

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


def _as_on_a_cpu() -> AbstractContextManager:
    """While this is entered, graphs are made as for the CPU backend; nothing is evaluated.

    On a GPU, cross-entropy and the gradient of attention become fused primitives, which MLX cannot export. Made of
    plain operations they take more memory: an upper bound.
    """
    cpu = mx.Device(mx.cpu)
    return nullcontext() if mx.default_device() == cpu else mx.stream(cpu)


def cost(function: Callable, *args, in_part: bool = False) -> Cost:
    """See `planning.graph.cost`; pieces are put in order in a way it can see through."""
    with ordering_by_sums(), uncompiled(), _as_on_a_cpu():
        if in_part:
            try:
                return graph.cost(function, *args, in_part=True)
            except CostUnknown:  # no part of it can be seen
                pass
        return graph.cost(function, *args)


def costs_without(function: Callable, *args) -> list[Cost]:
    """See `planning.graph.costs_without`."""
    with ordering_by_sums(), uncompiled(), _as_on_a_cpu():
        return graph.costs_without(function, *args)


def repetitions(kinds: Sequence[Any], more_than: int) -> list[tuple[int, int, int]]:
    """(where, length of the period, how often) of what comes more than so many times in a row, the longest first."""
    runs, at = [], 0
    while at < len(kinds):
        found = (0, 0, 0)
        for period in range(1, LONGEST_PERIOD + 1):
            n = 1
            while kinds[at + n * period : at + (n + 1) * period] == kinds[at : at + period]:
                n += 1
            if n > more_than and n * period > found[1] * found[2]:
                found = at, period, n
        if found[2]:
            runs.append(found)
        at += max(found[1] * found[2], 1)
    return runs


def signature(unit: Unit) -> str:
    """Equal for blocks that compute the same: kinds, shapes, dtypes and plain settings of their modules."""
    arrays = tuple((p.name.removeprefix(unit.name), p.source.shape, p.source.result_dtype) for p in unit.params)
    adapters = tuple((key, owner[key].shape, owner[key].dtype) for owner, key in unit.adapter())
    settings = [
        (name, type(module).__name__, [(k, _setting(k, v)) for k, v in vars(module).items()])
        for name, module in unit.module.named_modules()
    ]
    trainable = tuple(key for _, _, key in unit.trainable())
    return str((arrays, adapters, settings, trainable))


def _setting(name: str, value: Any) -> Any:
    """Of a block's number, only whether it is the first counts: mlx-lm's blocks ask for no more."""
    if name == "layer_idx" and isinstance(value, int):
        return value > 0
    return value if isinstance(value, (int, float, str)) else None


def _dequantized_nbytes(unit: Unit) -> dict[tuple[int, int, str], int]:
    nbytes: dict[tuple[int, int, str], int] = {}
    for param in unit.params:
        if isinstance(source := param.source, Packed):
            nbytes[source.kind] = nbytes.get(source.kind, 0) + param.compute_nbytes
    return nbytes


def _saved_nbytes(unit: Unit) -> int:
    """Bytes on disk that `slowft prepare --quantize` saves of a block: 4 bits a value, 32 for each group of 64."""
    sources = [p.source for p in unit.params if p.key == "weight" and hasattr(p.owner, "to_quantized")]
    plain = [s for s in sources if isinstance(s, Plain) and s.result_dtype in FLOATS and s.shape[-1] % 64 == 0]
    return sum(s.extent.nbytes - math.prod(s.shape) * 9 // 16 for s in plain)


def _arguments(call: Arguments) -> tuple[tuple, dict]:
    args, kwargs, _ = call.with_arrays(call.arrays)
    return args, kwargs
