"""Generates for many rows at once: each reading of the weights gives every row of the wave a token, or several.

Comes in: rows. Goes out: what each pass added to them. A row that is finished makes room for one that waits, whose
prompt goes through the model in the same pass in which the others get their next tokens.
"""

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ..engine.spilled_caches import SpilledCaches
from ..errors import ConfigError, SlowftError
from .decoder import Decoder
from .drafts import Depth, Drafter
from .rows import Group, MergeTrial, Row, room_to_cut_back
from .sampling import Chooses


@dataclass(frozen=True)
class KeyValues:
    """What is done with the keys and values that rows keep. Names are `mlx_lm.generate`'s.

    Attributes:
        max_kv_size: tokens that a row remembers at most, in a rotating cache; None: all.
        kv_bits: of quantized keys and values, in groups of `kv_group_size`; None: as they were computed.
        quantized_kv_start: tokens from which a row's are quantized.
        spill_kv: they go to disk, all but a row's last few hundred tokens, and are read back for each token.
    """

    max_kv_size: int | None = None
    kv_bits: int | None = None
    kv_group_size: int = 64
    quantized_kv_start: int = 5000
    spill_kv: bool = False

    def check(self) -> None:
        """Raises ConfigError where a value is impossible for every model."""
        if self.max_kv_size is not None and self.max_kv_size < 1:
            raise ConfigError(f"--max-kv-size must be 1 or more, got {self.max_kv_size}")
        if self.quantized_kv_start < 0:
            raise ConfigError(f"--quantized-kv-start must be 0 or more, got {self.quantized_kv_start}")
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
    """What one row got from a pass.

    Attributes:
        tokens: new ones of its answer; logprobs: their log-probabilities.
        drafted: of a draft, how many tokens were checked.
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
        kept: what is done with keys and values.
        drafter, depth: guess tokens, and how many; None: no guessing.
        prefilled: prompts at most that go through in one pass.
        spilled: takes the rows' keys and values; None: they stay in memory.

    Attributes:
        passes: readings of the weights so far; tokens: of answers.
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
        if drafter is not None and not can_forget(fresh := self._fresh_cache()):
            kinds = sorted({type(cache).__name__ for cache in fresh if not room_to_cut_back(cache)})
            raise ConfigError(
                f"drafts cannot be used with this model: what it keeps of a text ({', '.join(kinds)}) cannot forget "
                "tokens again. Leave --draft-model and --draft-lookup out"
            )
        if drafter is not None and self._may_merge:
            self._may_merge = all(isinstance(cache, KVCache) for cache in self._fresh_cache())

    def add(self, row: Row) -> None:
        """Have a row generated, when there is room for it."""
        if not row.prompt:
            raise SlowftError(f"prompt {row.id!r} has no tokens")
        self._waiting.append(row)

    @property
    def rows(self) -> list[Row]:
        """That are being generated now."""
        return [row for group in self._groups for row in group.rows]

    @property
    def gain(self) -> float | None:
        """How many times as fast drafts make it, as measured; None: not known."""
        return self._depth.gain

    @property
    def is_done(self) -> bool:
        return not self._waiting and not self._groups

    def remove(self, row: Row) -> None:
        """Generate no more of this row."""
        row.finish_reason = row.finish_reason or "stop"
        if row in self._waiting:
            self._waiting.remove(row)
        self._drop_finished()

    def step(self) -> list[Step]:
        """One pass over the weights: the next token, or tokens, of every row."""
        newcomers = self._newcomers()
        drafting_s = self._guess()
        groups = [*self._groups, *newcomers]
        batches, asked = [], [_asked(group, self._chooser.reads_tokens) for group in groups]
        chosen: list[list[tuple[int, float]]] = [[] for _ in groups]
        for group in groups:
            tokens, places = group.begin()
            batches.append((tokens, group.cache, mx.array(places, mx.int32), group.adapter))
        batches += self._trial_batches(groups)

        def take(number: int, first: int, logits: mx.array) -> None:
            if number < len(groups):
                rows = asked[number][first : first + logits.shape[0]]
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
        steps = [step for group, found in zip(groups, chosen) for step in self._take_over(group, found)]
        if self._drafter is not None and not newcomers:
            n_tokens, is_drafted = sum(len(step.tokens) for step in steps), any(step.drafted for step in steps)
            self._depth.gave(n_tokens / len(steps), drafting_s + seconds, is_drafted)
        self._groups += newcomers
        self._drop_finished()
        self._settle()
        return steps

    def __iter__(self) -> Iterator[list[Step]]:
        while not self.is_done:
            yield self.step()

    # --- Underneath -----------------------------------------------------------------------------------

    def _newcomers(self) -> list[Group]:
        """Rows that there is room for. Each prompt goes alone: padded, not all architectures compute the same."""
        n = min(self._size - len(self.rows), len(self._waiting), self._prefilled)
        groups = [Group([self._waiting.popleft()], self._fresh_cache()) for _ in range(n)]
        for group in groups if self._spilled is not None else ():
            self._spilled.add(group.cache)
        return groups

    def _trial_batches(self, groups: Sequence[Group]) -> list:
        """What goes along to find out whether rows can be merged."""
        if not self._may_merge or len(groups) < 2 and self._trial is None:
            return []
        if self._trial is None:
            row = groups[0].rows[0]
            self._trial = MergeTrial(self._model, self._fresh_cache, row.tokens, row.adapter)
        return self._trial.batches()

    def _fresh_cache(self) -> list[Any]:
        return self._model.new_cache(self._kept.max_kv_size)

    def _guess(self) -> float:
        """Have every row's draft guessed; the seconds that took."""
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

    def _take_over(self, group: Group, chosen: Sequence[tuple[int, float]]) -> list[Step]:
        """What was chosen becomes the rows' answers: as far as drafts were right, and one token more."""
        steps, counts, at = [], [], 0
        for row in group.rows:
            of_row = chosen[at : at + len(row.draft) + 1]
            at += len(of_row)
            right = next((i for i, token in enumerate(row.draft) if of_row[i][0] != token), len(row.draft))
            new = of_row[: right + 1]
            end = next((i for i, (token, _) in enumerate(new) if token in self._ends), None)
            new = new if end is None else new[: end + 1]
            new = new[: row.limit - len(row.answer)]
            counts.append(right)
            steps.append(Step(row, [token for token, _ in new], [logprob for _, logprob in new], len(row.draft)))
            if row.draft:
                self._depth.checked(right, len(row.draft))
        group.accept(counts)
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

    def _settle(self) -> None:
        """Rows of one adapter share their caches from now on, or are quantized where that was asked for."""
        if self._kept.kv_bits is not None:
            from mlx_lm.generate import maybe_quantize_kv_cache

            k = self._kept
            for group in self._groups:
                with quantizing_cache():
                    maybe_quantize_kv_cache(group.cache, k.quantized_kv_start, k.kv_group_size, k.kv_bits)
                mx.eval([cache.state for cache in group.cache])
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
    """Whether all of a row's caches can forget tokens again, so that drafts can be checked."""
    return all(room_to_cut_back(cache) for cache in caches)


def _asked(group: Group, with_tokens: bool) -> list[tuple[Any, int, list[int]]]:
    """(id, place in the answer, tokens before it, if they are asked for) of each token that the next pass chooses."""
    return [
        (row.id, len(row.answer) + j, row.tokens + row.draft[:j] if with_tokens else [])
        for row in group.rows
        for j in range(len(row.draft) + 1)
    ]
