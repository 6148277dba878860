"""How `prepare` changes a model: it casts the parameters and quantizes the layers, as `mlx_lm.convert` does."""

import contextlib
import dataclasses
import io
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map_with_path

from ..errors import ConfigError
from .parts import Change

MODES = ("affine", "mxfp4", "nvfp4", "mxfp8")


@dataclass(frozen=True)
class Options:
    """How the tensors are to be written. Names and meanings are those of `mlx_lm.convert`."""

    quantize: bool = False
    bits: int | None = None
    group_size: int | None = None
    mode: str = "affine"
    quant_predicate: str | None = None
    dtype: str | None = None

    command, doing = "prepare", "preparing"

    def identity(self) -> dict:
        """What must be the same if an unfinished output is to be continued."""
        return dataclasses.asdict(self)

    def change(self, model: nn.Module, config: dict, path: Path) -> Change:
        """Cast and quantize the model of the directory `path`, unevaluated. Raises what mlx-lm raises if it cannot."""
        _cast(model, config, self)
        targets = {name: array.dtype for name, array in tree_flatten(model.parameters())}
        before = dict(model.named_modules())
        if self.quantize:
            config = _quantize(model, config, self)
        quantized = {
            name: layer
            for name, layer in model.named_modules()
            if type(layer) in _row_quantized() and before.get(name) is not layer and layer.get("global_scale") is None
        }
        if self.quantize and not quantized:
            raise ConfigError(
                f"--quantize has no effect: {path} is quantized already, or has no layer that can be. "
                "Leave it out, or give the 16-bit model"
            )
        return Change(config, targets, quantized)

    def check(self) -> None:
        """Raises ConfigError if the options contradict each other, or MLX cannot quantize like this."""
        from mlx_lm.convert import MODEL_CONVERSION_DTYPES, QUANT_RECIPES

        if not self.quantize:
            given = {"--bits": self.bits, "--group-size": self.group_size, "--quant-predicate": self.quant_predicate}
            given["--mode"] = None if self.mode == "affine" else self.mode
            for name, value in given.items():
                if value is not None:
                    raise ConfigError(f"{name} {value} has no effect without --quantize. Add --quantize")
        for name, value, choices in (
            ("mode", self.mode, MODES),
            ("quant-predicate", self.quant_predicate, (None, *QUANT_RECIPES)),
            ("dtype", self.dtype, (None, *MODEL_CONVERSION_DTYPES)),
        ):
            if value not in choices:
                raise ConfigError(f"--{name} {value} is not one of {', '.join(filter(None, choices))}")
        if self.quant_predicate and self.mode != "affine":
            raise ConfigError(f"--quant-predicate {self.quant_predicate} goes with --mode affine, not {self.mode}")
        if self.quant_predicate and self.bits is not None:
            raise ConfigError(f"--bits {self.bits} has no effect with --quant-predicate, which says the bits. Drop one")
        for name, value in (("bits", self.bits), ("group-size", self.group_size)):
            if value is not None and value < 1:
                raise ConfigError(f"--{name} must be at least 1, got {value}")
        if self.quantize:
            try:
                mx.quantize(mx.zeros((1, 32 * (self.group_size or 64))), self.group_size, self.bits, mode=self.mode)
            except ValueError as e:
                reason = str(e).removeprefix("[quantize] ")
                raise ConfigError(f"MLX cannot quantize so: {reason} Change --bits, --group-size, --mode") from None


def _cast(model: nn.Module, config: dict, options: Options) -> None:
    """Cast the parameters, unevaluated, as `mlx_lm.convert` does."""
    from mlx_lm.convert import MODEL_CONVERSION_DTYPES

    name = options.dtype or config.get("torch_dtype") or (config.get("text_config") or {}).get("dtype")
    if name not in MODEL_CONVERSION_DTYPES:
        return
    dtype, is_cast = getattr(mx, name), getattr(model, "cast_predicate", lambda _: True)

    def cast(key: str, array: mx.array) -> mx.array:
        return array.astype(dtype) if is_cast(key) and mx.issubdtype(array.dtype, mx.floating) else array

    model.update(tree_map_with_path(cast, model.parameters()))


def _quantize(model: nn.Module, config: dict, options: Options) -> dict:
    """Quantize the layers, unevaluated, with mlx-lm's own code. Returns the new config."""
    from mlx_lm.convert import mixed_quant_predicate_builder
    from mlx_lm.utils import quantize_model

    predicate = None
    if options.quant_predicate:
        predicate = mixed_quant_predicate_builder(options.quant_predicate, model, options.group_size)
    with contextlib.redirect_stdout(io.StringIO()):
        _, config = quantize_model(
            model, config, options.group_size, options.bits, mode=options.mode, quant_predicate=predicate
        )
    return config


def _row_quantized() -> tuple[type, ...]:
    """The quantized layers whose arrays are `mx.quantize` of the weight, row by row."""
    from mlx_lm.models.mla import QuantizedMultiLinear
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear

    return nn.QuantizedLinear, nn.QuantizedEmbedding, QuantizedSwitchLinear, QuantizedMultiLinear
