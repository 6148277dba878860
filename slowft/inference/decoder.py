"""What generating and scoring ask of a model: all that they know of a `StreamedModel` or an `Emulated` one.

Such a model is opened here, by the options that commands have.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx

from ..engine.budget import Budget
from ..engine.log_probabilities import LogProbabilities
from ..engine.model import MicroBatch, open_model
from ..engine.spilled_caches import SpilledCaches
from ..engine.stats import Stats
from ..errors import ConfigError


class Decoder(Protocol):
    """A model that gives logits of many rows in each reading of its weights."""

    @property
    def path(self) -> Path:
        """The directory whose tokenizer and chat template it is used with."""

    @property
    def embedding_rows(self) -> int | None:
        """Token ids must be below."""

    @property
    def memory(self) -> int | None:
        """The ceiling, in bytes."""

    @property
    def budget(self) -> Budget:
        """Plans within it."""

    @property
    def stats(self) -> Stats:
        """What was read, waited for and computed."""

    @property
    def passengers_of_row(self) -> int:
        """How many times a row goes through in one reading."""

    @property
    def can_spill(self) -> bool:
        """Whether its caches can be on disk."""

    def new_cache(self, max_kv_size: int | None = None) -> list[Any]:
        """mlx-lm's caches of a new row."""

    def streamed_caches(self, caches: Sequence[Any]) -> Sequence[Any]:
        """Of what goes by the list of a row's caches, the part that belongs to blocks which are streamed."""

    def beside_nbytes(self, rows: int, drafted: int, tokens: int) -> int:
        """What a pass over rows takes that the budget's own plan does not know of.

        Args:
            drafted: tokens of a draft at most. tokens: of a row with its answer.
        """

    def beside_s(self, rows: int) -> float:
        """Seconds that a pass giving each of so many rows a token takes beside what streams."""

    def drafter_model(self) -> Any:
        """A model in memory, with mlx-lm's call, that guesses well what this one says; None: there is none."""

    def decode(
        self,
        batches: Sequence[tuple[mx.array, list[Any], mx.array, bool | str]],
        take: Callable[[int, int, mx.array], None],
        spilled: SpilledCaches | None = None,
    ) -> None:
        """One reading of the weights; see `StreamedModel.decode`."""

    def look(self, tokens: mx.array, cache: list[Any]) -> None:
        """Give the caches the shapes that they have after these tokens. Nothing is read."""

    def takes(self, tokens: mx.array, cache: list[Any]) -> bool:
        """Whether the model's call goes through with these caches. Only shapes are computed; the caches are spoilt."""

    def fingerprint(self) -> str:
        """A digest of the weights' files."""

    # --- Scoring --------------------------------------------------------------------------------------

    @property
    def nbytes_on_disk(self) -> int:
        """Bytes of all weights that stream."""

    @property
    def has_adapter(self) -> bool:
        """Whether one is attached."""

    @property
    def scored(self) -> dict[str, bool | str]:
        """Name -> adapter of a `MicroBatch`: what is scored whatever else is."""

    @property
    def adapter_names(self) -> Sequence[str]:
        """Of those that `add_adapter` loaded."""

    def add_adapter(self, name: str, path: str | Path) -> None:
        """Load an adapter that is scored with by its name."""

    @property
    def n_logits(self) -> int:
        """Of a token."""

    def block_passes(self, adapters: Sequence[bool | str]) -> int:
        """How often a block is computed for a micro-batch that is scored with each of these adapters."""

    def log_probabilities(
        self,
        micro_batches: Sequence[MicroBatch],
        top_k: int = 0,
        token_ids: Sequence[int] = (),
        on_visit: Callable[[int], object] = lambda n: None,
        *,
        first: int = 0,
    ) -> Iterator[LogProbabilities]:
        """Of one micro-batch after the other; see `StreamedModel.log_probabilities`."""


def opened(
    model: str,
    emulated: str | None,
    deltas: Sequence[str],
    top_p: float | None,
    memory: str | int | None,
    adapter_path: str | None = None,
    **how: Any,
) -> Decoder:
    """The model of a command's options: --emulate, --delta and --delta-top-p beside those of `open_model`."""
    if emulated is not None:
        from .emulate import emulate, parse_delta  # imports mlx-lm

        learnt = [parse_delta(text) for text in deltas]
        return emulate(model, emulated, learnt, memory=memory, adapter_path=adapter_path, nucleus=top_p, **how)
    if deltas or top_p is not None:
        raise ConfigError("--delta says what another model learnt. Give that model's base too: --emulate SMALL")
    return open_model(model, memory, adapter_path, **how)
