"""What can be done with adapters alone: described, compared, summed, written in another program's format.

Comes in: adapters as `models/adapter_files.py` reads them. Goes out: plain data for a report, or a directory (for
llama.cpp, a file). Products are never formed: norms, sums and truncations are computed from the thin factors, layer by
layer, in float64, so that the memory is a layer's factors, whatever the model.
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
from ..errors import AdapterError, ConfigError, ModelError
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

PENDING_NBYTES = 8 << 20  # of a file, given to the writer and not yet written
FLOOR_NBYTES = 48 << 20  # besides arrays, and what the process holds at the start
COPIES = 6  # of the largest layer's factors, in float64 twice their size: they, scaled, their triangular factors

# Of a layer's name, before its block: parts that only say that a model is inside another.
WRAPPERS = {"model", "transformer", "language_model", "text_model", "gpt_neox", "backbone", "decoder"}
# What an adapter's configuration says of its training, for people.
TRAINED_WITH = "data iters batch_size learning_rate optimizer max_seq_length seed mask_prompt grad_accumulation_steps"


# --- Describing -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Described:
    """An adapter, for a report.

    Attributes:
        format: "mlx-lm" or "PEFT".
        kind: "lora" or "dora".
        base: the model it was trained on, as its configuration names it.
        layers: of each adapted layer its rank, and the Frobenius norm of what is added to the weight.
        trained_with: the configuration's entries on training.
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
        """Of all layers together."""
        return math.sqrt(sum(layer["norm"] ** 2 for layer in self.layers.values()))


def describe(adapter: Adapter, memory: str | int | None = None) -> Described:
    """Rank, layers, norms, and what the adapter was trained on.

    Raises:
        ConfigError: too little memory; names the least.
    """
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
    """How two adapters differ, layer by layer, in what they add to the weights.

    Returns:
        Names of layers `only_in_first` and `only_in_second`; settings that differ; of all layers together and of each
        one in both: norms of either and of the difference, its share of the larger one, and the cosine between them.
    Raises:
        AdapterError: a layer is of two shapes: the adapters are of different models.
        ConfigError: too little memory; names the least.
    """
    check_memory([first, second], memory, "comparing")
    specs = first.spec.as_config(), second.spec.as_config()
    scales = [float(adapter.spec.parameters["scale"]) for adapter in (first, second)]
    both = [name for name in first.layers if name in second.layers]
    only = [[name for name in a.layers if name not in b.layers] for a, b in ((first, second), (second, first))]
    layers: dict[str, dict[str, float]] = {}
    others = {id(adapter): dict(_take_layers(adapter, evaluate=False)) for adapter in (first, second)}
    for name in both:
        a, b = (others[id(adapter)].pop(name) for adapter in (first, second))
        if _shape(a) != _shape(b):
            raise AdapterError(f"{name} is {list(_shape(a))} in one adapter and {list(_shape(b))} in the other")
        terms = (scales[0], a), (-scales[1], b)
        norms = _norm([terms[0]]), _norm([terms[1]])
        layers[name] = _compared(*norms, _norm(list(terms)))
        if "m" in a and "m" in b:
            layers[name]["magnitudes"] = mx.linalg.norm(a["m"] - b["m"]).item()
    alone = [
        math.sqrt(sum(_norm([(scale, others[id(adapter)].pop(name))]) ** 2 for name in names))
        for adapter, scale, names in zip((first, second), scales, only)
    ]
    square = {key: sum(layer[key] ** 2 for layer in layers.values()) for key in ("first", "second", "difference")}
    total = _compared(
        math.sqrt(square["first"] + alone[0] ** 2),
        math.sqrt(square["second"] + alone[1] ** 2),
        math.sqrt(square["difference"] + alone[0] ** 2 + alone[1] ** 2),
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
        rank: None gives the sum itself, of the ranks' sum; else the closest adapter of this rank (truncated SVD).
    Raises:
        AdapterError: DoRA, whose magnitudes do not add up; adapters of different models; or `output` is in the way.
        ConfigError: as many weights as adapters are needed; too little memory.
    """
    output = Path(output).expanduser()
    if len(weights) != len(adapters):
        raise ConfigError(f"{len(adapters)} adapters need as many weights, got {len(weights)}")
    if not adapters or not all(math.isfinite(w) for w in weights):
        raise ConfigError(f"weights must be numbers, got {list(weights)}")
    if rank is not None and rank < 1:
        raise ConfigError(f"--rank must be at least 1, got {rank}")
    for adapter in adapters:
        if adapter.spec.fine_tune_type != "lora":
            raise AdapterError(f"{adapter.file} is DoRA, whose magnitudes do not add up. Fuse it into a model instead")
    refuse_occupied(output)
    check_memory(adapters, memory, "merging", rank)
    scale = float(adapters[0].spec.parameters["scale"]) or 1.0
    of_each = [dict(_take_layers(adapter, evaluate=False)) for adapter in adapters]
    factors = [w * float(adapter.spec.parameters["scale"]) / scale for w, adapter in zip(weights, adapters)]
    names = list(dict.fromkeys(name for layers in of_each for name in layers))
    ranks = {n: sum(rank_of(layers[n]["lora_a"]) for layers in of_each if n in layers) for n in names}
    common = rank or max(ranks.values())
    shapes: dict[str, tuple] = {}
    for name in names:
        known = {_shape(layers[name]) for layers in of_each if name in layers}
        if len(known) > 1:
            one, other, *_ = sorted(known)
            raise AdapterError(f"{name} is {list(one)} in one adapter and {list(other)} in another")
        shapes |= _shapes_of(name, *known, common)

    def merged():
        for name in names:
            terms = [(f, layers.pop(name)) for f, layers in zip(factors, of_each) if name in layers]
            terms = [(f, {key: a.astype(mx.float32) for key, a in parts.items()}) for f, parts in terms]
            a, b = _concatenated(terms)
            if rank is not None:
                a, b = _truncated(a, b, rank)
            a, b = with_rank(a, b, common)
            yield f"{name}.lora_a", a
            yield f"{name}.lora_b", b

    specs = [adapter.spec for adapter in adapters]
    parameters = {**specs[0].parameters, "rank": common, "scale": scale}
    alike = all(
        (s.num_layers, s.parameters.get("keys")) == (specs[0].num_layers, specs[0].parameters.get("keys"))
        for s in specs
    )
    if not alike:  # whole names, which attach to exactly these layers
        parameters["keys"] = sorted(names)
    spec = AdapterSpec("lora", specs[0].num_layers if alike else -1, parameters)
    others = {"model": adapters[0].base} if adapters[0].base else {}
    others["merged"] = [{"adapter": str(a.file), "weight": w} for a, w in zip(adapters, weights)]
    _write(output, WEIGHTS, shapes, merged(), {CONFIG: {**others, **spec.as_config()}})
    return output


def _concatenated(terms: list[tuple[float, dict[str, mx.array]]]) -> tuple[mx.array, mx.array]:
    """Factors whose product is the sum of the terms' products, each times its number."""
    a = mx.concatenate([parts["lora_a"] for _, parts in terms], axis=1)
    is_experts = a.ndim == 3
    b = mx.concatenate([parts["lora_b"] * f for f, parts in terms], axis=2 if is_experts else 0)
    return a, b


def _truncated(a: mx.array, b: mx.array, rank: int) -> tuple[mx.array, mx.array]:
    """The product's best approximation of a rank, by an SVD of the small matrix between orthonormal factors."""
    if a.ndim == 3:
        pairs = [_truncated(a[e].T, b[e].T, rank) for e in range(a.shape[0])]
        return mx.stack([x.T for x, _ in pairs]), mx.stack([y.T for _, y in pairs])
    (q_a, r_a), (q_b, r_b) = (np.linalg.qr(np.asarray(m, np.float64)) for m in (a, b.T))
    u, s, v = np.linalg.svd(r_a @ r_b.T)
    root = np.sqrt(s[:rank])
    x, y = (q_a @ u[:, : len(root)]) * root, (root[:, None] * v[: len(root)]) @ q_b.T
    return with_rank(mx.array(x.astype(np.float32)), mx.array(y.astype(np.float32)), rank)


def _norm(terms: list[tuple[float, dict[str, mx.array]]]) -> float:
    """Frobenius norm of a sum of products, each times its number: of the small matrix between orthonormal factors."""
    a, b = _concatenated([(1.0, {k: p.astype(mx.float32) for k, p in parts.items()}) for _, parts in terms])
    numbers = [f for f, parts in terms for _ in range(rank_of(parts["lora_a"]))]
    squares = 0.0
    for one_a, one_b in zip(a, b) if a.ndim == 3 else [(a.T, b.T)]:  # [r, in], [out, r]
        r_a = np.linalg.qr(np.asarray(one_a, np.float64).T, mode="r")
        r_b = np.linalg.qr(np.asarray(one_b, np.float64) * np.array(numbers), mode="r")
        squares += float(np.square(r_a @ r_b.T).sum())
    return math.sqrt(squares)


def _shape(parts: dict[str, mx.array]) -> tuple[int, ...]:
    """Of the product, whatever the rank: `(in, out)`, or of experts `(E, in, out)`."""
    a, b = parts["lora_a"], parts["lora_b"]
    return (a.shape[0], a.shape[2], b.shape[1]) if a.ndim == 3 else (a.shape[0], b.shape[1])


def _shapes_of(name: str, shape: tuple[int, ...], rank: int) -> dict[str, tuple[int, ...]]:
    if len(shape) == 3:
        n, n_in, n_out = shape
        return {f"{name}.lora_a": (n, rank, n_in), f"{name}.lora_b": (n, n_out, rank)}
    return {f"{name}.lora_a": (shape[0], rank), f"{name}.lora_b": (rank, shape[1])}


# --- Other formats ----------------------------------------------------------------------------------


def config_of(model: str) -> dict[str, Any]:
    """config.json of a base model, downloaded if it is not here. Raises ModelError."""
    return read_config(resolve(model))


def renamed(adapter: Adapter, model: str) -> Adapter:
    """An adapter with its layers named as mlx-lm names those of `model`, where only what stands before blocks differs.

    As in GPT-2, whose blocks are `transformer.h.0` in transformers and `model.h.0` in mlx-lm.

    Raises:
        AdapterError: a layer that the model does not have, or that it has in another way.
        ModelError: no model.
    """
    names = {name for name, module in build_lazily(resolve(model)).model.named_modules() if "weight" in module}
    new: dict[str, str] = {}
    for name in adapter.layers:
        ends = [".".join(name.split(".")[i:]) for i in range(name.count(".") + 1)]
        for end in ends:
            found = [n for n in names if n == name or n.endswith(f".{end}") or n == end]
            before = name.removesuffix(end).strip(".").split(".")
            if len(found) == 1 and set(filter(None, before)) <= WRAPPERS:
                new[name] = found[0]
                break
        else:
            raise AdapterError(f"{name} is no layer of {model} as mlx-lm has it, or one of its vision or audio parts")
    weights = {}
    for name, array in adapter.weights.items():
        layer, _, part = name.rpartition(".")
        weights[f"{new[layer]}.{part}"] = array
    keys = adapter.spec.parameters.get("keys")
    parameters = {**adapter.spec.parameters} | ({"keys": [new.get(key, key) for key in keys]} if keys else {})
    return replace(adapter, spec=replace(adapter.spec, parameters=parameters), weights=weights)


def write_mlx(adapter: Adapter, output: str | Path, memory: str | int | None = None) -> Path:
    """Write an adapter as `mlx_lm.generate --adapter-path` reads it, tensor by tensor.

    Raises:
        AdapterError: `output` is in the way, or cannot be written.
        ConfigError: too little memory; names the least.
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
    """Write an adapter as PEFT's `PeftModel.from_pretrained` reads it.

    Args:
        base: the base model, for whoever reads the configuration; None: what the adapter itself names.
    Raises:
        AdapterError: experts, which PEFT has in another way, an embedding that is the head as well, or `output` is in
            the way.
        ConfigError: too little memory; names the least.
        ModelError: an embedding has LoRA, and there is no base model to see whether it is the head.
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
    """Whether the embedding is the head as well: it has no layer of its own, or the configuration says so.

    Raises:
        ModelError: mlx-lm has no such model.
    """
    from mlx_lm.utils import _get_classes

    try:
        model_class, args_class = _get_classes(config)
        arguments = args_class.from_dict(config)
        names = [name for name, _ in model_class(arguments).named_modules()]  # lazy: no weight is made
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise ModelError(f"mlx-lm cannot read the base model's config.json: {str(e).splitlines()[0]}") from None
    usual = getattr(arguments, "tie_word_embeddings", True)
    has_head = any(name.rpartition(".")[2] in HEADS for name in names)
    return not has_head or bool(config.get("tie_word_embeddings", usual))


# --- Files ------------------------------------------------------------------------------------------


def read(path: str | Path) -> Adapter:
    """The adapter in a directory, mlx-lm's or PEFT's. Raises AdapterError."""
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
    """Each array in turn, let go of here."""
    for name in list(weights):
        yield name, weights.pop(name)


def _take_layers(adapter: Adapter, evaluate: bool = True):
    """Each layer's arrays in turn, by its name; the adapter lets go of them."""
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
        raise AdapterError(f"{file} cannot be read: {str(e).splitlines()[0]}") from None


def check_memory(adapters: Sequence[Adapter], memory: str | int | None, doing: str, rank: int | None = None) -> None:
    """Raises ConfigError if the largest layer and its factors in float64 do not fit."""
    sizes: dict[str, int] = {}
    for adapter in adapters:
        for name, parts in adapter.layers.items():
            sizes[name] = sizes.get(name, 0) + sum(array.size * 8 for array in parts.values())
    check_room_for(COPIES * max(sizes.values(), default=0), memory, f"{doing} {adapters[0].file}")


def check_room_for(nbytes: int, memory: str | int | None, doing: str) -> None:
    """Raises ConfigError if so many bytes more do not fit under a ceiling; names the least that would do."""
    platform.fix_malloc_threshold()
    limit = platform.memory_limit() // 2 if memory is None else parse_nbytes(memory)
    held = platform.memory_in_use() + FLOOR_NBYTES + nbytes
    if held > limit:
        least = -(-held // 10_000_000) * 10_000_000
        raise ConfigError(
            f"--memory {limit / 1e9:.2f}GB is too little: {doing} takes {least / 1e9:.2f}GB. "
            f"Use --memory {least / 1e9:.2f}GB or more"
        )


def _write(output: Path, file_name: str, shapes, arrays, texts: dict[str, dict], dtypes=None, metadata=None) -> None:
    """A directory with one file of tensors, written one after the other, and small files, all in place at the end."""
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
        # the configuration is last: a directory without one is no adapter
        out.finish()
    except BaseException:
        out.abandon()
        raise
    for name, entries in texts.items():
        write_file(output / name, (json.dumps(entries, indent=4, sort_keys=True) + "\n").encode())
