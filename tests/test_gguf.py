"""GGUF files, written by llama.cpp's own Python package from mlx-lm's models, come back as the same models."""

import slowft  # noqa: F401, I001  (before mlx: it loads OpenBLAS)

import json
import struct
import tracemalloc
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes, load_model

from conftest import must_run
from slowft.convert import gguf as ours
from slowft.convert.gguf_file import read_gguf

try:
    import gguf
except ImportError:
    gguf = None

BASE = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 96,
    "max_position_embeddings": 128,
    "rope_theta": 50000.0,
    "tie_word_embeddings": False,
}
EPS = {"layer_norm_eps": 1e-4}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
WINDOWS = {"sliding_window": 8, "sliding_window_pattern": 2}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONG = {"type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3] * 2, "long_factor": [1.5, 2.5, 3.5, 4.5] * 2}
GRANITE = {
    "attention_multiplier": 0.1,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.5,
    "logits_scaling": 2.0,
    "attention_bias": False,
    "mlp_bias": False,
}

# name: (llama.cpp's architecture, mlx-lm's configuration)
MODELS = {
    "llama": ("llama", {"model_type": "llama"}),
    "llama, own head size": ("llama", {"model_type": "llama", "head_dim": 32, "tie_word_embeddings": True}),
    "llama, biases": ("llama", {"model_type": "llama", "attention_bias": True, "mlp_bias": True}),
    "llama 3.1": (
        "llama",
        {"model_type": "llama", "rope_scaling": LLAMA3 | {"original_max_position_embeddings": 8192}, "head_dim": 32},
    ),
    "llama, linear": ("llama", {"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 4.0}}),
    "mixtral": ("llama", {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2": ("qwen2", {"model_type": "qwen2", "tie_word_embeddings": True}),
    "qwen2, yarn": (
        "qwen2",
        {
            "model_type": "qwen2",
            "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        },
    ),
    "qwen3": ("qwen3", {"model_type": "qwen3", "head_dim": 32}),
    "qwen2moe": ("qwen2moe", {"model_type": "qwen2_moe", "shared_expert_intermediate_size": 64} | MOE),
    "qwen3moe": (
        "qwen3moe",
        {
            "model_type": "qwen3_moe",
            "head_dim": 16,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "norm_topk_prob": True,
        }
        | MOE,
    ),
    "gemma": ("gemma", {"model_type": "gemma", "head_dim": 32}),
    "gemma2": (
        "gemma2",
        {
            "model_type": "gemma2",
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "attn_logit_softcapping": 20.0,
            "final_logit_softcapping": 10.0,
        },
    ),
    "gemma3": (
        "gemma3",
        {
            "model_type": "gemma3_text",
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "tie_word_embeddings": True,
            "rope_local_base_freq": 10000.0,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        }
        | WINDOWS,
    ),
    "phi2": ("phi2", {"model_type": "phi", "partial_rotary_factor": 0.5, "num_key_value_heads": 4} | EPS),
    "phi3": ("phi3", {"model_type": "phi3"}),
    "phi3, long": ("phi3", {"model_type": "phi3", "rope_scaling": LONG, "original_max_position_embeddings": 64}),
    "starcoder2": ("starcoder2", {"model_type": "starcoder2", "norm_epsilon": 1e-4, "tie_word_embeddings": True}),
    "olmo2": ("olmo2", {"model_type": "olmo2"}),
    "olmo3": ("olmo2", {"model_type": "olmo3", "sliding_window": 8, "num_hidden_layers": 4}),
    "olmoe": (
        "olmoe",
        {"model_type": "olmoe", "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": False},
    ),
    "granite": ("granite", {"model_type": "granite"} | GRANITE),
    "granitemoe": (
        "granitemoe",
        {"model_type": "granitemoe", "num_local_experts": 4, "num_experts_per_tok": 2} | GRANITE,
    ),
    "command-r": ("command-r", {"model_type": "cohere", "logit_scale": 0.5, "use_qk_norm": True} | EPS),
    "cohere2": ("cohere2", {"model_type": "cohere2", "head_dim": 16, "logit_scale": 0.5} | EPS | WINDOWS),
    "stablelm": (
        "stablelm",
        {"model_type": "stablelm", "use_qkv_bias": True, "partial_rotary_factor": 0.25} | EPS,
    ),
    "smollm3": ("smollm3", {"model_type": "smollm3", "num_hidden_layers": 4}),
    "seed_oss": ("seed_oss", {"model_type": "seed_oss", "head_dim": 32, "attention_bias": True}),
    "exaone": ("exaone", {"model_type": "exaone", "num_layers": 2, "layer_norm_epsilon": 1e-5}),
    "gpt-oss": (
        "gpt-oss",
        {
            "model_type": "gpt_oss",
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "head_dim": 16,
            "sliding_window": 8,
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        },
    ),
}
PERMUTED = ("llama", "granite", "granitemoe", "smollm3")  # llama.cpp's subclasses of LlamaModel
NO_MLX_EQUAL = {"Q4_K": 12, "IQ4_XS": 23}


@pytest.fixture(autouse=True)
def package():
    if gguf is None:
        must_run("pip install gguf")


def random_model(config: dict):
    """mlx-lm's model with random weights everywhere, norms and biases too, and those weights by name."""
    mx.random.seed(0)
    model_class, args_class = _get_classes(config)
    model = model_class(args_class.from_dict(config))
    if config["model_type"] == "gemma3_text":
        model.sanitize({})  # ties the head
    weights = {
        name: mx.random.normal(array.shape) * 0.1 + (0.5 if "norm" in name and name.endswith("weight") else 0)
        for name, array in tree_flatten(model.parameters())
    }
    model.load_weights(list(weights.items()))
    mx.eval(model.parameters())
    model.eval()
    return model, {name: np.array(array) for name, array in weights.items()}


def permuted(weight: np.ndarray, n_heads: int) -> np.ndarray:
    """llama.cpp's LlamaModel.permute."""
    halves = weight.reshape(n_heads, 2, weight.shape[0] // n_heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write(file: Path, architecture: str, config: dict, weights: dict, kind: str = "F32", tokenizer=None) -> Path:
    """What llama.cpp's convert_hf_to_gguf.py writes of this model: names by gguf-py's own table."""
    arch = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    writer = gguf.GGUFWriter(file, architecture)
    metadata(writer, architecture, config)
    (tokenizer or byte_tokenizer)(writer, config["vocab_size"])
    for name, value in weights.items():
        value = np.array(value, np.float32)
        if architecture in PERMUTED and ".self_attn.q_proj." in name:
            value = permuted(value, config["num_attention_heads"])
        if architecture in PERMUTED and ".self_attn.k_proj." in name:
            value = permuted(value, config["num_key_value_heads"])
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            value = value + 1
        if "shared_expert_gate" in name:
            value = value.squeeze(0)
        name = name.replace("block_sparse_moe.switch_mlp", "mlp.experts").replace("mlp.switch_mlp", "mlp.experts")
        name = name + ".weight" if name.endswith("sinks") else name
        there = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert there, name
        quantized = value.ndim > 1 and "ffn_gate_inp" not in there
        plain = kind if quantized else "F32"
        type_ = gguf.GGMLQuantizationType[plain]
        data = value if plain == "F32" else gguf.quants.quantize(value, type_)
        writer.add_tensor(there, data, raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def metadata(w, architecture: str, c: dict) -> None:
    w.add_block_count(c["num_hidden_layers"])
    w.add_context_length(c["max_position_embeddings"])
    w.add_embedding_length(c["hidden_size"])
    w.add_feed_forward_length(c["intermediate_size"])
    w.add_head_count(c["num_attention_heads"])
    w.add_head_count_kv(c["num_key_value_heads"])
    w.add_rope_freq_base(c["rope_theta"])
    head_dim = c.get("head_dim", c["hidden_size"] // c["num_attention_heads"])
    w.add_rope_dimension_count(int(c.get("partial_rotary_factor", 1.0) * head_dim))
    if "head_dim" in c:
        w.add_key_length(head_dim)
        w.add_value_length(head_dim)
    eps = c.get("layer_norm_eps", c.get("norm_epsilon"))
    w.add_layer_norm_rms_eps(c["rms_norm_eps"]) if eps is None else w.add_layer_norm_eps(eps)
    if n_experts := c.get("num_experts", c.get("num_local_experts")):
        w.add_expert_count(n_experts)
        w.add_expert_used_count(c["num_experts_per_tok"])
    if "sliding_window" in c:
        w.add_sliding_window(c["sliding_window"])
        if architecture in ("gemma3", "cohere2"):  # of an unusual period
            w.add_sliding_window_pattern([(i + 1) % c["sliding_window_pattern"] != 0 for i in range(2)])
    for key, add in (
        ("attn_logit_softcapping", w.add_attn_logit_softcapping),
        ("final_logit_softcapping", w.add_final_logit_softcapping),
        ("attention_multiplier", w.add_attention_scale),
        ("embedding_multiplier", w.add_embedding_scale),
        ("residual_multiplier", w.add_residual_scale),
        ("logits_scaling", w.add_logit_scale),
        ("logit_scale", w.add_logit_scale),
        ("original_max_position_embeddings", w.add_rope_scaling_orig_ctx_len),
    ):
        if key in c:
            add(c[key])
    scaling = c.get("rope_scaling", {})
    kind = scaling.get("type") or scaling.get("rope_type")
    if kind in ("linear", "yarn"):
        w.add_rope_scaling_type(gguf.RopeScalingType(kind))
        w.add_rope_scaling_factor(scaling["factor"])
    if kind == "yarn":
        w.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
    if kind == "llama3":
        w.add_tensor("rope_freqs.weight", llama3_factors(c["rope_theta"], head_dim, scaling))
    if kind == "longrope":
        for length in ("long", "short"):
            w.add_tensor(f"rope_factors_{length}.weight", np.array(scaling[f"{length}_factor"], np.float32))


def llama3_factors(base: float, dim: int, scaling: dict) -> np.ndarray:
    """LlamaModel.generate_extra_tensors."""
    factors = []
    for frequency in 1.0 / base ** (np.arange(0, dim, 2, dtype=np.float32) / dim):
        wavelength, length = 2 * np.pi / frequency, scaling["original_max_position_embeddings"]
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        smooth = (length / wavelength - low) / (high - low)
        between = 1 / ((1 - smooth) / scaling["factor"] + smooth)
        factors.append(
            1.0 if wavelength < length / high else scaling["factor"] if wavelength > length / low else between
        )
    assert len(set(factors)) > 3
    return np.array(factors, np.float32)


def byte_tokenizer(w, n: int) -> None:
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("gpt-2")
    w.add_token_list(["<s>", "</s>", "ab"] + [chr(33 + i) for i in range(n - 3)])
    w.add_token_types([3, 3] + [1] * (n - 2))
    w.add_token_merges(["a b"])
    w.add_bos_token_id(0)
    w.add_eos_token_id(1)


def logits(model, vocab: int) -> mx.array:
    mx.random.seed(1)
    return model(mx.random.randint(0, vocab, (2, 20)))


@pytest.mark.parametrize("name", MODELS)
def test_a_float_file_gives_the_same_logits_to_the_bit(name, tmp_path):
    architecture, config = MODELS[name]
    config = BASE | config
    model, weights = random_model(config)
    ours.convert(write(tmp_path / "m.gguf", architecture, config, weights), tmp_path / "out")
    converted, _ = load_model(tmp_path / "out")
    expected = logits(model, config["vocab_size"])
    assert mx.isfinite(expected).all() and expected.std().item() > 1e-3
    assert mx.array_equal(logits(converted, config["vocab_size"]), expected)


KINDS = {
    "Q4_0": (4, "affine"),
    "Q4_1": (4, "affine"),
    "Q5_0": (5, "affine"),
    "Q5_1": (5, "affine"),
    "Q8_0": (8, "affine"),
    "MXFP4": (4, "mxfp4"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_quantized_blocks_keep_every_value(kind, tmp_path):
    """Against gguf-py's own dequantization, on permuted rows and stacked experts."""
    config = BASE | MODELS["mixtral"][1]
    _, weights = random_model(config)
    ours.convert(write(tmp_path / "m.gguf", "llama", config, weights, kind), tmp_path / "out")
    bits, mode = KINDS[kind]
    stated = json.loads((tmp_path / "out/config.json").read_text())["quantization"]
    assert stated == {"group_size": 32, "bits": bits, "mode": mode}
    converted = dict(tree_flatten(load_model(tmp_path / "out")[0].parameters()))
    type_ = gguf.GGMLQuantizationType[kind]
    n_quantized = 0
    for name, value in weights.items():
        got = converted[name]
        if (scales := converted.get(name.replace(".weight", ".scales"))) is not None:
            value = gguf.quants.dequantize(gguf.quants.quantize(value, type_), type_)
            biases = converted.get(name.replace(".weight", ".biases"))
            if biases is not None:
                scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
            got = mx.dequantize(got, scales, biases, 32, bits, mode, dtype=mx.float32)
            n_quantized += 1
        assert np.array_equal(np.array(got), value), name
    assert n_quantized == 2 * 7 + 2


def test_mixed_kinds_are_stated_layer_by_layer(tmp_path):
    """As llama.cpp writes Q4_0 files: the output matrix in Q6_K, which has no equal, norms in float32."""
    config = BASE | {"model_type": "llama", "hidden_size": 256}
    _, weights = random_model(config)
    rng = np.random.default_rng(0)
    output = rng.integers(0, 256, (config["vocab_size"], 210), np.uint8)
    output[:, 208:] = np.array(rng.random((config["vocab_size"], 1)) / 1000, "<f2").view(np.uint8)
    expected = gguf.quants.dequantize(output, gguf.GGMLQuantizationType.Q6_K)

    file = tmp_path / "m.gguf"
    reference = gguf.GGUFWriter.add_tensor

    def as_llama_cpp(self, name, data, raw_shape=None, raw_dtype=None, **kwargs):
        if name == "output.weight":
            data, raw_dtype = output, gguf.GGMLQuantizationType.Q6_K
        if "attn_v" in name:
            raw_dtype = gguf.GGMLQuantizationType.Q8_0
            data = gguf.quants.quantize(
                weights[f"model.layers.{name.split('.')[1]}.self_attn.v_proj.weight"], raw_dtype
            )
        reference(self, name, data, raw_shape, raw_dtype, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "add_tensor", as_llama_cpp)
        write(file, "llama", config, weights, "Q4_0")
    ours.convert(file, tmp_path / "out")
    stated = json.loads((tmp_path / "out/config.json").read_text())["quantization"]
    eight = {"group_size": 32, "bits": 8, "mode": "affine"}
    assert stated == {
        "group_size": 32,
        "bits": 4,
        "mode": "affine",
        "model.layers.0.self_attn.v_proj": eight,
        "model.layers.1.self_attn.v_proj": eight,
    }
    model, _ = load_model(tmp_path / "out")
    assert model.model.layers[1].self_attn.v_proj.bits == 8
    assert model.lm_head.weight.dtype == mx.float16
    assert np.array_equal(np.array(model.lm_head.weight), expected.astype(np.float16))
    assert model.model.norm.weight.dtype == mx.float32


@pytest.mark.parametrize("kind, dtype", [("BF16", mx.bfloat16), ("F16", mx.float16)])
def test_vectors_of_a_16_bit_file_come_back_to_16_bits_if_they_fit(kind, dtype, tmp_path):
    """llama.cpp widens norms and biases; Gemma's are one larger."""
    config = BASE | MODELS["gemma2"][1]
    _, weights = random_model(config)
    as_trained = {name: np.array(mx.array(value).astype(dtype).astype(mx.float32)) for name, value in weights.items()}
    ours.convert(write(tmp_path / "m.gguf", "gemma2", config, as_trained, kind), tmp_path / "fits")
    converted = dict(tree_flatten(load_model(tmp_path / "fits")[0].parameters()))
    for name, value in as_trained.items():
        assert converted[name].dtype == dtype
        assert np.array_equal(np.array(converted[name].astype(mx.float32)), value)

    wider = as_trained | {"model.norm.weight": weights["model.norm.weight"]}
    ours.convert(write(tmp_path / "w.gguf", "gemma2", config, wider, kind), tmp_path / "wider")
    converted = dict(tree_flatten(load_model(tmp_path / "wider")[0].parameters()))
    assert converted["model.norm.weight"].dtype == mx.float32
    assert converted["model.layers.0.input_layernorm.weight"].dtype == mx.float32
    assert converted["model.embed_tokens.weight"].dtype == dtype


def test_memory_stays_small_however_large_the_file(tmp_path):
    config = BASE | {"model_type": "llama", "vocab_size": 100_000, "hidden_size": 256, "tie_word_embeddings": True}
    file = tmp_path / "m.gguf"

    def few_tokens(w, n):
        byte_tokenizer(w, 96)

    shapes = {name: array.shape for name, array in tree_flatten(_model(config).parameters())}
    write(file, "llama", config, {n: np.zeros(s, np.float32) for n, s in shapes.items()}, tokenizer=few_tokens)
    assert file.stat().st_size > 100e6
    told: list[tuple[int, int]] = []
    tracemalloc.start()
    try:
        ours.convert(file, tmp_path / "out", lambda done, total: told.append((done, total)))
        assert tracemalloc.get_traced_memory()[1] < 25e6
    finally:
        tracemalloc.stop()
    assert len(told) > 20 and told[-1][0] == told[-1][1] > 100e6
    assert told == sorted(told) and len({total for _, total in told}) == 1


def _model(config: dict):
    model_class, args_class = _get_classes(config)
    return model_class(args_class.from_dict(config))


@pytest.fixture
def small(tmp_path) -> Path:
    config = BASE | {"model_type": "llama"}
    return write(tmp_path / "small.gguf", "llama", config, random_model(config)[1])


def test_a_split_model_is_read_whole(small, tmp_path):
    """llama.cpp's gguf-split: metadata in the first file, tensors in all, each with a header of its own."""
    reader = gguf.GGUFReader(small)
    for i, tensors in enumerate((reader.tensors[:7], reader.tensors[7:]), 1):
        part = tmp_path / f"split-{i:05d}-of-00002.gguf"
        writer = gguf.GGUFWriter(part, "llama")
        if i == 1:
            metadata(writer, "llama", BASE | {"model_type": "llama"})
            byte_tokenizer(writer, BASE["vocab_size"])
        writer.add_uint16("split.no", i - 1)
        writer.add_uint16("split.count", 2)
        for t in tensors:
            writer.add_tensor(t.name, np.array(t.data))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    ours.convert(small, tmp_path / "whole")
    ours.convert(tmp_path / "split-00001-of-00002.gguf", tmp_path / "split")
    names = ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json")
    assert all((tmp_path / "whole" / n).read_bytes() == (tmp_path / "split" / n).read_bytes() for n in names)

    with pytest.raises(slowft.SlowftError, match="Give the first"):
        ours.convert(tmp_path / "split-00002-of-00002.gguf", tmp_path / "out")
    (tmp_path / "split-00002-of-00002.gguf").unlink()
    with pytest.raises(slowft.SlowftError, match="split-00002-of-00002.gguf is missing"):
        ours.convert(tmp_path / "split-00001-of-00002.gguf", tmp_path / "out")


def damaged(file: Path, change) -> Path:
    file.write_bytes(change(file.read_bytes()))
    return file


def without(file: Path, key: str, replacement: bytes) -> Path:
    assert len(key) == len(replacement)
    return damaged(file, lambda b: b.replace(key.encode(), replacement, 1))


def of_kind(kind: str):
    """The output matrix, F32 here, said to be of another kind (the field after two dimensions)."""

    def change(content: bytes) -> bytes:
        at = content.index(b"\0output.weight") + len(b"\0output.weight") + 4 + 2 * 8
        assert struct.unpack_from("<I", content, at) == (0,)
        return content[:at] + struct.pack("<I", NO_MLX_EQUAL[kind]) + content[at + 4 :]

    return change


WRONG = {
    "no GGUF file": (lambda f: damaged(f, lambda b: b"GGML" + b[4:]), "not a GGUF file"),
    "old version": (lambda f: damaged(f, lambda b: b[:4] + struct.pack("<I", 1) + b[8:]), "GGUF version 1"),
    "cut short in the header": (lambda f: damaged(f, lambda b: b[:300]), "cut short in its header"),
    "cut short in the data": (lambda f: damaged(f, lambda b: b[:-5000]), "is cut short: tensor .* Download it again"),
    "absurd counts": (lambda f: damaged(f, lambda b: b[:8] + b"\xff" * 16 + b[24:]), "damaged, or cut short"),
    "K-quants": (lambda f: damaged(f, of_kind("Q4_K")), "tensor output.weight is Q4_K, which MLX has no equal of"),
    "IQ": (lambda f: damaged(f, of_kind("IQ4_XS")), "tensor output.weight is IQ4_XS, which MLX has no equal of"),
    "metadata missing": (lambda f: without(f, "llama.block_count", b"llama.other_count"), "lacks llama.block_count"),
    "unknown tensor": (lambda f: without(f, "blk.1.ffn_up", b"blk.1.ffn_xy"), "blk.1.ffn_xy.weight has no place"),
    "tensor missing": (lambda f: without(f, "output.weight", b"output_b.norm"), "output_b.norm has no place"),
    "a block too many": (
        lambda f: damaged(f, lambda b: b.replace(b"blk.1.", b"blk.7.")),
        "mlx-lm's llama has no model.layers.7",
    ),
    "pre-tokenizer": (lambda f: without(f, "gpt-2", b"gpt-9"), "tokenizer of kind gpt2/gpt-9; known are"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_cannot_be_converted_is_said_in_one_line(what, small, tmp_path):
    change, message = WRONG[what]
    with pytest.raises(slowft.SlowftError, match=message) as error:
        ours.convert(change(small), tmp_path / "out")
    assert "\n" not in str(error.value) and "small.gguf" in str(error.value)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_an_architecture_that_mlx_lm_lacks_is_named(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "rwkv6")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(slowft.SlowftError, match="architecture rwkv6; convertible are cohere2, "):
        ours.convert(tmp_path / "m.gguf", tmp_path / "out")


def test_nothing_is_overwritten_and_a_full_disk_is_seen_first(small, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/adapter").write_text("precious")
    with pytest.raises(slowft.SlowftError, match="is there already"):
        ours.convert(small, tmp_path / "out")
    assert (tmp_path / "out/adapter").read_text() == "precious"
    monkeypatch.setattr(ours.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(slowft.SlowftError, match="the model takes 0.00 GB"):
        ours.convert(small, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    config = BASE | {"model_type": "llama"}
    weights = random_model(config)[1]
    file = write(tmp_path / "m.gguf", "llama", config, weights, tokenizer=lambda w, n: byte_tokenizer(w, n + 5))
    with pytest.raises(slowft.SlowftError, match="the tokenizer has 101 token ids, the embedding 96 rows"):
        ours.convert(file, tmp_path / "out")


def test_a_header_reads_as_the_package_reads_it(small):
    header, reader = read_gguf(small), gguf.GGUFReader(small)
    assert {t.name: (t.tensor_type.name, int(t.data_offset), int(t.n_bytes)) for t in reader.tensors} == {
        t.name: (t.kind, t.offset, t.nbytes) for t in header.tensors.values()
    }
    fields = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert fields == {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in header.metadata.items()}
