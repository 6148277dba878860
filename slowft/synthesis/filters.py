"""The steps that leave rows out. The pipeline and the single commands both call them.

Each takes rows and gives (row, what its history says, why it is left out or None).
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import repeat
from pathlib import Path
from typing import Any

from . import contamination, duplicates
from .rows import Row, answer_of, prompt_of
from .rules import Rules, checked
from .split import assign, counted, group_of

Sifted = Iterator[tuple[Row, dict[str, Any], str | None]]
Reading = Callable[[], Iterable[Row]]  # each call reads the same rows from the beginning
Watched = Callable[[Iterable[Row]], Iterable[Row]]  # gives the same rows and shows the progress of a first reading

SHORT_WORDS = 10  # a shorter answer is compared together with its question: many questions are answered by "Yes."


def by_rules(rows: Iterable[Row], rules: Rules, folder: Path) -> Sifted:
    return ((row, {}, why) for row, why in checked(rows, rules, folder))


def without_duplicates(
    reading: Reading,
    on: str,
    threshold: float,
    words: int,
    watched: Watched = lambda rows: rows,
) -> Sifted:
    """Leaves out rows that say what an earlier row said.

    Args:
        on: what of a row is compared: "question", "answer" or "both".
    """
    duplicate_of = duplicates.find((compared(row, on) for row in watched(reading())), threshold, words)
    originals = {duplicate.of for duplicate in duplicate_of.values()}
    ids: dict[int, Any] = {}
    for i, row in enumerate(reading()):
        duplicate = duplicate_of.get(i)
        if i in originals:
            ids[i] = row["id"]
        if duplicate is None:
            yield row, {}, None
        else:
            kind = "the same" if duplicate.is_exact else "nearly the same"
            entry = {"of": str(ids[duplicate.of]), "likeness": duplicate.likeness}
            yield row, entry, f"{kind} {'words' if on == 'both' else on}"


def compared(row: Row, on: str) -> str:
    """The part of a row that is compared to find duplicates."""
    question, answer = prompt_of(row), answer_of(row)
    if on == "question" and "messages" in row:
        return question
    if on == "answer" and len(answer.split(None, SHORT_WORDS)) >= SHORT_WORDS:
        return answer
    return f"{question}\n{answer}"


def without_contamination(reading: Reading, texts: contamination.Texts, name: str) -> Sifted:
    """Leaves out rows that share runs of words with the texts, which reasons call by this name."""
    for row, n in zip(reading(), texts.shared(reading())):
        yield row, {"shared": n} if n else {}, f"shares words with {name}" if n else None


def within_quotas(reading: Reading, quotas: dict[tuple[str, str], int]) -> Sifted:
    """Keeps the rows with the best marks of each topic, as many as its quota says."""
    marks: dict[tuple[str, str], list[tuple[float, int]]] = {}
    for i, row in enumerate(reading()):
        if (topic := (row.get("source"), row.get("topic"))) in quotas:
            marks.setdefault(topic, []).append((-row.get("mark", 0), i))
    chosen = {i for topic, listed in marks.items() for _, i in sorted(listed)[: quotas[topic]]}
    for i, row in enumerate(reading()):
        has_quota = (row.get("source"), row.get("topic")) in quotas
        yield row, {}, "more than the topic's quota" if has_quota and i not in chosen else None


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
    """(row, its split, why it is left out) for each row.

    Rows of train that share a run of words with valid or test are left out, and rows of valid that do with test.
    """
    splits = assign(counted(group_of(row, key) for row in watched(reading())), valid, test, seed)

    def shared_with(split: str) -> Iterable[int]:
        """How many runs of words each row shares with the rows of the split."""
        rows = (row for row in watched(reading()) if splits[group_of(row, key)] == split)
        texts = contamination.Texts(rows, words, without)
        return texts.shared(reading()) if len(texts) else repeat(0)

    for row, n_test, n_valid in zip(reading(), shared_with("test"), shared_with("valid")):
        split, why = splits[group_of(row, key)], None
        if split != "test" and n_test:
            why = "shares words with test"
        elif split == "train" and n_valid:
            why = "shares words with valid"
        yield row, split, why
