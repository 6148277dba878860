"""Quantized bases of every format: the numbers of mlx-lm's QLoRA in memory on the same weights, to the last bit."""

import json
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from mlx_lm.convert import QUANT_RECIPES, mixed_quant_predicate_builder
from mlx_lm.models.mla import MultiLinear, QuantizedMultiLinear
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear
from mlx_lm.utils import load_model, quantize_model

import slowft
from architectures import ARCHITECTURES
from conftest import (
    LLAMA,
    attach_in_memory,
    largest,
    largest_difference,
    must_run,
    random_batch,
    randomise,
    reference,
    save_random,
)
from slowft import platform
from slowft.weights import quantized
from slowft.weights.extents import read_header
from slowft.weights.reader import Reader
from slowft.weights.sources import Packed, pieces_nbytes, read_whole

SMALL = LLAMA | {"num_hidden_layers": 2, "hidden_size": 128, "vocab_size": 128}
LORA = {"num_layers": -1, "rank": 4, "scale": 2.0}
AFFINE = [(bits, group_size, "affine") for bits in (2, 3, 4, 5, 6, 8) for group_size in (32, 64, 128)]
FLOATING = [(4, 32, "mxfp4"), (8, 32, "mxfp8"), (4, 16, "nvfp4")]
DENSE = {
    nn.QuantizedLinear: nn.Linear,
    nn.QuantizedEmbedding: nn.Embedding,
    QuantizedSwitchLinear: SwitchLinear,
    QuantizedMultiLinear: MultiLinear,
}


def save_quantized(directory: Path, config: dict, bits=4, group_size=32, mode="affine", predicate=None, dtype=None):
    """A random model quantized by mlx-lm, in a directory as `mlx_lm.convert` writes it.

    Args:
        predicate: makes the `quant_predicate` of `quantize_model` for the model.
    """
    dense = save_random(directory / "dense", config, dtype or mx.float32)
    model, config = load_model(dense)
    predicate = predicate and predicate(model)
    model, config = quantize_model(model, config, group_size, bits, mode=mode, quant_predicate=predicate)
    packed = directory / "packed"
    packed.mkdir()
    mx.save_safetensors(str(packed / "model.safetensors"), dict(tree_flatten(model.parameters())), {"format": "mlx"})
    (packed / "config.json").write_text(json.dumps(config))
    return packed


def dequantized(directory: Path):
    """mlx-lm's model in memory, its packed weights replaced by what `mx.dequantize` makes of them in float32."""
    model, _ = load_model(directory)
    layers = []
    for name, layer in model.named_modules():
        if type(layer) not in DENSE:
            continue
        cls = DENSE[type(layer)]
        dense = cls.__new__(cls)
        nn.Module.__init__(dense)
        scales = [None if a is None else a.astype(mx.float32) if a.dtype != mx.uint8 else a
                  for a in (layer.scales, layer.get("biases"))]  # fmt: skip
        kind = layer.group_size, layer.bits, layer.mode
        dense.weight = mx.dequantize(layer.weight, *scales, *kind, dtype=mx.float32)
        if "bias" in layer:
            dense.bias = layer.bias
        layers.append((name, dense))
    assert layers
    model.update_modules(tree_unflatten(layers))
    model.update(tree_map(lambda a: a.astype(mx.float32), model.parameters()))
    model.freeze()
    return model


def assert_gradients_equal(whole, directory: Path, compute_dtype: str, vocab: int, **lora):
    attach_in_memory(whole, **(LORA | lora))
    streamed = slowft.open_model(directory, compute_dtype=compute_dtype).add_lora(**(LORA | lora))
    randomise(whole, streamed)
    whole.train()
    streamed.train()
    batch, lengths = random_batch(vocab, rows=2, tokens=12)
    loss, gradients = reference(whole, batch, lengths)
    assert largest(gradients) > 1e-4  # something to compare
    (streamed_loss, _), streamed_gradients = streamed.loss_and_grads(batch, lengths)
    assert streamed_loss.item() == loss.item()
    assert largest_difference(gradients, streamed_gradients) == 0.0
    streamed.close()


def in_memory_packed(directory: Path):
    model, _ = load_model(directory)
    model.freeze()
    return model


# --- The C functions --------------------------------------------------------------------------------


@pytest.fixture
def compiled():
    if sys.platform != "linux":
        pytest.skip("nothing is compiled for macOS, where GPUs multiply by packed weights")
    if not quantized.is_compiled():
        must_run("models/quantized.c was not compiled: pip install --editable . with a C compiler")


def random_packed(rows: int, columns: int, bits: int, group_size: int, mode: str, scales: mx.Dtype):
    """(weight, scales and biases) as MLX stores them: any bits, any scale, the smallest and largest among them."""
    random = np.random.default_rng(0)
    weight = mx.array(np.frombuffer(random.bytes(rows * columns * bits // 8), np.uint32).reshape(rows, -1))
    shape = rows, columns // group_size
    if mode != "affine":
        return [weight, mx.array(np.resize(np.arange(256, dtype=np.uint8), shape))]
    exponents = random.uniform(-24, 6, shape)  # float16's subnormal ones included
    floats = mx.array((np.exp2(exponents) * random.choice([-1, 1], shape)).astype(np.float32)).astype(scales)
    biases = mx.array(random.normal(size=shape).astype(np.float32)).astype(scales)
    floats[0, 0], biases[0, 0] = float("inf"), 0.0
    return [weight, floats, biases]


@pytest.mark.parametrize("scales", [mx.float32, mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("bits, group_size, mode", [(1, 32, "affine"), *AFFINE, *FLOATING])
def test_dequantizing_in_c_equals_mlx(bits, group_size, mode, scales, compiled):
    rows, columns = 37, 768  # a number of groups that neither threads nor what is unpacked at a time divide
    packed = random_packed(rows, columns, bits, group_size, mode, scales)
    scales = packed[1].dtype
    assert quantized.can_dequantize(bits, group_size, mode, scales, mx.float32)
    expected = [part.astype(mx.float32) if scales != mx.uint8 and i else part for i, part in enumerate(packed)]
    expected = mx.dequantize(*expected, group_size=group_size, bits=bits, mode=mode, dtype=mx.float32)
    result = mx.full((rows, columns), 1e30)
    parts = [part.reshape(-1).view(mx.uint8) for part in packed]
    mx.eval(result, expected, parts)
    out = memoryview(result).cast("B")
    quantized.dequantize([memoryview(p) for p in parts], bits, group_size, mode, scales, out)
    result, expected = np.array(result), np.array(expected)
    assert np.array_equal(np.isnan(result), np.isnan(expected))
    numbers = ~np.isnan(expected)
    assert numbers.mean() > 0.9
    assert np.array_equal(result[numbers].view(np.uint32), expected[numbers].view(np.uint32))  # -0.0 is not 0.0


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_large_matrix_is_brought_in_small_pieces(bits, tmp_path):
    """Of 18 MB packed in 4 bits all would be one piece, dequantized beside the result: 131 MB more than was planned."""
    weight = mx.random.normal((32000, 1024), key=mx.random.key(0)).astype(mx.bfloat16)
    packed = dict(zip(("weight", "scales", "biases"), mx.quantize(weight, group_size=64, bits=bits)))
    mx.save_safetensors(str(tmp_path / "head.safetensors"), packed)
    expected = mx.dequantize(
        packed["weight"], *(packed[k].astype(mx.float32) for k in ("scales", "biases")), group_size=64, bits=bits
    )
    extents = read_header(tmp_path / "head.safetensors")
    source = Packed(*(extents[name] for name in packed), 64, bits, "affine", mx.float32)
    reader = Reader()
    try:
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        whole = read_whole(reader, source)
        peak = mx.get_peak_memory() - before
    finally:
        reader.close()
    assert mx.array_equal(whole, expected)
    planned = pieces_nbytes(sum(extent.nbytes for extent in source.extents), whole.nbytes)
    assert whole.nbytes + 0.5 * planned < peak < whole.nbytes + 1.1 * planned


def test_threads_share_the_work(compiled, monkeypatch):
    monkeypatch.setattr(quantized, "THREAD_VALUES", 1)
    monkeypatch.setattr(platform, "cores", lambda: 5)
    test_dequantizing_in_c_equals_mlx(3, 32, "affine", mx.bfloat16, None)
    test_dequantizing_in_c_equals_mlx(4, 16, "nvfp4", mx.bfloat16, None)


def test_nothing_is_read_beyond_the_last_byte(compiled):
    """The packed weight ends where a page that may not be touched begins."""
    code = """
import ctypes, mmap, numpy as np, slowft, mlx.core as mx
from slowft.weights.quantized import dequantize
pages = mmap.mmap(-1, 2 * mmap.PAGESIZE)
array = np.frombuffer(pages, np.uint8)
ctypes.CDLL(None).mprotect(ctypes.c_void_p(array.ctypes.data + mmap.PAGESIZE), mmap.PAGESIZE, 0)
scales = np.ones(2, np.float32)
out = np.zeros(64, np.float32)
for bits in (1, 2, 3, 4, 5, 6, 8):
    packed = array[mmap.PAGESIZE - 8 * bits : mmap.PAGESIZE]
    packed[:] = 255
    parts = [memoryview(a).cast("B") for a in (packed, scales, scales)]
    dequantize(parts, bits, 32, "affine", mx.float32, memoryview(out).cast("B"))
    assert (out == 2**bits).all()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- Models -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits, group_size, mode", AFFINE + FLOATING)
def test_gradients_equal_on_the_dequantized_weights(bits, group_size, mode, tmp_path):
    packed = save_quantized(tmp_path, SMALL, bits, group_size, mode, dtype=mx.bfloat16)
    assert_gradients_equal(dequantized(packed), packed, "float32", SMALL["vocab_size"])


@pytest.mark.parametrize("bits, group_size, mode", [(3, 32, "affine"), (6, 64, "affine"), *FLOATING])
def test_gradients_equal_on_packed_weights(bits, group_size, mode, tmp_path):
    """As on a GPU, by `quantized_matmul`."""
    packed = save_quantized(tmp_path, SMALL, bits, group_size, mode)
    assert_gradients_equal(in_memory_packed(packed), packed, "native", SMALL["vocab_size"])


def test_gradients_equal_where_nothing_was_compiled(tmp_path, monkeypatch):
    monkeypatch.setattr(quantized, "is_compiled", lambda: False)
    packed = save_quantized(tmp_path, SMALL, 3, 64, dtype=mx.float16)
    assert_gradients_equal(dequantized(packed), packed, "float32", SMALL["vocab_size"])


@pytest.mark.parametrize("recipe", QUANT_RECIPES)
def test_mixed_recipes(recipe, tmp_path):
    packed = save_quantized(tmp_path, SMALL, predicate=lambda model: mixed_quant_predicate_builder(recipe, model, 32))
    bits = {c["bits"] for c in json.loads((packed / "config.json").read_text())["quantization"].values()
            if isinstance(c, dict)}  # fmt: skip
    assert len(bits) == 2
    assert_gradients_equal(dequantized(packed), packed, "float32", SMALL["vocab_size"])


def several_formats(model):
    """Another format for each kind of layer, and some left as they are."""
    settings = {
        "q_proj": {"group_size": 64, "bits": 8, "mode": "affine"},
        "v_proj": {"group_size": 32, "bits": 4, "mode": "mxfp4"},
        "o_proj": {"group_size": 16, "bits": 4, "mode": "nvfp4"},
        "layers.0.mlp.up_proj": False,
        "down_proj": False,
    }
    return lambda name, layer: next((value for key, value in settings.items() if key in name), True)


@pytest.mark.parametrize("compute_dtype", ["float32", "native"])
def test_each_layer_in_its_own_format(compute_dtype, tmp_path):
    packed = save_quantized(tmp_path, SMALL, 4, 32, predicate=several_formats)
    whole = dequantized(packed) if compute_dtype == "float32" else in_memory_packed(packed)
    assert_gradients_equal(whole, packed, compute_dtype, SMALL["vocab_size"])


@pytest.mark.parametrize("compute_dtype", ["float32", "native"])
@pytest.mark.parametrize(
    "name, bits, group_size, mode",
    [
        ("mixtral (experts)", 4, 32, "affine"),
        ("qwen3_moe (experts, one dense block)", 3, 16, "nvfp4"),
        ("gpt_oss (attention sinks, experts, sliding window)", 4, 32, "mxfp4"),
    ],
)
def test_quantized_experts(name, bits, group_size, mode, compute_dtype, tmp_path):
    config = ARCHITECTURES[name] | {"num_hidden_layers": 2}
    if "layer_types" in config:
        config["layer_types"] = config["layer_types"][:2]
    bits = 4 if mode == "nvfp4" else bits
    packed = save_quantized(tmp_path, config, bits, group_size, mode)
    whole = in_memory_packed(packed)
    assert any(isinstance(layer, QuantizedSwitchLinear) for layer in whole.modules())
    whole = dequantized(packed) if compute_dtype == "float32" else whole
    assert_gradients_equal(whole, packed, compute_dtype, config["vocab_size"])


@pytest.mark.parametrize("compute_dtype", ["float32", "native"])
@pytest.mark.parametrize("tied", [False, True])
def test_rows_of_a_quantized_embedding_are_read_packed(tied, compute_dtype, tmp_path, monkeypatch):
    config = SMALL | {"tie_word_embeddings": tied, "hidden_size": 256, "num_attention_heads": 8, "vocab_size": 512}
    packed = save_quantized(tmp_path, config, 4, 64, dtype=mx.float32)
    whole = dequantized(packed) if compute_dtype == "float32" else in_memory_packed(packed)
    assert_gradients_equal(whole, packed, compute_dtype, config["vocab_size"])

    asked = []
    read_now = Reader.read_now
    monkeypatch.setattr(
        Reader, "read_now", lambda self, ranges, out: asked.extend(ranges) or read_now(self, ranges, out)
    )
    monkeypatch.setattr("slowft.weights.sources.GAP_NBYTES", 0)
    streamed = slowft.open_model(packed, compute_dtype=compute_dtype)
    asked.clear()
    ids = mx.array([[5, 511, 5, 400]])
    assert mx.array_equal(streamed.model.embed_tokens(ids), whole.model.embed_tokens(ids))
    # of 3 rows, 256 values of 4 bits, with a scale and a bias of 4 bytes for each 64
    assert sum(r.nbytes for r in asked) == 3 * (256 // 2 + 2 * 256 // 64 * 4)
    streamed.close()
