"""LoRA and DoRA adapters as mlx-lm defines them: attach, load, save.

Comes in: an opened model whose weights are placeholders. Goes out: the same model with trainable layers, or
a directory that `mlx_lm.generate --adapter-path` loads. Never half-writes a file.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from ..errors import AdapterError, ConfigError, ModelError, printable
from ..weights.extents import read_header
from ..weights.recognise import read_json, recognise
from ..weights.sources import locate
from ..weights.tensorfile import cannot_write, load_arrays, save_arrays, sync
from .directories import NO_PEFT, describe_adapter, explain_no_adapter

DEFAULT_NUM_LAYERS = 16  # mlx_lm.lora's; it fails with it on smaller models, here it means all their blocks
WEIGHTS, CONFIG = "adapters.safetensors", "adapter_config.json"


@dataclass(frozen=True)
class AdapterSpec:
    """What was attached: `fine_tune_type` is "lora" or "dora", `parameters` mlx-lm's `lora_parameters`."""

    fine_tune_type: str
    num_layers: int
    parameters: dict[str, Any]

    def as_config(self) -> dict:
        return {
            "fine_tune_type": self.fine_tune_type,
            "num_layers": self.num_layers,
            "lora_parameters": dict(self.parameters),
        }


def attach(model: nn.Module, spec: AdapterSpec) -> list[str]:
    """Replace linear layers by LoRA or DoRA layers, with mlx-lm's `linear_to_lora_layers`.

    DoRA magnitudes (`m`) come out of placeholders here; the caller computes them from the weights.

    Returns:
        What a person should know of keys that match less than one may think, a sentence each.
    Raises:
        ConfigError: an impossible value, or keys that match no layer.
    """
    from mlx_lm.tuner.utils import linear_to_lora_layers

    n_layers, p = len(model.layers), spec.parameters
    if spec.num_layers < 1 and spec.num_layers != -1:
        raise ConfigError(f"num_layers must be at least 1, or -1 for all, got {spec.num_layers}")
    if spec.num_layers > n_layers and spec.num_layers != DEFAULT_NUM_LAYERS:
        raise ConfigError(f"num_layers is {spec.num_layers} but the model has {n_layers} layers. Use -1 for all")
    if not (isinstance(p["rank"], int) and p["rank"] >= 1):
        raise ConfigError(f"LoRA rank must be a whole number of at least 1, got {p['rank']!r}")
    if not (isinstance(p["scale"], (int, float)) and abs(p["scale"]) < 2**31):
        raise ConfigError(f"LoRA scale must be a number, got {p['scale']!r}")
    if not (isinstance(p["dropout"], (int, float)) and 0 <= p["dropout"] < 1):
        raise ConfigError(f"LoRA dropout must be at least 0 and below 1, got {p['dropout']!r}")
    keys = p.get("keys")
    if keys is not None and not (isinstance(keys, (list, tuple)) and keys and all(isinstance(k, str) for k in keys)):
        raise ConfigError(f"LoRA keys must be a list of layer names such as self_attn.q_proj, got {keys!r}")
    before = {id(module) for module in model.modules()}
    notes: list[str] = []
    if keys is not None:
        names = {name for layer in model.layers for name, _ in layer.named_modules()}
        names |= {name for name, _ in model.named_modules()}
        absent = sorted(set(keys) - names)
        if absent:
            linear = (nn.Linear, nn.QuantizedLinear, nn.Embedding, nn.QuantizedEmbedding, *_kinds_of_experts())
            possible = sorted({n for layer in model.layers for n, m in layer.named_modules() if isinstance(m, linear)})
            raise ConfigError(
                f"LoRA keys {', '.join(absent)} match no layer of the model. Its blocks have: {', '.join(possible)}"
            )
        notes = _partly_matched(keys, model.layers[-spec.num_layers :] if spec.num_layers > 0 else model.layers)
    try:
        linear_to_lora_layers(model, spec.num_layers, dict(p), use_dora=spec.fine_tune_type == "dora")
    except (ValueError, KeyError) as e:
        raise ConfigError(f"LoRA cannot be attached: {e.args[0]}") from None
    if not any(id(module) not in before for module in model.modules()):
        raise ConfigError(f"LoRA keys {', '.join(keys or [])} match no layer of the last {spec.num_layers} blocks")
    return notes


def without_hidden_weights(
    model: nn.Module, spec: AdapterSpec, run: Callable[[], Any]
) -> tuple[AdapterSpec, list[str]]:
    """Take adapters off layers whose weights the model uses itself, as gemma3n's altup clips them: LoRA hides those.

    Args:
        run: calls the model.
    Returns:
        What is attached then, and what a person should know of it, a sentence each.
    Raises:
        ConfigError: keys name such a layer.
    """
    left_out: list[str] = []
    while True:
        attached = {n: m for block in model.layers for n, m in block.named_modules() if hasattr(m, "lora_a")}
        try:
            run()
        except AttributeError as e:
            name = next((n for block in model.layers for n, m in block.named_modules() if m is e.obj), None)
            if name not in attached:
                raise
            if "keys" in spec.parameters:
                raise ConfigError(
                    f"LoRA cannot be trained on {name}: the model uses its {e.name} itself. Leave it out of the keys"
                ) from None
            left_out.append(name)
            for block in model.layers:
                changed = [(n, m.linear) for n, m in block.named_modules() if n == name and hasattr(m, "lora_a")]
                block.update_modules(tree_unflatten(changed))
        else:
            break
    if not left_out:
        return spec, []
    spec = replace(spec, parameters={**spec.parameters, "keys": sorted(attached)})
    return spec, [f"{', '.join(left_out)} have no LoRA: the model uses their weights itself"]


def _partly_matched(keys: Sequence[str], blocks: Sequence[nn.Module]) -> list[str]:
    """Keys that only some of the blocks to be trained have, and layers of experts left out beside others."""
    names = [{name for name, _ in block.named_modules()} for block in blocks]
    notes = []
    for key in keys:
        n = sum(key in of_block for of_block in names)
        if 0 < n < len(blocks):
            notes.append(f"{key} is trained in {n} of {len(blocks)} blocks: the others have no such layer")
    kinds = _kinds_of_experts()
    experts = sorted({name for block in blocks for name, layer in block.named_modules() if isinstance(layer, kinds)})
    left_out = [name for name in experts if name not in keys]
    if left_out and len(left_out) < len(experts):
        notes.append(f"Of the experts' layers, {', '.join(left_out)} are not trained: LoRA keys name the others only")
    return notes


def _kinds_of_experts() -> tuple[type, ...]:
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

    return SwitchLinear, QuantizedSwitchLinear


def read_spec(directory: Path) -> AdapterSpec:
    """What the adapter in `directory` was trained with.

    Raises:
        AdapterError: not an adapter directory, or not one of LoRA or DoRA.
    """
    config_file = directory / CONFIG
    adapter = describe_adapter(directory)
    if adapter is None or adapter.is_peft or not config_file.exists():
        raise AdapterError(explain_no_adapter(directory, f"{CONFIG} and {WEIGHTS}"))
    try:
        config = read_json(config_file, AdapterError)
        kind = config.get("fine_tune_type", "lora")
        parameters = {"rank": None, "scale": None, "dropout": 0.0, **config["lora_parameters"]}
        spec = AdapterSpec(kind, int(config["num_layers"]), parameters)
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise AdapterError(f"{config_file} is not an adapter configuration: {e}") from None
    if kind not in ("lora", "dora"):
        raise AdapterError(f"{config_file}: fine_tune_type {kind!r} changes base weights, which stay on disk here")
    if (file := directory / WEIGHTS).exists():  # a rank that is none of theirs may ask for any amount of memory
        longest = max((n for e in _read(read_header, file).values() for n in e.shape), default=0)
        if isinstance(rank := parameters["rank"], int) and rank > longest:
            raise AdapterError(
                f"{config_file}: the rank is {rank}, and no tensor in {file} has an axis longer than {longest}"
            )
    return spec


def digest(directory: Path) -> str:
    """Of the files of the adapter in `directory`."""
    found = hashlib.blake2b(digest_size=16)
    for name in (CONFIG, WEIGHTS):
        found.update((directory / name).read_bytes())
    return found.hexdigest()


def _read(how: Callable[[Path], Any], file: Path) -> Any:
    """`how(file)`, of a file of adapter weights.

    Raises:
        AdapterError: it cannot be read, or is something else.
    """
    try:
        return how(file)
    except (ModelError, RuntimeError, ValueError) as e:
        known = recognise(file)
        said = f"it is {known[0]}. {known[1]}" if known else printable(str(e).splitlines()[0])
        raise AdapterError(f"{file} is not a readable safetensors file: {said}") from None


def load_weights(model: nn.Module, expected: dict[str, mx.array], file: Path) -> None:
    """Load adapter tensors into the attached layers.

    Args:
        expected: the attached adapter's parameters, by name.
    Raises:
        AdapterError: unreadable file, or tensors that do not belong to the model; names one and both shapes.
    """
    if not file.exists():
        raise AdapterError(f"{file} does not exist")
    if file.suffix.lower() == ".gguf":
        raise AdapterError(f"{file} is an adapter in GGUF, which slowft does not read yet. Give one of mlx-lm's")
    weights, _ = _read(load_arrays, file)
    if (
        peft := next((name for name in weights if ".lora_A" in name or name.startswith("base_model.")), None)
    ) is not None:
        raise AdapterError(f"{file} is a PEFT adapter (it has {peft}). {NO_PEFT}")
    for name, array in weights.items():
        if name not in expected:
            raise AdapterError(f"{file}: {name} is no adapter parameter of this model. Was it trained on another one?")
        if array.shape != expected[name].shape:
            raise AdapterError(
                f"{file}: {name} is {list(array.shape)}, the model wants {list(expected[name].shape)}. "
                "Use the rank and layers it was trained with"
            )
    missing = sorted(set(expected) - set(weights))
    if missing:
        raise AdapterError(f"{file} lacks {missing[0]} (and {len(missing) - 1} more) of the attached adapter")
    model.load_weights(list(weights.items()), strict=False)


class AdapterSwitch:
    """Has a model computed without its adapter, or with another one, for as long as that is asked for.

    Adapters that are added by name lie around the model's own layers, whose weights come and go, and are not trained.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        self._named: dict[
            str, dict[str, nn.Module]
        ] = {}  # -> name of a layer in the model -> the layer with its adapter

    def add(self, name: str, directory: Path) -> None:
        """Load the adapter saved in `directory` under a name.

        Raises:
            AdapterError: it is none, or belongs to another model.
        """
        spec = read_spec(directory)
        with self.using(False):
            attach(self._model, spec)
            attached = {path: layer for path, layer in self._model.named_modules() if hasattr(layer, "lora_a")}
            try:
                expected = {
                    f"{path}.{key}": array
                    for path, layer in attached.items()
                    for key, array in tree_flatten({k: v for k, v in layer.items() if k not in ("linear", "embedding")})
                    if isinstance(array, mx.array)
                }
                load_weights(self._model, expected, directory / WEIGHTS)
                mx.eval([layer.trainable_parameters() for layer in attached.values()])
            finally:
                for path, layer in attached.items():
                    layer.train(False)
                    self._put(path, _without_adapter(layer))
        self._named[name] = attached

    @property
    def names(self) -> list[str]:
        """Of the adapters that were added."""
        return list(self._named)

    def layers(self, name: str) -> dict[str, nn.Module]:
        """Name of a layer in the model -> that layer with the adapter that was added under `name` around it."""
        return dict(self._named[name])

    @contextmanager
    def using(self, adapter: bool | str, root: str = "") -> Iterator[None]:
        """While this is entered, layers have this adapter: True, the one that is attached; False, none; or a name.

        Args:
            root: name of the module whose layers are meant, such as a block; the whole model if it is empty.
        """
        if adapter is True:
            yield
            return
        prefix = f"{root}." if root else ""
        owner, key = locate(self._model, root) if root else (None, None)
        module = self._model if owner is None else owner[key]
        before = {f"{prefix}{path}": m for path, m in module.named_modules() if hasattr(m, "lora_a")}
        now = {path: _without_adapter(layer) for path, layer in before.items()}
        if adapter is not False:
            of_name = {path: m for path, m in self._named[adapter].items() if path.startswith(prefix)}
            before = {path: _without_adapter(m) for path, m in of_name.items()} | before
            now |= of_name
        for path, layer in now.items():
            self._put(path, layer)
        try:
            yield
        finally:
            for path, layer in before.items():
                self._put(path, layer)

    def _put(self, path: str, layer: nn.Module) -> None:
        owner, key = locate(self._model, path)
        owner[key] = layer


def _without_adapter(layer: nn.Module) -> nn.Module:
    return layer["linear"] if "linear" in layer else layer["embedding"]


def save(
    weights: dict[str, mx.array], directory: Path, config: dict, numbered: int | None = None, is_current: bool = True
) -> Path:
    """Write `adapter_config.json` and the adapter's tensors; with `numbered`, also a numbered copy.

    All files are written under temporary names and synced before any is renamed, so a reader sees a whole old or
    new file, and a failure leaves every earlier one as it was.

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
        said = cannot_write(directory / names[0], e, nbytes)
        raise AdapterError(f"{said}. Earlier adapters there are untouched") from None
    finally:
        for temporary in staged.values():
            if directory.is_dir():
                temporary.unlink(missing_ok=True)
    return directory / names[0]
