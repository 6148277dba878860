"""The recipe of a data set: a YAML file whose every field is checked, and named with its line where it is wrong.

`example.yaml` beside this file documents each field; a test holds the two together.
"""

import difflib
import re
import types
import typing
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from ..errors import ConfigError, reason_of
from ..inference.questions import parse_marks
from ..inference.sampling import Sampling
from ..inference.session import Settings
from .contamination import NGRAM
from .rules import Rules

EXAMPLE = Path(__file__).with_name("example.yaml")

# kind of a seed -> (fields it must have, fields it may have, what its prompt must mention)
KINDS = {
    "topics": ({"topics", "prompt"}, {"spare", "writes", "answer_prompt"}, "{topic}"),
    "documents": ({"folder", "prompt"}, {"chunk", "count", "writes", "answer_prompt"}, "{chunk}"),
    "requests": ({"file"}, set(), ""),
    "examples": ({"prompt", "count"}, {"file", "examples", "shown", "writes", "answer_prompt"}, "{examples}"),
    "template": ({"count"}, {"system"}, ""),
}

MARK_PROMPT = """Here is a question, and an answer to it.

Question:
{question}

Answer:
{answer}

How good is the answer: is it right, complete, clear, and to the point? {low} is useless, {high} could not be better. \
Reply with one number from {low} to {high} and nothing else."""
PAIR_PROMPT = """Here is a question, and two answers to it.

Question:
{question}

Answer 1:
{first}

Answer 2:
{second}

Which answer is better: right, complete, clear, and to the point? Reply with 1 or 2 and nothing else."""


@dataclass(frozen=True)
class Seed:
    """Where questions come from; which fields there are depends on the kind. See `example.yaml`."""

    kind: str
    name: str = ""
    prompt: str = ""
    writes: str = "question"
    answer_prompt: str | None = None
    topics: dict[str, int] = field(default_factory=dict)
    spare: float = 1.5
    folder: str | None = None
    chunk: int = 2000
    count: int = 1
    file: str | None = None
    examples: list[str] = field(default_factory=list)
    shown: int = 3
    system: str | None = None

    def check(self) -> None:
        if self.writes not in ("question", "answer"):
            raise ConfigError(f"writes must be question or answer, got {self.writes}")
        if self.kind == "examples" and bool(self.file) == bool(self.examples):
            raise ConfigError("examples needs a file or a list of examples, one of the two")
        for name in ("count", "chunk", "shown"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if self.spare < 1:
            raise ConfigError(f"spare must be 1 or more, got {self.spare:g}")
        if any(quota < 1 for quota in self.topics.values()):
            raise ConfigError("topics must each have a quota of 1 or more")
        mentioned = KINDS[self.kind][2]
        if mentioned and mentioned not in self.prompt:
            raise ConfigError(f"prompt must have {mentioned} in it, where that goes")
        if self.answer_prompt is not None and "{question}" not in self.answer_prompt:
            raise ConfigError("answer_prompt must have {question} in it, where that goes")
        if self.answer_prompt is not None and self.writes == "answer":
            raise ConfigError("answer_prompt has no effect where writes is answer. Leave it out")


@dataclass(frozen=True)
class Questions(Settings):
    """How questions are generated: what `slowft generate` takes."""

    temp: float = 1.0

    def check(self) -> None:
        self.part(Sampling)
        if self.max_tokens < 1:
            raise ConfigError(f"max_tokens must be 1 or more, got {self.max_tokens}")


@dataclass(frozen=True)
class Answers(Settings):
    """How answers are generated, and how many to each question."""

    max_tokens: int = 1024
    count: int = 1

    def check(self) -> None:
        Questions.check(self)
        if self.count < 1:
            raise ConfigError(f"count must be 1 or more, got {self.count}")
        if self.count > 1 and self.temp == 0:
            raise ConfigError(f"{self.count} answers to a question need temp above 0: they would all be the same")


@dataclass(frozen=True)
class Judge:
    """Marks for answers, by the probabilities of digits."""

    model: str | None = None
    marks: str = "1-5"
    prompt: str = MARK_PROMPT
    threshold: float = 0.0
    keep: str = "best"
    pairs: bool = False
    pair_prompt: str = PAIR_PROMPT

    def check(self) -> None:
        marks = parse_marks(self.marks)
        if self.keep not in ("best", "all"):
            raise ConfigError(f"keep must be best or all, got {self.keep}")
        if self.pairs and not {1, 2} <= set(marks):
            raise ConfigError(f"pairs are judged by the digits 1 and 2, which are not among the marks {self.marks}")
        if self.threshold > marks[-1]:
            raise ConfigError(f"threshold is {self.threshold:g}, the best mark is {marks[-1]}: nothing would be left")
        for name, wanted in (
            ("prompt", ("{question}", "{answer}")),
            ("pair_prompt", ("{question}", "{first}", "{second}")),
        ):
            for placeholder in wanted:
                if placeholder not in getattr(self, name):
                    raise ConfigError(f"{name} must have {placeholder} in it, where that goes")


@dataclass(frozen=True)
class Duplicates:
    """When texts are alike."""

    threshold: float = 0.8
    words: int = 3
    questions: bool = True
    answers: bool = True

    def check(self) -> None:
        if not 0 < self.threshold <= 1:
            raise ConfigError(f"threshold must be above 0 and at most 1, got {self.threshold:g}")
        if self.words < 1:
            raise ConfigError(f"words must be 1 or more, got {self.words}")


@dataclass(frozen=True)
class Contamination:
    """What rows must not share runs of words with, beside valid and test."""

    files: list[str] = field(default_factory=list)
    words: int = NGRAM

    def check(self) -> None:
        if self.words < 1:
            raise ConfigError(f"words must be 1 or more, got {self.words}")


@dataclass(frozen=True)
class Split:
    """Shares of the rows that are not trained on."""

    valid: float = 0.05
    test: float = 0.05

    def check(self) -> None:
        if not (0 <= self.valid < 1 and 0 <= self.test < 1 and self.valid + self.test < 1):
            raise ConfigError(
                f"valid and test must be shares from 0 that leave some to train, got {self.valid:g} and {self.test:g}"
            )


@dataclass(frozen=True)
class Card:
    """What the data set's page says of it."""

    name: str = ""
    license: str | None = None
    language: list[str] = field(default_factory=list)
    examples: int = 3


@dataclass(frozen=True)
class Recipe:
    """A data set to be made. `folder` is the recipe's own, which its paths are relative to."""

    output: str
    model: str
    seeds: list[Seed]
    adapter_path: str | None = None
    memory: str | None = None
    compute_dtype: str | None = None
    trust_remote_code: bool = False
    chat_template: str | None = None
    seed: int = 0
    questions: Questions = field(default_factory=Questions)
    answers: Answers = field(default_factory=Answers)
    rules: Rules = field(default_factory=Rules)
    judge: Judge | None = None
    duplicates: Duplicates = field(default_factory=Duplicates)
    contamination: Contamination = field(default_factory=Contamination)
    split: Split = field(default_factory=Split)
    card: Card = field(default_factory=Card)
    folder: Path = Path()

    def check(self) -> None:
        if not self.seeds:
            raise ConfigError("seeds is empty. Name where questions come from")
        if self.judge is not None and self.judge.pairs and self.answers.count < 2:
            raise ConfigError("judge.pairs needs answers.count of 2 or more")

    def path(self, name: str) -> Path:
        """Of a file that the recipe names."""
        return self.folder / Path(name).expanduser()

    def model_path(self, name: str) -> str:
        """Of a model: a directory beside the recipe, or what it is (a hub id, another directory)."""
        beside = self.path(name)
        return str(beside) if beside.is_dir() else name


def load(file: Path) -> Recipe:
    """The recipe in a file.

    Raises:
        ConfigError: it cannot be read, or a field is unknown or wrong; names field and line.
    """
    try:
        text = file.read_text("utf-8")
    except OSError as e:
        raise ConfigError(f"recipe {file} cannot be read: {reason_of(e)}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"recipe {file} is not text in UTF-8") from None
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
    except yaml.YAMLError as e:
        mark, what = getattr(e, "problem_mark", None), getattr(e, "problem", None) or str(e).splitlines()[0]
        where = f" line {mark.line + 1}" if mark is not None else ""
        raise ConfigError(f"{file.name}{where} is not YAML: {what}") from None
    if node is None:
        raise ConfigError(f"{file.name} is empty. `slowft data make --example` prints a recipe")
    reader = _Reader(file.name, loader)
    recipe = reader.read(Recipe, node, "", folder=file.resolve().parent)
    names = [seed.name for seed in recipe.seeds]
    if len(set(names)) < len(names):
        raise ConfigError(f"{file.name}: two seeds are named {max(names, key=names.count)}. Give each its own name")
    return recipe


class _Reader:
    """From YAML's nodes, which know their lines, to dataclasses."""

    def __init__(self, file: str, loader: yaml.SafeLoader):
        self._file, self._loader = file, loader

    def _wrong(self, node: yaml.Node, what: str) -> ConfigError:
        return ConfigError(f"{self._file} line {node.start_mark.line + 1}: {what}")

    def read(self, kind: type, node: yaml.Node, name: str, **given: Any) -> Any:
        if not isinstance(node, yaml.MappingNode):
            raise self._wrong(node, f"{name or 'a recipe'} must be names with values, such as output: my-data")
        hints = typing.get_type_hints(kind)
        known = [f.name for f in fields(kind) if f.name not in given]
        found: dict[str, tuple[Any, yaml.Node]] = {}
        of_kind = None
        for key_node, value_node in node.value:
            key = self._loader.construct_object(key_node, deep=True)
            path = f"{name}.{key}" if name else str(key)
            if key not in known:
                close = difflib.get_close_matches(str(key), known, 1)
                hint = f"; did you mean {close[0]}?" if close else f". There are: {', '.join(known)}"
                raise self._wrong(key_node, f"{path} is no field of a recipe{hint}")
            if key in found:
                raise self._wrong(key_node, f"{path} is there twice")
            found[key] = self._value(hints[key], value_node, path), key_node
        if kind is Seed:
            of_kind = self._check_kind(found, node, name)
            given |= {"name": found["name"][0] if "name" in found else of_kind}
            found.pop("name", None)
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
            said = re.sub(r"--([a-z-]+)", lambda option: option[1].replace("-", "_"), str(e))  # of a command's option
            words = said.split()
            culprit = next((found[w.strip(",.:")][1] for w in words if w.strip(",.:") in found), node)
            raise self._wrong(culprit, f"{name + ': ' if name else ''}{said}") from None
        return made

    def _check_kind(self, found: dict, node: yaml.Node, name: str) -> str:
        if "kind" not in found or found["kind"][0] not in KINDS:
            at = found["kind"][1] if "kind" in found else node
            raise self._wrong(at, f"{name}.kind must be one of {', '.join(KINDS)}")
        kind = found["kind"][0]
        needed, allowed, _ = KINDS[kind]
        for key in found:
            if key not in needed | allowed | {"kind", "name"}:
                raise self._wrong(found[key][1], f"{name}.{key} has no effect on seeds of kind {kind}. Leave it out")
        for key in sorted(needed):
            if key not in found:
                raise self._wrong(node, f"{name}.{key} is missing: seeds of kind {kind} need it")
        return kind

    def _value(self, hint: Any, node: yaml.Node, path: str) -> Any:
        origin, arguments = typing.get_origin(hint), typing.get_args(hint)
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
                raise self._wrong(node, f"{path} must be a list")
            return [self._value(arguments[0], item, f"{path}[{i + 1}]") for i, item in enumerate(node.value)]
        value = self._plain(node)
        if origin is dict or hint is dict:
            if not isinstance(value, dict):
                raise self._wrong(node, f"{path} must be names with values")
            if arguments and arguments[1] is int:
                for key, number in value.items():
                    if not isinstance(number, int) or isinstance(number, bool):
                        raise self._wrong(node, f"{path}.{key} must be a whole number, got {number!r}")
                return {str(key): number for key, number in value.items()}
            return value
        wanted = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}[hint]
        fits = isinstance(value, (int, float) if hint is float else hint) and (
            hint is bool or not isinstance(value, bool)
        )
        if not fits:
            raise self._wrong(node, f"{path} must be {wanted}, got {value!r}")
        return value

    def _plain(self, node: yaml.Node) -> Any:
        try:
            return self._loader.construct_object(node, deep=True)
        except yaml.YAMLError as e:
            raise self._wrong(node, f"is not plain YAML: {getattr(e, 'problem', e)}") from None
