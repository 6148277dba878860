"""What a job needs, in numbers: bytes and floating point operations of each block pass, of the head, of a step.

Comes in from `shapes`, which looks at the model; goes out to the plan, which only calculates. Plain data, no callables.
"""

import functools
from dataclasses import dataclass

from .experts import read_share


@dataclass(frozen=True)
class Chunking:
    """How much of a step's work is done at once: rows of a micro-batch, tokens of feed-forward layers, queries.

    None is all of it. Sums over smaller chunks are taken in another order, so a chunking decides the last bits of
    gradients: it follows from byte counts and the ceiling alone, never from what was measured.
    """

    rows: int | None = None
    mlp_tokens: int | None = None
    attention_queries: int | None = None


@dataclass(frozen=True)
class KeepableOutput:
    """The output of a frozen layer, which may be kept from the forward pass for the recomputation.

    Attributes:
        name: the layer's, within the block.
        nbytes: of one micro-batch; flops: that a backward pass saves with it.
    """

    name: str
    nbytes: int
    flops: int


@dataclass(frozen=True)
class LayerCost:
    """A layer of experts, which may be offloaded from its block: then it is brought some experts at a time.

    Attributes:
        stored_nbytes: of its matrices on disk; compute_nbytes: as they are computed with.
        n: experts; per_token: of them, those that a token goes to.
        input_nbytes, output_nbytes: of a call on one micro-batch.
    """

    name: str
    stored_nbytes: int
    compute_nbytes: int
    n: int
    per_token: float
    input_nbytes: int
    output_nbytes: int

    def read_share(self, tokens: int) -> float:
        """The share of the layer that `tokens` tokens need on average, if their experts are drawn evenly."""
        return read_share(self.n, self.per_token, tokens)

    def group_share(self, group_nbytes: int) -> float:
        """The share of the layer that comes at once in groups of so many bytes: one expert at least."""
        return min(max(1, group_nbytes * self.n // self.compute_nbytes), self.n) / self.n


@dataclass(frozen=True)
class Visit:
    """The forward pass of one micro-batch through a block, and the backward pass.

    Attributes:
        block: which of the model's blocks.
        kind: equal for blocks that compute the same; they are measured together.
        stored_nbytes: of its weights on disk; compute_nbytes: as they are computed with.
        is_copied: the latter have memory of their own, apart from the bytes read: they are cast or dequantized.
        quantizing_saves_nbytes: of `stored_nbytes`, if the weights that are stored in 16 or 32 bits were in 4 bits.
        trainable_nbytes: of its adapters.
        comes_back: whether the backward pass gets here.
        forward_flops, backward_flops: of either pass; the backward pass recomputes the forward one, as far as it must.
        graph_flops: of both, if nothing is recomputed.
        forward_nbytes, backward_nbytes: an upper bound of the arrays that either pass makes at once.
        graph_nbytes: an upper bound of what stays of the forward pass when nothing is recomputed.
        outputs: what can be kept; nothing where the work is cut into chunks of tokens.
        layers: its layers of experts.
    """

    block: int
    kind: str
    stored_nbytes: int
    compute_nbytes: int
    is_copied: bool
    quantizing_saves_nbytes: int
    trainable_nbytes: int
    comes_back: bool
    forward_flops: int
    backward_flops: int
    graph_flops: int
    forward_nbytes: int
    backward_nbytes: int
    graph_nbytes: int
    outputs: tuple[KeepableOutput, ...] = ()
    layers: tuple[LayerCost, ...] = ()

    def kept(self, names: tuple[str, ...]) -> tuple[int, int]:
        """(bytes of one micro-batch, flops saved) if the outputs of these layers are kept."""
        chosen = [output for output in self.outputs if output.name in names] if names else []
        return sum(output.nbytes for output in chosen), sum(output.flops for output in chosen)


@dataclass(frozen=True)
class Job:
    """One optimizer step under one chunking.

    Attributes:
        micro_batches: pieces of the step, each of `rows` sequences of `tokens`.
        hidden_nbytes: a block's input, of one micro-batch; side_nbytes: masks and the like that all blocks are handed.
        vocab_size: logits of a token; logits_arrays: how many arrays of their size the head makes at once.
        head_flops: of the head's forward and backward pass over one micro-batch.
        head_stored_nbytes, head_compute_nbytes: of its large layers, on disk and as they are computed with.
        head_in_chunks: whether logits may be computed some tokens at a time.
        rows_nbytes: of embedding rows that are read, of one micro-batch.
        trainable_nbytes: of all adapters; optimizer_nbytes: of what the optimizer keeps.
        is_chain: whether blocks' inputs can be spilled, and all blocks and the head can form one graph.
    """

    chunking: Chunking
    micro_batches: int
    rows: int
    tokens: int
    visits: tuple[Visit, ...]
    hidden_nbytes: int
    side_nbytes: int
    vocab_size: int
    logits_arrays: int
    head_flops: int
    head_stored_nbytes: int
    head_compute_nbytes: int
    head_in_chunks: bool
    rows_nbytes: int
    trainable_nbytes: int
    optimizer_nbytes: int
    is_chain: bool

    @functools.cached_property
    def lowest_trained(self) -> int:
        """The first visit that the backward pass comes back to."""
        return next((i for i, visit in enumerate(self.visits) if visit.comes_back), len(self.visits))

    @property
    def blocks(self) -> list[Visit]:
        """One visit of each block."""
        return list({visit.block: visit for visit in self.visits}.values())
