"""The checks of a suite, and the reasons why an answer fails them. Nothing here asks a model."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..errors import ConfigError
from .templates import check_template, render

KINDS = ("contains", "not_contains", "regex", "not_regex", "json", "equals", "max_length")
UNITS = ("characters", "words", "tokens")
NOTHING = object()  # None cannot stand for a missing value, because YAML's null is a value
SHOWN = 60  # a reason shows so many characters of an answer or a pattern

_STEP = re.compile(r"\.?([^.\[\]]+)|\[(-?\d+)\]")
_FENCE = re.compile(r"\s*```(?:json)?\s*\n(.*?)\n?\s*```\s*", re.DOTALL | re.IGNORECASE)


@dataclass(frozen=True)
class Check:
    """One check. `example.yaml` explains the fields. Texts are templates in which the scenario's variables are put."""

    name: str = ""
    contains: str | None = None
    not_contains: str | None = None
    regex: str | None = None
    not_regex: str | None = None
    json: str | None = None
    equals: Any = NOTHING
    exists: bool | None = None
    max_length: int | None = None
    unit: str = "characters"
    ignore_case: bool = False

    @property
    def kind(self) -> str:
        return next(kind for kind in KINDS if getattr(self, kind) not in (None, NOTHING))

    @property
    def title(self) -> str:
        """The check's name, or what it checks in words."""
        if self.name:
            return self.name
        value = getattr(self, self.kind)
        if self.kind == "json":
            expected = "" if self.equals is NOTHING else f" is {_short(self.equals)}"
            return f"json {value}{' is not there' if self.exists is False else expected}"
        if self.kind == "max_length":
            return f"at most {value} {self.unit}"
        return f"{self.kind.replace('_', ' ')} {_short(value)}"

    def check(self) -> None:
        given = [kind for kind in KINDS if getattr(self, kind) not in (None, NOTHING)]
        if "json" in given and "equals" in given:
            given.remove("equals")
        if len(given) != 1:
            raise ConfigError(
                f"a check is one of {', '.join(KINDS)}" + (f", not {' and '.join(given)} at once" if given else "")
            )
        if self.exists is not None and self.json is None:
            raise ConfigError("exists is about a field: it goes with json")
        if self.exists is not None and self.equals is not NOTHING:
            raise ConfigError("exists and equals exclude each other. Leave one out")
        if self.unit not in UNITS:
            raise ConfigError(f"unit must be one of {', '.join(UNITS)}, got {self.unit}")
        if self.max_length is None and self.unit != "characters":
            raise ConfigError("unit is of max_length, which is not there")
        if self.max_length is not None and self.max_length < 0:
            raise ConfigError(f"max_length must be 0 or more, got {self.max_length}")
        if self.json is not None:
            steps_of(self.json)
        for name in ("contains", "not_contains", "regex", "not_regex", "equals"):
            value = getattr(self, name)
            check_template(name, value if isinstance(value, str) else None)
            if value == "":
                raise ConfigError(f"{name} is empty: every answer would do. Give some text")
        for name in ("regex", "not_regex"):
            if (pattern := getattr(self, name)) is not None and "{{" not in pattern and "{%" not in pattern:
                _compiled(pattern, False)

    def bound(self, variables: Mapping[str, Any]) -> "Check":
        """The check with a scenario's variables put in.

        Raises:
            ConfigError: a variable is missing, or with its value the pattern is no regular expression.
        """
        texts = {}
        for name in ("contains", "not_contains", "regex", "not_regex", "equals"):
            if isinstance(value := getattr(self, name), str):
                try:
                    texts[name] = render(value, variables)
                except ConfigError as e:
                    raise ConfigError(f"check {self.title}: {e}") from None
        bound = replace(self, name=self.title, **texts)
        for name in ("regex", "not_regex"):
            if getattr(bound, name) is not None:
                _compiled(getattr(bound, name), self.ignore_case)
        return bound

    def why_not(self, text: str, tokens: int | None = None) -> str | None:
        """Why an answer does not pass; None if it does."""
        fold = str.casefold if self.ignore_case else str
        if self.kind == "contains":
            return None if fold(self.contains) in fold(text) else f"does not contain {_short(self.contains)}"
        if self.kind == "not_contains":
            return None if fold(self.not_contains) not in fold(text) else f"contains {_short(self.not_contains)}"
        if self.kind == "regex":
            match = _compiled(self.regex, self.ignore_case).search(text)
            return None if match else f"nothing matches {_short(self.regex)}"
        if self.kind == "not_regex":
            match = _compiled(self.not_regex, self.ignore_case).search(text)
            return f"{_short(match[0])} matches {_short(self.not_regex)}" if match else None
        if self.kind == "max_length":
            return self._why_too_long(text, tokens)
        if self.kind == "equals":
            return None if fold(str(self.equals)).strip() == fold(text).strip() else f"is not {_short(self.equals)}"
        return self._why_not_json(text)

    def _why_too_long(self, text: str, tokens: int | None) -> str | None:
        if self.unit == "tokens" and tokens is None:
            return "the server did not say how many tokens it has"
        length = {"characters": len(text), "words": len(text.split()), "tokens": tokens}[self.unit]
        return None if length <= self.max_length else f"has {length} {self.unit}, more than {self.max_length}"

    def _why_not_json(self, text: str) -> str | None:
        fenced = _FENCE.fullmatch(text)
        try:
            value = json.loads(fenced[1] if fenced else text, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as e:
            return f"is no JSON: {e}"
        for step in steps_of(self.json):
            try:
                value = value[step] if isinstance(value, list if isinstance(step, int) else dict) else NOTHING
            except LookupError:
                value = NOTHING
            if value is NOTHING:
                return None if self.exists is False else f"has no {self.json}"
        if self.exists is False:
            return f"has {self.json}: {_short(value)}"
        if self.equals is NOTHING or _same(value, self.equals, self.ignore_case):
            return None
        return f"{self.json} is {_short(value)}, not {_short(self.equals)}"


def steps_of(path: str) -> list[str | int]:
    """The keys and numbers in a path such as "$.items[0].name" or "items[0].name". "$" stands for the whole answer.

    Raises:
        ConfigError: it is no path.
    """
    rest, steps, at = path.removeprefix("$"), [], 0
    while at < len(rest):
        match = _STEP.match(rest, at)
        if match is None:
            raise ConfigError(f"json is a path such as items[0].name, or $ for the whole answer, got {path!r}")
        steps.append(match[1] if match[1] is not None else int(match[2]))
        at = match.end()
    if not path:
        raise ConfigError("json is a path such as items[0].name, or $ for the whole answer; it is empty")
    return steps


def _same(value: Any, expected: Any, ignores_case: bool) -> bool:
    """Whether JSON's value is what YAML expects. The text "3", which a template may give, also equals the number 3."""
    if isinstance(expected, str) and isinstance(value, str):
        return value.casefold() == expected.casefold() if ignores_case else value == expected
    if isinstance(expected, str):
        return json.dumps(value, ensure_ascii=False) == expected
    if isinstance(expected, bool) or isinstance(value, bool):
        return value is expected
    return value == expected


def _compiled(pattern: str, ignores_case: bool) -> re.Pattern:
    try:
        return re.compile(pattern, re.IGNORECASE if ignores_case else 0)
    except re.error as e:
        raise ConfigError(f"regex {_short(pattern)} is no regular expression: {e}") from None


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 4]} ..."


def _refuse_constant(name: str):
    raise ValueError(f"{name} is no number of JSON's")
