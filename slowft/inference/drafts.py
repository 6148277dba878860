"""Tokens that may come next, so that one reading of the weights pays for several: guessed here, checked by the model.

A draft never changes what is generated: the model chooses its own token at every place, with the random numbers of
that place, and the draft counts as far as it is the same. (Leviathan et al., arXiv 2211.17192; prompt look-up is
Saxena's, github.com/apoorvumang/prompt-lookup-decoding.)
"""

from collections.abc import Sequence
from typing import Any, Protocol

import mlx.core as mx

from .rows import Row
from .sampling import Chooses

LONGEST_MATCH = 3  # tokens that prompt look-up compares
CHUNK = 64  # tokens of a prompt that a drafter takes in at a time
PLAIN_AFTER = 16  # passes with drafts, one goes without any: what it takes says what drafts gain
DEPTHS = (1, 2, 4, 8, 16, 32, 64)
USUAL_ACCEPTANCE = 0.6  # of a draft's token, before any was checked


class Drafter(Protocol):
    """Guesses how rows go on."""

    def draft(self, rows: Sequence[Row], depth: int) -> None:
        """Set `draft` of each row, at most `depth` tokens and no more than it may still say."""

    def checked(self, row: Row, n_known: int) -> None:
        """Of what was guessed, only the row's first `n_known` tokens, prompt and all, came true."""

    def forget(self, row: Row) -> None:
        """A row is finished."""


class PromptLookup:
    """Guesses that what followed the last few tokens, the last time they were there, follows again."""

    def draft(self, rows: Sequence[Row], depth: int) -> None:
        for row in rows:
            row.draft = continuation(row.tokens, min(depth, row.limit - len(row.answer) - 1))

    def checked(self, row: Row, n_known: int) -> None:
        pass

    def forget(self, row: Row) -> None:
        pass


def continuation(tokens: Sequence[int], depth: int) -> list[int]:
    """What followed the latest earlier occurrence of the longest ending of `tokens` (up to three) that has one."""
    if depth <= 0:
        return []
    for length in range(min(LONGEST_MATCH, len(tokens) - 1), 0, -1):
        ending = tokens[-length:]
        for start in range(len(tokens) - length - 1, -1, -1):
            if tokens[start : start + length] == ending:
                return list(tokens[start + length : start + length + depth])
    return []


class DraftModel:
    """Guesses what a small model in memory would say, sampled with the same random numbers.

    Args:
        model: mlx-lm's, in memory. chooser: as the large model's tokens are chosen.
        embedding_rows: token ids that the large model knows.
    """

    def __init__(self, model: Any, chooser: Chooses, embedding_rows: int | None = None):
        self.model, self._chooser, self._embedding_rows = model, chooser, embedding_rows
        self._caches: dict[int, tuple[list[Any], int]] = {}  # row -> (its cache, how many tokens that has seen)

    def draft(self, rows: Sequence[Row], depth: int) -> None:
        from mlx_lm.models.cache import make_prompt_cache

        for row in rows:
            row.draft, tokens = [], row.tokens
            n = min(depth, row.limit - len(row.answer) - 1)
            if n <= 0:
                continue
            cache, seen = self._caches.get(row.number) or (make_prompt_cache(self.model), 0)
            while (ahead := len(tokens) - seen) > 1:  # a prompt: whose logits nobody wants
                self.model(mx.array([tokens[seen : seen + min(ahead - 1, CHUNK)]]), cache=cache)
                mx.eval([c.state for c in cache])
                seen += min(ahead - 1, CHUNK)
            while len(row.draft) < n:
                logits = self.model(mx.array([tokens[seen:]]), cache=cache)[:, -1, : self._embedding_rows]
                seen = len(tokens)
                (token,), _ = self._chooser.choose(logits, [(row.id, len(row.answer) + len(row.draft), tokens)])
                row.draft.append(token)
                tokens = [*tokens, token]
            self._caches[row.number] = cache, seen

    def checked(self, row: Row, n_known: int) -> None:
        """Of what the row's cache has seen, the first `n_known` tokens are the row's: forget the others."""
        if row.number in self._caches:
            cache, seen = self._caches[row.number]
            for c in cache if seen > n_known else ():
                c.trim(seen - n_known)
            self._caches[row.number] = cache, min(seen, n_known)

    def forget(self, row: Row) -> None:
        self._caches.pop(row.number, None)


class Depth:
    """How many tokens to guess: as many as make the most tokens a second, by what was measured so far.

    Of a draft of k tokens, each right with probability a if those before it are, (1 - a^(k+1)) / (1 - a) tokens come
    of a pass on average. A pass takes as long as reading, or as computing so many tokens.
    """

    def __init__(self, most: int | None = None):
        self.most = most or DEPTHS[-1]
        self._right, self._checked = USUAL_ACCEPTANCE * 4, 4.0
        self._draft_s = self._drafted = 0.0
        self._read_s, self._token_s = 0.0, 0.0
        self._drafted_passes = self._plain_passes = 0
        self._tokens_of_row = self._drafted_s = self._plain_s = 0.0

    @property
    def gain(self) -> float | None:
        """How many times as fast drafts made it, by passes with and without them; None: not known yet."""
        if not self._plain_passes or not self._drafted_passes:
            return None
        return self._tokens_of_row / self._drafted_s * self._plain_s / self._plain_passes

    def gave(self, tokens_of_row: float, seconds: float, is_drafted: bool) -> None:
        """A pass, with the drafting before it, took so long and gave a row so many tokens on average."""
        if is_drafted:
            self._drafted_passes += 1
            self._tokens_of_row, self._drafted_s = self._tokens_of_row + tokens_of_row, self._drafted_s + seconds
        else:
            self._plain_passes, self._plain_s = self._plain_passes + 1, self._plain_s + seconds

    @property
    def acceptance(self) -> float:
        """Of a draft's token whose predecessors were right."""
        return self._right / self._checked

    def checked(self, right: int, of: int) -> None:
        """A draft of so many tokens was right in the first so many."""
        self._right, self._checked = self._right + right, self._checked + min(right + 1, of)

    def drafted(self, seconds: float, tokens: int) -> None:
        """A drafter took so long for so many tokens."""
        self._draft_s, self._drafted = self._draft_s + seconds, self._drafted + tokens

    def passed(self, seconds: float, waited_s: float, tokens: int) -> None:
        """A pass over so many tokens took so long, and waited so long of it for reads."""
        if tokens:
            self._token_s = max(seconds - waited_s, 0.0) / tokens
            self._read_s = seconds if waited_s > 0.05 * seconds else self._read_s

    def choose(self, n_rows: int) -> int:
        """Tokens to guess for each of so many rows; 0: guessing does not pay, or what it gains is to be measured."""
        if self._drafted_passes >= PLAIN_AFTER and not self._plain_passes:
            return 0
        a, per_draft = min(self.acceptance, 0.99), self._draft_s / self._drafted if self._drafted else 0.0

        def tokens_per_s(k: int) -> float:
            seconds = max(self._read_s, self._token_s * n_rows * (k + 1)) + per_draft * n_rows * k
            return (1 - a ** (k + 1)) / (1 - a) / max(seconds, 1e-9)

        return (
            max((0, *(k for k in DEPTHS if k <= self.most)), key=tokens_per_s) if self._token_s else min(4, self.most)
        )
