"""What generating asks of a model: all that `generate` and `waves` know of a `StreamedModel` or an `Emulated` one."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx

from ..engine.budget import Budget
from ..engine.spilled_caches import SpilledCaches
from ..engine.stats import Stats


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
