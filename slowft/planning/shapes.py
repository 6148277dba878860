"""Makes a `Job` of an opened model and the shape of a step, from shapes alone. Nothing is computed, read or exported.

The model's own call runs on placeholders. MLX is lazy, so it infers shapes and evaluates nothing. Meanwhile the
functions that multiply, normalise and add are replaced by ones that note what they return. `NOTED` lists them.

A pass's memory is bounded by what was noted: P bytes of outputs of products and norms (or of elementwise operations, if
those are more), S bytes of attention's scores, and W bytes of the largest product of two weights (as DoRA has):

    forward       P + S + 2 W       each output exists once at most
    backward      2 P + 3 S + 4 W   each output and its cotangent; what softmax makes of scores too
    whole graph   1.5 (P + S)       what autodiff keeps of the forward pass when nothing is recomputed

The adapters' gradients come on top. `benchmarks/LOG.md` has the ratios to what architectures really take.
"""

import functools
import math
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..models.calls import Arguments
from ..models.seams import FLOATS, CutModel, Probe, Unit, Use, inner_call, trainable_entries
from ..weights.sources import Plain, placeholder
from .job import Chunking, Job, KeepableOutput, LayerCost, Visit
from .machine import LARGE_MATRIX

FEED_FORWARD = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "moe")  # mlx-lm's names for them within a block
# A compiled function that one call of a block calls more often is the step of a recurrence over tokens. Autodiff keeps
# all of its states.
CALLS_OF_A_RECURRENCE = 16
TEACHER_NBYTES = 8  # a teacher's entry: an id and a log-probability


# --- What a block's call does -----------------------------------------------------------------------


@dataclass
class Noted:
    """What was noted of calls within a block's feed-forward layers, or of the others.

    Attributes:
        tokens: number of tokens of the micro-batch, in all its rows.
        outputs, elementwise: bytes that products and norms return, and that additions and multiplications return.
        scores: bytes of attention's scores.
        of_weights: bytes of the largest product of two weights.
        flops: floating point operations of products with weights, which need a gradient on one side only.
        pair_flops: floating point operations of other products.
        widths: sizes of the last axis of what elementwise operations return.
        compiled: compiled function -> bytes of each of its calls.
    """

    tokens: int
    outputs: int = 0
    elementwise: int = 0
    scores: int = 0
    of_weights: int = 0
    flops: int = 0
    pair_flops: int = 0
    widths: set[int] = field(default_factory=set)
    compiled: dict[int, list[int]] = field(default_factory=dict, repr=False)

    def product(self, out: mx.array, x: mx.array, weight: mx.array, *_, **__) -> None:
        if not self._has_tokens(x):  # the product of an adapter's two matrices
            self.of_weights = max(self.of_weights, out.nbytes)
            return
        self.outputs += out.nbytes
        flops = 2 * out.size * x.shape[-1]
        if weight.ndim > 3 and weight.shape[:-2] == x.shape[:-2]:
            self.pair_flops += flops
            if out.shape[-1] > x.shape[-1]:  # tokens times tokens
                self.scores += out.nbytes
        else:
            self.flops += flops

    def attention(self, out: mx.array, q: mx.array, k: mx.array, *_, **__) -> None:
        rows, heads, queries, width = q.shape
        scores = rows * heads * queries * k.shape[2]
        self.scores += scores * q.dtype.size
        self.pair_flops += 4 * scores * width

    def norm(self, out: mx.array, *_, **__) -> None:
        self.outputs += out.nbytes

    def add(self, out: mx.array, *_, **__) -> None:
        if isinstance(out, mx.array) and self._has_tokens(out):
            self.elementwise += out.nbytes
            self.widths |= {*out.shape[-1:]}

    def compiled_call(self, out: Any, *args, function: Callable, **_) -> None:
        arrays = [*args, *(out if isinstance(out, (tuple, list)) else [out])]
        self.compiled.setdefault(id(function), []).append(sum(a.nbytes for a in arrays if isinstance(a, mx.array)))

    @property
    def live(self) -> int:
        """P of this file's first lines: bytes of outputs that may exist at once."""
        states = sum(sum(calls) for calls in self.compiled.values() if len(calls) > CALLS_OF_A_RECURRENCE)
        return max(self.outputs, self.elementwise + 2 * states)  # each state, and what it decays to

    def _has_tokens(self, array: mx.array) -> bool:
        """Whether an axis is for tokens: they have rows and positions, or one axis for all. Weights are matrices."""
        return array.ndim > 2 or array.shape[:1] == (self.tokens,)


# (owner, name of the function, what to note of it)
NOTED = (
    (mx.array, "__matmul__", Noted.product),
    *((mx, name, Noted.product) for name in ("matmul", "quantized_matmul", "gather_mm", "gather_qmm")),
    (mx, "addmm", lambda noted, out, _, x, weight, *rest, **options: noted.product(out, x, weight)),
    (mx.fast, "scaled_dot_product_attention", Noted.attention),
    *((mx.fast, name, Noted.norm) for name in ("rms_norm", "layer_norm")),
    *((mx, name, Noted.norm) for name in ("conv1d", "conv_general", "einsum")),
    *((mx.array, name, Noted.add) for name in ("__add__", "__radd__", "__sub__", "__mul__", "__rmul__", "__truediv__")),
)


@contextmanager
def noting(block: nn.Module, tokens: int) -> Iterator[tuple[Noted, Noted]]:
    """While this is entered, calls are noted: (those within the block's feed-forward layers, the others)."""
    mlp, others = Noted(tokens), Noted(tokens)
    into = [others]  # the last one is noted into

    def replaced(original: Callable, note: Callable) -> Callable:
        def call(*args, **kwargs):
            out = original(*args, **kwargs)
            note(into[-1], out, *args, **kwargs)
            return out

        return call

    def in_mlp(layer: Callable) -> Callable:
        def call(*args, **kwargs):
            into.append(mlp)
            try:
                return layer(*args, **kwargs)
            finally:
                into.pop()

        return call

    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in NOTED]
    stand_ins = [replaced(original, note) for (*_, original), (*_, note) in zip(originals, NOTED)]
    originals += (functions := list(_compiled_functions(block)))
    stand_ins += [replaced(f, functools.partial(Noted.compiled_call, function=f)) for *_, f in functions]
    layers = {name: layer for name, layer in block.items() if name in FEED_FORWARD and isinstance(layer, nn.Module)}
    try:
        for (owner, name, _), stand_in in zip(originals, stand_ins):
            setattr(owner, name, stand_in)
        for name, layer in layers.items():
            dict.__setitem__(block, name, in_mlp(layer))
        yield mlp, others
    finally:
        for name, layer in layers.items():
            dict.__setitem__(block, name, layer)
        for owner, name, original in reversed(originals):
            setattr(owner, name, original)


def _compiled_functions(block: nn.Module) -> Iterator[tuple[Any, str, Callable]]:
    """(module, name, function) of compiled functions in the Python modules that the block's classes come from."""
    names = {cls.__module__ for module in block.modules() for cls in type(module).__mro__}
    for name in {*names, "mlx_lm.models.gated_delta"}:
        module = sys.modules.get(name)
        if module is not None and name.startswith("mlx_lm.models."):
            for key, value in list(vars(module).items()):
                if type(value) is type(nn.silu):
                    yield module, key, value


# --- Jobs ---------------------------------------------------------------------------------------------


class Shapes:
    """Makes jobs of steps on one opened model.

    Args:
        engine: an `Engine`, for its model, where that is cut, and how calls of layers are intercepted.
        training: False for forward passes alone: there is no backward pass, and no graph is kept.
    """

    def __init__(self, engine: Any, training: bool = True):
        self._engine, self._model, self._training = engine, engine.model, training
        self._cut: CutModel = engine.cut
        self._trained = {unit.index: unit.trainable() if training else [] for unit in self._cut.blocks}
        in_blocks = {(id(owner), key) for entries in self._trained.values() for _, owner, key in entries}
        outside = [entry for entry in trainable_entries(self._model) if (id(entry[1]), entry[2]) not in in_blocks]
        self._trains_outside = training and bool(outside)

    def job(self, rows: int, tokens: int, chunking: Chunking, optimizer_copies: int, top_k: int) -> Job:
        """The job of a step over one micro-batch of `[rows, tokens]` under `chunking`.

        Args:
            optimizer_copies: how many times the trainable parameters the optimizer keeps.
            top_k: how many of a teacher's log-probabilities the loss takes for each target; 0 without a teacher.
        """
        cut = self._cut
        all_rows, rows = rows, min(chunking.rows or rows, rows)
        probe = Probe(0.25)
        with self._engine.running_part(probe), noting(nn.Module(), rows * tokens) as (_, noted):
            logits = self._model(mx.zeros((rows, tokens), mx.int32))
        side = {id(array): array.nbytes for call in probe.calls for array in call.arrays[1:]}
        parameters = tree_flatten(self._model.trainable_parameters()) if self._training else []
        trainable = sum(array.nbytes for _, array in parameters)
        row_nbytes = sum(unit.params[0].source.extents[0].row_nbytes for unit in cut.outside[Use.ROWS])
        head_values = sum(unit.module["weight"].shape[0] * _width(unit.module) for unit in cut.head)
        return Job(
            chunking=chunking,
            micro_batches=-(-all_rows // rows),
            rows=rows,
            tokens=tokens,
            visits=self._visits(probe.calls, chunking, rows * tokens),
            hidden_nbytes=probe.calls[-1].arrays[0].nbytes,
            side_nbytes=sum(side.values()) + rows * tokens * (TEACHER_NBYTES * top_k + 5 if top_k else 0),
            vocab_size=logits.shape[-1],
            # logits, what cross-entropy makes of them, and their cotangent; also a soft cap or scale; with a teacher
            # also the logits of all other tokens, what their sum makes of them, and its cotangent
            logits_arrays=(4 if logits.shape[-1] in noted.widths else 3) + (3 if top_k else 0),
            head_flops=(4 if self._training else 2) * rows * tokens * head_values,
            head_stored_nbytes=sum(unit.nbytes for unit in cut.head),
            head_compute_nbytes=sum(unit.compute_nbytes for unit in cut.head),
            head_in_chunks=self._engine.head_may_be_cut,
            rows_nbytes=rows * tokens * row_nbytes,
            trainable_nbytes=trainable,
            optimizer_nbytes=optimizer_copies * trainable,
            is_chain=cut.is_chain,
            trains=self._training,
        )

    def _visits(self, calls: Sequence[Arguments], chunking: Chunking, tokens: int) -> tuple[Visit, ...]:
        """The visits to blocks that these calls are."""
        cut = self._cut
        lowest = next((i for i, index in enumerate(cut.order) if self._trained[index]), len(cut.order))
        visits, seen = [], {}
        for position, (index, arguments) in enumerate(zip(cut.order, calls)):
            unit = cut.blocks[index]
            kind = self._engine.kind_of(unit)
            comes_back = position >= lowest or self._trains_outside
            of_input = position > lowest or self._trains_outside
            key = kind, arguments.signature(), comes_back, of_input
            if key not in seen:
                seen[key] = self._look(unit, arguments, chunking, tokens, comes_back, of_input)
                if not self._training:  # blocks run one after the other: all together make no more than the largest
                    seen[key]["graph_nbytes"] = seen[key]["forward_nbytes"] // len(cut.order) + 1
            is_copied, saved = all(param.source.is_copied for param in unit.params), _quantizing_saves_nbytes(unit)
            weights = unit.nbytes, unit.compute_nbytes, is_copied, saved
            adapters_nbytes = sum(owner[k].nbytes for _, owner, k in self._trained[index])
            visits.append(Visit(index, kind, *weights, adapters_nbytes, comes_back, **seen[key]))
        return tuple(visits)

    def _look(
        self, unit: Unit, arguments: Arguments, chunking: Chunking, tokens: int, comes_back: bool, of_input: bool
    ) -> dict[str, Any]:
        """What a visit to a block computes, as arguments of `Visit`."""
        inputs = [placeholder(array.shape, array.dtype) for array in arguments.arrays]
        kept = self._engine.kept
        kept.watch(unit.module)
        with noting(unit.module, tokens) as (mlp, others), kept.recording(None) as recorded:
            with self._engine.layers.noting() as calls:
                returned = arguments.call(inner_call(unit), inputs).arrays
        shapes = {name: [(a.shape, a.dtype) for a in arrays] for name, arrays in recorded.items()}
        del recorded
        flops = {name: self._flops(unit, name, arrays) for name, arrays in shapes.items()}
        needed = self._needed(unit, arguments, of_input, inputs, returned, shapes) if comes_back else set()
        work = _passes(mlp, others, chunking, arguments, inputs[0].nbytes, unit)
        work["backward_flops"] -= sum(n for name, n in flops.items() if name not in needed)
        outputs = ()
        if chunking.mlp_tokens is None:
            outputs = tuple(
                KeepableOutput(name, sum(math.prod(shape) * dtype.size for shape, dtype in arrays), flops[name])
                for name, arrays in shapes.items()
                if name in needed
            )
        layers = []
        for layer in self._engine.layers.of(unit):
            if (call := calls.get(layer)) is not None:
                of_call = call.n_routed / tokens, call.input_nbytes, call.output_nbytes
                layers.append(LayerCost(layer.name, layer.nbytes, layer.compute_nbytes, layer.n, *of_call))
        return work | {"outputs": outputs, "layers": tuple(layers)}

    def _needed(self, unit: Unit, arguments: Arguments, of_input: bool, inputs, returned, shapes: dict) -> set[str]:
        """The layers whose outputs the backward pass needs. It needs only the weights of others, so MLX skips them.

        Arrays of the same shape stand in for the outputs. Those that the graph of the gradients needs still exist after
        it is built.

        Args:
            of_input: whether the gradient of the block's input is needed.
        """
        entries = unit.trainable()
        arrays, adapter = list(inputs), [owner[key] for _, owner, key in entries]
        floats = [i for i, array in enumerate(arrays) if of_input and array.dtype in FLOATS]
        stand_ins = {name: [placeholder(*array) for array in arrays] for name, arrays in shapes.items()}
        references = {name: [weakref.ref(array) for array in arrays] for name, arrays in stand_ins.items()}

        def call(*variables: mx.array) -> list[mx.array]:
            for i, value in zip(floats, variables):
                arrays[i] = value
            for (_, owner, key), value in zip(entries, variables[len(floats) :]):
                owner[key] = value
            return arguments.call(inner_call(unit), arrays).arrays

        cotangents = [placeholder(array.shape, array.dtype) for array in returned]
        try:
            with self._engine.kept.replaying(stand_ins):
                stand_ins.clear()
                gradients = mx.vjp(call, [*(inputs[i] for i in floats), *adapter], cotangents)[1]
        finally:
            for (_, owner, key), value in zip(entries, adapter):
                owner[key] = value
        arrays.clear()
        needed = {name for name, arrays in references.items() if any(array() is not None for array in arrays)}
        del gradients  # not before: they hold the graph
        return needed

    def _flops(self, unit: Unit, name: str, outputs: Sequence[tuple]) -> int:
        """Operations of a layer's calls with these outputs: by its matrix, and by the adapter's second matrix."""
        modules = dict(unit.module.named_modules())
        layer = modules[name]
        inner = modules.get(f"{name}.linear", layer)
        width = _width(inner)
        if inner is not layer and "lora_b" in layer:
            width += layer["lora_b"].shape[-2 if layer["lora_b"].ndim == 2 else -1]
        return sum(2 * math.prod(shape) * width for shape, _ in outputs)


def largest_matrix(cut: CutModel) -> tuple[int, int]:
    """(rows, columns) of the largest matrix in a block. An expert's matrix counts as one."""
    layers = [m for unit in cut.blocks for m in unit.module.modules() if "weight" in m and m["weight"].ndim >= 2]
    return max(((layer["weight"].shape[-2], _width(layer)) for layer in layers), key=math.prod, default=LARGE_MATRIX)


def _width(layer: nn.Module) -> int:
    """Size of the last axis of what a layer multiplies."""
    weight = layer["weight"]
    return weight.shape[-1] * 32 // layer.bits if weight.dtype == mx.uint32 else weight.shape[-1]


def _passes(mlp: Noted, others: Noted, chunking: Chunking, arguments: Arguments, hidden_nbytes: int, unit: Unit):
    """Flops, and upper bounds of bytes, of one micro-batch's passes through a block."""
    tokens = arguments.arrays[0].shape[1] if arguments.arrays[0].ndim == 3 else 1
    mlp_share = min(1.0, (chunking.mlp_tokens or tokens) / tokens)
    queries_share = min(1.0, (chunking.attention_queries or tokens) / tokens)
    live = others.live + mlp_share * mlp.live
    if mlp_share < 1:  # the chunks' outputs, and their cotangents
        live += 2 * hidden_nbytes
    scores = queries_share * others.scores + mlp.scores
    of_weights = max(mlp.of_weights, others.of_weights)
    gradients = sum(owner[key].nbytes for owner, key in unit.adapter())
    flops, pair_flops = mlp.flops + others.flops, mlp.pair_flops + others.pair_flops
    return {
        "forward_flops": flops + pair_flops,
        "backward_flops": 2 * flops + 3 * pair_flops,
        "graph_flops": 2 * flops + 3 * pair_flops,
        "forward_nbytes": int(live + scores) + 2 * of_weights + hidden_nbytes,
        "backward_nbytes": int(2 * live + 3 * scores) + 4 * of_weights + 2 * hidden_nbytes + 2 * gradients,
        "graph_nbytes": int(1.5 * (live + scores)) + of_weights + gradients,
    }


def signature(unit: Unit) -> str:
    """A text that is equal for blocks that compute the same: kinds, shapes, dtypes and plain settings of modules."""
    arrays = tuple((p.name.removeprefix(unit.name), p.source.shape, p.source.result_dtype) for p in unit.params)
    adapters = tuple((key, owner[key].shape, owner[key].dtype) for owner, key in unit.adapter())
    settings = [
        (name, type(module).__name__, [(k, _setting(k, v)) for k, v in vars(module).items()])
        for name, module in unit.module.named_modules()
    ]
    trainable = tuple(key for _, _, key in unit.trainable())
    return str((arrays, adapters, settings, trainable))


def _setting(name: str, value: Any) -> Any:
    """The value if it is plain. Of a block's number only "not the first" counts: mlx-lm's blocks ask for no more."""
    if name == "layer_idx" and isinstance(value, int):
        return value > 0
    return value if isinstance(value, (int, float, str)) else None


def _quantizing_saves_nbytes(unit: Unit) -> int:
    """Bytes on disk that `slowft prepare --quantize` saves in a block: 4 bits a value, and 32 for each 64 values."""
    sources = [p.source for p in unit.params if p.key == "weight" and hasattr(p.owner, "to_quantized")]
    plain = [s for s in sources if isinstance(s, Plain) and s.result_dtype in FLOATS and s.shape[-1] % 64 == 0]
    return sum(s.extent.nbytes - math.prod(s.shape) * 9 // 16 for s in plain)
