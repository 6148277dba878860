"""Generates for many rows at once: each reading of the weights gives every row of the wave a token, or several.

Comes in: rows. Goes out: the tokens that each pass added to them. A finished row makes room for a waiting one, whose
prompt goes through the model in the same pass in which the other rows get their next tokens.
"""

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ..engine.spilled_caches import SpilledCaches
from ..errors import ConfigError, SlowftError, check_least
from .decoder import Decoder
from .drafts import Depth, Drafter
from .rows import Group, MergeTrial, Row, room_to_cut_back
from .sampling import Chooses


@dataclass(frozen=True)
class KeyValues:
    """Options of the keys and values that rows keep. Names are `mlx_lm.generate`'s.

    Attributes:
        max_kv_size: tokens in a row's cache at most, which then is a rotating one; None: no limit.
        kv_bits: bits of quantized keys and values, in groups of `kv_group_size`; None: they are not quantized.
        quantized_kv_start: a row's cache is quantized from this number of tokens on.
        spill_kv: keys and values go to disk, except those of a row's last few hundred tokens, and are read back for
            each token.
    """

    max_kv_size: int | None = None
    kv_bits: int | None = None
    kv_group_size: int = 64
    quantized_kv_start: int = 5000
    spill_kv: bool = False

    def check(self) -> None:
        """Raises ConfigError where a value is impossible for every model."""
        check_least(1, max_kv_size=self.max_kv_size)
        check_least(0, quantized_kv_start=self.quantized_kv_start)
        if self.kv_bits is not None:
            with quantizing_cache():
                mx.quantize(mx.zeros((1, max(self.kv_group_size, 1))), self.kv_group_size, self.kv_bits)


@contextmanager
def quantizing_cache() -> Iterator[None]:
    """Turns MLX's refusal into a ConfigError: groups have to divide a head's dimensions, which models differ in."""
    try:
        yield
    except ValueError as e:
        fix = "Give another --kv-group-size or --kv-bits"
        raise ConfigError(f"keys and values cannot be quantized so: {e} {fix}") from None


@dataclass
class Step:
    """What one pass added to one row.

    Attributes:
        tokens: new tokens of the answer. logprobs: their log-probabilities.
        drafted: number of guessed tokens that the pass checked.
    """

    row: Row
    tokens: list[int]
    logprobs: list[float]
    drafted: int = 0


class Waves:
    """Rows go through an opened model together, up to `size` of them at a time.

    Args:
        size: rows at a time.
        ends: token ids that end an answer.
        kept: options of keys and values.
        drafter: guesses tokens; None: nothing is guessed. depth: chooses how many.
        prefilled: prompts that go through in one pass at most.
        spilled: holds the rows' keys and values; None: they stay in memory.

    Attributes:
        passes: readings of the weights so far. tokens, prompt_tokens: of all answers and of all prompts so far.
    """

    def __init__(
        self,
        model: Decoder,
        size: int,
        chooser: Chooses,
        ends: Iterable[int],
        kept: KeyValues | None = None,
        drafter: Drafter | None = None,
        depth: Depth | None = None,
        prefilled: int | None = None,
        spilled: SpilledCaches | None = None,
    ):
        from mlx_lm.models.cache import KVCache

        self._model, self._size, self._chooser, self._ends = model, size, chooser, frozenset(ends)
        self._kept, self._drafter, self._depth = kept or KeyValues(), drafter, depth or Depth()
        self._prefilled = prefilled or size
        self._waiting: deque[Row] = deque()
        self._groups: list[Group] = []
        self.passes = self.tokens = self.prompt_tokens = 0
        self._trial: MergeTrial | None = None
        self._spilled = spilled
        self._may_merge = size > 1 and self._kept.kv_bits is None and spilled is None
        if drafter is not None and not can_forget(caches := self._new_cache()):
            kinds = sorted({type(cache).__name__ for cache in caches if not room_to_cut_back(cache)})
            raise ConfigError(
                f"drafts cannot be used with this model: its caches ({', '.join(kinds)}) cannot forget tokens again. "
                "Leave --draft-model and --draft-lookup out"
            )
        if drafter is not None and self._may_merge:
            self._may_merge = all(isinstance(cache, KVCache) for cache in self._new_cache())

    def add(self, row: Row) -> None:
        """Have a row generated as soon as there is room for it."""
        if not row.prompt:
            raise SlowftError(f"prompt {row.id!r} has no tokens")
        self._waiting.append(row)

    @property
    def rows(self) -> list[Row]:
        """Rows that are being generated now."""
        return [row for group in self._groups for row in group.rows]

    @property
    def is_done(self) -> bool:
        return not self._waiting and not self._groups

    def remove(self, row: Row) -> None:
        """Stop generating this row."""
        row.finish_reason = row.finish_reason or "stop"
        if row in self._waiting:
            self._waiting.remove(row)
        self._drop_finished()

    def step(self) -> list[Step]:
        """One pass over the weights, which gives every row its next token or tokens."""
        newcomers = self._newcomers()
        drafting_s = self._guess()
        groups = [*self._groups, *newcomers]
        batches, to_choose = [], [_to_choose(group, self._chooser.reads_tokens) for group in groups]
        chosen: list[list[tuple[int, float]]] = [[] for _ in groups]
        for group in groups:
            tokens, places = group.begin()
            batches.append((tokens, group.cache, mx.array(places, mx.int32), group.adapter))
        batches += self._trial_batches(groups)

        def take(number: int, first: int, logits: mx.array) -> None:
            if number < len(groups):
                rows = to_choose[number][first : first + logits.shape[0]]
                chosen[number] += zip(*self._chooser.choose(logits, rows))
            else:
                self._trial.take(number - len(groups), logits)

        begin = time.perf_counter()
        self._model.decode(batches, take, self._spilled)
        seconds = time.perf_counter() - begin
        if not newcomers:
            n_tokens = sum(tokens.size for tokens, *_ in batches)
            self._depth.passed(seconds, self._model.stats.last.wait_s, n_tokens)
        if self._trial is not None:
            self._trial.after_pass()
        self.passes += 1
        self.prompt_tokens += sum(len(group.rows[0].prompt) for group in newcomers)
        steps = [step for group, of_group in zip(groups, chosen) for step in self._extend_answers(group, of_group)]
        if self._drafter is not None and not newcomers:
            n_tokens, is_drafted = sum(len(step.tokens) for step in steps), any(step.drafted for step in steps)
            self._depth.gave(n_tokens / len(steps), drafting_s + seconds, is_drafted)
        self._groups += newcomers
        self._drop_finished()
        self._quantize()
        self._merge()
        return steps

    def __iter__(self) -> Iterator[list[Step]]:
        while not self.is_done:
            yield self.step()

    # --- Underneath -----------------------------------------------------------------------------------

    def _newcomers(self) -> list[Group]:
        """Waiting rows that there is room for. A prompt goes alone: padding changes what some architectures compute."""
        n = min(self._size - len(self.rows), len(self._waiting), self._prefilled)
        groups = [Group([self._waiting.popleft()], self._new_cache()) for _ in range(n)]
        for group in groups if self._spilled is not None else ():
            self._spilled.add(group.cache)
        return groups

    def _trial_batches(self, groups: Sequence[Group]) -> list:
        """Batches of the trial that finds out whether rows can be merged."""
        if not self._may_merge or len(groups) < 2 and self._trial is None:
            return []
        if self._trial is None:
            row = groups[0].rows[0]
            self._trial = MergeTrial(self._model, self._new_cache, row.tokens, row.adapter)
        return self._trial.batches()

    def _new_cache(self) -> list[Any]:
        return self._model.new_cache(self._kept.max_kv_size)

    def _guess(self) -> float:
        """Have the drafts of all rows guessed; returns the seconds that this took."""
        if self._drafter is None or not self._groups:
            return 0.0
        rows = self.rows
        depth = self._depth.choose(len(rows))
        begin = time.perf_counter()
        for group in self._groups:
            self._drafter.draft(group.rows, min(depth, group.room_for_drafts()))
        seconds = time.perf_counter() - begin
        self._depth.drafted(seconds, sum(len(row.draft) for row in rows))
        return seconds

    def _extend_answers(self, group: Group, chosen: Sequence[tuple[int, float]]) -> list[Step]:
        """Add what was chosen to the rows' answers: the tokens of drafts that were right, and one token more."""
        steps, n_accepted, start = [], [], 0
        for row in group.rows:
            of_row = chosen[start : start + len(row.draft) + 1]
            start += len(of_row)
            n_right = next((i for i, token in enumerate(row.draft) if of_row[i][0] != token), len(row.draft))
            new = of_row[: n_right + 1]
            end = next((i for i, (token, _) in enumerate(new) if token in self._ends), None)
            new = new if end is None else new[: end + 1]
            new = new[: row.limit - len(row.answer)]
            n_accepted.append(n_right)
            steps.append(Step(row, [token for token, _ in new], [logprob for _, logprob in new], len(row.draft)))
            if row.draft:
                self._depth.checked(n_right, len(row.draft))
        group.accept(n_accepted)
        for row, step in zip(list(group.rows), steps):
            row.answer += step.tokens
            self.tokens += len(step.tokens)
            if row.answer[-1] in self._ends:
                row.finish_reason = "stop"
            elif len(row.answer) >= row.limit:
                row.finish_reason = "length"
            if self._drafter is not None:
                self._drafter.checked(row, len(row.tokens) - 1)
        return steps

    def _drop_finished(self) -> None:
        for group in self._groups:
            for row in group.rows:
                if row.finish_reason is not None and self._drafter is not None:
                    self._drafter.forget(row)
                if row.finish_reason is not None and self._spilled is not None:
                    self._spilled.remove(group.cache)
            group.drop_finished()
        self._groups = [group for group in self._groups if group.rows]

    def _quantize(self) -> None:
        """Quantize the caches that are long enough for it, if that was asked for."""
        k = self._kept
        if k.kv_bits is None:
            return
        from mlx_lm.generate import maybe_quantize_kv_cache

        for group in self._groups:
            with quantizing_cache():
                maybe_quantize_kv_cache(group.cache, k.quantized_kv_start, k.kv_group_size, k.kv_bits)
            mx.eval([cache.state for cache in group.cache])

    def _merge(self) -> None:
        """Let rows of one adapter share their caches from now on, if the trial says that this changes nothing."""
        if self._trial is None or not self._trial.verdict:
            return
        by_adapter: dict[bool | str, list[Group]] = {}
        for group in sorted(self._groups, key=lambda group: not group.is_merged):
            by_adapter.setdefault(group.adapter, []).append(group)
        for first, *others in by_adapter.values():
            if others:
                first.join(others)
        self._groups = [groups[0] for groups in by_adapter.values()]


def can_forget(caches: Iterable[Any]) -> bool:
    """Whether all of a row's caches can remove tokens again, as wrong drafts need it."""
    return all(room_to_cut_back(cache) for cache in caches)


def _to_choose(group: Group, with_tokens: bool) -> list[tuple[Any, int, list[int]]]:
    """(row's id, place in the answer, tokens before it or none) of each token that the next pass chooses."""
    return [
        (row.id, len(row.answer) + j, row.tokens + row.draft[:j] if with_tokens else [])
        for row in group.rows
        for j in range(len(row.draft) + 1)
    ]
