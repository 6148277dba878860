"""Rows that are being generated, and the key-value caches that groups of them share.

Comes in: tokens of prompts, and tokens that were chosen. Goes out: what the model is called with, which is `[B, T]`
tokens and mlx-lm's own caches. Knows neither weights nor text.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

MERGED = ("extend", "filter", "prepare", "finalize")  # methods of mlx-lm's caches of several rows
NO_LIMIT = 1 << 30
AGREE = 0.03  # tolerance, as a share of the largest logit: 16-bit rounding is less


@dataclass(eq=False)
class Row:
    """One prompt, and as much of its answer as was generated so far.

    Attributes:
        number: the row's place among all prompts. id: the user's name for it.
        prompt, answer: token ids. fed: how many tokens of prompt and answer together are in the cache.
        limit: the most tokens that the answer may have.
        draft: guessed next tokens, which the next pass checks.
        finish_reason: "stop" or "length"; None while the answer is unfinished.
        state: whatever the caller wants to keep beside the row.
    """

    number: int
    id: Any
    prompt: list[int]
    limit: int
    adapter: bool | str = True
    answer: list[int] = field(default_factory=list)
    fed: int = 0
    draft: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    state: Any = None

    @property
    def tokens(self) -> list[int]:
        """Token ids of prompt and answer."""
        return self.prompt + self.answer

    @property
    def next_tokens(self) -> list[int]:
        """The tokens of the next pass: all that are not in the cache, and the draft."""
        return self.tokens[self.fed :] + self.draft


class Group:
    """Rows that share one cache and go through the model together.

    A row's prompt goes alone, with the cache that mlx-lm has for a single text. Later the row may join others.

    Args:
        cache: of a single row, as `make_prompt_cache` makes it, or of all rows together.
    """

    def __init__(self, rows: Sequence[Row], cache: list[Any], is_merged: bool = False):
        self.rows, self.cache, self.is_merged = list(rows), cache, is_merged
        self.adapter = rows[0].adapter
        self._padding: list[int] = []

    def begin(self) -> tuple[mx.array, list[int]]:
        """(tokens `[B, T]` of the next pass, padded on the right; flat indices of those whose logits are needed).

        A row with a draft of d tokens needs the logits of its last d + 1 tokens.
        """
        tokens = [row.next_tokens for row in self.rows]
        lengths = [len(ts) for ts in tokens]
        width = max(lengths)
        self._padding = [width - n for n in lengths]
        places = [
            i * width + n - 1 - len(row.draft) + j
            for i, (row, n) in enumerate(zip(self.rows, lengths))
            for j in range(len(row.draft) + 1)
        ]
        return mx.array([ts + [0] * (width - len(ts)) for ts in tokens], mx.int32), places

    def accept(self, counts: Sequence[int]) -> None:
        """After a pass: keep the first `counts` tokens of each row's draft, and remove the rest from the cache."""
        n_removed = [padding + len(row.draft) - n for row, n, padding in zip(self.rows, counts, self._padding)]
        for row, n in zip(self.rows, counts):
            row.fed += len(row.next_tokens) - len(row.draft) + n
            row.draft = []
        if not any(n_removed):
            return
        for cache in self.cache:  # one layer at a time, because each is copied
            if cache.empty():  # the layer has no attention
                continue
            if self.is_merged:
                cache.prepare(right_padding=n_removed)
                cache.finalize()
                cache.filter(list(range(len(self.rows))))  # frees padding that all rows have
            else:
                cache.trim(n_removed[0])
            mx.eval(cache.state)

    def drop_finished(self) -> None:
        """Remove the rows that are finished."""
        keep = [i for i, row in enumerate(self.rows) if row.finish_reason is None]
        if len(keep) == len(self.rows):
            return
        self.rows = [self.rows[i] for i in keep]
        for cache in self.cache if keep else ():
            cache.filter(keep)
            mx.eval(cache.state)
        if not keep:
            self.cache = []

    def join(self, others: Sequence["Group"]) -> None:
        """Take in other groups of one row each."""
        single = [*([] if self.is_merged else [self]), *others]
        for i in range(len(self.cache)):  # one layer at a time: meanwhile its cache is in memory twice
            joined = merged([group.cache[i] for group in single])
            for group in single:
                group.cache[i] = None
            if self.is_merged:
                self.cache[i].extend(joined)
            else:
                self.cache[i] = joined
            mx.eval(self.cache[i].state)
        self.rows += [row for group in others for row in group.rows]
        self.is_merged = True

    def room_for_drafts(self) -> int:
        """How many tokens of a draft the next pass may have: the cache must be able to remove them again."""
        return min(map(room_to_cut_back, self.cache))


def merged(caches: Sequence[Any]) -> Any:
    """One layer's cache of several rows, made of the caches of single rows."""
    return type(caches[0]).merge(list(caches))


def room_to_cut_back(cache: Any) -> int:
    """How many of the next tokens a cache could remove again.

    It is 0 for a recurrent state, and a rotating window can remove tokens only as long as it overwrites none.
    """
    from mlx_lm.models.cache import BatchKVCache

    if hasattr(cache, "filter"):  # a cache of several rows
        return NO_LIMIT if isinstance(cache, BatchKVCache) else 0
    if not cache.is_trimmable():
        return 0
    window = getattr(cache, "max_size", None)
    return NO_LIMIT if window is None else max(0, window - cache.offset - 1)


class MergeTrial:
    """Finds out, during the first passes, whether merged rows get the logits that they get alone.

    Not every architecture of mlx-lm takes caches of several rows, and some compute something else with them. Two short
    rows go through the model alone, then both alone and merged, and their logits are compared. They go along with the
    first passes, so the trial reads no weights of its own.

    Args:
        new_cache: makes the caches of one row.

    Attributes:
        verdict: whether rows may be merged; None: not known yet.
    """

    def __init__(self, model: Any, new_cache: Callable[[], list[Any]], tokens: Sequence[int], adapter: bool | str):
        self._adapter, self._tokens, self._passes = adapter, [*tokens] * 8, 0
        self._alone, self._together, self._logits = [new_cache(), new_cache()], [], {}
        self.verdict = None if self._can_be_tried(model, new_cache) else False

    def batches(self) -> list[tuple[mx.array, list[Any], mx.array, bool | str]]:
        """The batches of the trial in the next pass."""
        if self.verdict is not None:
            return []
        n = self._passes
        if n == 0:
            texts = [self._tokens[:2], self._tokens[1:6]]
            return [self._batch([text], cache) for text, cache in zip(texts, self._alone)]
        if n == 1:
            self._together = [merged(copy.deepcopy(caches)) for caches in zip(*self._alone)]
            mx.eval([cache.state for cache in self._together])
        token = [[self._tokens[5 + n]], [self._tokens[6 + n]]]
        return [*(self._batch([t], cache) for t, cache in zip(token, self._alone)), self._batch(token, self._together)]

    def take(self, number: int, logits: mx.array) -> None:
        """Take the logits of one of the batches."""
        self._logits[number] = logits.astype(mx.float32)

    def after_pass(self) -> None:
        self._passes += 1
        if self._passes > 1 and self.verdict is None:
            alone, together = mx.concatenate([self._logits[0], self._logits[1]]), self._logits[2]
            difference = (mx.abs(alone - together).max() / mx.abs(alone).max()).item()
            if not difference < AGREE:
                self.verdict = False
            elif self._passes == 3:
                self.verdict = True
        if self.verdict is not None:
            self._alone, self._together, self._logits = [], [], {}

    def _batch(self, tokens: list[list[int]], cache: list[Any]):
        n, width = len(tokens), len(tokens[0])
        return mx.array(tokens, mx.int32), cache, mx.array([width * (i + 1) - 1 for i in range(n)]), self._adapter

    @staticmethod
    def _can_be_tried(model: Any, new_cache: Callable[[], list[Any]]) -> bool:
        """Whether mlx-lm has such caches, and the model's call accepts them, which is tried on placeholders.

        The trial has 11 rows, a number that no other axis has: a number that others have might fit a wrong axis.
        """
        from mlx_lm.models.cache import CacheList

        cache = new_cache()
        # A CacheList is for attention that selects tokens (minimax_m3_vl): with few tokens a difference would not show.
        if not all(hasattr(type(c), "merge") and not isinstance(c, CacheList) for c in cache):
            return False
        together = [merged([c, *(copy.deepcopy(c) for _ in range(10))]) for c in cache]
        return all(hasattr(c, name) for c in together for name in MERGED) and model.takes(
            mx.zeros((11, 3), mx.int32), together
        )
