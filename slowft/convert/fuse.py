"""Fuses an adapter into its base model: writes a directory that mlx-lm loads, in little memory.

Comes in: a model directory and an adapter, mlx-lm's or PEFT's. Goes out: the model with the adapter's products added to
its weights. Each tensor has the same bits as what `mlx_lm.fuse` writes. The directory is written as by `prepare`, with
a file for each block and checksums, and a killed run can be continued. The arithmetic is that of mlx-lm's own layers
(`fuse` of LoRALinear, DoRALinear and so on), on some of their rows at a time.

The bits are the same if both use the same BLAS (on Linux slowft loads OpenBLAS, and `mlx_lm.fuse` by itself does not)
and if products are computed whole, which takes 16 bytes for each element of the largest weight: `--memory` may be too
little for that. Otherwise float32 differs in the last bits on a CPU, and few of these survive the rounding to 16 bits.
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
from .conversion import Conversion
from .output import refuse_unusable
from .parts import Change, RowWise
from .writing import write_model

BASE = ("weight", "scales", "biases")  # the arrays of a layer that its weight is computed from


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
        adapter_path: the directory of a LoRA or DoRA adapter, mlx-lm's (and slowft's) or PEFT's.
        dequantize: write all weights of a quantized model unquantized. Otherwise fused layers are quantized again.
        output, memory, trust_remote_code, progress, note: as in `prepare`.
    Returns:
        The output directory.
    Raises:
        AdapterError: there is no adapter, or it belongs to another model.
        ConfigError: memory is too little; names the least that would do.
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
    """The transform of a `Conversion` that makes an adapter part of the weights."""

    adapter: Adapter
    dequantize: bool
    command, doing = "fuse", "fusing"

    def identity(self) -> dict:
        """What must be the same if an unfinished output is to be continued."""
        file = self.adapter.file
        stat = file.stat()
        adapter = {"file": str(file.resolve()), "nbytes": stat.st_size, "changed": stat.st_mtime_ns}
        return {"adapter": adapter | self.adapter.spec.as_config(), "dequantize": self.dequantize}

    def change(self, model: nn.Module, config: dict, path: Path) -> Change:
        """Change the model as `mlx_lm.fuse` does, unevaluated."""
        attach(model, self.adapter.spec)
        attached = {name: layer for name, layer in model.named_modules() if hasattr(layer, "lora_a")}
        expected = {f"{n}.{k}": a for n, layer in attached.items() for k, a in layer.items() if isinstance(a, mx.array)}
        put_weights(model, expected, self.adapter.weights, self.adapter.file)
        self.adapter.weights.clear()  # from here on only the layers have them, and free them once written
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
                extra_nbytes=2 * sum(array.nbytes for array in _adapter_arrays(layer).values()),
            )
            if hasattr(base, "bits") and not self.dequantize:
                quantized.append(name)
        model.update_modules(tree_unflatten([(n, m.fuse(dequantize=self.dequantize)) for n, m in attached.items()]))
        if self.dequantize:
            row_wise |= _dequantize(model)
            config = {key: value for key, value in config.items() if key not in ("quantization", "quantization_config")}
        targets = {name: array.dtype for name, array in tree_flatten(model.parameters())}
        modules = dict(model.named_modules())
        targets |= {f"{name}.weight": row_wise[f"{name}.weight"].dtype for name in quantized}
        return Change(config, targets, {n: modules[n] for n in quantized}, row_wise, (self.adapter.file,))


def _dequantize(model: nn.Module) -> dict[str, RowWise]:
    """Dequantize the layers that are still quantized, unevaluated. Returns how their weights are computed, by name."""
    from mlx_lm.utils import dequantize_model

    quantized = {name: layer for name, layer in model.named_modules() if hasattr(layer, "bits")}
    dequantize_model(model)
    row_wise = {}
    for name, layer in model.named_modules():
        if hasattr(layer, "bits"):
            raise ModelError(f"mlx-lm cannot dequantize {name} ({type(layer).__name__}). Leave out --dequantize")
        if (before := quantized.get(name)) is not None:
            _refuse_scaled_experts(name, before)
            weight = layer.weight
            row_wise[f"{name}.weight"] = RowWise(weight.shape, weight.dtype, _arrays(before), _dequantizing(before))
    return row_wise


def _base(layer: nn.Module) -> nn.Module:
    return layer["linear"] if "linear" in layer else layer["embedding"]


def _arrays(base: nn.Module) -> dict[str, mx.array]:
    return {key: base[key] for key in BASE if base.get(key) is not None}


def _adapter_arrays(layer: nn.Module) -> dict[str, mx.array]:
    """The adapter's arrays in a layer."""
    return {key: array for key, array in layer.items() if isinstance(array, mx.array)}


def _refuse_unfusable(name: str, layer: nn.Module) -> None:
    """Raises where mlx-lm cannot fuse, or its result would not compute what the model with the adapter does."""
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
    """A function that makes some rows of a fused weight from the same rows of the layer's arrays: `RowWise.compute`.

    It runs mlx-lm's own `fuse` on a layer that has only these rows.
    """
    from mlx_lm.tuner.dora import DoRAEmbedding
    from mlx_lm.tuner.lora import LoRAEmbedding, LoRASwitchLinear

    is_embedding = isinstance(layer, (LoRAEmbedding, DoRAEmbedding))
    is_switch = isinstance(layer, LoRASwitchLinear)
    adapter = _adapter_arrays(layer)
    layer, base = copy.copy(layer), copy.copy(_base(layer))
    for key in (*adapter, "linear", "embedding"):
        layer.pop(key, None)
    for key in (*BASE, "bias"):
        base.pop(key, None)

    def compute(arrays: dict[str, mx.array], entries: slice, rows: slice) -> mx.array:
        a, b = adapter["lora_a"], adapter["lora_b"]
        if is_switch:
            adapter_rows = {"lora_a": a[entries], "lora_b": b[entries, rows]}
        else:
            adapter_rows = {"lora_a": a[rows], "lora_b": b} if is_embedding else {"lora_a": a, "lora_b": b[:, rows]}
        if "m" in adapter:
            adapter_rows["m"] = adapter["m"][rows]
        piece, piece_base = copy.copy(layer), copy.copy(base)
        for key, array in arrays.items():
            piece_base[key] = array
        piece["embedding" if is_embedding else "linear"] = piece_base
        for (
            key,
            array,
        ) in adapter_rows.items():  # contiguous like the whole, so that BLAS is called in the same way
            piece[key] = mx.contiguous(array)
        return piece.fuse(dequantize=True).weight

    return compute


def _dequantizing(layer: nn.Module) -> Callable[[dict[str, mx.array], slice, slice], mx.array]:
    """The same for a quantized layer's weight, as `mlx_lm.utils.dequantize_model` computes it."""
    group_size, bits, mode = layer.group_size, layer.bits, layer.mode

    def compute(arrays: dict[str, mx.array], entries: slice, rows: slice) -> mx.array:
        return mx.dequantize(arrays["weight"], arrays["scales"], arrays.get("biases"), group_size, bits, mode)

    return compute
