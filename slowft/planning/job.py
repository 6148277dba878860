"""What a job needs, in numbers: bytes and floating point operations of each block pass, of the head and of a step.

`shapes` looks at the model and makes a `Job`; the plan calculates with it. A job is plain data without callables.
"""

import functools
from dataclasses import dataclass


@dataclass(frozen=True)
class Chunking:
    """How many rows of a micro-batch, tokens of feed-forward layers, and queries are computed at once. None is all.

    Sums over smaller chunks are taken in another order, so a chunking decides the last bits of gradients. It follows
    from byte counts and the ceiling alone, never from what was measured.
    """

    rows: int | None = None
    mlp_tokens: int | None = None
    attention_queries: int | None = None


@dataclass(frozen=True)
class KeepableOutput:
    """The output of a frozen layer. It may be kept from the forward pass for the recomputation.

    Attributes:
        name: the layer's name within the block.
        nbytes, flops: bytes for one micro-batch, and floating point operations that a backward pass saves with them.
    """

    name: str
    nbytes: int
    flops: int


@dataclass(frozen=True)
class LayerCost:
    """A layer of experts. It may be offloaded from its block: then some of its experts are brought at a time.

    Attributes:
        stored_nbytes, compute_nbytes: bytes of its matrices on disk, and as they are computed with.
        n, per_token: number of experts, and how many of them a token goes to.
        input_nbytes, output_nbytes: bytes of a call's input and output for one micro-batch.
    """

    name: str
    stored_nbytes: int
    compute_nbytes: int
    n: int
    per_token: float
    input_nbytes: int
    output_nbytes: int

    def group_share(self, group_nbytes: int) -> float:
        """The share of the layer that comes at once in groups of `group_nbytes`. A group has one expert at least."""
        return min(max(1, group_nbytes * self.n // self.compute_nbytes), self.n) / self.n


@dataclass(frozen=True)
class Visit:
    """The forward pass of one micro-batch through a block, and the backward pass.

    Attributes:
        block: the block's number in the model. A forward pass may visit a block more than once.
        kind: the same for blocks that compute the same; these are measured together.
        stored_nbytes, compute_nbytes: bytes of the block's weights on disk, and as they are computed with.
        is_copied: whether the weights are cast or dequantized, so that they are computed with in memory of their own.
        quantizing_saves_nbytes: by how much `stored_nbytes` would shrink if weights stored in 16 or 32 bits had 4 bits.
        trainable_nbytes: bytes of the block's adapters.
        comes_back: whether the backward pass reaches this visit.
        forward_flops, backward_flops: floating point operations of the passes; backward recomputes what it must.
        graph_flops: floating point operations of both passes if nothing is recomputed.
        forward_nbytes, backward_nbytes: an upper bound of the arrays that the pass makes at once.
        graph_nbytes: an upper bound of what stays of the forward pass when nothing is recomputed.
        outputs: outputs that can be kept; none where the work is cut into chunks of tokens.
        layers: the block's layers of experts.
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
        """(bytes for one micro-batch, flops saved) if the outputs of the layers with these names are kept."""
        chosen = [output for output in self.outputs if output.name in names] if names else []
        return sum(output.nbytes for output in chosen), sum(output.flops for output in chosen)


@dataclass(frozen=True)
class Job:
    """One optimizer step under one chunking.

    Attributes:
        micro_batches: pieces of the step, each of `rows` sequences of `tokens`.
        visits: visits to blocks, in the order of the forward pass.
        hidden_nbytes: bytes of a block's input for one micro-batch.
        side_nbytes: bytes of masks and other arguments that all blocks share.
        vocab_size: number of logits of a token.
        logits_arrays: how many arrays as large as the logits the head makes at once.
        head_flops: floating point operations of the head's forward and backward pass over one micro-batch.
        head_stored_nbytes, head_compute_nbytes: bytes of its large layers on disk, and as they are computed with.
        head_in_chunks: whether logits may be computed for some tokens at a time.
        rows_nbytes: bytes of embedding rows that are read for one micro-batch.
        trainable_nbytes, optimizer_nbytes: bytes of all adapters, and of the optimizer's state.
        is_chain: whether blocks' inputs can be spilled, and all blocks and the head can form one graph.
        trains: whether there are gradients; False for forward passes alone.
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
    trains: bool

    @functools.cached_property
    def lowest_trained(self) -> int:
        """The first visit that the backward pass reaches."""
        return next((i for i, visit in enumerate(self.visits) if visit.comes_back), len(self.visits))

    @property
    def first_kept(self) -> int:
        """The first visit whose input is kept for the backward pass. That of visit 0 is kept with the trace anyway."""
        return max(self.lowest_trained, 1)

    @property
    def blocks(self) -> list[Visit]:
        """One visit of each block."""
        return list({visit.block: visit for visit in self.visits}.values())

    @property
    def graph_flops(self) -> int:
        """Floating point operations of one micro-batch if all blocks and the head are one graph."""
        return self.head_flops + sum(v.graph_flops if v.comes_back else v.forward_flops for v in self.visits)

    def head_arrays_nbytes(self, head_tokens: int | None) -> int:
        """An upper bound of what the head makes: logits of so many tokens (None: all), also in float32, and inputs."""
        tokens = self.rows * self.tokens
        at_once = min(head_tokens, tokens) if head_tokens and self.head_in_chunks else tokens
        return int(1.05 * self.logits_arrays * at_once * self.vocab_size * 4) + 3 * self.hidden_nbytes

    def graph_arrays_nbytes(self, head_tokens: int | None) -> int:
        """An upper bound of what all blocks and the head make as one graph."""
        last = max(visit.backward_nbytes - visit.graph_nbytes for visit in self.visits)
        return sum(visit.graph_nbytes for visit in self.visits) + max(last, self.head_arrays_nbytes(head_tokens))
