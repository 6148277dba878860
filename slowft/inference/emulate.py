"""A large model that behaves as if it had been fine-tuned as a small one was, without any training, at decoding.

    log p(x) = log p_large(x) + sum_i w_i (log p_small,tuned_i(x) - log p_small,base(x)) - log Z

at every token, over the vocabulary, in float32 (Mitchell et al., arXiv 2310.12962). Seen in another way, a mixture of
small models, sum_i w_i log p_small,tuned_i + (1 - sum_i w_i) log p_small,base, is scaled up by p_large / p_small,base.

Comes in: two models of one vocabulary, and what the second learnt (its deltas). Goes out: an object for generating and
scoring, used like a streamed model. The larger model streams and the other one is in memory. A small base with the
deltas of a large model (down-scaling) is the same sum.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..engine.budget import Budget
from ..engine.in_memory import ModelInMemory, load_in_memory
from ..engine.log_probabilities import LogProbabilities, Mix, Mixing
from ..engine.model import BASE, MicroBatch, StreamedModel, compute_dtype_of, open_model
from ..engine.spilled_caches import SpilledCaches
from ..engine.stats import Stats
from ..errors import AdapterError, ConfigError
from ..models.adapters import digest
from ..models.directories import ADAPTER_CONFIG as CONFIG
from ..models.loading import resolve
from .variants import CHUNK, LOGITS_NBYTES, Variants
from .vocabularies import check_same_vocabulary

EMULATED = "emulated"  # name of the emulated model's score
# Log-probability of tokens that a model never gives (phi3small's logit of some is minus infinity), so that differences
# are numbers.
NEVER = -1e4


@dataclass(frozen=True)
class Term:
    """One of the log-probabilities that are added up.

    Attributes:
        weight: its weight in the sum. of_mixture: its weight in the mixture of small models.
        adapter: False for none, or a name; None: the adapter that the row asks for.
    """

    weight: float
    of_mixture: float
    adapter: bool | str | None = None


OF_LARGE = Term(1.0, 0.0)  # the large model, with the adapter that a row asks for


class Emulated:
    """Two models and deltas, used as one model. Made by `emulate`.

    `emulated(tokens, cache=None)` gives log-probabilities `[B, T, V]` in float32, by mlx-lm's call signature.

    Args:
        streamed: the larger model. of_streamed: its terms.
        in_memory: variants of models in memory, each with its terms.
        vocab_size: number of token ids that all models have.
        nucleus: a probability. The large model counts only for the mixture's likeliest tokens that have it together,
            and the mixture alone counts for the others. None: the large model counts for all tokens.
        path: directory of the tokenizer and chat template that the tuned model was tuned with.
        fingerprint: of the large model.
        about: the models, adapters and weights that the output depends on, for a row of a file of answers.
        is_up: the large model is the one that streams (up-scaling).

    Attributes:
        streamed, in_memory, path, about: as given.
    """

    def __init__(
        self,
        streamed: StreamedModel,
        of_streamed: Sequence[Term],
        in_memory: Sequence[tuple[Variants, Sequence[Term]]],
        vocab_size: int,
        nucleus: float | None,
        path: Path,
        fingerprint: str,
        about: dict[str, Any],
        is_up: bool,
    ):
        self.streamed, self.path, self.about, self.is_up_scaling = streamed, path, about, is_up
        self._terms, self.in_memory = tuple(of_streamed), tuple(in_memory)
        self._vocab_size, self._nucleus, self._fingerprint = vocab_size, nucleus, fingerprint
        self._sizes = [len(streamed.new_cache())] * len(of_streamed) + [len(v.make_cache()) for v, _ in in_memory]
        self._drafter = Mixture(self._drafting(), vocab_size)

    # --- What mlx-lm calls ---------------------------------------------------------------------------

    def __call__(self, tokens: mx.array, cache: list[Any] | None = None) -> mx.array:
        """Log-probabilities float32 `[B, T, V]`."""
        chunks: list[mx.array] = []
        cache = self.new_cache() if cache is None else cache
        batch = tokens.astype(mx.int32), cache, mx.arange(tokens.size), True
        self.decode([batch], lambda _, first, logits: chunks.append(logits))
        return mx.concatenate(chunks).reshape(*tokens.shape, -1)

    def make_cache(self) -> list[Any]:
        """One list with the caches of all models."""
        return self.new_cache()

    @property
    def layers(self) -> list[nn.Module]:
        """The streamed model's layers."""
        return self.streamed.layers

    # --- What generating asks for (`Decoder`) --------------------------------------------------------

    @property
    def embedding_rows(self) -> int:
        return self._vocab_size

    @property
    def memory(self) -> int | None:
        return self.streamed.memory

    @property
    def budget(self) -> Budget:
        return self.streamed.budget

    @property
    def stats(self) -> Stats:
        return self.streamed.stats

    @property
    def passengers_of_row(self) -> int:
        return len(self._terms)

    @property
    def can_spill(self) -> bool:
        return self.streamed.can_spill

    def new_cache(self, max_kv_size: int | None = None) -> list[Any]:
        """A new row's caches: the streamed model's for each of its terms, then those of models in memory."""
        streamed = [cache for _ in self._terms for cache in self.streamed.new_cache(max_kv_size)]
        return streamed + [cache for variants, _ in self.in_memory for cache in variants.make_cache(max_kv_size)]

    def streamed_caches(self, caches: Sequence[Any]) -> Sequence[Any]:
        return caches[: sum(self._sizes[: len(self._terms)])]

    def beside_nbytes(self, rows: int, drafted: int, tokens: int) -> int:
        # The sums of a pass stay in memory until the streamed model's logits come. Adding to them makes one copy.
        sums = rows * (drafted + 1) * 4 * self._vocab_size * (2 + (self._nucleus is not None))
        computing = [variants.workspace_nbytes(rows, drafted + 1, tokens) for variants, _ in self.in_memory]
        drafting = [variants.workspace_nbytes(1, 1, tokens) for variants in self._drafter.variants]
        return sums + max(computing + drafting)

    def beside_s(self, rows: int) -> float:
        return sum(variants.pass_s(rows) for variants, _ in self.in_memory)

    def drafter_model(self) -> "Mixture":
        return self._drafter

    def decode(
        self,
        batches: Sequence[tuple[mx.array, list[Any], mx.array, bool | str]],
        take: Callable[[int, int, mx.array], None],
        spilled: SpilledCaches | None = None,
    ) -> None:
        """As `StreamedModel.decode`. Models in memory are computed first, then the streamed weights are read once."""
        sums, passengers, owners = [], [], []
        for number, (tokens, cache, places, adapter) in enumerate(batches):
            parts = self._parts(cache)
            sums.append(self._of_models_in_memory(tokens, parts[len(self._terms) :], places.tolist()))
            for term, part in zip(self._terms, parts):
                passengers.append((tokens, part, places, adapter if term.adapter is None else term.adapter))
                owners.append((number, term))

        def take_term(passenger: int, first: int, logits: mx.array) -> None:
            number, term = owners[passenger]
            sums[number].add(term, first, logits)
            if term is self._terms[-1]:
                take(number, first, sums[number].pop(first))

        self.streamed.decode(passengers, take_term, spilled)

    def look(self, tokens: mx.array, cache: list[Any]) -> None:
        parts = self._parts(cache)
        for part in parts[: len(self._terms)]:
            self.streamed.look(tokens, part)
        for (variants, _), part in zip(self.in_memory, parts[len(self._terms) :]):
            variants(tokens, part)

    def takes(self, tokens: mx.array, cache: list[Any]) -> bool:
        parts = self._parts(cache)
        return all(self.streamed.takes(tokens, part) for part in parts[: len(self._terms)]) and all(
            variants.takes(tokens, part) for (variants, _), part in zip(self.in_memory, parts[len(self._terms) :])
        )

    # --- What scoring asks for -------------------------------------------------------------------------

    @property
    def nbytes_on_disk(self) -> int:
        """Bytes of the streamed model's weights."""
        return self.streamed.nbytes_on_disk

    @property
    def has_adapter(self) -> bool:
        return False

    @property
    def scored(self) -> dict[str, bool | str]:
        return {BASE: False, EMULATED: True}

    @property
    def adapter_names(self) -> Sequence[str]:
        return self.streamed.adapter_names

    def add_adapter(self, name: str, path: str | Path) -> None:
        """Load an adapter of the large model, to be scored beside the sum.

        Raises:
            ConfigError: the large model is the one in memory.
        """
        if not self.is_up_scaling:
            raise ConfigError(
                f"adapter {path} is of the model that stays in memory here, and only those of the one that streams can "
                "be scored beside the sum. Score it by itself, without --emulate"
            )
        self.streamed.add_adapter(name, path)

    @property
    def n_logits(self) -> int:
        return self._vocab_size

    def block_passes(self, adapters: Sequence[bool | str]) -> int:
        return self.streamed.block_passes(self._streamed_adapters(adapters))

    def log_probabilities(
        self,
        micro_batches: Sequence[MicroBatch],
        top_k: int = 0,
        token_ids: Sequence[int] = (),
        on_visit: Callable[[int], object] = lambda n: None,
        first: int = 0,
    ) -> Iterator[LogProbabilities]:
        """As `StreamedModel.log_probabilities`, with the sum in the place of an attached adapter.

        A micro-batch's `adapter` is True for the sum, False for the large model by itself, or a name for that model
        with the adapter of this name. Neighbouring micro-batches with the same `batch` share one pass.
        """
        by_batch = [list(group) for _, group in itertools.groupby(micro_batches, lambda one: id(one.batch))]
        for adapters, groups in itertools.groupby(by_batch, lambda group: tuple(one.adapter for one in group)):
            groups = list(groups)
            streamed = self._streamed_adapters(adapters)
            passengers = [MicroBatch(group[0].batch, group[0].lengths, one) for group in groups for one in streamed]
            tokens = max(group[0].batch.shape[1] for group in groups) - 1
            mixing = self._mixing(adapters, streamed, tokens)
            n_skipped = min(first // len(adapters), len(groups))
            first -= n_skipped * len(adapters)
            options = top_k, token_ids, on_visit, mixing, n_skipped * len(streamed)
            yield from self.streamed.log_probabilities(passengers, *options)

    def _by_itself(self, adapters: Sequence[bool | str]) -> list[bool | str]:
        """The adapters with which the streamed model is scored by itself: none if it is not the large model."""
        return [adapter for adapter in adapters if adapter is not True] if self.is_up_scaling else []

    def _streamed_adapters(self, adapters: Sequence[bool | str]) -> list[bool | str]:
        """The adapters with which the streamed model's logits are needed."""
        needed = self._by_itself(adapters)
        if True in adapters or not needed:
            needed += map(self._adapter, self._terms)
        return list(dict.fromkeys(needed))

    def _adapter(self, term: Term) -> bool | str:
        """The streamed model's adapter in a term, if no row asks for another one."""
        return self.streamed.has_adapter if term.adapter is None else term.adapter

    def _mixing(self, adapters: Sequence[bool | str], streamed: Sequence[bool | str], tokens: int) -> Mixing:
        """How logits of the streamed model, with the adapters `streamed`, become those of `adapters`."""
        chunk = max(1, min(CHUNK, LOGITS_NBYTES // (4 * self._vocab_size)))

        def begin(tokens: mx.array) -> Mix:
            in_memory = RowsInMemory([variants for variants, _ in self.in_memory], tokens)

            def mix(numbers: np.ndarray, logits: Sequence[mx.array]) -> list[mx.array]:
                of_streamed = dict(zip(streamed, logits))
                by_itself = {adapter: of_streamed[adapter] for adapter in self._by_itself(adapters)}
                if len(by_itself) == len(adapters):
                    return [by_itself[adapter] for adapter in adapters]
                sums = Sums(len(numbers), self._vocab_size, self._nucleus)
                for i, places, of_variants in in_memory.logits(numbers):
                    for term, of_variant in zip(self.in_memory[i][1], of_variants):
                        sums.add_places(term, places, of_variant)
                if not self.is_up_scaling:
                    by_itself[False] = sums.total()  # the large model is the only one in memory
                for term in self._terms:
                    sums.add(term, 0, of_streamed[self._adapter(term)])
                return [sums.pop(0) if adapter is True else by_itself[adapter] for adapter in adapters]

            return mix

        # Each passenger and each sum has three arrays: logits as computed, in float32, and after subtracting their
        # logsumexp.
        nbytes = 3 * 4 * chunk * self._vocab_size * (len(streamed) + len(adapters) + 1)
        nbytes += max(variants.workspace_nbytes(1, chunk, tokens) for variants, _ in self.in_memory)
        nbytes += sum(variants.cache_nbytes(tokens) for variants, _ in self.in_memory)
        return Mixing(len(streamed), len(adapters), begin, chunk, nbytes)

    def fingerprint(self) -> str:
        """The fingerprint of the large model; those of the deltas are in `about`."""
        return self._fingerprint

    def __enter__(self) -> "Emulated":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """End the streamed model's threads and close its files."""
        self.streamed.close()

    # --- Underneath -----------------------------------------------------------------------------------

    def _parts(self, cache: list[Any]) -> list[list[Any]]:
        """A row's caches, in one list for each streamed term and each model in memory."""
        parts, begin = [], 0
        for size in self._sizes:
            parts.append(cache[begin : begin + size])
            begin += size
        return parts

    def _of_models_in_memory(self, tokens: mx.array, parts: list[list[Any]], places: list[int]) -> "Sums":
        sums = Sums(len(places), self._vocab_size, self._nucleus)
        for (variants, terms), cache in zip(self.in_memory, parts):
            for some, logits in variants.logits(tokens, cache, places):
                for term, of_variant in zip(terms, logits):
                    sums.add_places(term, some, of_variant)
        return sums

    def _drafting(self) -> list[tuple[Variants, list[float]]]:
        """Variants in memory that draft, with their weights: the mixture of small models, or the small base itself."""
        drafting = []
        for variants, terms in self.in_memory:
            weights = [term.of_mixture if self.is_up_scaling else term.weight for term in terms]
            which = [i for i, weight in enumerate(weights) if weight]
            if which:
                part = variants if len(which) == len(terms) else variants.only(which)
                drafting.append((part, [weights[i] for i in which]))
        return drafting


class RowsInMemory:
    """Takes rows of tokens `[B, T]` through models in memory, some at a time, from the first row's first token on."""

    def __init__(self, models: Sequence[Variants], tokens: mx.array):
        self._models, self._tokens = models, tokens
        self._row, self._column = -1, 0  # the next token to compute
        self._caches: list[list[Any]] = []

    def logits(self, numbers: np.ndarray) -> Iterator[tuple[int, list[int], list[mx.array]]]:
        """(number of a model, indices into `numbers`, logits `[m, V]` of each variant there), until all were given.

        Args:
            numbers: of tokens among all `B * T`, in rising order, and above those of earlier calls.
        """
        rows, columns = np.divmod(numbers, self._tokens.shape[1])
        for row in np.unique(rows):
            if row != self._row:
                self._row, self._column = row, 0
                self._caches = [variants.make_cache() for variants in self._models]
            here = np.flatnonzero(rows == row)
            begin, end = self._column, int(columns[here[-1]]) + 1
            tokens, places = self._tokens[int(row) : int(row) + 1, begin:end], (columns[here] - begin).tolist()
            for i, (variants, cache) in enumerate(zip(self._models, self._caches)):
                for which, logits in variants.logits(tokens, cache, places):
                    yield i, here[which].tolist(), logits
            self._column = end


class Mixture:
    """Models in memory whose log-probabilities are added up. It has mlx-lm's call."""

    def __init__(self, parts: Sequence[tuple[Variants, Sequence[float]]], vocab_size: int):
        self._parts, self._vocab_size = tuple(parts), vocab_size

    def make_cache(self) -> list[Any]:
        return [cache for variants, _ in self._parts for cache in variants.make_cache()]

    @property
    def variants(self) -> list[Variants]:
        return [variants for variants, _ in self._parts]

    def __call__(self, tokens: mx.array, cache: list[Any] | None = None) -> mx.array:
        """Logits `[B, T, V]`, unevaluated."""
        cache = self.make_cache() if cache is None else cache
        total, begin = 0.0, 0
        for variants, weights in self._parts:
            part = cache[begin : begin + variants.n_caches]
            begin += variants.n_caches
            for weight, logits in zip(weights, variants(tokens, part)):
                total = total + weight * logprobs(logits, self._vocab_size)
        return total


class Sums:
    """Adds up the terms of one batch, at the places whose logits are needed.

    Args:
        n: number of places. nucleus: as in `Emulated`.
    """

    def __init__(self, n: int, vocab_size: int, nucleus: float | None):
        self._vocab_size, self._nucleus = vocab_size, nucleus
        self._total = mx.zeros((n, vocab_size), mx.float32)
        self._mixture = None if nucleus is None else mx.zeros((n, vocab_size), mx.float32)

    def add(self, term: Term, first: int, logits: mx.array) -> None:
        """Add a term at the places from `first` on, of logits `[m, V]`."""
        self.add_places(term, slice(first, first + logits.shape[0]), logits)

    def add_places(self, term: Term, places: Any, logits: mx.array) -> None:
        """Add a term at these places, of logits `[m, V]`."""
        of_term = logprobs(logits, self._vocab_size)
        places = places if isinstance(places, slice) else mx.array(places, mx.int32)
        self._total[places] = self._total[places] + term.weight * of_term
        if self._mixture is not None:
            self._mixture[places] = self._mixture[places] + term.of_mixture * of_term
        mx.eval(self._total, [] if self._mixture is None else self._mixture)
        self._last = logits.shape[0]

    def total(self) -> mx.array:
        """A copy of the sums at all places, as they are now."""
        return mx.array(self._total)

    def pop(self, first: int) -> mx.array:
        """Log-probabilities `[m, V]` of the places that were added last; they begin at `first`."""
        part = slice(first, first + self._last)
        total = self._total[part]
        if self._mixture is not None:
            mixture = logprobs(self._mixture[part])
            total = mx.where(in_nucleus(mixture, self._nucleus), total, mixture)
        return logprobs(total)


def logprobs(logits: mx.array, vocab_size: int | None = None) -> mx.array:
    """Natural log-probabilities of the first `vocab_size` tokens, in float32. None is below `NEVER`."""
    logits = logits[..., :vocab_size].astype(mx.float32)
    return mx.maximum(logits - mx.logsumexp(logits, axis=-1, keepdims=True), NEVER)


def in_nucleus(of_tokens: mx.array, p: float) -> mx.array:
    """Which of the tokens with log-probabilities `[m, V]` are the likeliest that have a probability of `p` together."""
    falling = -mx.sort(-of_tokens, axis=-1)
    likelier = mx.cumsum(mx.exp(falling), axis=-1) - mx.exp(falling)
    least = mx.where(likelier < p, falling, mx.inf).min(axis=-1, keepdims=True)
    return of_tokens >= least


def parse_delta(text: str) -> tuple[str, float]:
    """(path, weight) of ADAPTER or ADAPTER:WEIGHT.

    Raises:
        ConfigError: the weight is no number.
    """
    path, colon, weight = text.rpartition(":")
    if not colon or Path(text).expanduser().exists():
        return text, 1.0
    try:
        return path, float(weight)
    except ValueError:
        raise ConfigError(f"--delta {text}: {weight!r} is no number. Give such as {path or 'adapters'}:0.5") from None


def emulate(
    large: StreamedModel | str | Path,
    small: str | Path,
    deltas: Sequence[tuple[str | Path, float]],
    *,
    memory: str | int | None = None,
    adapter_path: str | Path | None = None,
    nucleus: float | None = None,
    compute_dtype: str | None = None,
    trust_remote_code: bool = False,
) -> Emulated:
    """A model with the knowledge of `large` that behaves as `small` learnt to.

    Args:
        large: directory or hub id, or an opened model, which then is the one that streams.
        small: directory or hub id of the base that was tuned. If it is larger than `large`, it streams.
        deltas: (adapter of `small`, or directory of a whole tuned model; its weight) of each. A weight of 0.5 adds half
            of what was learnt, a negative weight subtracts it. Several deltas add up.
        memory: as in `open_model`, for both models together. An opened model keeps its own.
        adapter_path: adapter of `large` itself.
        nucleus: as in `Emulated`: the paper's conservative filter of what the large model adds.
    Raises:
        ConfigError: the vocabularies differ (names the first difference), or memory is too little for the model that
            does not stream.
        AdapterError: a delta belongs to another model.
    """
    learnt = _parsed(small, deltas, nucleus)
    whole = [delta for delta in learnt if not delta.is_adapter]
    small_path, is_opened = resolve(str(small)), isinstance(large, StreamedModel)
    large_path = large.path if is_opened else resolve(str(large))
    others = [small_path, *(delta.path for delta in whole)]
    uncompared = [other for other in others if not check_same_vocabulary(large_path, other)]
    is_up = is_opened or _nbytes(small_path) <= _nbytes(large_path)
    if whole and not is_up:
        raise ConfigError(
            f"{whole[0].path} is a whole model, and {small_path} is larger than {large_path}: of the larger one, give "
            "adapters"
        )
    how = {"compute_dtype": compute_dtype, "trust_remote_code": trust_remote_code}
    if is_up:
        streamed = large if is_opened else open_model(large_path, memory, adapter_path, **how)
    else:
        streamed = open_model(small_path, memory, **how)

    def load(path: Path) -> ModelInMemory:
        dtype = compute_dtype_of(compute_dtype)
        return load_in_memory(path, dtype, trust_remote_code, streamed.budget)

    try:
        if is_up:
            of_streamed, in_memory = [OF_LARGE], _deltas_in_memory(load(small_path), learnt, load)
        else:
            of_streamed = _deltas_streamed(streamed, learnt)
            in_memory = [_base_in_memory(load(large_path), adapter_path)]
        models = [streamed, *(variants.model for variants, _ in in_memory)]
        sizes = [streamed.engine.cut.vocab_size, *(model.vocab_size for model in models[1:])]
        size_of = dict(zip([model.path for model in models], sizes))
        for other in uncompared:
            check_same_vocabulary(large_path, other, (size_of[large_path], size_of[other]))
        fingerprints = [model.fingerprint() for model in models]
        of_large, of_small = fingerprints[:2] if is_up else reversed(fingerprints[:2])
        of_whole = dict(zip([delta.name for delta in whole], fingerprints[2:]))
        about: dict[str, Any] = {"small": of_small}
        about["deltas"] = [[of_whole.get(delta.name) or digest(delta.path), delta.weight] for delta in learnt]
        if nucleus is not None:
            about["top_p"] = nucleus
        tokenizer_path = whole[0].path if whole else small_path
        emulated = Emulated(
            streamed, of_streamed, in_memory, min(sizes), nucleus, tokenizer_path, of_large, about, is_up
        )
        streamed.budget.measure_anew()  # the other model is in memory now
    except BaseException:
        if not is_opened:
            streamed.close()
        raise
    return emulated


@dataclass(frozen=True)
class Delta:
    """What fine-tuning changed: a directory with an adapter or with a whole tuned model, and its weight."""

    name: str
    path: Path
    weight: float
    is_adapter: bool

    @staticmethod
    def of(name: str, path: str | Path, weight: float) -> "Delta":
        directory = Path(path).expanduser()
        if not directory.exists() and "/" not in str(path):  # no hub id either
            raise AdapterError(f"--delta {path} does not exist. Give an adapter's directory, or a whole tuned model's")
        is_adapter = (directory / CONFIG).exists() and not (directory / "config.json").exists()
        return Delta(name, directory if is_adapter else resolve(str(path)), weight, is_adapter)

    @property
    def term(self) -> Term:
        """The tuned model's term in the sum."""
        return Term(self.weight, self.weight, self.name)


def _parsed(small: str | Path, deltas: Sequence[tuple[str | Path, float]], nucleus: float | None) -> list[Delta]:
    """The deltas; raises a ConfigError for weights and probabilities that are impossible."""
    if not deltas:
        raise ConfigError(f"nothing is to be added of what {small} learnt. Give an adapter: --delta ADAPTER")
    for path, weight in deltas:
        if not math.isfinite(weight):
            raise ConfigError(f"the weight of delta {path} must be a number, got {weight}")
    if nucleus is not None and not 0 < nucleus <= 1:
        raise ConfigError(f"--delta-top-p must be above 0 and at most 1, got {nucleus}")
    return [Delta.of(f"delta {i}", path, float(weight)) for i, (path, weight) in enumerate(deltas)]


def _base_term(deltas: Sequence[Delta]) -> Term:
    """The term of the base that was tuned. Its weight makes the deltas add up to differences."""
    total = sum(delta.weight for delta in deltas)
    return Term(-total, 1 - total, adapter=False)


def _deltas_in_memory(
    small: ModelInMemory, deltas: Sequence[Delta], load: Callable[[Path], ModelInMemory]
) -> list[tuple[Variants, list[Term]]]:
    """The base with its adapters, which are variants of one model, then each whole tuned model."""
    adapters = [delta for delta in deltas if delta.is_adapter]
    for delta in adapters:
        small.add_adapter(delta.name, delta.path)
    terms = [_base_term(deltas), *(delta.term for delta in adapters)]
    of_base = Variants(small, [term.adapter for term in terms]), terms
    return [of_base, *((Variants(load(d.path), [False]), [d.term]) for d in deltas if not d.is_adapter)]


def _deltas_streamed(large: StreamedModel, deltas: Sequence[Delta]) -> list[Term]:
    for delta in deltas:
        large.add_adapter(delta.name, delta.path)
    return [_base_term(deltas), *(delta.term for delta in deltas)]


def _base_in_memory(base: ModelInMemory, adapter_path: str | Path | None) -> tuple[Variants, list[Term]]:
    if adapter_path is not None:
        base.add_adapter("own", adapter_path)
    return Variants(base, [False if adapter_path is None else "own"]), [OF_LARGE]


def _nbytes(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))
