"""Multiple choice, exact match and a judge's marks: questions whose answers are scored in one pass, not generated.

Comes in: samples as they stand in a file. Goes out: rows of tokens, then scores made of their log-probabilities. No
text is generated or parsed: an answer is right if it is the most probable one.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..data.files import Features, Found
from ..data.samples import BadSample, string, understand
from ..data.tokenizer import one_line
from ..engine.log_probabilities import LogProbabilities
from ..errors import ConfigError, DataError
from .decoder import Decoder
from .passes import Row, log_probabilities

PROMPT_KEYS = ("messages", "prompt", "question")  # keys that a sample may have its prompt under
SHOWN = 20  # bad samples that an error names one by one


@dataclass(frozen=True)
class Question:
    """One question and the answers to score.

    Attributes:
        where: the sample's place, such as "test.jsonl line 7".
        rows: for each answer, the tokens of the prompt and of this answer.
        lengths: characters of each answer.
        right: number of the right answer.
    """

    where: str
    rows: list[Row]
    lengths: list[int]
    right: int


@dataclass(frozen=True)
class QuestionScore:
    """The score of one question with one adapter.

    Attributes:
        totals: log-probability of each answer, the sum over its tokens.
        chosen: number of the answer with the highest total. chosen_by_length: with the highest total per character.
        is_right, is_right_by_length: whether the chosen answer is the right one.
        is_exact: whether greedy decoding of the prompt begins with the right answer's tokens.
    """

    where: str
    totals: list[float]
    chosen: int
    chosen_by_length: int
    is_right: bool
    is_right_by_length: bool
    is_exact: bool


@dataclass(frozen=True)
class Mark:
    """A judge's mark.

    Attributes:
        value: the mean of the marks, weighted by their probabilities.
        share: the probability that the next token is one of the marks at all.
        probabilities: of each mark, relative to the others.
    """

    where: str
    value: float
    share: float
    probabilities: dict[int, float]


class Prompts:
    """Makes the text and the token ids that come before an answer.

    Args:
        uses_template: whether the chat template writes prompts; None: it does if the tokenizer has one.
    """

    def __init__(self, tokenizer, uses_template: bool | None = None):
        self.tokenizer = tokenizer
        self.uses_template = tokenizer.has_chat_template if uses_template is None else uses_template

    def text(self, sample: Mapping[str, Any]) -> str:
        """The prompt of a sample.

        Raises:
            BadSample: the sample has no prompt, or the template refuses it.
        """
        key = next((key for key in PROMPT_KEYS if key in sample), None)
        if key is None:
            names = ", ".join(PROMPT_KEYS)
            raise BadSample(f"has the keys {', '.join(map(str, sample))}; one of {names} has to be there")
        if key != "messages" and not self.uses_template:
            return string(sample[key], f"its {key}")
        if not self.tokenizer.has_chat_template:
            raise BadSample('has messages, and the tokenizer has no chat template. Write it as {"prompt": ...}')
        asked = sample[key] if key == "messages" else [{"role": "user", "content": string(sample[key], f"its {key}")}]
        messages = understand({"messages": asked}, Features()).messages
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as e:  # templates raise exceptions of any class
            raise BadSample(f"cannot be tokenised: the chat template says: {one_line(e)}") from None

    def is_templated(self, sample: Mapping[str, Any]) -> bool:
        return self.uses_template or "messages" in sample

    def encode(self, text: str, is_templated: bool) -> list[int]:
        """Token ids. The begin token is added unless a template wrote the text, with its own begin token."""
        return list(self.tokenizer.encode(text, add_special_tokens=not is_templated))

    def answered(self, sample: Mapping[str, Any], answer: str) -> Row:
        """A row of the prompt and an answer, in which the answer's tokens count.

        As in lm-evaluation-harness, a space follows a plain prompt, prompt and answer are tokenized together, and
        spaces at the end of the prompt count as the answer's.
        """
        prompt, is_templated = self.text(sample), self.is_templated(sample)
        whole = prompt + ("" if is_templated or prompt[-1:].isspace() else " ") + answer
        context = prompt if is_templated else prompt.rstrip()
        n_prompt, tokens = len(self.encode(context, is_templated)), self.encode(whole, is_templated)
        if not n_prompt:
            raise BadSample("has an empty prompt")
        if n_prompt >= len(tokens):
            raise BadSample(f"has an answer without a token of its own: {answer!r}")
        return Row.answer(tokens, n_prompt)


# --- Multiple choice and exact match ------------------------------------------------------------------


def is_question(sample: Any) -> bool:
    """Whether a sample is a question with answers to score, not a text."""
    return isinstance(sample, dict) and ("choices" in sample or "answer" in sample)


def questions(samples: Iterable[Found], prompts: Prompts, max_tokens: int) -> list[Question]:
    """Questions of samples such as {"question", "choices", "answer"}. Without choices, only the answer is scored.

    Raises:
        DataError: names every sample that is no question, by file and line.
    """
    return _each(samples, lambda found: _question(found, prompts, max_tokens))


def _question(found: Found, prompts: Prompts, max_tokens: int) -> Question:
    sample = found.sample
    if "answer" not in sample:
        raise BadSample('has no "answer"')
    if "choices" in sample:
        choices, right = _choices(sample["choices"]), sample["answer"]
        if isinstance(right, str):
            if choices.count(right) != 1:
                raise BadSample(f"has the answer {right!r}, which is not one of its choices: {', '.join(choices)}")
            right = choices.index(right)
        if isinstance(right, bool) or not isinstance(right, int) or not 0 <= right < len(choices):
            raise BadSample(f"has the answer {right!r}: it must be one of the choices, or its number, from 0")
    else:
        choices, right = [string(sample["answer"], "its answer")], 0
    if not all(choice.strip() for choice in choices):
        raise BadSample("has an empty answer")
    rows = [prompts.answered(sample, choice) for choice in choices]
    _check_length(rows, max_tokens)
    return Question(found.place, rows, [len(choice) for choice in choices], right)


def _choices(value: Any) -> list[str]:
    if not isinstance(value, list) or len(value) < 2:
        raise BadSample("has choices that are not a list of two texts or more")
    return [string(choice, f"choice {i + 1}") for i, choice in enumerate(value)]


def choose(
    model: Decoder,
    asked: Sequence[Question],
    variants: Mapping[str, bool | str],
    on_visit: Callable[[int], object] = lambda n: None,
) -> dict[str, list[QuestionScore]]:
    """Scores of all questions with every adapter, by name of the adapter."""
    rows = [row for question in asked for row in question.rows]
    by_row = _by_row(model, rows, variants, (), on_visit)
    result: dict[str, list[QuestionScore]] = {}
    for name, adapter in variants.items():
        of_adapter = iter([by_row[i, adapter] for i in range(len(rows))])
        result[name] = [_chosen(question, [next(of_adapter) for _ in question.rows]) for question in asked]
    return result


def _chosen(question: Question, of_answers: Sequence[LogProbabilities]) -> QuestionScore:
    totals = [float(of_answer.target.sum(dtype=np.float64)) for of_answer in of_answers]
    chosen = int(np.argmax(totals))
    by_length = int(np.argmax([total / length for total, length in zip(totals, question.lengths)]))
    right = question.right
    is_exact = bool(of_answers[right].is_greedy.all())
    return QuestionScore(question.where, totals, chosen, by_length, chosen == right, by_length == right, is_exact)


def share(values: Sequence[bool]) -> tuple[float, float]:
    """(share of True, its standard error); the standard error is NaN for a single value."""
    mean, n = sum(values) / len(values), len(values)
    return mean, math.sqrt(mean * (1 - mean) / (n - 1)) if n > 1 else math.nan


# --- Judges -------------------------------------------------------------------------------------------


def parse_marks(text: str) -> list[int]:
    """The marks in a range such as "0-9" or "1-5".

    Raises:
        ConfigError: the text is no such range, or has over 100 marks.
    """
    match = re.fullmatch(r"(\d+)-(\d+)", text.strip())
    if match is None or int(match[1]) >= int(match[2]):
        raise ConfigError(f"marks are given as a range such as 0-9 or 1-5, got {text!r}")
    if int(match[2]) - int(match[1]) > 99:
        raise ConfigError(f"there are at most 100 marks, got {text}")
    return list(range(int(match[1]), int(match[2]) + 1))


def to_judge(samples: Iterable[Found], prompts: Prompts, marks: Sequence[int], max_tokens: int):
    """(rows, where each came from, token ids of the marks) of samples {"messages"} or {"prompt"} that ask for a mark.

    Each mark has to be a single token where the answer begins, and the tokens before it must be the same for all marks.

    Raises:
        DataError: names every sample that asks for nothing, and marks that this tokenizer does not write as one token.
    """
    ids: list[int] = []

    def encode_with(sample: Mapping[str, Any], mark: int) -> list[int]:
        prompt, is_templated = prompts.text(sample), prompts.is_templated(sample)
        space = "" if is_templated or prompt[-1:].isspace() else " "
        return prompts.encode(f"{prompt}{space}{mark}", is_templated)

    def row(found: Found) -> tuple[Row, str]:
        # Tokens of a mark depend only on the text before it, and all prompts end alike. So the first sample tries all
        # marks, and the others try two.
        tried = list(marks) if not ids else [marks[0], marks[-1]]
        encoded = [encode_with(found.sample, mark) for mark in tried]
        for mark, tokens in zip(tried, encoded):
            if len(tokens) < 2 or tokens[:-1] != encoded[0][:-1]:
                raise BadSample(
                    f"asks for a mark that is not one token of this tokenizer: {mark}. Choose marks that are, such as "
                    "0-9, or end the prompt with a space"
                )
        if not ids:
            ids.extend(tokens[-1] for tokens in encoded)
        if [tokens[-1] for tokens in encoded] != [ids[marks.index(mark)] for mark in tried]:
            raise BadSample("ends so that the tokenizer writes marks otherwise than in the first sample")
        made = Row.answer(encoded[0], len(encoded[0]) - 1)
        _check_length([made], max_tokens)
        return made, found.place

    rows, places = zip(*_each(samples, row))
    if len(set(ids)) < len(marks):
        raise DataError(f"the tokenizer has one token for several of the marks {marks[0]} to {marks[-1]}")
    return list(rows), list(places), ids


def judge(
    model: Decoder,
    rows: Sequence[Row],
    places: Sequence[str],
    marks: Sequence[int],
    token_ids: Sequence[int],
    variants: Mapping[str, bool | str],
    on_visit: Callable[[int], object] = lambda n: None,
) -> dict[str, list[Mark]]:
    """The mark of every row with every adapter, by name of the adapter."""
    by_row = _by_row(model, rows, variants, token_ids, on_visit)
    return {
        name: [_mark(place, marks, by_row[i, adapter].of_tokens[0]) for i, place in enumerate(places)]
        for name, adapter in variants.items()
    }


def _mark(place: str, marks: Sequence[int], log_probabilities: np.ndarray) -> Mark:
    share_of_marks = float(np.exp(log_probabilities.astype(np.float64)).sum())
    relative = np.exp(log_probabilities.astype(np.float64) - log_probabilities.max())
    relative /= relative.sum()
    return Mark(place, float((relative * np.array(marks)).sum()), share_of_marks, dict(zip(marks, relative.tolist())))


# --- Both ---------------------------------------------------------------------------------------------


def _by_row(model, rows, variants, token_ids, on_visit) -> dict[tuple[int, bool | str], LogProbabilities]:
    """The log-probabilities by (number of the row, adapter)."""
    adapters = list(variants.values())
    results = log_probabilities(model, rows, adapters, token_ids=token_ids, on_visit=on_visit)
    return {(number, adapter): of_row for number, adapter, of_row in results}


def _check_length(rows: Sequence[Row], max_tokens: int) -> None:
    longest = max(len(row.tokens) for row in rows)
    if longest > max_tokens:
        raise BadSample(f"has {longest} tokens, --max-seq-length is {max_tokens}. Raise it: a question is never cut")


def _each(samples: Iterable[Found], make: Callable[[Found], Any]) -> list[Any]:
    """The results of `make` for all samples; raises a DataError that names the samples that `make` refuses."""
    made, bad, n_bad = [], [], 0
    for found in samples:
        try:
            if found.reason:
                raise BadSample(found.reason)
            made.append(make(found))
        except BadSample as e:
            n_bad += 1
            if n_bad <= SHOWN:
                bad.append(f"{found.place} {e}")
    if n_bad == 1:
        raise DataError(bad[0])
    if bad:
        more = f"\n  and {n_bad - len(bad)} more" if n_bad > len(bad) else ""
        raise DataError(f"{n_bad} samples cannot be scored:" + "".join(f"\n  {line}" for line in bad) + more)
    if not made:
        raise DataError("there are no samples to score")
    return made
