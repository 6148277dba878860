"""A model directory or hub id -> mlx-lm's own model object without weights, and where each weight's bytes lie.

Comes in: a path or hub id. Goes out: a `Skeleton`. The model is built lazily (`building`). A parameter that is the very
array loaded from a file, because `sanitize` passed it through, is streamed from where it lies. The few parameters that
`sanitize` computed are kept in memory; no other weight is evaluated here.
"""

import shlex
import warnings
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from ..convert import verify as manifest
from ..errors import ModelError, NeedsPreparing, SlowftWarning
from ..weights.extents import Extent
from ..weights.inside import check_inside
from ..weights.sources import Packed, Param, Plain, Source, locate, placeholder
from .building import Built, build_lazily
from .directories import describe_adapter, explain_directory, gguf_is_adapter, snapshot_of_cache

# `sanitize` may rewrite this share of a model's bytes, or this many bytes if that is more. They stay in memory.
MAX_TRANSFORMED_SHARE = 0.02
MAX_TRANSFORMED_NBYTES = 4 << 20


@dataclass
class Skeleton:
    """A model without weights. Each of its `params` says where in the files of `path` it lies."""

    model: nn.Module
    path: Path
    params: list[Param]


def resolve(path_or_hub_id: str) -> Path:
    """The local directory of a model. A hub id is downloaded first; huggingface-hub resumes an interrupted download.

    Raises:
        ModelError: there is no such directory, and the hub does not have the model or cannot be reached.
    """
    if (local := find_local(path_or_hub_id)) is not None:
        return local
    from mlx_lm.utils import _download

    try:
        return _download(str(path_or_hub_id))
    except Exception as e:  # huggingface-hub raises many classes, and all of them mean that there is no model
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise ModelError(
            f"{path_or_hub_id} is neither a directory here nor could it be downloaded ({reason}). "
            "Check the name and the connection, or give a directory"
        ) from None


def find_local(path_or_hub_id: str) -> Path | None:
    """The local directory of a model; None if `path_or_hub_id` looks like a hub id.

    Raises:
        ModelError: it is neither, or it does not exist; says what it is and what to give.
    """
    path = Path(path_or_hub_id).expanduser()
    if path.is_dir():
        path = snapshot_of_cache(path) or path
        _check_directory(path)
        return path
    if path.exists():
        raise ModelError(_explain_file(path))
    text = str(path_or_hub_id)
    if path.is_absolute() or text.startswith((".", "~")) or text.count("/") != 1:
        raise ModelError(f"{path} does not exist. Give a model directory, or a hub id such as Qwen/Qwen3-0.6B")
    return None


def _check_directory(path: Path) -> None:
    """Raises ModelError if a directory is no model."""
    check_inside(path)
    if not (path / "config.json").exists() and not (path / "config.json").is_symlink():
        if (path / manifest.JOURNAL).exists():
            raise ModelError(f"{path} is an unfinished slowft prepare or fuse. Run the same command again: it goes on")
        raise ModelError(explain_directory(path))
    if describe_adapter(path) is not None and not any(path.glob("*.safetensors.index.json")):
        if all(file.name.startswith("adapter") for file in path.glob("*.safetensors")):
            raise ModelError(explain_directory(path))


def _explain_file(path: Path) -> str:
    """One line on a file that was given for a model: what it is, and what to give instead."""
    if path.suffix.lower() == ".gguf":
        if gguf_is_adapter(path):
            return f"{path} is a LoRA adapter in GGUF, not a model. Give the model it was trained on"
        return f"{path} has to be prepared first. Once: slowft prepare {path} --output {path.stem}"
    if describe_adapter(path.parent) is not None and path.name.startswith("adapter"):
        return explain_directory(path.parent)
    return f"{path} is a file. Give the directory that holds config.json and model*.safetensors"


def load_skeleton(path: Path, mixin: type, compute_dtype: mx.Dtype | None, trust_remote_code: bool = False) -> Skeleton:
    """Build the model of `path` as a subclass of `mixin` and of mlx-lm's class, without its weights.

    Args:
        compute_dtype: floating-point parameters are computed with in this dtype; None keeps the files' dtype. With a
            dtype, quantized layers become dense layers, whose weights are dequantized as they are read (on a CPU
            `quantized_matmul` runs at 1.7 GFLOP/s).
        trust_remote_code: the model's class may be Python code in its directory.
    Raises:
        ModelError: files are missing or truncated, the architecture is unknown, or the weights do not fit it.
        NeedsPreparing: `sanitize` rewrites too much of the weights to keep it in memory.
    """
    built = build_lazily(path, mixin, trust_remote_code)
    for note in built.notes:
        warnings.warn(note, SlowftWarning, stacklevel=3)
    model, raw, extents = built.model, built.raw, built.extents
    source_of = {id(array): extents[name] for name, array in raw.items() if name in extents}
    params, rewritten = _map_parameters(model, source_of, compute_dtype)
    _check_rewritten(path, built, rewritten, extents)
    for param in params:
        param.clear()
    for owner, key, array in rewritten:
        is_cast = compute_dtype is not None and mx.issubdtype(array.dtype, mx.floating)
        owner[key] = array.astype(compute_dtype) if is_cast else array
        mx.eval(owner[key])
    model.freeze()
    return Skeleton(model, path, params)


def _map_parameters(model, source_of: dict[int, Extent], compute_dtype):
    """(The Params of what lies in a file as it is, (owner, key, array) of what `sanitize` computed)."""
    packed = {} if compute_dtype is None else _replace_quantized(model, source_of, compute_dtype)
    params, rewritten = [], []
    for name, array in tree_flatten(model.parameters()):
        owner, key = locate(model, name)
        source: Source | None = packed.get(name)
        if source is None and id(array) in source_of:
            source = Plain(source_of[id(array)], compute_dtype)
        if source is None:
            rewritten.append((owner, key, array))
        else:
            params.append(Param(name, owner, key, source, placeholder(source.shape, source.result_dtype)))
    return params, rewritten


def _replace_quantized(model, source_of: dict[int, Extent], dtype: mx.Dtype) -> dict[str, Packed]:
    """Replace quantized layers by dense ones. Returns, by parameter name, how each weight is to be dequantized."""
    from mlx_lm.models.mla import MultiLinear, QuantizedMultiLinear
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

    dense_class = {
        nn.QuantizedLinear: nn.Linear,
        nn.QuantizedEmbedding: nn.Embedding,
        QuantizedSwitchLinear: SwitchLinear,
        QuantizedMultiLinear: MultiLinear,
    }
    packed, dense_layers = {}, []
    for name, layer in model.named_modules():
        if type(layer) not in dense_class or layer.get("global_scale") is not None:
            continue
        parts = [layer["weight"], layer["scales"]] + ([layer["biases"]] if layer.get("biases") is not None else [])
        if not all(id(part) in source_of for part in parts):
            continue
        weight, scales, *biases = (source_of[id(part)] for part in parts)
        source = Packed(weight, scales, biases[0] if biases else None, layer.group_size, layer.bits, layer.mode, dtype)
        dense = dense_class[type(layer)].__new__(dense_class[type(layer)])
        nn.Module.__init__(dense)
        dense.weight = placeholder(source.shape, dtype)
        if "bias" in layer:
            dense.bias = layer.bias
        dense.train(layer.training)
        dense_layers.append((name, dense))
        packed[f"{name}.weight"] = source
    model.update_modules(tree_unflatten(dense_layers))
    return packed


def _check_rewritten(path: Path, built: Built, rewritten, extents: dict[str, Extent]) -> None:
    total = sum(e.nbytes for e in extents.values())
    nbytes = sum(array.nbytes for _, _, array in rewritten)
    if nbytes <= max(MAX_TRANSFORMED_SHARE * total, MAX_TRANSFORMED_NBYTES):
        return
    arrays = [array for _, _, array in rewritten]
    largest = max(arrays, key=lambda array: array.nbytes)
    name = next(name for name, array in tree_flatten(built.model.parameters()) if array is largest)
    joined = sum(array.nbytes for array in arrays if id(array) in built.joins)
    reason = "experts to stack" if joined > nbytes / 2 else "tensors to transpose, split or unpack"
    raise NeedsPreparing(
        f"{path} needs preparing: {reason} ({nbytes / 1e9:.2f} GB, such as {name}), so it cannot be streamed as it "
        f"lies on the disk. Once: {prepare_command(str(path))}",
        reason,
        nbytes,
    )


def prepare_command(model: str) -> str:
    """The command that converts a model (a directory or hub id) to one that can be streamed."""
    return f"slowft prepare {shlex.quote(model)} --output {shlex.quote(Path(model).resolve().name + '-prepared')}"
