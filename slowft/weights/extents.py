"""Which bytes of which safetensors file hold which tensor, from the headers alone.

Comes in: a model directory (one file, shards with an index, or a hub snapshot of symlinks). Goes out: a
name -> `Extent` map. Reads headers and file sizes, never tensor data, and never maps a file into memory.
Format: https://github.com/huggingface/safetensors#format
"""

import json
import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path

from ..errors import ModelError

# What MLX makes of each safetensors type it reads (mlx/io/safetensors.cpp), and its size in bytes.
DTYPES = {
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U64": ("uint64", 8),
    "U32": ("uint32", 4),
    "U16": ("uint16", 2),
    "U8": ("uint8", 1),
    "BOOL": ("bool_", 1),
    "F8_E4M3": ("uint8", 1),
    "F8_E8M0": ("uint8", 1),
}

MAX_HEADER_NBYTES = 100_000_000  # the limit of the safetensors library


@dataclass(frozen=True)
class Extent:
    """Where one tensor lies: `nbytes` bytes at `offset` of `file`, an array of `shape` and MLX dtype name."""

    name: str
    file: str
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def row_nbytes(self) -> int:
        """Bytes of one entry along the first axis."""
        return self.nbytes // self.shape[0]


def read_header(path: str | os.PathLike) -> dict[str, Extent]:
    """The extents of one safetensors file, by tensor name.

    Raises:
        ModelError: not a safetensors file, cut short, or a header that contradicts itself.
    """
    path = Path(path)
    if not path.exists():
        dangling = " (a broken link: the download did not finish)" if path.is_symlink() else ""
        raise ModelError(f"{path} is missing{dangling}. Download the model again")
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            prefix = file.read(8)
            (header_nbytes,) = struct.unpack("<Q", prefix) if len(prefix) == 8 else (0,)
            if not 2 <= header_nbytes <= MAX_HEADER_NBYTES:
                raise ModelError(f"{path} is not a safetensors file ({size} bytes). Download it again")
            if 8 + header_nbytes > size:
                raise ModelError(
                    f"{path} is cut short: its header alone needs {8 + header_nbytes} bytes, the file has {size}. "
                    "Download it again"
                )
            header = json.loads(file.read(header_nbytes))
    except OSError as e:
        raise ModelError(f"{path} cannot be read: {e.strerror}") from None
    except ValueError as e:
        raise ModelError(f"{path} has a corrupt header ({e}). Download it again") from None
    if not isinstance(header, dict):
        raise ModelError(f"{path} has a corrupt header (a {type(header).__name__}). Download it again")
    header.pop("__metadata__", None)

    start, extents = 8 + header_nbytes, {}
    for name, entry in header.items():
        try:
            stored, shape, (begin, end) = str(entry["dtype"]), tuple(entry["shape"]), entry["data_offsets"]
            if not all(isinstance(n, int) and n >= 0 for n in (*shape, begin, end)):
                raise ValueError
        except (TypeError, KeyError, ValueError):
            raise ModelError(f"{path}: the header entry of tensor {name} is malformed. Download it again") from None
        if stored not in DTYPES:
            raise ModelError(f"{path}: tensor {name} is of type {stored}, which MLX does not read")
        dtype, itemsize = DTYPES[stored]
        if end - begin != math.prod(shape) * itemsize:
            raise ModelError(
                f"{path}: tensor {name} {list(shape)} of {stored} needs {math.prod(shape) * itemsize} bytes, "
                f"its header gives {end - begin}. Download it again"
            )
        if start + end > size:
            raise ModelError(
                f"{path} is cut short: tensor {name} ends at byte {start + end}, the file has {size}. Download it again"
            )
        extents[name] = Extent(name, str(path), start + begin, end - begin, dtype, shape)
    return extents


def index_model(directory: str | os.PathLike) -> dict[str, Extent]:
    """The extents of every tensor that mlx-lm would load from `directory` (`model*.safetensors`).

    Raises:
        ModelError: no weights, a shard that the index names is missing, or a file is cut short or corrupt.
    """
    directory = Path(directory)
    extents: dict[str, Extent] = {}
    for file in sorted(directory.glob("model*.safetensors")):
        extents.update(read_header(file))

    shard_index = directory / "model.safetensors.index.json"
    if shard_index.exists():
        try:
            weight_map = {name: str(file) for name, file in json.loads(shard_index.read_text())["weight_map"].items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ModelError(f"{shard_index} is not a safetensors index. Download it again") from None
        for shard in sorted(set(weight_map.values())):
            if not (directory / shard).exists():
                raise ModelError(f"{directory / shard} is missing, and {shard_index.name} names it. Download it again")
        absent = sorted(set(weight_map) - set(extents))
        if absent:
            raise ModelError(
                f"{shard_index.name} puts tensor {absent[0]} in {weight_map[absent[0]]}, which does not hold it. "
                "Download the model again"
            )
    if not extents:
        other = sorted(p.name for pattern in ("*.bin", "*.gguf", "*.safetensors") for p in directory.glob(pattern))
        found = f" (found {', '.join(other[:3])}, which mlx-lm does not load)" if other else ""
        gguf = next((name for name in other if name.endswith(".gguf")), None)
        fix = f"Prepare it: slowft prepare {directory / gguf} --output {Path(gguf).stem}" if gguf else None
        raise ModelError(
            f"{directory} has no model*.safetensors{found}. {fix or 'Look for a copy of the model in safetensors'}"
        )
    return extents
