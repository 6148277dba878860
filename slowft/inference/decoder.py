"""The interface of a model that text is generated and scored with: a `StreamedModel` or an `Emulated` one.

This room knows no more of a model than `Decoder` says. `opened` opens one by the options of a command.
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
from ..sizes import parse_nbytes


class Decoder(Protocol):
    """A model that gives the logits of many rows in each reading of its weights."""

    @property
    def path(self) -> Path:
        """The directory that has the model's tokenizer and chat template."""

    @property
    def embedding_rows(self) -> int | None:
        """Token ids must be below this number; None: there is no such limit."""

    @property
    def memory(self) -> int | None:
        """The memory ceiling, in bytes; None: there is none."""

    @property
    def budget(self) -> Budget:
        """Makes plans that keep within the ceiling."""

    @property
    def stats(self) -> Stats:
        """Bytes that were read, seconds of waiting and of computing."""

    @property
    def passengers_of_row(self) -> int:
        """How many times each row goes through the blocks in one reading."""

    @property
    def can_spill(self) -> bool:
        """Whether the caches of rows can be on disk."""

    def new_cache(self, max_kv_size: int | None = None) -> list[Any]:
        """A new row's caches, which are mlx-lm's."""

    def streamed_caches(self, caches: Sequence[Any]) -> Sequence[Any]:
        """The part of a list that belongs to streamed blocks; the list has an entry for each of a row's caches."""

    def beside_nbytes(self, rows: int, drafted: int, tokens: int) -> int:
        """Bytes that a pass over the rows needs beside those in the budget's own plan.

        Args:
            drafted: tokens of a draft at most. tokens: of the longest prompt with its answer.
        """

    def beside_s(self, rows: int) -> float:
        """Seconds of a pass that gives each row one token, without the time of the streamed model."""

    def drafter_model(self) -> Any:
        """A model in memory, with mlx-lm's call, that is likely to choose the same tokens; None: there is none."""

    def decode(
        self,
        batches: Sequence[tuple[mx.array, list[Any], mx.array, bool | str]],
        take: Callable[[int, int, mx.array], None],
        spilled: SpilledCaches | None = None,
    ) -> None:
        """Read the weights once; see `StreamedModel.decode`."""

    def look(self, tokens: mx.array, cache: list[Any]) -> None:
        """Give the caches the shapes that they have after these tokens. No weights are read."""

    def takes(self, tokens: mx.array, cache: list[Any]) -> bool:
        """Whether the model accepts these caches. Only shapes are computed. The caches are of no use afterwards."""

    def fingerprint(self) -> str:
        """A digest of the weights' files."""

    # --- Scoring --------------------------------------------------------------------------------------

    @property
    def nbytes_on_disk(self) -> int:
        """Bytes of all weights that stream."""

    @property
    def has_adapter(self) -> bool:
        """Whether an adapter is attached."""

    @property
    def scored(self) -> dict[str, bool | str]:
        """What is always scored: name -> adapter of a `MicroBatch`."""

    @property
    def adapter_names(self) -> Sequence[str]:
        """Names of the adapters that `add_adapter` loaded."""

    def add_adapter(self, name: str, path: str | Path) -> None:
        """Load an adapter, so that micro-batches can name it."""

    @property
    def n_logits(self) -> int:
        """Number of logits of one token."""

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
        """Log-probabilities of each micro-batch in turn; see `StreamedModel.log_probabilities`."""


def opened(
    model: str,
    emulated: str | None,
    deltas: Sequence[str],
    top_p: float | None,
    memory: str | int | None,
    adapter_path: str | None = None,
    **how: Any,
) -> Decoder:
    """Open the model that a command's options name: --emulate, --delta, --delta-top-p and those of `open_model`.

    Too little memory is refused when the job is planned.
    """
    if emulated is not None:
        from .emulate import emulate, parse_delta  # imports mlx-lm

        parsed = [parse_delta(text) for text in deltas]
        return emulate(model, emulated, parsed, memory=memory, adapter_path=adapter_path, nucleus=top_p, **how)
    if deltas or top_p is not None:
        raise ConfigError("--delta says what another model learnt. Give that model's base too: --emulate SMALL")
    nbytes = None if memory is None else parse_nbytes(memory)
    streamed = open_model(model, None, adapter_path, **how)
    if nbytes is not None:  # if it is too little, the job's figure is told, and not first a smaller one for one token
        streamed.budget.limit(nbytes)
    return streamed
