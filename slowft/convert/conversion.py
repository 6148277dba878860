"""What a model directory becomes when it is written anew: which tensors, made of what, in which files.

Comes in: a directory that mlx-lm loads, and how to change it (`Options` to quantize it, `fuse` to fuse an adapter into
it). Goes out: a `Conversion`. Found out by mlx-lm's own code on arrays that are never evaluated (`loading`); reads
headers only, writes nothing.

A tensor lies in a file as it is, or is joined of several that do (experts to stack), or is computed by `sanitize`
(transposed, split, unpacked). The first two can be made in pieces, the last expert by expert if it is of experts; else
MLX computes it whole. What an adapter or dequantizing makes of such tensors is computed some rows at a time.
"""

import contextlib
import dataclasses
import fnmatch
import hashlib
import importlib.metadata
import io
import os
import re
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map, tree_map_with_path

from ..errors import ConfigError, ModelError
from ..models.building import Built, build_lazily
from ..version import __version__
from ..weights.extents import Extent
from ..weights.tensorfile import Tensor, arrange, header
from . import verify as manifest

MODES = ("affine", "mxfp4", "nvfp4", "mxfp8")
INDEX = "model.safetensors.index.json"
COPIED = (*manifest.USED, "*.md", "LICENSE*", "NOTICE*", "USE_POLICY*")
WHOLE_NBYTES = 128 << 20  # what takes less is computed whole, even if it could be done in pieces
USUAL_NBYTES = 400 << 20  # of a process that converts: what MLX, mlx-lm and pieces take
PRODUCT_ITEM_NBYTES = 16  # for each element of a weight that is fused whole: it, the product, their sum, the one before
# Of a product that is not computed whole, at a time: whole multiples of rows, since OpenBLAS takes them by 12 and by 16
# and adds the rest up in another order.
CUT_ROWS, CUT_NBYTES = 48, 16 << 20
WRITTEN_ANEW = ("config.json", INDEX, "hf_quant_config.json", manifest.NAME)


@dataclass(frozen=True)
class Options:
    """How the tensors are to be written: names and meaning as in `mlx_lm.convert`."""

    quantize: bool = False
    bits: int | None = None
    group_size: int | None = None
    mode: str = "affine"
    quant_predicate: str | None = None
    dtype: str | None = None

    command, doing = "prepare", "preparing"

    def identity(self) -> dict:
        """What must be the same for an unfinished output to be gone on with."""
        return dataclasses.asdict(self)

    def change(self, model: nn.Module, config: dict, path: Path) -> "Change":
        """Cast and quantize the model of a directory, unevaluated.

        Raises:
            ValueError, TypeError, KeyError: mlx-lm cannot.
        """
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
        from mlx_lm.convert import MODEL_CONVERSION_DTYPES, QUANT_RECIPES

        if not self.quantize:
            given = {"--bits": self.bits, "--group-size": self.group_size, "--quant-predicate": self.quant_predicate}
            given["--mode"] = None if self.mode == "affine" else self.mode
            for name, value in given.items():
                if value is not None:
                    raise ConfigError(f"{name} {value} has no effect without --quantize. Add --quantize")
        for name, value, known in (
            ("mode", self.mode, MODES),
            ("quant-predicate", self.quant_predicate, (None, *QUANT_RECIPES)),
            ("dtype", self.dtype, (None, *MODEL_CONVERSION_DTYPES)),
        ):
            if value not in known:
                raise ConfigError(f"--{name} {value} is not one of {', '.join(filter(None, known))}")
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
                raise ConfigError(f"MLX cannot quantize so: {reason} To fix it: --bits, --group-size, --mode") from None


@dataclass(frozen=True)
class Computed:
    """What `sanitize` makes of one tensor of a file, entry by entry of the first axis: of experts, one by one.

    Attributes:
        compute: entries `[n, ...]` of the tensor -> the same entries of the result, unevaluated.
        shape: of the result.
        entry_nbytes: memory that computing one entry takes, at most.
    """

    extent: Extent
    compute: Callable[[mx.array], mx.array]
    shape: tuple[int, ...]
    entry_nbytes: int


@dataclass
class RowWise:
    """A weight whose rows are computed from the same rows of a layer's arrays: dequantized, with an adapter's product.

    Attributes:
        shape: of the result, `[rows, columns]` or of experts `[E, rows, columns]`.
        arrays: of the layer in the files: its weight, and if it is quantized scales and perhaps biases.
        compute: (the same as arrays, some entries of the first axis and rows of the second; which ones) -> the result
            there, unevaluated. Of a matrix the first are all: `slice(None)`.
        is_product: rows are products of matrices, of which BLAS computes other last bits if there are other rows beside
            them. They are computed all at once, of experts one by one, where the ceiling allows it: `Conversion.cut`.
        product_rows: of a product, computed at a time.
        held_nbytes: memory besides those, at most, while any row is computed: of the adapter.
        parts: of each array, as a `Job` has them; filled in by `Conversion`.
    """

    shape: tuple[int, ...]
    dtype: mx.Dtype
    arrays: dict[str, mx.array]
    compute: Callable[[dict[str, mx.array], slice, slice], mx.array]
    is_product: bool = False
    held_nbytes: int = 0
    product_rows: int = 0
    parts: dict[str, list["Extent | mx.array"]] = field(default_factory=dict)


Part = Extent | Computed | RowWise | mx.array


@dataclass
class Change:
    """What was done to a model, unevaluated, beside the model itself.

    Attributes:
        config: of the result.
        targets: dtypes that parameters are cast to, by name.
        quantized: layers that were quantized, by name.
        row_wise: how weights are computed that are, by name.
        reads: files besides the model's that MLX reads meanwhile.
    """

    config: dict
    targets: dict[str, mx.Dtype]
    quantized: dict[str, nn.Module]
    row_wise: dict[str, RowWise] = field(default_factory=dict)
    reads: tuple[Path, ...] = ()


@dataclass
class Job:
    """One tensor as the model has it, and what becomes of it.

    Attributes:
        parts: it, end to end: where each part lies in a file, or what it is computed from there, or a lazy array.
            Emptied as they are worked on.
        dtype: before it is cast to `target`.
        outputs: its own name, or those of the weight, scales and perhaps biases that it is quantized to.
        quantization: arguments of `mx.quantize`, if it is: group size, bits, mode.
    """

    name: str
    parts: list[Part]
    shape: tuple[int, ...]
    dtype: mx.Dtype
    target: mx.Dtype
    outputs: list[str]
    quantization: tuple[int, int, str] | None = None

    @property
    def n_columns(self) -> int:
        """Elements that have to stay together: a row, if it is to be quantized."""
        return 1 if self.quantization is None else self.shape[-1]


@dataclass
class File:
    """One file of the output: its tensors, and the jobs that make them, in the order of the file."""

    name: str
    tensors: list[Tensor]
    jobs: list[Job]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors)


class Changes(Protocol):
    """What a conversion does to a model: `Options`, or `fuse.Fusion`. `command` asks for it, `doing` is the word."""

    command: str
    doing: str

    def identity(self) -> dict: ...

    def change(self, model: nn.Module, config: dict, path: Path) -> Change: ...


class Conversion:
    """Everything that can be known before a weight is read.

    Raises:
        ModelError: files missing or cut short, an unknown architecture, or layers that cannot be quantized.
        ConfigError: nothing is left to quantize.

    Attributes:
        config: of the output.
        notes: what a person should know of the model's files and config, a sentence each.
        files: in the order of a forward pass.
        index: the contents of `model.safetensors.index.json`, as mlx-lm writes it.
        computed_from: files with tensors that others are computed from, whole.
        computed_nbytes: memory that the largest of those takes, at most.
    """

    def __init__(self, path: Path, options: Changes, trust_remote_code: bool = False):
        from mlx_lm.utils import get_total_parameters

        self.path, self.options = path, options
        built = build_lazily(path, trust_remote_code=trust_remote_code)
        self._extents, self.notes = built.extents, built.notes
        model, self.config = built.model, built.config
        self.keeps_vision = "vision_tower" in getattr(model, "model", {})  # as mlx_lm.utils.save asks
        dense = dict(tree_flatten(model.parameters()))
        try:
            change = options.change(model, self.config, path)
        except (ValueError, TypeError, KeyError) as e:
            raise ModelError(f"{path}: mlx-lm cannot convert this model: {str(e).splitlines()[0]}") from None
        self.config = change.config
        outputs = dict(tree_flatten(model.parameters()))
        tensors = {name: Tensor(name, str(a.dtype).removeprefix("mlx.core."), a.shape) for name, a in outputs.items()}
        self.index = {
            "metadata": {
                "total_size": sum(t.nbytes for t in tensors.values()),
                "total_parameters": get_total_parameters(model),
            },
            "weight_map": {},
        }
        jobs = self._jobs(built, dense, outputs, change)
        self.files = _files(model, tensors, jobs)
        self._products = {name: rows for name, rows in change.row_wise.items() if rows.is_product}
        self._cut: list[str] = []
        for file in self.files:
            self.index["weight_map"] |= {t.name: file.name for t in file.tensors}
        self.index["weight_map"] = dict(sorted(self.index["weight_map"].items()))
        # `sanitize` is needed later, and with it the model: what is computed must be freed once it is written
        built.raw.clear()
        built.joins.clear()
        model.update(tree_map(lambda _: mx.array(0), model.parameters()))

    def _jobs(self, built: Built, dense, outputs, change: Change) -> list[Job]:
        source_of = {id(array): self._extents[name] for name, array in built.raw.items() if name in self._extents}

        def parts(array: mx.array) -> list[Part]:
            if id(array) in source_of:
                return [source_of[id(array)]]
            if id(array) in built.joins:
                return [part for joined in built.joins[id(array)][1] for part in parts(joined)]
            return [array]

        for rows in change.row_wise.values():
            rows.parts = {key: parts(array) for key, array in rows.arrays.items()}
            rows.arrays.clear()
        jobs, made, targets = [], set(), change.targets
        for layer_name, layer in change.quantized.items():
            name = f"{layer_name}.weight"
            names = [n for n in (name, f"{layer_name}.scales", f"{layer_name}.biases") if n in outputs]
            made.update(names)
            quantization = layer.group_size, layer.bits, layer.mode
            array = change.row_wise.get(name)
            pieces = parts(dense[name]) if array is None else [array]
            array = dense[name] if array is None else array
            jobs.append(Job(name, pieces, array.shape, array.dtype, targets[name], names, quantization))
        for name, array in outputs.items():
            if name in made:
                continue
            if (rows := change.row_wise.get(name)) is not None:
                jobs.append(Job(name, [rows], rows.shape, rows.dtype, targets[name], [name]))
            elif name in dense and dense[name].shape == array.shape and targets[name] == array.dtype:
                array = dense[name]
                jobs.append(Job(name, parts(array), array.shape, array.dtype, targets[name], [name]))
            else:  # a layer that quantizes itself in a way of its own
                jobs.append(Job(name, [array], array.shape, array.dtype, array.dtype, [name]))
        self._note_computed(jobs, built, change)
        return jobs

    def _note_computed(self, jobs: list[Job], built: Built, change: Change) -> None:
        """Find out from what the lazy arrays among the jobs' parts are computed, and which of them in pieces."""
        computed = [(job, i) for job in jobs for i, part in enumerate(job.parts) if isinstance(part, mx.array)]
        raw = {name: array for name, array in built.raw.items() if name in self._extents}
        inputs = _inputs([job.parts[i] for job, i in computed], raw)
        of_rows = [  # arrays that are held whole while rows are computed from them
            [array for parts in rows.parts.values() for array in parts if isinstance(array, mx.array)]
            for rows in change.row_wise.values()
        ]
        inputs_of_rows = [set().union(*_inputs(arrays, raw)) for arrays in of_rows]
        entries = _Entries(built.sanitize, self._extents)
        whole: set[str] = set()
        self.computed_nbytes = 0
        for rows, arrays, names in zip(change.row_wise.values(), of_rows, inputs_of_rows):
            needed = sum(self._extents[name].nbytes for name in names) + 3 * sum(array.nbytes for array in arrays)
            self.computed_nbytes = max(self.computed_nbytes, needed + rows.held_nbytes)
            whole |= names
        for (job, i), names in zip(computed, inputs):
            array = job.parts[i]
            # what it is computed from, and some copies of it: in between, and joined end to end
            needed = sum(self._extents[name].nbytes for name in names) + 3 * array.nbytes
            if needed > WHOLE_NBYTES and len(names) == 1 and len(job.parts) == 1:
                (name,) = names
                if (compute := entries.of(name, job.name, array)) is not None:
                    needed = -(-2 * needed // array.shape[0])  # two at a time, at least
                    job.parts[i] = Computed(self._extents[name], compute, array.shape, needed)
                    names = set()
            whole |= names
            self.computed_nbytes = max(self.computed_nbytes, needed)
        self.computed_from = sorted({self._extents[name].file for name in whole} | {str(file) for file in change.reads})

    def cut(self, limit: int) -> None:
        """Say which products are computed some rows at a time, by a ceiling in bytes and by nothing else.

        An unfinished output is gone on with by the same cuts only, so that its bytes are the same.
        """
        room = max(limit - USUAL_NBYTES, 0) // 2
        for name, rows in self._products.items():
            n_rows, n_columns = rows.shape[-2:]
            rows.product_rows = n_rows
            if n_rows * n_columns * PRODUCT_ITEM_NBYTES > room:
                wanted = CUT_NBYTES // (n_columns * PRODUCT_ITEM_NBYTES)
                rows.product_rows = min(max(wanted // CUT_ROWS, 1) * CUT_ROWS, n_rows)
                self._cut.append(name)
            nbytes = rows.product_rows * n_columns * PRODUCT_ITEM_NBYTES + rows.held_nbytes
            self.computed_nbytes = max(self.computed_nbytes, nbytes)
        self._products = {}

    @property
    def nbytes(self) -> int:
        return sum(file.nbytes for file in self.files)

    def skip(self, names: Iterable[str]) -> None:
        """Let go of the arrays of files that are there already."""
        for file in self.files:
            if file.name in names:
                for job in file.jobs:
                    job.parts.clear()

    def identity(self) -> dict:
        """What must be the same for an unfinished output to be gone on with."""
        sources = sorted({e.file for e in self._extents.values()} | {str(self.path / "config.json")})
        stats = [(Path(file).name, os.stat(file).st_size, os.stat(file).st_mtime_ns) for file in sources]
        layout = hashlib.sha256()
        for file in self.files:
            layout.update(file.name.encode() + header(file.tensors))
        layout.update(self.config_text().encode())
        return {
            "source": str(self.path.resolve()),
            "source files": hashlib.sha256(repr(stats).encode()).hexdigest(),
            "options": self.options.identity(),
            "--memory": hashlib.sha256(repr(sorted(self._cut)).encode()).hexdigest(),
            "versions": versions(),
            "layout": layout.hexdigest(),
        }

    def config_text(self) -> str:
        from mlx_lm.utils import save_config

        with tempfile.TemporaryDirectory() as directory:
            file = Path(directory) / "config.json"
            save_config(dict(self.config), file, keep_vision_config=self.keeps_vision)
            return file.read_text()

    def copied(self) -> list[Path]:
        """Files besides the weights that go along: tokenizer, generation settings, code, licence."""
        return [
            file
            for file in sorted(self.path.iterdir())
            if file.is_file()
            and file.name not in WRITTEN_ANEW
            and not file.name.endswith((".safetensors", ".index.json"))
            and any(fnmatch.fnmatch(file.name, pattern) for pattern in COPIED)
        ]


class _Entries:
    """Finds what `sanitize` computes of a tensor entry by entry, by giving it less than all entries."""

    def __init__(self, sanitize: Callable[[dict], dict], extents: dict[str, Extent]):
        self._sanitize, self._extents = sanitize, extents
        self._independent: dict[str, bool] = {}  # by name, numbers left out: blocks are alike

    def of(self, source: str, name: str, array: mx.array) -> Callable[[mx.array], mx.array] | None:
        """Some entries of tensor `source` -> the same entries of parameter `name`, which is all of `array`.

        None if it has not as many entries, or if one could depend on another.
        """
        extent = self._extents[source]
        if not extent.shape or array.ndim < 2 or extent.shape[0] != array.shape[0] or array.shape[0] < 2:
            return None

        def compute(entries: mx.array) -> mx.array:
            others = {n: mx.zeros(e.shape, getattr(mx, e.dtype)) for n, e in self._extents.items()}  # never evaluated
            return self._sanitize(others | {source: entries})[name]

        kind = re.sub(r"\d+", "N", name)
        if kind not in self._independent:
            self._independent[kind] = self._is_independent(compute, extent, array)
        return compute if self._independent[kind] else None

    def _is_independent(self, compute: Callable[[mx.array], mx.array], extent: Extent, array: mx.array) -> bool:
        """Whether two entries together give what each gives alone, tried on numbers of the tensor's own shape."""
        dtype = getattr(mx, extent.dtype)
        two = mx.random.randint(0, 100, (2, *extent.shape[1:]), key=mx.random.key(0)).astype(dtype)
        try:
            together = compute(two)
            if (together.shape, together.dtype) != ((2, *array.shape[1:]), array.dtype):
                return False
            apart = mx.concatenate([compute(two[:1]), compute(two[1:])])
            return apart.shape == together.shape and mx.array_equal(together, apart).item()
        except (KeyError, ValueError, RuntimeError, TypeError):  # `sanitize` has its reasons
            return False


def versions() -> dict[str, str]:
    return {"slowft": __version__} | {name: importlib.metadata.version(name) for name in ("mlx", "mlx-lm")}


def _row_quantized() -> tuple[type, ...]:
    """Layers whose `to_quantized` is `mx.quantize` of their weight, row by row."""
    from mlx_lm.models.mla import QuantizedMultiLinear
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear

    return nn.QuantizedLinear, nn.QuantizedEmbedding, QuantizedSwitchLinear, QuantizedMultiLinear


def _cast(model: nn.Module, config: dict, options: Options) -> None:
    """Give the parameters their dtype, unevaluated, as `mlx_lm.convert` does."""
    from mlx_lm.convert import MODEL_CONVERSION_DTYPES

    name = options.dtype or config.get("torch_dtype") or (config.get("text_config") or {}).get("dtype")
    if name not in MODEL_CONVERSION_DTYPES:
        return
    dtype, is_cast = getattr(mx, name), getattr(model, "cast_predicate", lambda _: True)

    def cast(key: str, array: mx.array) -> mx.array:
        return array.astype(dtype) if is_cast(key) and mx.issubdtype(array.dtype, mx.floating) else array

    model.update(tree_map_with_path(cast, model.parameters()))


def _quantize(model: nn.Module, config: dict, options: Options) -> dict:
    """Quantize the layers, unevaluated, by mlx-lm's own code. Returns the config of the result."""
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


def _inputs(arrays: list[mx.array], raw: dict[str, mx.array]) -> list[set[str]]:
    """Which of the files' tensors `raw` each of some lazy arrays is computed from."""
    if not arrays:
        return []
    name_of = {load: name for name, array in raw.items() for load in _loads(array)}
    return [{name_of[load] for load in _loads(array) if load in name_of} for array in arrays]


def _loads(array: mx.array) -> list[str]:
    """The reads from files in an array's graph, by what MLX calls each one in a drawing of it."""
    graph = io.StringIO()
    mx.export_to_dot(graph, array)
    return re.findall(r'{ (\d+) \[label ="Load"', graph.getvalue())


def _files(model: nn.Module, tensors: dict[str, Tensor], jobs: list[Job]) -> list[File]:
    """One for what comes before the blocks, one for each block, one for what comes after."""
    blocks: dict[int, int] = {}  # id of a module -> the block it belongs to
    for i, block in enumerate(getattr(model, "layers", None) or []):
        if isinstance(block, nn.Module):
            for _, module in block.named_modules():
                blocks.setdefault(id(module), i)
    block_of_module = {name: blocks[id(m)] for name, m in model.named_modules() if id(m) in blocks}

    def block_of(name: str) -> int | None:
        parts = name.split(".")
        prefixes = (".".join(parts[:n]) for n in range(len(parts) - 1, 0, -1))
        return next((block_of_module[p] for p in prefixes if p in block_of_module), None)

    embeddings = (nn.Embedding, nn.QuantizedEmbedding)
    first = {f"{name}." for name, module in model.named_modules() if isinstance(module, embeddings)}
    groups: dict[float, list[Tensor]] = {}
    after = -1.0  # -1 before the blocks, infinity after them
    for name, tensor in tensors.items():
        block = block_of(name)
        if block is not None:
            after = float("inf")
        is_first = any(name.startswith(prefix) for prefix in first)
        place = float(block) if block is not None else -1.0 if is_first else after
        groups.setdefault(place, []).append(tensor)
    job_of = {name: job for job in jobs for name in job.outputs}
    files = []
    for i, place in enumerate(sorted(groups), 1):
        ordered = arrange(groups[place])
        name = "model.safetensors" if len(groups) == 1 else f"model-{i:05d}-of-{len(groups):05d}.safetensors"
        files.append(File(name, ordered, list({id(job_of[t.name]): job_of[t.name] for t in ordered}.values())))
    return files
