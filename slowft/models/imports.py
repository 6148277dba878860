"""mlx-lm without transformers, for a process that never asks for a tokenizer.

Comes in: nothing. Goes out: an imported mlx-lm. Of the second that importing it takes, transformers takes 0.7 (it
looks into the thousand directories of its models), for tokenizers alone.
"""

import importlib
import sys
from types import ModuleType

IMPORTED = ("mlx_lm", "mlx_lm.tuner")  # whose modules import transformers when they are imported
TOKENIZERS_NBYTES = 30_000_000  # that using a tokenizer leaves in a process (27 to 31 MB, of 50,000 to 256,000 pieces)
STOOD_IN_FOR = ("transformers", "transformers.tokenization_utils_base")


class _Nothing:
    """Stands for a class of transformers: to derive from and to annotate with."""

    @classmethod
    def register(cls, *args, **kwargs) -> None:
        """As `AutoTokenizer.register`."""


class _StandIn(ModuleType):
    __path__: list[str] = []

    def __getattr__(self, name: str) -> type[_Nothing]:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Nothing


def import_mlx_lm_without_tokenizers() -> None:
    """Import mlx-lm, of which tokenizers are then of no use for the rest of the process.

    An mlx-lm that needs more of transformers than a stand-in gives is imported in the usual way, when it is needed.
    """
    sys.modules.update((name, _StandIn(name)) for name in STOOD_IN_FOR)
    try:
        for name in IMPORTED:
            importlib.import_module(name)
    except Exception:
        for name in [name for name in sys.modules if name.partition(".")[0] == "mlx_lm"]:
            del sys.modules[name]
    finally:
        for name in STOOD_IN_FOR:  # whoever asks from here on gets transformers itself
            del sys.modules[name]
