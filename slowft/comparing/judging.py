"""Two answers to one question before a judge, in both orders: judges like the first (2306.05685), so only a verdict
that is the same both ways counts, and everything else is a tie.

A local judge generates nothing: of 0, 1 and 2 the one it holds for the most probable is its verdict, all pairs in one
pass over the weights (`inference/questions.py`). A judge behind an API is asked as any other.
"""

import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..data.files import Found
from ..errors import ConfigError
from ..inference import questions
from ..inference.passes import n_visits
from ..reports.base import Report, late, late_bar
from .answers import Answers, key_of
from .cells import Cell
from .local import judging_model
from .remote import Asking, Upstream
from .scenarios import question_of
from .suite import Suite
from .templates import render

MARKS = [0, 1, 2]  # neither is better, the first, the second
LEAST_SHARE = 0.5  # of probability on marks, below which the judge did not understand what it is asked for
REPLY_TOKENS = 16


@dataclass
class Verdict:
    """On two cells of a scenario: `better` is "first", "second" or "tie".

    Attributes:
        row, first, second: numbers of the scenario and the variants.
        orders: what the judge said, the first answer first and the second first; None where it said nothing clear.
        why: there is no verdict.
    """

    row: int
    first: int
    second: int
    better: str = "tie"
    orders: tuple[int | None, int | None] | None = None
    why: str | None = None


def judged(suite: Suite, cells: Sequence[Cell], answers: Answers, report: Report) -> list[Verdict]:
    """Each variant's answers against those of the first one, or of the baseline."""
    if suite.judging is None:
        return []
    by_place = {(cell.row, cell.column): cell for cell in cells}
    verdicts, asked = [], {}
    for cell in cells:
        base = by_place[cell.row, suite.first]
        if cell is base:
            continue
        verdict = Verdict(cell.row, suite.first, cell.column)
        verdicts.append(verdict)
        if cell.text is None or base.text is None:
            verdict.why = "one has no answer"
        elif cell.text.strip() == base.text.strip():
            verdict.why = "the same answer"  # which needs no judge
        else:
            for number, (first, second) in enumerate(((base, cell), (cell, base))):
                asked[id(verdict), number] = _prompt(suite, first, second)
    said, errors = _ask(suite, list(dict.fromkeys(asked.values())), answers, report)
    for verdict in verdicts:
        if verdict.why is not None:
            continue
        prompts = [asked[id(verdict), number] for number in (0, 1)]
        verdict.orders = said.get(prompts[0]), said.get(prompts[1])
        verdict.better = {(1, 2): "first", (2, 1): "second"}.get(verdict.orders, "tie")
        verdict.why = next((errors[prompt] for prompt in prompts if prompt in errors), None)
    return verdicts


def _prompt(suite: Suite, first: Cell, second: Cell) -> str:
    template = suite.judge.prompt
    scenario = first.scenario
    # the question of neither variant: what they were asked may differ in words
    question = question_of(scenario.messages or first.messages)
    given = {"question": question, "first": first.text, "second": second.text}
    try:
        return render(template, scenario.for_templates | given)
    except ConfigError as e:
        raise ConfigError(f"{suite.file.name}: judge: scenario {scenario.name}: prompt: {e}") from None


def _ask(
    suite: Suite, prompts: list[str], answers: Answers, report: Report
) -> tuple[dict[str, int | None], dict[str, str]]:
    """(what the judge says, why it says nothing) by prompt."""
    if not prompts:
        return {}, {}
    if suite.judging.upstream is not None:
        return _ask_upstream(suite, prompts, answers, report)
    return _ask_local(suite, prompts, answers, report), {}


def _ask_local(suite: Suite, prompts: list[str], answers: Answers, report: Report) -> dict[str, int | None]:
    with judging_model(suite, suite.judging) as (local, adapter, about):
        found = (Found("judged answers", "number", i + 1, {"prompt": prompt}) for i, prompt in enumerate(prompts))
        rows, places, ids = questions.to_judge(found, questions.Prompts(local.tokenizer), MARKS, sys.maxsize)
        keys = [key_of(about | {"judged": list(row.tokens), "marks": ids}) for row in rows]
        left = [i for i, key in enumerate(keys) if answers.get(key) is None]
        if left:
            local.model.budget.measure_anew()  # with tokenizer and rows in memory
            rows, places = [rows[i] for i in left], [places[i] for i in left]
            with late_bar(report, n_visits(local.model, rows, [adapter])) as on_visit:
                marks = questions.judge(local.model, rows, places, MARKS, ids, {"judge": adapter}, on_visit)["judge"]
            for i, mark in zip(left, marks):
                probabilities = [round(mark.probabilities[m], 6) for m in MARKS]
                answers.add(keys[i], {"probabilities": probabilities, "share": round(mark.share, 6)})
    known = [answers.get(key) for key in keys]
    share = sum(one["share"] for one in known) / len(known)
    if share < LEAST_SHARE:
        report.note(
            f"Warning: the judge would reply with 0, 1 or 2 in only {100 * share:.0f}% of cases. Say in its prompt "
            "that it shall reply with one of them and nothing else"
        )
    return {prompt: _most_probable(one["probabilities"]) for prompt, one in zip(prompts, known)}


def _most_probable(probabilities: list[float]) -> int | None:
    best = max(probabilities)
    if not math.isfinite(best) or probabilities.count(best) > 1:
        return None
    return MARKS[probabilities.index(best)]


def _ask_upstream(
    suite: Suite, prompts: list[str], answers: Answers, report: Report
) -> tuple[dict[str, int | None], dict[str, str]]:
    upstream = Upstream(suite, suite.judging)
    jobs, keys = [], {}
    for prompt in prompts:
        body: dict[str, Any] = {"model": upstream.who.model, "messages": [{"role": "user", "content": prompt}]}
        body |= {"max_tokens": REPLY_TOKENS, "temperature": 0.0} | upstream.who.extra
        body = {name: value for name, value in body.items() if value is not None}
        keys[prompt] = upstream.key_of(body)
        if answers.get(keys[prompt]) is None:
            jobs.append((upstream, body, keys[prompt]))
    asking = Asking(jobs, suite.at_once, answers)
    try:
        failed = {key: why for key, _, why in late(report, asking, "Judging", asking.n) if why is not None}
    finally:
        asking.stop()
    errors = {prompt: f"the judge: {failed[key]}" for prompt, key in keys.items() if key in failed}
    return {p: said_of(answers.get(key)["text"]) for p, key in keys.items() if key not in failed}, errors


def said_of(reply: str) -> int | None:
    """0, 1 or 2 if a reply names one of them and no other."""
    found = set(re.findall(r"(?<![\w.])[012](?![\w]|\.\d)", reply))
    return int(found.pop()) if len(found) == 1 else None
