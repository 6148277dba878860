"""An adapter into its base model: a directory that mlx-lm loads, as `mlx_lm.fuse` would write it, within little memory.

Comes in: a model directory and an adapter, mlx-lm's or PEFT's. Goes out: the model with the adapter's products added to
its weights, equal to what `mlx_lm.fuse` writes tensor by tensor, bit by bit. Written as `prepare` writes: a file for
each block, checksums, resumable. The arithmetic is that of mlx-lm's own layers (`fuse` of LoRALinear, DoRALinear and so
on), on some of their rows at a time.

Bits are those of one and the same BLAS, and of products that are computed whole, which `--memory` may have no room for
(16 bytes for each element of the largest weight). Others differ in the last bits of float32 on a CPU, of which few
survive the rounding to 16 bits. On Linux slowft loads OpenBLAS, and `mlx_lm.fuse` by itself does not.
"""

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from .. import platform
from ..errors import AdapterError, ConfigError, ModelError, SlowftWarning
from ..models.adapter_files import Adapter, read_adapter
from ..models.adapters import attach, put_weights
from ..models.loading import resolve
from ..sizes import parse_nbytes
from . import verify as manifest
from .conversion import Change, Conversion, RowWise
from .prepare import refuse_unusable, write_model

BASE = ("weight", "scales", "biases")  # arrays of a layer that its rows are computed from


def fuse(
    model_path: str | Path,
    adapter_path: str | Path,
    output: str | Path,
    *,
    dequantize: bool = False,
    memory: str | int | None = None,
    trust_remote_code: bool = False,
    progress: manifest.Progress | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> Path:
    """Write the model with an adapter fused into its weights, as `mlx_lm.fuse` would.

    Args:
        model_path: the base model: a directory that mlx-lm loads, or a hub id, which is downloaded.
        adapter_path: directory of a LoRA or DoRA adapter, mlx-lm's (and slowft's) or PEFT's.
        output: a directory that is not there yet, is empty, or holds an unfinished run with the same arguments, which
            is gone on with.
        dequantize: of a quantized model, write all weights unquantized; else fused layers are quantized anew.
        memory: such as "2GB" (or bytes): a ceiling for the whole process. None: half of this machine's.
        trust_remote_code: let the model run code of its own (`model_file` in its config.json).
        progress: told (bytes done, bytes in all).
        note: told of what a user should know, such as that an earlier run is gone on with.
    Returns:
        The output directory.
    Raises:
        AdapterError: no adapter, or not of this model.
        ConfigError: too little memory; names the least.
        ModelError: the model is incomplete, of an unknown architecture, or becomes NaN or infinity.
        SlowftError: the output cannot be written, or its disk has too little room; names both numbers.
    """
    platform.fix_malloc_threshold()
    limit = platform.memory_limit() // 2 if memory is None else parse_nbytes(memory)
    output, adapter_path = Path(output).expanduser(), Path(adapter_path).expanduser()
    refuse_unusable(output)
    path = resolve(str(model_path))
    for given, what in ((path, "model"), (adapter_path, "adapter")):
        if output.resolve() == given.resolve():
            raise ConfigError(f"--save-path {output} is the {what} itself. Give another directory")
    conversion = Conversion(path, Fusion(read_adapter(adapter_path), dequantize), trust_remote_code)
    for text in conversion.notes:
        warnings.warn(text, SlowftWarning, stacklevel=2)
    write_model(conversion, output, limit, progress, note)
    return output


@dataclass
class Fusion:
    """What `Conversion` does to a model: an adapter becomes part of its weights."""

    adapter: Adapter
    dequantize: bool
    command, doing = "fuse", "fusing"

    def identity(self) -> dict:
        file = self.adapter.file
        stat = file.stat()
        adapter = {"file": str(file.resolve()), "nbytes": stat.st_size, "changed": stat.st_mtime_ns}
        return {"adapter": adapter | self.adapter.spec.as_config(), "dequantize": self.dequantize}

    def change(self, model: nn.Module, config: dict, path: Path) -> Change:
        """Do as `mlx_lm.fuse` does, unevaluated."""
        from mlx_lm.utils import dequantize_model

        attach(model, self.adapter.spec)
        attached = {name: layer for name, layer in model.named_modules() if hasattr(layer, "lora_a")}
        expected = {f"{n}.{k}": a for n, layer in attached.items() for k, a in layer.items() if isinstance(a, mx.array)}
        put_weights(model, expected, self.adapter.weights, self.adapter.file)
        self.adapter.weights.clear()  # each layer has its own from here on, and lets go of them once it is written
        row_wise, quantized = {}, []
        for name, layer in attached.items():
            _refuse_unfusable(name, layer)
            base = _base(layer)
            fused = layer.fuse(dequantize=True).weight
            row_wise[f"{name}.weight"] = RowWise(
                fused.shape,
                fused.dtype,
                _arrays(base),
                _fusing(layer),
                is_product=True,
                held_nbytes=2 * sum(array.nbytes for array in _own(layer).values()),
            )
            if hasattr(base, "bits") and not self.dequantize:
                quantized.append(name)
        model.update_modules(tree_unflatten([(n, m.fuse(dequantize=self.dequantize)) for n, m in attached.items()]))
        if self.dequantize:
            packed = {name: layer for name, layer in model.named_modules() if hasattr(layer, "bits")}
            dequantize_model(model)
            for name, layer in model.named_modules():
                if hasattr(layer, "bits"):
                    raise ModelError(
                        f"mlx-lm cannot dequantize {name} ({type(layer).__name__}). Leave out --dequantize"
                    )
                if name in packed:
                    weight = layer.weight
                    _refuse_scaled_experts(name, packed[name])
                    row_wise[f"{name}.weight"] = RowWise(
                        weight.shape, weight.dtype, _arrays(packed[name]), _dequantizing(packed[name])
                    )
            config = {key: value for key, value in config.items() if key not in ("quantization", "quantization_config")}
        targets = {name: array.dtype for name, array in tree_flatten(model.parameters())}
        modules = dict(model.named_modules())
        for name in quantized:
            targets[f"{name}.weight"] = row_wise[f"{name}.weight"].dtype
        return Change(config, targets, {n: modules[n] for n in quantized}, row_wise, (self.adapter.file,))


def _base(layer: nn.Module) -> nn.Module:
    return layer["linear"] if "linear" in layer else layer["embedding"]


def _arrays(base: nn.Module) -> dict[str, mx.array]:
    return {key: base[key] for key in BASE if base.get(key) is not None}


def _own(layer: nn.Module) -> dict[str, mx.array]:
    """The adapter's arrays in a layer."""
    return {key: array for key, array in layer.items() if isinstance(array, mx.array)}


def _refuse_unfusable(name: str, layer: nn.Module) -> None:
    """Raises where mlx-lm's arithmetic gives something else than the model with its adapter, or nothing."""
    from mlx_lm.tuner.dora import DoRAEmbedding, DoRALinear
    from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear, LoRASwitchLinear

    if not isinstance(layer, (LoRALinear, LoRASwitchLinear, LoRAEmbedding, DoRALinear, DoRAEmbedding)):
        raise ModelError(
            f"{name} has an adapter of the model's own kind ({type(layer).__name__}), which cannot be fused"
        )
    _refuse_scaled_experts(name, _base(layer))
    if isinstance(layer, DoRAEmbedding) and hasattr(_base(layer), "bits"):
        raise AdapterError(
            f"{name} is a quantized embedding with DoRA, which mlx-lm cannot fuse. Fuse the 16-bit model"
        )


def _refuse_scaled_experts(name: str, base: nn.Module) -> None:
    if base.get("global_scale") is not None:
        raise ModelError(f"{name} has a scale for each expert, which mlx_lm.fuse leaves out. Fuse the 16-bit model")


def _fusing(layer: nn.Module) -> Callable[[dict[str, mx.array], slice, slice], mx.array]:
    """Some rows of a layer's arrays -> of its fused weight, by mlx-lm's own `fuse`, on a layer that has only those."""
    from mlx_lm.tuner.dora import DoRAEmbedding
    from mlx_lm.tuner.lora import LoRAEmbedding, LoRASwitchLinear

    is_embedding = isinstance(layer, (LoRAEmbedding, DoRAEmbedding))
    is_switch = isinstance(layer, LoRASwitchLinear)
    own = _own(layer)
    layer, base = copy.copy(layer), copy.copy(_base(layer))
    for key in (*own, "linear", "embedding"):
        layer.pop(key, None)
    for key in (*BASE, "bias"):
        base.pop(key, None)

    def compute(arrays: dict[str, mx.array], entries: slice, rows: slice) -> mx.array:
        a, b = own["lora_a"], own["lora_b"]
        if is_switch:
            of_rows = {"lora_a": a[entries], "lora_b": b[entries, rows]}
        else:
            of_rows = {"lora_a": a[rows], "lora_b": b} if is_embedding else {"lora_a": a, "lora_b": b[:, rows]}
        if "m" in own:
            of_rows["m"] = own["m"][rows]
        piece, of_base = copy.copy(layer), copy.copy(base)
        for key, array in arrays.items():
            of_base[key] = array
        piece["embedding" if is_embedding else "linear"] = of_base
        for key, array in of_rows.items():  # laid out as the whole is, so that BLAS is called the same way
            piece[key] = mx.contiguous(array)
        return piece.fuse(dequantize=True).weight

    return compute


def _dequantizing(layer: nn.Module) -> Callable[[dict[str, mx.array], slice, slice], mx.array]:
    """Some rows of a quantized layer's arrays -> of its weight, as `mlx_lm.utils.dequantize_model` computes it."""
    group_size, bits, mode = layer.group_size, layer.bits, layer.mode

    def compute(arrays: dict[str, mx.array], entries: slice, rows: slice) -> mx.array:
        return mx.dequantize(arrays["weight"], arrays["scales"], arrays.get("biases"), group_size, bits, mode)

    return compute
