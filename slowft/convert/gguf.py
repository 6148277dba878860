"""Converts a GGUF file to an ordinary mlx-lm model directory: the weights are repacked exactly, the tokenizer included.

Comes in: a file of one of `gguf_architectures.ARCHITECTURES`, of any size. Goes out: config.json, model.safetensors,
and tokenizer files, put in place all at once. Only a piece of a tensor is in memory at a time.

No value changes. A block of Q4_0, Q4_1, Q5_0, Q5_1 or Q8_0 is an affine group of 32 in MLX, a block of MXFP4 is MLX's
own format, and F32, F16 and BF16 stay what they are. (`mx.load` would read the whole file into memory, and BF16 as
float16.) Only Q6_K, in which llama.cpp keeps the output matrix of its Q4_0 files, has groups of 16: it becomes float16.
"""

import errno
import json
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
PLAIN_DTYPES = {"F16": "float16", "BF16": "bfloat16", "Q6_K": "float16"}

Progress = Callable[[int, int], None]  # (bytes done, bytes in all)


@dataclass(frozen=True)
class Weight:
    """A tensor of the file and what it becomes.

    Attributes:
        outputs: the arrays it becomes, by part: "weight", "scales", "biases"; or "" alone if it is not quantized.
        n_heads, offset: as in `gguf_architectures.Place`.
    """

    source: GgufTensor
    outputs: dict[str, Tensor]
    n_heads: int = 0
    offset: float = 0.0


def convert(
    file: str | Path,
    directory: Path,
    progress: Progress | None = None,
    finish: Callable[[Path], None] = lambda directory: None,
) -> None:
    """Write the mlx-lm model directory of a GGUF file (of a split model, the first file).

    Args:
        progress: is called with (bytes written, bytes in all).
        finish: is called with the temporary directory of all files, before it is moved to its place.
    Raises:
        ModelError: it is not a whole GGUF file, or its architecture, a tensor or its tokenizer cannot be converted.
        SlowftError: `directory` exists already, or cannot be written.
    """
    gguf = read_gguf(file)
    if (kind := gguf.metadata.get("general.type", "model")) != "model":
        what = "a LoRA adapter" if kind == "adapter" else f"a file of the kind {kind}"
        raise ModelError(f"{file} is {what} in GGUF, not a model. Give the model it belongs to")
    with _blaming(gguf):
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
        with _blaming(gguf):
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
def _blaming(gguf: Gguf) -> Iterator[None]:
    """Turn unexpected failures into a ModelError that blames the file: metadata and names in it may be anything."""
    try:
        yield
    except (SlowftError, OSError) as e:
        if not isinstance(e, ModelError) or str(e).isprintable():
            raise
        raise ModelError(printable(str(e))) from None
    except Exception as e:  # such as a text for a number, no layers, or a block without a number
        problem = printable(f"{type(e).__name__}: {e}".splitlines()[0])
        raise ModelError(
            f"{gguf.file} is damaged, or of a kind that is not known ({problem}). Download it again"
        ) from None


def _nbytes(weights: list[Weight]) -> int:
    return sum(o.nbytes for w in weights for o in w.outputs.values())


def _check_space(directory: Path, weights: list[Weight]) -> None:
    needed, free = _nbytes(weights), shutil.disk_usage(directory).free
    if needed > free:
        raise SlowftError(f"the model takes {needed / 1e9:.2f} GB, and {directory.parent} has {free / 1e9:.2f} GB free")


# --- What becomes of each tensor -----------------------------------------------------------------------


def plan_weights(gguf: Gguf, config: dict[str, Any]) -> list[Weight]:
    """Decide what is written, in the order in which the model uses it.

    Raises:
        ModelError: the file's tensors are not the parameters of mlx-lm's model, or have other shapes.
    """
    tensors = sorted((t for t in gguf.tensors.values() if t.name not in ROPE_TABLES), key=_model_order)
    places = [place(gguf, t.name, config) for t in tensors]
    shapes = _parameter_shapes(gguf, config, [p.name for p in places])
    dtypes = PLAIN_DTYPES | {"F32": _dtype_of_float32(tensors, places)}
    weights = []
    for t, target in zip(tensors, places):
        if target.name not in shapes:
            raise ModelError(f"{gguf.file}: mlx-lm's {config['model_type']} has no {target.name}, for tensor {t.name}")
        shape = shapes.pop(target.name)
        if [n for n in shape if n > 1] != [n for n in t.shape if n > 1]:
            raise ModelError(
                f"{gguf.file}: tensor {t.name} has shape {t.shape}, mlx-lm's {target.name} would have {shape}: the "
                "metadata belongs to another model, or mlx-lm builds this one differently"
            )
        outputs = _outputs(target.name, t.kind, shape, dtypes.get(t.kind))
        weights.append(Weight(t, outputs, target.n_heads, target.offset))
    if shapes:
        raise ModelError(f"{gguf.file} has no tensor for mlx-lm's {next(iter(shapes))} ({len(shapes)} missing in all)")
    return weights


def _model_order(tensor: GgufTensor) -> tuple:
    part, *rest = tensor.name.split(".")
    if part == "blk":
        return 1, int(rest[0]), tensor.name
    return (0 if part == "token_embd" else 2), 0, tensor.name


def _parameter_shapes(gguf: Gguf, config: dict[str, Any], names: list[str]) -> dict[str, tuple[int, ...]]:
    """The shapes of the parameters of mlx-lm's model for this configuration, which is built without weights."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.utils import _get_classes

    try:
        model_class, args_class = _get_classes(config)
        model = model_class(args_class.from_dict(config))
        if hasattr(model, "sanitize"):  # it may remove the head of a model whose embedding is the head
            model.sanitize({name: mx.zeros(()) for name in names})
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise ModelError(f"{gguf.file}: mlx-lm cannot build its {config['model_type']}: {e}") from None
    return {name: tuple(array.shape) for name, array in tree_flatten(model.parameters())}


def _dtype_of_float32(tensors: list[GgufTensor], places: list[Place]) -> str:
    """The dtype in which the file's float32 tensors are written: that of a 16-bit file's matrices if all values fit.

    llama.cpp keeps norms, biases and routers in float32 whatever the original model had, and one such tensor makes MLX
    compute in float32. In a quantized file they stay float32, because llama.cpp computes with them so.
    """
    nbytes = {kind: sum(t.nbytes for t in tensors if t.kind == kind) for kind in {t.kind for t in tensors}}
    usual = max(nbytes, key=nbytes.__getitem__)
    if usual not in ("F16", "BF16"):
        return "float32"
    for tensor, target in zip(tensors, places):
        if tensor.kind == "F32":
            for raw in _pieces(tensor):
                values = raw.view("<f4") - np.float32(target.offset)
                if not np.array_equal(widen(usual, narrow(values, PLAIN_DTYPES[usual]).view(np.uint8)), values):
                    return "float32"
    return PLAIN_DTYPES[usual]


def _outputs(name: str, kind: str, shape: tuple[int, ...], dtype: str | None) -> dict[str, Tensor]:
    if dtype:
        return {"": Tensor(name, dtype, shape)}
    layer, groups = name.removesuffix(".weight"), (*shape[:-1], shape[-1] // GROUP_SIZE)
    packed = Tensor(name, "uint32", (*shape[:-1], shape[-1] * AFFINE_BITS.get(kind, 4) // 32))
    if kind == "MXFP4":
        return {"weight": packed, "scales": Tensor(f"{layer}.scales", "uint8", groups)}
    return {"weight": packed} | {part: Tensor(f"{layer}.{part}", "float16", groups) for part in ("scales", "biases")}


def _quantization(weights: list[Weight]) -> dict[str, Any]:
    """The entries of config.json for quantized layers: the usual setting, and the layers that have another."""
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
    out = TensorFile(file, outputs, max_pending_nbytes=2 * PIECE_NBYTES)
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
    """The next piece of each array that a tensor becomes, by the array's name."""
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
    if DTYPES.get(w.source.kind, ("",))[0] == dtype and not w.offset:
        return raw
    return narrow(widen(w.source.kind, raw) - np.float32(w.offset), dtype)


def _rows(tensor: GgufTensor) -> tuple[int, int]:
    """(number of rows, bytes of a row). Every value of a vector is a row."""
    n = tensor.n_rows if len(tensor.shape) > 1 else tensor.shape[0]
    return n, tensor.nbytes // n


def _pieces(tensor: GgufTensor, n_heads: int = 0) -> Iterator[np.ndarray]:
    """The tensor's bytes, uint8 [rows, bytes of a row], some rows (of whole heads, if `n_heads`) at a time."""
    n, row_nbytes = _rows(tensor)
    least = n // n_heads if n_heads else 1
    step = max(1, PIECE_NBYTES // (row_nbytes * least)) * least
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
