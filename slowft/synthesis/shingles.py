"""Computes 64-bit hashes of all runs of n words of many texts (shingles), a batch at a time with numpy.

Texts are normalised first. Compatible characters become one (NFKC), case is removed, and single spaces separate words.
In scripts that are written without spaces each character is a word.

A run's hash is computed from its bytes without cutting the run out of the text. With the prefix sums C of
table[byte] * base^position (mod 2^64) it is (C[end] - C[start]) * base^-start, since an odd base has an inverse.
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator

import numpy as np

BATCH_NBYTES = 1 << 17  # text at a time: the arrays computed from it stay in a core's cache
# scripts without spaces: Han, Kana, Hangul; Thai, Lao, Tibetan, Burmese, Khmer
_NO_SPACES = re.compile("[\u0e00-\u0eff\u0f00-\u109f\u1780-\u17ff\u3005-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff]")
# marks that belong to letters (accents, Arabic and Indic vowels) do not end words
_IN_WORDS = "\\w\u0300-\u036f\u064b-\u065f\u0900-\u0dff"
_BETWEEN_WORDS = re.compile(f"[^{_IN_WORDS}]+|_+")
# signs of ordinary prose. Other signs change the meaning of questions on code and numbers: C and C++, 3 + 4 and 3 - 4
_PROSE = re.compile("[\\s_.,;:!?'\"`()\\[\\]{}\u00ab\u00bb\u2010-\u203a\u3000-\u3003\u3008-\u3011\u30fb]+|-(?! ?[\\d])")
_SIGN = re.compile(f"[^{_IN_WORDS}\\s]")

_BASE = 0x9E3779B97F4A7C15  # odd
_random = np.random.default_rng(0x5107F7)
_TABLE = _random.integers(1, 2**64, 256, np.uint64)


def normalised(text: str, with_signs: bool = False) -> str:
    """The text's words with single spaces between them. A text without words stays as it is.

    Args:
        with_signs: signs other than those of prose count as words too.
    """
    plain = unicodedata.normalize("NFKC", text).casefold()
    if _NO_SPACES.search(plain):
        plain = _NO_SPACES.sub(r" \g<0> ", plain)
    if with_signs:
        plain = _PROSE.sub(" ", plain)
        if _SIGN.search(plain):
            plain = " ".join(_SIGN.sub(r" \g<0> ", plain).split())
        return plain.strip() or " ".join(text.split())
    return _BETWEEN_WORDS.sub(" ", plain).strip() or " ".join(text.split())


def words(text: str) -> list[str]:
    """A text's normalised words."""
    return normalised(text).split()


def batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Lists of texts that are hashed together."""
    batch, nbytes = [], 0
    for text in texts:
        batch.append(text)
        nbytes += len(text)
        if nbytes >= BATCH_NBYTES:
            yield batch
            batch, nbytes = [], 0
    if batch:
        yield batch


def hashes(texts: list[str], n: int) -> tuple[np.ndarray, np.ndarray]:
    """(uint64 hashes of all runs of `n` words, text after text; the index of each text's first hash).

    A text of fewer words is one run.

    Args:
        texts: one or more normalised texts.
    """
    content = np.frombuffer(("\n".join(texts) + "\n").encode("utf-8", "surrogatepass"), np.uint8)
    powers, inverse = _powers(len(content) + 1)
    sums = np.zeros(len(content) + 1, np.uint64)
    np.cumsum(_TABLE[content] * powers[:-1], out=sums[1:])
    is_end_of_text = content == 10
    ends = np.flatnonzero(is_end_of_text | (content == 32))
    begins = np.concatenate(([0], ends[:-1] + 1))
    last_of_text = np.flatnonzero(is_end_of_text[ends])  # words are numbered through all texts
    first_of_text = np.concatenate(([0], last_of_text[:-1] + 1))
    numbers = np.arange(len(ends))
    last = np.repeat(last_of_text, last_of_text - first_of_text + 1)
    begins_run = numbers + n - 1 <= last
    begins_run[first_of_text] = True
    begin = begins[begins_run]
    end = ends[np.minimum(numbers + n - 1, last)[begins_run]]
    starts = np.concatenate(([0], np.cumsum(begins_run)[last_of_text[:-1]]))
    return mixed((sums[end] - sums[begin]) * inverse[begin]), starts


def mixed(values: np.ndarray) -> np.ndarray:
    """uint64 values whose bits each depend on all bits of the input (splitmix64's finalizer)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


_kept_powers: list[np.ndarray] = []


def _powers(n: int) -> tuple[np.ndarray, np.ndarray]:
    """base^0 ... base^(n-1) and their inverses, mod 2^64."""
    if not _kept_powers or len(_kept_powers[0]) < n:
        _kept_powers.clear()
        for base in (_BASE, pow(_BASE, -1, 2**64)):
            powers = np.full(max(n, 2 * BATCH_NBYTES), base, np.uint64)
            powers[0] = 1
            _kept_powers.append(np.multiply.accumulate(powers))
    return _kept_powers[0][:n], _kept_powers[1][:n]
