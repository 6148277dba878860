"""Decides what a model directory becomes when it is rewritten: which tensors, made of what, in which files.

Comes in: a directory that mlx-lm loads, and a `Transform` of it (`options` quantizes it, `fuse` fuses an adapter into
it). Goes out: a `Conversion`. mlx-lm's own code is run on arrays that are never evaluated (`models/building.py`), so
this reads headers only. It writes nothing.

Parts that lie in files are converted in pieces. What `sanitize` computes is computed whole by MLX, or one expert at a
time if that gives the same. What is computed row by row (see `parts`) is computed some rows at a time.
"""

import fnmatch
import hashlib
import importlib.metadata
import io
import os
import re
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from ..errors import ModelError, first_line
from ..models.building import Built, build_lazily
from ..version import __version__
from ..weights.extents import Extent
from ..weights.tensorfile import Tensor, arrange, header
from . import verify as manifest
from .parts import Change, Computed, File, Parameter, Part

INDEX = "model.safetensors.index.json"
COPIED = (*manifest.USED, "*.md", "LICENSE*", "NOTICE*", "USE_POLICY*")
WHOLE_NBYTES = 128 << 20  # what takes less memory is computed whole, even if it could be computed in pieces
USUAL_NBYTES = 400 << 20  # what MLX, mlx-lm and the pieces take in a process that converts
# Bytes for each element of a weight that is fused whole: the weight, the product, their sum, and the previous weight.
PRODUCT_ITEM_NBYTES = 16
# A product that is not computed whole is computed this many bytes at a time, in multiples of 48 rows: OpenBLAS takes
# rows by 12 and by 16, and adds up the remaining rows in another order.
CHUNK_ROWS, CHUNK_NBYTES = 48, 16 << 20
REWRITTEN = ("config.json", INDEX, "hf_quant_config.json", manifest.NAME)


class Transform(Protocol):
    """How a conversion changes a model: `options.Options`, or `fuse.Fusion`.

    Attributes:
        command: the name of the command that asks for it.
        doing: the verb for error messages, such as "fusing".
    """

    command: str
    doing: str

    def identity(self) -> dict: ...

    def change(self, model: nn.Module, config: dict, path: Path) -> Change: ...


class Conversion:
    """Everything that can be known before a weight is read.

    Raises:
        ModelError: files are missing or cut short, the architecture is unknown, or layers cannot be quantized.
        ConfigError: nothing is left to quantize.

    Attributes:
        config: the output's config.
        notes: what a person should know of the model's files and config, a sentence each.
        files: the output's files, in the order of a forward pass.
        index: the contents of `model.safetensors.index.json`, as mlx-lm writes it.
        computed_from: the files that MLX reads to compute parameters whole.
        computed_nbytes: the most memory that computing any one of those parameters takes.
    """

    def __init__(self, path: Path, transform: Transform, trust_remote_code: bool = False):
        from mlx_lm.utils import get_total_parameters

        self.path, self.transform = path, transform
        built = build_lazily(path, trust_remote_code=trust_remote_code)
        self._extents, self.notes = built.extents, built.notes
        model, self.config = built.model, built.config
        self.keeps_vision = "vision_tower" in getattr(model, "model", {})  # as mlx_lm.utils.save asks
        dense = dict(tree_flatten(model.parameters()))
        try:
            change = transform.change(model, self.config, path)
        except (ValueError, TypeError, KeyError) as e:
            raise ModelError(f"{path}: mlx-lm cannot convert this model: {first_line(e)}") from None
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
        parameters = self._parameters(built, dense, outputs, change)
        self.files = _files(model, tensors, parameters)
        self._products = {name: rows for name, rows in change.row_wise.items() if rows.is_product}
        self._chunked: list[str] = []
        for file in self.files:
            self.index["weight_map"] |= {t.name: file.name for t in file.tensors}
        self.index["weight_map"] = dict(sorted(self.index["weight_map"].items()))
        # `sanitize` is needed later and holds the model. No array may stay in it, so that each is freed once written.
        built.raw.clear()
        built.joins.clear()
        model.update(tree_map(lambda _: mx.array(0), model.parameters()))

    def _parameters(self, built: Built, dense, outputs, change: Change) -> list[Parameter]:
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
        parameters, written, targets = [], set(), change.targets
        for layer_name, layer in change.quantized.items():
            name = f"{layer_name}.weight"
            names = [n for n in (name, f"{layer_name}.scales", f"{layer_name}.biases") if n in outputs]
            written.update(names)
            quantization = layer.group_size, layer.bits, layer.mode
            rows = change.row_wise.get(name)
            weight = dense[name] if rows is None else rows
            made_of = parts(dense[name]) if rows is None else [rows]
            parameters.append(Parameter(name, made_of, weight.shape, weight.dtype, targets[name], names, quantization))
        for name, array in outputs.items():
            if name in written:
                continue
            if (rows := change.row_wise.get(name)) is not None:
                parameters.append(Parameter(name, [rows], rows.shape, rows.dtype, targets[name], [name]))
            elif name in dense and dense[name].shape == array.shape and targets[name] == array.dtype:
                array = dense[name]
                parameters.append(Parameter(name, parts(array), array.shape, array.dtype, targets[name], [name]))
            else:  # the layer has a `to_quantized` of its own
                parameters.append(Parameter(name, [array], array.shape, array.dtype, array.dtype, [name]))
        self._note_computed(parameters, built, change)
        return parameters

    def _note_computed(self, parameters: list[Parameter], built: Built, change: Change) -> None:
        """Find what each lazy array is computed from, and have large ones computed by entries if that is possible."""
        computed = [(p, i) for p in parameters for i, part in enumerate(p.parts) if isinstance(part, mx.array)]
        raw = {name: array for name, array in built.raw.items() if name in self._extents}
        inputs = _inputs([p.parts[i] for p, i in computed], raw)
        entries = _Entries(built.sanitize, self._extents)
        read_by_mlx: set[str] = set()
        self.computed_nbytes = 0
        for rows in change.row_wise.values():
            # these arrays are in memory whole while rows are computed from them
            arrays = [array for parts in rows.parts.values() for array in parts if isinstance(array, mx.array)]
            names = set().union(*_inputs(arrays, raw))
            self._note_nbytes(self._whole_nbytes(names, arrays) + rows.extra_nbytes)
            read_by_mlx |= names
        for (parameter, i), names in zip(computed, inputs):
            array = parameter.parts[i]
            needed = self._whole_nbytes(names, [array])
            if needed > WHOLE_NBYTES and len(names) == 1 and len(parameter.parts) == 1:
                (name,) = names
                if (compute := entries.of(name, parameter.name, array)) is not None:
                    needed = -(-2 * needed // array.shape[0])  # two entries at a time, at least
                    parameter.parts[i] = Computed(self._extents[name], compute, array.shape)
                    names = set()
            self._note_nbytes(needed)
            read_by_mlx |= names
        files = {self._extents[name].file for name in read_by_mlx}
        self.computed_from = sorted(files | {str(file) for file in change.reads})

    def _whole_nbytes(self, names: set[str], arrays: list[mx.array]) -> int:
        """Memory to compute `arrays` whole: the tensors `names`, and three copies (in between, and joined)."""
        return sum(self._extents[name].nbytes for name in names) + 3 * sum(array.nbytes for array in arrays)

    def _note_nbytes(self, nbytes: int) -> None:
        self.computed_nbytes = max(self.computed_nbytes, nbytes)

    def chunk_products(self, limit: int) -> None:
        """Decide which products are computed some rows at a time.

        That depends on the ceiling `limit` (in bytes) alone. An unfinished output is continued only with the same
        chunks, so that its bytes are the same.
        """
        room = max(limit - USUAL_NBYTES, 0) // 2
        for name, rows in self._products.items():
            n_rows, n_columns = rows.shape[-2:]
            row_nbytes = n_columns * PRODUCT_ITEM_NBYTES
            rows.product_rows = n_rows
            if n_rows * row_nbytes > room:
                rows.product_rows = min(max(CHUNK_NBYTES // row_nbytes // CHUNK_ROWS, 1) * CHUNK_ROWS, n_rows)
                self._chunked.append(name)
            self._note_nbytes(rows.product_rows * row_nbytes + rows.extra_nbytes)
        self._products = {}

    @property
    def nbytes(self) -> int:
        return sum(file.nbytes for file in self.files)

    def skip(self, names: Iterable[str]) -> None:
        """Forget the arrays of files that are written already."""
        for file in self.files:
            if file.name in names:
                for parameter in file.parameters:
                    parameter.parts.clear()

    def identity(self) -> dict:
        """What must be the same if an unfinished output is to be continued."""
        sources = sorted({e.file for e in self._extents.values()} | {str(self.path / "config.json")})
        stats = [(Path(file).name, os.stat(file).st_size, os.stat(file).st_mtime_ns) for file in sources]
        layout = hashlib.sha256()
        for file in self.files:
            layout.update(file.name.encode() + header(file.tensors))
        layout.update(self.config_text().encode())
        return {
            "source": str(self.path.resolve()),
            "source files": hashlib.sha256(repr(stats).encode()).hexdigest(),
            "options": self.transform.identity(),
            "--memory": hashlib.sha256(repr(sorted(self._chunked)).encode()).hexdigest(),
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
        """The files besides the weights that are copied: tokenizer, generation settings, code, licence."""
        return [
            file
            for file in sorted(self.path.iterdir())
            if file.is_file()
            and file.name not in REWRITTEN
            and not file.name.endswith((".safetensors", ".index.json"))
            and any(fnmatch.fnmatch(file.name, pattern) for pattern in COPIED)
        ]


class _Entries:
    """Finds parameters that `sanitize` can compute entry by entry: it is given only some entries of a tensor."""

    def __init__(self, sanitize: Callable[[dict], dict], extents: dict[str, Extent]):
        self._sanitize, self._extents = sanitize, extents
        self._independent: dict[str, bool] = {}  # by name without block numbers, because blocks are alike

    def of(self, source: str, name: str, array: mx.array) -> Callable[[mx.array], mx.array] | None:
        """A function that makes entries of parameter `name` (all of which is `array`) from those of tensor `source`.

        None if the two have not equally many entries, or if one entry could depend on another.
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
        """Whether two entries give together what each gives alone, tried on random numbers in the tensor's shape."""
        dtype = getattr(mx, extent.dtype)
        two = mx.random.randint(0, 100, (2, *extent.shape[1:]), key=mx.random.key(0)).astype(dtype)
        try:
            together = compute(two)
            if (together.shape, together.dtype) != ((2, *array.shape[1:]), array.dtype):
                return False
            separate = mx.concatenate([compute(two[:1]), compute(two[1:])])
            return separate.shape == together.shape and mx.array_equal(together, separate).item()
        except (KeyError, ValueError, RuntimeError, TypeError):  # `sanitize` does not take so few entries
            return False


def versions() -> dict[str, str]:
    return {"slowft": __version__} | {name: importlib.metadata.version(name) for name in ("mlx", "mlx-lm")}


def _inputs(arrays: list[mx.array], raw: dict[str, mx.array]) -> list[set[str]]:
    """For each lazy array, the names of the files' tensors `raw` that it is computed from."""
    if not arrays:
        return []
    name_of = {load: name for name, array in raw.items() for load in _loads(array)}
    return [{name_of[load] for load in _loads(array) if load in name_of} for array in arrays]


def _loads(array: mx.array) -> list[str]:
    """The reads from files in an array's graph, each by its name in MLX's drawing of the graph."""
    graph = io.StringIO()
    mx.export_to_dot(graph, array)
    return re.findall(r'{ (\d+) \[label ="Load"', graph.getvalue())


def _files(model: nn.Module, tensors: dict[str, Tensor], parameters: list[Parameter]) -> list[File]:
    """One file for what comes before the blocks, one for each block, and one for what comes after."""
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
    parameter_of = {name: parameter for parameter in parameters for name in parameter.outputs}
    files = []
    for i, place in enumerate(sorted(groups), 1):
        ordered = arrange(groups[place])
        name = "model.safetensors" if len(groups) == 1 else f"model-{i:05d}-of-{len(groups):05d}.safetensors"
        sources = {id(parameter_of[t.name]): parameter_of[t.name] for t in ordered}
        files.append(File(name, ordered, list(sources.values())))
    return files
