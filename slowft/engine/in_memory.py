"""A small model that is whole in memory, in the dtype that a streamed one is computed in, with adapters beside it.

Comes in: a model directory. Goes out: mlx-lm's own model, evaluated. It is loaded as a streamed model's resident
parameters are, so that both compute the same numbers from the same files.
"""

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from ..errors import ConfigError
from ..models import adapters, loading
from ..weights.fingerprint import of_contents
from ..weights.reader import Reader
from ..weights.sources import placeholder, read_whole
from .budget import Budget


class ModelInMemory(nn.Module):
    """Made by `load_in_memory`; also an instance of the mlx-lm class of its architecture.

    Attributes:
        path: directory it was read from. weights_nbytes: that it takes.
        vocab_size: logits of a token.
    """

    path: Path
    weights_nbytes: int
    vocab_size: int

    def fingerprint(self) -> str:
        """As `StreamedModel.fingerprint`."""
        return self._fingerprint

    def add_adapter(self, name: str, path: str | Path) -> None:
        """Load the adapter saved in directory `path` under a name; it is computed with where that is asked for.

        Raises:
            AdapterError: it is none, or belongs to another model.
        """
        self._adapters.add(name, Path(path).expanduser())

    def adapter_layers(self, name: str) -> dict[str, nn.Module]:
        """Name of a layer -> the layer with the adapter of that name around it."""
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
        budget: of a model that streams beside it.
    Raises:
        ConfigError: there is no room for it beside the least that the streamed one needs; nothing was read.
        ModelError: missing or corrupt files, or an unknown architecture.
    """
    skeleton = loading.load_skeleton(path, ModelInMemory, compute_dtype, trust_remote_code)
    model, params = skeleton.model, skeleton.params
    model.weights_nbytes = sum(placeholder(p.source.shape, p.source.result_dtype).nbytes for p in params)
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
