"""Fused models equal mlx_lm.fuse's tensor by tensor and bit by bit, within the ceiling, and survive kills."""

import slowft  # noqa: F401, I001  (before mlx: it loads OpenBLAS)

import contextlib
import io
import json
import shutil
import sys
from pathlib import Path

import mlx.core as mx
import mlx_lm.fuse
import pytest
from conftest import LLAMA, attach_in_memory, save_random
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model
from test_prepare import assert_same_tensors, experts_apart, as_published, mixtral, small, small_pieces, tokenizer_files  # noqa: F401

TIED = LLAMA | {"num_hidden_layers": 2, "tie_word_embeddings": True, "torch_dtype": "bfloat16"}
ATTENTION = ["self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"]
EXPERTS = ["self_attn.q_proj", "block_sparse_moe.switch_mlp.up_proj", "block_sparse_moe.switch_mlp.down_proj"]


def adapter_of(model: Path, directory: Path, rank=5, scale=3.7, keys=None, num_layers=-1, use_dora=False) -> Path:
    """An adapter as mlx-lm saves it, with random values."""
    with_adapter, _ = load_model(model)
    with_adapter.freeze()
    attach_in_memory(with_adapter, num_layers, rank, scale, keys=keys, use_dora=use_dora)
    mx.random.seed(5)
    weights = {
        name: array if name.endswith(".m") else mx.random.normal(array.shape) * 0.1
        for name, array in tree_flatten(with_adapter.trainable_parameters())
    }
    directory.mkdir()
    mx.save_safetensors(str(directory / "adapters.safetensors"), weights)
    parameters = {"rank": rank, "scale": scale, "dropout": 0.0} | ({"keys": keys} if keys else {})
    config = {"fine_tune_type": "dora" if use_dora else "lora", "num_layers": num_layers, "lora_parameters": parameters}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


def fuse_by_mlx_lm(monkeypatch, model: Path, adapter: Path, output: Path, *more: str) -> Path:
    command = ["mlx_lm.fuse", "--model", model, "--adapter-path", adapter, "--save-path", output, *more]
    monkeypatch.setattr(sys, "argv", [str(word) for word in command])
    with contextlib.redirect_stdout(io.StringIO()):
        mlx_lm.fuse.main()
    return output


@pytest.fixture(scope="session")
def bases(tmp_path_factory, small, mixtral, tokenizer_files) -> dict[str, Path]:  # noqa: F811
    """Small models of several kinds, each with a tokenizer."""
    directory = tmp_path_factory.mktemp("bases")
    found = {"dense": small, "tied": save_random(directory / "tied", TIED, mx.bfloat16), "experts": mixtral}
    for name in ("tied",):
        for file in tokenizer_files:
            shutil.copy(file, found[name])
    found["packed"] = slowft.prepare(small, directory / "packed", quantize=True)
    found["mxfp4"] = slowft.prepare(small, directory / "mxfp4", quantize=True, mode="mxfp4")
    found["packed-experts"] = slowft.prepare(mixtral, directory / "packed-experts", quantize=True, group_size=32)
    found["packed-tied"] = slowft.prepare(found["tied"], directory / "packed-tied", quantize=True, bits=8)
    return found


CASES = {
    "LoRA on everything": ("dense", {}, ()),
    "DoRA on some blocks": ("dense", {"use_dora": True, "num_layers": 3, "keys": ATTENTION}, ()),
    "the head too": ("dense", {"keys": ["self_attn.q_proj", "lm_head"]}, ()),
    "an embedding that is the head": ("tied", {"keys": ["model.embed_tokens", "self_attn.v_proj"]}, ()),
    "DoRA on an embedding": ("tied", {"keys": ["model.embed_tokens"], "use_dora": True}, ()),
    "experts": ("experts", {"keys": EXPERTS}, ()),
    "quantized": ("packed", {"num_layers": 4, "keys": ATTENTION}, ()),
    "quantized, DoRA": ("packed", {"num_layers": 4, "keys": ATTENTION, "use_dora": True}, ()),
    "quantized, dequantized": ("packed", {"num_layers": 4, "keys": ATTENTION}, ("--dequantize",)),
    "mxfp4": ("mxfp4", {"num_layers": 4}, ()),
    "mxfp4, DoRA, dequantized": ("mxfp4", {"num_layers": 4, "use_dora": True}, ("--dequantize",)),
    "quantized experts": ("packed-experts", {"keys": EXPERTS}, ()),
    "quantized experts, dequantized": ("packed-experts", {"keys": EXPERTS}, ("--dequantize",)),
    "quantized embedding": ("packed-tied", {"keys": ["model.embed_tokens", "self_attn.v_proj"]}, ()),
}


@pytest.mark.parametrize("case", CASES)
def test_fused_equals_mlx_lm_fuse_bit_by_bit(case, bases, tmp_path, monkeypatch, small_pieces):  # noqa: F811
    base, lora, options = CASES[case]
    model = bases[base]
    adapter = adapter_of(model, tmp_path / "adapter", **lora)
    expected = fuse_by_mlx_lm(monkeypatch, model, adapter, tmp_path / "expected", *options)
    fused = slowft.fuse(model, adapter, tmp_path / "fused", dequantize="--dequantize" in options)
    assert_same_tensors(fused, expected)
    assert json.loads((fused / "config.json").read_text()) == json.loads((expected / "config.json").read_text())
    assert not slowft.verify(fused).faults
