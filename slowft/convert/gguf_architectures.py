"""Translates GGUF architectures to mlx-lm's: the configuration from the metadata, and the names of parameters.

Comes in: a file's header. Goes out: the dictionary for config.json, and for each tensor its parameter's name and how
its values differ. This is the inverse of llama.cpp's conversion/*.py and gguf-py's tensor_mapping.py.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import ModelError
from .gguf_file import Gguf

_MISSING = object()
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


class Metadata:
    """A header's values, by names without the architecture's prefix. Floats are short decimals: 1e-6, not float32's."""

    def __init__(self, gguf: Gguf):
        self.gguf = gguf
        self.architecture = str(gguf.metadata.get("general.architecture"))

    def get(self, key: str, default: Any = None) -> Any:
        value = self.gguf.metadata.get(f"{self.architecture}.{key}", default)
        if isinstance(value, np.ndarray) and value.size and (value == value.flat[0]).all():  # one value for each block
            value = value.flat[0].item()
        if isinstance(value, (np.ndarray, list)):
            raise ModelError(f"{self.gguf.file}: {self.architecture}.{key} differs between blocks, here {list(value)}")
        return float(str(np.float32(value))) if isinstance(value, float) else value

    def __getitem__(self, key: str) -> Any:
        if (value := self.get(key, _MISSING)) is _MISSING:
            raise ModelError(f"{self.gguf.file} lacks {self.architecture}.{key} in its metadata. Download it again")
        return value

    def has(self, tensor: str) -> bool:
        return tensor in self.gguf.tensors

    def shape(self, tensor: str) -> tuple[int, ...]:
        if tensor not in self.gguf.tensors:
            raise ModelError(f"{self.gguf.file} has no tensor {tensor}, which {self.architecture} models have")
        return self.gguf.tensors[tensor].shape

    @property
    def head_dim(self) -> int:
        return self.get("attention.key_length") or self["embedding_length"] // self["attention.head_count"]


@dataclass(frozen=True)
class Architecture:
    """One of llama.cpp's architectures, as mlx-lm has it.

    Attributes:
        model_type: mlx-lm's name, which may depend on the file.
        config: makes the entries of config.json that not all architectures have.
        names: parts of parameters' names, by parts of tensors' names, where they differ from `NAMES`.
        permuted: whether the rows of queries and keys are interleaved for llama.cpp's rotary embedding.
        norm_offset: what llama.cpp adds to the weights of norms.
        rope_scaling: the kinds of scaling that mlx-lm's class knows.
        prefix: what the names of the blocks' parameters begin with.
    """

    model_type: str | Callable[[Metadata], str]
    config: Callable[[Metadata], dict[str, Any]] = lambda m: {}
    names: dict[str, str] = field(default_factory=dict)
    permuted: bool = False
    norm_offset: float = 0.0
    rope_scaling: tuple[str, ...] = ()
    prefix: str = "model.layers."


NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def _experts(block: str, gate: str = "gate", experts: str = "switch_mlp") -> dict[str, str]:
    names = {f"ffn_{part}_exps": f"{block}.{experts}.{part}_proj" for part in ("gate", "up", "down")}
    return names | {"ffn_gate_inp": f"{block}.{gate}"}


SHARED_EXPERT = {f"ffn_{part}_shexp": f"mlp.shared_expert.{part}_proj" for part in ("gate", "up", "down")}
GEMMA_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
OLMO_NORMS = {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}
SCALED = ("linear", "yarn")


def _expert_counts(m: Metadata, key: str = "num_experts") -> dict[str, Any]:
    return {key: m["expert_count"], "num_experts_per_tok": m["expert_used_count"]}


def _expert_size(m: Metadata) -> int:
    return m.shape("blk.0.ffn_gate_exps.weight")[1]


def _biases(m: Metadata) -> dict[str, bool]:
    return {"attention_bias": m.has("blk.0.attn_q.bias"), "mlp_bias": m.has("blk.0.ffn_up.bias")}


def _llama(m: Metadata) -> dict[str, Any]:
    return _expert_counts(m, "num_local_experts") if m.get("expert_count") else _biases(m)


def _qwen2_moe(m: Metadata) -> dict[str, Any]:
    return _expert_counts(m) | {
        "moe_intermediate_size": _expert_size(m),
        "shared_expert_intermediate_size": m.shape("blk.0.ffn_gate_shexp.weight")[0],
    }


def _qwen3_moe(m: Metadata) -> dict[str, Any]:
    return _expert_counts(m) | {
        "moe_intermediate_size": _expert_size(m),
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
    }


def _query_scalar(m: Metadata, n_blocks_of_27b: int) -> int:
    """Gemma's queries are scaled by the head's size; in the 27B models, by the hidden size over the number of heads."""
    if m["block_count"] == n_blocks_of_27b:
        return m["embedding_length"] // m["attention.head_count"]
    return m.head_dim


def _gemma2(m: Metadata) -> dict[str, Any]:
    return {
        "attn_logit_softcapping": m.get("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": m.get("final_logit_softcapping", 30.0),
        "query_pre_attn_scalar": _query_scalar(m, 46),
        "sliding_window": m.get("attention.sliding_window", 4096),
    }


def _gemma3(m: Metadata) -> dict[str, Any]:
    if m.get("final_logit_softcapping"):
        raise ModelError(f"{m.gguf.file}: mlx-lm's gemma3 has no soft cap of logits, which this model needs")
    window = m.get("attention.sliding_window", 0)
    return {
        "query_pre_attn_scalar": _query_scalar(m, 62),
        "sliding_window": window or m["context_length"],
        "sliding_window_pattern": _period(m, 6) if window else 1,
        "rope_theta": m.get("rope.freq_base", 1_000_000.0),
        "rope_local_base_freq": m.get("rope.freq_base_swa", 10_000.0),
    }


def _period(m: Metadata, usual: int) -> int:
    """Every how many blocks one block attends to everything. The others attend to a window."""
    value = m.gguf.metadata.get(f"{m.architecture}.attention.sliding_window_pattern", usual)
    if isinstance(value, (int, np.integer)):
        return int(value)
    if value.all():
        return len(value) + 1
    period = int(np.argmin(value)) + 1
    if any(bool(windowed) != ((i + 1) % period != 0) for i, windowed in enumerate(value)):
        raise ModelError(f"{m.gguf.file}: blocks attend to a window in no regular pattern, which mlx-lm cannot express")
    return period


def _partial_rotary(m: Metadata) -> dict[str, Any]:
    return {"partial_rotary_factor": m.get("rope.dimension_count", m.head_dim) / m.head_dim}


def _phi3(m: Metadata) -> dict[str, Any]:
    original = m.get("rope.scaling.original_context_length", m["context_length"])
    config = _partial_rotary(m) | {"original_max_position_embeddings": original}
    if m.has("rope_factors_long.weight"):
        expected = math.sqrt(1 + math.log(max(m["context_length"] / original, 1.0)) / math.log(original))
        if not math.isclose(m.get("rope.scaling.attn_factor", expected), expected, rel_tol=1e-4):
            raise ModelError(f"{m.gguf.file}: mlx-lm's phi3 scales attention differently from this model")
        factors = {f"{n}_factor": _floats(m, f"rope_factors_{n}.weight") for n in ("long", "short")}
        config["rope_scaling"] = {"type": "longrope", **factors}
    return config


def _olmo2(m: Metadata) -> dict[str, Any]:
    if not m.get("attention.sliding_window"):
        return _biases(m)
    period = _period(m, 4)
    kinds = ["sliding_attention" if (i + 1) % period else "full_attention" for i in range(m["block_count"])]
    return {"sliding_window": m["attention.sliding_window"], "layer_types": kinds, "attention_bias": False}


def _granite(m: Metadata) -> dict[str, Any]:
    return _biases(m) | {
        "attention_multiplier": m.get("attention.scale", m.head_dim**-0.5),
        "embedding_multiplier": m.get("embedding_scale", 1.0),
        "residual_multiplier": m.get("residual_scale", 1.0),
        "logits_scaling": m.get("logit_scale", 1.0),
    }


def _cohere(m: Metadata) -> dict[str, Any]:
    return {"logit_scale": m["logit_scale"], "use_qk_norm": m.has("blk.0.attn_q_norm.weight")}


def _cohere2(m: Metadata) -> dict[str, Any]:
    window = {"sliding_window": m["attention.sliding_window"], "sliding_window_pattern": _period(m, 4)}
    return {"logit_scale": m["logit_scale"]} | window


def _stablelm(m: Metadata) -> dict[str, Any]:
    return _partial_rotary(m) | {
        "use_qkv_bias": m.has("blk.0.attn_q.bias"),
        "use_parallel_residual": bool(m.get("use_parallel_residual", False)),
    }


def _gpt_oss(m: Metadata) -> dict[str, Any]:
    size = {"intermediate_size": _expert_size(m), "sliding_window": m["attention.sliding_window"]}
    return _expert_counts(m, "num_local_experts") | size


ARCHITECTURES = {
    "llama": Architecture(
        lambda m: "mixtral" if m.get("expert_count") else "llama",
        _llama,
        _experts("block_sparse_moe"),
        permuted=True,
        rope_scaling=(*SCALED, "llama3"),
    ),
    "qwen2": Architecture("qwen2", rope_scaling=SCALED),
    "qwen3": Architecture("qwen3", rope_scaling=SCALED),
    "qwen2moe": Architecture(
        "qwen2_moe",
        _qwen2_moe,
        _experts("mlp") | SHARED_EXPERT | {"ffn_gate_inp_shexp": "mlp.shared_expert_gate"},
        rope_scaling=("linear",),
    ),
    "qwen3moe": Architecture("qwen3_moe", _qwen3_moe, _experts("mlp")),
    "gemma": Architecture("gemma", norm_offset=1.0),
    "gemma2": Architecture("gemma2", _gemma2, GEMMA_NORMS, norm_offset=1.0),
    "gemma3": Architecture("gemma3_text", _gemma3, GEMMA_NORMS, norm_offset=1.0, rope_scaling=("linear",)),
    "phi2": Architecture(
        "phi",
        _partial_rotary,
        {
            "attn_output": "self_attn.dense",
            "output_norm": "model.final_layernorm",
            "ffn_up": "mlp.fc1",
            "ffn_down": "mlp.fc2",
        },
    ),
    "phi3": Architecture(
        "phi3",
        _phi3,
        {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
    ),
    "starcoder2": Architecture("starcoder2", names={"ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"}),
    "olmo2": Architecture(
        lambda m: "olmo3" if m.get("attention.sliding_window") else "olmo2", _olmo2, OLMO_NORMS, rope_scaling=SCALED
    ),
    "olmoe": Architecture(
        "olmoe",
        lambda m: _expert_counts(m) | {"intermediate_size": _expert_size(m), "norm_topk_prob": False},
        _experts("mlp"),
        rope_scaling=SCALED,
    ),
    "granite": Architecture("granite", _granite, permuted=True, rope_scaling=SCALED),
    "granitemoe": Architecture(
        "granitemoe",
        lambda m: _granite(m) | _expert_counts(m, "num_local_experts") | {"intermediate_size": _expert_size(m)},
        _experts("block_sparse_moe", gate="router.layer"),
        permuted=True,
        rope_scaling=SCALED,
    ),
    "command-r": Architecture("cohere", _cohere),
    "cohere2": Architecture("cohere2", _cohere2),
    "stablelm": Architecture("stablelm", _stablelm),
    "smollm3": Architecture("smollm3", _biases, permuted=True, rope_scaling=(*SCALED, "llama3")),
    "seed_oss": Architecture(
        "seed_oss",
        lambda m: _biases(m) | {"attention_out_bias": m.has("blk.0.attn_output.bias")},
        {"post_attention_norm": "post_attention_layernorm"},
        rope_scaling=SCALED,
    ),
    "exaone": Architecture(
        "exaone",
        lambda m: {"num_layers": m["block_count"], "layer_norm_epsilon": m["attention.layer_norm_rms_epsilon"]},
        {
            "token_embd": "transformer.wte",
            "output_norm": "transformer.ln_f",
            "attn_norm": "ln_1",
            "attn_q": "attn.attention.q_proj",
            "attn_k": "attn.attention.k_proj",
            "attn_v": "attn.attention.v_proj",
            "attn_output": "attn.attention.out_proj",
            "ffn_norm": "ln_2",
            "ffn_gate": "mlp.c_fc_0",
            "ffn_up": "mlp.c_fc_1",
            "ffn_down": "mlp.c_proj",
        },
        rope_scaling=(*SCALED, "llama3"),
        prefix="transformer.h.",
    ),
    "gpt-oss": Architecture(
        "gpt_oss",
        _gpt_oss,
        _experts("mlp", gate="router", experts="experts")
        | {"post_attention_norm": "post_attention_layernorm", "attn_sinks": "self_attn.sinks"},
        rope_scaling=("yarn",),
    ),
}
ROPE_TABLES = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")  # config.json has them


def architecture_of(gguf: Gguf) -> Architecture:
    """The file's architecture. Raises ModelError if it is not one of `ARCHITECTURES`."""
    name = gguf.metadata.get("general.architecture")
    if name not in ARCHITECTURES:
        raise ModelError(
            f"{gguf.file} is of architecture {name}; convertible are {', '.join(sorted(ARCHITECTURES))}. "
            "Take the original model instead (safetensors)"
        )
    return ARCHITECTURES[name]


def make_config(gguf: Gguf) -> dict[str, Any]:
    """The config.json without quantization. Raises ModelError if metadata is missing, or mlx-lm has no such model."""
    architecture, m = architecture_of(gguf), Metadata(gguf)
    n_heads = m["attention.head_count"]
    model_type = architecture.model_type
    config = {
        "model_type": model_type if isinstance(model_type, str) else model_type(m),
        "hidden_size": m["embedding_length"],
        "num_hidden_layers": m["block_count"],
        "intermediate_size": m["feed_forward_length"],
        "num_attention_heads": n_heads,
        "num_key_value_heads": m.get("attention.head_count_kv", n_heads),
        "head_dim": m.head_dim,
        "max_position_embeddings": m["context_length"],
        "rope_theta": m.get("rope.freq_base", 10_000.0),
        "vocab_size": m.shape("token_embd.weight")[0],
        "tie_word_embeddings": not m.has("output.weight"),
    }
    if (eps := m.get("attention.layer_norm_rms_epsilon")) is not None:
        config["rms_norm_eps"] = eps
    elif (eps := m.get("attention.layer_norm_epsilon")) is not None:
        config["norm_epsilon" if config["model_type"] == "starcoder2" else "layer_norm_eps"] = eps
    if (scaling := _rope_scaling(m, architecture)) is not None:
        config["rope_scaling"] = scaling
    return config | architecture.config(m)


def _rope_scaling(m: Metadata, architecture: Architecture) -> dict[str, Any] | None:
    kind = m.get("rope.scaling.type", "none")
    if m.get("rope.scaling.type") is None and m.get("rope.scale_linear", 1.0) != 1.0:  # files before 2023-11
        kind = "linear"
    if m.has("rope_freqs.weight"):
        kind = "llama3"
    if kind in ("none", "longrope"):  # "longrope" is handled in `_phi3`
        return None
    if kind not in architecture.rope_scaling:
        raise ModelError(f"{m.gguf.file}: mlx-lm's {m.architecture} knows no rotary embedding of kind {kind}")
    if kind == "llama3":
        return _llama3_scaling(m)
    scaling = {"type": kind, "rope_type": kind, "factor": m.get("rope.scaling.factor", m.get("rope.scale_linear"))}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = m["rope.scaling.original_context_length"]
    return scaling


def _llama3_scaling(m: Metadata) -> dict[str, Any]:
    """Llama 3's scaling. The file has a table of factors; in practice only the largest one differs between models."""
    table = np.array(_floats(m, "rope_freqs.weight"))
    factor = float(round(table.max()))
    frequencies = m.get("rope.freq_base", 10_000.0) ** -(np.arange(len(table)) / len(table))
    low, high = LLAMA3_ROPE["low_freq_factor"], LLAMA3_ROPE["high_freq_factor"]
    turns = LLAMA3_ROPE["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    if not np.allclose(table, 1 / ((1 - smooth) / factor + smooth), rtol=1e-4):
        raise ModelError(f"{m.gguf.file}: the table rope_freqs is not one of Llama 3's, and mlx-lm has no other")
    return {"rope_type": "llama3", "factor": factor} | LLAMA3_ROPE


def _floats(m: Metadata, tensor: str) -> list[float]:
    m.shape(tensor)
    t = m.gguf.tensors[tensor]
    if t.kind != "F32":
        raise ModelError(f"{m.gguf.file}: tensor {tensor} is {t.kind}, not F32")
    return [float(str(x)) for x in np.fromfile(t.file, "<f4", t.nbytes // 4, offset=t.offset)]


@dataclass(frozen=True)
class Place:
    """The parameter for a tensor. In GGUF rows of `n_heads` heads (0: none) are interleaved, and `offset` is added."""

    name: str
    n_heads: int
    offset: float


def place(gguf: Gguf, tensor: str, config: dict[str, Any]) -> Place:
    """Where a tensor's values go. Raises ModelError if the architecture does not have the tensor."""
    architecture = architecture_of(gguf)
    *block, part, kind = tensor.split(".")
    name = (NAMES | architecture.names).get(part)
    if name is None or kind not in ("weight", "bias") or len(block) not in (0, 2):
        raise ModelError(f"{gguf.file}: tensor {tensor} has no place in mlx-lm's {config['model_type']}")
    name = f"{architecture.prefix}{block[1]}.{name}" if block else name
    if part != "attn_sinks":
        name = f"{name}.{kind}"
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    offset = architecture.norm_offset if part.endswith("norm") else 0.0
    return Place(name, heads.get(part, 0) if architecture.permuted else 0, offset)
