"""What an answer must be: checks as a suite states them, and why an answer fails one. Nothing here asks a model."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..errors import ConfigError
from .templates import check_template, render

KINDS = ("contains", "not_contains", "regex", "not_regex", "json", "equals", "max_length")
UNITS = ("characters", "words", "tokens")
NOTHING = object()  # YAML's null is a value
SHOWN = 60  # characters of an answer or a pattern in a reason

_STEP = re.compile(r"\.?([^.\[\]]+)|\[(-?\d+)\]")
_FENCE = re.compile(r"\s*```(?:json)?\s*\n(.*?)\n?\s*```\s*", re.DOTALL | re.IGNORECASE)


@dataclass(frozen=True)
class Check:
    """One check. Texts are templates of the scenario's variables; `example.yaml` explains the fields."""

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
        """Its name, or what it is in words."""
        if self.name:
            return self.name
        what = getattr(self, self.kind)
        if self.kind == "json":
            wanted = "" if self.equals is NOTHING else f" is {_short(self.equals)}"
            return f"json {what}{' is not there' if self.exists is False else wanted}"
        if self.kind == "max_length":
            return f"at most {what} {self.unit}"
        return f"{self.kind.replace('_', ' ')} {_short(what)}"

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
        """With a scenario's variables put in.

        Raises:
            ConfigError: one is missing, or it makes a pattern that is none.
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
        """Why an answer does not pass, None if it does."""
        fold = str.casefold if self.ignore_case else str
        if self.kind == "contains":
            return None if fold(self.contains) in fold(text) else f"does not contain {_short(self.contains)}"
        if self.kind == "not_contains":
            return None if fold(self.not_contains) not in fold(text) else f"contains {_short(self.not_contains)}"
        if self.kind == "regex":
            found = _compiled(self.regex, self.ignore_case).search(text)
            return None if found else f"nothing matches {_short(self.regex)}"
        if self.kind == "not_regex":
            found = _compiled(self.not_regex, self.ignore_case).search(text)
            return f"{_short(found[0])} matches {_short(self.not_regex)}" if found else None
        if self.kind == "max_length":
            return self._too_long(text, tokens)
        if self.kind == "equals":
            return None if fold(str(self.equals)).strip() == fold(text).strip() else f"is not {_short(self.equals)}"
        return self._of_json(text)

    def _too_long(self, text: str, tokens: int | None) -> str | None:
        if self.unit == "tokens" and tokens is None:
            return "the server did not say how many tokens it has"
        length = {"characters": len(text), "words": len(text.split()), "tokens": tokens}[self.unit]
        return None if length <= self.max_length else f"has {length} {self.unit}, more than {self.max_length}"

    def _of_json(self, text: str) -> str | None:
        fenced = _FENCE.fullmatch(text)
        try:
            value = json.loads(fenced[1] if fenced else text, parse_constant=_no_number)
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
    """Of "$.items[0].name" or "items[0].name": keys and numbers; "$" is the whole.

    Raises:
        ConfigError: it is no path.
    """
    rest, steps, at = path.removeprefix("$"), [], 0
    while at < len(rest):
        found = _STEP.match(rest, at)
        if found is None:
            raise ConfigError(f"json is a path such as items[0].name, or $ for the whole answer, got {path!r}")
        steps.append(found[1] if found[1] is not None else int(found[2]))
        at = found.end()
    if not path:
        raise ConfigError("json is a path such as items[0].name, or $ for the whole answer; it is empty")
    return steps


def _same(value: Any, wanted: Any, ignores_case: bool) -> bool:
    """Whether JSON has what YAML says; a text such as "3", which a template gave, is also the number 3."""
    if isinstance(wanted, str) and isinstance(value, str):
        return value.casefold() == wanted.casefold() if ignores_case else value == wanted
    if isinstance(wanted, str):
        return json.dumps(value, ensure_ascii=False) == wanted
    if isinstance(wanted, bool) or isinstance(value, bool):
        return value is wanted
    return value == wanted


def _compiled(pattern: str, ignores_case: bool) -> re.Pattern:
    try:
        return re.compile(pattern, re.IGNORECASE if ignores_case else 0)
    except re.error as e:
        raise ConfigError(f"regex {_short(pattern)} is no regular expression: {e}") from None


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 4]} ..."


def _no_number(name: str):
    raise ValueError(f"{name} is no number of JSON's")
