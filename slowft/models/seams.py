"""Where a model is cut: its blocks, its embedding tables, its large layers outside the blocks.

Comes in: a model without weights. Goes out: a `CutModel`. It has the units whose weights can come and go; a call of
a unit reaches a handler. It also says what the model's own `__call__` does with the units, which is found by running
that call on dummy values. A model that cannot be cut is refused here with its reason. This room never reads weights.
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
from .calls import Arguments, Outcome, is_state_object

FLOATS = (mx.float32, mx.float16, mx.bfloat16)


@dataclass(eq=False)
class Unit:
    """A module whose weights come and go together.

    Attributes:
        params: its parameters that lie in files.
        constants: (owner, key, array) of arrays that mlx-lm made itself, such as RoPE tables: always in memory.
        scratch: (id of the owner, key) of arrays that the module's call puts on the module. Each call makes them anew,
            from the weights alone, so they are removed together with the weights.
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
        base = {(id(p.owner), p.key) for p in self.params} | {(id(owner), key) for owner, key, _ in self.constants}
        return [(owner, key) for owner, key, _ in array_entries(self.module) if (id(owner), key) not in base]

    def trainable(self) -> list[tuple[str, Any, Any]]:
        """(name, owner, key) of the unit's trainable parameters, in a fixed order."""
        return trainable_entries(self.module)

    def restore_constants(self) -> None:
        for owner, key, array in self.constants:
            owner[key] = array

    def call(self, inner: Callable, *args, **kwargs) -> Any:
        """Call `inner`, the module's own method, and leave the module as it was before.

        Raises:
            SlowftError: the call kept arrays on the module that it did not keep when the model was opened.
        """
        before = Arrays(self.module)
        output = inner(*args, **kwargs)
        written = before.restore()
        new = {(id(owner), key) for owner, key, _ in written} - self.scratch
        if new - {(id(p.owner), p.key) for p in self.params}:  # weights may have been put in place within the call
            raise SlowftError(f"{self.name} keeps arrays on itself between calls, which cannot be streamed")
        return output


def inner_call(unit: Unit) -> Callable:
    """The block's own `__call__`, which does not go through the handler."""
    return partial(unit.call, super(type(unit.module), unit.module).__call__)


class Use(Enum):
    """How a unit outside the blocks is called."""

    ROWS = "embedding look-up"
    MATMUL = "large linear layer, or an embedding used as the head"


@dataclass
class CutModel:
    """A model and where it is cut.

    Attributes:
        blocks: the blocks, in the order of `model.layers`. If the model's call goes past its layers, the blocks are the
            modules within the layers that it does call.
        outside: large layers outside the blocks, by use: looked up by row, or multiplied with.
        head: those of the outside layers that the model's call multiplies with.
        resident: every other parameter, such as norms and biases. These are always in memory.
        order: indices of `blocks` in the order in which a forward pass calls them.
        head_is_separable: what follows the last block depends on that block's output alone, so it can be
            computed by itself.
        plain_blocks: each block takes an array first, nearly always `[B, T, D]`, and returns one of the same shape.
        is_chain: the blocks are plain, each block's first argument is the very output of the one before, and nothing
            else in the model sees that output. Then the values between blocks need not go through the model's own call.
        state_objects: classes of the objects that the model makes and hands to its blocks to carry values between them.
        keeps_arrays: the model's call puts arrays on modules outside the blocks.
        hidden_shape: shape of the first block's input, for two rows of five tokens. Empty if the blocks are not plain.
        hidden_nbytes: bytes per token of the largest input of a block. 0 if the blocks are not plain.
        vocab_size: number of logits per token.
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
    """Send calls of `module.method` to `handler` (see `Handler`) together with `unit`.

    The module gets a subclass of its class with the same name. Nothing else about it changes.
    """
    cls = type(module)
    inner = getattr(cls, method)

    def call(self, *args, **kwargs):
        return handler(unit, inner.__get__(self), args, kwargs)

    module.__class__ = type(cls.__name__, (cls,), {method: call, "__module__": cls.__module__, "__doc__": cls.__doc__})


def find_units(model: nn.Module, params: list[Param]) -> CutModel:
    """Sort the parameters into blocks, large layers outside the blocks, and the resident rest.

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


TOKENS = [[0, 1, 2, 3, 0], [1, 0, 3, 2, 1]]  # token ids that a model is tried on


class _Reached(Exception):
    pass


def _reaches(model: nn.Module, layers: list[nn.Module]) -> bool:
    """Whether the model's call calls one of its layers. A call that fails before it gets there counts as yes."""

    def on_call(*_):
        raise _Reached

    with _intercepted(layers, on_call):
        try:
            model(mx.array(TOKENS))
        except Exception:
            return True
    return False


def _called_inside(model: nn.Module, layers: list[nn.Module]) -> list[nn.Module]:
    """The outermost modules with matrices, within the layers, that the model's call calls (as in iquestloopcoder)."""
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
    """Within this context, calls of the modules go to the handler."""
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
    """Answers every unit's call with dummy values of the right shapes, and records the calls.

    The units' real methods are called for their output shapes only: MLX infers shapes without evaluating.

    Args:
        fill: the floating-point dummy values are this number.
        last_visit: the place in `visits` of the last block, whose output is 0.5 whatever `fill` is.

    Attributes:
        visits: indices of the blocks that were called, in order.
        called: (id of the module, use) of the units outside the blocks that were called.
        plain: see `CutModel.plain_blocks`.
        chained: each block was handed the output of the one before.
        calls: the arguments of each block's call.
        first: the first positional argument of each block's call, or None.
        problem: the first reason found why the model cannot be streamed, if there is one.
        state_objects: see `CutModel.state_objects`.
    """

    def __init__(self, fill: float, last_visit: int | None = None):
        self.visits: list[int] = []
        self.called: set[tuple[int, Use]] = set()
        self.plain = True
        self.chained = True
        self.calls: list[Arguments] = []
        self.first: list[Any] = []
        self.problem: str | None = None
        self.state_objects: set[type] = set()
        self._fill, self._last_visit = fill, last_visit
        self._previous: Any = None  # the last block's output
        self._inputs: list[tuple[Unit, mx.array, mx.array]] = []  # arrays in arguments, before and after the call

    def on_block(self, unit: Unit, inner: partial, args, kwargs):
        (inner,) = inner.args  # without `Unit.call`, because what that refuses is examined here
        arguments, outcome = self._call(unit, inner, args, kwargs)
        first = args[0] if args else None
        result = arguments.take_over(outcome, outcome.arrays)
        if not outcome.arrays:
            self.problem = self.problem or f"{unit.name} returns no array"
        is_array = isinstance(result, mx.array) and isinstance(first, mx.array)
        if not is_array or result.shape != first.shape or arguments.has_containers:
            self.plain = False
        is_last = len(self.visits) == self._last_visit
        self.chained = self.chained and (not self.visits or first is self._previous)
        self.visits.append(unit.index)
        self.calls.append(arguments)
        self.first.append(first)
        handed_on, returned = {i for i, _ in outcome.handed_on}, outcome.returned()
        dummies = [
            array if i in handed_on else _dummies(array, 0.5 if is_last and i in returned else self._fill)
            for i, array in enumerate(outcome.arrays)
        ]
        self._previous = arguments.take_over(outcome, dummies)
        return self._previous

    def _call(self, unit: Unit, inner: Callable, args: tuple, kwargs: dict) -> tuple[Arguments, Outcome]:
        """Call a block for its output shapes, and examine which objects it is handed and which arrays it writes."""
        while self._adds_state_objects(unit, Arguments(args, kwargs, self.state_objects).objects):
            pass  # a new state object may hold others
        arguments = Arguments(args, kwargs, self.state_objects)
        inputs = [mx.array(array) for array in arguments.arrays]
        before = Arrays(unit.module)
        try:
            outcome = arguments.call(inner, arguments.arrays)
            while self._adds_state_objects(unit, outcome.objects):
                before.restore()
                arguments = Arguments(args, kwargs, self.state_objects)
                outcome = arguments.call(inner, arguments.arrays)
        except Exception as e:
            self.problem = self.problem or f"{unit.name} fails on placeholder weights: {e}"
            raise
        self._inputs += [(unit, was, mx.array(array)) for was, array in zip(inputs, arguments.arrays)]
        written = before.restore()
        if written and not _depends_on_weights_alone(unit, inner, arguments):
            self.problem = self.problem or (
                f"{unit.name} keeps arrays on itself between calls, which would carry gradients past the seam"
            )
        unit.scratch |= {(id(owner), key) for owner, key, _ in written}
        return arguments, outcome

    def on_rows(self, unit: Unit, inner, args, kwargs):
        self.called.add((id(unit.module), Use.ROWS))
        return _dummies(inner(*args, **kwargs), self._fill)

    def on_matmul(self, unit: Unit, inner, args, kwargs):
        self.called.add((id(unit.module), Use.MATMUL))
        output = inner(*args, **kwargs)
        return mx.broadcast_to(args[0].astype(mx.float32).sum(-1, keepdims=True), output.shape).astype(output.dtype)

    def _adds_state_objects(self, unit: Unit, objects: list[Any]) -> bool:
        """Whether `objects` include state objects of new classes, which are noted. Any other object is a problem."""
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
        """Make it a problem if a block wrote into an array that it was handed: streamed, it would write into a copy."""
        same = [mx.array_equal(now, was, equal_nan=was.dtype in FLOATS) for _, was, now in self._inputs]
        mx.eval(same)
        for (unit, _, _), is_same in zip(self._inputs, same):
            if not is_same.item():
                self.problem = self.problem or f"{unit.name} writes into an array that it is handed"


def probe(
    model: nn.Module, cut: CutModel, run_part: Callable[[Probe], mx.array], make_resident: Callable[[list[Param]], None]
):
    """Fill in what `CutModel` says about the model's own `__call__`, and refuse what cannot be streamed.

    Args:
        run_part: calls the model on a few tokens, lets the probe answer the units' calls, and returns the logits.
        make_resident: reads parameters into memory for good. It is called for modules that the model uses other than
            by calling them.
    Raises:
        ModelError: a side channel between blocks, or weights used outside the calls that can be intercepted.
    """
    before = Arrays(model)

    def run(part: Probe) -> mx.array:
        try:
            return run_part(part)
        finally:
            cut.keeps_arrays |= bool(before.restore())  # arrays made of placeholders must not stay

    first = Probe(0.25)
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
    if mx.isnan(logits).any().item():  # the model uses some weight without calling its layer: keep that in memory
        make_resident([p for unit in unused for p in unit.params])
        before = Arrays(model)
        for units in cut.outside.values():
            units[:] = [unit for unit in units if unit not in unused]
        first = Probe(0.25)
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
        largest = max(array.nbytes for array in first.first)  # an embedding may have a smaller dtype than the others
        cut.hidden_nbytes = largest * cut.vocab_size // logits.size
    last = len(first.visits) - 1
    probes = [Probe(fill, last_visit=last) for fill in (0.25, 0.75)]
    cut.head_is_separable = mx.array_equal(*(run(probe) for probe in probes)).item()
    cut.is_chain = cut.head_is_separable and first.plain and first.chained and _same_side_inputs(*probes)


def _same_side_inputs(a: Probe, b: Probe) -> bool:
    """Whether the blocks got the same arguments besides the hidden state, although the outputs of blocks differed."""
    for call_a, call_b in zip(a.calls, b.calls):
        if call_a.signature() != call_b.signature():
            return False
        if not all(mx.array_equal(x, y).item() for x, y in zip(call_a.arrays[1:], call_b.arrays[1:])):
            return False
    return True


def _depends_on_weights_alone(unit: Unit, inner: Callable, arguments: Arguments) -> bool:
    """Whether the arrays that the block's call puts on the block depend on its weights alone, and are always the same.

    Such arrays may be removed between calls. This is tried on random weights. MLX is lazy, so only what the arrays
    depend on is computed.
    """

    def randoms(arrays: list[mx.array], seed: int) -> list[mx.array]:
        keys = mx.random.split(mx.random.key(seed), len(arrays) + 1)
        return [mx.random.normal(a.shape, a.dtype, key=k) if a.dtype in FLOATS else a for a, k in zip(arrays, keys)]

    def written(inputs: list[mx.array]) -> dict:
        before_call = Arrays(unit.module)
        arguments.call(inner, inputs)
        return {(id(owner), key): array for owner, key, array in before_call.changes()}

    before = Arrays(unit.module)
    weights = randoms([param.placeholder for param in unit.params], 0)
    results = []
    try:
        for seeds in ((1, 1), (2,)):
            for param, weight in zip(unit.params, weights):
                param.set(weight)
            results += [written(randoms(arguments.arrays, seed)) for seed in seeds]
            before.restore()
    finally:
        before.restore()
    first, again, other = results  # `again` found on the block what the first call had left there
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
    """Everything in `module` that can own a parameter: each module, dict and list, `module` itself included."""
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
    """Remembers the arrays on a module, and on the plain objects that it holds, at the time this is made."""

    def __init__(self, module: nn.Module):
        self._module, self._modules = module, module.modules()
        self._arrays = {(id(owner), key): (owner, array) for owner, key, array in self._entries()}
        # attributes that are None: a call may put an array there
        self._nones = {(id(m), key) for m in self._modules for key, value in vars(m).items() if value is None}

    def _entries(self):
        yield from array_entries(self._module)
        for module in self._modules:
            for value in vars(module).values():
                if is_state_object(value):
                    yield from ((vars(value), key, a) for key, a in vars(value).items() if isinstance(a, mx.array))

    def changes(self) -> list[tuple[Any, Any, mx.array]]:
        """(owner, key, array) of the arrays that are new since then."""
        old = self._arrays
        return [
            (owner, key, array)
            for owner, key, array in self._entries()
            if (id(owner), key) not in old or old[id(owner), key][1] is not array
        ]

    def restore(self) -> list[tuple[Any, Any, mx.array]]:
        """Put back the arrays of that time. Returns (owner, key, array) of those that were new."""
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
