"""Has the large model write questions and answers: rows become prompts, and what the model writes goes into the rows.

The generation is that of `slowft generate`. What is finished is in a file of its format, and a run that was stopped
goes on from there.
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
from .rows import ANSWER_FIELDS, Row, lines, whole_lines, with_answer, without_reasoning, written
from .rules import Rules, checked
from .seeds import filled

MARK = "slowft-user"  # stands for a user's words in a chat template
RULES_FOR_QUESTIONS = Rules(json=None)  # whatever the recipe's rules for answers are


def open_session(recipe: Recipe, settings: Settings) -> Session:
    adapter = None if recipe.adapter_path is None else str(recipe.path(recipe.adapter_path))
    template = None if recipe.chat_template is None else str(recipe.path(recipe.chat_template))
    without_subclass_fields = Settings(**{f.name: getattr(settings, f.name) for f in fields(Settings)})
    return Session(
        recipe.model_path(recipe.model),
        without_subclass_fields,
        adapter,
        recipe.memory,
        recipe.compute_dtype,
        recipe.trust_remote_code,
        template,
    )


# --- Questions ------------------------------------------------------------------------------------------


def write_questions(recipe: Recipe, rows: list[Row], into: Path, report: Any) -> None:
    """Have the model write the questions of these rows, which have none."""
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
    """(row with its question, what its history says, why it is left out). A row that had a question passes as it is."""
    answers = lines(generated) if generated.exists() else iter(())
    for row in rows:
        if "messages" in row:
            yield row, {}, None
            continue
        answer = next(answers)
        asked = row.pop("ask", None) or answer["prompt"]
        row.pop("opening", None)
        as_answer = {"id": row["id"], "messages": [{"role": "user", "content": asked}]}
        as_answer = with_answer(as_answer, answer["text"]) | {"finish_reason": answer["finish_reason"]}
        ((_, why),) = checked([as_answer], RULES_FOR_QUESTIONS)
        row["messages"] = [{"role": "user", "content": without_reasoning(answer["text"])}]
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
    """(row with its answer, what its history says, None) for each answer."""
    answers = lines(generated)
    for row in rows:
        instruction = _instruction(row)
        asked = {} if instruction is None else {"asked": instruction}
        row = {key: value for key, value in row.items() if key not in ("answer_prompt", "put_in")}
        for name in answer_ids(row, count):
            answer = next(answers)
            answered = with_answer(row | {"id": name, "question_id": row["id"]}, answer["text"])
            yield answered | {"finish_reason": answer["finish_reason"]}, asked | _facts(answer), None


def _question(row: Row) -> Prompt:
    """What the model is asked. A single question goes as text, so that models without a chat template take it too."""
    messages, instruction = row["messages"], _instruction(row)
    if instruction is not None:
        messages = [{"role": "user", "content": instruction}]
    return messages[0]["content"] if len(messages) == 1 and messages[0]["role"] == "user" else messages


def _instruction(row: Row) -> str | None:
    """The filled `answer_prompt`, which the model gets in place of the question; None if the row has none."""
    if "answer_prompt" not in row:
        return None
    return filled(row["answer_prompt"], question=row["messages"][-1]["content"], **row["put_in"])


def _answer_into(session: Session, into: Path, asked: list[Asked], report: Any) -> None:
    """Answer what is not answered yet.

    Answers that only another recipe asked for go to a second file, and come back if they are asked for again.
    """
    prompts = {json.dumps(one.id): one.prompt for one in asked}
    about = json.loads(json.dumps({key: value for key, value in session.about().items() if key in SAME}))
    unused_file = into.with_name(into.name.replace(".jsonl", ".unused.jsonl"))
    used, unused, n_moved = {}, [], 0
    for file in (into, unused_file):
        for line in whole_lines(file):
            row = json.loads(line)
            name = json.dumps(row["id"])
            fits = name in prompts and row["prompt"] == prompts[name] and about.items() <= row.items()
            if fits and name not in used:
                used[name] = line
                n_moved += file is unused_file
            else:
                unused.append(line)
                n_moved += file is into
    if n_moved:
        with written(unused_file, into, optional=[unused_file]) as (unused_out, out):
            for line in unused:
                unused_out.line(line)
            for line in used.values():
                out.line(line)
    session.answer_into(into, asked, report)


def _asked(session: Session, name: str, prompt: Prompt) -> Asked:
    return replace(session.asked(prompt), id=name)


def _facts(answer: Row) -> dict[str, Any]:
    return {key: answer[key] for key in ANSWER_FIELDS if answer.get(key) is not None}
