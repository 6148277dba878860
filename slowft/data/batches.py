"""Puts samples into batches: which go together, in which order, and how they are padded. The batches are mlx-lm's.

Comes in: a `TokenDataset`. Goes out: `[B, T+1]` token ids and `[B, 2n]` lengths, as `StreamedModel.loss_and_grads`
takes them. With a teacher's cache, the teacher's probabilities go out as well.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..engine.distillation import Teacher
from ..errors import DataError
from .store import TokenDataset
from .teacher import TeacherCache, counted

PADDING = 32  # sequences are padded to a multiple of this, plus one


def batch_order(dataset: TokenDataset, batch_size: int, seed: int | None = None) -> np.ndarray:
    """Numbers of the samples of each batch, `[n, batch_size]`. Samples that do not fill a batch are left out.

    Samples are in file order, as in `mlx_lm.lora` (which means to sort by length, but asks each raw sample for the
    number of its keys). With a seed, samples of similar length go together, and the seed orders those of equal length.
    """
    n = len(dataset) // batch_size
    order = np.arange(len(dataset), dtype=np.int32)
    if seed is not None:
        order = np.random.RandomState(seed).permutation(order)
        order = order[np.argsort(dataset.lengths[order], kind="stable")]
    return order[: n * batch_size].reshape(n, batch_size)


def padded_tokens(length: int, max_seq_length: int) -> int:
    """Number of targets in a row of a batch whose longest sample has `length` tokens. The first token is no target."""
    return min(-(-length // PADDING) * PADDING, max_seq_length - 1)


@dataclass(frozen=True)
class Lessons:
    """A teacher's probabilities, and how they count in the loss: see `engine/distillation.py`.

    `vocab_size` is the student's number of logits per token.
    """

    cache: TeacherCache
    weight: float
    temperature: float
    vocab_size: int

    def of(self, dataset: TokenDataset, numbers: Sequence[int], n_targets: int) -> Teacher:
        """The teacher's probabilities for the samples of a batch."""
        shape, k = (len(numbers), n_targets), self.cache.top_k
        ids = np.broadcast_to(np.arange(k, dtype=np.int32), (*shape, k)).copy()
        known = np.zeros((*shape, k + 1), np.float32)
        is_known = np.zeros(shape, bool)
        for row, number in enumerate(numbers):
            tokens, pairs = dataset.sample(int(number))
            targets = counted(pairs, len(tokens)) - 1
            targets = targets[targets < n_targets]
            of_sample = self.cache.of(dataset.digest(int(number)))
            ids[row, targets], known[row, targets] = (array[: len(targets)] for array in of_sample)
            is_known[row, targets] = True
        if (largest := int(ids.max())) >= self.vocab_size:
            raise DataError(
                f"{self.cache.directory} has token id {largest}, the student's logits end at {self.vocab_size - 1}. "
                "Write it anew with a smaller --top-k"
            )
        arrays = mx.array(ids), mx.array(known), mx.array(is_known)
        return Teacher(*arrays, self.weight, self.temperature)


class BatchStream:
    """The batches of `order` without end. NumPy's random state permutes them for each epoch, as in mlx-lm.

    Args:
        lessons: with these, the teacher's probabilities are the third item of a batch.

    Attributes:
        permutation, at: this epoch's permutation, and how many of its batches were taken. If they are set, the stream
            goes on from there.
    """

    def __init__(self, dataset: TokenDataset, order: np.ndarray, max_seq_length: int, lessons: Lessons | None = None):
        self._dataset, self._order, self._max_tokens = dataset, order, max_seq_length
        self._lessons = lessons
        self.permutation, self.at = np.empty(0, np.int64), 0

    def __next__(self) -> tuple[mx.array, mx.array] | tuple[mx.array, mx.array, Teacher]:
        if self.at == len(self.permutation):
            self.permutation, self.at = np.random.permutation(len(self._order)), 0
        self.at += 1
        numbers = self._order[self.permutation[self.at - 1]]
        ids, lengths = batch(self._dataset, numbers, self._max_tokens)
        if self._lessons is None:
            return ids, lengths
        return ids, lengths, self._lessons.of(self._dataset, numbers, ids.shape[1] - 1)


def iterate(dataset: TokenDataset, order: np.ndarray, max_seq_length: int) -> Iterator[tuple[mx.array, mx.array]]:
    """The batches of `order`, once, permuted by NumPy's random state."""
    for i in np.random.permutation(len(order)):
        yield batch(dataset, order[i], max_seq_length)


def batch(dataset: TokenDataset, numbers: np.ndarray, max_seq_length: int) -> tuple[mx.array, mx.array]:
    """(Token ids `[B, T+1]`, lengths `[B, 2n]`) of these samples. A row with fewer pairs gets pairs without targets."""
    samples = [dataset.sample(int(i)) for i in numbers]
    longest = max(len(tokens) for tokens, _ in samples)
    ids = np.zeros((len(samples), padded_tokens(longest, max_seq_length) + 1), np.int32)
    n_pairs = max(len(pairs) for _, pairs in samples)
    lengths = np.tile(np.array([1, 0], np.int32), (len(samples), n_pairs))
    for row, (tokens, pairs) in enumerate(samples):
        n = min(len(tokens), max_seq_length)
        ids[row, :n] = tokens[:n]
        lengths[row, : 2 * len(pairs)] = np.minimum(pairs, [np.iinfo(np.int32).max, n]).reshape(-1)
    return mx.array(ids), mx.array(lengths)
