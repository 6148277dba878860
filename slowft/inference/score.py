"""Log-probabilities and perplexity of texts, of the base model and of adapters, in one pass over the weights.

Comes in: an opened model, texts (or samples, or tokens), adapters. Goes out: a `Score` for each adapter. Texts become
tokens as in training, so that scores are the losses of training, token by token.
"""

import math
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..data.files import Features
from ..data.rendering import Renderer
from ..data.samples import BadSample, understand
from ..data.store import TokenDataset
from ..engine.log_probabilities import LogProbabilities
from ..engine.model import BASE as BASE
from ..errors import ConfigError, DataError, SlowftError, SlowftWarning
from .decoder import Decoder
from .passes import Row, log_probabilities

ATTACHED = "adapter"  # name of the score with the attached adapter

Adapters = Mapping[str, str | Path] | Iterable[str | Path] | None


@dataclass
class SampleScore:
    """The score of one text with one adapter.

    Attributes:
        where: the text's place, such as "test.jsonl line 7".
        found: the log-probabilities of its tokens that count.
    """

    where: str
    found: LogProbabilities

    @property
    def tokens(self) -> int:
        """Number of tokens that count."""
        return len(self.found.target)

    @property
    def log_probabilities(self) -> np.ndarray:
        """Log-probabilities of the tokens that count, float32 `[tokens]`."""
        return self.found.target

    @property
    def total(self) -> float:
        """The text's log-probability: the sum over its tokens that count."""
        return float(self.found.target.sum(dtype=np.float64))

    @property
    def mean(self) -> float:
        return self.total / self.tokens

    @property
    def perplexity(self) -> float:
        return perplexity(self.mean)

    @property
    def is_exact(self) -> bool:
        """Whether each token that counts is the most probable one, so that greedy decoding of the prompt gives them."""
        return bool(self.found.is_greedy.all())


@dataclass
class Score:
    """The score of all texts with one adapter. `samples` are in the order of the texts."""

    name: str
    samples: list[SampleScore] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return sum(sample.tokens for sample in self.samples)

    @property
    def mean(self) -> float:
        """Log-probability per token."""
        return sum(sample.total for sample in self.samples) / self.tokens

    @property
    def perplexity(self) -> float:
        return perplexity(self.mean)

    @property
    def standard_error(self) -> float:
        """The standard error of `mean` for independent tokens, as in `mlx_lm.perplexity`; NaN for a single token."""
        if self.tokens < 2:
            return math.nan
        mean = self.mean
        squares = sum(float(((s.found.target.astype(np.float64) - mean) ** 2).sum()) for s in self.samples)
        return math.sqrt(squares / (self.tokens - 1) / self.tokens)

    @property
    def perplexity_error(self) -> float:
        """The standard error of `perplexity`, to first order."""
        return self.perplexity * self.standard_error

    @property
    def exact(self) -> float:
        """The share of texts in which every token that counts is the most probable one."""
        return sum(sample.is_exact for sample in self.samples) / len(self.samples)


def score(
    model: Decoder,
    texts: TokenDataset | Sequence[Any],
    adapters: Adapters = None,
    *,
    tokenizer=None,
    mask_prompt: bool = False,
    train_on: str | None = None,
    max_seq_length: int | None = None,
    top_k: int = 0,
    on_visit: Callable[[int], object] = lambda n: None,
) -> dict[str, Score]:
    """Score texts with the base model and with adapters. A reading of a block serves all texts that fit into memory.

    Args:
        texts: strings; samples such as {"prompt": ..., "completion": ...} or {"messages": ...}; a `TokenDataset` of
            `load_data`; or (tokens, prompt offset) pairs. Strings get the tokenizer's end token, as in training.
        adapters: {name: directory}, or directories, which are named after their last part, or names that
            `add_adapter` loaded. None: the attached adapter, if there is one, as "adapter".
        tokenizer: of `load_tokenizer`; None loads the model's own if texts are to be tokenized.
        mask_prompt, train_on: count only the last answer, or with "assistant" every answer, as in training.
        max_seq_length: longer texts are cut, with a warning; None cuts nothing.
        top_k: keep the most probable tokens at each place too, in `found.top_ids` and `found.top` of each sample.
        on_visit: called with the number of block passes since the last call.
    Returns:
        A `Score` by name. "base" is the first; for a model of `emulate`, "emulated" is the second.
    Raises:
        DataError: a text cannot be scored; says which, and why.
        AdapterError: a directory holds no adapter of this model.
        ConfigError: the model's memory is too little; names the least that would do.
    """
    rows, places = _rows(model, texts, tokenizer, mask_prompt, train_on, max_seq_length)
    variants = load_variants(model, adapters)
    return score_rows(model, rows, places, variants, top_k, on_visit)


def score_rows(
    model: Decoder,
    rows: Sequence[Row],
    places: Sequence[str],
    variants: Mapping[str, bool | str],
    top_k: int = 0,
    on_visit: Callable[[int], object] = lambda n: None,
) -> dict[str, Score]:
    """Score rows of tokens, with the variants of `load_variants`; see `score`."""
    by_row: dict[tuple[int, bool | str], LogProbabilities] = {}
    adapters = list(variants.values())
    for number, adapter, of_row in log_probabilities(model, rows, adapters, top_k, on_visit=on_visit):
        if not np.isfinite(of_row.target).all():
            raise SlowftError(
                f"{places[number]} has a log-probability that is {of_row.target.min()}. Check the weights of model and "
                "adapter for NaN"
            )
        by_row[number, adapter] = of_row
    return {
        name: Score(name, [SampleScore(place, by_row[i, adapter]) for i, place in enumerate(places)])
        for name, adapter in variants.items()
    }


def load_variants(model: Decoder, adapters: Adapters) -> dict[str, bool | str]:
    """What is scored: name -> adapter of a `MicroBatch`, the base model first. Adapters in directories are loaded."""
    variants = dict(model.scored)
    if adapters is None:
        return variants | ({ATTACHED: True} if model.has_adapter else {})
    if isinstance(adapters, str | Path):
        adapters = [adapters]
    loaded = set(model.adapter_names)
    if isinstance(adapters, Mapping):
        named = [(name, Path(path)) for name, path in adapters.items()]
    else:
        named = [(str(a), None) if a in loaded else (Path(a).expanduser().resolve().name, Path(a)) for a in adapters]
    for name, path in named:
        if name in variants:
            raise ConfigError(f"{'no adapter may be' if name in model.scored else 'two adapters are'} named {name}")
        if path is not None:
            model.add_adapter(name, path)
        variants[name] = name
    return variants


def rows_of(dataset: TokenDataset) -> tuple[list[Row], list[str]]:
    """(the rows of a dataset, where each came from)."""
    samples = map(dataset.sample, range(len(dataset)))
    rows = [Row(tokens, [(int(first), int(last)) for first, last in pairs]) for tokens, pairs in samples]
    return rows, [dataset.where(i) for i in range(len(dataset))]


def perplexity(mean: float) -> float:
    """The perplexity at a mean log-probability."""
    return math.exp(min(-mean, 700))  # e^710 is above the largest float


def _rows(
    model: Decoder, texts, tokenizer, mask_prompt: bool, train_on: str | None, max_seq_length: int | None
) -> tuple[list[Row], list[str]]:
    """(rows of the texts, where each came from). Texts that are cut give a warning."""
    if isinstance(texts, str):
        raise DataError("texts must be a list, got one text. Put it into a list")
    limit = max_seq_length or sys.maxsize
    rows, places, n_cut = [], [], 0
    if isinstance(texts, TokenDataset):
        rows, places = rows_of(texts)
        n_cut = sum(len(row.tokens) > limit for row in rows)
        rows = [Row(row.tokens[:limit], row.pairs) for row in rows]
    elif texts and isinstance(texts[0], str | Mapping):
        if tokenizer is None:
            from ..data.tokenizer import load_tokenizer

            tokenizer = load_tokenizer(model.path, model.embedding_rows)
            model.budget.measure_anew()  # the tokenizer is in memory now

        def note(message: str) -> None:
            warnings.warn(message, SlowftWarning, stacklevel=2)

        rows, places, n_cut = _rendered(texts, Renderer(tokenizer, limit, mask_prompt, train_on, note))
    else:
        n_cut = sum(len(tokens) > limit for tokens, _ in texts)
        rows = [Row(list(tokens)[:limit], [(offset, len(tokens))]) for tokens, offset in texts]
        places = [f"text {i + 1}" for i in range(len(texts))]
    if not rows:
        raise DataError("there are no texts to score")
    for row, place in zip(rows, places):
        if not row.n_counted:
            n_prompt = row.pairs[0][0] if row.pairs else len(row.tokens)
            raise DataError(f"{place} has no token to score: it has {len(row.tokens)}, {n_prompt} of them prompt")
    if n_cut:
        warnings.warn(f"{n_cut} of {len(rows)} texts are cut to {limit} tokens", SlowftWarning, stacklevel=3)
    return rows, places


def _rendered(texts: Sequence[Any], renderer: Renderer) -> tuple[list[Row], list[str], int]:
    """(rows of strings and samples, where each came from, how many were cut)."""
    rows, places, n_cut = [], [], 0
    for i, text in enumerate(texts):
        place = f"text {i + 1}"
        try:
            sample = understand({"text": text} if isinstance(text, str) else text, Features())
            for rendered in renderer.render(sample):
                rows.append(Row(rendered.tokens, rendered.pairs))
                places.append(place)
                n_cut += rendered.is_cut
        except (BadSample, DataError) as e:
            raise DataError(f"{place} {e}" if isinstance(e, BadSample) else f"{place}: {e}") from None
    return rows, places, n_cut
