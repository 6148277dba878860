"""One model in memory with several adapters at once. A variant is the model with one of them, or with none.

Comes in: a `ModelInMemory`, names of adapters. Goes out: the logits of each variant for the same tokens. Variants are
rows of one batch, and mlx-lm's caches hold a row for each. Where that would compute something else (adapters on experts
or embeddings, DoRA, caches other than plain keys and values), they go one after the other. A trial on a few tokens
decides.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import BatchKVCache, KVCache, make_prompt_cache
from mlx_lm.tuner.lora import LoRALinear

from ..engine.in_memory import ModelInMemory
from ..weights.sources import locate

CHUNK = 64  # tokens of a variant at a time: matmuls are as fast as with more, and their workspace stays small
LOGITS_NBYTES = 16 << 20  # logits of all variants at a time
GROWTH = KVCache.step  # tokens that a cache grows by, at least `CHUNK`
AGREE = 1e-3  # tolerance in float32, as a share of the largest logit
AGREE_16 = 0.03  # the same where 16 bits are computed in: rounding is less

Change = tuple[Any, str | int, nn.Module, nn.Module]  # (owner, key, the model's own layer, the layer in its place)


class Variants:
    """A model with several adapters.

    Args:
        adapters: False for none, or names that `add_adapter` was given.

    Attributes:
        is_together: variants are rows of one batch. n_caches: number of caches of a text.
        chunk_nbytes: peak memory of a pass over `CHUNK` tokens of each variant, without the head.
    """

    def __init__(self, model: ModelInMemory, adapters: Sequence[bool | str]):
        self.model, self.adapters = model, list(adapters)
        self._seconds = {1: 0.0, 8: 0.0}  # tokens -> seconds of a pass over so many
        self._of_variants = [self._changes(self._layers(a)) for a in adapters]
        self._n_layers = len(make_prompt_cache(model))
        self.is_together = len(adapters) == 1
        if not self.is_together and self._may_be_together():
            self._of_batch = self._changes(self._layers_of_rows())
            self.is_together = self._agrees()
        self.n_caches = len(self.make_cache())
        self._measure()

    def make_cache(self, max_kv_size: int | None = None) -> list[Any]:
        """mlx-lm's caches of a text: one for each layer, or for each layer of the first variant, of the second ..."""
        n = len(self.adapters)
        if self.is_together and n > 1 and max_kv_size is None:
            return [VariantsCache(n) for _ in make_prompt_cache(self.model)]
        return [cache for _ in self.adapters for cache in make_prompt_cache(self.model, max_kv_size)]

    def __call__(self, tokens: mx.array, cache: list[Any] | None = None) -> list[mx.array]:
        """Logits `[B, T, V]` of each variant, unevaluated."""
        n = len(self.adapters)
        if n > 1 and self.is_together and (cache is None or len(cache) == self._n_layers):
            with _in_place(self._of_batch):
                logits = self.model(mx.repeat(tokens, n, axis=0), cache=cache)
            return [logits[i::n] for i in range(n)]
        result, n_layers = [], 0 if cache is None else len(cache) // n
        for i, changes in enumerate(self._of_variants):
            with _in_place(changes):
                of_variant = None if cache is None else cache[i * n_layers : (i + 1) * n_layers]
                result.append(self.model(tokens, cache=of_variant))
        return result

    def logits(
        self, tokens: mx.array, cache: list[Any], places: Sequence[int]
    ) -> Iterator[tuple[list[int], list[mx.array]]]:
        """(indices of some of the places, logits `[m, V]` of each variant there), until all places were given.

        Args:
            tokens: `[B, T]`, which are added to the caches. places: flat indices of tokens.
        """
        rows, width = tokens.shape
        columns = [place % width for place in places]
        for begin, end in self._chunks(rows, width, min(columns)):
            logits = self(tokens[:, begin:end], cache)
            here = [i for i, column in enumerate(columns) if begin <= column < end]
            flat = mx.array([places[i] // width * (end - begin) + columns[i] - begin for i in here], mx.int32)
            if here:
                of_places = [of_variant.reshape(-1, of_variant.shape[-1])[flat] for of_variant in logits]
                mx.eval(of_places)
            del logits
            mx.eval([c.state for c in cache])  # the head is not computed for tokens whose logits are not needed
            if here:
                yield here, of_places

    def pass_s(self, tokens: int) -> float:
        """Seconds of a pass over so many tokens of different rows, extrapolated from one token and a few."""
        (_, of_one), (few, of_few) = self._seconds.items()
        return of_one + max(of_few - of_one, 0.0) * (tokens - 1) / (few - 1)

    def only(self, which: Sequence[int]) -> "Variants":
        """The variants of these numbers."""
        return Variants(self.model, [self.adapters[i] for i in which])

    def workspace_nbytes(self, rows: int, places: int, tokens: int) -> int:
        """Bytes that a pass needs, from those that a chunk needed.

        Attention is counted as it is where kernels are not fused: scores of all heads, and their exponentials.

        Args:
            rows, places, tokens: number of rows; places of each whose logits are needed; tokens of each.
        """
        n, at_once = len(self.adapters), max(rows, CHUNK)
        heads = getattr(getattr(self.model, "args", None), "num_attention_heads", 32)
        logits = 4 * n * self.model.vocab_size * rows
        # Each variant has three arrays: logits as computed, in float32, and after subtracting their logsumexp.
        logits = 3 * max(logits, min(LOGITS_NBYTES, logits * places))
        return self.chunk_nbytes * at_once // CHUNK + 8 * n * at_once * heads * tokens + logits

    def cache_nbytes(self, tokens: int) -> int:
        """Bytes of the caches of a text of so many tokens. While a layer's cache grows, it is in memory twice."""
        n_layers = max(1, len(self.make_cache()))
        return self._growth_nbytes * -(-tokens // GROWTH) * (n_layers + 1) // n_layers

    def _chunks(self, rows: int, width: int, first: int) -> Iterator[tuple[int, int]]:
        """(begin, end) of the columns of each pass; `first` is the first column whose logits are needed."""
        most = max(1, CHUNK // rows)
        with_logits = max(1, min(most, LOGITS_NBYTES // (4 * self.model.vocab_size * rows * len(self.adapters))))
        begin = 0
        while begin < width:
            end = min(begin + most, first) if begin < first else min(begin + with_logits, width)
            yield begin, end
            begin = end

    # --- Rows of one batch ---------------------------------------------------------------------------

    def _layers(self, adapter: bool | str) -> dict[str, nn.Module]:
        """The adapter's layers by path."""
        return {} if adapter is False else self.model.adapter_layers(adapter)

    def _may_be_together(self) -> bool:
        layers = [layer for adapter in self.adapters for layer in self._layers(adapter).values()]
        caches = make_prompt_cache(self.model)
        return all(type(layer) is LoRALinear for layer in layers) and all(type(cache) is KVCache for cache in caches)

    def _layers_of_rows(self) -> dict[str, nn.Module]:
        """Layers that compute all variants in one batch, by path."""
        of_variants = [self._layers(adapter) for adapter in self.adapters]
        paths = dict.fromkeys(path for layers in of_variants for path in layers)
        own = {path: next(layers[path] for layers in of_variants if path in layers)["linear"] for path in paths}
        return {path: LinearOfRows(own[path], [layers.get(path) for layers in of_variants]) for path in paths}

    def _changes(self, layers: dict[str, nn.Module]) -> list[Change]:
        places = [(*locate(self.model, path), layer) for path, layer in layers.items()]
        return [(owner, key, owner[key], layer) for owner, key, layer in places]

    def _agrees(self) -> bool:
        """Whether each variant's logits are the same in one batch as alone."""
        text = mx.array([[i % self.model.vocab_size for i in (5, 3, 9, 3, 7)]])
        self.is_together = True
        try:
            together = self(text, self.make_cache())
        except (ValueError, TypeError, RuntimeError, AttributeError, NotImplementedError):
            return False
        self.is_together = False
        alone = self(text, self.make_cache())
        agree = AGREE if alone[0].dtype == mx.float32 else AGREE_16
        return all((mx.abs(a - b).max() < agree * mx.abs(a).max()).item() for a, b in zip(alone, together))

    def _measure(self) -> None:
        cache = self.make_cache()
        begin = mx.get_active_memory()
        mx.reset_peak_memory()
        self(mx.zeros((1, CHUNK), mx.int32), cache)
        mx.eval([c.state for c in cache])
        self.chunk_nbytes = mx.get_peak_memory() - begin
        self._growth_nbytes = sum(c.nbytes for c in cache)
        for tokens in self._seconds:  # measured after the warm-up above
            start = time.perf_counter()
            mx.eval(self(mx.zeros((1, tokens), mx.int32), cache), [c.state for c in cache])
            self._seconds[tokens] = time.perf_counter() - start

    def takes(self, tokens: mx.array, cache: list[Any]) -> bool:
        """Whether the model accepts these caches. Only shapes are computed. The caches are of no use afterwards."""
        try:
            self(tokens, cache)
        except (ValueError, TypeError, RuntimeError, AttributeError, NotImplementedError):
            return False
        return True


class LinearOfRows(nn.Module):
    """A linear layer with n LoRA layers, or fewer: row i of a batch goes through that of number i modulo n, or none."""

    def __init__(self, linear: nn.Module, lora: Sequence[LoRALinear | None]):
        super().__init__()
        self.linear, self.lora = linear, list(lora)

    def __call__(self, x: mx.array) -> mx.array:
        """`x` is `[B, ..., D]`; computes the same as `LoRALinear`."""
        y, n = self.linear(x), len(self.lora)
        rows = [y[i::n] for i in range(n)]
        for i, lora in enumerate(self.lora):
            if lora is not None:
                rows[i] = rows[i] + (lora.scale * ((x[i::n] @ lora.lora_a) @ lora.lora_b)).astype(x.dtype)
        return mx.stack(rows, axis=1).reshape(y.shape)


class VariantsCache(KVCache):
    """Keys and values of one text in one layer, with a row for each variant. All rows have the same length."""

    def __init__(self, n: int):
        super().__init__()
        self.n = n

    @classmethod
    def merge(cls, caches: Sequence["VariantsCache"]) -> "BatchVariantsCache":
        """The cache of several texts: all rows of the first text, then those of the second, and so on."""
        n = caches[0].n
        together = BatchKVCache.merge([row for cache in caches for row in cache.rows()])
        result = BatchVariantsCache(n, [0])
        vars(result).update(vars(together))
        return result

    def rows(self) -> list[KVCache]:
        """The cache of each variant alone."""
        of_variants = [KVCache() for _ in range(self.n)]
        for i, cache in enumerate(of_variants):
            if self.keys is not None:
                cache.keys, cache.values = self.keys[i : i + 1], self.values[i : i + 1]
            cache.offset = self.offset
        return of_variants


class BatchVariantsCache(BatchKVCache):
    """Keys and values of several texts, each with n adjacent rows. Arguments count texts, not rows."""

    def __init__(self, n: int, left_padding: list[int]):
        super().__init__(left_padding)
        self.n = n

    def filter(self, batch_indices: Sequence[int]) -> None:
        super().filter([text * self.n + i for text in batch_indices for i in range(self.n)])

    def prepare(self, *, left_padding=None, lengths=None, right_padding=None) -> None:
        left_padding, right_padding = (
            None if padding is None else [length for length in padding for _ in range(self.n)]
            for padding in (left_padding, right_padding)
        )
        super().prepare(left_padding=left_padding, lengths=lengths, right_padding=right_padding)


@contextmanager
def _in_place(changes: Sequence[Change]) -> Iterator[None]:
    """A context in which layers of the model are replaced."""
    for owner, key, _, layer in changes:
        owner[key] = layer
    try:
        yield
    finally:
        for owner, key, own, _ in changes:
            owner[key] = own
