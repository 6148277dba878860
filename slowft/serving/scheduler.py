"""The one thread that owns the models. Requests join its passes over the weights, and leave when they are answered.

Comes in: token ids and sampling options, from any thread. Goes out: pieces of text, on a queue for each request.
Requests are taken in the order in which they came, and each is told how many passes it waits at most. Knows nothing of
HTTP.
"""

import heapq
import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from itertools import count, product
from typing import Any

import mlx.core as mx

from .. import platform
from ..engine.budget import Budget, Wave
from ..errors import SlowftError, gpu_error
from ..inference.decoder import Decoder
from ..inference.drafts import Depth, DraftModel
from ..inference.generate import OWN_DRAFT, USUAL_WAVE, Text, kept_nbytes
from ..inference.prompts import Asked, check
from ..inference.rows import Row
from ..inference.sampling import Chooser, Choosers, Processor, Sampler, Sampling
from ..inference.waves import KeyValues, Waves, can_forget
from ..planning.plan import Plan
from ..weights.threads import Worker

IDLE_CHECK_S = 0.5  # seconds that an idle thread sleeps at most
ROUNDED = 64  # tokens: lengths are rounded up to this or more, so that few plans are made
GREEDY = Sampling()


@dataclass(frozen=True)
class Token:
    """One token of an answer.

    Attributes:
        logprob: its log-probability before sampling removed any token.
        top: (id, log-probability) of the likeliest tokens at its place.
    """

    id: int
    logprob: float
    top: Sequence[tuple[int, float]] = ()


@dataclass(frozen=True)
class Piece:
    """What a pass added to an answer. `finish_reason` is "stop" or "length" in the last piece, and None before it."""

    text: str
    tokens: list[Token]
    finish_reason: str | None


@dataclass(eq=False)
class Wanted:
    """A request for an answer.

    Attributes:
        prompt: token ids. limit: the most tokens of the answer. stop: texts that end it.
        voice: the model that answers. adapter: as in `MicroBatch`.
        sampler: makes mlx-lm's sampler and processors, on the thread that uses them; None: the likeliest token.
        seed: of random numbers. n_top: how many of the likeliest tokens `Token.top` has.
        events: gets the request itself when it was taken in, then `Piece`s. An exception ends it.
        promised: passes that it waits at most. waited: passes that it waited. None: not known yet.
        came: the round in which it was taken in.
    """

    prompt: list[int]
    limit: int
    voice: "Voice"
    adapter: bool | str = True
    stop: Sequence[str] = ()
    sampler: Callable[[], tuple[Sampler, list[Processor]]] | None = None
    seed: int = 0
    n_top: int = 0
    is_greedy: bool = True
    events: "queue.SimpleQueue[Any]" = field(default_factory=queue.SimpleQueue)
    promised: int | None = None
    waited: int | None = None
    is_cancelled: bool = False
    text: Any = None
    row: Row | None = None
    came: int = 0
    error: Exception | None = None

    @property
    def left(self) -> int:
        """Tokens that may still come."""
        return self.limit - (0 if self.row is None else len(self.row.answer))


class Voice:
    """A model, and the rows that it generates.

    Args:
        tokenizer: mlx-lm's. wave: rows at a time at most.

    Attributes:
        own: choosers of rows that have their own, by `repr` of the row's id.
    """

    def __init__(self, model: Decoder, tokenizer: Any, wave: int):
        self.model, self.tokenizer, self._wave = model, tokenizer, wave
        self.own: dict[str, OneRow] = {}
        self._choosers = Choosers(Chooser(GREEDY.sampler(), [], 0, True), self.own)
        drafter = model.drafter_model() if can_forget(model.new_cache()) else None
        self._drafter = None if drafter is None else DraftModel(drafter, self._choosers)
        self.most_drafted = OWN_DRAFT if drafter is not None else 0
        self.waves = self._new_waves()

    def drop_all(self) -> None:
        """Remove all rows."""
        self.own.clear()
        self.waves = self._new_waves()

    def row_nbytes(self, tokens: int) -> tuple[list[int], int]:
        """(bytes of each layer's cache for a row of so many tokens, bytes of the draft model's caches)."""
        drafts = 0 if self._drafter is None else sum(kept_nbytes(self._drafter.model, KeyValues(), tokens))
        return kept_nbytes(self.model, KeyValues(), tokens), drafts

    def _new_waves(self) -> Waves:
        depth = Depth(self.most_drafted or None)
        return Waves(self.model, self._wave, self._choosers, self.tokenizer.eos_token_ids, None, self._drafter, depth)


class OneRow:
    """Chooses the tokens of one answer as `slowft generate` would for a single prompt, and notes the likeliest tokens.

    An error, such as with settings that mlx-lm's samplers do not take, ends this answer and no other.
    """

    def __init__(self, wanted: Wanted):
        assert wanted.sampler is not None
        sampler, processors = wanted.sampler()
        self._wanted, self.top = wanted, {}
        self._likeliest: list[list[tuple[int, float]]] = []
        note = self._note if wanted.n_top else None
        self._chooser = Chooser(sampler, processors, wanted.seed, wanted.is_greedy, note)

    @property
    def reads_tokens(self) -> bool:
        return self._chooser.reads_tokens

    def choose(self, logits: mx.array, rows: Sequence[tuple[Any, int, Sequence[int]]]) -> tuple[list[int], list[float]]:
        self._likeliest.clear()
        try:
            found = self._chooser.choose(logits, [(0, place, tokens) for _, place, tokens in rows])
        except Exception as e:
            if gpu_error(e) is not None:  # of the whole pass
                raise
            self._wanted.error = e
            return [0] * len(rows), [0.0] * len(rows)
        for (_, place, _), likeliest in zip(rows, self._likeliest):
            self.top[place] = likeliest
        return found

    def _note(self, logprobs: mx.array) -> None:
        ids = mx.argsort(-logprobs, axis=-1)[:, : self._wanted.n_top]
        values = mx.take_along_axis(logprobs, ids, axis=-1)
        self._likeliest = [list(zip(*row)) for row in zip(ids.tolist(), values.tolist())]


class Scheduler:
    """Runs the models' passes.

    Args:
        open_models: is called on the thread; gives (voices, a function that closes the models).
        wave: rows at a time at most; None: as many as fit into memory, up to 32.

    Attributes:
        voices: the models that were opened.
        rounds: how often all voices that had rows made a pass. wave: rows at a time by the last plan.
        longest_wait: (promised, waited) of the request that waited for the most passes.
    """

    def __init__(self, open_models: Callable[[], tuple[list[Voice], Callable[[], None]]], wave: int | None = None):
        self._open_models, self._limit = open_models, wave or USUAL_WAVE
        self.voices: list[Voice] = []
        self.rounds, self.wave = 0, self._limit
        self.longest_wait = (0, 0)
        self._inbox: deque[Wanted] = deque()
        self._waiting: deque[Wanted] = deque()
        self._active: list[Wanted] = []
        self._sizes: dict[tuple[int, int], tuple[int, int]] = {}
        self._plans: dict[tuple[int, int, int], Plan | None] = {}
        self._followed: tuple[int, int, int] | None = None
        self._numbers = count()
        self._changed = threading.Condition()
        self._is_closing = False
        self._is_open = threading.Event()
        self._failure: BaseException | None = None
        self._worker = Worker("slowft-passes")
        self._done: Future | None = None  # is done when the thread has ended

    def start(self) -> None:
        """Open the models.

        Raises:
            SlowftError: what opening them raised.
        """
        self._done = self._worker.submit(self._run)
        self._is_open.wait()
        if self._failure is not None:
            raise self._failure

    def want(self, wanted: Wanted) -> None:
        """Have a request answered. Its queue says whether it was taken in.

        Raises:
            ConfigError, DataError: the model cannot take the prompt.
        """
        check([Asked(0, wanted.prompt, wanted.prompt)], wanted.voice.model.embedding_rows)
        with self._changed:
            self._inbox.append(wanted)
            self._changed.notify()

    def cancel(self, wanted: Wanted) -> None:
        """End a request whose answer nobody waits for any more."""
        with self._changed:
            wanted.is_cancelled = True
            self._changed.notify()

    def close(self, timeout_s: float | None = None) -> None:
        """End the thread after the current pass, even amid answers; wait for it no longer than `timeout_s`."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        if self._done is not None:
            wait([self._done], timeout_s)
        if not self.is_well:
            self._worker.close()

    @property
    def is_well(self) -> bool:
        """Whether the thread is running: it makes passes, or waits for requests."""
        return self._done is not None and not self._done.done()

    def state(self) -> dict[str, Any]:
        """What /health shows."""
        promised, waited = self.longest_wait
        return {
            "wave": self.wave,
            "running": len(self._active),
            "waiting": len(self._waiting) + len(self._inbox),
            "passes": self.rounds,
            "longest_wait": {"promised_passes": promised, "waited_passes": waited},
        }

    # --- On the thread ---------------------------------------------------------------------------------

    def _run(self) -> None:
        close = None
        try:
            self.voices, close = self._open_models()
            self.wave = self._size(ROUNDED, 2 * ROUNDED)[0]
        except BaseException as e:
            self._failure = e
            if close is not None:
                close()
            return
        finally:
            self._is_open.set()
        try:
            while self._wait_for_work():
                with platform.kept_awake():
                    while self._has_work and not self._is_closing:
                        self._take_in()
                        self._forget_cancelled()
                        self._admit()
                        self._round()
        finally:
            for wanted in (*self._active, *self._waiting, *self._inbox):
                wanted.events.put(SlowftError("the server is ending"))
            close()

    def _wait_for_work(self) -> bool:
        with self._changed:
            while not (self._is_closing or self._has_work):
                self._changed.wait(IDLE_CHECK_S)
            return not self._is_closing

    @property
    def _has_work(self) -> bool:
        return bool(self._inbox or self._waiting or self._active)

    def _take_in(self) -> None:
        """Move requests from the inbox to those that wait, and promise each how long."""
        while self._inbox:
            wanted = self._inbox.popleft()
            if wanted.is_cancelled:
                continue
            try:
                wanted.promised = self._promise(wanted)
            except SlowftError as e:  # memory is too little for so long a request
                wanted.events.put(e)
                continue
            wanted.came = self.rounds
            self._waiting.append(wanted)
            wanted.events.put(wanted)

    def _forget_cancelled(self) -> None:
        self._waiting = deque(wanted for wanted in self._waiting if not wanted.is_cancelled)
        for wanted in [wanted for wanted in self._active if wanted.is_cancelled]:
            wanted.voice.waves.remove(wanted.row)
            self._leave(wanted)

    def _admit(self) -> None:
        """Let waiting rows join, in the order in which they came, while the plan for the longest of them has room."""
        n_prompts = 0
        while self._waiting:
            wanted = self._waiting[0]
            shape = self._shape([*self._active, wanted])
            size, prefilled = self._size(*shape)
            if len(self._active) >= size or n_prompts >= prefilled:
                break
            self._waiting.popleft()
            if self._begin(wanted):
                n_prompts += 1
        if self._active:
            shape = self._shape(self._active)
            self.wave = self._size(*shape)[0]
            try:
                self._follow(min(self.wave, 1 << (len(self._active) + len(self._waiting) - 1).bit_length()), *shape)
            except Exception as e:  # it reads weights that are to stay
                for voice in self.voices:
                    self._drop_all(voice, e)

    def _begin(self, wanted: Wanted) -> bool:
        number = next(self._numbers)
        try:
            if wanted.sampler is not None:
                wanted.voice.own[repr(number)] = OneRow(wanted)
            wanted.text = Text(wanted.voice.tokenizer, wanted.stop)
            wanted.row = Row(number, number, wanted.prompt, wanted.limit, wanted.adapter, state=wanted)
        except Exception as e:  # settings that mlx-lm's samplers do not take
            wanted.voice.own.pop(repr(number), None)
            wanted.events.put(e)
            return False
        wanted.voice.waves.add(wanted.row)
        wanted.waited = self.rounds - wanted.came
        self.longest_wait = max(self.longest_wait, (wanted.promised, wanted.waited), key=lambda both: both[1])
        self._active.append(wanted)
        return True

    def _round(self) -> None:
        """One pass of each model that has rows."""
        for voice in self.voices:
            if not any(wanted.voice is voice for wanted in self._active):
                continue
            try:
                steps = voice.waves.step()
            except Exception as e:  # such as a failing drive, or too little memory: the next pass may succeed
                self._drop_all(voice, e)
                continue
            for step in steps:
                self._deliver(step.row.state, step.tokens, step.logprobs)
        self.rounds += 1

    def _drop_all(self, voice: Voice, error: Exception) -> None:
        """End a voice's rows, as their pass failed."""
        for wanted in [wanted for wanted in self._active if wanted.voice is voice]:
            wanted.events.put(gpu_error(error) or error)
            self._leave(wanted)
        voice.drop_all()
        self._followed = None

    def _deliver(self, wanted: Wanted, tokens: Sequence[int], logprobs: Sequence[float]) -> None:
        """Put what a pass added to an answer on its queue, and end the answer if it is finished."""
        row, text, own = wanted.row, wanted.text, wanted.voice.own.get(repr(wanted.row.id))
        if wanted.error is not None:
            wanted.voice.waves.remove(row)
            wanted.events.put(wanted.error)
            self._leave(wanted)
            return
        n_before = len(text.tokens)
        segment = text.add(tokens, logprobs, wanted.voice.tokenizer.eos_token_ids)
        if text.is_stopped and row.finish_reason is None:
            wanted.voice.waves.remove(row)
        reason = "stop" if text.is_stopped else row.finish_reason
        if reason is not None:
            segment += text.finish()
        new = [
            Token(text.tokens[i], text.logprobs[i], () if own is None else own.top.pop(i, ()))
            for i in range(n_before, len(text.tokens))
        ]
        wanted.events.put(Piece(segment, new, reason))
        if reason is not None:
            self._leave(wanted)

    def _leave(self, wanted: Wanted) -> None:
        self._active.remove(wanted)
        wanted.voice.own.pop(repr(wanted.row.id), None)

    # --- What there is room for ------------------------------------------------------------------------

    def _promise(self, wanted: Wanted) -> int:
        """Passes that a request waits at most, if every answer becomes as long as its limit.

        It is not known which rows will be together when it is admitted. So the smallest wave of any of them is assumed.
        """
        ahead = [*self._active, *self._waiting, wanted]
        shapes = [self._shape([one]) for one in ahead]
        tokens, totals = {tokens for tokens, _ in shapes}, {total for _, total in shapes}
        sizes = [self._size(t, max(t, total)) for t, total in product(tokens, totals)]
        size, prefilled = min(size for size, _ in sizes), min(prefilled for _, prefilled in sizes)
        return passes_ahead(
            [one.left for one in self._active], [one.limit for one in (*self._waiting, wanted)], size, prefilled
        )

    def _shape(self, rows: Sequence[Wanted]) -> tuple[int, int]:
        """(most tokens of a prompt, most tokens of a prompt with its answer), rounded up to few shapes."""
        tokens = max(len(one.prompt) for one in rows)
        total = max(len(one.prompt) + one.limit for one in rows)
        return rounded(tokens), rounded(total)

    def _size(self, tokens: int, total: int) -> tuple[int, int]:
        """(rows at a time, prompts that go through in one pass at most)."""
        if (tokens, total) not in self._sizes:
            self._sizes[tokens, total] = self._budget.size_decoding(self._wave_of(self._limit, tokens, total))[:2]
        return self._sizes[tokens, total]

    def _follow(self, rows: int, tokens: int, total: int) -> None:
        """Follow the plan for so many rows. Memory that they do not need keeps weights."""
        key = rows, tokens, total
        if self._followed is not None and self._followed[1:] == key[1:] and self._followed[0] // 4 < rows:
            key = max(key, self._followed)  # so that weights are not dropped and read again whenever rows come and go
        if key == self._followed:
            return
        if key not in self._plans:
            self._plans[key] = self._budget.size_decoding(self._wave_of(*key))[2]
        self._budget.follow_decoding(self._plans[key])
        self._followed = key

    def _wave_of(self, rows: int, tokens: int, total: int) -> Wave:
        """So many rows of any voice, with the memory of the voice that needs the most."""
        kept = [voice.row_nbytes(total) for voice in self.voices]
        drafted = max(voice.most_drafted for voice in self.voices)
        models = [voice.model for voice in self.voices]
        return Wave(
            rows,
            max(tokens, drafted + 1),
            total,
            max(sum(of_layers) + drafts for of_layers, drafts in kept),
            max(max(of_layers) for of_layers, _ in kept),
            lambda n: max(model.beside_nbytes(n, drafted, total) for model in models),
            max(model.passengers_of_row for model in models),
        )

    @property
    def _budget(self) -> Budget:
        return self.voices[0].model.budget


def rounded(tokens: int) -> int:
    """`tokens` rounded up to a multiple of a quarter of the power of two below, or of `ROUNDED` if that is larger."""
    step = max(ROUNDED, 1 << max(0, tokens.bit_length() - 3))
    return -(-tokens // step) * step


def passes_ahead(running: Sequence[int], waiting: Sequence[int], size: int, prefilled: int) -> int:
    """Passes until the last of the waiting answers begins, if no answer ends before its limit.

    Args:
        running: tokens that may still come of each answer that is being made.
        waiting: tokens of each answer that waits, in their order.
        size: rows at a time. prefilled: prompts that go through in one pass at most.
    """
    ends = list(running)  # the passes after which rows leave
    heapq.heapify(ends)
    now = n_prompts = 0
    for limit in waiting:
        if n_prompts == prefilled:
            now, n_prompts = now + 1, 0
        while len(ends) >= size or ends and ends[0] <= now:
            end = heapq.heappop(ends)
            if end > now:
                now, n_prompts = end, 0
        heapq.heappush(ends, now + limit)
        n_prompts += 1
    return now
