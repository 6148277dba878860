"""Where a model is cut: its blocks, its embedding tables, its large layers outside the blocks.

Comes in: a model without weights. Goes out: a `CutModel`: units whose weights can come and go, each intercepted
so that calling it reaches a handler, and what the model's own `__call__` does with them, found by running
it on dummy values. A model that cannot be cut is refused here with its reason. Never reads weights.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from ..errors import ModelError, SlowftError
from ..weights.sources import Param, locate
from .calls import Arguments, is_state_object

FLOATS = (mx.float32, mx.float16, mx.bfloat16)


@dataclass(eq=False)
class Unit:
    """A module whose weights come and go together.

    Attributes:
        params: its parameters that lie in files.
        constants: (owner, key, array) of arrays mlx-lm made itself, such as RoPE tables: always in memory.
        scratch: (id of the owner, key) of what the module's call puts on itself: made of its weights alone, every time
            anew, so it goes when the weights do.
    """

    name: str
    index: int
    module: nn.Module
    params: list[Param]
    constants: list[tuple[Any, Any, mx.array]] = field(default_factory=list)
    scratch: set[tuple[int, Any]] = field(default_factory=set)

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

    def call(self, inner: Callable, *args, **kwargs) -> Any:
        """`inner`, the module's own method, on these arguments; the module is left as it was.

        Raises:
            SlowftError: it kept arrays that it did not keep when the model was opened.
        """
        before = Arrays(self.module)
        output = inner(*args, **kwargs)
        written = before.restore()
        new = {(id(owner), key) for owner, key, _ in written} - self.scratch
        if new - {(id(p.owner), p.key) for p in self.params}:  # (weights may be brought within the call)
            raise SlowftError(f"{self.name} keeps arrays on itself between calls, which cannot be streamed")
        return output


def inner_call(unit: Unit) -> Callable:
    """The block's own method, past the seam."""
    return partial(unit.call, super(type(unit.module), unit.module).__call__)


class Use(Enum):
    """How a unit outside the blocks is called."""

    ROWS = "embedding look-up"
    MATMUL = "large linear layer, or an embedding used as the head"


@dataclass
class CutModel:
    """A model taken apart.

    Attributes:
        blocks: in the order of `model.layers`; what is in them and called, if the model's call goes past them.
        outside: large layers outside the blocks, by use: looked up by row, or multiplied with.
        head: those of the outside layers that the model's call multiplies with.
        resident: every other parameter: norms, biases. Always in memory.
        order: indices of `blocks` in the order in which a forward pass visits them.
        head_is_separable: what follows the last block depends on that block's output alone, so it can be
            computed by itself.
        plain_blocks: each block takes an array first, nearly always `[B, T, D]`, and returns one of the same shape.
        is_chain: besides, each block's first argument is the very output of the one before, and nothing else in the
            model sees that output: then the values between blocks need not go through the model's own call.
        state_objects: classes of the objects that the model makes and hands to its blocks to carry values between them.
        keeps_arrays: the model's call puts arrays on modules outside the blocks.
        hidden_shape: of what the first block is handed, for two rows of five tokens, if the blocks are plain.
        hidden_nbytes: of what any of them is handed, per token.
        vocab_size: logits of a token.
    """

    blocks: list[Unit]
    outside: dict[Use, list[Unit]]
    resident: list[Param]
    head: list[Unit] = field(default_factory=list)
    order: list[int] = field(default_factory=list)
    head_is_separable: bool = False
    plain_blocks: bool = False
    is_chain: bool = False
    state_objects: set[type] = field(default_factory=set)
    keeps_arrays: bool = False
    hidden_shape: tuple[int, ...] = ()
    hidden_nbytes: int = 0
    vocab_size: int = 0

    @property
    def files(self) -> list[str]:
        """All files that weights come from, sorted."""
        units = [*(unit for outside in self.outside.values() for unit in outside), *self.blocks]
        params = [*(param for unit in units for param in unit.params), *self.resident]
        return sorted({extent.file for param in params for extent in param.source.extents})


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


def find_units(model: nn.Module, params: list[Param]) -> CutModel:
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

    if not _reaches(model, layers):
        layers = _called_inside(model, layers)
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
    return CutModel(blocks, outside, resident)


TOKENS = [[0, 1, 2, 3, 0], [1, 0, 3, 2, 1]]  # what a model is tried on


class _Reached(Exception):
    pass


def _reaches(model: nn.Module, layers: list[nn.Module]) -> bool:
    """Whether the model's call calls one of its layers, or fails on the way."""

    def on_call(*_):
        raise _Reached

    with _intercepted(layers, on_call):
        try:
            model(mx.array(TOKENS))
        except Exception:
            return True
    return False


def _called_inside(model: nn.Module, layers: list[nn.Module]) -> list[nn.Module]:
    """The outermost modules with matrices within the layers that the model's call reaches (as in iquestloopcoder)."""
    called: dict[int, nn.Module] = {}
    depth = 0

    def on_call(module, inner, args, kwargs):
        nonlocal depth
        if depth == 0 and any(array.ndim > 1 for _, array in tree_flatten(module.parameters())):
            called[id(module)] = module
        depth += 1
        try:
            return inner(*args, **kwargs)
        finally:
            depth -= 1

    with _intercepted([m for layer in layers for m in layer.modules() if m is not layer], on_call):
        model(mx.array(TOKENS))
    return list(called.values()) or layers


@contextmanager
def _intercepted(modules: list[nn.Module], handler: Handler) -> Iterator[None]:
    """While this is entered, calls of the modules go to the handler."""
    classes = [type(module) for module in modules]
    for module in modules:
        if callable(module):
            intercept(module, "__call__", module, handler)
    try:
        yield
    finally:
        for module, cls in zip(modules, classes):
            module.__class__ = cls


def install(cut: CutModel, on_block: Handler, on_rows: Handler, on_matmul: Handler) -> None:
    """Intercept every unit's calls."""

    def on_guarded_block(unit: Unit, inner: Callable, args: tuple, kwargs: dict) -> Any:
        return on_block(unit, partial(unit.call, inner), args, kwargs)

    for unit in cut.blocks:
        intercept(unit.module, "__call__", unit, on_guarded_block)
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

    def __init__(self, cut: CutModel, fill: float, last_visit: int | None = None):
        self.visits: list[int] = []
        self.called: set[int] = set()  # ids of the outside units' modules, by use
        self.plain = True
        self.chained = True  # each block was handed the output of the one before
        self.calls: list[Arguments] = []  # the blocks' arguments, by visit
        self.first: list[Any] = []  # the first positional argument of each, or None
        self.problem: str | None = None
        self.state_objects: set[type] = set()
        self._cut, self._fill, self._last_visit = cut, fill, last_visit
        self._previous: Any = None  # the last block's output
        self._handed: list[tuple[Unit, mx.array, mx.array]] = []  # arrays in arguments, before and after the call

    def on_block(self, unit: Unit, inner: partial, args, kwargs):
        (inner,) = inner.args  # past the guard: what it would refuse is looked into here
        while self._notes_objects(unit, Arguments(args, kwargs, self.state_objects).objects):
            pass  # what they hold, in its turn
        arguments = Arguments(args, kwargs, self.state_objects)
        handed = [mx.array(array) for array in arguments.arrays]
        before = Arrays(unit.module)
        try:
            outcome = arguments.call(inner, arguments.arrays)
            while self._notes_objects(unit, outcome.objects):
                before.restore()
                arguments = Arguments(args, kwargs, self.state_objects)
                outcome = arguments.call(inner, arguments.arrays)
        except Exception as e:
            self.problem = self.problem or f"{unit.name} fails on placeholder weights: {e}"
            raise
        self._handed += [(unit, was, mx.array(array)) for was, array in zip(handed, arguments.arrays)]
        written = before.restore()
        if written and not _is_of_weights_alone(unit, inner, arguments):
            self.problem = self.problem or (
                f"{unit.name} keeps arrays on itself between calls, which would carry gradients past the seam"
            )
        unit.scratch |= {(id(owner), key) for owner, key, _ in written}
        first = args[0] if args else None
        result = arguments.take_over(outcome, outcome.arrays)
        if not outcome.arrays:
            self.problem = self.problem or f"{unit.name} returns no array"
        is_array = isinstance(result, mx.array) and isinstance(first, mx.array)
        if not is_array or result.shape != first.shape or arguments.has_containers:
            self.plain = False
        is_last = self._last_visit is not None and len(self.visits) == self._last_visit
        self.chained = self.chained and (not self.visits or first is self._previous)
        self.visits.append(unit.index)
        self.calls.append(arguments)
        self.first.append(first)
        handed_on, returned = {i for i, _ in outcome.handed_on}, outcome.returned()
        fills = [0.5 if is_last and i in returned else self._fill for i in range(len(outcome.arrays))]
        dummies = [
            array if i in handed_on else _dummies(array, fill)
            for i, (array, fill) in enumerate(zip(outcome.arrays, fills))
        ]
        self._previous = arguments.take_over(outcome, dummies)
        return self._previous

    def on_rows(self, unit: Unit, inner, args, kwargs):
        self.called.add((id(unit.module), Use.ROWS))
        return _dummies(inner(*args, **kwargs), self._fill)

    def on_matmul(self, unit: Unit, inner, args, kwargs):
        self.called.add((id(unit.module), Use.MATMUL))
        output = inner(*args, **kwargs)
        return mx.broadcast_to(args[0].astype(mx.float32).sum(-1, keepdims=True), output.shape).astype(output.dtype)

    def _notes_objects(self, unit: Unit, objects: list[Any]) -> bool:
        """Whether some are state objects of which nothing was known; an object of any other kind is a problem."""
        new = {type(leaf) for leaf in objects if is_state_object(leaf)} - self.state_objects
        self.state_objects |= new
        for leaf in objects:
            if not is_state_object(leaf):
                self.problem = self.problem or (
                    f"{unit.name} is handed or returns a {type(leaf).__name__}, through which values (and their "
                    "gradients) would pass around the seam"
                )
        return bool(new)

    def check_arrays(self) -> None:
        """Notice arrays that a block was handed and wrote into, which it would do to a copy."""
        same = [mx.array_equal(now, was, equal_nan=was.dtype in FLOATS) for _, was, now in self._handed]
        mx.eval(same)
        for (unit, _, _), is_same in zip(self._handed, same):
            if not is_same.item():
                self.problem = self.problem or f"{unit.name} writes into an array that it is handed"


def probe(
    model: nn.Module, cut: CutModel, run_part: Callable[[Probe], mx.array], make_resident: Callable[[list[Param]], None]
):
    """Fill in what `CutModel` says about the model's own `__call__`, and refuse what cannot be streamed.

    Args:
        run_part: calls the model on a few tokens with its units answered by the probe, and returns the logits.
        make_resident: brings parameters into memory for good, where their module is used in a way no seam sees.
    Raises:
        ModelError: a side channel between blocks, or weights used outside the calls that can be intercepted.
    """
    before = Arrays(model)

    def run(part: Probe) -> mx.array:
        try:
            return run_part(part)
        finally:
            cut.keeps_arrays |= bool(before.restore())  # what was made of placeholders may not stay

    first = Probe(cut, 0.25)
    try:
        logits = run(first)
        first.check_arrays()
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
        before = Arrays(model)
        for units in cut.outside.values():
            units[:] = [unit for unit in units if unit not in unused]
        first = Probe(cut, 0.25)
        logits = run(first)
        if mx.isnan(logits).any().item():
            raise ModelError(_refusal(model, "it uses weights of its layers other than by calling them"))

    cut.head = [unit for unit in cut.outside[Use.MATMUL] if (id(unit.module), Use.MATMUL) in first.called]
    cut.order, cut.state_objects = first.visits, first.state_objects
    cut.plain_blocks = first.plain
    cut.vocab_size = logits.shape[-1]
    if first.plain:
        hidden = first.first[0]
        cut.hidden_shape = hidden.shape
        largest = max(array.nbytes for array in first.first)  # an embedding may be in fewer bits than what follows
        cut.hidden_nbytes = largest * cut.vocab_size // logits.size
    last = len(first.visits) - 1
    probes = [Probe(cut, fill, last_visit=last) for fill in (0.25, 0.75)]
    cut.head_is_separable = mx.array_equal(*(run(probe) for probe in probes)).item()
    cut.is_chain = cut.head_is_separable and first.plain and first.chained and _same_side_inputs(*probes)


def _same_side_inputs(a: Probe, b: Probe) -> bool:
    """Whether what blocks were handed besides the hidden state was the same for different outputs of blocks."""
    for mine, theirs in zip(a.calls, b.calls):
        if mine.signature() != theirs.signature():
            return False
        if not all(mx.array_equal(x, y).item() for x, y in zip(mine.arrays[1:], theirs.arrays[1:])):
            return False
    return True


def _is_of_weights_alone(unit: Unit, inner: Callable, arguments: Arguments) -> bool:
    """Whether what the block's call puts on itself depends on its weights alone, and would be the same the next time.

    Then it may be forgotten between calls. Tried on random weights, lazily: only what it is made of is computed.
    """

    def randoms(arrays: list[mx.array], seed: int) -> list[mx.array]:
        keys = mx.random.split(mx.random.key(seed), len(arrays) + 1)
        return [mx.random.normal(a.shape, a.dtype, key=k) if a.dtype in FLOATS else a for a, k in zip(arrays, keys)]

    def written(inputs: list[mx.array]) -> dict:
        before = Arrays(unit.module)
        arguments.call(inner, inputs)
        return {(id(owner), key): array for owner, key, array in before.changes()}

    everything = Arrays(unit.module)
    weights = randoms([param.placeholder for param in unit.params], 0)
    results = []
    try:
        for seeds in ((1, 1), (2,)):
            for param, weight in zip(unit.params, weights):
                param.set(weight)
            results += [written(randoms(arguments.arrays, seed)) for seed in seeds]
            everything.restore()
    finally:
        everything.restore()
    first, again, other = results  # `again` is on top of what the first call left
    return first.keys() == other.keys() and all(
        mx.array_equal(first[place], array).item() for result in (again, other) for place, array in result.items()
    )


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


class Arrays:
    """The arrays on a module, and on the plain objects it holds, at one moment."""

    def __init__(self, module: nn.Module):
        self._module, self._modules = module, module.modules()
        self._arrays = {(id(owner), key): (owner, array) for owner, key, array in self._entries()}
        # where a module may put an array later
        self._nones = {(id(m), key) for m in self._modules for key, value in vars(m).items() if value is None}

    def _entries(self):
        yield from array_entries(self._module)
        for module in self._modules:
            for value in vars(module).values():
                if is_state_object(value):
                    yield from ((vars(value), key, a) for key, a in vars(value).items() if isinstance(a, mx.array))

    def changes(self) -> list[tuple[Any, Any, mx.array]]:
        """(owner, key, array) of those that are new since then."""
        old = self._arrays
        return [
            (owner, key, array)
            for owner, key, array in self._entries()
            if (id(owner), key) not in old or old[id(owner), key][1] is not array
        ]

    def restore(self) -> list[tuple[Any, Any, mx.array]]:
        """Put back what was there then; returns what was there instead."""
        changes = self.changes()
        for owner, key, _ in changes:
            if (id(owner), key) in self._arrays:
                owner[key] = self._arrays[id(owner), key][1]
            elif (id(owner), key) in self._nones:
                setattr(owner, key, None)
            elif isinstance(owner, dict):
                del owner[key]
        return changes


def trainable_entries(module: nn.Module) -> list[tuple[str, Any, Any]]:
    """(name, owner, key) of the trainable parameters of `module`, in the order of its parameter tree."""
    return [(name, *locate(module, name)) for name, _ in tree_flatten(module.trainable_parameters())]
