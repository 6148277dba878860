"""What a step keeps in memory and how it cuts its work: the planner chooses, the engine follows."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """The default schedule streams every block through two buffers, and keeps nothing but block inputs.

    Gradients are the same to the last bit for every schedule with the same `rows`, `mlp_tokens` and
    `attention_queries`. These three change the order in which sums are taken.

    Attributes:
        slots: buffers that blocks are read into. With 2 the next block is read while the present one computes; with 1
            too where bytes are cast on arrival, which leaves the buffer to the next block; else it waits.
        resident_nbytes: bytes of blocks, as they lie on disk, that stay in memory besides those in the slots.
        temporary_nbytes: for each visit to a block, forward and backward: bytes of blocks that are temporarily
            resident besides those, in the room that outputs will take. The last one holds for the head too, and the
            first one for the optimizer.
        in_memory: all weights stay in memory, and all blocks form one graph with the head: ordinary training.
        keep_head: the head's layers stay in memory.
        head_ahead: they are read ahead like one more block, through the same buffers; else in pieces when used.
        kept: for each visit to a block, the frozen layers (names within the block) whose outputs are kept from the
            forward pass for the recomputation.
        spilled: inputs of so many visits, from the first on, go to disk.
        rows: rows of a micro-batch at a time; None for all.
        head_tokens: tokens whose logits exist at once; None for all in training, and in forward passes alone for as
            many as take 64 MB.
        mlp_tokens: tokens that go through a block's feed-forward layers at once; None for all.
        attention_queries: queries of an attention at once; None for all.
        cache_nbytes: bytes of freed buffers that MLX keeps for reuse.
        keep_buffers: MLX keeps all that a step frees for the next step of the same shape. Only ordinary training does.
        reads_in_flight: requests that are made to the drive at once.
        group_nbytes: blocks are read without their layers of experts, and experts come in groups of so many bytes, as
            they are computed with; None for whole blocks.
        active_nbytes: with more bytes in arrays, MLX stops allocating ahead of the computation; None for its default.
            On the CPU backend it then waits for all work under way, so that one core computes at a time.
        head_active_nbytes: the same while the head computes; None for `active_nbytes`.
        total_nbytes: bytes of arrays and freed buffers together. While a block or the head computes, MLX may keep
            what arrays leave of it for reuse, also beyond `cache_nbytes`.
        workspace_nbytes: the most bytes of arrays that a block's computation or an optimizer's update makes.
        head_workspace_nbytes: the same of the head (of all blocks too, if in memory), with its weights where they do
            not stay.
    """

    slots: int = 2
    resident_nbytes: int = 0
    temporary_nbytes: tuple[int, ...] = ()
    in_memory: bool = False
    keep_head: bool = False
    head_ahead: bool = False
    kept: tuple[tuple[str, ...], ...] = ()
    spilled: int = 0
    rows: int | None = None
    head_tokens: int | None = None
    mlp_tokens: int | None = None
    attention_queries: int | None = None
    cache_nbytes: int | None = None
    keep_buffers: bool = False
    reads_in_flight: int = 1
    active_nbytes: int | None = None
    head_active_nbytes: int | None = None
    total_nbytes: int = 0
    workspace_nbytes: int = 0
    head_workspace_nbytes: int = 0
    group_nbytes: int | None = None

    def kept_at(self, position: int) -> tuple[str, ...]:
        """The layers whose outputs are kept at the visit number `position`."""
        return self.kept[position] if position < len(self.kept) else ()
