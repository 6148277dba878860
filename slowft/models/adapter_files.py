"""Reads and writes adapter directories: mlx-lm's (and slowft's), and PEFT's, which are converted as they are read.

Comes in: a directory. Goes out: an `Adapter`, whose tensors are not evaluated. Or an adapter comes in, and a directory
that `mlx_lm.generate --adapter-path` loads goes out. Never leaves a half-written file.
"""

import hashlib
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..errors import AdapterError
from ..weights.extents import read_header
from ..weights.recognise import read_json
from ..weights.tensorfile import cannot_write, load_arrays, load_lazily, save_arrays, sync
from .directories import ADAPTER_CONFIG as CONFIG
from .directories import MLX_WEIGHTS as WEIGHTS
from .directories import PEFT_WEIGHTS, describe_adapter, explain_no_adapter
from .peft import by_layer, ranks_of, read_peft, read_tensors


@dataclass(frozen=True)
class AdapterSpec:
    """What is attached: `fine_tune_type` is "lora" or "dora", `parameters` are mlx-lm's `lora_parameters`."""

    fine_tune_type: str
    num_layers: int
    parameters: dict[str, Any]

    def as_config(self) -> dict:
        return {
            "fine_tune_type": self.fine_tune_type,
            "num_layers": self.num_layers,
            "lora_parameters": dict(self.parameters),
        }


@dataclass
class Adapter:
    """An adapter that was read, or is to be written.

    Attributes:
        spec: how it is attached.
        weights: `lora_a`, `lora_b` and, with DoRA, `m` of each layer, by name, unevaluated.
        others: further entries of its `adapter_config.json`: the base model, what it was trained with.
        file: the file that has the tensors; None for an adapter that was not read from one.
        is_peft: it was read from PEFT's files. Everything here is as if mlx-lm had written them.
    """

    spec: AdapterSpec
    weights: dict[str, mx.array]
    others: dict[str, Any] = field(default_factory=dict)
    file: Path | None = None
    is_peft: bool = False

    @property
    def layers(self) -> dict[str, dict[str, mx.array]]:
        """Name of a layer -> name of an array (`lora_a`, ...) -> the array. Block 10 comes after block 9."""
        layers = by_layer(self.weights)
        return {name: layers[name] for name in sorted(layers, key=in_order)}

    @property
    def base(self) -> str | None:
        """The model that it was trained on, as its configuration names it."""
        return self.others.get("model")

    def save(self, directory: str | Path) -> Path:
        """Write the adapter as `mlx_lm.generate --adapter-path` reads it. Returns the directory.

        Raises:
            AdapterError: the directory cannot be written.
        """
        directory = Path(directory).expanduser()
        save(self.weights, directory, {**self.others, **self.spec.as_config()})
        return directory


def in_order(name: str) -> list[tuple[int, str]]:
    """A key that sorts layers' names with block 10 after block 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def load_peft(directory: str | Path) -> Adapter:
    """Convert a LoRA or DoRA adapter that PEFT saved to mlx-lm's form.

    To use such an adapter, it is enough to give its directory as `adapter_path`.

    Raises:
        AdapterError: the adapter is not PEFT's, damaged, pickled, or cannot be expressed as one of mlx-lm's.
    """
    directory = Path(directory).expanduser()
    adapter = describe_adapter(directory)
    if adapter is None or not adapter.is_peft:
        raise AdapterError(f"{directory} is {adapter or 'not an adapter directory'}. PEFT's have {PEFT_WEIGHTS[0]}")
    return read_adapter(directory)


def read_adapter(directory: Path) -> Adapter:
    """The adapter in a directory, mlx-lm's or PEFT's.

    Raises:
        AdapterError: the directory holds no LoRA or DoRA adapter, or a damaged one.
    """
    entries, is_peft = _read_entries(directory)
    spec = _spec(entries, directory / CONFIG)
    weights, file = read_weights(directory / WEIGHTS, lazily=True)
    layers = by_layer(weights)
    for name, parts in layers.items():
        if not parts.keys() <= {"lora_a", "lora_b", "m"}:
            raise AdapterError(f"{file}: {name} has {', '.join(parts)}; a layer of an adapter has lora_a and lora_b")
    if not ranks_of(layers, file):
        raise AdapterError(f"{file} holds no tensors")
    scale = spec.parameters["scale"]
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale):
        raise AdapterError(f"{directory / CONFIG}: scale must be a number, got {ascii(scale)[:50]}")
    others = {k: v for k, v in entries.items() if k not in spec.as_config()}
    return Adapter(spec, weights, others, file, is_peft)


def digest(directory: Path) -> str:
    """A hash of the files of the adapter in `directory`."""
    hashed = hashlib.blake2b(digest_size=16)
    for name in (CONFIG, WEIGHTS, PEFT_WEIGHTS[0]):
        if (file := directory / name).exists():
            hashed.update(file.read_bytes())
    return hashed.hexdigest()


def read_spec(directory: Path) -> AdapterSpec:
    """The spec of the adapter in `directory`, mlx-lm's or PEFT's.

    Raises:
        AdapterError: the directory holds no LoRA or DoRA adapter, or a damaged one.
    """
    spec = _spec(_read_entries(directory)[0], directory / CONFIG)
    if (file := directory / WEIGHTS).exists():  # a wrong rank could ask for any amount of memory
        longest = max((n for e in read_tensors(read_header, file).values() for n in e.shape), default=0)
        if isinstance(rank := spec.parameters["rank"], int) and rank > longest:
            raise AdapterError(
                f"{directory / CONFIG}: the rank is {rank}, and no tensor in {file} has an axis longer than {longest}"
            )
    return spec


def _read_entries(directory: Path) -> tuple[dict[str, Any], bool]:
    """(The entries of `adapter_config.json` under mlx-lm's names, whether the file is PEFT's)."""
    adapter = describe_adapter(directory)
    if adapter is not None and adapter.is_peft:
        return read_peft(directory)[0], True
    if adapter is None or not (directory / CONFIG).exists():
        raise AdapterError(explain_no_adapter(directory, f"{CONFIG} and {WEIGHTS}"))
    entries = read_json(directory / CONFIG, AdapterError)
    if not isinstance(entries, dict):
        raise AdapterError(f"{directory / CONFIG} is not an adapter configuration: it holds no object")
    return entries, False


def _spec(config: dict[str, Any], file: Path) -> AdapterSpec:
    try:
        kind = config.get("fine_tune_type", "lora")
        parameters = {"rank": None, "scale": None, "dropout": 0.0, **config["lora_parameters"]}
        spec = AdapterSpec(kind, int(config["num_layers"]), parameters)
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise AdapterError(f"{file} is not an adapter configuration: {e}") from None
    if kind not in ("lora", "dora"):
        raise AdapterError(f"{file}: fine_tune_type {kind!r} changes base weights, which stay on disk here")
    return spec


def read_weights(file: Path, lazily: bool = False) -> tuple[dict[str, mx.array], Path]:
    """(The tensors of an adapter file by mlx-lm's names, the file that has them).

    Args:
        file: mlx-lm's or PEFT's. In a directory of PEFT's, mlx-lm's file name means PEFT's file.
        lazily: MLX reads each tensor when it is used.
    Raises:
        AdapterError: the file cannot be read, or holds no adapter.
    """
    if file.name in (WEIGHTS, *PEFT_WEIGHTS):
        adapter = describe_adapter(file.parent)
        if adapter is not None and adapter.is_peft:
            file, weights = file.with_name(PEFT_WEIGHTS[0]), read_peft(file.parent)[1]
            if not lazily:
                _evaluate(weights, file)
            return weights, file
    if not file.exists():
        raise AdapterError(f"{file} does not exist. Give an adapter's file, such as adapters/{WEIGHTS}")
    if file.suffix.lower() == ".gguf":
        raise AdapterError(
            f"{file} is an adapter in GGUF. Once: slowft adapter import {file} --model MODEL --output DIR"
        )
    weights = read_tensors(load_lazily, file) if lazily else read_tensors(load_arrays, file)[0]
    if (peft := next((n for n in weights if ".lora_A" in n or n.startswith("base_model.")), None)) is not None:
        raise AdapterError(
            f"{file} is a PEFT adapter (it has {peft}) without its {CONFIG}. Give the directory that PEFT saved"
        )
    return weights, file


def _evaluate(weights: dict[str, mx.array], file: Path) -> None:
    try:
        mx.eval(list(weights.values()))
    except (RuntimeError, ValueError) as e:
        raise AdapterError(f"{file} cannot be read: {str(e).splitlines()[0]}") from None


def save(
    weights: dict[str, mx.array], directory: Path, config: dict, numbered: int | None = None, is_current: bool = True
) -> Path:
    """Write `adapter_config.json` and the adapter's tensors. Returns the first tensor file.

    All files are written under temporary names and synced before any is renamed. So a reader sees a whole old or
    new file, and a failure leaves every earlier file as it was.

    Args:
        numbered: also write a copy of the tensors whose name begins with this number.
        is_current: write `adapters.safetensors`; False leaves only the numbered copy.

    Raises:
        AdapterError: the directory cannot be written, or its disk is full.
    """
    if directory.exists() and not directory.is_dir():
        raise AdapterError(f"{directory} is a file. Give a directory to save the adapter to")
    names = ([] if numbered is None else [f"{numbered:07d}_{WEIGHTS}"]) + [WEIGHTS] * is_current
    staged = {directory / name: directory / f".{name}.{os.getpid()}.tmp.safetensors" for name in names}
    staged[directory / CONFIG] = directory / f".{CONFIG}.{os.getpid()}.tmp"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for file, temporary in staged.items():
            if file.name == CONFIG:
                temporary.write_text(json.dumps(config, indent=4, sort_keys=True) + "\n")
            else:
                save_arrays(temporary, weights)
            sync(temporary)
        for file, temporary in staged.items():
            os.replace(temporary, file)
    except OSError as e:
        nbytes = sum(array.nbytes for array in weights.values())
        reason = cannot_write(directory / names[0], e, nbytes)
        raise AdapterError(f"{reason}. Earlier adapters there are untouched") from None
    finally:
        for temporary in staged.values():
            if directory.is_dir():
                temporary.unlink(missing_ok=True)
    return directory / names[0]
