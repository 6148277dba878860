"""Finds rows that share a run of words with other texts: a validation set, a test set, a benchmark.

The rule is that of GPT-3's report (2005.14165, appendix C): a row is contaminated if any run of 13 words of its
question or its answer is in the other texts. A question of fewer words is contaminated if it is a whole question
there. Answers of fewer words ("yes") are not compared.
"""

from collections.abc import Iterable, Iterator

import numpy as np

from ..errors import ConfigError
from .rows import Row, answer_of, prompt_of
from .shingles import batches, hashes, normalised

NGRAM = 13  # words


class Texts:
    """The runs of words of some texts, which other rows must not share.

    Args:
        rows: their questions and answers are the texts.
        n: words in a run.
        without: texts whose runs do not count, such as what all prompts begin with.
    """

    def __init__(self, rows: Iterable[Row], n: int = NGRAM, without: Iterable[str] = ()):
        if n < 1:
            raise ConfigError(f"runs of words must have 1 word or more, got {n}")
        self._n = n
        per_batch = [np.unique(values) for values, _, _ in _hashed(rows, n)]
        self._runs = np.unique(np.concatenate(per_batch)) if per_batch else np.zeros(0, np.uint64)
        for batch in batches(text for text in map(normalised, without) if text):
            self._runs = np.setdiff1d(self._runs, hashes(batch, n)[0], assume_unique=False)

    def __len__(self) -> int:
        return len(self._runs)

    def shared(self, rows: Iterable[Row]) -> Iterator[int]:
        """How many runs of each row are in the texts."""
        for values, owners, n_rows in _hashed(rows, self._n):
            at = np.searchsorted(self._runs, values)
            is_there = self._runs[np.minimum(at, max(len(self._runs) - 1, 0))] == values if len(self._runs) else at < 0
            yield from np.bincount(owners[is_there], minlength=n_rows).tolist()


def _hashed(rows: Iterable[Row], n: int) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """(hashes of runs, for each run its row's number in the batch, rows in the batch) for each batch of rows."""
    waiting: list[list[str]] = []
    nbytes = 0
    for row in rows:
        waiting.append(_texts(row, n))
        nbytes += sum(map(len, waiting[-1])) + 50
        if nbytes > 1 << 17:
            yield _runs(waiting, n)
            waiting, nbytes = [], 0
    if waiting:
        yield _runs(waiting, n)


def _runs(texts: list[list[str]], n: int) -> tuple[np.ndarray, np.ndarray, int]:
    owners = [i for i, row_texts in enumerate(texts) for _ in row_texts]
    flat = [text for row_texts in texts for text in row_texts]
    if not flat:
        return np.zeros(0, np.uint64), np.zeros(0, np.int64), len(texts)
    values, starts = hashes(flat, n)
    counts = np.diff(np.append(starts, len(values)))
    return values, np.repeat(owners, counts), len(texts)


def _texts(row: Row, n: int) -> list[str]:
    """The normalised texts of a row that are compared."""
    answers = [answer_of(row)]
    if "rejected" in row:
        answers.append(row["rejected"]["content"])
    question, answers = normalised(prompt_of(row)), [normalised(answer) for answer in answers]
    if "messages" not in row:  # plain text
        question, answers = answers[0], []
    return [text for text in (question,) if text] + [answer for answer in answers if answer.count(" ") >= n - 1]
