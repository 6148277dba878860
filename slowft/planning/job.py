"""What a job needs, in numbers: bytes of each block and of what a step makes of it, and what computing it takes.

Comes in from the engine, which looks at the model's graphs; goes out to the plan, which only calculates.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

from .experts import read_share
from .graph import Cost


@dataclass(frozen=True)
class Cut:
    """How much of a step's work is done at once: rows of a micro-batch, tokens of feed-forward layers, queries.

    None is all of it.
    """

    rows: int | None = None
    mlp_tokens: int | None = None
    attention_queries: int | None = None


@dataclass(frozen=True)
class Product:
    """The output of a frozen layer that could be kept for the recomputation: `backward` is what is left then."""

    name: str
    nbytes: int
    backward: Cost


@dataclass(frozen=True)
class LayerCost:
    """A layer of experts of a block, which may come apart from it by groups of experts.

    Attributes:
        nbytes: of all its experts on disk; compute_nbytes: as they are computed with.
        n: how many experts; per_token: that a token goes to.
        input_nbytes, output_nbytes: of a call, of one micro-batch.
    """

    name: str
    nbytes: int
    compute_nbytes: int
    n: int
    per_token: float
    input_nbytes: int
    output_nbytes: int

    def read_share(self, tokens: int) -> float:
        """Of the layer, what `tokens` tokens need on average if their experts are drawn evenly."""
        return read_share(self.n, self.per_token, tokens)

    def group_share(self, group_nbytes: int) -> float:
        """Of the layer, what comes at once in groups of so many bytes; a whole expert at least."""
        return min(max(1, group_nbytes * self.n // self.compute_nbytes), self.n) / self.n


@dataclass(frozen=True)
class Products:
    """What could be kept of one micro-batch, and the backward pass with all of it kept."""

    all: tuple[Product, ...] = ()
    backward: Cost | None = None


@dataclass(frozen=True)
class Visit:
    """One visit of the forward pass to a block, and the way back.

    Attributes:
        block: which of the model's blocks.
        stored_nbytes: as it lies on disk; compute_nbytes: as it is computed with.
        is_copied: whether the latter have memory of their own, apart from the bytes read.
        dequantized: what of them is dequantized on arrival: (bits, group size, mode) -> bytes. The rest is cast.
        quantizing_saves_nbytes: of `stored_nbytes`, if the weights that are stored in 16 or 32 bits were in 4 bits.
        trainable_nbytes: of its adapters.
        backward: None if the backward pass does not come here.
        look_at_products: what could be kept; nothing where the work is cut into pieces. Looks when first asked.
        layers: its layers of experts.
    """

    block: int
    stored_nbytes: int
    compute_nbytes: int
    is_copied: bool
    dequantized: dict[tuple[int, int, str], int]
    quantizing_saves_nbytes: int
    trainable_nbytes: int
    forward: Cost
    backward: Cost | None
    look_at_products: Callable[[], Products]
    layers: tuple[LayerCost, ...] = ()

    @property
    def products(self) -> tuple[Product, ...]:
        return self.look_at_products().all

    @property
    def backward_kept(self) -> Cost | None:
        """The backward pass with all products kept."""
        return self.look_at_products().backward


@dataclass(frozen=True)
class Job:
    """One optimizer step under one way to cut the work.

    Attributes:
        micro_batches: pieces of the step, each of `rows` sequences of `tokens`.
        hidden_nbytes: a block's input, of one micro-batch; side_nbytes: masks and the like that all blocks are handed.
        head: what follows the last blocks and the last blocks themselves: `head(tail, head_tokens)`.
        head_stored_nbytes, head_compute_nbytes: its large layers.
        rows_nbytes: of embedding rows that are read, of one micro-batch.
        trainable_nbytes: of all adapters; optimizer_nbytes: of what the optimizer keeps.
        is_chain: whether there can be a tail, and inputs can be spilled.
    """

    cut: Cut
    micro_batches: int
    rows: int
    tokens: int
    visits: tuple[Visit, ...]
    hidden_nbytes: int
    side_nbytes: int
    head: Callable[[int, int | None], Cost]
    vocab_size: int
    head_stored_nbytes: int
    head_compute_nbytes: int
    rows_nbytes: int
    trainable_nbytes: int
    optimizer_nbytes: int
    is_chain: bool

    @functools.cached_property
    def lowest_trained(self) -> int:
        """The first visit that the backward pass comes back to."""
        return next((i for i, visit in enumerate(self.visits) if visit.backward is not None), len(self.visits))
