"""Generates answers to prompts with an opened model, many in each reading of its weights.

    for answer in slowft.generate(model, ["What is a heisenbug?", "Define: bogon."], max_tokens=100, temp=0.7):
        print(answer.id, answer.text)

Comes in: an opened model, prompts. Goes out: answers as they are finished, and pieces of their text before that.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from ..engine.budget import Wave
from ..engine.spilled_caches import SpilledCaches
from ..errors import ConfigError, check_least
from ..planning.plan import Plan
from .decoder import Decoder
from .drafts import Depth, Drafter, DraftModel, PromptLookup
from .prompts import Asked, Prompt, Template, asked, check
from .rows import Row
from .sampling import Chooser, Choosers, Processor, Sampler, Sampling
from .waves import KeyValues, Waves, can_forget

OWN_DRAFT = 16  # most tokens that a model's own drafter guesses: if nine in ten are right, about eight are accepted
PIECE = 256  # tokens that mlx-lm's caches grow by
USUAL_WAVE = 32  # rows at a time where no memory ceiling gives a number


@dataclass(frozen=True)
class Answer:
    """The answer to one prompt.

    Attributes:
        id: the prompt's id. number: the prompt's place among all.
        text: the answer, without the end token and without a stop text and what follows it.
        tokens: ids, the end token included. logprobs: natural, of each token, before sampling removed any token.
        finish_reason: "stop" or "length".
        prompt_tokens: number of tokens of the prompt.
        seconds: from the pass that took in the prompt to the last token; rows that share passes wait for each other.
    """

    id: Any
    number: int
    text: str
    tokens: list[int]
    logprobs: list[float]
    finish_reason: str
    prompt_tokens: int
    seconds: float = 0.0

    def with_number(self, number: int) -> "Answer":
        return replace(self, number=number)


class Generation:
    """A run over some prompts: iterate over it for answers, in the order in which they are finished.

    Attributes:
        wave: rows at a time. plan: the plan that is followed; None without a ceiling.
        predicted: times of a pass of the streamed model over the whole wave; None where nothing is known of this
            machine, or where all weights are in memory.
        prompts: number of prompts.
        passes: readings of the weights so far. tokens, prompt_tokens: of all answers and of all prompts so far.
        drafted, accepted: tokens that were guessed, and how many of them were right.
        depth: how many tokens are guessed at a time, and what decides that.
        spilled: the rows' keys and values on the disk; None where they stay in memory.
        is_done: all answers are finished.
        seconds: of all passes.
    """

    def __init__(
        self,
        model: Decoder,
        prompts: Sequence[Asked],
        tokenizer: Any,
        max_tokens: int = 256,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        wave: int | None = None,
        kept: KeyValues | None = None,
        drafter: Drafter | str | Any = None,
        draft_tokens: int | None = None,
        sampler: Sampler | None = None,
        logits_processors: Sequence[Processor] = (),
        adapter: bool | str = True,
        on_text: Callable[[Asked, str], None] | None = None,
    ):
        check_least(1, max_tokens=max_tokens, wave=wave)
        check_least(0, num_draft_tokens=draft_tokens)
        check(prompts, model.embedding_rows)
        sampling, kept = sampling or Sampling(), kept or KeyValues()
        kept.check()
        self._model, self._tokenizer, self._on_text = model, tokenizer, on_text
        self._prompts = list(prompts)
        chooser = _chooser(sampling, prompts, tokenizer, sampler, logits_processors)
        if drafter is None and draft_tokens != 0 and can_forget(model.new_cache(kept.max_kv_size)):
            drafter = model.drafter_model()
            draft_tokens = draft_tokens or OWN_DRAFT
        if draft_tokens == 0:
            drafter = None
        elif drafter == "lookup":
            drafter = PromptLookup()
        elif drafter is not None and not hasattr(drafter, "draft"):
            drafter = DraftModel(drafter, chooser, model.embedding_rows)
        rows = [
            Row(
                i,
                one.id,
                list(one.tokens),
                one.max_tokens or max_tokens,
                adapter if one.adapter is None else one.adapter,
            )
            for i, one in enumerate(prompts)
        ]
        self.spilled: SpilledCaches | None = None
        self.depth = Depth(draft_tokens)
        self.wave, prefilled, self.plan = self._sizes(rows, wave, kept, drafter, draft_tokens)
        passengers = self.wave * model.passengers_of_row
        self.predicted = None if self.plan is None else model.budget.predict_decoding(passengers, self.plan)
        if self.predicted is not None and (self.predicted.is_for_assumed_machine or self.plan.is_ordinary):
            self.predicted = None  # rates of matrix products with few rows are not known well enough without reads
        self._waves = Waves(
            model,
            self.wave,
            chooser,
            tokenizer.eos_token_ids,
            kept,
            drafter,
            self.depth,
            prefilled,
            self.spilled,
        )
        for row, one in zip(rows, prompts):
            row.state = Text(tokenizer, stop if one.stop is None else one.stop)
            self._waves.add(row)
        self.drafted = self.accepted = 0
        self.seconds = 0.0

    def _sizes(
        self, rows: Sequence[Row], wave: int | None, kept: KeyValues, drafter: Any, draft_tokens: int | None
    ) -> tuple[int, int, Plan | None]:
        """(rows at a time, prompts that go through in one pass at most, the plan). Opens the spill file, if any."""
        model, n = self._model, min(len(rows), wave or len(rows))
        if not n:
            return 1, 1, None
        total = max(len(row.prompt) + row.limit for row in rows)
        if kept.spill_kv and (kept.kv_bits is not None or not model.can_spill):
            raise ConfigError(
                "--spill-kv cannot be used with --kv-bits, or with a model whose blocks form no chain. Leave it out"
            )
        if model.memory is None:
            n = min(n, wave or USUAL_WAVE)
            if kept.spill_kv:
                self._spill(n, total, kept)
            return n, n, None
        most_drafted = (draft_tokens or Depth().most) if drafter is not None else 0
        drafter_nbytes = 0
        if isinstance(drafter, DraftModel):
            drafter_nbytes = sum(kept_nbytes(drafter.model, KeyValues(), total))
        tokens = max(*(len(row.prompt) for row in rows), most_drafted + 1)
        model.budget.measure_anew()  # tokenizer and drafter are in memory now
        of_layers = kept_nbytes(model, kept, total)
        in_memory = list(of_layers)
        if kept.spill_kv:  # the newest tokens stay in memory; the budget adds two layers that are read back
            pieces = model.streamed_caches(kept_nbytes(model, kept, PIECE))
            in_memory[: len(pieces)] = pieces
        at_once, prompts, plan = model.budget.size_decoding(
            Wave(
                n,
                tokens,
                total,
                sum(in_memory) + drafter_nbytes,
                max(of_layers),
                lambda n: model.beside_nbytes(n, most_drafted, total),
                model.passengers_of_row,
            )
        )
        model.budget.follow_decoding(plan)
        if kept.spill_kv:
            self._spill(at_once, total, kept)
        return at_once, prompts, plan

    def _spill(self, rows: int, tokens: int, kept: KeyValues) -> None:
        """Open the file that takes the rows' keys and values. Caches that do not grow with the text stay in memory."""
        one, two = (self._model.streamed_caches(kept_nbytes(self._model, kept, n * PIECE)) for n in (1, 2))
        of_token = [nbytes // PIECE if more > nbytes else 0 for nbytes, more in zip(one, two)]
        self.spilled = SpilledCaches(self._model.budget.directory, rows, tokens, of_token)

    def close(self) -> None:
        """Remove the rows' keys and values from the disk. Answers that are not finished are lost."""
        if self.spilled is not None:
            self.spilled.close()

    @property
    def predicted_s(self) -> float | None:
        """Seconds of a pass over the whole wave, models in memory included; None where `predicted` is None."""
        return None if self.predicted is None else self.predicted.step_s + self._model.beside_s(self.wave)

    @property
    def tokens_per_reading(self) -> float:
        """Tokens of answers for each reading of the weights so far."""
        return self.tokens / self.passes if self.passes else 0.0

    @property
    def gain(self) -> float | None:
        """How many times as fast generating is with drafts, as measured; None: not known."""
        return self.depth.gain

    @property
    def prompts(self) -> int:
        return len(self._prompts)

    @property
    def is_done(self) -> bool:
        return self._waves.is_done

    @property
    def passes(self) -> int:
        return self._waves.passes

    @property
    def tokens(self) -> int:
        return self._waves.tokens

    @property
    def prompt_tokens(self) -> int:
        return self._waves.prompt_tokens

    def __iter__(self) -> Iterator[Answer]:
        try:
            while not self.is_done:
                yield from self.step()
        finally:
            self.close()

    def step(self) -> list[Answer]:
        """Read the weights once; returns the answers that this finished."""
        begin = time.perf_counter()
        finished = []
        for step in self._waves.step():
            row, text = step.row, step.row.state
            text.began = text.began or begin
            self.drafted += step.drafted
            self.accepted += max(len(step.tokens) - 1, 0) if step.drafted else 0
            segment = text.add(step.tokens, step.logprobs, self._tokenizer.eos_token_ids)
            if text.is_stopped and row.finish_reason is None:
                self._waves.remove(row)
            if text.is_stopped:
                row.finish_reason = "stop"
            if row.finish_reason is not None:
                segment += text.finish()
            if segment and self._on_text is not None:
                self._on_text(self._prompts[row.number], segment)
            if row.finish_reason is not None:
                finished.append(
                    Answer(
                        row.id,
                        row.number,
                        text.text,
                        text.tokens,
                        text.logprobs,
                        row.finish_reason,
                        len(row.prompt),
                        time.perf_counter() - text.began,
                    )
                )
        self.seconds += time.perf_counter() - begin
        return finished


class Text:
    """The text of an answer, as far as later tokens cannot change it.

    Attributes:
        text: what was given out so far.
        is_stopped: a stop text came. It is left out, and so is all that follows.
        tokens, logprobs: those that the text is made of.
        began: when the first pass with the row began, by `time.perf_counter`; 0 before that.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str]):
        self._detokenizer, self._stop = tokenizer.detokenizer, [text for text in stop if text]
        self._pending = ""
        self.text = ""
        self.is_stopped = False
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.began = 0.0

    def add(self, tokens: Sequence[int], logprobs: Sequence[float], ends: Iterable[int]) -> str:
        """Add tokens; returns the text that is certain now and was not before."""
        for token, logprob in zip(tokens, logprobs):
            if self.is_stopped:
                break
            self.tokens.append(token)
            self.logprobs.append(logprob)
            if token in ends:
                break
            self._detokenizer.add_token(token)
            self._take(self._detokenizer.last_segment)
        return self._give(self._n_held_back())

    def finish(self) -> str:
        """Note that no tokens follow; returns the rest of the text."""
        if not self.is_stopped:
            self._detokenizer.finalize()
            self._take(self._detokenizer.last_segment)
        return self._give(0)

    def _take(self, segment: str) -> None:
        self._pending += segment
        starts = [start for start in (self._pending.find(text) for text in self._stop) if start >= 0]
        if starts:
            self._pending, self.is_stopped = self._pending[: min(starts)], True

    def _n_held_back(self) -> int:
        """Number of characters at the end that may be the beginning of a stop text."""
        longest = max(map(len, self._stop), default=1)
        for n in range(min(longest - 1, len(self._pending)), 0, -1):
            if any(text.startswith(self._pending[-n:]) for text in self._stop):
                return n
        return 0

    def _give(self, n_held_back: int) -> str:
        n = len(self._pending) - (0 if self.is_stopped else n_held_back)
        given, self._pending = self._pending[:n], self._pending[n:]
        self.text += given
        return given


def generate(
    model: Decoder,
    prompts: Iterable[Prompt],
    *,
    tokenizer: Any = None,
    max_tokens: int = 256,
    stop: Sequence[str] = (),
    wave: int | None = None,
    draft: Any = None,
    draft_tokens: int | None = None,
    sampler: Sampler | None = None,
    logits_processors: Sequence[Processor] = (),
    adapter: bool | str = True,
    template: Template | None = None,
    kept: KeyValues | None = None,
    on_text: Callable[[Asked, str], None] | None = None,
    **sampling,
) -> Generation:
    """Answers to prompts, as an iterator that gives each `Answer` when it is finished.

    Args:
        prompts: texts that the model continues as they are, conversations (lists of messages) for the chat template,
            or lists of token ids.
        tokenizer: mlx-lm's; None: the model's own.
        stop: texts that end an answer, and are left out of it.
        wave: rows at a time; None: as many as fit into the model's memory.
        draft: "lookup", or mlx-lm's small model of the same vocabulary in memory. It guesses tokens, which never
            changes what is generated. None: the part of an emulated model that is in memory guesses.
        draft_tokens: how many tokens are guessed at a time at most; 0 for none.
        sampler: mlx-lm's, of log-probabilities `[n, V]`. logits_processors: of tokens `[n]` and logits `[1, V]`.
        adapter: as in `MicroBatch`.
        template: how texts become messages; by default they do not.
        kept: options of keys and values.
        on_text: is called with pieces of text as soon as they are certain.
        sampling: fields of `Sampling`: temp, top_p, min_p, top_k, repetition_penalty, seed and so on.
    Raises:
        ConfigError: an impossible setting, or too little memory for one prompt (names the least that would do).
    """
    if tokenizer is None:
        from ..data.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(model.path, model.embedding_rows)
    prompts = asked(prompts, tokenizer, template or Template(ignore_chat_template=True))
    try:
        options = Sampling(**sampling)
    except TypeError as e:
        raise ConfigError(f"generate: {str(e).replace('Sampling.__init__() ', '')}") from None
    return Generation(
        model,
        prompts,
        tokenizer,
        max_tokens,
        options,
        stop,
        wave,
        kept,
        draft,
        draft_tokens,
        sampler,
        logits_processors,
        adapter,
        on_text,
    )


def _chooser(
    usual: Sampling,
    prompts: Sequence[Asked],
    tokenizer: Any,
    sampler: Sampler | None,
    logits_processors: Sequence[Processor],
) -> Chooser | Choosers:
    """Chooses tokens by the run's sampling options, or by those of the row's own prompt."""

    def of(options: Sampling) -> Chooser:
        processors = [*options.processors(), *logits_processors]
        is_greedy = sampler is None and options.is_greedy
        return Chooser(sampler or options.sampler(tokenizer), processors, options.seed, is_greedy)

    choosers = {options: of(options) for options in {usual, *(one.sampling for one in prompts)} - {None}}
    if len(choosers) == 1:
        return choosers[usual]
    own = {repr(one.id): choosers[one.sampling] for one in prompts if one.sampling is not None}
    return Choosers(choosers[usual], own)


def kept_nbytes(model: Any, kept: KeyValues, tokens: int) -> list[int]:
    """Bytes that each block's cache of one row of so many tokens takes. A streamed model reads and computes nothing."""
    few = mx.zeros((1, 8), mx.int32)
    if hasattr(model, "look"):
        caches = model.new_cache(kept.max_kv_size)
        model.look(few, caches)
    else:  # mlx-lm's own model, in memory
        from mlx_lm.models.cache import make_prompt_cache

        caches = make_prompt_cache(model, kept.max_kv_size)
        mx.eval(model(few, cache=caches))
    return [_nbytes(cache, kept, tokens) for cache in caches]


def _nbytes(cache: Any, kept: KeyValues, tokens: int) -> int:
    if hasattr(cache, "caches"):  # a list of several
        return sum(_nbytes(c, kept, tokens) for c in cache.caches)
    keys, values = getattr(cache, "keys", None), getattr(cache, "values", None)
    if not isinstance(keys, mx.array) or keys.ndim != 4:
        return cache.nbytes
    window = getattr(cache, "max_size", None)
    step = getattr(cache, "step", 256)
    n = math.ceil(tokens / step) * step
    if window is not None:
        n = min(n, window + step)
    per_token = (keys.nbytes + values.nbytes) / keys.shape[2]
    if kept.kv_bits is None or window is not None or n <= kept.quantized_kv_start:
        return int(n * per_token)
    size = keys.dtype.size
    quantized = per_token / size * (kept.kv_bits / 8 + 2 * size / kept.kv_group_size)
    n_plain = min(n, kept.quantized_kv_start + step) if kept.quantized_kv_start else 0
    return int(max(n * quantized, n_plain * per_token))
