"""Stores the input of the lowest trained block, which no training changes, so that later epochs begin there.

Comes in: the token ids of micro-batches, and the output of the blocks below. Goes out: hidden states, bit for bit those
that the blocks below would compute. Used on the compute thread, except for `why_not` and `keys`.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .. import platform
from ..models.seams import CutModel
from ..version import __version__
from ..weights.activation_cache import ActivationCache
from ..weights.fingerprint import fingerprint, identities, of_arrays
from ..weights.reader import Reader
from ..weights.recognise import read_json
from .trees import is_compiling

NUMERICS = 1  # to be raised with any change of this package that changes a bit of a forward pass


class Boundary:
    """Stores and finds the hidden states at the boundary of one opened model.

    A key is made of everything that determines their bits: files of weights, configuration, software, the boundary,
    how the work is cut, and the token ids of the whole padded micro-batch. A key of each sample alone would not do: on
    MLX's CPU backend a row's bits depend on the number of rows (Llama of hidden size 64, 33 tokens: alone, or one of
    four) and on the padding (hidden size 1024, 33 tokens or 65). mlx-lm makes the same batches in every epoch and only
    changes their order, so nothing is lost.

    Args:
        cache: stores the hidden states.
        path: the model's directory.
    """

    def __init__(self, cache: ActivationCache, cut: CutModel, reader: Reader, path: Path):
        self.cache = cache
        self._cut, self._reader, self._files = cut, reader, cut.files
        self._config = json.dumps(read_json(path / "config.json"))
        self._identities: tuple = ()
        self._fingerprint = ""
        self._keys: list[str] = []

    def find(self, keys: Sequence[str]) -> list[mx.array | None]:
        """The stored hidden states of a step's micro-batches, None for each that is missing; `keep` stores those."""
        self._keys = list(keys)
        return [self.cache.read(key) for key in keys]

    def keep(self, micro_batch: int, hidden: mx.array) -> None:
        """Store a hidden state of the step that `find` was called for, unless the weight files have changed since."""
        if self._identities == identities(self._open_files()):
            self.cache.write(self._keys[micro_batch], hidden)

    def keys(self, position: int, cuts: tuple, ids: Sequence[mx.array]) -> list[str]:
        """A key for each micro-batch.

        Args:
            position: the visit at the boundary.
            cuts: how much of a block's work is done at once.
            ids: token ids `[B, T]` of each micro-batch, padding included.
        """
        now = identities(self._open_files())
        if now != self._identities:
            self._identities, self._fingerprint = now, fingerprint(self._open_files())
        common = [self._fingerprint, self._config, _numerics(), self._dtypes(position), cuts]
        return [of_arrays([*common, b.shape], [np.ascontiguousarray(b, np.int64)]) for b in map(np.asarray, ids)]

    def _open_files(self) -> dict[str, int]:
        return {file: self._reader.descriptor(file) for file in self._files}

    def _dtypes(self, position: int) -> list[str]:
        """For each parameter below the boundary, its name, what it is made from, and the dtype that it computes in."""
        below = [unit for units in self._cut.outside.values() for unit in units]
        below += [self._cut.blocks[index] for index in self._cut.order[:position]]
        params = [p for unit in below for p in unit.params]
        kinds = [getattr(p.source, "kind", "") for p in params]
        return [f"{p.name} {type(p.source).__name__} {k} {p.source.result_dtype}" for p, k in zip(params, kinds)]


def why_not(cut: CutModel, position: int, trained_outside: bool) -> str | None:
    """Why the inputs of the lowest trained visit, `position`, cannot be stored; None if they can."""
    if not cut.is_chain:
        return "its blocks are handed more than the output of the block before, such as values that depend on it"
    if trained_outside:
        return "an adapter is attached outside the blocks, and training it changes what every block is handed"
    if position == 0:
        return "the first block is trained, so that none lies below. Use a smaller --num-layers"
    if position == len(cut.order):
        return "no block is trained"
    for index in cut.order[:position]:
        block = cut.blocks[index]
        if block.adapter():
            return f"{block.name}, below the lowest trained block, has an adapter"
        if any(isinstance(m, (nn.Dropout, nn.Dropout2d, nn.Dropout3d)) and m._p_1 < 1 for m in block.module.modules()):
            return f"{block.name} drops values out at random"
    return None


def _numerics() -> list[str]:
    from mlx_lm import __version__ as mlx_lm_version

    versions = [__version__, str(NUMERICS), mx.__version__, mlx_lm_version]
    device = f"{mx.default_device()} {mx.device_info().get('device_name')}"
    return [*versions, device, platform.blas_description(), str(is_compiling())]
