"""LoRA and DoRA adapters as mlx-lm defines them, in a model: attach, load, switch between them.

Comes in: an opened model whose weights are placeholders. Goes out: the same model with trainable layers. Which files
an adapter has is known to `adapter_files` alone.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from ..errors import AdapterError, ConfigError
from ..weights.sources import locate
from .adapter_files import WEIGHTS, AdapterSpec, digest, read_spec, read_weights, save
from .directories import PEFT_WEIGHTS

__all__ = ["WEIGHTS", "AdapterSpec", "AdapterSwitch", "attach", "digest", "load_weights", "read_spec", "save"]
DEFAULT_NUM_LAYERS = 16  # mlx_lm.lora's; it fails with it on smaller models, here it means all their blocks
HEADS = ("lm_head", "output", "embed_out", "head", "ff_out", "output_layer")  # names of a layer of its own for it


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


def load_weights(model: nn.Module, expected: dict[str, mx.array], file: Path) -> None:
    """Load adapter tensors, mlx-lm's or PEFT's, into the attached layers of a streamed model.

    Args:
        expected: the attached adapter's parameters, by name.
        file: of a PEFT directory, mlx-lm's name will do.
    Raises:
        AdapterError: unreadable file, or tensors that do not belong to the model; names one and both shapes.
        ConfigError: DoRA outside the blocks, where the weights that its norms are of are not at hand.
    """
    weights, file = read_weights(file)
    in_blocks = {id(module) for block in model.layers for module in block.modules()}
    for name, module in model.named_modules():
        if f"{name}.m" in expected and id(module) not in in_blocks:
            raise ConfigError(f"{file} has DoRA on {name}, outside the blocks, which cannot be streamed. Fuse it first")
    put_weights(model, expected, weights, file)


def put_weights(model: nn.Module, expected: dict[str, mx.array], weights: dict[str, mx.array], file: Path) -> None:
    """Put an adapter's tensors, evaluated or not, into the attached layers.

    Raises:
        AdapterError: they do not belong to the model; names one and both shapes.
    """
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
    if file.name in PEFT_WEIGHTS:
        refuse_tied_embeddings(model, file)
    model.load_weights(list(weights.items()), strict=False)


def refuse_tied_embeddings(model: nn.Module, file: Path) -> None:
    """Raises AdapterError if an embedding that is the head as well has LoRA: PEFT adapts the one, mlx-lm both."""
    modules = dict(model.named_modules())
    tied = [name for name, m in modules.items() if hasattr(m, "lora_a") and "embedding" in m]
    if tied and not any(name.rpartition(".")[2] in HEADS for name in modules):
        raise AdapterError(
            f"{file}: {tied[0]} is the model's head as well, of which PEFT adapts the embedding alone and mlx-lm both. "
            "Merge the adapter into its base model with PEFT (merge_and_unload) and give the result as --model"
        )


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
                    layer.freeze()
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
