"""Counts what a dataset holds, so that a person sees it before paying for the training.

Comes in: a `TokenDataset`. Goes out: `Counts`, a histogram of lengths, and which tokens of a sample are trained.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np

from .batches import batch_order, padded_tokens
from .store import TokenDataset

BINS = 10


@dataclass
class Counts:
    """The counts of one split.

    Attributes:
        tokens: number of tokens of all samples.
        trained_tokens: number of tokens that are predicted; masked_share: share of the tokens that are not.
        longest, median: number of tokens of a sample.
        cut: samples that were longer than --max-seq-length; skipped: samples that were left out as bad.
        duplicates: samples that equal an earlier one; in_train: samples that equal one of the training set.
        padding_share: share of padding in the batches.
    """

    samples: int
    tokens: int
    trained_tokens: int
    masked_share: float
    longest: int
    median: int
    cut: int
    skipped: int
    duplicates: int
    in_train: int
    padding_share: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def survey(
    dataset: TokenDataset, batch_size: int, max_seq_length: int, seed: int | None, train: np.ndarray | None = None
) -> tuple[Counts, np.ndarray]:
    """(The counts, hashes of the samples).

    Args:
        seed: makes batches of samples of similar length; with None they are in file order.
        train: hashes of the training set's samples, if this is another set.
    """
    n, trained = len(dataset), 0
    hashes = np.empty(n, np.int64)
    for i in range(n):
        tokens, pairs = dataset.sample(i)
        last = np.minimum(pairs[:, 1], len(tokens) - 1)
        trained += int(np.maximum(last - np.maximum(pairs[:, 0], 1) + 1, 0).sum())
        hashes[i] = dataset.digest(i)
    total = int(dataset.lengths.sum())
    order = batch_order(dataset, batch_size, seed)
    lengths = dataset.lengths[order]
    padded = sum(batch_size * (padded_tokens(int(longest), max_seq_length) + 1) for longest in lengths.max(axis=1))
    counts = Counts(
        samples=n,
        tokens=total,
        trained_tokens=trained,
        masked_share=1 - trained / total if total else 0.0,
        longest=int(dataset.lengths.max(initial=0)),
        median=int(np.median(dataset.lengths)) if n else 0,
        cut=dataset.summary.n_cut,
        skipped=dataset.summary.n_skipped,
        duplicates=n - len(np.unique(hashes)),
        in_train=0 if train is None else int(np.isin(hashes, train).sum()),
        padding_share=1 - int(lengths.sum()) / padded if padded else 0.0,
    )
    return counts, hashes


def histogram(dataset: TokenDataset) -> list[tuple[int, int, int]]:
    """(First, last number of tokens, samples) of bins of equal width."""
    longest = int(dataset.lengths.max(initial=1))
    width = max(1, -(-longest // BINS))
    numbers = np.bincount((dataset.lengths - 1) // width)
    return [(i * width + 1, (i + 1) * width, int(number)) for i, number in enumerate(numbers)]


def stretches(dataset: TokenDataset, i: int) -> Iterator[tuple[bool, list[int]]]:
    """(Whether they are trained, tokens) of the stretches of a sample, in order."""
    tokens, pairs = dataset.sample(i)
    is_trained = np.zeros(len(tokens), bool)
    for first, last in pairs:
        is_trained[max(first, 1) : last + 1] = True
    ends = [*(np.flatnonzero(np.diff(is_trained)) + 1).tolist(), len(tokens)]
    begin = 0
    for end in ends:
        yield bool(is_trained[begin]), tokens[begin:end].tolist()
        begin = end
