"""The recipe of a data set, which is written in a YAML file.

`example.yaml` beside this file documents each field. A test checks that it has all of them.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..data import fields
from ..errors import ConfigError
from ..inference.questions import parse_marks
from ..inference.sampling import Sampling
from ..inference.session import Settings
from .contamination import NGRAM
from .rules import Rules

EXAMPLE = Path(__file__).with_name("example.yaml")

# kind of a seed -> (fields it must have, fields it may have, the placeholder that its prompt must have)
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
    """Where questions come from. Which fields have an effect depends on the kind; see `example.yaml`."""

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

    @classmethod
    def complete(cls, found: fields.Found, name: str, wrong: fields.Wrong) -> dict[str, Any]:
        """The fields to fill in. Raises `wrong` if the fields that were found do not fit the kind."""
        if "kind" not in found or found["kind"][0] not in KINDS:
            raise wrong(f"{name}.kind must be one of {', '.join(KINDS)}", "kind")
        kind = found["kind"][0]
        needed, allowed, _ = KINDS[kind]
        for key in found:
            if key not in needed | allowed | {"kind", "name"}:
                raise wrong(f"{name}.{key} has no effect on seeds of kind {kind}. Leave it out", key)
        for key in sorted(needed):
            if key not in found:
                raise wrong(f"{name}.{key} is missing: seeds of kind {kind} need it", None)
        return {} if "name" in found else {"name": kind}

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
    """How questions are generated. The options are those of `slowft generate`."""

    temp: float = 1.0

    def check(self) -> None:
        self.part(Sampling)
        if self.max_tokens < 1:
            raise ConfigError(f"max_tokens must be 1 or more, got {self.max_tokens}")


@dataclass(frozen=True)
class Answers(Settings):
    """How answers are generated, and how many for each question."""

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
    """How a model marks answers, by the probabilities of digits."""

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
    """When a text counts as a duplicate of another."""

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
    """Files that rows must not share runs of words with. (The same holds for valid and test.)"""

    files: list[str] = field(default_factory=list)
    words: int = NGRAM

    def check(self) -> None:
        if self.words < 1:
            raise ConfigError(f"words must be 1 or more, got {self.words}")


@dataclass(frozen=True)
class Split:
    """Shares of the rows that are held out."""

    valid: float = 0.05
    test: float = 0.05

    def check(self) -> None:
        if not (0 <= self.valid < 1 and 0 <= self.test < 1 and self.valid + self.test < 1):
            raise ConfigError(
                f"valid and test must be shares from 0 that leave some to train, got {self.valid:g} and {self.test:g}"
            )


@dataclass(frozen=True)
class Card:
    """What the data set's page says about it."""

    name: str = ""
    license: str | None = None
    language: list[str] = field(default_factory=list)
    examples: int = 3


@dataclass(frozen=True)
class Recipe:
    """How a data set is made. Its paths are relative to `folder`, which is the folder of the recipe's file."""

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
        """The path of a file that the recipe names."""
        return self.folder / Path(name).expanduser()

    def model_path(self, name: str) -> str:
        """A model's directory beside the recipe if there is one, else the name itself (a hub id, another directory)."""
        beside = self.path(name)
        return str(beside) if beside.is_dir() else name


def load(file: Path) -> Recipe:
    """The recipe in a file.

    Raises:
        ConfigError: it cannot be read, or a field is unknown or wrong; names field and line.
    """
    examples = {"output": "my-data"}
    recipe = fields.load(file, Recipe, "recipe", examples, "slowft data make --example", folder=file.resolve().parent)
    names = [seed.name for seed in recipe.seeds]
    if len(set(names)) < len(names):
        raise ConfigError(f"{file.name}: two seeds are named {max(names, key=names.count)}. Give each its own name")
    return recipe
