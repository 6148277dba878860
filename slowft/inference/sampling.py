"""Chooses the next token of a row from its logits, by mlx-lm's processors and samplers.

Each token is drawn with a seed made of the run's seed, the row's id and the token's place in the answer. So it does not
depend on which rows are generated together, on memory, on drafts, or on whether a run was stopped.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import mlx.core as mx

from ..errors import ConfigError

# The least and the most that options may be; mlx-lm refuses others with a traceback, or takes them for something else.
LIMITS: dict[str, tuple[float, float | None]] = {
    "temp": (0, None),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "top_k": (0, None),
    "min_tokens_to_keep": (1, None),
    "xtc_probability": (0, 1),
    "xtc_threshold": (0, 0.5),
    "repetition_penalty": (0, None),
    "repetition_context_size": (1, None),
}

Sampler = Callable[[mx.array], mx.array]
Processor = Callable[[mx.array, mx.array], mx.array]


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are chosen. Names, defaults and meanings are those of the options of `mlx_lm.generate`.

    Attributes:
        temp: 0 takes the likeliest token.
        top_p, min_p, top_k: 0 turns them off. xtc_probability, xtc_threshold: as in `mlx_lm.sample_utils`.
        repetition_penalty: for tokens that are among the last `repetition_context_size`.
        seed: of the random numbers.
    """

    temp: float = 0.0
    top_p: float = 1.0
    min_p: float = 0.0
    top_k: int = 0
    min_tokens_to_keep: int = 1
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.0
    repetition_penalty: float | None = None
    repetition_context_size: int = 20
    seed: int = 0


@dataclass(frozen=True)
class Sampling(SamplingOptions):
    """The options with two penalties more, which only Python and suites can give. They cover the same tokens."""

    presence_penalty: float | None = None
    frequency_penalty: float | None = None

    def __post_init__(self):
        for name, (low, high) in LIMITS.items():
            value = getattr(self, name)
            if value is not None and not (low <= value and (high is None or value <= high)):  # not a number neither
                between = f"from {low} to {high}" if high is not None else f"{low} or more"
                raise ConfigError(f"--{name.replace('_', '-')} must be {between}, got {value}")

    @property
    def is_greedy(self) -> bool:
        return self.temp == 0

    def sampler(self, tokenizer: Any = None) -> Sampler:
        """mlx-lm's sampler, which takes log-probabilities `[n, V]`."""
        from mlx_lm.sample_utils import make_sampler

        special = []
        if self.xtc_probability and tokenizer is not None:
            special = [*tokenizer.encode("\n"), *tokenizer.eos_token_ids]
        return make_sampler(
            self.temp,
            self.top_p,
            self.min_p,
            self.min_tokens_to_keep,
            top_k=self.top_k,
            xtc_probability=self.xtc_probability,
            xtc_threshold=self.xtc_threshold,
            xtc_special_tokens=special,
        )

    def processors(self) -> list[Processor]:
        """mlx-lm's processors, which take the tokens `[n]` so far and logits `[1, V]`."""
        from mlx_lm.sample_utils import make_logits_processors

        n = self.repetition_context_size
        return make_logits_processors(
            None, self.repetition_penalty, n, self.presence_penalty, n, self.frequency_penalty, n
        )

    def as_dict(self) -> dict[str, Any]:
        """Options that differ from their defaults, with temp and seed always, for a row of a file."""
        usual = asdict(Sampling())
        return {name: value for name, value in asdict(self).items() if value != usual[name] or name in ("temp", "seed")}


def place_seed(seed: int, row: Any, place: int) -> int:
    """The seed of the random numbers for one token of a row's answer.

    It is a hash, so that neighbouring seeds, rows and places get unrelated random numbers.
    """
    digest = hashlib.blake2b(f"{seed}\0{row!r}\0{place}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


class Chooses(Protocol):
    """The interface that waves and drafts use: a `Chooser`, or `Choosers`."""

    @property
    def reads_tokens(self) -> bool: ...

    def choose(
        self, logits: mx.array, rows: Sequence[tuple[Any, int, Sequence[int]]]
    ) -> tuple[list[int], list[float]]: ...


class Choosers:
    """Chooses tokens of rows that are sampled in several ways, each by the row's own chooser.

    Args:
        usual: the chooser of rows that have none of their own. own: choosers by `repr` of the row's id.
    """

    def __init__(self, usual: "Chooser", own: Mapping[str, "Chooser"]):
        self._usual, self._own = usual, own

    @property
    def reads_tokens(self) -> bool:
        return any(chooser.reads_tokens for chooser in (self._usual, *self._own.values()))

    def choose(self, logits: mx.array, rows: Sequence[tuple[Any, int, Sequence[int]]]) -> tuple[list[int], list[float]]:
        """As `Chooser.choose`. Rows of one chooser are chosen for together."""
        places: dict[int, list[int]] = {}
        choosers = [self._own.get(repr(row), self._usual) for row, _, _ in rows]
        for i, chooser in enumerate(choosers):
            places.setdefault(id(chooser), []).append(i)
        chosen: list[tuple[int, float]] = [(0, 0.0)] * len(rows)
        for numbers in places.values():
            part = logits if len(places) == 1 else logits[mx.array(numbers)]
            tokens_and_logprobs = choosers[numbers[0]].choose(part, [rows[i] for i in numbers])
            for i, *token_and_logprob in zip(numbers, *tokens_and_logprobs):
                chosen[i] = tuple(token_and_logprob)
        tokens, logprobs = zip(*chosen)
        return list(tokens), list(logprobs)


class Chooser:
    """Chooses tokens.

    Args:
        processors: change logits; each is given the row's tokens so far, prompt included.
        is_greedy: the sampler draws no random numbers, and takes many rows at once.
        told: before anything is chosen, log-probabilities float32 `[n, V]` of the rows; None: nobody asks.
    """

    def __init__(
        self,
        sampler: Sampler,
        processors: Sequence[Processor],
        seed: int,
        is_greedy: bool,
        told: Callable[[mx.array], None] | None = None,
    ):
        self._sampler, self._processors, self._seed, self._is_greedy = sampler, list(processors), seed, is_greedy
        self._told = told

    @property
    def reads_tokens(self) -> bool:
        """Whether a choice depends on the row's earlier tokens."""
        return bool(self._processors)

    def choose(self, logits: mx.array, rows: Sequence[tuple[Any, int, Sequence[int]]]) -> tuple[list[int], list[float]]:
        """(a token for each row of the logits `[n, V]`, their log-probabilities before sampling removes any token).

        Args:
            rows: (id, place in the answer, tokens before it) of each. The tokens are only needed if `reads_tokens`.
        """
        if self._processors:
            parts = []
            for i, (_, _, tokens) in enumerate(rows):
                context, part = mx.array(tokens), logits[i : i + 1]
                for processor in self._processors:
                    part = processor(context, part)
                parts.append(part)
            logits = mx.concatenate(parts)
        # What is sampled from is mlx-lm's, in the logits' dtype. What is reported is taken in float32: bfloat16, which
        # a Mac computes in, would round the sum by up to 0.06 where logits are 16 to 32.
        exact = logits.astype(mx.float32)
        total = mx.logsumexp(exact, axis=-1, keepdims=True)
        if self._told is not None:
            self._told(exact - total)
        is_exact = logits.dtype == mx.float32
        logprobs = logits - (total if is_exact else mx.logsumexp(logits, axis=-1, keepdims=True))
        if self._is_greedy:
            chosen = self._sampler(logprobs)
        else:
            drawn = []
            for i, (row, place, _) in enumerate(rows):
                mx.random.seed(place_seed(self._seed, row, place))
                drawn.append(self._sampler(logprobs[i : i + 1]))
                mx.eval(drawn[-1])
            chosen = mx.concatenate(drawn)
        of_chosen = (mx.take_along_axis(exact, chosen[:, None], axis=-1) - total)[:, 0]
        mx.eval(chosen, of_chosen)
        return chosen.tolist(), of_chosen.tolist()
