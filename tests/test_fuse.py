"""Fused models equal mlx_lm.fuse's tensor by tensor and bit by bit, within the ceiling, and survive kills."""

import slowft  # noqa: F401, I001  (before mlx: it loads OpenBLAS)

import contextlib
import io
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx_lm.fuse
import pytest
from conftest import LLAMA, attach_in_memory, must_run, save_random
from mlx.utils import tree_flatten
from mlx_lm.tuner.lora import LoRASwitchLinear
from mlx_lm.utils import load_model
from slowft.bench import cgroup
from slowft.cli.main import main
from slowft.convert import conversion
from slowft.convert import output as output_directory
from slowft.errors import AdapterError, ConfigError, ModelError, SlowftError
from test_prepare import (  # noqa: F401  (some are fixtures)
    assert_same_tensors,
    gpt2,
    mixtral,
    small,
    small_pieces,
    tensors,
    tokenizer_files,
)

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
def bases(tmp_path_factory, small, mixtral, gpt2, tokenizer_files) -> dict[str, Path]:  # noqa: F811
    """Small models of several kinds, each with a tokenizer."""
    directory = tmp_path_factory.mktemp("bases")
    found = {
        "dense": small,
        "tied": save_random(directory / "tied", TIED, mx.bfloat16),
        "experts": mixtral,
        "transposed": gpt2,
    }
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
    "weights that are transposed as they are read": ("transposed", {"keys": ["attn.c_attn", "mlp.c_proj"]}, ()),
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


@pytest.mark.parametrize("case", ["DoRA on some blocks", "quantized experts"])
def test_fused_on_a_mac_equals_mlx_lm_fuse_there(case, mac, bases, tmp_path, monkeypatch):
    """In the double of one."""
    base, lora, _ = CASES[case]
    adapter = adapter_of(bases[base], tmp_path / "adapter", **lora)
    expected = fuse_by_mlx_lm(monkeypatch, bases[base], adapter, tmp_path / "expected")
    assert_same_tensors(slowft.fuse(bases[base], adapter, tmp_path / "fused"), expected)


@pytest.fixture(scope="module")
def tuned(small, tmp_path_factory) -> tuple[Path, Path]:  # noqa: F811
    """A model, and an adapter of some of its blocks."""
    return small, adapter_of(small, tmp_path_factory.mktemp("tuned") / "adapter", num_layers=3, keys=ATTENTION)


def test_products_that_are_cut_differ_in_last_bits_only(bases, tmp_path, small_pieces, monkeypatch):  # noqa: F811
    """Under a ceiling that has no room for whole products."""
    for base, lora in (
        ("dense", {"use_dora": True}),
        ("packed-experts", {"keys": EXPERTS}),
        ("tied", {"num_layers": 1}),
    ):
        model = bases[base]
        adapter = adapter_of(model, tmp_path / f"{base}-adapter", **lora)
        whole = slowft.fuse(model, adapter, tmp_path / f"{base}-whole", dequantize=True)
        with monkeypatch.context() as patch:
            patch.setattr(conversion, "USUAL_NBYTES", 1 << 60)
            patch.setattr(conversion, "CHUNK_NBYTES", 1 << 10)
            cut = slowft.fuse(model, adapter, tmp_path / f"{base}-cut", dequantize=True)
        for name, array in tensors(cut).items():
            expected = tensors(whole)[name]
            assert (array.dtype, array.shape) == (expected.dtype, expected.shape)
            precision = 2**-7 if array.dtype == mx.bfloat16 else 1e-5
            assert mx.allclose(array, expected, rtol=precision, atol=1e-6), name


# --- Killed, cut short, in the way -------------------------------------------------------------------

KILLED = """
import os, signal, sys
import slowft
from slowft.models.imports import import_mlx_lm_without_tokenizers
import_mlx_lm_without_tokenizers()
from slowft.convert import writing
writing.PIECE_NBYTES = writing.LEAST_PIECE_NBYTES = 4096

def progress(done, total):
    if done > total * 0.55:
        os.kill(os.getpid(), signal.SIGKILL)

slowft.fuse(*sys.argv[1:4], progress=progress)
"""


def contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def test_killed_it_is_gone_on_with_to_the_same_bytes_and_inputs_are_untouched(tuned, tmp_path):
    before = [contents(directory) for directory in tuned]
    whole = contents(slowft.fuse(*tuned, tmp_path / "whole"))
    killed = subprocess.run([sys.executable, "-c", KILLED, *tuned, tmp_path / "killed"], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    with pytest.raises(ModelError, match="unfinished slowft prepare or fuse"):
        slowft.verify(tmp_path / "killed")
    unfinished = set(contents(tmp_path / "killed"))
    assert "config.json" not in unfinished and len(unfinished) > 2
    other = adapter_of(tuned[0], tmp_path / "other", num_layers=3, keys=ATTENTION, rank=2)
    with pytest.raises(SlowftError, match="unfinished slowft fuse of another job .other options"):
        slowft.fuse(tuned[0], other, tmp_path / "killed")
    said: list[str] = []
    slowft.fuse(*tuned, tmp_path / "killed", note=said.append)
    assert "Going on with an earlier run" in said[0]
    assert contents(tmp_path / "killed") == whole
    assert [contents(directory) for directory in tuned] == before


def test_a_full_disk_is_seen_first(tuned, tmp_path, monkeypatch):
    monkeypatch.setattr(output_directory, "free_nbytes", lambda directory: 100_000)
    with pytest.raises(SlowftError, match=r"needs \d+ MB, and its disk has 0 MB free"):
        slowft.fuse(*tuned, tmp_path / "fused")
    assert not (tmp_path / "fused").exists()


def test_what_is_in_the_way_or_does_not_fit_is_refused_in_one_line(tuned, bases, tmp_path):
    model, adapter = tuned
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    (tmp_path / "none").mkdir()
    full = tmp_path / "full"
    shutil.copytree(adapter, full)
    (full / "adapter_config.json").write_text('{"fine_tune_type": "full", "num_layers": 2, "lora_parameters": {}}')
    other = adapter_of(bases["experts"], tmp_path / "other", keys=EXPERTS)
    wide = adapter_of(save_random(tmp_path / "wide", LLAMA | {"hidden_size": 32}), tmp_path / "a", keys=ATTENTION)
    broken = tmp_path / "broken"
    shutil.copytree(adapter, broken)
    weights = mx.load(str(broken / "adapters.safetensors"))
    first = next(iter(weights))
    mx.save_safetensors(str(broken / "adapters.safetensors"), weights | {first: mx.full(weights[first].shape, mx.nan)})
    for words, kind, message in (
        ((model, adapter, tmp_path / "mine"), SlowftError, "is not empty and not slowft's"),
        ((model, adapter, model), SlowftError, "is not empty"),
        ((model, tmp_path / "none", tmp_path / "o"), AdapterError, "is not an adapter directory"),
        ((model, full, tmp_path / "o"), AdapterError, "'full' changes base weights"),
        ((model, other, tmp_path / "o"), ConfigError, "match no layer of the model"),
        ((model, wide, tmp_path / "o"), AdapterError, "Use the rank and layers it was trained with"),
        ((adapter, adapter, tmp_path / "o"), ModelError, "is an mlx-lm adapter, not a model"),
        ((model, broken, tmp_path / "nan"), ModelError, "becomes NaN with the adapter"),
    ):
        with pytest.raises(kind) as raised:
            slowft.fuse(*words)
        assert message in str(raised.value) and "\n" not in str(raised.value), str(raised.value)
    with pytest.raises(ConfigError, match=r"too little: fusing .* takes 0\.\d\dGB. Use --memory"):
        slowft.fuse(model, adapter, tmp_path / "o", memory="20MB")
    assert not (tmp_path / "o").exists()
    assert [f.name for f in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_the_command_says_what_it_wrote(tuned, tmp_path, monkeypatch, capsys):
    model, adapter = tuned
    words = ["--model", model, "--adapter-path", adapter, "--save-path", tmp_path / "fused", "--json"]
    monkeypatch.setattr(sys, "argv", ["slowft", "fuse", *map(str, words)])
    main()
    said = json.loads(capsys.readouterr().out)
    assert said["output"] == str(tmp_path / "fused")
    assert said["nbytes"] == sum(file.stat().st_size for file in (tmp_path / "fused").glob("*.safetensors"))


# --- Memory ------------------------------------------------------------------------------------------

FUSE = """
import sys
import slowft
slowft.fuse(*sys.argv[1:4], memory=int(sys.argv[4]))
"""


def test_a_model_larger_than_the_ceiling_is_fused_within_it(tmp_path):
    """An expert block of 330 MB and an embedding of 66 MB, in a cgroup of 260 MB, page cache and swap included."""
    if reason := cgroup.why_unavailable():
        must_run(reason)
    n_experts, hidden, ffn, vocab, rank = 16, 1024, 3328, 32768, 8
    block, mlp = "model.layers.0", "model.layers.0.block_sparse_moe.switch_mlp"
    config = {
        "model_type": "mixtral",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": 1,
        "num_local_experts": n_experts,
        "vocab_size": vocab,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    }
    model, adapter = tmp_path / "m", tmp_path / "a"
    model.mkdir()
    adapter.mkdir()
    (model / "config.json").write_text(json.dumps(config))
    shapes = {f"{block}.self_attn.{p}_proj.weight": (hidden, hidden) for p in "qkvo"}
    shapes |= {
        "model.embed_tokens.weight": (vocab, hidden),
        f"{block}.block_sparse_moe.gate.weight": (n_experts, hidden),
    }
    norms = (f"{block}.input_layernorm", f"{block}.post_attention_layernorm", "model.norm")
    shapes |= {f"{norm}.weight": (hidden,) for norm in norms}
    shapes |= {f"{mlp}.{p}_proj.weight": (n_experts, ffn, hidden) for p in ("gate", "up")}
    shapes[f"{mlp}.down_proj.weight"] = (n_experts, hidden, ffn)
    ramp = (mx.arange(1 << 20) % 1009 / 1009 - 0.5).astype(mx.bfloat16)
    weights = {}
    for i, (name, shape) in enumerate(shapes.items()):
        size = int(mx.prod(mx.array(shape)).item())
        weights[name] = mx.roll(mx.tile(ramp, -(-size // ramp.size)), i)[:size].reshape(shape)
    mx.save_safetensors(str(model / "model.safetensors"), weights)
    nbytes = sum(a.nbytes for a in weights.values())
    del weights
    mx.clear_cache()
    factors = {
        f"{mlp}.down_proj.lora_a": mx.random.normal((n_experts, rank, ffn)),
        f"{mlp}.down_proj.lora_b": mx.random.normal((n_experts, hidden, rank)),
        "model.embed_tokens.lora_a": mx.random.normal((vocab, rank)),
        "model.embed_tokens.lora_b": mx.random.normal((rank, hidden)),
    }
    mx.save_safetensors(str(adapter / "adapters.safetensors"), factors)
    keys = ["block_sparse_moe.switch_mlp.down_proj", "model.embed_tokens"]
    parameters = {"rank": rank, "scale": 0.5, "dropout": 0.0, "keys": keys}
    config = {"fine_tune_type": "lora", "num_layers": -1, "lora_parameters": parameters}
    (adapter / "adapter_config.json").write_text(json.dumps(config))

    limit = 260_000_000
    assert nbytes > 1.5 * limit
    command = [sys.executable, "-c", FUSE, str(model), str(adapter), str(tmp_path / "f"), str(limit)]
    done, peak = cgroup.run(command, limit)
    assert done.returncode == 0, f"killed under {limit} bytes (peak {peak}): {done.stderr[-2000:]}"
    assert peak <= limit
    base, fused = mx.load(str(model / "model.safetensors")), tensors(tmp_path / "f")
    layer = LoRASwitchLinear(ffn, hidden, 1, r=rank, scale=0.5)
    layer.linear.weight = base[f"{mlp}.down_proj.weight"][9:10]
    layer.lora_a, layer.lora_b = (factors[f"{mlp}.down_proj.lora_{p}"][9:10] for p in "ab")
    pairs = [(fused[f"{mlp}.down_proj.weight"][9], layer.fuse().weight[0])]
    product = 0.5 * factors["model.embed_tokens.lora_a"][-9:] @ factors["model.embed_tokens.lora_b"]
    rows = base["model.embed_tokens.weight"][-9:] + product.astype(mx.bfloat16)
    pairs.append((fused["model.embed_tokens.weight"][-9:], rows))
    for ours, expected in pairs:
        assert ours.dtype == expected.dtype and mx.allclose(ours, expected, rtol=2**-7, atol=1e-6)
