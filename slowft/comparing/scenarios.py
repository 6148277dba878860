"""Makes the rows of a comparison: a suite's own scenarios, those of data files, and recorded requests.

Comes in: a suite. Goes out: `Scenario`s with their variables, the conversation so far, and their checks. Nothing here
depends on a variant or asks a model.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..data.files import SUFFIXES, Features, Source
from ..data.samples import BadSample, Chat, form_of, understand
from ..errors import ConfigError, DataError
from ..requests import texts
from ..requests.filters import parse
from ..requests.store import RequestStore
from .checks import Check
from .suite import Scenarios, Suite

# fields of a recorded request's body that variants are asked with too
REQUEST_FIELDS = ("tools", "tool_choice", "response_format")


@dataclass(frozen=True)
class Scenario:
    """One row.

    Attributes:
        variables: values for templates.
        messages: the conversation before the answer; None: the variant's prompt makes it.
        answer: the earlier answer, if it is known.
        body: further fields of the request, such as tools.
        checks: the checks with the variables put in.
        request: the id in the file of recorded requests.
    """

    name: str
    variables: dict[str, Any]
    messages: list[dict[str, Any]] | None = None
    answer: str | None = None
    body: dict[str, Any] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)
    request: int | None = None

    @property
    def for_templates(self) -> dict[str, Any]:
        """The variables, with `question`, `messages` and `answer` if they are known."""
        values: dict[str, Any] = {}
        if self.messages is not None:
            values |= {"messages": self.messages, "question": question_of(self.messages)}
        if self.answer is not None:
            values["answer"] = self.answer
        return values | self.variables


def question_of(messages: list[dict[str, Any]]) -> str:
    """What the user said last."""
    return next((texts.content_text(m.get("content")) for m in reversed(messages) if m.get("role") == "user"), "")


def scenarios_of(suite: Suite) -> list[Scenario]:
    """All rows of a suite.

    Raises:
        ConfigError: two rows have the same name, or a check uses a variable that a row does not have.
        DataError: a file or a request cannot be read.
    """
    scenarios: list[Scenario] = []
    for number, source in enumerate(suite.scenarios, 1):
        for scenario in _read(suite, source, number):
            try:
                checks = [check.bound(scenario.for_templates) for check in (*suite.checks, *source.checks)]
            except ConfigError as e:
                raise ConfigError(f"{suite.file.name}: scenario {scenario.name}: {e}") from None
            scenarios.append(replace(scenario, checks=checks))
    names = [scenario.name for scenario in scenarios]
    if len(set(names)) < len(names):
        name = max(names, key=names.count)
        raise ConfigError(f"{suite.file.name}: two scenarios are named {name}. Give each its own name")
    return scenarios


def _read(suite: Suite, source: Scenarios, number: int) -> Iterator[Scenario]:
    if source.file is not None:
        rows = _of_file(suite.path(source.file), source)
    elif source.requests is not None:
        rows = _of_requests(suite.path(source.requests), source)
    else:
        name = source.name or str(number)
        yield Scenario(name, dict(source.variables or {}), source.messages)
        return
    n = 0
    for row in rows:
        if source.limit is not None and n >= source.limit:
            break
        n += 1
        yield row
    if not n:
        raise DataError(f"{suite.file.name}: scenarios[{number}] finds nothing in {source.file or source.requests}")


def _of_file(file: Path, source: Scenarios) -> Iterator[Scenario]:
    """The scenarios of a file. If a row is a sample for `slowft finetune`, its last answer is `answer`."""
    if not file.is_file():
        raise DataError(f"{file} is not there. Give a file with a scenario a line")
    if not file.name.lower().endswith(SUFFIXES):
        raise DataError(f"{file} is of no kind that slowft reads. Give lines of JSON: scenarios.jsonl")
    for found in Source([file]).read():
        if found.reason or not isinstance(found.sample, dict):
            raise DataError(f"{found.place} {found.reason or 'is no object with names and values'}")
        row = found.sample
        name = f"{source.name or file.stem} {row.get('id', found.number)}"
        try:
            is_sample = form_of(row, Features()) != ("text",)
        except BadSample:
            is_sample = False
        if not is_sample:
            yield Scenario(name, row)
            continue
        try:
            chat = understand(row, Features())
        except BadSample as e:
            raise DataError(f"{found.place} {e}") from None
        assert isinstance(chat, Chat)
        messages, answer = chat.messages, None
        if messages and messages[-1].get("role") == "assistant":
            *messages, last = messages
            answer = texts.content_text(last.get("content"))
        if not messages:
            raise DataError(f"{found.place} has no question before its answer")
        body = {"tools": chat.tools} if chat.tools else {}
        others = {key: value for key, value in row.items() if key not in ("messages", "conversations", "tools")}
        yield Scenario(name, others, messages, answer, body)


def _of_requests(file: Path, source: Scenarios) -> Iterator[Scenario]:
    filters = [parse(text) for text in source.filters]
    with RequestStore(file, read_only=True) as store:
        for row in store.rows(filters):
            messages, body = texts.prompt_messages(row.request), row.request if isinstance(row.request, dict) else {}
            if not messages:
                continue
            answer = texts.answer_message(row.response) if row.status == "complete" else None
            text = answer and texts.message_text(answer)
            fields = {key: body[key] for key in REQUEST_FIELDS if key in body}
            name = f"{source.name or 'request'} {row.id}"
            yield Scenario(name, dict(row.tags), messages, text, fields, request=row.id)
