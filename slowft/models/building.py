"""A model directory -> mlx-lm's own model object, by mlx-lm's own `load_model`, with arrays that were never read.

Comes in: a directory. Goes out: a `Built`. This is the one place that decides what a model is made of: which files,
which settings, whose code. mlx-lm is given a temporary directory with the model's small files only, whose config has
the settings where mlx-lm looks for them. The unevaluated weights are handed to the model's `sanitize`. Never evaluates
a weight, and never asks a question.
"""

import contextlib
import functools
import importlib.util
import inspect
import io
import json
import re
import struct
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from .. import platform
from ..errors import ModelError, printable
from ..weights.extents import Extent, Weights, find_weights
from ..weights.inside import is_inside
from .config import Classes, pass_on_rope, read_config
from .quantizers import method_of, quantizer
from .tying import settle_head

# Files that load_model reads besides config and weights.
BESIDE_CONFIG = ("generation_config.json", "hf_quant_config.json")
SCALES = re.compile(r"scale|absmax|SCB|qzeros")  # in the names of tensors that belong to packed weights


@dataclass
class Built:
    """mlx-lm's model with arrays that were never evaluated, and where they come from.

    Attributes:
        config: as `mlx_lm.utils.load_model` returns it.
        extents: where each tensor that is used lies, by its name in the files.
        raw: those tensors by name, as `sanitize` was given them.
        joins: id of an array that was joined from others along the first axis -> (that array, the others in order).
        sanitize: the model's own `sanitize`.
        notes: what a person should know about the files and the config, a sentence each.
    """

    model: nn.Module
    config: dict
    extents: dict[str, Extent]
    raw: dict[str, mx.array]
    joins: dict[int, tuple[mx.array, list[mx.array]]]
    sanitize: Callable[[dict[str, mx.array]], dict[str, mx.array]]
    notes: list[str] = field(default_factory=list)


def build_lazily(path: Path, mixin: type | None = None, trust_remote_code: bool = False) -> Built:
    """Build the model of `path` by mlx-lm's own `load_model`. With `mixin`, its class is a subclass of that as well.

    Args:
        trust_remote_code: the model's class may be Python code in its directory (`model_file` in config.json).
    Raises:
        ModelError: files are missing or truncated, the architecture is unknown, or the weights do not fit it.
    """
    weights = find_model_weights(path, trust_remote_code)
    return _build(path, weights.extents, mixin, trust_remote_code, weights.notes)


def find_model_weights(path: Path, trust_remote_code: bool = False) -> Weights:
    """Which files of a model directory are the model, and where its tensors lie.

    This is `find_weights`, which may have to try whether mlx-lm can build a model of some of the tensors.

    Raises:
        ModelError: as `find_weights` does.
    """

    def is_whole(extents: dict[str, Extent], lacking: Iterable[str]) -> bool:
        try:
            built = _build(path, extents, None, trust_remote_code, [])
        except ModelError:
            return False
        # some classes tie the head to the embedding where the files have none
        names = [name for name, _ in tree_flatten(built.model.parameters())]
        has_head = any("lm_head" in name for name in names) or _says_tied(built.config)
        return has_head or not any("lm_head" in name for name in lacking)

    return find_weights(path, is_whole)


def read_used_config(path: Path, trust_remote_code: bool = False) -> tuple[dict, dict[str, Extent]]:
    """The config of a model directory as mlx-lm is given it, and where each tensor that is used lies.

    Raises:
        ModelError: as `build_lazily` does.
    """
    weights = find_model_weights(path, trust_remote_code)
    config = read_config(path)
    classes = find_classes(path, config, trust_remote_code)
    config, dropped, _ = _settle(path, config, weights.extents, classes)
    return config, {name: e for name, e in weights.extents.items() if name not in dropped}


def settle_config(path: Path, config: dict, classes: Classes) -> tuple[dict, list[str]]:
    """`config` as mlx-lm is given it, for a model whose tensors are not here, and notes about it for a person.

    Raises:
        ModelError: mlx-lm's class has no place for a setting.
    """
    config, _, notes = _settle(path, config, {}, classes)
    return config, notes


def _says_tied(config: dict) -> bool:
    return ((config.get("text_config") or {}) | config).get("tie_word_embeddings") is True


def _settle(
    path: Path, config: dict, extents: dict[str, Extent], classes: Classes
) -> tuple[dict, list[str], list[str]]:
    """(The config as mlx-lm is given it, the names of tensors that are not used, notes for a person about both)."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            classes(config)
    except (Exception, SystemExit):  # mlx-lm does not know the architecture, or lacks a package: `_build` says so
        return config, [], []
    config, notes = pass_on_rope(path, config, classes)
    config, dropped, head_notes = settle_head(path, config, classes, extents)
    return config, dropped, notes + head_notes


def find_classes(path: Path, config: dict, trust_remote_code: bool, code: Path | None = None) -> Classes:
    """A function from a config to the classes of model and arguments: mlx-lm's own, or from the model's own code.

    Args:
        code: the directory that the model's own code lies in; None means `path`.
    Raises:
        ModelError: the model has code of its own, which is not trusted, cannot be run or lies outside the directory.
    """
    from mlx_lm.utils import load_model

    model_file = config.get("model_file")
    if model_file is None:
        find = inspect.signature(load_model).parameters["get_model_classes"].default
        return lambda config: find(config=config)
    if not is_inside(model_file):
        raise ModelError(
            f"{path / 'config.json'}: its model_file, {ascii(model_file)[:100]}, is no file inside the model's "
            "directory. Put the code there"
        )
    if not trust_remote_code:
        raise ModelError(
            f"{path / 'config.json'} wants to run code of its own ({model_file}, its model_file). Read it, "
            "and if you trust it: --trust-remote-code"
        )
    file = (code or path) / model_file
    spec = importlib.util.spec_from_file_location("custom_model", file)
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        model_and_args = module.Model, module.ModelArgs
        return lambda config: model_and_args
    except Exception as e:
        raise ModelError(f"{file}: the model's own code fails: {_first_line(e)}") from None


def _build(path: Path, extents: dict[str, Extent], mixin: type | None, trust: bool, notes: list[str]) -> Built:
    from mlx_lm.utils import load_model

    config = read_config(path)
    classes = find_classes(path, config, trust)
    config, dropped, config_notes = _settle(path, config, extents, classes)
    extents = {name: extent for name, extent in extents.items() if name not in dropped}
    raw: dict[str, mx.array] = {}
    joins: dict[int, tuple[mx.array, list[mx.array]]] = {}
    floating: dict[str, type] = {}  # floating-point parameters before anything is loaded -> their module's class

    def streamed_classes(config: dict):
        model_class, args_class = classes(config)

        class Streamed(*([mixin] if mixin else []), model_class):
            def __init__(self, args):
                nn.Module.__init__(self)  # mlx-lm's recurrent_gemma does not call it, and then cannot be frozen
                super().__init__(args)
                floating.update(_floating_parameters(self))

            def sanitize(self, weights):
                raw.update(_load(extents))
                weights = dict(raw)
                if not hasattr(model_class, "sanitize"):
                    return weights
                with _joins_noted(joins):
                    return super().sanitize(weights)

        Streamed.__name__ = Streamed.__qualname__ = f"Streamed{model_class.__name__}"
        return Streamed, args_class

    printed = io.StringIO()  # mlx-lm may print, and our standard output may have to be one JSON object
    with _small_files(path, config) as small:
        try:
            with contextlib.redirect_stdout(printed):
                model, loaded = load_model(small, lazy=True, get_model_classes=streamed_classes)
        except SystemExit:  # mlx-lm's olmo exits if its package is not installed
            reason = " ".join(printed.getvalue().split()) or "it does not say which"
            raise ModelError(
                f"{path}: mlx-lm cannot build this model without a package that is not installed: {reason}"
            ) from None
        except Exception as e:
            if raw and (who := quantizer(config, extents)):
                raise ModelError(_quantized_by(path, who, config, e)) from None
            raise ModelError(_explain(e, path).replace(str(small), str(path))) from None
    _refuse_integers(path, model, floating, raw, joins, extents, config)
    if (model_file := config.get("model_file")) is not None:
        loaded["model_file"] = model_file
    own_sanitize = getattr(type(model).__bases__[-1], "sanitize", None)
    sanitize = functools.partial(own_sanitize, model) if own_sanitize else dict
    return Built(model, loaded, extents, raw, joins, sanitize, notes + config_notes)


def _load(extents: dict[str, Extent]) -> dict[str, mx.array]:
    """The tensors, none of them read: MLX has all of the files open until the last tensor is gone."""
    platform.allow_open_files()
    by_file: dict[str, list[str]] = {}
    for name, extent in extents.items():
        by_file.setdefault(extent.file, []).append(name)
    raw = {}
    for file, names in by_file.items():
        arrays = mx.load(file, format="safetensors")
        raw |= {name: arrays[name] for name in names}
    return raw


@contextmanager
def _small_files(path: Path, config: dict) -> Iterator[Path]:
    """A temporary directory with the files that `load_model` reads, and no tensor in its `model.safetensors`."""
    with tempfile.TemporaryDirectory(prefix="slowft-model-") as temporary:
        directory = Path(temporary)
        (directory / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "model_file"}))
        for name in BESIDE_CONFIG:
            if (path / name).exists():
                (directory / name).write_bytes((path / name).read_bytes())
        empty = b"{}      "
        (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(empty)) + empty)
        yield directory


# --- Weights that are not what the model takes --------------------------------------------------------


def _floating_parameters(model: nn.Module) -> dict[str, type]:
    modules = dict(model.named_modules())
    return {
        name: type(modules.get(name.rpartition(".")[0]))
        for name, array in tree_flatten(model.parameters())
        if mx.issubdtype(array.dtype, mx.floating)
    }


def _refuse_integers(path: Path, model, floating: dict[str, type], raw, joins, extents, config: dict) -> None:
    """Refuse a floating-point parameter whose tensor holds integers or 8-bit floats: its bytes are not its values.

    Packed weights are not refused: either their layer was replaced by a quantized one, or their scales lie beside them
    and `sanitize` used those.
    """
    modules = dict(model.named_modules())
    name_in_file = {id(array): name for name, array in raw.items()}
    scaled = {re.split(r"[._]?\w*(?:scale|absmax|SCB|qzeros)", name)[0] for name in raw if SCALES.search(name)}
    for name, array in tree_flatten(model.parameters()):
        if name not in floating or type(modules.get(name.rpartition(".")[0])) is not floating[name]:
            continue
        source = name_in_file.get(id(array))
        if source is None and id(array) in joins:
            source = name_in_file.get(id(joins[id(array)][1][0]))
        if source is None:
            alike = [n for n in raw if n == name or n.endswith(f".{name}") or name.endswith(f".{n}")]
            source = alike[0] if alike and not _has_scales(alike[0], scaled) else None
        stored = extents[source].stored if source else ""
        if mx.issubdtype(array.dtype, mx.floating) and (not stored or stored in ("F32", "F16", "BF16")):
            continue
        if (who := quantizer(config, extents)) is not None:
            raise ModelError(_quantized_by(path, who, config, None))
        raise ModelError(
            f"{path}: tensor {source or name} is stored as {stored or array.dtype} without scales, and the model takes "
            "floating-point numbers: its bytes are no weights. Take the 16-bit model"
        )


def _has_scales(tensor: str, scaled: set[str]) -> bool:
    layer = tensor.rpartition(".")[0]
    return layer in scaled or tensor in scaled


def _quantized_by(path: Path, who: str, config: dict, error: Exception | None) -> str:
    reason = _first_line(error) if isinstance(error, ValueError) else ""  # other errors say nothing to a user
    is_known = (method_of(config) or {}).get("quant_method") in ("awq", "gptq", "fp8", "modelopt", "compressed-tensors")
    shown = f" ({reason})" if is_known and reason and not reason.startswith(("Received", "Missing", "'")) else ""
    return f"{path} is quantized by {who}, which mlx-lm cannot read{shown}. Take the 16-bit model"


@contextmanager
def _joins_noted(joins: dict[int, tuple[mx.array, list[mx.array]]]) -> Iterator[None]:
    """Record what `mx.stack` and `mx.concatenate` join along the first axis: MLX cannot tell a lazy array's inputs."""
    functions = {"stack": mx.stack, "concatenate": mx.concatenate}

    def noting(function):
        def join(arrays, axis=0, **kwargs):
            arrays = list(arrays)
            joined = function(arrays, axis, **kwargs)
            if axis == 0:
                joins[id(joined)] = joined, arrays  # the array is kept, so that no other one gets its id
            return joined

        return join

    try:
        for name, function in functions.items():
            setattr(mx, name, noting(function))
        yield
    finally:
        for name, function in functions.items():
            setattr(mx, name, function)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__


def _explain(error: Exception, path: Path) -> str:
    from mlx_lm import __version__ as mlx_lm_version

    lines = [printable(line.strip()) for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    reason = lines[0]
    if isinstance(error, KeyError) and reason.strip("'\"") == "model_type":
        return f"{path / 'config.json'} names no model_type"
    if "not supported" in reason:
        return f"{path}: {reason} mlx-lm {mlx_lm_version} does not know it: pip install -U mlx-lm may bring it"
    if len(lines) > 1:
        reason += f" {lines[1]}" + (f" (and {len(lines) - 2} more)" if len(lines) > 2 else "")
    return f"{path}: mlx-lm cannot build this model: {reason}"
