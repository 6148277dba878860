"""The steps that only leave rows out, from file to file: what the pipeline and the single commands both call."""

from collections.abc import Callable, Iterable, Iterator
from itertools import repeat
from pathlib import Path
from typing import Any

from . import contamination, duplicates
from .rows import Row, answer_of, prompt_of
from .rules import Rules, checked
from .split import assign, counted, group_of

Found = Iterator[tuple[Row, dict[str, Any], str | None]]
Reading = Callable[[], Iterable[Row]]  # the same rows, anew each time
Watched = Callable[[Iterable[Row]], Iterable[Row]]  # gives the same rows, and shows how far a first look at them is

SHORT_WORDS = 10  # an answer of fewer is compared together with its question: many questions are answered by "Yes."


def by_rules(rows: Iterable[Row], rules: Rules, folder: Path) -> Found:
    return ((row, {}, why) for row, why in checked(rows, rules, folder))


def without_duplicates(
    reading: Reading,
    on: str,
    threshold: float,
    words: int,
    watched: Watched = lambda rows: rows,
) -> Found:
    """Rows, but for those that say what an earlier one said.

    Args:
        on: "question", "answer" or "both", what of a row is compared.
    """
    found = duplicates.find((compared(row, on) for row in watched(reading())), threshold, words)
    originals = {duplicate.of for duplicate in found.values()}
    names: dict[int, Any] = {}
    for i, row in enumerate(reading()):
        duplicate = found.get(i)
        if i in originals:
            names[i] = row["id"]
        if duplicate is None:
            yield row, {}, None
        else:
            kind = "the same" if duplicate.is_exact else "nearly the same"
            entry = {"of": str(names[duplicate.of]), "likeness": duplicate.likeness}
            yield row, entry, f"{kind} {'words' if on == 'both' else on}"


def compared(row: Row, on: str) -> str:
    """What of a row is compared for duplicates."""
    question, answer = prompt_of(row), answer_of(row)
    if on == "question" and "messages" in row:
        return question
    if on == "answer" and len(answer.split(None, SHORT_WORDS)) >= SHORT_WORDS:
        return answer
    return f"{question}\n{answer}"


def without_contamination(rows: Reading, texts: contamination.Texts, what: str) -> Found:
    """Args: what: the texts are, for the reason."""
    for row, n in zip(rows(), texts.shared(rows())):
        yield row, {"shared": n} if n else {}, f"shares words with {what}" if n else None


def within_quotas(reading: Reading, quotas: dict[tuple[str, str], int]) -> Found:
    """As many rows of each topic as are wanted, those with the best marks."""
    marks: dict[tuple[str, str], list[tuple[float, int]]] = {}
    for i, row in enumerate(reading()):
        if (topic := (row.get("source"), row.get("topic"))) in quotas:
            marks.setdefault(topic, []).append((-row.get("mark", 0), i))
    chosen = {i for topic, listed in marks.items() for _, i in sorted(listed)[: quotas[topic]]}
    for i, row in enumerate(reading()):
        wants_choice = (row.get("source"), row.get("topic")) in quotas
        yield row, {}, "more than the topic's quota" if wants_choice and i not in chosen else None


def into_splits(
    reading: Reading,
    valid: float,
    test: float,
    seed: int = 0,
    key: str | None = None,
    words: int = contamination.NGRAM,
    without: Iterable[str] = (),
    watched: Watched = lambda rows: rows,
) -> Iterator[tuple[Row, str, str | None]]:
    """(row, its split, why it is left out). What train shares with valid or test, and valid with test, is left out."""
    splits = assign(counted(group_of(row, key) for row in watched(reading())), valid, test, seed)

    def of(split: str) -> Iterator[Row]:
        return (row for row in watched(reading()) if splits[group_of(row, key)] == split)

    of_test = contamination.Texts(of("test"), words, without)
    of_valid = contamination.Texts(of("valid"), words, without)
    in_test = of_test.shared(reading()) if len(of_test) else repeat(0)
    in_valid = of_valid.shared(reading()) if len(of_valid) else repeat(0)
    for row, n_test, n_valid in zip(reading(), in_test, in_valid):
        split, why = splits[group_of(row, key)], None
        if split != "test" and n_test:
            why = "shares words with test"
        elif split == "train" and n_valid:
            why = "shares words with valid"
        yield row, split, why
