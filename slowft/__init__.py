"""slowft: fine-tune language models larger than memory, weights streamed from the SSD block by block.

Importing this package loads OpenBLAS on Linux, which has to happen before MLX is imported, and nothing
else: the names below are imported on first use.
"""

import importlib
import sys

from . import platform as _platform
from .version import __version__

_mlx_was_imported_first = "mlx.core" in sys.modules
_platform.preload_blas()

_EXPORTS = {
    "open_model": "slowft.engine.model",
    "StreamedModel": "slowft.engine.model",
    "MicroBatch": "slowft.engine.model",
    "Trainer": "slowft.training.trainer",
    "TrainConfig": "slowft.training.config",
    "load_data": "slowft.data.datasets",
    "load_tokenizer": "slowft.data.datasets",
    "dropout_seed": "slowft.engine.randomness",
    "prepare": "slowft.convert.prepare",
    "verify": "slowft.convert.verify",
    "SlowftError": "slowft.errors",
}

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module 'slowft' has no attribute {name!r}")
    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted(__all__)
