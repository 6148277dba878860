"""What the tensors of a written model are made of: the data that a `Conversion` consists of.

A parameter lies in a file as it is, or it is joined from several tensors that do (experts that are stacked), or
`sanitize` computes it (transposes, splits, unpacks). Some parameters are computed row by row: those that an adapter is
fused into, and those that are dequantized.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from ..weights.extents import Extent
from ..weights.tensorfile import Tensor


@dataclass(frozen=True)
class Computed:
    """A parameter that `sanitize` computes from one tensor of a file.

    Each entry of the first axis (for experts: each expert) can be computed without the others.

    Attributes:
        compute: makes entries `[n, ...]` of the parameter from the same entries of the tensor, unevaluated.
        shape: shape of the whole parameter.
    """

    extent: Extent
    compute: Callable[[mx.array], mx.array]
    shape: tuple[int, ...]


@dataclass
class RowWise:
    """A weight whose rows are computed from the same rows of a layer's arrays: dequantized, or fused with an adapter.

    Attributes:
        shape: shape of the weight, `[rows, columns]`, or `[E, rows, columns]` for experts.
        arrays: the layer's arrays in the files: its weight, and for a quantized layer the scales and perhaps biases.
        compute: is called with some entries of the first axis and some rows of the second of these arrays, and with
            the two slices that say which. It returns that piece of the weight, unevaluated. A matrix has no axis of
            entries; the first slice is then `slice(None)`.
        is_product: whether the rows are products of matrices. The last bits of such a row depend on how many rows
            BLAS computes together, so all rows (for experts: all rows of one expert) are computed at once where the
            ceiling allows it: see `Conversion.chunk_products`.
        product_rows: for a product, how many rows are computed at a time.
        extra_nbytes: the most memory that is needed besides while any row is computed: the adapter's arrays.
        parts: the parts of each of `arrays`, as in a `Parameter`; filled in by `Conversion`.
    """

    shape: tuple[int, ...]
    dtype: mx.Dtype
    arrays: dict[str, mx.array]
    compute: Callable[[dict[str, mx.array], slice, slice], mx.array]
    is_product: bool = False
    extra_nbytes: int = 0
    product_rows: int = 0
    parts: dict[str, list["Extent | mx.array"]] = field(default_factory=dict)


Part = Extent | Computed | RowWise | mx.array


@dataclass
class Change:
    """What was done to a model, unevaluated, besides the changes to its modules.

    Attributes:
        config: the changed model's config.
        targets: for each parameter, the dtype it is cast to.
        quantized: the layers that were quantized, by name.
        row_wise: the weights that are computed row by row, by name.
        reads: files besides the model's that MLX reads when it evaluates the parameters.
    """

    config: dict
    targets: dict[str, mx.Dtype]
    quantized: dict[str, nn.Module]
    row_wise: dict[str, RowWise] = field(default_factory=dict)
    reads: tuple[Path, ...] = ()


@dataclass
class Parameter:
    """One parameter of the model, what it is made of, and the tensors it is written as.

    Attributes:
        parts: its parts, end to end. Each is an extent of a file, or says how it is computed, or is a lazy array. The
            list is emptied as the parts are worked on.
        dtype: its dtype before it is cast to `target`.
        outputs: names of the tensors that are written: its own, or those of the weight, scales and perhaps biases
            that it is quantized to.
        quantization: arguments of `mx.quantize` (group size, bits, mode); None if it is not quantized.
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
        """How many elements have to stay together: a row if it is to be quantized, else one."""
        return 1 if self.quantization is None else self.shape[-1]


@dataclass
class File:
    """One file of the output: its tensors, and the parameters they are made from, in the order of the file."""

    name: str
    tensors: list[Tensor]
    parameters: list[Parameter]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors)
