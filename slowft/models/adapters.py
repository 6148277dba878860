"""Attaches mlx-lm's LoRA and DoRA adapters to a model, loads their weights and switches between them.

Comes in: an opened model whose weights are placeholders. Goes out: the same model with trainable layers. Only
`adapter_files` knows which files an adapter has.
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
DEFAULT_NUM_LAYERS = 16  # mlx_lm.lora's default. mlx_lm.lora fails on a model with fewer blocks; here it means all
HEADS = ("lm_head", "output", "embed_out", "head", "ff_out", "output_layer")  # names of a head that is not tied


def attach(model: nn.Module, spec: AdapterSpec) -> list[str]:
    """Replace linear layers by LoRA or DoRA layers, with mlx-lm's `linear_to_lora_layers`.

    DoRA magnitudes (`m`) are computed from placeholders here, so the caller has to compute them from the weights.

    Returns:
        Notes for a person about keys that match fewer layers than they may seem to, a sentence each.
    Raises:
        ConfigError: an impossible value, or keys that match no layer.
    """
    from mlx_lm.tuner.utils import linear_to_lora_layers

    _check_spec(spec, len(model.layers))
    keys = spec.parameters.get("keys")
    before = {id(module) for module in model.modules()}
    notes = [] if keys is None else _check_keys(model, keys, spec.num_layers)
    try:
        linear_to_lora_layers(model, spec.num_layers, dict(spec.parameters), use_dora=spec.fine_tune_type == "dora")
    except (ValueError, KeyError) as e:
        raise ConfigError(f"LoRA cannot be attached: {e.args[0]}") from None
    if not any(id(module) not in before for module in model.modules()):
        raise ConfigError(f"LoRA keys {', '.join(keys or [])} match no layer of the last {spec.num_layers} blocks")
    return notes


def _check_spec(spec: AdapterSpec, n_layers: int) -> None:
    """Raises ConfigError if a value is impossible for a model of `n_layers` blocks."""
    p = spec.parameters
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


def _check_keys(model: nn.Module, keys: Sequence[str], num_layers: int) -> list[str]:
    """Notes about keys that only match in part. Raises ConfigError if one matches no layer of the model."""
    names = {name for layer in model.layers for name, _ in layer.named_modules()}
    names |= {name for name, _ in model.named_modules()}
    absent = sorted(set(keys) - names)
    if absent:
        linear = (nn.Linear, nn.QuantizedLinear, nn.Embedding, nn.QuantizedEmbedding, *_expert_classes())
        possible = sorted({n for layer in model.layers for n, m in layer.named_modules() if isinstance(m, linear)})
        raise ConfigError(
            f"LoRA keys {', '.join(absent)} match no layer of the model. Its blocks have: {', '.join(possible)}"
        )
    return _partly_matched(keys, model.layers[-num_layers:] if num_layers > 0 else model.layers)


def without_hidden_weights(
    model: nn.Module, spec: AdapterSpec, run: Callable[[], Any]
) -> tuple[AdapterSpec, list[str]]:
    """Remove adapters from layers whose weights the model's own code reads, as gemma3n's altup does to clip them.

    A LoRA layer has no such attribute, so with the adapter the model's call would fail.

    Args:
        run: calls the model.
    Returns:
        The spec of what is attached now, and notes about it for a person, a sentence each.
    Raises:
        ConfigError: `keys` names such a layer.
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
    """Notes about keys that only some of the trained blocks have, and about expert layers that no key names."""
    names = [{name for name, _ in block.named_modules()} for block in blocks]
    notes = []
    for key in keys:
        n = sum(key in names_in_block for names_in_block in names)
        if 0 < n < len(blocks):
            notes.append(f"{key} is trained in {n} of {len(blocks)} blocks: the others have no such layer")
    classes = _expert_classes()
    experts = sorted({name for block in blocks for name, layer in block.named_modules() if isinstance(layer, classes)})
    left_out = [name for name in experts if name not in keys]
    if left_out and len(left_out) < len(experts):
        notes.append(f"Of the experts' layers, {', '.join(left_out)} are not trained: LoRA keys name the others only")
    return notes


def _expert_classes() -> tuple[type, ...]:
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

    return SwitchLinear, QuantizedSwitchLinear


def load_weights(model: nn.Module, expected: dict[str, mx.array], file: Path) -> None:
    """Load adapter tensors, mlx-lm's or PEFT's, into the attached layers of a streamed model.

    Args:
        expected: the attached adapter's parameters, by name.
        file: may be the name that mlx-lm would use in a directory of PEFT's.
    Raises:
        AdapterError: the file cannot be read, or a tensor does not belong to the model; names it and both shapes.
        ConfigError: DoRA is on a layer outside the blocks, whose weights are not there to compute its norms.
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
        AdapterError: a tensor does not belong to the model; names it and both shapes.
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
    """Raises AdapterError if LoRA is on an embedding that is the head as well: PEFT adapts only the embedding then."""
    modules = dict(model.named_modules())
    tied = [name for name, m in modules.items() if hasattr(m, "lora_a") and "embedding" in m]
    if tied and not any(name.rpartition(".")[2] in HEADS for name in modules):
        raise AdapterError(
            f"{file}: {tied[0]} is the model's head as well, of which PEFT adapts the embedding alone and mlx-lm both. "
            "Merge the adapter into its base model with PEFT (merge_and_unload) and give the result as --model"
        )


class AdapterSwitch:
    """Switches a model to no adapter, or to another one, for a while.

    Adapters that are added by name wrap the model's own layers, whose weights come and go. They are not trained.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        # name of an adapter -> name of a layer in the model -> that layer with the adapter
        self._named: dict[str, dict[str, nn.Module]] = {}

    def add(self, name: str, directory: Path) -> None:
        """Load the adapter saved in `directory` under a name.

        Raises:
            AdapterError: the directory holds no adapter, or one of another model.
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
        """Names of the adapters that were added."""
        return list(self._named)

    def layers(self, name: str) -> dict[str, nn.Module]:
        """Name of a layer in the model -> that layer with the adapter that was added under `name`."""
        return dict(self._named[name])

    @contextmanager
    def using(self, adapter: bool | str, root: str = "") -> Iterator[None]:
        """Within this context, layers have the given adapter.

        Args:
            adapter: True for the one that is attached, False for none, or the name of one that was added.
            root: name of the module whose layers are switched, such as a block. Empty for the whole model.
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
            added = {path: m for path, m in self._named[adapter].items() if path.startswith(prefix)}
            before = {path: _without_adapter(m) for path, m in added.items()} | before
            now |= added
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
