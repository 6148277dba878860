"""Questions and answers by the large model: rows become prompts of a generation, its answers become parts of the rows.

The generation is `slowft generate`'s: what is finished is in a file of its format, and a run that was stopped goes on
with it.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from ..errors import DataError, first_line
from ..inference.prompts import Asked, Prompt
from ..inference.results import SAME
from ..inference.session import Session, Settings
from .recipe import Recipe
from .rows import OF_ANSWER, Row, lines, said, whole_lines, with_answer, written
from .rules import Rules, checked
from .seeds import filled

MARK = "slowft-user"
# What a question must pass, whatever the rules for answers are.
OF_QUESTIONS = Rules(json=None)


def open_session(recipe: Recipe, settings: Settings) -> Session:
    adapter = None if recipe.adapter_path is None else str(recipe.path(recipe.adapter_path))
    template = None if recipe.chat_template is None else str(recipe.path(recipe.chat_template))
    plain = Settings(**{f.name: getattr(settings, f.name) for f in fields(Settings)})
    return Session(
        recipe.model_path(recipe.model),
        plain,
        adapter,
        recipe.memory,
        recipe.compute_dtype,
        recipe.trust_remote_code,
        template,
    )


# --- Questions ------------------------------------------------------------------------------------------


def write_questions(recipe: Recipe, rows: list[Row], into: Path, report: Any) -> None:
    """Have the model write the questions of rows that have none."""
    with open_session(recipe, recipe.questions) as session:
        ends: set[str] = set()
        asked = []
        for row in rows:
            if "opening" in row:
                opening, end = user_opening(session.tokenizer, row["opening"])
                ends |= {end} if end else set()
                tokens = list(session.tokenizer.encode(opening, add_special_tokens=False))
                asked.append(Asked(row["id"], opening, tokens))
            else:
                asked.append(_asked(session, row["id"], row["ask"]))
        if ends:
            session.settings = replace(session.settings, stop=[*session.settings.stop, *sorted(ends)])
        _answer_into(session, into, asked, report)


def user_opening(tokenizer: Any, system: str = "") -> tuple[str, str]:
    """(what the chat template writes before a user's words, what it writes after them).

    Raises:
        DataError: there is no template, or none that takes a user's words as they are.
    """
    if not tokenizer.has_chat_template:
        raise DataError("seeds of kind template need a chat template, and the model has none. Give a chat_template")
    messages = [{"role": "user", "content": MARK}]
    if system:
        messages = [{"role": "system", "content": system}, *messages]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)
    except Exception as e:
        raise DataError(f"the model's chat template does not take these messages: {first_line(e)}") from None
    before, mark, after = text.rpartition(MARK)
    if not mark:
        raise DataError("the model's chat template does not write a user's words as they are: it has no opening")
    return before, after.strip()


def with_questions(rows: Iterable[Row], generated: Path) -> Iterator[tuple[Row, dict, str | None]]:
    """(row with its question, what its history says, why it is left out) of rows; one that had its question passes."""
    answers = lines(generated) if generated.exists() else iter(())
    for row in rows:
        if "messages" in row:
            yield row, {}, None
            continue
        answer = next(answers)
        asked = row.pop("ask", None) or answer["prompt"]
        row.pop("opening", None)
        tried = {"id": row["id"], "messages": [{"role": "user", "content": asked}]}
        tried = with_answer(tried, answer["text"]) | {"finish_reason": answer["finish_reason"]}
        ((_, why),) = checked([tried], OF_QUESTIONS)
        row["messages"] = [{"role": "user", "content": said(answer["text"])}]
        yield row, {"asked": asked} | _facts(answer), None if why is None else f"question: {why}"


# --- Answers --------------------------------------------------------------------------------------------


def write_answers(recipe: Recipe, rows: Iterable[Row], into: Path, report: Any) -> None:
    """Have the model answer every row's question as often as the recipe says."""
    with open_session(recipe, recipe.answers) as session:
        asked = [
            _asked(session, name, _question(row)) for row in rows for name in answer_ids(row, recipe.answers.count)
        ]
        _answer_into(session, into, asked, report)


def answer_ids(row: Row, count: int) -> list[str]:
    return [row["id"]] if count == 1 else [f"{row['id']}/{k}" for k in range(count)]


def with_answers(rows: Iterable[Row], generated: Path, count: int) -> Iterator[tuple[Row, dict, None]]:
    """(row with its answer, what its history says, None) of all answers of the rows."""
    answers = lines(generated)
    for row in rows:
        told = _told(row)
        asked = {} if told is None else {"asked": told}
        row = {key: value for key, value in row.items() if key not in ("answer_prompt", "put_in")}
        for name in answer_ids(row, count):
            answer = next(answers)
            made = with_answer(row | {"id": name, "question_id": row["id"]}, answer["text"])
            yield made | {"finish_reason": answer["finish_reason"]}, asked | _facts(answer), None


def _question(row: Row) -> Prompt:
    """What the model is asked. A single question goes as text, so that models without a chat template take it too."""
    messages, told = row["messages"], _told(row)
    if told is not None:
        messages = [{"role": "user", "content": told}]
    return messages[0]["content"] if len(messages) == 1 and messages[0]["role"] == "user" else messages


def _told(row: Row) -> str | None:
    """What the model is told in place of the question, if it is."""
    if "answer_prompt" not in row:
        return None
    return filled(row["answer_prompt"], question=row["messages"][-1]["content"], **row["put_in"])


def _answer_into(session: Session, into: Path, asked: list[Asked], report: Any) -> None:
    """Answer what is not answered yet. Answers that another recipe wanted are kept beside, in case that comes back."""
    wanted = {json.dumps(one.id): one.prompt for one in asked}
    about = json.loads(json.dumps({key: value for key, value in session.about().items() if key in SAME}))
    beside = into.with_name(into.name.replace(".jsonl", ".unused.jsonl"))
    used, unused, n_new = {}, [], 0
    for file in (into, beside):
        for line in whole_lines(file):
            row = json.loads(line)
            name = json.dumps(row["id"])
            fits = name in wanted and row["prompt"] == wanted[name] and about.items() <= row.items()
            if fits and name not in used:
                used[name] = line
                n_new += file is beside
            else:
                unused.append(line)
                n_new += file is into
    if n_new:
        with written(beside, into, optional=[beside]) as (out_beside, out):
            for line in unused:
                out_beside.line(line)
            for line in used.values():
                out.line(line)
    session.answer_into(into, asked, report)


def _asked(session: Session, name: str, prompt: Prompt) -> Asked:
    return replace(session.asked(prompt), id=name)


def _facts(answer: Row) -> dict[str, Any]:
    return {key: answer[key] for key in OF_ANSWER if answer.get(key) is not None}
