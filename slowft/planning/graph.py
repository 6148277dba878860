"""What an MLX computation will cost in memory, operations and bytes, without running it.

Comes in: a function and its arguments, of which only shapes and dtypes matter (placeholders will do). Goes
out: a `Cost`. Computes nothing, and leaves the random state as it was.

`mx.export_function` traces the function and lists its primitives with shapes, `mx.export_to_dot` gives the
graph as it was before the former merged equal subexpressions. MLX's order of evaluation is then rebuilt
(`eval_impl` in mlx/transforms.cpp) and its rules for who takes a new buffer, who reuses an input's and who
copies first (mlx/backend/common, mlx/backend/cpu) are replayed on shapes and strides. On a GPU the order is
the same and the rules are close; its fused primitives count by their outputs.
"""

import bisect
import functools
import gc
import io
import math
import mmap
import os
import re
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map

# mlx/utils.h: arrays that wait to be scheduled before the order goes depth first
MAX_WIDTH = int(os.environ.get("MLX_BFS_MAX_WIDTH", 20))
# mlx/transforms.cpp and backend/cpu/encoder.h: the thread that schedules is at most 10 tasks of 10 dispatches ahead
# of the one that computes. A buffer which something not yet computed reads is not donated.
DISPATCHES_AHEAD = 110
TIMES_OVER = 3  # after which no more buffers are made
DONATION_EXTRA_NBYTES = 16384  # mlx/backend/common/utils.h, is_donatable


class CostUnknown(ValueError):
    """The computation has a primitive that MLX cannot export, so that its graph cannot be seen."""


@dataclass(frozen=True)
class Cost:
    """What evaluating a computation takes.

    Attributes:
        peak_nbytes: the most bytes of buffers made by the computation in use at once, its outputs included;
            inputs of the function and arrays that it captured (weights) are not counted. It is what the
            process's resident memory rises by while MLX's buffer cache hands nothing back.
        output_nbytes: bytes of buffers that the outputs keep.
        reserved_nbytes: what it takes, done again and again, if MLX keeps every buffer that is freed: more than the
            peak, as it hands a buffer out again only for nearly its size.
        flops: floating point operations of matrix products, convolutions and fused attention; a multiply-add
            is two.
        allocated_nbytes: of all buffers made together, which is what is written to memory that is fresh from the
            operating system if MLX keeps no freed buffer.
        ops: (flops, bytes moved, function values, efficiency) of each operation but views, in order of evaluation.
            Function values are elements that an exponential or its like is taken of: on MLX's CPU backend 12 ns each
            (softmax, sigmoid). Efficiency is of a product: below 1 where its matrices are narrow.
        products: of each shape of matrix products (batches, rows, inner, columns, is the first transposed, the second):
            (flops, flops over efficiency) of all of them, by which a measured rate takes the place of an estimated one.
        gathered: what experts' products read where MLX multiplies row by row, each by its expert's matrix (CPU
            backend): (rows, columns, is transposed) of such a matrix -> bytes of matrices; not in `ops`.
    """

    peak_nbytes: int
    output_nbytes: int
    flops: int
    ops: tuple[tuple[int, int, int, float], ...] = field(repr=False)
    products: dict[tuple[int, int, int, int, bool, bool], tuple[int, float]] = field(default_factory=dict, repr=False)
    gathered: dict[tuple[int, int, bool], int] = field(default_factory=dict)
    allocated_nbytes: int = 0
    reserved_nbytes: int = 0

    @property
    def work(self) -> tuple[list, list, list]:
        """What `Machine.seconds` takes: operations, products, and what is gathered, also after a way through JSON."""
        return list(self.ops), list(self.products.items()), list(self.gathered.items())

    def lengthened(self, longer: "Cost", shorter: "Cost", times: int) -> "Cost":
        """This, and so many times what `longer` has beyond `shorter`."""
        added = tuple((Counter(longer.ops) - Counter(shorter.ops)).elements())
        products, gathered = dict(self.products), dict(self.gathered)
        for shape, (flops, effective) in longer.products.items():
            less, less_effective = shorter.products.get(shape, (0, 0.0))
            sums = products.get(shape, (0, 0.0))
            products[shape] = sums[0] + times * (flops - less), sums[1] + times * (effective - less_effective)
        for kind, nbytes in longer.gathered.items():
            gathered[kind] = gathered.get(kind, 0) + times * (nbytes - shorter.gathered.get(kind, 0))
        names = ("peak_nbytes", "output_nbytes", "flops", "allocated_nbytes")
        sizes = {n: getattr(self, n) + times * (getattr(longer, n) - getattr(shorter, n)) for n in names}
        reserved = sizes["peak_nbytes"] + self.reserved_nbytes - self.peak_nbytes  # what is added has the same sizes
        work = {"ops": self.ops + times * added, "products": products, "gathered": gathered}
        return Cost(**sizes, **work, reserved_nbytes=reserved)


def cost(function: Callable, *args, in_part: bool = False) -> Cost:
    """What `mx.eval(function(*args))` takes.

    Args:
        function: returns an array or a tree of arrays, in the order in which `mx.eval` would get them. May
            use `mx.vjp` and `mx.value_and_grad`; arrays it captures must be evaluated.
        args: arrays or trees with arrays in them. Their values are not looked at.
        in_part: leave out outputs that an `mx.custom_function` leads to, rather than look through it by `mx.vmap`,
            which sees twice what such a function and its vjp share.

    Raises:
        CostUnknown: MLX cannot export one of the primitives, such as a custom kernel.
    """
    with not_collecting():
        return _Evaluation(_graph(function, args, in_part)).run()


def costs_without(function: Callable, *args) -> list[Cost]:
    """What evaluating some arrays takes, and what it would if others on the way to them were there already.

    Args:
        function: returns (the arrays to evaluate, groups of others, each a list).
    Returns:
        The `Cost` of the former, then what it would be with each of the groups at hand, the peak excepted, which is
        that of all of it.
    """
    sizes: list[int] = []

    def flat(*arrays):
        results, groups = function(*arrays)
        sizes[:] = [len(_arrays(results)), *map(len, groups)]
        return [results, groups]

    with not_collecting():
        outputs = iter(_graph(flat, args, False))
        results, *groups = ([next(outputs) for _ in range(n)] for n in sizes)
        evaluation = _Evaluation(results)
        return [evaluation.run(), *map(evaluation.without, groups)]


@contextmanager
def not_collecting() -> Iterator[None]:
    """While this is entered, Python looks for no cycles among the many parts of graphs: that took half of the time."""
    is_collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if is_collecting:
            gc.enable()


@contextmanager
def keeping_random_state() -> Iterator[None]:
    """Dropout in what is only looked at leaves the random state as it was."""
    high, low = mx.random.state[0].tolist()
    try:
        yield
    finally:
        mx.random.seed(high << 32 | low)


@keeping_random_state()
def _graph(function: Callable, args: tuple, in_part: bool) -> "list[_Array]":
    """The outputs of the function."""
    try:
        return _trace(function, args, in_part)
    except _HasCustomFunction:
        try:
            return _trace(*_without_custom_functions(function, args))
        except (ValueError, RuntimeError) as of_vmap:
            if not isinstance(of_vmap, CostUnknown) and "vmap" not in str(of_vmap):
                raise
            return _trace(function, args, in_part=True)


def _arrays(tree) -> list[mx.array]:
    return [leaf for _, leaf in tree_flatten(tree) if isinstance(leaf, mx.array)]


def _without_custom_functions(function: Callable, args: tuple) -> tuple[Callable, tuple]:
    """The same over one row of a batch.

    The primitive that carries an `mx.custom_function`, a view of its result, cannot be exported. `mx.vmap` puts
    the function itself in its place. Not every primitive has a vmap, and no compiled piece is seen.
    """

    of_rows = mx.vmap(lambda *arrays: _arrays(function(*_with_arrays(args, arrays))))
    return of_rows, tuple(array[None] for array in _arrays(args))


def _with_arrays(tree, arrays):
    """The tree with other arrays in it."""
    replacements = iter(arrays)
    return tree_map(lambda leaf: next(replacements) if isinstance(leaf, mx.array) else leaf, tree)


# --- The graph ------------------------------------------------------------------------------------


class _Buffer:
    """Memory made by the computation."""

    __slots__ = ("nbytes", "arrays", "last_read")

    def __init__(self, nbytes: int):
        self.nbytes = nbytes
        self.arrays = 0  # how many arrays lie in it
        self.last_read = -DISPATCHES_AHEAD  # number of the dispatch that last read it


class _Array:
    """An `mx::array` without values: shape, strides, flags and buffer as in mlx/array.h; strides in elements."""

    __slots__ = ("shape", "size", "itemsize", "op", "uses", "buffer")
    __slots__ += ("strides", "row_contiguous", "col_contiguous", "contiguous", "data_size")

    def __init__(self, shape: tuple[int, ...], itemsize: int, op: "_Op | None" = None):
        self.shape = tuple(shape)
        self.itemsize = itemsize
        self.op = op  # None: there before the computation starts
        self.uses = 0  # references: operations not yet scheduled, and the caller
        self.buffer: _Buffer | None = None
        self.set_row_contiguous()

    @property
    def nbytes(self) -> int:
        return self.size * self.itemsize

    def set_row_contiguous(self) -> None:
        self.size, self.strides, self.col_contiguous = _row_layout(self.shape)
        self.row_contiguous = self.contiguous = True
        self.data_size = self.size

    def set_layout(self, other: "_Array") -> None:
        self.strides = other.strides
        self.row_contiguous, self.col_contiguous = other.row_contiguous, other.col_contiguous
        self.contiguous, self.data_size = other.contiguous, other.data_size


@dataclass(eq=False, slots=True)
class _Op:
    name: str
    arguments: list
    inputs: list[_Array]
    outputs: list[_Array]


class _HasCustomFunction(Exception):
    """The graph has results of an `mx.custom_function` in it."""


def _trace(function: Callable, args: tuple, in_part: bool = False) -> list[_Array]:
    """The outputs of the function as arrays of the graph that leads to them.

    Args:
        in_part: be content with those outputs that no `mx.custom_function` leads to.
    """
    # what runs outside a trace has compiled pieces in it, which a trace replaces by the operations they consist of
    outputs = _arrays(function(*args))
    outside, sizes = _Dot(_dot_of(outputs)), [(output.shape, output.itemsize) for output in outputs]
    unknown = _not_exportable.intersection(outside.names)
    while True:
        if "CustomTransforms" in unknown and not in_part:
            raise _HasCustomFunction
        hidden = outside.descendants(unknown)
        visible = [i for i in range(len(sizes)) if f"output_{i}" not in hidden]  # outputs whose graph MLX can export
        if not visible:
            raise CostUnknown(f"MLX cannot show a graph with {' and '.join(sorted(unknown))} in it")
        exported: list[dict] = []
        inside: list[str] = []

        def of_arrays(*arrays, visible=visible, inside=inside):
            outputs = _arrays(function(*_with_arrays(args, arrays)))
            inside.append(_dot_of(outputs))
            return [outputs[i] for i in visible]

        try:
            # other arrays than the caller's, because one that is captured as well cannot be exported
            mx.export_function(exported.append, of_arrays, *map(mx.stop_gradient, _arrays(args)))
            break
        except ValueError as e:
            found = _NOT_EXPORTABLE.match(str(e))
            if found is None or found[1] in unknown:
                raise  # the function's own
            unknown.add(found[1])
            _not_exportable.add(found[1])

    simplified = dict(zip(visible, _exported_outputs(exported)))
    arrays = _Unsimplified(outside, simplified, sizes).outputs()
    if arrays is None:
        arrays = _Unsimplified(_Dot(inside[0]), simplified, sizes).outputs()
    return list(simplified.values()) if arrays is None else arrays


def _dot_of(outputs: list[mx.array]) -> str:
    dot = io.StringIO()
    mx.export_to_dot(dot, **{f"output_{i}": output for i, output in enumerate(outputs)})
    return dot.getvalue()


_not_exportable: set[str] = set()  # primitives that MLX could not export before
_NOT_EXPORTABLE = re.compile(r"\[export_function\] Unable to \w+(?: state for)? primitive (\w+)")


def _exported_outputs(events: list[dict]) -> list[_Array]:
    arrays: dict[str, _Array] = {}
    outputs: list[str] = []
    for event in events:
        match event["type"]:
            case "inputs":
                arrays |= {name: _Array(shape, dtype.size) for name, shape, dtype in event["inputs"]}
            case "constants":
                arrays |= {name: _Array(array.shape, array.itemsize) for name, array in event["constants"]}
            case "outputs":
                outputs = [name for name, _, _ in event["outputs"]]
            case "primitive":
                inputs = [arrays[name] for name, _, _ in event["inputs"]]
                op = _Op(event["name"], event["arguments"], inputs, [])
                for name, shape, dtype in event["outputs"]:
                    arrays[name] = _Array(shape, dtype.size, op)
                    op.outputs.append(arrays[name])
                if op.name == "Transpose" and len(op.arguments[0]) != len(inputs[0].shape):
                    raise CostUnknown("MLX's vmap left shapes behind that do not fit (of a reshape)")
    return [arrays[name] for name in outputs]


class _Dot:
    """A graph as `mx.export_to_dot` writes it: names, no shapes.

    Operations are numbered in order of computation. (The file has the address of each one's primitive, but calls
    of a compiled function share theirs; each operation's lines stand together.)
    """

    # a primitive, one of its inputs, one of its outputs
    _LINE = re.compile(r'^(?:\{ \d+ \[label ="([^ "]*)|"(\w+)" -> \d+|\d+ -> "(\w+)")', re.MULTILINE)

    def __init__(self, text: str):
        self.names: list[str] = []
        self.inputs: list[list[str]] = []
        self.outputs: list[list[str]] = []
        self.producers: dict[str, int] = {}
        for primitive, used, made in self._LINE.findall(text):
            if used:
                self.inputs[-1].append(used)
            elif made:
                self.outputs[-1].append(made)
                self.producers[made] = len(self.names) - 1
            else:
                self.names.append(primitive)
                self.inputs.append([])
                self.outputs.append([])

    def descendants(self, primitives: set[str]) -> set[str]:
        """Arrays that come from any of these primitives."""
        found: set[str] = set()
        for number, name in enumerate(self.names):
            if name in primitives or not found.isdisjoint(self.inputs[number]):
                found.update(self.outputs[number])
        return found


class _Mismatch(Exception):
    """Two graphs that should be the same, up to simplification, are not."""


class _Unsimplified:
    """The graph that runs: the one of `dot`, with the shapes and arguments of the exported one.

    Exporting takes out no-ops and merges equal operations (`compile_simplify` in mlx/compile.cpp), which changes
    the order of evaluation and who else uses a buffer. Walking both graphs from their outputs in step finds for
    each operation the one it was merged into.

    Args:
        exported: what could be exported of the outputs, by their number.
        shapes: (shape, bytes per element) of all outputs.
    """

    _NO_OPS = ("Copy", "StopGradient")  # mlx/compile.cpp, is_noop
    _RESHAPING = ("Transpose", "Reshape", "Flatten", "Unflatten", "ExpandDims", "Squeeze", "Copy", "StopGradient")

    def __init__(self, dot: _Dot, exported: dict[int, _Array], shapes: list[tuple[tuple[int, ...], int]]):
        self._dot, self._exported, self._shapes = dot, exported, shapes
        self._arrays: dict[str, _Array] = {}

    def outputs(self) -> list[_Array] | None:
        """All outputs, in order; None if the graphs do not match."""
        root = _Op("root", [], [], [])
        waiting = [(root, f"output_{i}", array) for i, array in reversed(self._exported.items())]
        while waiting:
            consumer, name, counterpart = waiting.pop()
            if name not in self._arrays:
                try:
                    op, inputs = self._match(name, counterpart)
                except _Mismatch:
                    return None
                waiting.extend((op, *pair) for pair in reversed(inputs))
            consumer.inputs.append(self._arrays[name])
        for i in range(len(self._shapes)):
            if i not in self._exported:
                shape, itemsize = self._shapes[i]
                self._guess(f"output_{i}", math.prod(shape), itemsize)
        return [self._arrays[f"output_{i}"] for i in range(len(self._shapes))]

    def _match(self, name: str, counterpart: _Array) -> tuple["_Op | None", list[tuple[str, _Array]]]:
        """Make the operation that puts out `name`; returns it and (name, counterpart) of each of its inputs."""
        number = self._dot.producers.get(name)
        if number is None or (counterpart.op is None and self._dot.names[number] not in self._NO_OPS):
            if counterpart.op is not None:
                raise _Mismatch
            self._arrays[name] = counterpart
            return None, []
        inputs, outputs = self._dot.inputs[number], self._dot.outputs[number]
        if self._dot.names[number] in self._NO_OPS:
            op, likes, likes_of_inputs = _Op(self._dot.names[number], [], [], []), [counterpart], [counterpart]
        elif self._dot.names[number].startswith("Compiled"):
            if len(outputs) != 1:
                raise _Mismatch
            likes, likes_of_inputs = [counterpart], self._inputs_of_compiled(number, counterpart)
            op = _Op("Compiled", [self._dot.names[number]], [], [])
        else:
            op = _Op(counterpart.op.name, counterpart.op.arguments, [], [])
            likes, likes_of_inputs = counterpart.op.outputs, counterpart.op.inputs
        if len(likes) != len(outputs) or len(likes_of_inputs) != len(inputs):
            raise _Mismatch
        for output, like in zip(outputs, likes):
            self._arrays[output] = _Array(like.shape, like.itemsize, op)
            op.outputs.append(self._arrays[output])
        return op, list(zip(inputs, likes_of_inputs))

    def _inputs_of_compiled(self, number: int, output: _Array) -> list[_Array]:
        """What goes into the operations that `mx.compile` fused into one, in its order (compile_fuse).

        The name of the fused one strings together the names of its parts.
        """
        parts = Counter(_exported_name(part) for part in _FUSABLE.findall(self._dot.names[number]))
        del parts["Broadcast"]  # a trace for any shape has more of them
        names = self._dot.inputs[number]

        def search(waiting: list[_Array], parts: Counter, fused: list[_Op], inputs: list[_Array]):
            if not waiting:
                return inputs if len(inputs) == len(names) and parts.total() == 0 else None
            array, rest = waiting[-1], waiting[:-1]
            op = array.op
            if any(op is other for other in fused) or any(array is other for other in inputs):
                return search(rest, parts, fused, inputs)
            found = None
            if op is not None and (op.name == "Broadcast" or parts[op.name] > 0):
                left = parts if op.name == "Broadcast" else parts - Counter([op.name])
                found = search(rest + op.inputs[::-1], left, [*fused, op], inputs)
            if found is None and len(inputs) < len(names) and self._may_be(names[len(inputs)], array):
                found = search(rest, parts, fused, [*inputs, array])
            return found

        inputs = search([output], parts, [], [])
        if inputs is None:
            raise _Mismatch
        return inputs

    def _may_be(self, name: str, array: _Array) -> bool:
        number = self._dot.producers.get(name)
        while number is not None and self._dot.names[number] in self._NO_OPS:
            number = self._dot.producers.get(self._dot.inputs[number][0])
        if number is None or array.op is None:
            return number is None and array.op is None
        return (
            self._dot.names[number].startswith("Compiled") or _exported_name(self._dot.names[number]) == array.op.name
        )

    def _guess(self, name: str, size: int | None, itemsize: int) -> _Array:
        """An array that could not be exported, of which `size` elements are known, or as many as in its inputs.

        That is the gradient of an expert's adapter (SegmentedMM): an output, or on the way to one.
        """
        if name in self._arrays:
            return self._arrays[name]
        number = self._dot.producers.get(name)
        if number is None:
            self._arrays[name] = _Array((), itemsize)
            return self._arrays[name]
        reshaping = self._dot.names[number] in self._RESHAPING
        inputs = [self._guess(i, size if reshaping else None, itemsize) for i in self._dot.inputs[number]]
        op = _Op("Copy" if reshaping else "", [], inputs, [])
        for output in self._dot.outputs[number]:
            n = max((array.size for array in inputs), default=1) if size is None else size
            self._arrays[output] = _Array((n,), itemsize, op)
            op.outputs.append(self._arrays[output])
        return self._arrays[name]


def _evaluation_order(outputs: list[_Array]) -> list[_Op]:
    """The operations in the order in which `mx.eval(outputs)` schedules them (eval_impl in mlx/transforms.cpp)."""
    root = _Op("Synchronizer", [], outputs, [])
    degree: Counter[_Op] = Counter()  # how often an operation's outputs are used
    waiting = [root]
    while waiting:
        for array in waiting.pop().inputs:
            if array.op is not None:
                if array.op not in degree:
                    waiting.append(array.op)
                degree[array.op] += 1

    # breadth first from the outputs, depth first where that gets too wide; evaluated from its end
    tape, postponed, i = [root], [], 0
    while i < len(tape) or postponed:
        if i < len(tape):
            op, first = tape[i], 0
            i += 1
        else:
            op, first = postponed.pop()
        for j in range(first, len(op.inputs)):
            producer = op.inputs[j].op
            if producer is None:
                continue
            if len(tape) - i >= MAX_WIDTH:
                postponed.append((op, j))
                break
            degree[producer] -= 1
            if degree[producer] == 0:
                tape.append(producer)
    return tape[:0:-1]


# --- Its evaluation -------------------------------------------------------------------------------


class _Evaluation:
    """Replays which buffers MLX makes, reuses and frees."""

    def __init__(self, outputs: list[_Array]):
        self.outputs = outputs
        self.live_nbytes = self.temporary_nbytes = self.peak_nbytes = 0
        self.dispatches = 0
        self._sizes: list[tuple[int, int]] = []  # (of a buffer made, > 0, or let go, < 0; number of the dispatch)
        self._figures: dict[_Op, tuple[int, int, int, float] | None] = {}  # of each operation, in order

    def run(self) -> Cost:
        order = _evaluation_order(self.outputs)
        for op in order:
            for array in op.inputs:
                array.uses += len(op.outputs)  # each output refers to all inputs
        for array in self.outputs:
            array.uses += 1
        self._figures = {op: self._step(op) for op in order}
        return self._cost(order)

    def without(self, arrays: list[_Array]) -> Cost:
        """What was done for the outputs (see `run`) other than to get to these arrays; buffers are those of all."""
        made = {array.op for array in arrays}
        needed: set[_Op] = set()
        waiting = list(self.outputs)
        while waiting:
            op = waiting.pop().op
            if op is not None and op not in needed and op not in made:
                needed.add(op)
                waiting += op.inputs
        return self._cost([op for op in self._figures if op in needed])

    def _cost(self, order: list[_Op]) -> Cost:
        ops = [figures for op in order if (figures := self._figures[op]) is not None]
        return Cost(
            peak_nbytes=self.peak_nbytes,
            output_nbytes=self.live_nbytes,
            flops=sum(op[0] for op in ops),
            ops=tuple(ops),
            products=_products(order),
            gathered=_gathered(order),
            allocated_nbytes=self._allocated_nbytes,
            reserved_nbytes=self._reserved_nbytes,
        )

    @functools.cached_property
    def _allocated_nbytes(self) -> int:
        """Of all that was run."""
        return sum(nbytes for nbytes, _ in self._sizes if nbytes > 0)

    @functools.cached_property
    def _reserved_nbytes(self) -> int:
        """Of all that was run."""
        return max(self.peak_nbytes, _reserved_nbytes(self._sizes, self.peak_nbytes))

    def _step(self, op: _Op) -> tuple[int, int, int, float] | None:
        """Evaluate one operation; returns its (flops, bytes moved, function values, efficiency), None for a view."""
        self.temporary_nbytes = 0
        is_view = _RULES.get(op.name, _new)(self, op) is _VIEW
        self.peak_nbytes = max(self.peak_nbytes, self.live_nbytes + self.temporary_nbytes)
        figures = None
        if not is_view:
            moved = _moved_nbytes(op) + 2 * self.temporary_nbytes
            figures = _flops(op), moved, _function_values(op), _efficiency(op)

        self.dispatches += (not is_view) + 1  # the work itself, and the release of what it read
        for array in op.inputs:
            if array.buffer is not None and all(array.buffer is not out.buffer for out in op.outputs):
                array.buffer.last_read = self.dispatches
        for array in op.inputs:
            array.uses -= len(op.outputs)
            if array.uses == 0:
                self._release(array)
        for array in op.outputs:
            if array.uses == 0:  # a sibling that nothing uses
                self._release(array)
        return figures

    def _release(self, array: _Array) -> None:
        if array.buffer is not None:
            array.buffer.arrays -= 1
            if array.buffer.arrays == 0:
                self.live_nbytes -= array.buffer.nbytes
                self._sizes.append((-array.buffer.nbytes, self.dispatches))
            array.buffer = None

    def allocate(self, out: _Array, like: _Array | None = None) -> None:
        """A new buffer, in row order or laid out as another array."""
        if like is not None:
            out.set_layout(like)
        out.buffer = _Buffer(out.data_size * out.itemsize)
        out.buffer.arrays = 1
        self.live_nbytes += out.buffer.nbytes
        self._sizes.append((out.buffer.nbytes, self.dispatches))

    def share(self, out: _Array, array: _Array) -> None:
        """The buffer of another array."""
        out.buffer = array.buffer
        if out.buffer is not None:
            out.buffer.arrays += 1

    def use_temporary(self, nbytes: int) -> None:
        self.temporary_nbytes += nbytes
        self._sizes += [(nbytes, self.dispatches), (-nbytes, self.dispatches + 1)]
        self.dispatches += 1

    def is_unused(self, array: _Array) -> bool:
        """`array::is_donatable`: nothing but this operation refers to the array or its buffer."""
        buffer = array.buffer
        return (
            buffer is not None
            and array.uses == 1
            and buffer.arrays == 1
            and self.dispatches - buffer.last_read >= DISPATCHES_AHEAD
        )

    def is_donatable(self, array: _Array, out: _Array) -> bool:
        return (
            self.is_unused(array)
            and array.itemsize == out.itemsize
            and array.buffer.nbytes <= out.nbytes + DONATION_EXTRA_NBYTES
        )

    def donate(self, array: _Array, out: _Array) -> None:
        self.share(out, array)
        out.set_layout(array)

    def copy(self, array: _Array, out: _Array, in_memory_order: bool) -> None:
        """`set_copy_output_data` in mlx/backend/common/copy.h."""
        if not in_memory_order:
            self.allocate(out)
        elif self.is_donatable(array, out):
            self.donate(array, out)
        else:
            self.allocate(out, like=array)


def _reserved_nbytes(sizes: Sequence[tuple[int, int]], limit: int) -> int:
    """What buffers that are made and let go in this order take in all, every time over, if none is given back.

    `BufferCache` in mlx/backend/common/buffer_cache.h: the smallest that suffices, if that is not much larger. What is
    let go is free `DISPATCHES_AHEAD` dispatches later, or where more than `limit` are in use, for which the thread that
    schedules waits.
    """
    cached: list[int] = []
    reserved = in_use = 0
    for _ in range(TIMES_OVER):
        given: dict[int, list[int]] = {}  # size asked for -> sizes of the buffers
        leaving: deque[tuple[int, int]] = deque()  # (size of the buffer, at which dispatch it was let go)
        for nbytes, dispatch in sizes:
            while leaving and (in_use > limit or leaving[0][1] + DISPATCHES_AHEAD <= dispatch):
                buffer, _ = leaving.popleft()
                in_use -= buffer
                bisect.insort(cached, buffer)
            if nbytes > 0:
                at = bisect.bisect_left(cached, nbytes)
                if at < len(cached) and cached[at] < min(2 * nbytes, nbytes + 2 * mmap.PAGESIZE):
                    buffer = cached.pop(at)
                else:
                    buffer = nbytes
                    reserved += nbytes
                in_use += buffer
                given.setdefault(nbytes, []).append(buffer)
            elif nbytes < 0:
                leaving.append((given[-nbytes].pop(), dispatch))
        for buffer in [buffer for buffers in given.values() for buffer in buffers] + [b for b, _ in leaving]:
            in_use -= buffer
            bisect.insort(cached, buffer)  # the outputs go too
    return reserved


# --- Primitives -----------------------------------------------------------------------------------

_VIEW = object()  # what a rule returns when nothing was computed


def _new(e: _Evaluation, op: _Op) -> None:
    """Every output in a buffer of its own: many primitives, and the safe guess for one not known here."""
    for out in op.outputs:
        e.allocate(out)


def _unary(e: _Evaluation, op: _Op) -> None:
    (array,), (out,) = op.inputs, op.outputs
    e.copy(array, out, in_memory_order=array.contiguous)


def _binary(e: _Evaluation, op: _Op) -> None:
    (a, b), (out,) = op.inputs, op.outputs
    if a.data_size == 1 and b.data_size == 1:
        e.allocate(out, like=a)
        return
    if a.data_size == 1 and b.contiguous:
        candidates, layout = [b], b
    elif b.data_size == 1 and a.contiguous:
        candidates, layout = [a], a
    elif (a.row_contiguous and b.row_contiguous) or (a.col_contiguous and b.col_contiguous):
        candidates, layout = [a, b], a
    else:
        candidates, layout = [x for x in (a, b) if x.row_contiguous and x.size == out.size], None
    _donate_first_or_allocate(e, candidates, out, layout)


def _select(e: _Evaluation, op: _Op) -> None:
    arrays, (out,) = op.inputs, op.outputs
    if all(x.data_size == 1 for x in arrays):
        e.allocate(out, like=arrays[1])
    elif all(x.row_contiguous for x in arrays) or all(x.col_contiguous for x in arrays):
        _donate_first_or_allocate(e, arrays, out, arrays[1])
    else:
        _donate_first_or_allocate(e, [x for x in arrays if x.row_contiguous], out, None)


def _donate_first_or_allocate(e: _Evaluation, candidates: list[_Array], out: _Array, layout: _Array | None) -> None:
    for array in candidates:
        if e.is_donatable(array, out):
            e.donate(array, out)
            return
    e.allocate(out, like=layout)


def _update(e: _Evaluation, op: _Op) -> None:
    """Copies the first input, or takes its buffer, and writes the others into it."""
    array, (out,) = op.inputs[0], op.outputs
    whole = array.contiguous and array.size == array.data_size
    e.copy(array, out, in_memory_order=whole if op.name in _SLICE_UPDATES else array.row_contiguous)
    e.dispatches += 1


def _sort(e: _Evaluation, op: _Op) -> None:
    (array,), (out,) = op.inputs, op.outputs
    e.copy(array, out, in_memory_order=array.contiguous)


def _softmax(e: _Evaluation, op: _Op) -> None:
    (array,), (out,) = op.inputs, op.outputs
    if not (array.contiguous and array.strides[-1] == 1):
        e.allocate(out)  # the copy in row order is the output
    elif e.is_unused(array):
        e.donate(array, out)
    else:
        e.allocate(out, like=array)


def _log_sum_exp(e: _Evaluation, op: _Op) -> None:
    (array,), (out,) = op.inputs, op.outputs
    if not (array.contiguous and array.strides[-1] == 1):
        e.use_temporary(array.nbytes)
    e.allocate(out)


def _scan(e: _Evaluation, op: _Op) -> None:
    if not op.inputs[0].row_contiguous:
        e.use_temporary(op.inputs[0].nbytes)
    e.allocate(op.outputs[0])


def _matmul(e: _Evaluation, op: _Op) -> None:
    """Operands that are no matrices in row or column order are copied first."""
    (out,) = op.outputs
    for array in op.inputs[:2]:
        rows, columns = array.shape[-2:]
        if array.strides[-2:] not in ((columns, 1), (1, rows)):
            e.use_temporary(array.nbytes)
    if op.name == "AddMM":
        added = op.inputs[2]
        e.copy(added, out, in_memory_order=added.data_size != 1 and added.row_contiguous)
        e.dispatches += 1
    else:
        e.allocate(out)


def _quantized_matmul(e: _Evaluation, op: _Op) -> None:
    for array in op.inputs[:4]:
        if not array.row_contiguous:
            e.use_temporary(array.nbytes)
    e.allocate(op.outputs[0])


def _convolution(e: _Evaluation, op: _Op) -> None:
    """Padded input, unfolded input [N * out positions, kernel * C] and weight, all in float32 (cpu/conv.cpp)."""
    (array, weight), (out,) = op.inputs, op.outputs
    float_nbytes, kernel = 4, math.prod(weight.shape[1:-1])
    channels = array.shape[-1]
    positions = math.prod(out.shape[:-1])
    padded = array.shape[0] * channels * math.prod(n + k - 1 for n, k in zip(out.shape[1:-1], weight.shape[1:-1]))
    e.use_temporary(float_nbytes * padded)
    e.use_temporary(float_nbytes * positions * kernel * channels)
    if weight.shape[-1] != channels or weight.itemsize != float_nbytes or not weight.row_contiguous:
        e.use_temporary(float_nbytes * weight.size)
    if out.itemsize != float_nbytes:
        e.use_temporary(float_nbytes * out.size)
    e.allocate(out)


def _compiled(e: _Evaluation, op: _Op) -> None:
    """`compiled_allocate_outputs` in mlx/backend/common/compiled.cpp."""
    (out,) = op.outputs
    arrays = [array for array in op.inputs if array.shape]
    same_shape = all(array.shape == out.shape for array in arrays)
    if len(arrays) > 1:
        in_order = all(x.row_contiguous for x in arrays) or all(x.col_contiguous for x in arrays)
    else:
        in_order = bool(arrays) and arrays[0].contiguous
    if same_shape and in_order:
        candidates, layout = arrays, next((x for x in arrays if x.size == out.size), None)
    else:
        candidates, layout = [x for x in arrays if x.row_contiguous and x.size == out.size], None
    for array in candidates:
        if array.itemsize == out.itemsize and e.is_unused(array):
            e.donate(array, out)
            return
    e.allocate(out, like=layout)


def _concatenate(e: _Evaluation, op: _Op) -> None:
    e.dispatches += len(op.inputs) - 1
    e.allocate(op.outputs[0])


# --- Views: an array that lies in another's buffer


def _same(e: _Evaluation, op: _Op) -> object:
    for array, out in zip(op.inputs, op.outputs):
        e.donate(array, out)
    return _VIEW


def _broadcast(e: _Evaluation, op: _Op) -> object:
    array, (out,) = op.inputs[0], op.outputs
    e.donate(array, out)
    strides = tuple(0 if n == 1 else s for n, s in zip(array.shape, array.strides))
    out.strides = (0,) * (len(out.shape) - len(array.shape)) + strides
    if out.size > array.size:
        out.row_contiguous = out.col_contiguous = False
    return _VIEW


def _expand_dims(e: _Evaluation, op: _Op) -> object:
    (array,), (out,), (axes,) = op.inputs, op.outputs, op.arguments
    e.donate(array, out)
    strides = list(array.strides)
    for axis in axes:
        strides.insert(axis, 1)
    out.strides = tuple(strides)
    return _VIEW


def _squeeze(e: _Evaluation, op: _Op) -> object:
    (array,), (out,), (axes,) = op.inputs, op.outputs, op.arguments
    e.donate(array, out)
    out.strides = tuple(s for axis, s in enumerate(array.strides) if axis not in axes)
    return _VIEW


def _transpose(e: _Evaluation, op: _Op) -> object:
    (array,), (out,), (axes,) = op.inputs, op.outputs, op.arguments
    e.donate(array, out)
    out.strides = tuple(array.strides[axis] for axis in axes)
    if array.contiguous and array.data_size == array.size:
        _, out.row_contiguous, out.col_contiguous = _contiguity(out.shape, out.strides)
    return _VIEW


def _slice(e: _Evaluation, op: _Op) -> object:
    (array,), (out,), (_, _, steps) = op.inputs, op.outputs, op.arguments
    e.share(out, array)
    out.strides = tuple(s * step for s, step in zip(array.strides, steps))
    out.data_size = sum(abs(s) * (n - 1) for s, n in zip(out.strides, out.shape)) + 1
    size, out.row_contiguous, out.col_contiguous = _contiguity(out.shape, out.strides)
    out.contiguous = size == out.data_size
    return _VIEW


def _split(e: _Evaluation, op: _Op) -> object:
    (array,) = op.inputs
    for out in op.outputs:
        e.share(out, array)
        out.strides = array.strides
        out.data_size, out.row_contiguous, out.col_contiguous = _contiguity(out.shape, out.strides)
        if out.data_size == 1:
            out.contiguous = True
        elif out.data_size == array.data_size:
            out.contiguous = array.contiguous
        else:
            out.contiguous = array.contiguous and (out.row_contiguous or out.col_contiguous)
    return _VIEW


def _as_strided(e: _Evaluation, op: _Op) -> object:
    (array,), (out,), (_, strides, _) = op.inputs, op.outputs, op.arguments
    e.share(out, array)
    out.strides = tuple(strides)
    out.data_size = sum(abs(s) * (n - 1) for s, n in zip(out.strides, out.shape)) + 1
    size, out.row_contiguous, out.col_contiguous = _contiguity(out.shape, out.strides)
    out.contiguous = size == out.data_size and min(out.strides, default=0) >= 0
    return _VIEW


def _reshape(e: _Evaluation, op: _Op) -> object | None:
    """A view if the dimensions allow it, else a copy (prepare_reshape in mlx/backend/common/common.cpp)."""
    array, (out,) = op.inputs[0], op.outputs
    if array.row_contiguous or array.size == 0:
        e.share(out, array)
        out.data_size = array.data_size
        return _VIEW
    strides = _strides_of_reshape(array, out.shape)
    if strides is None:
        e.allocate(out)
        return None
    e.donate(array, out)
    out.strides = strides
    return _VIEW


def _view(e: _Evaluation, op: _Op) -> object | None:
    (array,), (out,) = op.inputs, op.outputs
    same = array.itemsize == out.itemsize
    if not (same or array.row_contiguous or (out.itemsize < array.itemsize and array.strides[-1] == 1)):
        e.allocate(out)
        return None
    e.donate(array, out)
    strides = [s * array.itemsize // out.itemsize for s in array.strides]
    out.strides = tuple(strides[:-1]) + array.strides[-1:]
    out.data_size = array.data_size * array.itemsize // out.itemsize
    return _VIEW


_UNARY = (
    "Abs ArcCos ArcCosh ArcSin ArcSinh ArcTan ArcTanh AsType BitwiseInvert Ceil Conjugate Cos Cosh Erf ErfInv Exp "
    "Expm1 Floor Imag Log Log1p LogicalNot Negative Real Round Sigmoid Sign Sin Sinh Sqrt Square Tan Tanh"
)
_BINARY = (
    "Add ArcTan2 BitwiseBinary Divide Equal Greater GreaterEqual Less LessEqual LogAddExp LogicalAnd LogicalOr "
    "Maximum Minimum Multiply NotEqual Power Remainder Subtract"
)
# what `mx.compile` fuses (is_fusable in mlx/compile.cpp), by the names it gives, the longest first
_ALIASES = {"Rsqrt": "Sqrt", "Log2": "Log", "Log10": "Log", "NaNEqual": "Equal"}
_ALIASES |= dict.fromkeys("BitwiseAnd BitwiseOr BitwiseXor LeftShift RightShift".split(), "BitwiseBinary")
_ALIASES |= dict.fromkeys("And Or Sum Prod Min Max".split(), "Reduce")
_ALIASES |= dict.fromkeys("CumSum CumProd CumMin CumMax CumLogaddexp".split(), "Scan")
_FUSABLE = re.compile(
    "|".join(sorted({*_UNARY.split(), *_BINARY.split(), *_ALIASES, "Select", "Broadcast"}, key=len, reverse=True))
)


def _exported_name(name: str) -> str:
    """The name under which `mx.export_function` files a primitive."""
    return _ALIASES.get(name, name)


_SLICE_UPDATES = ("SliceUpdate", "DynamicSliceUpdate")

_RULES: dict[str, Callable[[_Evaluation, _Op], object | None]] = {
    **dict.fromkeys(_UNARY.split(), _unary),
    **dict.fromkeys(_BINARY.split(), _binary),
    **dict.fromkeys((*_SLICE_UPDATES, "Scatter", "ScatterAxis", "MaskedScatter"), _update),
    **dict.fromkeys(("Sort", "Partition"), _sort),
    **dict.fromkeys(("Matmul", "AddMM", "GatherMM"), _matmul),
    **dict.fromkeys(("QuantizedMatmul", "GatherQMM"), _quantized_matmul),
    **dict.fromkeys(("Copy", "StopGradient", "Depends"), _same),
    **dict.fromkeys(("Broadcast", "BroadcastAxes"), _broadcast),
    **dict.fromkeys(("Reshape", "Flatten", "Unflatten"), _reshape),
    "Select": _select,
    "Softmax": _softmax,
    "LogSumExp": _log_sum_exp,
    "Scan": _scan,
    "Convolution": _convolution,
    "Compiled": _compiled,
    "Concatenate": _concatenate,
    "ExpandDims": _expand_dims,
    "Squeeze": _squeeze,
    "Transpose": _transpose,
    "Slice": _slice,
    "Split": _split,
    "AsStrided": _as_strided,
    "View": _view,
}


# --- Operations and bytes


def _flops(op: _Op) -> int:
    out = op.outputs[0]
    match op.name:
        case "Matmul" | "AddMM" | "GatherMM" | "QuantizedMatmul" | "GatherQMM" | "BlockMaskedMM":
            return 2 * out.size * op.inputs[0].shape[-1]
        case "Convolution":
            return 2 * out.size * math.prod(op.inputs[1].shape[1:])
        case "ScaledDotProductAttention":  # queries [B, H, T, D], keys [B, H_kv, S, D], values [B, H_kv, S, D_v]
            q, k, v = (array.shape for array in op.inputs[:3])
            return 2 * q[0] * q[1] * q[2] * k[2] * (q[3] + v[3])
    return 0


# Products of matrices at least this wide reach the full rate. Narrower ones fall behind about in proportion (512 rows,
# 2048 columns by rank 8: 14 to 26 of 200 GFLOP/s; 128 x 64 x 128 in attention: 80).
FULL_RATE_WIDTH = 128


def _efficiency(op: _Op) -> float:
    if _is_row_by_row(op):
        return math.inf
    if op.name not in ("Matmul", "AddMM"):
        return 1.0
    rows, columns = op.outputs[0].shape[-2:]
    return min(1.0, min(rows, columns, op.inputs[0].shape[-1]) / FULL_RATE_WIDTH)


# of an exponential's time an element, measured on the CPU backend
_FUNCTIONS = {
    "Exp": 1.0,
    "Expm1": 1.0,
    "Softmax": 1.0,
    "LogSumExp": 1.0,
    "Sigmoid": 1.4,
    "Tanh": 1.5,
    "Erf": 1.5,
    "Log": 1.0,
    "Log1p": 1.0,
    "LogAddExp": 2.0,
    "Sin": 1.2,
    "Cos": 1.2,
    "Power": 2.0,
    "Select": 0.33,
    "Sqrt": 0.2,
    "Rsqrt": 0.2,
}


def _function_values(op: _Op) -> int:
    """Elements that a function is taken of, in exponentials."""
    if op.name == "Compiled":  # the names of its operations, strung together
        weight = sum(w * op.arguments[0].count(name) for name, w in _FUNCTIONS.items()) if op.arguments else 0
    else:
        weight = _FUNCTIONS.get(op.name, 0)
    size = op.inputs[0].size if op.name == "LogSumExp" else op.outputs[0].size
    return round(weight * size)


def _moved_nbytes(op: _Op) -> int:
    written = sum(out.size * out.itemsize for out in op.outputs)
    read = op.inputs
    if op.name in ("Gather", "GatherAxis"):  # reads of the source what it writes
        written, read = 2 * written, op.inputs[1:]
    if _is_row_by_row(op):
        return written + op.inputs[0].size * op.inputs[0].itemsize
    return written + sum(min(array.size, array.data_size) * array.itemsize for array in read)


def _products(ops: list[_Op]) -> dict[tuple[int, int, int, int, bool, bool], tuple[int, float]]:
    """See `Cost.products`."""
    found: dict[tuple[int, int, int, int, bool, bool], tuple[int, float]] = {}
    for op in ops:
        if op.name in ("Matmul", "AddMM"):
            a, b = op.inputs[:2]
            *batches, rows, columns = op.outputs[0].shape
            shape = math.prod(batches), rows, a.shape[-1], columns, _is_transposed(a), _is_transposed(b)
            flops, effective = found.get(shape, (0, 0.0))
            found[shape] = flops + _flops(op), effective + _flops(op) / _efficiency(op)
    return found


def _is_transposed(array: _Array) -> bool:
    return array.shape[-1] > 1 and array.strides[-1] != 1


def _is_row_by_row(op: _Op) -> bool:
    """mlx/backend/cpu/masked_mm.cpp multiplies each row by its expert's matrix, which it reads anew."""
    return op.name == "GatherMM" and mx.default_device() == mx.Device(mx.cpu)


def _gathered(ops: list[_Op]) -> dict[tuple[int, int, bool], int]:
    """See `Cost.gathered`."""
    nbytes: dict[tuple[int, int, bool], int] = {}
    for op in filter(_is_row_by_row, ops):
        matrices = op.inputs[1]
        kind = (*matrices.shape[-2:], _is_transposed(matrices))
        rows = math.prod(op.outputs[0].shape[:-2])
        nbytes[kind] = nbytes.get(kind, 0) + rows * math.prod(matrices.shape[-2:]) * matrices.itemsize
    return nbytes


# --- Strides


@functools.lru_cache(1 << 14)
def _row_layout(shape: tuple[int, ...]) -> tuple[int, tuple[int, ...], bool]:
    """(elements, strides in row order, whether that is column order too)"""
    size = math.prod(shape)
    return size, _row_strides(shape), size <= 1 or size == max(shape)


@functools.lru_cache(1 << 14)
def _row_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, size = [], 1
    for n in reversed(shape):
        strides.append(size)
        size *= n
    return tuple(reversed(strides))


def _contiguity(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, bool, bool]:
    """(elements without broadcast dimensions, in row order?, in column order?)"""
    col_strides = tuple(reversed(_row_strides(tuple(reversed(shape)))))
    size = math.prod(n for n, s in zip(shape, strides) if s > 0)
    row = all(n == 1 or s == r for n, s, r in zip(shape, strides, _row_strides(shape)))
    col = all(n == 1 or s == c for n, s, c in zip(shape, strides, col_strides))
    return size, row, col


def _strides_of_reshape(array: _Array, new_shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """Strides of the same memory in another shape, None if it takes a copy."""
    if not array.shape:
        return (0,) * len(new_shape)
    shape, strides = [array.shape[0]], [array.strides[0]]
    for n, s in zip(array.shape[1:], array.strides[1:]):
        if n == 1:
            continue
        if s * n == strides[-1]:
            shape[-1], strides[-1] = shape[-1] * n, s
        else:
            shape.append(n)
            strides.append(s)
    result, j = [], 0
    for n in new_shape:
        if j < len(shape) and shape[j] % n == 0:
            shape[j] //= n
            result.append(shape[j] * strides[j])
            j += shape[j] == 1
        elif n == 1:
            result.append(result[-1])
        else:
            return None
    return tuple(result)
