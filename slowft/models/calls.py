"""Calls as flat lists of arrays: what goes into a block and what comes out, as MLX's transformations want it.

Comes in: arguments, a tree of tuples, lists, dicts and plain objects. Goes out: their arrays, and calls with other
arrays in their places. What a call writes into lists, dicts and objects that it is handed comes out like what it
returns, so that whoever is handed them next depends on it.
"""

import copy
from collections.abc import Callable, Collection, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

ATOMS = (type(None), bool, int, float, complex, str, bytes, mx.Dtype)


def pack(tree: Any, arrays: list[mx.array], state_objects: Collection[type] = ()) -> Any:
    """Append the arrays of a tree to `arrays`; returns what `unpack` needs to put them back."""
    return _Packer(arrays, state_objects).pack(tree)


def unpack(spec: Any, arrays: Sequence[mx.array], containers: Sequence[Any] = ()) -> Any:
    """The tree with these arrays in it. `containers` stand for those that the packed tree was written into."""
    kind, value = spec
    if kind == "array":
        return arrays[value]
    if kind == "container":
        return containers[value]
    if kind == "static":
        return value
    if kind == "object":
        prototype, contents = value
        return _filled(copy.copy(prototype), {k: unpack(v, arrays, containers) for k, v in contents.items()})
    if issubclass(kind, dict):
        return _filled(kind(), {k: unpack(v, arrays, containers) for k, v in value.items()})
    parts = [unpack(v, arrays, containers) for v in value]
    return kind(*parts) if hasattr(kind, "_fields") else kind(parts)


class Arguments:
    """The arguments of one call, apart from what becomes of them.

    Lists, dicts and objects among them are containers: the callee may write into them.

    Args:
        state_objects: the classes of objects that carry arrays from call to call. Others, such as a key-value cache
            that a user hands to the model, stay what they are: one and the same object for every call.

    Attributes:
        arrays: every array in the arguments, containers included, each once. The first positional argument's first.
    """

    def __init__(self, args: tuple, kwargs: dict, state_objects: Collection[type] = ()):
        self.arrays: list[mx.array] = []
        self._state_objects = state_objects
        packer = _Packer(self.arrays, state_objects, by_reference=True)
        self._spec = (tuple, [packer.structure(args), packer.structure(kwargs)])
        self._containers, self._contents = packer.containers, packer.contents

    @property
    def objects(self) -> list[Any]:
        """Every leaf that is neither an array nor a plain value: static to this call."""
        return _objects(self._spec, *self._contents)

    @property
    def has_containers(self) -> bool:
        """Whether there is something that arrays could be handed on in."""
        return any(
            not isinstance(container, (list, dict)) or any(kind == "array" for kind, _ in _leaves(contents))
            for container, contents in zip(self._containers, self._contents)
        )

    def signature(self) -> str:
        """Equal for calls that compute the same on arrays of the same shapes and dtypes."""
        shapes = [(a.shape, a.dtype) for a in self.arrays]
        return str([_outline(spec) for spec in (self._spec, *self._contents)] + shapes)

    def with_arrays(self, arrays: Sequence[mx.array]) -> tuple[tuple, dict, list]:
        """(args, kwargs, their containers) with these arrays in their places; the arguments stay as they are."""
        containers = [_empty(container) for container in self._containers]
        for container, contents in zip(containers, self._contents):
            _fill(container, unpack(contents, arrays, containers))
        return *unpack(self._spec, arrays, containers), containers

    def call(self, function: Callable, arrays: Sequence[mx.array]) -> "Outcome":
        """`function` on these arrays in the arguments' places."""
        args, kwargs, containers = self.with_arrays(arrays)
        return Outcome(function(*args, **kwargs), containers, arrays, self._state_objects)

    def take_over(self, outcome: "Outcome", arrays: Sequence[mx.array]) -> Any:
        """The call's result, with `arrays` as what came out; its writes are done to the arguments' containers."""
        for container, contents in zip(self._containers, outcome.contents):
            _fill(container, unpack(contents, arrays, self._containers))
        return unpack(outcome.result, arrays, self._containers)


class Outcome:
    """What a call returned and left in its containers.

    Attributes:
        arrays: each once. The caller may take them away.
        handed_on: (place in `arrays`, place among the call's arrays) of those that are its arguments, untouched.
            They come out too: gradients of what is used by several blocks are then summed in one order, the very
            order in which they are without seams.
    """

    def __init__(
        self, result: Any, containers: Sequence[Any], inputs: Sequence[mx.array], state_objects: Collection[type]
    ):
        self.arrays: list[mx.array] = []
        packer = _Packer(self.arrays, state_objects, containers)
        self.result = packer.pack(result)
        self.contents = [packer.structure(_contents(container)) for container in containers]
        place = {id(array): i for i, array in enumerate(inputs)}
        self.handed_on = [(i, place[id(array)]) for i, array in enumerate(self.arrays) if id(array) in place]

    @property
    def objects(self) -> list[Any]:
        """Every leaf that is neither an array nor a plain value."""
        return _objects(self.result, *self.contents)

    def returned(self) -> set[int]:
        """Places in `arrays` of what is returned; the others are only in containers."""
        specs, seen, places = [self.result], set(), set()
        while specs:
            for kind, value in _leaves(specs.pop()):
                if kind == "array":
                    places.add(value)
                elif kind == "container" and value not in seen:
                    seen.add(value)
                    specs.append(self.contents[value])
        return places


class _Packer:
    """Packs trees. Containers that are taken by reference appear once, however often they are met.

    Args:
        containers: those that are known.
        by_reference: whether others, as they are met, are taken so too.
    """

    def __init__(
        self,
        arrays: list[mx.array],
        state_objects: Collection[type],
        containers: Sequence[Any] = (),
        by_reference: bool = False,
    ):
        self._arrays, self._state_objects, self._by_reference = arrays, state_objects, by_reference
        self.containers, self.contents = list(containers), [None] * len(containers)
        self._place = {id(array): i for i, array in enumerate(arrays)}

    def pack(self, tree: Any) -> Any:
        if isinstance(tree, mx.array):
            if id(tree) not in self._place:
                self._place[id(tree)] = len(self._arrays)
                self._arrays.append(tree)
            return ("array", self._place[id(tree)])
        for i, container in enumerate(self.containers):
            if container is tree:
                return ("container", i)
        if self._by_reference and _is_container(tree, self._state_objects):
            i = len(self.containers)
            self.containers.append(tree)
            self.contents.append(None)
            self.contents[i] = self.structure(_contents(tree))
            return ("container", i)
        return self.structure(tree)

    def structure(self, tree: Any) -> Any:
        if isinstance(tree, (tuple, list)):
            return (type(tree), [self.pack(v) for v in tree])
        if isinstance(tree, dict) and not isinstance(tree, nn.Module):
            return (type(tree), {k: self.pack(v) for k, v in tree.items()})
        if type(tree) in self._state_objects:
            return ("object", (_empty(tree), {k: self.pack(v) for k, v in vars(tree).items()}))
        return ("static", tree)


def is_state_object(node: Any) -> bool:
    """Whether it is a plain object, whose attributes are all it is: neither a layer nor a function."""
    return hasattr(node, "__dict__") and not isinstance(node, (nn.Module, type, *ATOMS)) and not callable(node)


def _is_container(node: Any, state_objects: Collection[type]) -> bool:
    return type(node) in state_objects or isinstance(node, (list, dict)) and not isinstance(node, nn.Module)


def _contents(container: Any) -> list | dict:
    return container if isinstance(container, (list, dict)) else vars(container)


def _empty(container: Any) -> Any:
    other = copy.copy(container)
    _contents(other).clear()
    return other


def _fill(container: Any, contents: list | dict) -> None:
    """Replace what is in the container."""
    inside = _contents(container)
    inside.clear()
    inside.extend(contents) if isinstance(inside, list) else inside.update(contents)


def _filled(container: Any, contents: list | dict) -> Any:
    _fill(container, contents)
    return container


def _leaves(spec: Any):
    kind, value = spec
    if kind in ("array", "container", "static"):
        yield spec
    else:
        parts = value[1] if kind == "object" else value
        for part in parts.values() if isinstance(parts, dict) else parts:
            yield from _leaves(part)


def _objects(*specs: Any) -> list[Any]:
    leaves = [value for spec in specs for kind, value in _leaves(spec) if kind == "static"]
    return [leaf for leaf in leaves if not isinstance(leaf, ATOMS)]


def _outline(spec: Any) -> Any:
    """The spec without objects, which have names of their own."""
    kind, value = spec
    if kind == "static":
        return kind, value if isinstance(value, ATOMS) else type(value)
    if kind in ("array", "container"):
        return spec
    parts = value[1] if kind == "object" else value
    return kind, {k: _outline(v) for k, v in parts.items()} if isinstance(parts, dict) else [_outline(v) for v in parts]
