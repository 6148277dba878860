"""Explains, for an error message, what a directory is that was given as a model or as an adapter and is not one.

Comes in: a directory (or a file). Goes out: what it is and what to give instead. Reads small files only.
"""

import json
import struct
from dataclasses import dataclass
from pathlib import Path

from ..errors import ModelError
from ..weights.inside import is_inside

PEFT_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
MLX_WEIGHTS = "adapters.safetensors"
ADAPTER_CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class Adapter:
    """What kind of adapter a directory holds. `base` is the base model that it names."""

    is_peft: bool
    kind: str
    base: str | None

    def __str__(self) -> str:
        return f"a PEFT adapter ({self.kind})" if self.is_peft else "an mlx-lm adapter"


def explain_directory(path: Path) -> str:
    """One line on a directory without config.json: what it is, and what to give instead."""
    if (adapter := describe_adapter(path)) is not None:
        base = f"its base model, {adapter.base}" if adapter.base else "the base model that it was trained on"
        fix = f"and {path} to --adapter-path, or make a model of the two: slowft fuse"
        if not adapter.is_peft:
            fix = f"and {path / MLX_WEIGHTS} to --resume-adapter-file; slowft fuse makes a model of the two"
        return f"{path} is {adapter}, not a model. Give {base}, {fix}"
    names = sorted(p.name for p in path.iterdir())
    inner = [p for p in sorted(path.iterdir()) if p.name.startswith("models--")]
    if path.name == "snapshots":
        inner = [p for p in sorted(path.iterdir()) if _is_model(p)]
    if inner:
        return f"{path} is the hub's cache, not a model. Give one of its directories, such as {inner[0]}"
    message = f"{path} has no config.json: it is not a model directory"
    if models := [p for p in sorted(path.iterdir()) if _is_model(p)]:
        return f"{message}. {models[0]} is one: give that"
    if gguf := [name for name in names if name.lower().endswith(".gguf")]:
        return f"{message}. It has {gguf[0]}. Once: slowft prepare {path / gguf[0]} --output {Path(gguf[0]).stem}"
    if original := [name for name in names if name.startswith("consolidated.") or name == "params.json"]:
        return f"{message} but holds a publisher's own format ({original[0]}). Give the copy in Hugging Face's format"
    if weights := [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]:
        return (
            f"{message}. It has weights in PyTorch's own format ({weights[0]}), which mlx-lm does not load. "
            "Look for a copy of the model in safetensors"
        )
    if any(name.endswith(".safetensors") for name in names):
        return f"{message}. It has weights: put the model's config.json and tokenizer files there"
    return message


def describe_adapter(path: Path) -> Adapter | None:
    """The adapter that a directory holds; None if it holds none."""
    config = {}
    try:
        config = json.loads((path / ADAPTER_CONFIG).read_bytes())
    except (OSError, ValueError, RecursionError):
        pass
    config = config if isinstance(config, dict) else {}
    if (path / MLX_WEIGHTS).exists() and "peft_type" not in config:
        return Adapter(False, str(config.get("fine_tune_type", "lora")), config.get("model"))
    if "peft_type" in config or any((path / name).exists() for name in PEFT_WEIGHTS):
        return Adapter(True, str(config.get("peft_type") or "LoRA"), config.get("base_model_name_or_path"))
    return None


def explain_no_adapter(path: Path, needed: str) -> str:
    """One line on a directory that was given as an adapter and holds none: what it is, and what it needs."""
    if gguf := sorted(file.name for file in path.glob("*.gguf")):
        return f"{path} holds {gguf[0]}. Once: slowft adapter import {path / gguf[0]} --model MODEL --output DIR"
    try:
        inner = snapshot_of_cache(path, marked_by=ADAPTER_CONFIG)
    except ModelError:
        inner = None
    if inner is not None:
        return f"{path} is the hub's cache, not an adapter directory. Give {inner}"
    if _is_model(path) and not (path / ADAPTER_CONFIG).exists():
        return f"{path} is a model, not an adapter directory: that has {needed}"
    if not path.exists():
        return f"{path} is not an adapter directory: nothing is there. Give one that has {needed}"
    return f"{path} is not an adapter directory: it needs {needed}"


def snapshot_of_cache(path: Path, marked_by: str = "config.json") -> Path | None:
    """The snapshot to use in a model's directory of the hub's cache (`models--org--name`); None for other directories.

    Args:
        marked_by: the file that a snapshot has to have.
    Raises:
        ModelError: such a directory has no whole snapshot, or several and none of them is the main one.
    """
    snapshots = path / "snapshots"
    is_cache = path.name.startswith("models--") or (path / "refs").is_dir() or (path / "blobs").is_dir()
    if (path / marked_by).exists() or not snapshots.is_dir() or not is_cache:
        return None
    versions = sorted(p for p in snapshots.iterdir() if p.is_dir())
    main = path / "refs" / "main"
    if main.is_file():
        name = main.read_text("utf-8", "replace").strip()
        if is_inside(name) and (snapshots / name / marked_by).exists():
            return snapshots / name
    whole = [p for p in versions if (p / marked_by).exists()]
    if len(whole) == 1:
        return whole[0]
    if whole:
        raise ModelError(f"{path} is the hub's cache of a model, with {len(whole)} versions. Give one: {whole[0]}")
    if adapters := [p for p in versions if describe_adapter(p) is not None]:
        raise ModelError(explain_directory(adapters[0]))
    hub_id = path.name.removeprefix("models--").replace("--", "/")
    raise ModelError(
        f"{path} is the hub's cache of a model, and no version in it is whole. Download it again: hf download {hub_id}"
    )


def gguf_is_adapter(file: Path) -> bool:
    """Whether a GGUF file says of itself that it is an adapter."""
    entry = b"general.type" + struct.pack("<IQ", 8, 7) + b"adapter"
    try:
        with open(file, "rb") as opened:
            return opened.read(4) == b"GGUF" and entry in opened.read(1 << 20)
    except OSError:
        return False


def _is_model(path: Path) -> bool:
    return path.is_dir() and (path / "config.json").exists()
