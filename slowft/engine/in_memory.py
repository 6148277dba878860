"""A small model that is whole in memory, in the dtype that a streamed model computes in, with several adapters.

Comes in: a model directory. Goes out: mlx-lm's own model, evaluated. It is loaded like the resident parameters of a
streamed model, so that both compute the same numbers from the same files.
"""

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from ..errors import ConfigError
from ..models import adapters, loading
from ..weights.fingerprint import of_contents
from ..weights.reader import Reader
from ..weights.sources import read_whole
from .budget import Budget


class ModelInMemory(nn.Module):
    """Made by `load_in_memory`; also an instance of the mlx-lm class of its architecture.

    Attributes:
        path: the directory it was read from.
        weights_nbytes: bytes of its weights in memory.
        vocab_size: how many logits a token has.
    """

    path: Path
    weights_nbytes: int
    vocab_size: int

    def fingerprint(self) -> str:
        """The same as `StreamedModel.fingerprint`."""
        return self._fingerprint

    def add_adapter(self, name: str, path: str | Path) -> None:
        """Load the adapter saved in directory `path`. It is used where this name is given.

        Raises:
            AdapterError: there is no adapter, or it belongs to another model.
        """
        self._adapters.add(name, Path(path).expanduser())

    def adapter_layers(self, name: str) -> dict[str, nn.Module]:
        """By the names of layers: each layer with the adapter of this name around it."""
        return self._adapters.layers(name)


def load_in_memory(
    path: Path,
    compute_dtype: mx.Dtype | None,
    trust_remote_code: bool = False,
    budget: Budget | None = None,
) -> ModelInMemory:
    """Read a whole model.

    Args:
        compute_dtype: as in `loading.load_skeleton`.
        budget: the budget of a model that streams at the same time.
    Raises:
        ConfigError: there is no room for it beside the least that the streamed model needs; nothing was read.
        ModelError: missing or corrupt files, or an unknown architecture.
    """
    skeleton = loading.load_skeleton(path, ModelInMemory, compute_dtype, trust_remote_code)
    model, params = skeleton.model, skeleton.params
    model.weights_nbytes = sum(param.compute_nbytes for param in params)
    needed = None if budget is None else budget.needed_beside(model.weights_nbytes)
    if needed is not None:
        raise ConfigError(
            f"memory of {budget.memory / 1e9:.2f} GB is too little: {path} stays in memory, which takes "
            f"{model.weights_nbytes / 1e9:.2f} GB, and the other model streams beside it. Give at least "
            f"{needed / 1e9:.2f}GB"
        )
    reader = Reader()
    try:
        files = sorted({extent.file for param in params for extent in param.source.extents})
        reader.expect_unchanged(files)
        for param in params:
            param.keep(read_whole(reader, param.source))
        model._fingerprint = of_contents({file: reader.descriptor(file) for file in files})
    finally:
        reader.close()
    model.eval()
    mx.eval(model.parameters())
    model.path, model._adapters = skeleton.path, adapters.AdapterSwitch(model)
    model.vocab_size = model(mx.zeros((1, 1), mx.int32)).shape[-1]
    return model
