"""A block's inputs and outputs as flat lists of arrays, which is the form that MLX's transformations take.

Comes in: arguments, a tree of tuples, lists, dicts and plain objects. Goes out: their arrays, and calls with other
arrays in their places. A call may write into lists, dicts and objects that it is handed. What it writes is an output
just like what it returns, so the next block that is handed the same object depends on it.
"""

import copy
from collections.abc import Callable, Collection, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

ATOMS = (type(None), bool, int, float, complex, str, bytes, mx.Dtype)


def pack(tree: Any, arrays: list[mx.array], state_objects: Collection[type] = ()) -> Any:
    """Append the arrays of a tree to `arrays`. Returns the spec with which `unpack` puts them back."""
    return _Packer(arrays, state_objects).pack(tree)


def unpack(spec: Any, arrays: Sequence[mx.array], containers: Sequence[Any] = ()) -> Any:
    """The tree of a spec, with these arrays and containers in the places of the packed ones."""
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
    """The arguments of one call, as they are before the call.

    Lists, dicts and state objects among them are containers: the callee may write into them.

    Args:
        state_objects: the classes of objects that carry arrays from call to call. Objects of other classes, such as a
            key-value cache that a user hands to the model, are not looked into: every call gets the same object.

    Attributes:
        arrays: every array in the arguments and their containers, each once. Those of the first positional argument
            come first.
    """

    def __init__(self, args: tuple, kwargs: dict, state_objects: Collection[type] = ()):
        self.arrays: list[mx.array] = []
        self._state_objects = state_objects
        packer = _Packer(self.arrays, state_objects, by_reference=True)
        self._spec = (tuple, [packer.structure(args), packer.structure(kwargs)])
        self._containers, self._contents = packer.containers, packer.contents

    @property
    def objects(self) -> list[Any]:
        """Every leaf that is neither an array nor a plain value."""
        return _objects(self._spec, *self._contents)

    @property
    def has_containers(self) -> bool:
        """Whether there is a container in which arrays could be handed on: a state object, or one that has arrays."""
        return any(
            not isinstance(container, (list, dict)) or any(kind == "array" for kind, _ in _leaves(contents))
            for container, contents in zip(self._containers, self._contents)
        )

    def signature(self) -> str:
        """A text that is equal for calls that compute the same on arrays of the same shapes and dtypes."""
        shapes = [(a.shape, a.dtype) for a in self.arrays]
        return str([_without_objects(spec) for spec in (self._spec, *self._contents)] + shapes)

    def with_arrays(self, arrays: Sequence[mx.array]) -> tuple[tuple, dict, list]:
        """(args, kwargs, their containers): a copy of the arguments with these arrays in their places."""
        containers = [_empty(container) for container in self._containers]
        for container, contents in zip(containers, self._contents):
            _fill(container, unpack(contents, arrays, containers))
        return *unpack(self._spec, arrays, containers), containers

    def call(self, function: Callable, arrays: Sequence[mx.array]) -> "Outcome":
        """Call `function` with a copy of the arguments that has these arrays."""
        args, kwargs, containers = self.with_arrays(arrays)
        return Outcome(function(*args, **kwargs), containers, arrays, self._state_objects)

    def take_over(self, outcome: "Outcome", arrays: Sequence[mx.array]) -> Any:
        """The call's result, with `arrays` in the places of the outcome's.

        What the call wrote into its containers is written into the arguments' own containers.
        """
        for container, contents in zip(self._containers, outcome.contents):
            _fill(container, unpack(contents, arrays, self._containers))
        return unpack(outcome.result, arrays, self._containers)


class Outcome:
    """What a call returned and left in its containers.

    Attributes:
        arrays: every output array, each once. The caller may empty this list to free them.
        handed_on: (place in `arrays`, place among the call's inputs) of inputs that came out unchanged. They are
            outputs too, so that the gradients of an array that several blocks use are summed in the same order as
            without streaming.
    """

    def __init__(
        self, result: Any, containers: Sequence[Any], inputs: Sequence[mx.array], state_objects: Collection[type]
    ):
        self.arrays: list[mx.array] = []
        packer = _Packer(self.arrays, state_objects, containers)
        self.result = packer.pack(result)
        self.contents = [packer.structure(_contents(container)) for container in containers]
        input_place = {id(array): i for i, array in enumerate(inputs)}
        self.handed_on = [
            (i, input_place[id(array)]) for i, array in enumerate(self.arrays) if id(array) in input_place
        ]

    @property
    def objects(self) -> list[Any]:
        """Every leaf that is neither an array nor a plain value."""
        return _objects(self.result, *self.contents)

    def returned(self) -> set[int]:
        """Places in `arrays` of those that the call returned. The others are only in containers."""
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
    """Packs trees into specs: (kind, value), where kind is "array", "container", "static", "object" or a class.

    A container is packed as its place in `containers`, however often it occurs.

    Args:
        containers: lists, dicts and state objects to pack in this way.
        by_reference: also pack every other list, dict and state object in this way, and append it to `containers`.
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
    """Whether `node` is a plain object, which consists of its attributes: neither a layer nor a function."""
    return hasattr(node, "__dict__") and not isinstance(node, (nn.Module, type, *ATOMS)) and not callable(node)


def _is_container(node: Any, state_objects: Collection[type]) -> bool:
    return type(node) in state_objects or isinstance(node, (list, dict)) and not isinstance(node, nn.Module)


def _contents(container: Any) -> list | dict:
    return container if isinstance(container, (list, dict)) else vars(container)


def _empty(container: Any) -> Any:
    empty = copy.copy(container)
    _contents(empty).clear()
    return empty


def _fill(container: Any, contents: list | dict) -> None:
    """Replace the container's contents."""
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


def _without_objects(spec: Any) -> Any:
    """The spec with only the classes of objects: an object's `repr` may contain its address."""
    kind, value = spec
    if kind == "static":
        return kind, value if isinstance(value, ATOMS) else type(value)
    if kind in ("array", "container"):
        return spec
    parts = value[1] if kind == "object" else value
    if isinstance(parts, dict):
        return kind, {k: _without_objects(v) for k, v in parts.items()}
    return kind, [_without_objects(v) for v in parts]
