"""The rows of a comparison: a suite's own scenarios, those of data files, and recorded requests.

Comes in: a suite. Goes out: `Scenario`s with their variables, the conversation that goes on, and their checks. Knows no
variant and asks no model.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
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

OF_REQUEST = ("tools", "tool_choice", "response_format")  # of a recorded body, what a variant is asked with too


@dataclass(frozen=True)
class Scenario:
    """One row.

    Attributes:
        variables: of templates. messages: a conversation to go on with, without its answer; None: the prompt makes it.
        answer: what was answered before, where that is known.
        body: fields of a recorded request that belong to what is asked.
        checks: with the variables put in.
        request: id in the file of recorded requests.
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
        """The variables, and `question`, `messages` and `answer` where they are known."""
        known: dict[str, Any] = {}
        if self.messages is not None:
            known |= {"messages": self.messages, "question": question_of(self.messages)}
        if self.answer is not None:
            known["answer"] = self.answer
        return known | self.variables


def question_of(messages: list[dict[str, Any]]) -> str:
    """What the user said last."""
    return next((texts.content_text(m.get("content")) for m in reversed(messages) if m.get("role") == "user"), "")


def scenarios_of(suite: Suite) -> list[Scenario]:
    """All rows of a suite.

    Raises:
        ConfigError: two have one name, or a check uses a variable that one of them does not have.
        DataError: a file or a request that cannot be read.
    """
    found: list[Scenario] = []
    for number, source in enumerate(suite.scenarios, 1):
        for one in _read(suite, source, number):
            bound = []
            for check in (*suite.checks, *source.checks):
                try:
                    bound.append(check.bound(one.for_templates))
                except ConfigError as e:
                    raise ConfigError(f"{suite.file.name}: scenario {one.name}: {e}") from None
            found.append(_with_checks(one, bound))
    names = [one.name for one in found]
    if len(set(names)) < len(names):
        name = max(names, key=names.count)
        raise ConfigError(f"{suite.file.name}: two scenarios are named {name}. Give each its own name")
    return found


def _with_checks(one: Scenario, checks: list[Check]) -> Scenario:
    return Scenario(one.name, one.variables, one.messages, one.answer, one.body, checks, one.request)


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
    for one in rows:
        if source.limit is not None and n >= source.limit:
            break
        n += 1
        yield one
    if not n:
        raise DataError(f"{suite.file.name}: scenarios[{number}] finds nothing in {source.file or source.requests}")


def _of_file(file: Path, source: Scenarios) -> Iterator[Scenario]:
    """Samples that `slowft finetune` reads: their last answer becomes `answer`. Other rows are variables."""
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
            form = form_of(row, Features())
        except BadSample:
            yield Scenario(name, row)
            continue
        if form == ("text",):
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
            said = texts.answer_message(row.response) if row.status == "complete" else None
            kept = {key: body[key] for key in OF_REQUEST if key in body}
            name = f"{source.name or 'request'} {row.id}"
            yield Scenario(name, dict(row.tags), messages, said and texts.message_text(said), kept, request=row.id)
