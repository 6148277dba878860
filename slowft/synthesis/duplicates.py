"""Finds texts that say what an earlier one said: the same words, or nearly.

Exact duplicates have one hash of their normalised text. For near ones a text is the set of its runs of a few words, and
two texts are as alike as those sets: J = shared / all of both (Jaccard). MinHash (Broder 1997) estimates J: under a
random order of all runs, two sets have the same least one with probability J, so of `PERMUTATIONS` least ones about
that share agrees. Only texts that agree in all of one band of them are compared (Leskovec et al., Mining of Massive
Datasets, 3.4). Texts are taken in order: one that is like a text that was kept before is left out.

About 500 bytes a text are kept, no text.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from ..errors import ConfigError
from .shingles import batches, hashes, mixed, normalised

PERMUTATIONS = 120  # has many divisors; the estimate's standard deviation at 0.8 is 0.037
MISSED = 0.005  # of pairs just as alike as the threshold, at most this share shares no band


@dataclass(frozen=True)
class Duplicate:
    """Of which text (its number) one is a duplicate, and how alike they are; 1 with `is_exact` for the same words."""

    of: int
    likeness: float
    is_exact: bool


def find(texts: Iterable[str], threshold: float = 0.8, n_words: int = 3) -> dict[int, Duplicate]:
    """Numbers of the texts to leave out.

    Args:
        threshold: how alike texts have to be (J), above 0; 1 finds exact duplicates only.
        n_words: in a run.
    """
    if not 0 < threshold <= 1:
        raise ConfigError(f"the threshold of duplicates must be above 0 and at most 1, got {threshold:g}")
    if n_words < 1:
        raise ConfigError(f"runs of words must have 1 word or more, got {n_words}")
    rows = rows_of_band(threshold)
    generator = np.random.default_rng(1)
    factors = generator.integers(0, 2**63, PERMUTATIONS, np.uint64) * np.uint64(2) + np.uint64(1)
    addends = generator.integers(0, 2**64, PERMUTATIONS, np.uint64)
    digests, least, keys = [], [], []
    for batch in batches(normalised(text, with_signs=True) for text in texts):
        digests.append(np.array([_digest(text) for text in batch], np.uint64))
        if threshold < 1:
            of_batch = minhashes(*hashes([padded(text, n_words) for text in batch], n_words), factors, addends)
            keys.append(_band_keys(of_batch, rows))
            least.append(of_batch.astype(np.uint16))  # two differ in their low bits but for 1 in 65,536
    if not digests:
        return {}
    _, first, which = np.unique(np.concatenate(digests), return_index=True, return_inverse=True)
    original = first[which]
    found = {i: Duplicate(int(of), 1.0, True) for i, of in enumerate(original) if of != i}
    if threshold < 1:
        left = np.flatnonzero(original == np.arange(len(original)))
        found |= _near(left, np.concatenate(least), np.concatenate(keys), threshold)
    return found


def rows_of_band(threshold: float) -> int:
    """How many least runs a band has: as many as miss few enough pairs at the threshold."""
    fits = [
        rows
        for rows in range(1, PERMUTATIONS + 1)
        if PERMUTATIONS % rows == 0 and (1 - threshold**rows) ** (PERMUTATIONS // rows) <= MISSED
    ]
    return max(fits, default=1)


def padded(text: str, n_words: int) -> str:
    """With words before and after that no text has, so that its first and last word are in as many runs as the others.

    Else "What do you mean by A?" and "by B?" would be more alike than "What does A mean for you?" and "does B mean".
    """
    return "\2 " * (n_words - 1) + text + " \3" * (n_words - 1)


def minhashes(values: np.ndarray, starts: np.ndarray, factors: np.ndarray, addends: np.ndarray) -> np.ndarray:
    """uint32 `[texts, permutations]`: the upper half of the least factor * value + addend of each text's values."""
    least = np.empty((len(factors), len(starts)), np.uint64)
    ordered = np.empty_like(values)
    for i, (factor, addend) in enumerate(zip(factors, addends)):
        np.multiply(values, factor, out=ordered)
        ordered += addend
        np.minimum.reduceat(ordered, starts, out=least[i])
    return (least >> np.uint64(32)).astype(np.uint32).T


def _digest(text: str) -> int:
    content = text.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def _band_keys(least: np.ndarray, rows: int) -> np.ndarray:
    """uint64 `[texts, bands]`, equal where all of a band is."""
    bands = least.reshape(len(least), -1, rows)
    keys = np.zeros(bands.shape[:2], np.uint64)
    for row in range(rows):
        keys = mixed(keys * np.uint64(0x9E3779B97F4A7C15) + bands[:, :, row])
    return keys


def _near(left: np.ndarray, least: np.ndarray, keys: np.ndarray, threshold: float) -> dict[int, Duplicate]:
    """Of the texts with these numbers, those that are like one that is kept."""
    buckets, n_buckets = np.full((len(left), keys.shape[1]), -1, np.int32), 0
    for band in range(keys.shape[1]):  # only keys that several texts have become buckets
        _, which, counts = np.unique(keys[left, band], return_inverse=True, return_counts=True)
        numbers = np.where(counts > 1, np.cumsum(counts > 1) - 1 + n_buckets, -1)
        buckets[:, band] = numbers[which]
        n_buckets += int((counts > 1).sum())
    kept: list[list[int]] = [[] for _ in range(n_buckets)]
    found: dict[int, Duplicate] = {}
    for i in np.flatnonzero((buckets >= 0).any(axis=1)):
        text, mine = int(left[i]), [bucket for bucket in buckets[i].tolist() if bucket >= 0]
        candidates = sorted({other for bucket in mine for other in kept[bucket]})
        if candidates:
            likeness = (least[candidates] == least[text]).mean(axis=1)
            best = int(likeness.argmax())
            if likeness[best] >= threshold:
                found[text] = Duplicate(candidates[best], round(float(likeness[best]), 3), False)
                continue
        for bucket in mine:
            kept[bucket].append(text)
    return found
