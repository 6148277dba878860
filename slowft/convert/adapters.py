"""Describes adapters, compares and sums them, and writes them in another program's format, without a base model.

Comes in: adapters as `models/adapter_files.py` reads them. Goes out: plain data for a report, or a directory. The
products of factors are never formed: norms, sums and truncations are computed in float64 from the thin factors, one
layer at a time. So no more memory is needed than for the factors of one layer, whatever the model.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from .. import platform
from ..errors import AdapterError, ConfigError, ModelError, first_line
from ..models.adapter_files import CONFIG, WEIGHTS, Adapter, AdapterSpec, read_adapter
from ..models.adapters import HEADS
from ..models.building import build_lazily
from ..models.config import read_config
from ..models.directories import PEFT_WEIGHTS
from ..models.loading import resolve
from ..models.peft import EMBEDDING, rank_of, to_peft, with_rank
from ..sizes import parse_nbytes
from ..weights.tensorfile import Tensor, TensorFile, cannot_write, write_file
from ..weights.transfers import free_nbytes

PENDING_NBYTES = 8 << 20  # how much of a file may be given to the writer and not yet written
FLOOR_NBYTES = 48 << 20  # memory besides arrays, and besides what the process holds at the start
COPIES = 6  # of the largest layer's factors, in float64: the factors, scaled ones, their triangular factors

# Parts of a layer's name, before its block, that only say that one model is inside another.
WRAPPERS = {"model", "transformer", "language_model", "text_model", "gpt_neox", "backbone", "decoder"}
# The entries of an adapter's configuration that say how it was trained.
TRAINED_WITH = "data iters batch_size learning_rate optimizer max_seq_length seed mask_prompt grad_accumulation_steps"


# --- Describing -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Described:
    """What a report says of an adapter.

    Attributes:
        format: "mlx-lm" or "PEFT".
        kind: "lora" or "dora".
        base: the model it was trained on, by the name in its configuration.
        layers: for each adapted layer its rank, and the Frobenius norm of what it adds to the weight.
        trained_with: the configuration's entries that say how it was trained.
    """

    format: str
    kind: str
    base: str | None
    rank: int
    scale: float
    nbytes: int
    n_parameters: int
    layers: dict[str, dict[str, Any]]
    trained_with: dict[str, Any]

    @property
    def norm(self) -> float:
        """The norm of all layers together."""
        return math.sqrt(sum(layer["norm"] ** 2 for layer in self.layers.values()))


def describe(adapter: Adapter, memory: str | int | None = None) -> Described:
    """Find the adapter's rank, layers and norms, and how it was trained. Raises ConfigError if memory is too little."""
    check_memory([adapter], memory, "describing")
    scale = float(adapter.spec.parameters["scale"])
    layers, nbytes, n_parameters = {}, 0, 0
    for name, parts in _take_layers(adapter):
        nbytes += sum(array.nbytes for array in parts.values())
        n_parameters += sum(array.size for array in parts.values())
        layers[name] = {"rank": rank_of(parts["lora_a"]), "norm": _norm([(scale, parts)])}
        if parts["lora_a"].ndim == 3:
            layers[name]["experts"] = parts["lora_a"].shape[0]
    return Described(
        "PEFT" if adapter.is_peft else "mlx-lm",
        adapter.spec.fine_tune_type,
        adapter.base,
        max(layer["rank"] for layer in layers.values()),
        scale,
        nbytes,
        n_parameters,
        layers,
        {key: adapter.others[key] for key in TRAINED_WITH.split() if adapter.others.get(key) is not None},
    )


def diff(first: Adapter, second: Adapter, memory: str | int | None = None) -> dict[str, Any]:
    """Compare what two adapters add to the weights, layer by layer.

    Returns:
        Names of layers `only_in_first` and `only_in_second`; the `settings` that differ. For all layers together
        (`total`) and for each layer that is in both: the norms of either one and of the difference, the difference
        relative to the larger one, and the cosine between them.
    Raises:
        AdapterError: a layer has two shapes, so the adapters belong to different models.
        ConfigError: memory is too little; names the least that would do.
    """
    check_memory([first, second], memory, "comparing")
    specs = first.spec.as_config(), second.spec.as_config()
    scales = [float(adapter.spec.parameters["scale"]) for adapter in (first, second)]
    both = [name for name in first.layers if name in second.layers]
    only = [[name for name in a.layers if name not in b.layers] for a, b in ((first, second), (second, first))]
    layers: dict[str, dict[str, float]] = {}
    layers_of = {id(adapter): dict(_take_layers(adapter, evaluate=False)) for adapter in (first, second)}
    for name in both:
        a, b = (layers_of[id(adapter)].pop(name) for adapter in (first, second))
        if _shape(a) != _shape(b):
            raise AdapterError(f"{name} is {list(_shape(a))} in one adapter and {list(_shape(b))} in the other")
        terms = (scales[0], a), (-scales[1], b)
        norms = _norm([terms[0]]), _norm([terms[1]])
        layers[name] = _compared(*norms, _norm(list(terms)))
        if "m" in a and "m" in b:
            layers[name]["magnitudes"] = mx.linalg.norm(a["m"] - b["m"]).item()
    unshared = [  # norms of the layers that only one of them has
        math.sqrt(sum(_norm([(scale, layers_of[id(adapter)].pop(name))]) ** 2 for name in names))
        for adapter, scale, names in zip((first, second), scales, only)
    ]
    square = {key: sum(layer[key] ** 2 for layer in layers.values()) for key in ("first", "second", "difference")}
    total = _compared(
        math.sqrt(square["first"] + unshared[0] ** 2),
        math.sqrt(square["second"] + unshared[1] ** 2),
        math.sqrt(square["difference"] + unshared[0] ** 2 + unshared[1] ** 2),
    )
    return {
        "only_in_first": only[0],
        "only_in_second": only[1],
        "settings": {key: [s[key] for s in specs] for key in specs[0] if specs[0][key] != specs[1].get(key)},
        "total": total,
        "layers": layers,
    }


def _compared(first: float, second: float, difference: float) -> dict[str, float]:
    larger, product = max(first, second), first * second
    cosine = (first**2 + second**2 - difference**2) / (2 * product) if product else 0.0
    return {
        "first": first,
        "second": second,
        "difference": difference,
        "relative": difference / larger if larger else 0.0,
        "cosine": max(-1.0, min(1.0, cosine)),
    }


# --- Summing ----------------------------------------------------------------------------------------


def merge(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    output: str | Path,
    rank: int | None = None,
    memory: str | int | None = None,
) -> Path:
    """Write the weighted sum of LoRA adapters as one adapter.

    Args:
        rank: None gives the sum itself, whose rank is the sum of the ranks. Else the closest adapter of this rank is
            written (truncated SVD).
    Raises:
        AdapterError: an adapter is DoRA, whose magnitudes do not add up; adapters belong to different models; or
            `output` is there already.
        ConfigError: there are not as many weights as adapters, or memory is too little.
    """
    output = Path(output).expanduser()
    _refuse_unsummable(adapters, weights, rank)
    refuse_occupied(output)
    check_memory(adapters, memory, "merging")
    scale = float(adapters[0].spec.parameters["scale"]) or 1.0
    layers_of_each = [dict(_take_layers(adapter, evaluate=False)) for adapter in adapters]
    factors = [w * float(adapter.spec.parameters["scale"]) / scale for w, adapter in zip(weights, adapters)]
    names = list(dict.fromkeys(name for layers in layers_of_each for name in layers))
    ranks = {n: sum(rank_of(layers[n]["lora_a"]) for layers in layers_of_each if n in layers) for n in names}
    common = rank or max(ranks.values())
    shapes: dict[str, tuple] = {}
    for name in names:
        distinct = {_shape(layers[name]) for layers in layers_of_each if name in layers}
        if len(distinct) > 1:
            one, other, *_ = sorted(distinct)
            raise AdapterError(f"{name} is {list(one)} in one adapter and {list(other)} in another")
        shapes |= _shapes_of(name, *distinct, common)

    def merged_tensors():
        for name in names:
            terms = [(f, layers.pop(name)) for f, layers in zip(factors, layers_of_each) if name in layers]
            terms = [(f, {key: a.astype(mx.float32) for key, a in parts.items()}) for f, parts in terms]
            a, b = _concatenated(terms)
            if rank is not None:
                a, b = _truncated(a, b, rank)
            a, b = with_rank(a, b, common)
            yield f"{name}.lora_a", a
            yield f"{name}.lora_b", b

    specs = [adapter.spec for adapter in adapters]
    parameters = {**specs[0].parameters, "rank": common, "scale": scale}
    same_keys = all(
        (s.num_layers, s.parameters.get("keys")) == (specs[0].num_layers, specs[0].parameters.get("keys"))
        for s in specs
    )
    if not same_keys:  # whole names attach to exactly these layers
        parameters["keys"] = sorted(names)
    spec = AdapterSpec("lora", specs[0].num_layers if same_keys else -1, parameters)
    others = {"model": adapters[0].base} if adapters[0].base else {}
    others["merged"] = [{"adapter": str(a.file), "weight": w} for a, w in zip(adapters, weights)]
    _write(output, WEIGHTS, shapes, merged_tensors(), {CONFIG: {**others, **spec.as_config()}})
    return output


def _refuse_unsummable(adapters: Sequence[Adapter], weights: Sequence[float], rank: int | None) -> None:
    if len(weights) != len(adapters):
        raise ConfigError(f"{len(adapters)} adapters need as many weights, got {len(weights)}")
    if not adapters or not all(math.isfinite(w) for w in weights):
        raise ConfigError(f"weights must be numbers, got {list(weights)}")
    if rank is not None and rank < 1:
        raise ConfigError(f"--rank must be at least 1, got {rank}")
    for adapter in adapters:
        if adapter.spec.fine_tune_type != "lora":
            raise AdapterError(f"{adapter.file} is DoRA, whose magnitudes do not add up. Fuse it into a model instead")


def _concatenated(terms: list[tuple[float, dict[str, mx.array]]]) -> tuple[mx.array, mx.array]:
    """Factors whose product is the sum of the terms' products, each multiplied by its number."""
    a = mx.concatenate([parts["lora_a"] for _, parts in terms], axis=1)
    is_experts = a.ndim == 3
    b = mx.concatenate([parts["lora_b"] * f for f, parts in terms], axis=2 if is_experts else 0)
    return a, b


def _truncated(a: mx.array, b: mx.array, rank: int) -> tuple[mx.array, mx.array]:
    """The best approximation of the product by one of rank `rank`: an SVD of the matrix between orthonormal factors."""
    if a.ndim == 3:
        pairs = [_truncated(a[e].T, b[e].T, rank) for e in range(a.shape[0])]
        return mx.stack([x.T for x, _ in pairs]), mx.stack([y.T for _, y in pairs])
    (q_a, r_a), (q_b, r_b) = (np.linalg.qr(np.asarray(m, np.float64)) for m in (a, b.T))
    u, s, v = np.linalg.svd(r_a @ r_b.T)
    root = np.sqrt(s[:rank])
    x, y = (q_a @ u[:, : len(root)]) * root, (root[:, None] * v[: len(root)]) @ q_b.T
    return with_rank(mx.array(x.astype(np.float32)), mx.array(y.astype(np.float32)), rank)


def _norm(terms: list[tuple[float, dict[str, mx.array]]]) -> float:
    """The Frobenius norm of that sum of products: the norm of the small matrix between orthonormal factors."""
    a, b = _concatenated([(1.0, {k: p.astype(mx.float32) for k, p in parts.items()}) for _, parts in terms])
    numbers = [f for f, parts in terms for _ in range(rank_of(parts["lora_a"]))]
    squares = 0.0
    for a_i, b_i in zip(a, b) if a.ndim == 3 else [(a.T, b.T)]:  # [r, in], [out, r]
        r_a = np.linalg.qr(np.asarray(a_i, np.float64).T, mode="r")
        r_b = np.linalg.qr(np.asarray(b_i, np.float64) * np.array(numbers), mode="r")
        squares += float(np.square(r_a @ r_b.T).sum())
    return math.sqrt(squares)


def _shape(parts: dict[str, mx.array]) -> tuple[int, ...]:
    """The shape of the product, whatever the rank: `(in, out)`, or `(E, in, out)` for experts."""
    a, b = parts["lora_a"], parts["lora_b"]
    return (a.shape[0], a.shape[2], b.shape[1]) if a.ndim == 3 else (a.shape[0], b.shape[1])


def _shapes_of(name: str, shape: tuple[int, ...], rank: int) -> dict[str, tuple[int, ...]]:
    if len(shape) == 3:
        n, n_in, n_out = shape
        return {f"{name}.lora_a": (n, rank, n_in), f"{name}.lora_b": (n, n_out, rank)}
    return {f"{name}.lora_a": (shape[0], rank), f"{name}.lora_b": (rank, shape[1])}


# --- Other formats ----------------------------------------------------------------------------------


def config_of(model: str) -> dict[str, Any]:
    """The config.json of a base model, which is downloaded if it is not here. Raises ModelError."""
    return read_config(resolve(model))


def renamed(adapter: Adapter, model: str) -> Adapter:
    """The adapter with its layers named as mlx-lm names those of `model`.

    The names may differ only in what stands before the blocks: GPT-2's blocks are `transformer.h.0` in transformers and
    `model.h.0` in mlx-lm.

    Raises:
        AdapterError: the model does not have such a layer.
        ModelError: the model cannot be read.
    """
    names = {name for name, module in build_lazily(resolve(model)).model.named_modules() if "weight" in module}
    new_names: dict[str, str] = {}
    for name in adapter.layers:
        ends = [".".join(name.split(".")[i:]) for i in range(name.count(".") + 1)]
        for end in ends:
            matching = [n for n in names if n == name or n.endswith(f".{end}") or n == end]
            prefix = name.removesuffix(end).strip(".").split(".")
            if len(matching) == 1 and set(filter(None, prefix)) <= WRAPPERS:
                new_names[name] = matching[0]
                break
        else:
            raise AdapterError(f"{name} is no layer of {model} as mlx-lm has it, or one of its vision or audio parts")
    weights = {}
    for name, array in adapter.weights.items():
        layer, _, part = name.rpartition(".")
        weights[f"{new_names[layer]}.{part}"] = array
    keys = adapter.spec.parameters.get("keys")
    parameters = {**adapter.spec.parameters} | ({"keys": [new_names.get(key, key) for key in keys]} if keys else {})
    return replace(adapter, spec=replace(adapter.spec, parameters=parameters), weights=weights)


def write_mlx(adapter: Adapter, output: str | Path, memory: str | int | None = None) -> Path:
    """Write an adapter in the format that `mlx_lm.generate --adapter-path` reads, tensor by tensor.

    Raises:
        AdapterError: `output` is there already, or cannot be written.
        ConfigError: memory is too little; names the least that would do.
    """
    output = Path(output).expanduser()
    refuse_occupied(output)
    check_memory([adapter], memory, "importing")
    shapes = {name: array.shape for name, array in adapter.weights.items()}
    dtypes = {name: _dtype(array) for name, array in adapter.weights.items()}
    entries = {**adapter.others, **adapter.spec.as_config()}
    _write(output, WEIGHTS, shapes, _take(adapter.weights), {CONFIG: entries}, dtypes)
    return output


def export_peft(
    adapter: Adapter,
    output: str | Path,
    base: str | None = None,
    memory: str | int | None = None,
) -> Path:
    """Write an adapter in the format that PEFT's `PeftModel.from_pretrained` reads.

    Args:
        base: the base model's name for PEFT's configuration. None is the name that the adapter's configuration has.
    Raises:
        AdapterError: the adapter has experts, which PEFT stores differently, or an embedding that is the head as well;
            or `output` is there already.
        ConfigError: an embedding has LoRA, and no base model is named that would tell whether it is the head; or
            memory is too little.
        ModelError: that base model cannot be read.
    """
    output = Path(output).expanduser()
    refuse_occupied(output)
    check_memory([adapter], memory, "exporting")
    base = base or adapter.base
    if embeddings := [name for name in adapter.layers if EMBEDDING.search(name)]:
        if base is None:
            raise ConfigError(
                f"{adapter.file} does not name its base model, whose head may be {embeddings[0]}. Give --model"
            )
        if is_tied(config_of(base)):
            raise AdapterError(
                f"{embeddings[0]} is the model's head as well: PEFT adapts the embedding alone, mlx-lm both"
            )
    entries = {**adapter.others, **adapter.spec.as_config()}
    config, tensors = to_peft(entries, adapter.weights, base)
    adapter.weights = {}
    shapes = {name: array.shape for name, array in tensors.items()}
    dtypes = {name: _dtype(array) for name, array in tensors.items()}
    _write(output, PEFT_WEIGHTS[0], shapes, _take(tensors), {CONFIG: config}, dtypes, {"format": "pt"})
    return output


def is_tied(config: dict[str, Any]) -> bool:
    """Whether the embedding is the head as well: the model has no layer for it, or the configuration says so.

    Raises:
        ModelError: mlx-lm has no such model.
    """
    from mlx_lm.utils import _get_classes

    try:
        model_class, args_class = _get_classes(config)
        arguments = args_class.from_dict(config)
        names = [name for name, _ in model_class(arguments).named_modules()]  # lazy: no weight is computed
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise ModelError(f"mlx-lm cannot read the base model's config.json: {first_line(e)}") from None
    usual = getattr(arguments, "tie_word_embeddings", True)
    has_head = any(name.rpartition(".")[2] in HEADS for name in names)
    return not has_head or bool(config.get("tie_word_embeddings", usual))


# --- Files ------------------------------------------------------------------------------------------


def read(path: str | Path) -> Adapter:
    """Read the adapter in a directory, mlx-lm's or PEFT's. Raises AdapterError."""
    path = Path(path).expanduser()
    if path.suffix.lower() == ".gguf":
        raise AdapterError(f"{path} is in GGUF. Once: slowft adapter import {path} --model MODEL --output DIR")
    return read_adapter(path)


def refuse_occupied(output: Path) -> None:
    """Raises AdapterError if something would be overwritten."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise AdapterError(f"{output} is there already. Give another --output, so that nothing is overwritten")


def _dtype(array: mx.array) -> str:
    return str(array.dtype).removeprefix("mlx.core.")


def _take(weights: dict[str, mx.array]):
    """Each array in turn, which `weights` then no longer holds."""
    for name in list(weights):
        yield name, weights.pop(name)


def _take_layers(adapter: Adapter, evaluate: bool = True):
    """(name, arrays) of each layer in turn, which the adapter then no longer holds."""
    layers = adapter.layers
    adapter.weights = {}
    for name in list(layers):
        parts = layers.pop(name)
        if evaluate:
            _evaluate(list(parts.values()), adapter.file)
        yield name, parts


def _evaluate(arrays: list[mx.array], file: Path | None) -> None:
    try:
        mx.eval(arrays)
    except (RuntimeError, ValueError) as e:
        raise AdapterError(f"{file} cannot be read: {first_line(e)}") from None


def check_memory(adapters: Sequence[Adapter], memory: str | int | None, doing: str) -> None:
    """Raises ConfigError if the largest layer and its factors in float64 do not fit."""
    sizes: dict[str, int] = {}
    for adapter in adapters:
        for name, parts in adapter.layers.items():
            sizes[name] = sizes.get(name, 0) + sum(array.size * 8 for array in parts.values())
    check_room_for(COPIES * max(sizes.values(), default=0), memory, f"{doing} {adapters[0].file}")


def check_room_for(nbytes: int, memory: str | int | None, doing: str) -> None:
    """Raises ConfigError if `nbytes` more bytes do not fit under a ceiling; names the least that would do."""
    platform.fix_malloc_threshold()
    limit = platform.memory_limit() // 2 if memory is None else parse_nbytes(memory)
    needed = platform.memory_in_use() + FLOOR_NBYTES + nbytes
    if needed > limit:
        least = -(-needed // 10_000_000) * 10_000_000
        raise ConfigError(
            f"--memory {limit / 1e9:.2f}GB is too little: {doing} takes {least / 1e9:.2f}GB. "
            f"Use --memory {least / 1e9:.2f}GB or more"
        )


def _write(output: Path, file_name: str, shapes, arrays, texts: dict[str, dict], dtypes=None, metadata=None) -> None:
    """Write a directory with one file of tensors, one after the other, and small JSON files `texts`."""
    tensors = [Tensor(name, (dtypes or {}).get(name, "float32"), tuple(shape)) for name, shape in shapes.items()]
    needed = sum(t.nbytes for t in tensors)
    free = free_nbytes(output)
    if free < needed:
        raise AdapterError(
            f"{output} needs {needed / 1e6:,.0f} MB, and its disk has {free / 1e6:,.0f} MB free. Make room first"
        )
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise cannot_write(output, e) from None
    out = TensorFile(output / file_name, tensors, PENDING_NBYTES, metadata)
    try:
        for name, array in arrays:
            array = mx.contiguous(array)
            _evaluate([array], output)
            if not mx.isfinite(array).all().item():
                raise AdapterError(f"{name} holds NaN or infinity: nothing was written to {output}")
            out.write(name, memoryview(array.reshape(-1).view(mx.uint8)))
        # The configuration is written last, because a directory without one is no adapter.
        out.finish()
    except BaseException:
        out.abandon()
        raise
    for name, entries in texts.items():
        write_file(output / name, (json.dumps(entries, indent=4, sort_keys=True) + "\n").encode())
