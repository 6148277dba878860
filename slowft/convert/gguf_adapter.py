"""Converts LoRA adapters between llama.cpp's format (GGUF) and mlx-lm's.

The two differ in tensor names, in the order of the rows of queries and keys, and in alpha. Comes in: a GGUF file, or an
adapter; and the base model's config.json, which names the architecture. Goes out: an adapter, or a file that `llama-cli
--lora` loads, as llama.cpp's convert_lora_to_gguf.py would write it. In GGUF `lora_a` is [r, in] and `lora_b` [out, r],
for experts [E, r, in] and [E, out, r]; an embedding's `lora_a` is [V, r].
"""

import math
import os
import re
import struct
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import AdapterError, ModelError
from ..models.adapter_files import Adapter, AdapterSpec
from ..models.peft import assemble, by_layer, rank_of, ranks_of
from ..weights.tensorfile import UNFINISHED, cannot_write, sync, sync_directory
from .adapters import check_room_for, is_tied
from .gguf_architectures import ARCHITECTURES, NAMES, Architecture
from .gguf_blocks import widen
from .gguf_file import MAGIC, STRING, Gguf, GgufTensor, read_gguf

ALIGNMENT = 32
F32, FLOAT_VALUE, VERSION = 0, 6, 3  # GGUF's numbers for a kind of tensor, a kind of value, and the format's version
# llama.cpp's architectures for model types of mlx-lm's that no `Architecture.model_type` names
OTHER_TYPES = {
    "llama": "llama",
    "mixtral": "llama",
    "mistral": "llama",
    "olmo2": "olmo2",
    "olmo3": "olmo2",
    "gemma3": "gemma3",
}


def export_gguf(adapter: Adapter, config: dict[str, Any], output: str | Path) -> Path:
    """Write a LoRA adapter in the format that llama.cpp reads, in float32.

    Args:
        config: the base model's config.json.
    Raises:
        AdapterError: the adapter is DoRA or has a layer that llama.cpp's model does not have, or `output` is there
            already.
        ModelError: the model's architecture is not in `gguf_architectures.ARCHITECTURES`.
    """
    output = Path(output).expanduser()
    if output.suffix.lower() != ".gguf":
        raise AdapterError(f"{output} has to end in .gguf, so that llama.cpp takes it")
    if output.exists():
        raise AdapterError(f"{output} is there already. Give another --output, so that nothing is overwritten")
    if adapter.spec.fine_tune_type != "lora":
        raise AdapterError(f"{adapter.file} is DoRA, which llama.cpp does not have. Fuse it into a model (slowft fuse)")
    name, architecture = _architecture(config)
    tensors: dict[str, mx.array] = {}
    ranks = set()
    for layer, parts in by_layer(adapter.weights).items():
        tensor = _tensor_of(layer, architecture, config)
        a, b = (parts[key].astype(mx.float32) for key in ("lora_a", "lora_b"))
        ranks.add(rank_of(a))
        if a.ndim == 2:
            b = b.T
            if tensor != "token_embd.weight":
                a = a.T
        if (n_heads := _heads(tensor, architecture, config)) is not None:
            b = _interleaved(b, n_heads)
        tensors |= {f"{tensor}.lora_a": a, f"{tensor}.lora_b": b}
    if len(ranks) > 1:
        raise AdapterError(f"{adapter.file} has layers of ranks {sorted(ranks)}, and mlx-lm's adapters have one")
    values = {
        "general.architecture": name,
        "general.type": "adapter",
        "general.name": output.stem,
        "adapter.type": "lora",
        "adapter.lora.alpha": float(adapter.spec.parameters["scale"]) * ranks.pop(),
    }
    adapter.weights = {}
    _write(output, values, tensors)
    return output


def import_gguf(
    file: str | Path, config: dict[str, Any], base: str | None = None, memory: str | int | None = None
) -> Adapter:
    """Read a LoRA adapter that llama.cpp's tools wrote, as one of mlx-lm's.

    Args:
        config: the base model's config.json.
        base: the base model's name for the adapter's configuration.
    Raises:
        AdapterError: it is no adapter, or of another architecture, or has tensors that mlx-lm's adapters cannot have.
        ModelError: it is not a whole GGUF file, or its architecture is unknown.
        ConfigError: memory is too little for the whole adapter, which is read at once; names the least that would do.
    """
    gguf = read_gguf(Path(file).expanduser())
    kind, method = gguf.metadata.get("general.type"), gguf.metadata.get("adapter.type")
    if kind != "adapter" or method != "lora":
        raise AdapterError(f"{file} is no LoRA adapter: its general.type is {kind}, its adapter.type {method}")
    if gguf.metadata.get("adapter.alora.invocation_tokens") is not None:
        raise AdapterError(f"{file} is an adapter that tokens turn on (aLoRA), which mlx-lm does not have")
    name, architecture = _architecture(config)
    if (own := gguf.metadata.get("general.architecture")) != name:
        raise AdapterError(f"{file} is for {own} models, and the model is {config.get('model_type')} ({name})")
    sizes = [4 * math.prod(t.shape) for t in gguf.tensors.values()]  # float32; the largest tensor is copied
    check_room_for(sum(sizes) + 4 * max(sizes, default=0), memory, f"importing {file}")
    alpha = gguf.metadata.get("adapter.lora.alpha", 0.0)
    if not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        raise AdapterError(f"{file}: adapter.lora.alpha is {ascii(alpha)[:50]}, no number")
    layers: dict[str, dict[str, mx.array]] = {}
    for tensor in gguf.tensors.values():
        base_name, _, part = tensor.name.rpartition(".")
        if part not in ("lora_a", "lora_b"):
            raise AdapterError(
                f"{file}: tensor {tensor.name} is no part of LoRA. llama.cpp ignores it, and mlx-lm has no place for it"
            )
        array = _read(gguf, tensor)
        if part == "lora_b" and (n_heads := _heads(base_name, architecture, config)) is not None:
            array = _interleaved(array, n_heads, inverse=True)
        if array.ndim == 2 and not (base_name == "token_embd.weight" and part == "lora_a"):
            array = array.T
        layers.setdefault(_layer_of(base_name, architecture, gguf), {})[part] = array
    if not layers:
        raise AdapterError(f"{file} holds no tensors")
    scales = {layer: alpha / rank if alpha else 1.0 for layer, rank in ranks_of(layers, Path(file)).items()}
    parameters, weights = assemble(layers, scales, 0.0)
    others = {"model": base} if base else {}
    return Adapter(AdapterSpec("lora", -1, parameters), weights, others, Path(file))


# --- Names and order ---------------------------------------------------------------------------------


def _architecture(config: dict[str, Any]) -> tuple[str, Architecture]:
    """llama.cpp's name for the architecture of an mlx-lm model, and its description."""
    model_type = config.get("model_type")
    by_type = {a.model_type: name for name, a in ARCHITECTURES.items() if isinstance(a.model_type, str)} | OTHER_TYPES
    if model_type not in by_type:
        raise ModelError(
            f"adapters of {model_type} models have no form in GGUF here; those of {', '.join(sorted(by_type))} have"
        )
    return by_type[model_type], ARCHITECTURES[by_type[model_type]]


def _tensor_of(layer: str, architecture: Architecture, config: dict[str, Any]) -> str:
    parts = {name: part for part, name in (NAMES | architecture.names).items()}
    block, rest = "", layer
    if (match := re.fullmatch(rf"{re.escape(architecture.prefix)}(\d+)\.(.+)", layer)) is not None:
        block, rest = f"blk.{match[1]}.", match[2]
    if rest not in parts:
        raise AdapterError(f"llama.cpp's {config['model_type']} has no layer like {layer}")
    if parts[rest] == "token_embd" and is_tied(config):
        raise AdapterError(f"{layer} is the model's head as well: llama.cpp adapts the embedding alone, mlx-lm both")
    return f"{block}{parts[rest]}.weight"


def _layer_of(tensor: str, architecture: Architecture, gguf: Gguf) -> str:
    *block, part, kind = tensor.split(".")
    name = (NAMES | architecture.names).get(part)
    if name is None or kind != "weight" or len(block) not in (0, 2):
        raise AdapterError(f"{gguf.file}: mlx-lm has no layer for tensor {tensor}")
    return f"{architecture.prefix}{block[1]}.{name}" if block else name


def _heads(tensor: str, architecture: Architecture, config: dict[str, Any]) -> int | None:
    """The number of heads if llama.cpp has the rows of each head of this tensor in another order, else None."""
    keys = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}
    part = tensor.removesuffix(".weight").rpartition(".")[2]
    if not architecture.permuted or part not in keys:
        return None
    n_heads = config.get(keys[part]) or config.get("num_attention_heads")
    if not isinstance(n_heads, int) or n_heads < 1:
        raise ModelError(
            f"the model's config.json says {ascii(n_heads)[:50]} for {keys[part]}, which is no number of heads"
        )
    return n_heads


def _interleaved(b: mx.array, n_heads: int, inverse: bool = False) -> mx.array:
    """`lora_b` [out, r] with the two halves of each head's rows interleaved, as llama.cpp's rotary embedding needs."""
    rows, rank = b.shape[0], b.shape[-1]
    if b.ndim != 2 or rows % (2 * n_heads):
        raise AdapterError(f"{rows} rows are no {n_heads} heads: the adapter is of another model")
    shape = (n_heads, rows // n_heads // 2, 2, rank) if inverse else (n_heads, 2, rows // n_heads // 2, rank)
    return b.reshape(shape).swapaxes(1, 2).reshape(rows, rank)


# --- The file ----------------------------------------------------------------------------------------


def _read(gguf: Gguf, tensor: GgufTensor) -> mx.array:
    if tensor.kind not in ("F32", "F16", "BF16"):
        raise AdapterError(f"{gguf.file}: tensor {tensor.name} is {tensor.kind}. Give an adapter in F32, F16 or BF16")
    raw = np.fromfile(tensor.file, np.uint8, tensor.nbytes, offset=tensor.offset)
    return mx.array(widen(tensor.kind, raw).reshape(tensor.shape))


def _write(file: Path, values: dict[str, str | float], tensors: dict[str, mx.array]) -> None:
    """Write a GGUF file and move it to its place. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md"""
    header = MAGIC + struct.pack("<IQQ", VERSION, len(tensors), len(values))
    for key, value in values.items():
        is_text = isinstance(value, str)
        packed = _string(value) if is_text else struct.pack("<f", value)
        header += _string(key) + struct.pack("<I", STRING if is_text else FLOAT_VALUE) + packed
    offset = 0
    for name, array in tensors.items():
        axes = array.shape[::-1]
        header += _string(name) + struct.pack(f"<I{len(axes)}Q", len(axes), *axes) + struct.pack("<IQ", F32, offset)
        offset += _aligned(math.prod(axes) * 4)
    partial = file.with_name(file.name + UNFINISHED)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as out:
            out.write(header.ljust(_aligned(len(header)), b"\0"))
            for name in list(tensors):
                data = np.asarray(mx.contiguous(tensors.pop(name)), np.float32).tobytes()
                out.write(data.ljust(_aligned(len(data)), b"\0"))
        sync(partial)
        os.replace(partial, file)
        sync_directory(file.parent)
    except OSError as e:
        raise cannot_write(file, e) from None
    finally:
        partial.unlink(missing_ok=True)


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
