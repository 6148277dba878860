"""Imports mlx-lm without transformers, for a process that needs no tokenizer.

Comes in: nothing. Goes out: an imported mlx-lm. The import takes a second, 0.7 of it for transformers (which looks into
the thousand directories of its models), and mlx-lm uses transformers for tokenizers alone.
"""

import importlib
import sys
from types import ModuleType

IMPORTED = ("mlx_lm", "mlx_lm.tuner")  # they import transformers when they are imported
TOKENIZERS_NBYTES = 30_000_000  # a tokenizer's memory in a process: 27 to 31 MB, with 50,000 to 256,000 pieces
REPLACED = ("transformers", "transformers.tokenization_utils_base")


class _Nothing:
    """Takes the place of a class of transformers that mlx-lm derives from or annotates with."""

    @classmethod
    def register(cls, *args, **kwargs) -> None:
        """Does nothing, in the place of `AutoTokenizer.register`."""


class _StandIn(ModuleType):
    __path__: list[str] = []

    def __getattr__(self, name: str) -> type[_Nothing]:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Nothing


def import_mlx_lm_without_tokenizers() -> None:
    """Import mlx-lm with stand-ins for transformers. Its tokenizers cannot be used in this process afterwards.

    If this mlx-lm needs more of transformers than the stand-ins have, it is imported in the usual way when needed.
    """
    sys.modules.update((name, _StandIn(name)) for name in REPLACED)
    try:
        for name in IMPORTED:
            importlib.import_module(name)
    except Exception:
        for name in [name for name in sys.modules if name.partition(".")[0] == "mlx_lm"]:
            del sys.modules[name]
    finally:
        for name in REPLACED:  # later imports get transformers itself
            del sys.modules[name]
