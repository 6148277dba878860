"""Has a judge compare two answers to a question, in both orders.

Judges prefer the first answer (2306.05685). So a verdict counts only if it is the same in both orders, and everything
else is a tie. A local judge generates nothing: its verdict is the most probable of the digits 0, 1 and 2, and all pairs
go through the weights in one pass (`inference/questions.py`). A judge behind an API replies like any other model.
"""

import itertools
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

MARKS = [0, 1, 2]  # neither answer is better, the first is, the second is
LEAST_SHARE = 0.5  # with less probability on marks, the judge did not understand what it is asked for
REPLY_TOKENS = 16  # the most tokens of a reply


@dataclass
class Verdict:
    """The verdict on two cells of a scenario.

    Attributes:
        row, first, second: numbers of the scenario and the variants.
        better: "first", "second" or "tie".
        orders: the judge's marks with the first answer first, and with the second first; None for an unclear reply.
        why: why there is no verdict.
    """

    row: int
    first: int
    second: int
    better: str = "tie"
    orders: tuple[int | None, int | None] | None = None
    why: str | None = None


def judged(suite: Suite, cells: Sequence[Cell], answers: Answers, report: Report) -> list[Verdict]:
    """The verdicts on each variant's answers against those of the baseline."""
    if suite.judging is None:
        return []
    by_place = {(cell.row, cell.column): cell for cell in cells}
    verdicts: list[Verdict] = []
    prompts: dict[int, tuple[str, str]] = {}  # number of a verdict -> the judge's prompts in both orders
    for cell in cells:
        base = by_place[cell.row, suite.first]
        if cell is base:
            continue
        verdict = Verdict(cell.row, suite.first, cell.column)
        verdicts.append(verdict)
        if cell.text is None or base.text is None:
            verdict.why = "one has no answer"
        elif cell.text.strip() == base.text.strip():
            verdict.why = "the same answer"  # no judge is needed
        else:
            prompts[len(verdicts) - 1] = _prompt(suite, base, cell), _prompt(suite, cell, base)
    marks, errors = _ask(suite, list(dict.fromkeys(itertools.chain(*prompts.values()))), answers, report)
    for number, both_orders in prompts.items():
        verdict = verdicts[number]
        verdict.orders = tuple(marks.get(prompt) for prompt in both_orders)
        verdict.better = {(1, 2): "first", (2, 1): "second"}.get(verdict.orders, "tie")
        verdict.why = next((errors[prompt] for prompt in both_orders if prompt in errors), None)
    return verdicts


def _prompt(suite: Suite, first: Cell, second: Cell) -> str:
    template = suite.judge.prompt
    scenario = first.scenario
    # the scenario's question if it has one, because the variants may have been asked in different words
    question = question_of(scenario.messages or first.messages)
    variables = scenario.for_templates | {"question": question, "first": first.text, "second": second.text}
    try:
        return render(template, variables)
    except ConfigError as e:
        raise ConfigError(f"{suite.file.name}: judge: scenario {scenario.name}: prompt: {e}") from None


def _ask(
    suite: Suite, prompts: list[str], answers: Answers, report: Report
) -> tuple[dict[str, int | None], dict[str, str]]:
    """(the judge's marks, reasons why there is none), both by prompt."""
    if not prompts:
        return {}, {}
    if suite.judging.upstream is not None:
        return _ask_upstream(suite, prompts, answers, report)
    return _ask_local(suite, prompts, answers, report), {}


def _ask_local(suite: Suite, prompts: list[str], answers: Answers, report: Report) -> dict[str, int | None]:
    with judging_model(suite, suite.judging) as (local, adapter, about):
        samples = (Found("judged answers", "number", i + 1, {"prompt": prompt}) for i, prompt in enumerate(prompts))
        rows, places, ids = questions.to_judge(samples, questions.Prompts(local.tokenizer), MARKS, sys.maxsize)
        keys = [key_of(about | {"judged": list(row.tokens), "marks": ids}) for row in rows]
        unknown = [i for i, key in enumerate(keys) if answers.get(key) is None]
        if unknown:
            local.model.budget.measure_anew()  # now that the tokenizer and the rows are in memory
            rows, places = [rows[i] for i in unknown], [places[i] for i in unknown]
            with late_bar(report, n_visits(local.model, rows, [adapter])) as on_visit:
                marks = questions.judge(local.model, rows, places, MARKS, ids, {"judge": adapter}, on_visit)["judge"]
            for i, mark in zip(unknown, marks):
                probabilities = [round(mark.probabilities[m], 6) for m in MARKS]
                answers.add(keys[i], {"probabilities": probabilities, "share": round(mark.share, 6)})
    judged_answers = [answers.get(key) for key in keys]
    share = sum(one["share"] for one in judged_answers) / len(judged_answers)
    if share < LEAST_SHARE:
        report.note(
            f"Warning: the judge would reply with 0, 1 or 2 in only {100 * share:.0f}% of cases. Say in its prompt "
            "that it shall reply with one of them and nothing else"
        )
    return {prompt: _most_probable(one["probabilities"]) for prompt, one in zip(prompts, judged_answers)}


def _most_probable(probabilities: list[float]) -> int | None:
    """The most probable mark; None if two are equally probable or a probability is not finite."""
    best = max(probabilities)
    if not math.isfinite(best) or probabilities.count(best) > 1:
        return None
    return MARKS[probabilities.index(best)]


def _ask_upstream(
    suite: Suite, prompts: list[str], answers: Answers, report: Report
) -> tuple[dict[str, int | None], dict[str, str]]:
    upstream = Upstream(suite, suite.judging)
    requests, keys = [], {}
    for prompt in prompts:
        body: dict[str, Any] = {"model": upstream.who.model, "messages": [{"role": "user", "content": prompt}]}
        body |= {"max_tokens": REPLY_TOKENS, "temperature": 0.0} | upstream.who.extra
        body = {name: value for name, value in body.items() if value is not None}
        keys[prompt] = upstream.key_of(body)
        if answers.get(keys[prompt]) is None:
            requests.append((upstream, body, keys[prompt]))
    asking = Asking(requests, suite.at_once, answers)
    try:
        failed = {key: why for key, _, why in late(report, asking, "Judging", asking.n) if why is not None}
    finally:
        asking.stop()
    errors = {prompt: f"the judge: {failed[key]}" for prompt, key in keys.items() if key in failed}
    return {p: said_of(answers.get(key)["text"]) for p, key in keys.items() if key not in failed}, errors


def said_of(reply: str) -> int | None:
    """The mark 0, 1 or 2 that a reply names; None if it names none, or several."""
    digits = set(re.findall(r"(?<![\w.])[012](?![\w]|\.\d)", reply))
    return int(digits.pop()) if len(digits) == 1 else None
