"""Rows that are being generated, and the key-value caches that groups of them share.

Comes in: tokens of prompts, tokens that were chosen. Goes out: what a pass over the model is given, `[B, T]` tokens and
mlx-lm's own caches. Knows neither weights nor text.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

MERGED = ("extend", "filter", "prepare", "finalize")  # what mlx-lm's caches of several rows can do
NO_LIMIT = 1 << 30
AGREE = 0.03  # of the largest logit: rounding in 16 bits is less


@dataclass(eq=False)
class Row:
    """One prompt, and what was generated of its answer so far.

    Attributes:
        number: among all prompts; id: the user's name for it.
        prompt, answer: token ids. fed: how many of both together the cache has seen.
        limit: of tokens of the answer.
        draft: tokens that may come next, to be checked in the next pass.
        finish_reason: "stop", "length", or None while it is under way.
        state: whatever who decodes keeps of it.
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
        """Of prompt and answer."""
        return self.prompt + self.answer

    @property
    def next_tokens(self) -> list[int]:
        """What the next pass takes: all that the cache has not seen, and the draft."""
        return self.tokens[self.fed :] + self.draft


class Group:
    """Rows whose caches are one: they go through the model together.

    A row's prompt goes alone, with the cache that mlx-lm generates one text with. Later it may be merged with others.

    Args:
        cache: of one row, as `make_prompt_cache` gives it, or of all of them.
    """

    def __init__(self, rows: Sequence[Row], cache: list[Any], is_merged: bool = False):
        self.rows, self.cache, self.is_merged = list(rows), cache, is_merged
        self.adapter = rows[0].adapter
        self._padding: list[int] = []

    def begin(self) -> tuple[mx.array, list[int]]:
        """(tokens `[B, T]` of the next pass, padded on the right; places in it, flat, whose logits are wanted).

        Of a row's n tokens, d of them a draft, the logits of the last d + 1 are wanted.
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
        """The pass is over, and of each row's draft the first `counts` tokens are its answer's: forget the others."""
        back = [padding + len(row.draft) - n for row, n, padding in zip(self.rows, counts, self._padding)]
        for row, n in zip(self.rows, counts):
            row.fed += len(row.next_tokens) - len(row.draft) + n
            row.draft = []
        if not any(back):
            return
        for cache in self.cache:  # a layer after the other: each is copied
            if cache.empty():  # of a block without attention
                continue
            if self.is_merged:
                cache.prepare(right_padding=back)
                cache.finalize()
                cache.filter(list(range(len(self.rows))))  # gives back what no row needs any more
            else:
                cache.trim(back[0])
            mx.eval(cache.state)

    def drop_finished(self) -> None:
        """Leave out the rows that are finished."""
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
        alone = [*([] if self.is_merged else [self]), *others]
        for i in range(len(self.cache)):  # a layer after the other, of which there are two for that long
            of_others = merged([group.cache[i] for group in alone])
            for group in alone:
                group.cache[i] = None
            if self.is_merged:
                self.cache[i].extend(of_others)
            else:
                self.cache[i] = of_others
            mx.eval(self.cache[i].state)
        self.rows += [row for group in others for row in group.rows]
        self.is_merged = True

    def room_for_drafts(self) -> int:
        """How many tokens the next pass may be given that may have to be forgotten again."""
        return min(map(room_to_cut_back, self.cache))


def merged(caches: Sequence[Any]) -> Any:
    """One layer's cache of several rows, from those of each."""
    return type(caches[0]).merge(list(caches))


def room_to_cut_back(cache: Any) -> int:
    """How many of its next tokens a cache can forget: none that a recurrence takes in, or that a window overwrites."""
    from mlx_lm.models.cache import BatchKVCache

    if hasattr(cache, "filter"):  # of several rows
        return NO_LIMIT if isinstance(cache, BatchKVCache) else 0
    if not cache.is_trimmable():
        return 0
    window = getattr(cache, "max_size", None)
    return NO_LIMIT if window is None else max(0, window - cache.offset - 1)


class MergeTrial:
    """Finds out, along with the first passes, whether rows say the same together as alone.

    Not every architecture of mlx-lm takes caches of several rows, and some compute something else with them. Two short
    rows go through the model alone, then both alone and merged; what comes out is compared. That takes no reading of
    its own.

    Attributes:
        verdict: None as long as it is not known.
    """

    def __init__(self, model: Any, fresh: Callable[[], list[Any]], tokens: Sequence[int], adapter: bool | str):
        self._adapter, self._tokens, self._passes = adapter, [*tokens] * 8, 0
        self._alone, self._together, self._logits = [fresh(), fresh()], [], {}
        self.verdict = None if self._can_be_tried(model, fresh) else False

    def batches(self) -> list[tuple[mx.array, list[Any], mx.array, bool | str]]:
        """What goes along in the next pass."""
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
        """Of one of the batches."""
        self._logits[number] = logits.astype(mx.float32)

    def after_pass(self) -> None:
        self._passes += 1
        if self._passes > 1 and self.verdict is None:
            alone, together = mx.concatenate([self._logits[0], self._logits[1]]), self._logits[2]
            apart = (mx.abs(alone - together).max() / mx.abs(alone).max()).item()
            if not apart < AGREE:
                self.verdict = False
            elif self._passes == 3:
                self.verdict = True
        if self.verdict is not None:
            self._alone, self._together, self._logits = [], [], {}

    def _batch(self, tokens: list[list[int]], cache: list[Any]):
        n, width = len(tokens), len(tokens[0])
        return mx.array(tokens, mx.int32), cache, mx.array([width * (i + 1) - 1 for i in range(n)]), self._adapter

    @staticmethod
    def _can_be_tried(model: Any, fresh: Callable[[], list[Any]]) -> bool:
        """Whether there are such caches, and the model's call takes them. It is tried on placeholders.

        With a number of rows that no other axis has: another one might fit an axis that it does not belong to.
        """
        from mlx_lm.models.cache import CacheList

        cache = fresh()
        # Of attention that picks its tokens (minimax_m3_vl), a CacheList's, a few tokens do not show what many do.
        if not all(hasattr(type(c), "merge") and not isinstance(c, CacheList) for c in cache):
            return False
        together = [merged([c, *(copy.deepcopy(c) for _ in range(10))]) for c in cache]
        return all(hasattr(c, name) for c in together for name in MERGED) and model.takes(
            mx.zeros((11, 3), mx.int32), together
        )
