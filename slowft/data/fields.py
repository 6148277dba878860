"""Reads a YAML file into a dataclass, or raises an error that names field and line.

Comes in: a file and a dataclass, whose fields are the only ones that the file may have. Goes out: an instance. The
fields' types are checked. If the dataclass has them, `complete()` adds fields that the file need not name, and
`check()` raises an error for values that are wrong together. Fields that `load` is given are not read from the file.
"""

import difflib
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from ..errors import ConfigError, reason_of

Found = dict[str, tuple[Any, yaml.Node]]  # field -> (value, the node of its name)
Wrong = Callable[[str, str | None], ConfigError]  # (what is wrong, the field whose line is named) -> the error
WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


def load(file: Path, kind: type, what: str, such_as: Mapping[str, str], example: str, /, **given: Any) -> Any:
    """An instance of the dataclass `kind` from a file.

    Args:
        what: what the file is, such as "recipe".
        such_as: an example of a field.
        example: the command that prints an example of such a file.
        given: fields that do not come from the file.

    Raises:
        ConfigError: the file cannot be read, or a field is unknown or wrong; names field and line.
    """
    try:
        text = file.read_text("utf-8")
    except OSError as e:
        raise ConfigError(f"{what} {file} cannot be read: {reason_of(e)}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{what} {file} is not text in UTF-8") from None
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
    except yaml.YAMLError as e:
        mark, problem = getattr(e, "problem_mark", None), getattr(e, "problem", None) or str(e).splitlines()[0]
        where = f" line {mark.line + 1}" if mark is not None else ""
        raise ConfigError(f"{file.name}{where} is not YAML: {problem}") from None
    if node is None:
        raise ConfigError(f"{file.name} is empty. `{example}` prints a {what}")
    return _Reader(file.name, loader, what, such_as).read(kind, node, "", **given)


class _Reader:
    """Makes dataclasses of YAML's nodes, which know their lines."""

    def __init__(self, file: str, loader: yaml.SafeLoader, what: str, such_as: Mapping[str, str]):
        self._file, self._loader, self._what = file, loader, what
        self._such_as = ", ".join(f"{key}: {value}" for key, value in such_as.items())

    def _wrong(self, node: yaml.Node, what: str) -> ConfigError:
        return ConfigError(f"{self._file} line {node.start_mark.line + 1}: {what}")

    def read(self, kind: type, node: yaml.Node, name: str, /, **given: Any) -> Any:
        if not isinstance(node, yaml.MappingNode):
            such_as = f"such as {_example(kind)[1:-1]}" if name else f"such as {self._such_as}"
            raise self._wrong(node, f"{name or f'a {self._what}'} must be names with values, {such_as}")
        hints = typing.get_type_hints(kind)
        known = [f.name for f in fields(kind) if f.name not in given]
        found: Found = {}
        for key_node, value_node in node.value:
            key = self._loader.construct_object(key_node, deep=True)
            path = f"{name}.{key}" if name else str(key)
            if key not in known:
                close = difflib.get_close_matches(str(key), known, 1)
                hint = f"; did you mean {close[0]}?" if close else f". There are: {', '.join(known)}"
                raise self._wrong(key_node, f"{path} is no field of a {self._what}{hint}")
            if key in found:
                raise self._wrong(key_node, f"{path} is there twice")
            found[key] = self._value(hints[key], value_node, path), key_node
        if hasattr(kind, "complete"):
            given |= kind.complete(
                found, name, lambda what, key: self._wrong(found[key][1] if key in found else node, what)
            )
        for f in fields(kind):
            needed = f.default is MISSING and f.default_factory is MISSING
            if needed and f.name not in found and f.name not in given:
                raise self._wrong(node, f"{name + '.' if name else ''}{f.name} is missing")
        values = {key: value for key, (value, _) in found.items()}
        try:
            made = kind(**given, **values)
            if hasattr(made, "check"):
                made.check()
        except ConfigError as e:
            # the error may name a command's options; here they are fields
            message = re.sub(r"--([a-z-]+)", lambda option: option[1].replace("-", "_"), str(e))
            words = [word.strip(",.:") for word in message.split()]
            culprit = next((found[word][1] for word in words if word in found), node)
            raise self._wrong(culprit, f"{name + ': ' if name else ''}{message}") from None
        return made

    def _value(self, hint: Any, node: yaml.Node, path: str) -> Any:
        origin, arguments = typing.get_origin(hint), typing.get_args(hint)
        if hint is Any:
            return self._plain(node)
        if origin is types.UnionType or origin is typing.Union:
            value = self._plain(node)
            if value is None and type(None) in arguments:
                return None
            hint = next(a for a in arguments if a is not type(None))
            return self._value(hint, node, path)
        if is_dataclass(hint):
            return self.read(hint, node, path)
        if origin in (list, Sequence):
            if not isinstance(node, yaml.SequenceNode):
                raise self._wrong(node, f"{path} must be a list, such as {_example(hint)}")
            return [self._value(arguments[0], item, f"{path}[{i + 1}]") for i, item in enumerate(node.value)]
        if origin is dict or hint is dict:
            return self._dict(arguments, node, path)
        value = self._plain(node)
        fits = isinstance(value, (int, float) if hint is float else hint) and (
            hint is bool or not isinstance(value, bool)
        )
        if not fits:
            is_unquoted = hint is str and isinstance(node, yaml.ScalarNode) and node.value
            fix = (
                f'. Put it in quotes: "{node.value}"'
                if is_unquoted
                else f", such as {path.rpartition('.')[2]}: {_example(hint)}"
            )
            raise self._wrong(node, f"{path} must be {WORDS[hint]}, got {value!r}{fix}")
        return value

    def _dict(self, arguments: Sequence[Any], node: yaml.Node, path: str) -> dict:
        value = self._plain(node)
        if not isinstance(value, dict):
            such_as = _example(dict[arguments or (str, Any)])[1:-1]
            raise self._wrong(node, f"{path} must be names with values, such as {such_as}")
        if not arguments or arguments[1] is Any:
            return value
        keys = [str(self._plain(key)) for key, _ in node.value]
        return {key: self._value(arguments[1], item, f"{path}.{key}") for key, (_, item) in zip(keys, node.value)}

    def _plain(self, node: yaml.Node) -> Any:
        try:
            return self._loader.construct_object(node, deep=True)
        except yaml.YAMLError as e:
            raise self._wrong(node, f"is not plain YAML: {getattr(e, 'problem', e)}") from None


def _example(hint: Any) -> str:
    """A value of this type, as YAML has it on one line."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (list, Sequence):
        return f"[{_example(arguments[0])}]"
    if origin is dict:
        return f"{{name: {_example(arguments[1])}}}"
    if is_dataclass(hint):
        needed = [f.name for f in fields(hint) if f.default is MISSING and f.default_factory is MISSING]
        names = needed or [fields(hint)[0].name]
        hints = typing.get_type_hints(hint)
        return f"{{{', '.join(f'{name}: {_example(hints[name])}' for name in names)}}}"
    return {bool: "true", int: "3", float: "0.5"}.get(hint, "some text")
