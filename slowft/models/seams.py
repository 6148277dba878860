"""Where a model is cut: its blocks, its embedding tables, its large layers outside the blocks.

Comes in: a model without weights. Goes out: a `Cut`: units whose weights can come and go, each intercepted
so that calling it reaches a handler, and what the model's own `__call__` does with them, found by running
it on dummy values. A model that cannot be cut is refused here with its reason. Never reads weights.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from ..errors import ModelError
from .weights import Param, locate

FLOATS = (mx.float32, mx.float16, mx.bfloat16)


@dataclass(eq=False)
class Unit:
    """A module whose weights come and go together.

    Attributes:
        params: its parameters that lie in files.
        constants: (owner, key, array) of arrays mlx-lm made itself, such as RoPE tables: always in memory.
    """

    name: str
    index: int
    module: nn.Module
    params: list[Param]
    constants: list[tuple[Any, Any, mx.array]] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        return sum(p.nbytes for p in self.params)

    @property
    def compute_nbytes(self) -> int:
        return sum(p.compute_nbytes for p in self.params)

    def adapter(self) -> list[tuple[Any, Any]]:
        """(owner, key) of every array that is neither in a file nor a constant: adapters, frozen parts included."""
        other = {(id(p.owner), p.key) for p in self.params} | {(id(owner), key) for owner, key, _ in self.constants}
        return [(owner, key) for owner, key, _ in array_entries(self.module) if (id(owner), key) not in other]

    def trainable(self) -> list[tuple[str, Any, Any]]:
        """(name, owner, key) of the unit's trainable parameters, in a fixed order."""
        return trainable_entries(self.module)

    def restore_constants(self) -> None:
        for owner, key, array in self.constants:
            owner[key] = array


class Use(Enum):
    """How a unit outside the blocks is called."""

    ROWS = "embedding look-up"
    MATMUL = "large linear layer, or an embedding used as the head"


@dataclass
class Cut:
    """A model taken apart.

    Attributes:
        blocks: in the order of `model.layers`.
        outside: large layers outside the blocks, by use: looked up by row, or multiplied with.
        head: those of the outside layers that the model's call multiplies with.
        resident: every other parameter: norms, biases. Always in memory.
        order: indices of `blocks` in the order in which a forward pass visits them.
        head_is_separable: what follows the last block depends on that block's output alone, so it can be
            computed by itself.
        plain_blocks: each block takes the array `[B, T, D]` first and returns one of the same shape.
        is_chain: besides, each block's first argument is the very output of the one before, and nothing else in the
            model sees that output: then the values between blocks need not go through the model's own call.
        hidden_nbytes: of what the first block is handed, per token.
    """

    blocks: list[Unit]
    outside: dict[Use, list[Unit]]
    resident: list[Param]
    head: list[Unit] = field(default_factory=list)
    order: list[int] = field(default_factory=list)
    head_is_separable: bool = False
    plain_blocks: bool = False
    is_chain: bool = False
    hidden_nbytes: int = 0


# handler(unit, inner, args, kwargs) -> what the call returns; `inner` is the module's own method, bound.
Handler = Callable[[Unit, Callable, tuple, dict], Any]


def intercept(module: nn.Module, method: str, unit: Any, handler: Callable) -> None:
    """Send calls of `module.method` to `handler` (see `Handler`), which is handed `unit` with them.

    The module keeps its class's name and everything else.
    """
    cls = type(module)
    inner = getattr(cls, method)

    def call(self, *args, **kwargs):
        return handler(unit, inner.__get__(self), args, kwargs)

    module.__class__ = type(cls.__name__, (cls,), {method: call, "__module__": cls.__module__, "__doc__": cls.__doc__})


def find_units(model: nn.Module, params: list[Param]) -> Cut:
    """Sort the parameters into blocks, large outside layers, and the resident rest.

    Raises:
        ModelError: the model has no list of blocks.
    """
    try:
        layers = list(model.layers)
    except AttributeError:
        raise ModelError(f"{type(model).__name__} has no list of layers to stream") from None
    if not layers or len({id(layer) for layer in layers}) != len(layers):
        raise ModelError(f"{type(model).__name__}: its list of layers is empty or names a layer twice")

    names = {id(module): name for name, module in model.named_modules()}
    by_owner: dict[int, list[Param]] = {}
    for param in params:
        by_owner.setdefault(id(param.owner), []).append(param)

    blocks = []
    for i, layer in enumerate(layers):
        owned = [p for owner in _containers(layer) for p in by_owner.pop(id(owner), [])]
        blocks.append(Unit(names.get(id(layer), f"layers.{i}"), i, layer, owned, _constants(layer, owned)))

    outside: dict[Use, list[Unit]] = {Use.ROWS: [], Use.MATMUL: []}
    for name, module in model.named_modules():
        if id(module) not in by_owner:
            continue
        if isinstance(module, (nn.Embedding, nn.QuantizedEmbedding)):
            unit = Unit(name, len(blocks), module, by_owner.pop(id(module)))
            outside[Use.ROWS].append(unit)
            outside[Use.MATMUL].append(unit)
        elif isinstance(module, (nn.Linear, nn.QuantizedLinear)):
            outside[Use.MATMUL].append(Unit(name, len(blocks), module, by_owner.pop(id(module))))
    resident = [p for owned in by_owner.values() for p in owned]
    return Cut(blocks, outside, resident)


def install(cut: Cut, on_block: Handler, on_rows: Handler, on_matmul: Handler) -> None:
    """Intercept every unit's calls."""
    for unit in cut.blocks:
        intercept(unit.module, "__call__", unit, on_block)
    for unit in cut.outside[Use.ROWS]:
        intercept(unit.module, "__call__", unit, on_rows)
    for unit in cut.outside[Use.MATMUL]:
        is_embedding = unit in cut.outside[Use.ROWS]
        intercept(unit.module, "as_linear" if is_embedding else "__call__", unit, on_matmul)


# --- The model's own __call__, on dummy values ------------------------------------------------------


class Probe:
    """Answers every unit's call with dummy values of the right shapes, and notes what was asked.

    The units' real methods are called for their output shapes only: MLX infers shapes without evaluating.
    """

    def __init__(self, cut: Cut, fill: float, last_visit: int | None = None):
        self.visits: list[int] = []
        self.called: set[int] = set()  # ids of the outside units' modules, by use
        self.plain = True
        self.chained = True  # each block was handed the output of the one before
        self.calls: list[tuple[tuple, dict]] = []  # the blocks' arguments, by visit
        self.problem: str | None = None
        self._cut, self._fill, self._last_visit = cut, fill, last_visit
        self._previous: Any = None  # the last block's output

    def on_block(self, unit: Unit, inner, args, kwargs):
        self._check_arguments(unit, args, kwargs)
        before, handed = _array_ids(unit.module), _leaf_ids(args, kwargs)
        try:
            output = inner(*args, **kwargs)
        except Exception as e:
            self.problem = self.problem or f"{unit.name} fails on placeholder weights: {e}"
            raise
        if _array_ids(unit.module) != before:
            self.problem = self.problem or (
                f"{unit.name} keeps arrays on itself between calls, which would carry gradients past the seam"
            )
        if _leaf_ids(args, kwargs) != handed:
            self.problem = self.problem or f"{unit.name} writes into a container it is handed"
        leaves = [leaf for _, leaf in tree_flatten({"out": output}) if isinstance(leaf, mx.array)]
        first = args[0] if args else None
        if not (isinstance(output, mx.array) and isinstance(first, mx.array) and output.shape == first.shape):
            self.plain = False
        if not leaves:
            self.problem = self.problem or f"{unit.name} returns no array"
        is_last = self._last_visit is not None and len(self.visits) == self._last_visit
        self.chained = self.chained and (not self.visits or first is self._previous)
        self.visits.append(unit.index)
        self.calls.append((args, kwargs))
        self._previous = _dummies(output, 0.5 if is_last else self._fill)
        return self._previous

    def on_rows(self, unit: Unit, inner, args, kwargs):
        self.called.add((id(unit.module), Use.ROWS))
        return _dummies(inner(*args, **kwargs), self._fill)

    def on_matmul(self, unit: Unit, inner, args, kwargs):
        self.called.add((id(unit.module), Use.MATMUL))
        output = inner(*args, **kwargs)
        return mx.broadcast_to(args[0].astype(mx.float32).sum(-1, keepdims=True), output.shape).astype(output.dtype)

    def _check_arguments(self, unit: Unit, args, kwargs) -> None:
        for _, leaf in tree_flatten({"args": list(args), "kwargs": kwargs}):
            if leaf is None or isinstance(leaf, (mx.array, bool, int, float, str, mx.Dtype)):
                continue
            self.problem = self.problem or (
                f"{unit.name} is handed a {type(leaf).__name__}, through which values (and their gradients) would "
                "pass around the seam"
            )


def probe(model: nn.Module, cut: Cut, run: Callable[[Probe], mx.array], make_resident: Callable[[list[Param]], None]):
    """Fill in what `Cut` says about the model's own `__call__`, and refuse what cannot be streamed.

    Args:
        run: calls the model on a few tokens with its units answered by the probe, and returns the logits.
        make_resident: brings parameters into memory for good, where their module is used in a way no seam sees.
    Raises:
        ModelError: a side channel between blocks, or weights used outside the calls that can be intercepted.
    """
    first = Probe(cut, 0.25)
    try:
        logits = run(first)
    except Exception as e:
        raise ModelError(_refusal(model, first.problem or str(e))) from None
    if first.problem:
        raise ModelError(_refusal(model, first.problem))
    if not first.visits:
        raise ModelError(_refusal(model, "its own call never reaches its layers"))

    unused = [
        unit for use, units in cut.outside.items() for unit in units if (id(unit.module), use) not in first.called
    ]
    for param in cut.resident:
        if mx.isnan(param.placeholder).any().item():
            raise ModelError(f"{param.source.extents[0].file}: {param.name} holds NaN. Download the model again")
    if mx.isnan(logits).any().item():  # some weight is used other than by calling its layer: keep those in memory
        make_resident([p for unit in unused for p in unit.params])
        for units in cut.outside.values():
            units[:] = [unit for unit in units if unit not in unused]
        first = Probe(cut, 0.25)
        logits = run(first)
        if mx.isnan(logits).any().item():
            raise ModelError(_refusal(model, "it uses weights of its layers other than by calling them"))

    cut.head = [unit for unit in cut.outside[Use.MATMUL] if (id(unit.module), Use.MATMUL) in first.called]
    cut.order = first.visits
    cut.plain_blocks = first.plain
    hidden = first.calls[0][0][0] if first.plain else None
    cut.hidden_nbytes = hidden.nbytes // (hidden.shape[0] * hidden.shape[1]) if first.plain else 0
    last = len(first.visits) - 1
    probes = [Probe(cut, fill, last_visit=last) for fill in (0.25, 0.75)]
    cut.head_is_separable = mx.array_equal(*(run(probe) for probe in probes)).item()
    cut.is_chain = cut.head_is_separable and first.plain and first.chained and _same_side_inputs(*probes)


def _same_side_inputs(a: Probe, b: Probe) -> bool:
    """Whether what blocks were handed besides the hidden state was the same for different outputs of blocks."""
    for (args, kwargs), (other_args, other_kwargs) in zip(a.calls, b.calls):
        mine, theirs = tree_flatten([list(args[1:]), kwargs]), tree_flatten([list(other_args[1:]), other_kwargs])
        for (path, leaf), (other_path, other) in zip(mine, theirs, strict=True):
            arrays = isinstance(leaf, mx.array), isinstance(other, mx.array)
            if path != other_path or arrays[0] != arrays[1]:
                return False
            if not (mx.array_equal(leaf, other).item() if all(arrays) else leaf == other):
                return False
    return True


def _refusal(model: nn.Module, reason: str) -> str:
    name = type(model).__name__
    kind = getattr(model, "model_type", None) or type(model).__module__.rsplit(".", 1)[-1]
    return f"{kind} ({name.removeprefix('Streamed')}) cannot be streamed: {reason.splitlines()[0]}"


def _dummies(tree, fill: float):
    return tree_map(
        lambda a: mx.full(a.shape, fill if a.dtype in FLOATS else 0, a.dtype) if isinstance(a, mx.array) else a, tree
    )


# --- Arrays in modules ------------------------------------------------------------------------------


def _containers(module: nn.Module):
    """Every module, dict and list in `module`, itself included: whatever can own a parameter."""
    stack = [module]
    while stack:
        node = stack.pop()
        yield node
        children = node.values() if isinstance(node, dict) else node
        stack.extend(child for child in children if isinstance(child, (dict, list, tuple)))


def array_entries(module: nn.Module):
    """(owner, key, array) of every array in `module`, private ones (`_freqs`) included."""
    for owner in _containers(module):
        for key, value in owner.items() if isinstance(owner, dict) else enumerate(owner):
            if isinstance(value, mx.array):
                yield owner, key, value


def _constants(module: nn.Module, params: list[Param]):
    from_files = {(id(p.owner), p.key) for p in params}
    constants = [entry for entry in array_entries(module) if (id(entry[0]), entry[1]) not in from_files]
    mx.eval([array for _, _, array in constants])  # an unevaluated array cannot cross to the compute thread
    return constants


def _leaf_ids(args, kwargs) -> list[tuple[str, int]]:
    return [(path, id(leaf)) for path, leaf in tree_flatten({"args": list(args), "kwargs": kwargs})]


def _array_ids(module: nn.Module) -> dict:
    return {(id(owner), key): id(array) for owner, key, array in array_entries(module)}


def trainable_entries(module: nn.Module) -> list[tuple[str, Any, Any]]:
    """(name, owner, key) of the trainable parameters of `module`, in the order of its parameter tree."""
    return [(name, *locate(module, name)) for name, _ in tree_flatten(module.trainable_parameters())]
