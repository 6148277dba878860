"""A GGUF file -> an ordinary mlx-lm model directory, weights repacked exactly, tokenizer included.

Comes in: a `llama`-architecture GGUF that MLX's `mx.load` reads (Q4_0, Q4_1, Q8_0, F16, F32) with a GPT-2
style byte-level BPE tokenizer. Goes out: config.json, model.safetensors, tokenizer files, put in place all at
once. Q4_1 and Q8_0 blocks are MLX's own affine 4- and 8-bit groups of 32, so no value changes.
"""

import json
import shutil
from pathlib import Path

import mlx.core as mx

from ..errors import ModelError

NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
GROUP_SIZE = 32
CONTROL_TOKEN = 3  # of tokenizer.ggml.token_type
PRE_TOKENIZERS = ("smollm",)  # tokenizer.ggml.pre that this module knows the meaning of


def convert(file: Path, directory: Path) -> None:
    """Write the mlx-lm model directory of a GGUF file.

    Raises:
        ModelError: not a readable GGUF file, or an architecture or tokenizer this cannot convert.
    """
    try:
        tensors, metadata = mx.load(str(file), return_metadata=True, format="gguf")
    except (RuntimeError, ValueError) as e:
        raise ModelError(f"{file} is not a GGUF file MLX reads: {str(e).splitlines()[0]}") from None
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise ModelError(f"{file} is of architecture {architecture}; only llama can be converted")

    temporary = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        weights = _rename(tensors, metadata)
        config = _config(metadata, weights)
        mx.save_safetensors(str(temporary / "model.safetensors"), weights, {"format": "mlx"})
        (temporary / "config.json").write_text(json.dumps(config, indent=4, sort_keys=True) + "\n")
        _write_tokenizer(file, metadata, temporary)
        temporary.rename(directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _int(metadata: dict, key: str) -> int:
    return int(metadata[key].item())


def _rename(tensors: dict[str, mx.array], metadata: dict) -> dict[str, mx.array]:
    heads = {
        "attn_q": _int(metadata, "llama.attention.head_count"),
        "attn_k": _int(metadata, "llama.attention.head_count_kv"),
    }
    weights = {}
    for name, array in tensors.items():
        *block, part, kind = name.split(".")
        prefix = f"model.layers.{block[1]}." if block else ""
        if part not in NAMES:
            raise ModelError(f"GGUF tensor {name} has no place in a llama model")
        if part in heads:  # rows are permuted for interleaved RoPE; packed rows move like plain ones
            n = heads[part]
            array = array.reshape(n, array.shape[0] // n // 2, 2, -1).swapaxes(1, 2).reshape(array.shape)
        weights[f"{prefix}{NAMES[part]}.{kind}"] = array
    return weights


def _config(metadata: dict, weights: dict[str, mx.array]) -> dict:
    hidden, n_heads = _int(metadata, "llama.embedding_length"), _int(metadata, "llama.attention.head_count")
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": hidden,
        "num_hidden_layers": _int(metadata, "llama.block_count"),
        "intermediate_size": _int(metadata, "llama.feed_forward_length"),
        "num_attention_heads": n_heads,
        "num_key_value_heads": _int(metadata, "llama.attention.head_count_kv"),
        "head_dim": hidden // n_heads,
        "rms_norm_eps": float(f"{metadata['llama.attention.layer_norm_rms_epsilon'].item():.6g}"),
        "rope_theta": metadata["llama.rope.freq_base"].item(),
        "max_position_embeddings": _int(metadata, "llama.context_length"),
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "tie_word_embeddings": "lm_head.weight" not in weights,
        "bos_token_id": _int(metadata, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": _int(metadata, "tokenizer.ggml.eos_token_id"),
    }
    layers = [name.removesuffix(".scales") for name in weights if name.endswith(".scales")]
    if layers:
        bits = {
            layer: weights[f"{layer}.weight"].shape[-1] * 32 // (weights[f"{layer}.scales"].shape[-1] * GROUP_SIZE)
            for layer in layers
        }
        usual = max(set(bits.values()), key=list(bits.values()).count)
        config["quantization"] = {"group_size": GROUP_SIZE, "bits": usual, "mode": "affine"} | {
            layer: {"group_size": GROUP_SIZE, "bits": n} for layer, n in sorted(bits.items()) if n != usual
        }
    return config


def _write_tokenizer(file: Path, metadata: dict, directory: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    model, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if model != "gpt2" or pre not in PRE_TOKENIZERS:
        raise ModelError(
            f"{file} has a tokenizer of kind {model}/{pre}; only gpt2/{', '.join(PRE_TOKENIZERS)} is known"
        )
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = metadata["tokenizer.ggml.token_type"].tolist()
    control = [token for token, kind in zip(tokens, types) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    tokenizer.save(str(directory / "tokenizer.json"))

    def token(which: str) -> str:
        return tokens[_int(metadata, f"tokenizer.ggml.{which}_token_id")]

    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": token("bos"),
        "eos_token": token("eos"),
        "unk_token": token("unknown"),
        "pad_token": token("padding"),
        "model_max_length": _int(metadata, "llama.context_length"),
        "clean_up_tokenization_spaces": False,
        "chat_template": metadata["tokenizer.chat_template"],
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=4, ensure_ascii=False) + "\n")
