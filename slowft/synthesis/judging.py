"""Has a model mark answers as `slowft score --judge` does: expected values over digits, in one pass for all rows.

Two answers to a question are judged in both orders, because judges prefer the first (2306.05685). The first answer is
better with the probability of the digit 1 against 2.
"""

import itertools
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from ..data.files import Found
from ..data.tokenizer import load_tokenizer
from ..engine.budget import default_memory
from ..engine.model import open_model
from ..inference import questions
from ..inference.passes import n_visits
from ..inference.score import BASE
from ..reports.base import Report, late_bar
from .recipe import Judge, Recipe
from .rows import Row, answer_of, prompt_of, without_reasoning
from .seeds import filled

LEAST_SHARE = 0.5  # with less probability on marks, the judge did not understand what it is asked for


def judge(recipe: Recipe, rows: Iterable[Row], report: Report) -> list[questions.Mark]:
    """The judge's marks for the prompts of `asked`, in the same order."""
    return _marks(recipe, asked(rows, recipe.judge), questions.parse_marks(recipe.judge.marks), report)


def preferences(recipe: Recipe, pairs: Iterable[tuple[str, str, str]], report: Report) -> list[float]:
    """For each (question, answer, other answer) the probability that the answer is better, the mean of both orders."""
    pairs = list(pairs)
    prompts = (
        filled(recipe.judge.pair_prompt, question=question, first=first, second=second)
        for question, one, other in pairs
        for first, second in ((one, other), (other, one))
    )
    marks = iter(_marks(recipe, prompts, [1, 2], report))
    return [(next(marks).probabilities[1] + next(marks).probabilities[2]) / 2 for _ in pairs]


def _marks(recipe: Recipe, prompts: Iterable[str], digits: list[int], report: Report) -> list[questions.Mark]:
    model = open_model(
        recipe.model_path(recipe.judge.model or recipe.model),
        default_memory() if recipe.memory is None else recipe.memory,
        compute_dtype=recipe.compute_dtype,
        trust_remote_code=recipe.trust_remote_code,
    )
    try:
        tokenizer = load_tokenizer(model.path, model.embedding_rows, recipe.trust_remote_code)
        samples = (Found("judged answers", "number", i + 1, {"prompt": p}) for i, p in enumerate(prompts))
        tokens, places, ids = questions.to_judge(samples, questions.Prompts(tokenizer), digits, sys.maxsize)
        model.budget.measure_anew()  # now that the tokenizer and the rows are in memory
        with late_bar(report, n_visits(model, tokens, [False])) as on_visit:
            marks = questions.judge(model, tokens, places, digits, ids, {BASE: False}, on_visit)[BASE]
        share = sum(mark.share for mark in marks) / len(marks)
        if share < LEAST_SHARE:
            report.note(
                f"Warning: the judge would reply with a mark in only {100 * share:.0f}% of cases. Say in its prompt "
                "that it shall reply with one number and nothing else"
            )
        return marks
    finally:
        model.close()


def asked(rows: Iterable[Row], how: Judge) -> Iterator[str]:
    """The judge's prompts. For each question: one for each answer, then one for each pair of answers in both orders."""
    marks = questions.parse_marks(how.marks)
    for answers in by_question(rows):
        question = prompt_of(answers[0])
        texts = [without_reasoning(answer_of(row)) for row in answers]
        for text in texts:
            yield filled(how.prompt, question=question, answer=text, low=marks[0], high=marks[-1])
        for first, second in itertools.permutations(texts, 2) if how.pairs else ():
            yield filled(how.pair_prompt, question=question, first=first, second=second)


def by_question(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """The answers to each question, which follow each other in the rows."""
    for _, answers in itertools.groupby(rows, key=lambda row: row.get("question_id", row["id"])):
        yield list(answers)


def judged(
    rows: Iterable[Row], marks: Iterable[questions.Mark], how: Judge
) -> Iterator[tuple[Row, dict[str, Any], str | None]]:
    """(row with its mark, what its history says, why it is left out) for each row."""
    remaining = iter(marks)
    for answers in by_question(rows):
        own_marks = [next(remaining) for _ in answers]
        numbers = range(len(answers))
        better = {}  # (i, j) -> probability that i is better than j
        for i, j in itertools.permutations(numbers, 2) if how.pairs else ():
            digits = next(remaining).probabilities
            first = digits[1] / max(digits[1] + digits[2], 1e-300)
            better[i, j] = better.get((i, j), 0.0) + first / 2
            better[j, i] = better.get((j, i), 0.0) + (1 - first) / 2
        values = [mark.value for mark in own_marks]
        if better:  # an answer is worth the sum of its chances against all others
            values = [sum(better[i, j] for j in numbers if j != i) for i in numbers]
        best, worst = max(numbers, key=lambda i: (values[i], -i)), min(numbers, key=lambda i: (values[i], -i))
        for i, (row, mark) in enumerate(zip(answers, own_marks)):
            row = row | {"mark": round(mark.value, 4)}
            entry = {
                "mark": row["mark"],
                "marks": how.marks,
                "on_marks": round(mark.share, 4),
                "threshold": how.threshold,
            }
            why = None
            if mark.value < how.threshold:
                why = "mark below the threshold"
            elif how.keep == "best" and i != best:
                why = "not the best answer"
            if better and i == best != worst and better[best, worst] > 0.5:
                other = answers[worst]
                row["rejected"] = {
                    "id": other["id"],
                    "content": answer_of(other),
                    "mark": round(own_marks[worst].value, 4),
                }
                entry["preferred_to"], entry["preference"] = other["id"], round(better[best, worst], 4)
            yield row, entry, why
