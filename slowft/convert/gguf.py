"""A GGUF file -> an ordinary mlx-lm model directory, weights repacked exactly, tokenizer included.

Comes in: a file of one of `gguf_architectures.ARCHITECTURES`, of any size. Goes out: config.json, model.safetensors,
tokenizer files, put in place all at once. Tensors pass through a piece at a time; no more is ever in memory.

No value changes: a block of Q4_0, Q4_1, Q5_0, Q5_1 or Q8_0 is an affine group of 32 in MLX, one of MXFP4 is MLX's
own, and F32, F16 and BF16 stay what they are. (`mx.load` reads a whole file into memory, and BF16 as float16.)
Only Q6_K, in which llama.cpp keeps the output matrix of its Q4_0 files, has groups of 16, and becomes float16.
"""

import errno
import json
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ModelError, SlowftError, printable, reason_of
from ..models.config import check_depth
from ..models.tokenizer import write_gguf_tokenizer
from ..weights.extents import DTYPES
from ..weights.tensorfile import Tensor, TensorFile
from ..weights.transfers import RequestError, opened, read_all
from .gguf_architectures import ROPE_TABLES, Place, make_config, place
from .gguf_blocks import AFFINE_BITS, GROUP_SIZE, narrow, repack, widen
from .gguf_file import Gguf, GgufTensor, read_gguf

PIECE_NBYTES = 4 << 20
PLAIN_DTYPES = {"F16": "F16", "BF16": "BF16", "Q6_K": "F16"}  # safetensors types

Progress = Callable[[int, int], None]  # (bytes done, bytes in all)


@dataclass(frozen=True)
class Output:
    """One array of the safetensors file."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype][1]


@dataclass(frozen=True)
class Weight:
    """A tensor of the file and what it becomes: `outputs` by part ("weight", "scales", "biases"; "" if plain)."""

    source: GgufTensor
    outputs: dict[str, Output]
    n_heads: int = 0
    offset: float = 0.0


def convert(
    file: str | Path,
    directory: Path,
    progress: Progress | None = None,
    finish: Callable[[Path], None] = lambda whole: None,
) -> None:
    """Write the mlx-lm model directory of a GGUF file (of a split model, the first file).

    Args:
        progress: told (bytes written, bytes in all).
        finish: is called with where all files are, before they are put in their place.
    Raises:
        ModelError: not a whole GGUF file, or an architecture, tensor or tokenizer that cannot be converted.
        SlowftError: `directory` is there already, or cannot be written.
    """
    gguf = read_gguf(file)
    if (kind := gguf.metadata.get("general.type", "model")) != "model":
        what = "a LoRA adapter" if kind == "adapter" else f"a file of the kind {kind}"
        raise ModelError(f"{file} is {what} in GGUF, not a model. Give the model it belongs to")
    with _whole(gguf):
        config = make_config(gguf)
        check_depth(gguf.file, config)
        weights = plan_weights(gguf, config)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise SlowftError(f"{directory} is there already. Name another directory, or delete it")
    temporary = directory.with_name(f".{directory.name}.partial")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        _check_space(temporary, weights)
        with _whole(gguf):
            config |= write_gguf_tokenizer(gguf, config["vocab_size"], temporary)
        config |= _quantization(weights)
        (temporary / "config.json").write_text(json.dumps(config, indent=4, sort_keys=True) + "\n")
        _write(temporary / "model.safetensors", weights, progress)
        finish(temporary)
        temporary.rename(directory)
    except OSError as e:
        takes = f". The model takes {_nbytes(weights) / 1e6:,.1f} MB: make room" if e.errno == errno.ENOSPC else ""
        raise SlowftError(f"{directory} cannot be written: {reason_of(e)}{takes}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _whole(gguf: Gguf) -> Iterator[None]:
    """Metadata may be of any kind and tensors of any name: what cannot be made sense of is named as the file's fault.

    Raises:
        ModelError: that.
    """
    try:
        yield
    except (SlowftError, OSError) as e:
        if not isinstance(e, ModelError) or str(e).isprintable():
            raise
        raise ModelError(printable(str(e))) from None
    except Exception as e:  # a text for a number, no layers, a block without a number
        said = printable(f"{type(e).__name__}: {e}".splitlines()[0])
        raise ModelError(
            f"{gguf.file} is damaged, or of a kind that is not known ({said}). Download it again"
        ) from None


def _nbytes(weights: list[Weight]) -> int:
    return sum(o.nbytes for w in weights for o in w.outputs.values())


def _check_space(directory: Path, weights: list[Weight]) -> None:
    needed, free = _nbytes(weights), shutil.disk_usage(directory).free
    if needed > free:
        raise SlowftError(f"the model takes {needed / 1e9:.2f} GB, and {directory.parent} has {free / 1e9:.2f} GB free")


# --- What becomes of each tensor -----------------------------------------------------------------------


def plan_weights(gguf: Gguf, config: dict[str, Any]) -> list[Weight]:
    """What is written, in the order in which the model uses it.

    Raises:
        ModelError: mlx-lm's model has other parameters than the file has tensors, or of other shapes.
    """
    tensors = sorted((t for t in gguf.tensors.values() if t.name not in ROPE_TABLES), key=_visit_order)
    places = [place(gguf, t.name, config) for t in tensors]
    shapes = _parameter_shapes(gguf, config, [p.name for p in places])
    dtypes = PLAIN_DTYPES | {"F32": _dtype_of_float32(tensors, places)}
    weights = []
    for t, there in zip(tensors, places):
        if there.name not in shapes:
            raise ModelError(f"{gguf.file}: mlx-lm's {config['model_type']} has no {there.name}, for tensor {t.name}")
        shape = shapes.pop(there.name)
        if [n for n in shape if n > 1] != [n for n in t.shape if n > 1]:
            raise ModelError(
                f"{gguf.file}: tensor {t.name} has shape {t.shape}, mlx-lm's {there.name} would have {shape}: the "
                "metadata is of another model, or of one that mlx-lm has otherwise"
            )
        outputs = _outputs(there.name, t.kind, shape, dtypes.get(t.kind))
        weights.append(Weight(t, outputs, there.n_heads, there.offset))
    if shapes:
        raise ModelError(f"{gguf.file} has no tensor for mlx-lm's {next(iter(shapes))} ({len(shapes)} missing in all)")
    return weights


def _visit_order(tensor: GgufTensor) -> tuple:
    part, *rest = tensor.name.split(".")
    if part == "blk":
        return 1, int(rest[0]), tensor.name
    return (0 if part == "token_embd" else 2), 0, tensor.name


def _parameter_shapes(gguf: Gguf, config: dict[str, Any], names: list[str]) -> dict[str, tuple[int, ...]]:
    """Of mlx-lm's model for this configuration, which is built without its weights."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.utils import _get_classes

    try:
        model_class, args_class = _get_classes(config)
        model = model_class(args_class.from_dict(config))
        if hasattr(model, "sanitize"):  # may leave out the head of a model whose embedding serves as one
            model.sanitize({name: mx.zeros(()) for name in names})
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise ModelError(f"{gguf.file}: mlx-lm cannot build its {config['model_type']}: {e}") from None
    return {name: tuple(array.shape) for name, array in tree_flatten(model.parameters())}


def _dtype_of_float32(tensors: list[GgufTensor], places: list[Place]) -> str:
    """The type of float32 tensors: that of a 16-bit file's matrices if they all fit.

    llama.cpp keeps norms, biases and routers in float32 whatever the model had, and one such tensor makes MLX compute
    in float32. In a quantized file they stay float32, as llama.cpp computes with them.
    """
    nbytes = {kind: sum(t.nbytes for t in tensors if t.kind == kind) for kind in {t.kind for t in tensors}}
    usual = max(nbytes, key=nbytes.__getitem__)
    if usual not in ("F16", "BF16"):
        return "F32"
    for tensor, there in zip(tensors, places):
        if tensor.kind == "F32":
            for raw in _pieces(tensor):
                values = raw.view("<f4") - np.float32(there.offset)
                if not np.array_equal(widen(usual, narrow(values, usual).view(np.uint8)), values):
                    return "F32"
    return usual


def _outputs(name: str, kind: str, shape: tuple[int, ...], dtype: str | None) -> dict[str, Output]:
    if dtype:
        return {"": Output(name, dtype, shape)}
    layer, groups = name.removesuffix(".weight"), (*shape[:-1], shape[-1] // GROUP_SIZE)
    packed = Output(name, "U32", (*shape[:-1], shape[-1] * AFFINE_BITS.get(kind, 4) // 32))
    if kind == "MXFP4":
        return {"weight": packed, "scales": Output(f"{layer}.scales", "U8", groups)}
    return {"weight": packed} | {part: Output(f"{layer}.{part}", "F16", groups) for part in ("scales", "biases")}


def _quantization(weights: list[Weight]) -> dict[str, Any]:
    """What config.json says of quantized layers: the usual setting, and layers that have another."""
    settings = {}
    for w in weights:
        if "scales" in w.outputs:
            mode = "mxfp4" if w.source.kind == "MXFP4" else "affine"
            setting = {"group_size": GROUP_SIZE, "bits": AFFINE_BITS.get(w.source.kind, 4), "mode": mode}
            settings[w.outputs["weight"].name.removesuffix(".weight")] = setting
    if not settings:
        return {}
    all_settings = list(settings.values())
    usual = max(all_settings, key=all_settings.count)
    quantization = usual | {layer: setting for layer, setting in settings.items() if setting != usual}
    return {"quantization": quantization, "quantization_config": quantization}  # mlx-lm writes both


# --- Piece by piece ------------------------------------------------------------------------------------


def _write(file: Path, weights: list[Weight], progress: Progress | None) -> None:
    outputs = [o for w in weights for o in w.outputs.values()]
    total, done = sum(o.nbytes for o in outputs), 0
    tensors = [Tensor(o.name, DTYPES[o.dtype][0], o.shape) for o in outputs]
    out = TensorFile(file, tensors, max_pending_nbytes=2 * PIECE_NBYTES)
    try:
        for piece in _converted(weights):
            for name, array in piece.items():
                out.write(name, memoryview(array).cast("B"))
                done += array.nbytes
            if progress is not None:
                progress(done, total)
        out.finish()
    except BaseException:
        out.abandon()
        raise


def _converted(weights: list[Weight]) -> Iterator[dict[str, np.ndarray]]:
    """The next bytes of each array of a tensor, by the array's name."""
    for w in weights:
        for raw in _pieces(w.source, w.n_heads):
            if w.n_heads:
                n, row_nbytes = raw.shape
                head_rows = _rows(w.source)[0] // w.n_heads
                raw = raw.reshape(-1, head_rows // 2, 2, row_nbytes).swapaxes(1, 2).reshape(n, row_nbytes)
            if "" in w.outputs:
                arrays = {"": _plain(w, raw)}
            else:
                arrays = repack(w.source.kind, raw)
            yield {w.outputs[part].name: np.ascontiguousarray(array) for part, array in arrays.items()}


def _plain(w: Weight, raw: np.ndarray) -> np.ndarray:
    dtype = w.outputs[""].dtype
    if w.source.kind == dtype and not w.offset:
        return raw
    return narrow(widen(w.source.kind, raw) - np.float32(w.offset), dtype)


def _rows(tensor: GgufTensor) -> tuple[int, int]:
    """(rows, bytes of a row); every value of a vector is a row."""
    n = tensor.n_rows if len(tensor.shape) > 1 else tensor.shape[0]
    return n, tensor.nbytes // n


def _step(tensor: GgufTensor, n_heads: int = 0) -> int:
    """Rows of a piece: whole heads."""
    n, row_nbytes = _rows(tensor)
    least = n // n_heads if n_heads else 1
    return max(1, PIECE_NBYTES // (row_nbytes * least)) * least


def _pieces(tensor: GgufTensor, n_heads: int = 0) -> Iterator[np.ndarray]:
    """The tensor's bytes, uint8 [rows, bytes of a row], some rows at a time."""
    n, row_nbytes = _rows(tensor)
    step = _step(tensor, n_heads)
    with opened(tensor.file) as fd:
        for first in range(0, n, step):
            raw = np.empty((min(step, n - first), row_nbytes), np.uint8)
            try:
                done = read_all(fd, memoryview(raw).cast("B"), tensor.offset + first * row_nbytes)
            except RequestError as e:
                raise ModelError(f"{tensor.file}: reading at byte {e.offset} failed: {reason_of(e)}") from None
            if done < raw.nbytes:
                raise ModelError(f"{tensor.file} was cut short while it was read")
            yield raw
