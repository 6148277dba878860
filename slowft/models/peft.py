"""PEFT's LoRA and DoRA adapters <-> mlx-lm's: names, transposes, scale and alpha, ranks of each layer.

Comes in: a directory that PEFT saved, or an adapter of mlx-lm's as arrays. Goes out: the adapter in the other form, as
unevaluated arrays and entries of `adapter_config.json`. Writes no file and runs no pickle. What the other form cannot
express exactly is refused by name.

PEFT has `lora_A.weight` [r, in] and `lora_B.weight` [out, r]; mlx-lm has `lora_a` [in, r] and `lora_b` [r, out]. For an
embedding of V rows, PEFT has `lora_embedding_A` [r, V] and `lora_embedding_B` [D, r], mlx-lm `lora_a` [V, r] and
`lora_b` [r, D]. mlx-lm has one rank and one scale for all layers. So a smaller rank is padded with zeros, and another
scale is multiplied into `lora_b`. The product is the same; the zeros, on both sides of it, are never trained.
"""

import collections
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..errors import AdapterError, ModelError, first_line, printable
from ..weights.recognise import read_json, recognise
from ..weights.tensorfile import load_lazily
from .directories import ADAPTER_CONFIG, PEFT_WEIGHTS

PREFIX = "base_model.model."
EXPERT = re.compile(r"(.*)\.experts\.(\d+)\.(\w+)")
EXPERTS_NAMES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}  # Mixtral's
MAX_EXPERTS = 4096  # in one layer; real models have up to 512
EMBEDDING = re.compile(r"(?:^|\.)(?:\w*embed\w*|wte|wpe)$")
# Settings of PEFT's that are used here, or do not change what the tensors mean.
HARMLESS = frozenset(
    "peft_type peft_version task_type auto_mapping base_model_name_or_path revision inference_mode r lora_alpha "
    "lora_dropout use_rslora use_dora rank_pattern alpha_pattern target_modules exclude_modules layers_to_transform "
    "layers_pattern fan_in_fan_out megatron_config megatron_core qalora_group_size ensure_weight_tying runtime_config "
    "ephemeral_gpu_offload loftq_config eva_config corda_config lora_ga_config".split()
)
# Initialisations that do not change the base model's weights. With any other, the adapter needs the changed weights.
HARMLESS_INITIALISATIONS = (None, True, False, "gaussian", "eva", "orthogonal")
UNSET: tuple = (None, False, [], {}, "none")


def read_peft(directory: Path) -> tuple[dict[str, Any], dict[str, mx.array]]:
    """(Entries of mlx-lm's `adapter_config.json`, its tensors, unevaluated float32) from a directory that PEFT saved.

    Raises:
        AdapterError: a file is damaged or pickled, or has something that mlx-lm's adapters cannot express; names it.
    """
    config_file = directory / ADAPTER_CONFIG
    if not config_file.exists():
        raise AdapterError(f"{directory} lacks {ADAPTER_CONFIG}, which says how PEFT scales the adapter")
    config = read_json(config_file, AdapterError)
    if not isinstance(config, dict):
        raise AdapterError(f"{config_file} is not an adapter configuration: it holds no object")
    _refuse_unequal(config, config_file)
    file = directory / PEFT_WEIGHTS[0]
    layers = _layers(_read(file, directory), file)
    try:
        scales = {name: _scale(config, name, rank) for name, rank in ranks_of(layers, file).items()}
        dropout = float(config.get("lora_dropout") or 0.0)
    except (TypeError, ValueError, AttributeError, OverflowError, re.error) as e:
        raise AdapterError(f"{config_file} is not a LoRA configuration: {type(e).__name__} {e}") from None
    layers, scales = _stack_experts(layers, scales, file)
    with_dora = [name for name, parts in layers.items() if "m" in parts]
    if with_dora and len(with_dora) < len(layers):
        raise AdapterError(f"{file}: {with_dora[0]} has DoRA's magnitudes and others have none; mlx-lm has all or none")
    if bool(config.get("use_dora")) != bool(with_dora):
        claim = "without" if with_dora else "with"
        raise AdapterError(f"{config_file} says an adapter {claim} DoRA, and its tensors say the opposite")
    ranks_of(layers, file)
    parameters, weights = assemble(layers, scales, dropout)
    entries = {"fine_tune_type": "dora" if with_dora else "lora", "num_layers": -1, "lora_parameters": parameters}
    if isinstance(base := config.get("base_model_name_or_path"), str):
        entries["model"] = base
    return entries, weights


def assemble(
    layers: dict[str, dict[str, mx.array]], scales: dict[str, float], dropout: float
) -> tuple[dict[str, Any], dict[str, mx.array]]:
    """(mlx-lm's `lora_parameters`, its tensors), with one rank and scale, from layers whose ranks and scales differ."""
    rank = max(rank_of(parts["lora_a"]) for parts in layers.values())
    scale = collections.Counter(scales.values()).most_common(1)[0][0]
    weights = {}
    for name, parts in layers.items():
        a, b = parts["lora_a"], parts["lora_b"]
        if scales[name] != scale:
            b = b * (scales[name] / scale)
        weights[f"{name}.lora_a"], weights[f"{name}.lora_b"] = with_rank(a, b, rank)
        if "m" in parts:
            weights[f"{name}.m"] = parts["m"]
    # full names as keys attach to exactly these layers
    return {"rank": rank, "scale": scale, "dropout": dropout, "keys": sorted(layers)}, weights


def with_rank(a: mx.array, b: mx.array, rank: int) -> tuple[mx.array, mx.array]:
    """`lora_a` and `lora_b` padded with zeros to a rank: the same product."""
    missing = rank - rank_of(a)
    if not missing:
        return a, b
    if a.ndim == 3:  # layers of experts have [E, r, in] and [E, out, r]
        return mx.pad(a, ((0, 0), (0, missing), (0, 0))), mx.pad(b, ((0, 0), (0, 0), (0, missing)))
    return mx.pad(a, ((0, 0), (0, missing))), mx.pad(b, ((0, missing), (0, 0)))


def ranks_of(layers: dict[str, dict[str, mx.array]], file: Path | None) -> dict[str, int]:
    """The rank of each layer.

    Raises:
        AdapterError: a factor is missing, or the two do not fit together.
    """
    ranks = {}
    for name, parts in layers.items():
        if not {"lora_a", "lora_b"} <= parts.keys():
            raise AdapterError(f"{file}: {name} lacks {'lora_B' if 'lora_a' in parts else 'lora_A'}")
        a, b = parts["lora_a"], parts["lora_b"]
        fits = a.ndim == b.ndim == 2 and a.shape[1] == b.shape[0]
        fits |= a.ndim == b.ndim == 3 and (a.shape[0], a.shape[1]) == (b.shape[0], b.shape[2])
        if not fits or not a.size or not b.size:
            raise AdapterError(f"{file}: {name} has factors {list(a.shape)} and {list(b.shape)}, which have no product")
        ranks[name] = rank_of(a)
    return ranks


def rank_of(a: mx.array) -> int:
    """The rank r of a `lora_a`: `[in, r]`, or `[E, r, in]` in a layer of experts."""
    return a.shape[1]


# --- From PEFT --------------------------------------------------------------------------------------


def _refuse_unequal(config: dict, file: Path) -> None:
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        raise AdapterError(
            f"{file}: peft_type {ascii(kind)[:50]} is no LoRA. Of PEFT's adapters LoRA and DoRA can be read"
        )
    for key, value in config.items():  # a setting that a newer PEFT has added is refused as well, if it is set
        if key in HARMLESS or value in (HARMLESS_INITIALISATIONS if key == "init_lora_weights" else UNSET):
            continue
        raise AdapterError(
            f"{file}: {ascii(key)[:50]} {ascii(value)[:80]} has no equal in mlx-lm. Merge the adapter into "
            "its base model (PEFT's merge_and_unload) and give the result as --model"
        )


def read_tensors(read: Callable[[Path], Any], file: Path) -> Any:
    """`read(file)`, for a file of adapter weights.

    Raises:
        AdapterError: the file cannot be read, or holds something else; says what.
    """
    try:
        return read(file)
    except (ModelError, RuntimeError, ValueError) as e:
        recognised = recognise(file)
        reason = f"it is {recognised[0]}. {recognised[1]}" if recognised else printable(first_line(e))
        raise AdapterError(f"{file} is not a readable safetensors file: {reason}") from None


def _read(file: Path, directory: Path) -> dict[str, mx.array]:
    if not file.exists():
        if (directory / PEFT_WEIGHTS[1]).exists():
            raise AdapterError(
                f"{directory / PEFT_WEIGHTS[1]} is pickled, and reading it could run any code. Save the adapter anew "
                "with PEFT's save_pretrained(..., safe_serialization=True)"
            )
        raise AdapterError(f"{file} does not exist")
    return read_tensors(load_lazily, file)


def _layers(tensors: dict[str, mx.array], file: Path) -> dict[str, dict[str, mx.array]]:
    """Name of an adapted layer -> its arrays as mlx-lm lays them out, in float32, in which PEFT computes with them."""
    kinds = {
        ".lora_A.weight": ("lora_a", True),
        ".lora_B.weight": ("lora_b", True),
        ".lora_embedding_A": ("lora_a", True),
        ".lora_embedding_B": ("lora_b", True),
        ".lora_magnitude_vector": ("m", False),
        ".lora_magnitude_vector.weight": ("m", False),
    }
    layers: dict[str, dict[str, mx.array]] = {}
    for name, array in tensors.items():
        if name.endswith(".base_layer.weight"):  # PEFT adds the frozen weight of a head or an embedding
            continue
        suffix = next((suffix for suffix in kinds if name.endswith(suffix)), None)
        if suffix is None:
            raise AdapterError(
                f"{file}: tensor {name} is no part of LoRA or DoRA, and mlx-lm's adapters have no place for it"
            )
        part, is_matrix = kinds[suffix]
        if array.ndim != (2 if is_matrix else 1):
            raise AdapterError(
                f"{file}: tensor {name} is {list(array.shape)}, not of {2 if is_matrix else 1} dimensions"
            )
        layer = name.removesuffix(suffix).removeprefix(PREFIX)
        layers.setdefault(layer, {})[part] = (array.T if is_matrix else array).astype(mx.float32)
    if not layers:
        raise AdapterError(f"{file} holds no tensors")
    return layers


def _scale(config: dict, name: str, rank: int) -> float:
    """The scale of a layer in PEFT: alpha (which may depend on the layer's name) over the rank or its square root."""
    alpha = config.get("lora_alpha", 8)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            alpha = value
            break
    scale = float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)
    if not math.isfinite(scale):
        raise ValueError(f"lora_alpha {alpha}")
    return scale


def _stack_experts(layers, scales: dict[str, float], file: Path):
    """Stack layers of single experts, as Mixtral has them, to one: `lora_a` [E, r, in], `lora_b` [E, out, r]."""
    groups: dict[str, dict[int, str]] = {}
    for name in layers:
        if (match := EXPERT.fullmatch(name)) is not None:
            kind = EXPERTS_NAMES.get(match[3], match[3])
            groups.setdefault(f"{match[1]}.switch_mlp.{kind}", {})[int(match[2])] = name
    layers, scales = dict(layers), dict(scales)
    for stacked, members in groups.items():
        if max(members) >= MAX_EXPERTS:
            raise AdapterError(f"{file}: {members[max(members)]} has a number that no expert has")
        parts = {e: layers.pop(name) for e, name in members.items()}
        own_scales = {e: scales.pop(name) for e, name in members.items()}
        if any("m" in p for p in parts.values()):
            raise AdapterError(f"{file}: {members[min(members)]} is DoRA of an expert, which mlx-lm does not have")
        rank, scale = max(rank_of(p["lora_a"]) for p in parts.values()), own_scales[min(own_scales)]
        first = parts[min(parts)]
        shapes = (first["lora_a"].shape[0], rank), (rank, first["lora_b"].shape[1])
        stack_a, stack_b = [], []
        for e in range(max(members) + 1):  # an expert without an adapter gets zeros
            if e in parts:
                a, b = with_rank(parts[e]["lora_a"], parts[e]["lora_b"], rank)
                if (a.shape, b.shape) != shapes:
                    raise AdapterError(f"{file}: {members[e]} is of another shape than {members[min(members)]}")
                b = b * (own_scales[e] / scale) if own_scales[e] != scale else b
            else:
                a, b = (mx.zeros(shape) for shape in shapes)
            stack_a.append(a.T)
            stack_b.append(b.T)
        layers[stacked], scales[stacked] = {"lora_a": mx.stack(stack_a), "lora_b": mx.stack(stack_b)}, scale
    return layers, scales


# --- To PEFT ----------------------------------------------------------------------------------------


def to_peft(
    entries: dict[str, Any], weights: dict[str, mx.array], base: str | None = None
) -> tuple[dict[str, Any], dict[str, mx.array]]:
    """(PEFT's `adapter_config.json`, its tensors) for an mlx-lm adapter.

    Args:
        entries: mlx-lm's `adapter_config.json`.
        base: name or directory of the base model.
    Raises:
        AdapterError: the adapter has layers of experts, which PEFT lays out in another way.
    """
    layers = by_layer(weights)
    tensors, ranks = {}, {}
    for name, parts in layers.items():
        a, b = parts["lora_a"], parts["lora_b"]
        if a.ndim == 3:
            raise AdapterError(
                f"{name} is an adapter of {a.shape[0]} experts at once, and transformers has their weights laid out "
                "otherwise: PEFT cannot express it. Train without the experts' layers (--keys), or fuse (slowft fuse)"
            )
        is_embedding = EMBEDDING.search(name) is not None
        suffixes = ("lora_embedding_A", "lora_embedding_B") if is_embedding else ("lora_A.weight", "lora_B.weight")
        for suffix, array in zip(suffixes, (a, b)):
            tensors[f"{PREFIX}{name}.{suffix}"] = mx.contiguous(array.T)
        if "m" in parts:
            tensors[f"{PREFIX}{name}.lora_magnitude_vector"] = parts["m"]
        ranks[name] = rank_of(a)
    parameters = entries["lora_parameters"]
    rank = max(ranks.values())
    scale = float(parameters["scale"])
    others = {re.escape(name): r for name, r in ranks.items() if r != rank}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base or entries.get("model"),
        "inference_mode": True,
        "r": rank,
        "lora_alpha": scale * rank,
        "lora_dropout": float(parameters.get("dropout") or 0.0),
        "use_dora": entries["fine_tune_type"] == "dora",
        "use_rslora": False,
        "target_modules": sorted(layers),  # full names select exactly these layers
        "rank_pattern": others,
        "alpha_pattern": {name: scale * r for name, r in others.items()},
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
    }
    return config, tensors


def by_layer(weights: dict[str, mx.array]) -> dict[str, dict[str, mx.array]]:
    """Name of a layer -> the adapter's arrays there (`lora_a`, `lora_b`, with DoRA `m`)."""
    layers: dict[str, dict[str, mx.array]] = {}
    for name, array in weights.items():
        layer, _, part = name.rpartition(".")
        layers.setdefault(layer, {})[part] = array
    return layers
