"""The suite of a comparison: a YAML file that says which variants answer which scenarios, and what is checked.

`example.yaml` beside this file documents each field. A test checks that it has all of them.
"""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..data.fields import load as load_fields
from ..errors import ConfigError
from ..inference.sampling import Sampling
from .checks import Check
from .templates import check_template

EXAMPLE = Path(__file__).with_name("example.yaml")

JUDGE_PROMPT = """Here is a question, and two answers to it.

Question:
{{ question }}

Answer 1:
{{ first }}

Answer 2:
{{ second }}

Which answer is better: right, complete, clear, and to the point? Reply with 1 or 2, or with 0 if neither is better, \
and nothing else."""


@dataclass(frozen=True, kw_only=True)
class Asking:
    """How answers are asked for. `defaults` are used for what a variant leaves out, then those of `slowft generate`."""

    prompt: str | None = None
    system_prompt: str | None = None
    max_tokens: int | None = None
    temp: float | None = None
    top_p: float | None = None
    min_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: list[str] | None = None
    chat_template_config: dict[str, Any] | None = None

    def check(self) -> None:
        self.sampling()
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ConfigError(f"max_tokens must be 1 or more, got {self.max_tokens}")
        for name in ("prompt", "system_prompt"):
            check_template(name, getattr(self, name))

    def given(self) -> dict[str, Any]:
        """The fields that are not None."""
        values = {f.name: getattr(self, f.name) for f in fields(Asking)}
        return {name: value for name, value in values.items() if value is not None}

    def sampling(self) -> Sampling:
        names = {f.name for f in fields(Sampling)}
        return Sampling(**{name: value for name, value in self.given().items() if name in names})


@dataclass(frozen=True, kw_only=True)
class Answering:
    """Who answers: a local model, perhaps with an adapter, or a server with OpenAI's interface."""

    model: str
    adapter_path: str | None = None
    upstream: str | None = None
    api_key_env: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def check_place(self) -> None:
        if self.upstream is not None:
            if not self.upstream.startswith(("http://", "https://")):
                raise ConfigError(f"upstream must begin with http:// or https://, got {self.upstream}")
            if self.adapter_path is not None:
                raise ConfigError("adapter_path has no effect with upstream: name the adapter as that server's model")
            return
        for name in ("api_key_env", "extra"):
            if getattr(self, name):
                raise ConfigError(f"{name} has no effect without upstream. Leave it out")


@dataclass(frozen=True, kw_only=True)
class Variant(Asking, Answering):
    """One column of the comparison."""

    name: str

    def check(self) -> None:
        Asking.check(self)
        self.check_place()
        if self.upstream is not None and self.chat_template_config:
            raise ConfigError("chat_template_config has no effect with upstream. Leave it out")

    def with_defaults(self, defaults: Asking) -> "Variant":
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        return Variant(**(own | defaults.given() | self.given()))


@dataclass(frozen=True)
class Scenarios:
    """One row of the comparison, the rows of a file, or recorded requests; see `example.yaml`."""

    name: str | None = None
    variables: dict[str, Any] | None = None
    messages: list[dict] | None = None
    file: str | None = None
    requests: str | None = None
    filters: list[str] = field(default_factory=list)
    limit: int | None = None
    checks: list[Check] = field(default_factory=list)

    def check(self) -> None:
        kinds = [name for name in ("file", "requests") if getattr(self, name) is not None]
        if self.variables is not None or self.messages is not None:
            kinds.append("variables or messages")
        if len(kinds) != 1:
            raise ConfigError(
                "a scenario has variables and messages of its own, or a file, or requests: one of them"
                + (f", not {' and '.join(kinds)}" if kinds else "")
            )
        if self.messages is not None and not all(isinstance(one.get("role"), str) for one in self.messages):
            raise ConfigError("messages must each have a role and content")
        if self.messages is not None and not self.messages:
            raise ConfigError("messages is empty. Leave it out")
        if self.filters and self.requests is None:
            raise ConfigError("filters has no effect without requests. Leave it out")
        if self.limit is not None and (kinds == ["variables or messages"] or self.limit < 1):
            raise ConfigError(f"limit is how many of a file or of requests to take, 1 or more, got {self.limit}")


@dataclass(frozen=True, kw_only=True)
class Judge(Answering):
    """The model that says which of two answers is better."""

    prompt: str = JUDGE_PROMPT
    model: str = ""
    variant: str | None = None

    def check(self) -> None:
        if bool(self.model) == bool(self.variant):
            raise ConfigError("judge needs a model or the name of a variant, one of the two")
        self.check_place()
        check_template("prompt", self.prompt)


@dataclass(frozen=True)
class Price:
    """A model's prices for a million tokens."""

    input: float = 0.0
    output: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Suite:
    """What is compared. Paths are relative to the folder of `file`, which is the suite's own file."""

    variants: list[Variant]
    scenarios: list[Scenarios]
    checks: list[Check] = field(default_factory=list)
    defaults: Asking = field(default_factory=Asking)
    baseline: str | None = None
    judge: Judge | None = None
    prices: dict[str, Price] = field(default_factory=dict)
    cache: str | None = None
    memory: str | None = None
    compute_dtype: str | None = None
    trust_remote_code: bool = False
    at_once: int = 8
    timeout: float = 300.0
    retries: int = 5
    file: Path = Path("suite.yaml")

    def check(self) -> None:
        for name in ("variants", "scenarios"):
            if not getattr(self, name):
                raise ConfigError(f"{name} is empty. Name one at least")
        names = [variant.name for variant in self.variants]
        if len(set(names)) < len(names):
            raise ConfigError(f"variants: two are named {max(names, key=names.count)}. Give each its own name")
        for what, name in (("baseline", self.baseline), ("judge", self.judge and self.judge.variant)):
            if name is not None and name not in names:
                raise ConfigError(f"{what} is {name}, and no variant is named so. There are: {', '.join(names)}")
        for name, least in (("at_once", 1), ("retries", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be {least} or more, got {getattr(self, name)}")
        if self.timeout <= 0:
            raise ConfigError(f"timeout must be above 0 seconds, got {self.timeout:g}")

    @property
    def whole_variants(self) -> list[Variant]:
        """The variants, with `defaults` for what they leave out."""
        return [variant.with_defaults(self.defaults) for variant in self.variants]

    @property
    def first(self) -> int:
        """The number of the variant that the others are compared with."""
        names = [variant.name for variant in self.variants]
        return 0 if self.baseline is None else names.index(self.baseline)

    @property
    def judging(self) -> Answering | None:
        """Who judges: the judge itself, or the variant that it names."""
        if self.judge is None or self.judge.variant is None:
            return self.judge
        return next(variant for variant in self.variants if variant.name == self.judge.variant)

    @property
    def cache_file(self) -> Path:
        return self.path(self.cache) if self.cache else self.file.with_name(f"{self.file.stem}.answers.jsonl")

    def path(self, name: str) -> Path:
        """The path of a file that the suite names."""
        return self.file.parent / Path(name).expanduser()

    def model_path(self, name: str) -> str:
        """A model's directory beside the suite if there is one, else the name itself (a hub id, another directory)."""
        beside = self.path(name)
        return str(beside) if beside.is_dir() else name


def load(file: Path) -> Suite:
    """The suite in a file.

    Raises:
        ConfigError: it cannot be read, or a field is unknown or wrong; names field and line.
    """
    examples = {"name": "base", "model": "Qwen/Qwen3-0.6B"}
    return load_fields(file, Suite, "suite", examples, "slowft compare --example", file=file.resolve())
