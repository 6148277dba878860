"""slowft: fine-tune language models larger than memory, weights streamed from the SSD block by block.

Importing this package loads OpenBLAS on Linux, which has to happen before MLX is imported, and nothing else: the names
below are imported when they are first used.
"""

import importlib
import sys
from typing import TYPE_CHECKING

from . import platform as _platform
from .version import __version__ as __version__

_mlx_was_imported_first = "mlx.core" in sys.modules
_platform.preload_blas()

if TYPE_CHECKING:
    from .convert.fuse import fuse as fuse
    from .convert.prepare import prepare as prepare
    from .convert.verify import verify as verify
    from .data.datasets import load_data as load_data
    from .data.tokenizer import load_tokenizer as load_tokenizer
    from .engine.distillation import Teacher as Teacher
    from .engine.micro_batches import MicroBatch as MicroBatch
    from .engine.model import StreamedModel as StreamedModel
    from .engine.model import open_model as open_model
    from .engine.randomness import dropout_seed as dropout_seed
    from .errors import AdapterError as AdapterError
    from .errors import ConfigError as ConfigError
    from .errors import DataError as DataError
    from .errors import ModelError as ModelError
    from .errors import SlowftError as SlowftError
    from .errors import SlowftWarning as SlowftWarning
    from .inference.emulate import Emulated as Emulated
    from .inference.emulate import emulate as emulate
    from .inference.generate import Answer as Answer
    from .inference.generate import generate as generate
    from .inference.score import Score as Score
    from .inference.score import score as score
    from .models.adapter_files import load_peft as load_peft
    from .planning.plan import Plan as Plan
    from .requests.record import record as record
    from .training.config import TrainConfig as TrainConfig
    from .training.trainer import Trainer as Trainer

_WHERE = {
    "convert.fuse": ("fuse",),
    "convert.prepare": ("prepare",),
    "convert.verify": ("verify",),
    "data.datasets": ("load_data",),
    "data.tokenizer": ("load_tokenizer",),
    "engine.distillation": ("Teacher",),
    "engine.micro_batches": ("MicroBatch",),
    "engine.model": ("StreamedModel", "open_model"),
    "engine.randomness": ("dropout_seed",),
    "errors": ("AdapterError", "ConfigError", "DataError", "ModelError", "SlowftError", "SlowftWarning"),
    "inference.emulate": ("Emulated", "emulate"),
    "inference.generate": ("Answer", "generate"),
    "inference.score": ("Score", "score"),
    "models.adapter_files": ("load_peft",),
    "planning.plan": ("Plan",),
    "requests.record": ("record",),
    "training.config": ("TrainConfig",),
    "training.trainer": ("Trainer",),
}
_MODULE_OF = {name: module for module, names in _WHERE.items() for name in names}

__all__ = ["__version__", *_MODULE_OF]  # noqa: PLE0604


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'slowft' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted(__all__)
