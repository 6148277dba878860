"""Reads the header of a GGUF file: its metadata, and where its tensors are.

Comes in: a file, or the first of a split model's files. Goes out: a `Gguf`. No tensor data is read, and nothing here
knows models. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..errors import ModelError, reason_of
from ..weights.extents import MAX_NAME

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_HEADER_NBYTES = 500_000_000  # real headers, vocabulary included, have some 50 MB
ARRAY, STRING, BOOL = 9, 8, 7  # the format's numbers for kinds of metadata values
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", BOOL: "?", 10: "Q", 11: "q", 12: "d"}

# For each kind of tensor that can be read: (values in a block, bytes of a block).
KINDS = {
    "F32": (1, 4),
    "F16": (1, 2),
    "BF16": (1, 2),
    "Q4_0": (32, 18),
    "Q4_1": (32, 20),
    "Q5_0": (32, 22),
    "Q5_1": (32, 24),
    "Q8_0": (32, 34),
    "Q6_K": (256, 210),
    "MXFP4": (32, 17),
}
KIND_NAMES = (
    "F32 F16 Q4_0 Q4_1 Q4_2 Q4_3 Q5_0 Q5_1 Q8_0 Q8_1 Q2_K Q3_K Q4_K Q5_K Q6_K Q8_K IQ2_XXS IQ2_XS IQ3_XXS IQ1_S IQ4_NL "
    "IQ3_S IQ2_S IQ4_XS I8 I16 I32 I64 F64 IQ1_M BF16 Q4_0_4_4 Q4_0_4_8 Q4_0_8_8 TQ1_0 TQ2_0 IQ4_NL_4_4 IQ4_NL_4_8 "
    "IQ4_NL_8_8 MXFP4 NVFP4"
).split()


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor is: `nbytes` bytes at `offset` of `file`. They are blocks of `kind` (such as "Q4_0")."""

    name: str
    kind: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int

    @property
    def n_rows(self) -> int:
        return math.prod(self.shape[:-1])


@dataclass
class Gguf:
    """A header: `metadata` as Python values (arrays of numbers as NumPy arrays), and `tensors` by name."""

    file: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


def read_gguf(file: str | Path) -> Gguf:
    """Read the header of a GGUF file and, for a split model, of the files after it.

    Raises:
        ModelError: the file is no GGUF file, is cut short, or has tensors of a kind that MLX does not have.
    """
    file = Path(file)
    first = _read(file)
    n_files = int(first.metadata.get("split.count", 1))
    if n_files <= 1:
        return first
    match = re.fullmatch(r"(.*-)(\d{5})-of-(\d{5})\.gguf", file.name)
    if not match or int(match[2]) != 1 or int(match[3]) != n_files:
        raise ModelError(f"{file} is one of the {n_files} files of a split model. Give the first, *-00001-of-*.gguf")
    for i in range(2, n_files + 1):
        part = file.with_name(f"{match[1]}{i:05d}-of-{n_files:05d}.gguf")
        if not part.exists():
            raise ModelError(f"{part} is missing: {file.name} is the first of {n_files} files of a split model")
        first.tensors |= _read(part).tensors
    return first


def _read(file: Path) -> Gguf:
    try:
        size = file.stat().st_size
        with open(file, "rb") as f:
            if f.read(4) != MAGIC:
                raise ModelError(f"{file} is not a GGUF file: it does not begin with GGUF")
            return _Header(file, size, f).read()
    except OSError as e:
        raise ModelError(f"{file} cannot be read: {reason_of(e)}") from None
    except (struct.error, ValueError, IndexError, OverflowError, MemoryError, RecursionError):
        raise ModelError(f"{file} is damaged, or cut short in its header. Download it again") from None


class _Header:
    """Walks through the bytes of one file's header.

    The file is read, not mapped: in a mapped file a disk error would be a signal.
    """

    def __init__(self, file: Path, size: int, opened: BinaryIO):
        self._file, self._size, self._opened, self._at = file, size, opened, len(MAGIC)

    def read(self) -> Gguf:
        version = self._scalar("I")
        if version not in VERSIONS:
            raise ModelError(f"{self._file} is GGUF version {version}; versions 2 and 3, little-endian, can be read")
        n_tensors, n_values = self._scalar("Q"), self._scalar("Q")
        metadata = {self._string(): self._value(self._scalar("I")) for _ in range(n_values)}
        entries = []
        for _ in range(n_tensors):
            name = self._string()
            dims = [self._scalar("Q") for _ in range(self._scalar("I"))]
            entries.append((name, tuple(reversed(dims)), self._scalar("I"), self._scalar("Q")))
        alignment = int(metadata.get("general.alignment", 32))
        begin = -(-self._at // alignment) * alignment
        tensors = {name: self._tensor(name, shape, kind, begin + offset) for name, shape, kind, offset in entries}
        return Gguf(self._file, metadata, tensors)

    def _tensor(self, name: str, shape: tuple[int, ...], kind: int, offset: int) -> GgufTensor:
        if not name.isprintable() or len(name) > MAX_NAME:
            raise ValueError
        kind_name = KIND_NAMES[kind] if kind < len(KIND_NAMES) else f"type {kind}"
        if kind_name not in KINDS:
            raise ModelError(
                f"{self._file}: tensor {name} is {kind_name}, which MLX has no equal of. Take the model's Q4_0, Q4_1, "
                "Q5_0, Q5_1, Q8_0, F16 or BF16 file, or the original"
            )
        n, block_nbytes = KINDS[kind_name]
        if not shape or shape[-1] % n:
            raise ValueError
        nbytes = math.prod(shape) // n * block_nbytes
        if offset + nbytes > self._size:
            raise ModelError(
                f"{self._file} is cut short: tensor {name} ends at byte {offset + nbytes}, the file has {self._size}. "
                "Download it again"
            )
        return GgufTensor(name, kind_name, shape, self._file, offset, nbytes)

    def _scalar(self, code: str):
        (value,) = struct.unpack(f"<{code}", self._take(struct.calcsize(f"<{code}")))
        return value

    def _take(self, nbytes: int) -> bytes:
        """The next bytes."""
        if nbytes > min(self._size, MAX_HEADER_NBYTES) - self._at:
            raise ValueError
        self._at += nbytes
        data = self._opened.read(nbytes)
        if len(data) < nbytes:
            raise ValueError
        return data

    def _string(self) -> str:
        return self._take(self._scalar("Q")).decode("utf-8", "replace")

    def _value(self, kind: int) -> Any:
        if kind == STRING:
            return self._string()
        if kind != ARRAY:
            return self._scalar(_scalar_code(kind))
        kind, n = self._scalar("I"), self._scalar("Q")
        if kind in (STRING, ARRAY):
            return [self._value(kind) for _ in range(n)]
        dtype = np.dtype(f"<{_scalar_code(kind)}")
        return np.frombuffer(self._take(n * dtype.itemsize), dtype)


def _scalar_code(kind: int) -> str:
    if kind not in SCALARS:
        raise ValueError
    return SCALARS[kind]
