"""Tiny random models of any architecture on disk, and the same model in memory by mlx-lm alone."""

import slowft  # noqa: F401, I001  (before mlx: it loads OpenBLAS)

import json
import math
import os
import sqlite3
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten, tree_map
from mlx_lm.tuner.trainer import default_loss
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import _get_classes, load_model

from mac import mac  # noqa: F401  (a fixture)
from slowft.memory import limits
from slowft.weights import transfers

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 256,
    "tie_word_embeddings": False,
}


def must_run(reason: str) -> None:
    """Skip a test that this machine cannot run; in CI (`SLOWFT_CI=1`, set by .ci/run) fail instead."""
    if os.environ.get("SLOWFT_CI") == "1":
        pytest.fail(f"CI must run this test, but: {reason}")
    pytest.skip(reason)


@pytest.fixture(scope="module", autouse=True)
def users_cache(tmp_path_factory):
    """Nothing that tests store goes into the user's own cache, and no file's rates choose another file's plans."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def usual_limits():
    """Models that a test leaves open do not hold up the next one's operations."""
    memory, cache = mx.set_memory_limit(1 << 60), mx.set_cache_limit(1 << 60)
    mx.set_memory_limit(memory)
    mx.set_cache_limit(cache)
    yield
    limits().restore()
    mx.set_memory_limit(memory)
    mx.set_cache_limit(cache)


@pytest.fixture
def no_pauses(monkeypatch):
    """A read or write that fails is tried again at once."""
    monkeypatch.setattr(transfers, "RETRY_AFTER_S", (0, 0, 0))


@pytest.fixture
def may_have_pages(monkeypatch) -> Callable[[int], None]:
    """Limits the SQLite files opened from now on to so many pages, which is SQLite's own way to have no more room."""
    connections, connect = [], sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *a, **k: connections.append(connect(*a, **k)) or connections[-1])

    def limit(pages: int) -> None:
        for connection in connections:
            with suppress(sqlite3.ProgrammingError):  # it is closed
                connection.execute(f"PRAGMA max_page_count = {pages}")

    return limit


def save_random(
    directory: Path, config: dict, dtype: mx.Dtype = mx.float32, shards: bool = False, seed: int = 0
) -> Path:
    """A model of mlx-lm's class for `config`, randomly initialised, written as an ordinary model directory."""
    directory.mkdir(parents=True, exist_ok=True)
    mx.random.seed(seed)
    model_class, args_class = _get_classes(config)
    model = model_class(args_class.from_dict(config))
    weights = {
        name: (array.astype(dtype) if mx.issubdtype(array.dtype, mx.floating) else array)
        for name, array in tree_flatten(model.parameters())
    }
    del model
    (directory / "config.json").write_text(json.dumps(config))
    if not shards:
        mx.save_safetensors(str(directory / "model.safetensors"), weights, {"format": "mlx"})
        return directory
    groups: dict[str, dict] = {}
    for name in list(weights):  # one shard a block, each evaluated and let go in turn
        parts = name.split(".")
        group = next((p for p in parts if p.isdigit()), "rest")
        groups.setdefault(group, {})[name] = weights.pop(name)
    weight_map, n_shards = {}, len(groups)
    for i, group in enumerate(list(groups), 1):
        file = f"model-{i:05d}-of-{n_shards:05d}.safetensors"
        tensors = groups.pop(group)
        mx.save_safetensors(str(directory / file), tensors, {"format": "mlx"})
        weight_map |= {name: file for name in tensors}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


def in_memory(directory: Path, dtype: mx.Dtype = mx.float32, **lora) -> nn.Module:
    """The reference: mlx-lm's model, whole and in memory, computing in `dtype`, with LoRA layers attached."""
    model, _ = load_model(directory)
    model.update(tree_map(lambda p: p.astype(dtype) if mx.issubdtype(p.dtype, mx.floating) else p, model.parameters()))
    if not hasattr(model, "_no_grad"):
        nn.Module.__init__(model)  # mlx-lm's recurrent_gemma forgets it, and cannot be frozen without
    model.freeze()
    if lora:
        attach_in_memory(model, **lora)
    return model


def attach_in_memory(model, num_layers=-1, rank=4, scale=2.0, dropout=0.0, keys=None, use_dora=False):
    mx.random.seed(1)
    config = {"rank": rank, "scale": scale, "dropout": dropout} | ({"keys": keys} if keys else {})
    linear_to_lora_layers(model, num_layers, config, use_dora=use_dora)


def randomise(*models) -> None:
    """The same random values for the trainable parameters of all models: fresh LoRA has zeros, hence zero gradients."""
    mx.random.seed(2)
    values = tree_map(lambda p: mx.random.normal(p.shape) * 0.05, models[0].trainable_parameters())
    mx.eval(values)
    for model in models:
        model.update(values)


def random_batch(vocab: int, rows: int = 3, tokens: int = 24, seed: int = 3):
    """(batch [rows, tokens + 1], lengths [rows, 2]) with prompts and padding."""
    mx.random.seed(seed)
    batch = mx.random.randint(0, vocab, (rows, tokens + 1))
    lengths = mx.array([[1 + 3 * (i % 2), tokens - 5 * (i % 3)] for i in range(rows)])
    mx.eval(batch, lengths)
    return batch, lengths


def reference(model, batch, lengths):
    """(loss, gradients) by `nn.value_and_grad` on the whole model."""
    (loss, _), gradients = nn.value_and_grad(model, default_loss)(model, batch, lengths)
    mx.eval(loss, gradients)
    return loss, gradients


def largest_difference(a, b) -> float:
    """Over two trees of the same names; NaN anywhere counts as infinite."""
    a, b = dict(tree_flatten(a)), dict(tree_flatten(b))
    assert a.keys() == b.keys()
    differences = [mx.abs(a[name] - b[name]).max() for name in a]
    mx.eval(differences)
    worst = [difference.item() for difference in differences]
    return float("inf") if any(map(math.isnan, worst)) else max(worst)


def largest(tree) -> float:
    sizes = [mx.abs(array).max() for _, array in tree_flatten(tree)]
    mx.eval(sizes)
    return max(size.item() for size in sizes)


@pytest.fixture
def llama(tmp_path) -> Path:
    return save_random(tmp_path / "llama", LLAMA)


@pytest.fixture(scope="session")
def llama_with_tokenizer(tmp_path_factory) -> Path:
    """A tiny Llama with a real (byte-level BPE) tokenizer and a chat template, made here."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    directory = tmp_path_factory.mktemp("model") / "tiny"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<s>", "</s>", "<unk>", *alphabet])}
    save_random(directory, LLAMA | {"vocab_size": len(vocab), "eos_token_id": 1, "bos_token_id": 0})
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>", "<unk>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    template = (
        "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant: {% endif %}"
    )
    (directory / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": "<s>",
                "eos_token": "</s>",
                "unk_token": "<unk>",
                "pad_token": "</s>",
                "chat_template": template,
            }
        )
    )
    return directory
