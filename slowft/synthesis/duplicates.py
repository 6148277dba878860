"""Finds texts that say what an earlier text said, in the same words or nearly.

Exact duplicates have the same hash of their normalised text. To find near ones, a text is treated as the set of its
runs of a few words. The likeness of two texts is that of their sets: J = shared runs / runs of both (Jaccard). MinHash
(Broder 1997) estimates J: under a random order of all runs, two sets have the same first run with probability J. So
about a share J of the first runs under `PERMUTATIONS` orders agrees. These are cut into bands, and only texts that
agree in all of one band are compared (Leskovec et al., Mining of Massive Datasets, 3.4). Texts are taken in order, and
a text is left out if it is like one that was kept before.

In memory are about 500 bytes for each text, and no text itself.
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
    """One text is a duplicate of another.

    Attributes:
        of: number of the other text, which is kept.
        likeness: the estimate of J.
        is_exact: both have the same words; the likeness is 1 then.
    """

    of: int
    likeness: float
    is_exact: bool


def find(texts: Iterable[str], threshold: float = 0.8, n_words: int = 3) -> dict[int, Duplicate]:
    """The duplicates, by the number of the text to leave out.

    Args:
        threshold: the least J of a near duplicate, above 0. With 1, only exact duplicates are found.
        n_words: words in a run.
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
            signatures = minhashes(*hashes([padded(text, n_words) for text in batch], n_words), factors, addends)
            keys.append(_band_keys(signatures, rows))
            least.append(signatures.astype(np.uint16))  # only 1 in 65,536 different ones agree in their low 16 bits
    if not digests:
        return {}
    _, first, which = np.unique(np.concatenate(digests), return_index=True, return_inverse=True)
    original = first[which]
    duplicates = {i: Duplicate(int(of), 1.0, True) for i, of in enumerate(original) if of != i}
    if threshold < 1:
        remaining = np.flatnonzero(original == np.arange(len(original)))
        duplicates |= _near(remaining, np.concatenate(least), np.concatenate(keys), threshold)
    return duplicates


def rows_of_band(threshold: float) -> int:
    """How many first runs a band has: the most with which at most a share `MISSED` of pairs is missed."""
    fits = [
        rows
        for rows in range(1, PERMUTATIONS + 1)
        if PERMUTATIONS % rows == 0 and (1 - threshold**rows) ** (PERMUTATIONS // rows) <= MISSED
    ]
    return max(fits, default=1)


def padded(text: str, n_words: int) -> str:
    """The text between words that no text has, so that its first and last word are in as many runs as the others.

    Otherwise "What do you mean by A?" and "What do you mean by B?" would be more alike than "What does A mean for you?"
    and "What does B mean for you?".
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
    """uint64 `[texts, bands]`: keys that are equal where all of a band is equal."""
    bands = least.reshape(len(least), -1, rows)
    keys = np.zeros(bands.shape[:2], np.uint64)
    for row in range(rows):
        keys = mixed(keys * np.uint64(0x9E3779B97F4A7C15) + bands[:, :, row])
    return keys


def _near(numbers: np.ndarray, least: np.ndarray, keys: np.ndarray, threshold: float) -> dict[int, Duplicate]:
    """The near duplicates among the texts with these numbers, by the number of the text to leave out."""
    buckets, n_buckets = np.full((len(numbers), keys.shape[1]), -1, np.int32), 0
    for band in range(keys.shape[1]):  # only keys that several texts have become buckets
        _, which, counts = np.unique(keys[numbers, band], return_inverse=True, return_counts=True)
        bucket_of_key = np.where(counts > 1, np.cumsum(counts > 1) - 1 + n_buckets, -1)
        buckets[:, band] = bucket_of_key[which]
        n_buckets += int((counts > 1).sum())
    kept: list[list[int]] = [[] for _ in range(n_buckets)]
    duplicates: dict[int, Duplicate] = {}
    for i in np.flatnonzero((buckets >= 0).any(axis=1)):
        text, own_buckets = int(numbers[i]), [bucket for bucket in buckets[i].tolist() if bucket >= 0]
        candidates = sorted({other for bucket in own_buckets for other in kept[bucket]})
        if candidates:
            likeness = (least[candidates] == least[text]).mean(axis=1)
            best = int(likeness.argmax())
            if likeness[best] >= threshold:
                duplicates[text] = Duplicate(candidates[best], round(float(likeness[best]), 3), False)
                continue
        for bucket in own_buckets:
            kept[bucket].append(text)
    return duplicates
