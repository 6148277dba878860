"""Guesses the next tokens of rows. The model checks them all in one reading of its weights, which then gives several.

A draft never changes what is generated. The model chooses its own token at every place, with the random numbers of
that place, and a draft is accepted up to the first token that differs. (Leviathan et al., arXiv 2211.17192; prompt
look-up is Saxena's, github.com/apoorvumang/prompt-lookup-decoding.)
"""

from collections.abc import Sequence
from typing import Any, Protocol

import mlx.core as mx

from .rows import Row
from .sampling import Chooses

LONGEST_MATCH = 3  # tokens that prompt look-up compares
CHUNK = 64  # tokens of a prompt that go through a draft model at a time
PLAIN_AFTER = 16  # after so many passes with drafts, one pass has none: its time says how much drafts gain
DEPTHS = (1, 2, 4, 8, 16, 32, 64)
USUAL_ACCEPTANCE = 0.6  # assumed probability that a draft's token is right, before any was checked


class Drafter(Protocol):
    """Guesses the next tokens of rows."""

    def draft(self, rows: Sequence[Row], depth: int) -> None:
        """Set `draft` of each row: at most `depth` tokens, and no more than the row's limit allows."""

    def checked(self, row: Row, n_known: int) -> None:
        """The row's first `n_known` tokens, prompt included, are final; guesses after them were wrong."""

    def forget(self, row: Row) -> None:
        """Drop what is kept of a row, because it is finished."""


class PromptLookup:
    """Looks for the last few tokens earlier in the row, and guesses that the same tokens follow again."""

    def draft(self, rows: Sequence[Row], depth: int) -> None:
        for row in rows:
            row.draft = continuation(row.tokens, min(depth, row.limit - len(row.answer) - 1))

    def checked(self, row: Row, n_known: int) -> None:
        pass

    def forget(self, row: Row) -> None:
        pass


def continuation(tokens: Sequence[int], depth: int) -> list[int]:
    """Up to `depth` tokens that followed an earlier copy of the last tokens.

    The last three tokens are looked for first, then the last two, then the last one. The latest copy counts.
    """
    if depth <= 0:
        return []
    for length in range(min(LONGEST_MATCH, len(tokens) - 1), 0, -1):
        ending = tokens[-length:]
        for start in range(len(tokens) - length - 1, -1, -1):
            if tokens[start : start + length] == ending:
                return list(tokens[start + length : start + length + depth])
    return []


class DraftModel:
    """Guesses the tokens of a small model in memory, which are sampled with the same random numbers.

    Args:
        model: mlx-lm's, in memory. chooser: the one that chooses the large model's tokens.
        embedding_rows: number of token ids of the large model.
    """

    def __init__(self, model: Any, chooser: Chooses, embedding_rows: int | None = None):
        self.model, self._chooser, self._embedding_rows = model, chooser, embedding_rows
        self._caches: dict[int, tuple[list[Any], int]] = {}  # row -> (its cache, number of tokens in it)

    def draft(self, rows: Sequence[Row], depth: int) -> None:
        from mlx_lm.models.cache import make_prompt_cache

        for row in rows:
            row.draft, tokens = [], row.tokens
            n = min(depth, row.limit - len(row.answer) - 1)
            if n <= 0:
                continue
            cache, n_cached = self._caches.get(row.number) or (make_prompt_cache(self.model), 0)
            while (n_new := len(tokens) - n_cached) > 1:  # all but the last token: their logits are not needed
                self.model(mx.array([tokens[n_cached : n_cached + min(n_new - 1, CHUNK)]]), cache=cache)
                mx.eval([c.state for c in cache])
                n_cached += min(n_new - 1, CHUNK)
            while len(row.draft) < n:
                logits = self.model(mx.array([tokens[n_cached:]]), cache=cache)[:, -1, : self._embedding_rows]
                n_cached = len(tokens)
                (token,), _ = self._chooser.choose(logits, [(row.id, len(row.answer) + len(row.draft), tokens)])
                row.draft.append(token)
                tokens = [*tokens, token]
            self._caches[row.number] = cache, n_cached

    def checked(self, row: Row, n_known: int) -> None:
        """Remove all tokens after the first `n_known` from the row's cache."""
        if row.number in self._caches:
            cache, n_cached = self._caches[row.number]
            for c in cache if n_cached > n_known else ():
                c.trim(n_cached - n_known)
            self._caches[row.number] = cache, min(n_cached, n_known)

    def forget(self, row: Row) -> None:
        self._caches.pop(row.number, None)


class Depth:
    """Chooses how many tokens to guess: the number that gives the most tokens a second, by what was measured so far.

    If a draft has k tokens, and each is right with probability a when those before it are, a pass gives
    (1 - a^(k+1)) / (1 - a) tokens on average. It takes the time of reading, or that of computing, whichever is longer.
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
        """How many times as fast generating is with drafts, by passes with and without them; None: not known yet."""
        if not self._plain_passes or not self._drafted_passes:
            return None
        return self._tokens_of_row / self._drafted_s * self._plain_s / self._plain_passes

    def gave(self, tokens_of_row: float, seconds: float, is_drafted: bool) -> None:
        """Note a pass: tokens that it gave a row on average, and its seconds, those of drafting included."""
        if is_drafted:
            self._drafted_passes += 1
            self._tokens_of_row, self._drafted_s = self._tokens_of_row + tokens_of_row, self._drafted_s + seconds
        else:
            self._plain_passes, self._plain_s = self._plain_passes + 1, self._plain_s + seconds

    @property
    def acceptance(self) -> float:
        """Share of right tokens among those of drafts whose predecessors were right."""
        return self._right / self._checked

    def checked(self, right: int, n_drafted: int) -> None:
        """Note that the first `right` tokens of a draft of `n_drafted` were right."""
        self._right, self._checked = self._right + right, self._checked + min(right + 1, n_drafted)

    def drafted(self, seconds: float, tokens: int) -> None:
        """Note how many seconds a drafter took for so many tokens."""
        self._draft_s, self._drafted = self._draft_s + seconds, self._drafted + tokens

    def passed(self, seconds: float, waited_s: float, tokens: int) -> None:
        """Note a pass over so many tokens: its seconds, and how many of them it waited for reads."""
        if tokens:
            self._token_s = max(seconds - waited_s, 0.0) / tokens
            self._read_s = seconds if waited_s > 0.05 * seconds else self._read_s

    def choose(self, n_rows: int) -> int:
        """Tokens to guess for each row; 0 if guessing does not pay, or if a pass without drafts is to be measured."""
        if self._drafted_passes >= PLAIN_AFTER and not self._plain_passes:
            return 0
        if not self._token_s:  # nothing was measured
            return min(4, self.most)
        a, per_draft = min(self.acceptance, 0.99), self._draft_s / self._drafted if self._drafted else 0.0

        def tokens_per_s(k: int) -> float:
            seconds = max(self._read_s, self._token_s * n_rows * (k + 1)) + per_draft * n_rows * k
            return (1 - a ** (k + 1)) / (1 - a) / max(seconds, 1e-9)

        return max((0, *(k for k in DEPTHS if k <= self.most)), key=tokens_per_s)
