"""What a step keeps in memory and how it cuts its work: the planner chooses, the engine follows."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """The default streams every block, two buffers at a time, and keeps nothing but block inputs.

    Gradients are the same to the last bit for every schedule that leaves `rows`, `mlp_tokens` and `attention_queries`
    alone; those three change the order in which sums are taken.

    Attributes:
        slots: buffers for blocks on their way. With 2 the next block is read while the present one computes; with 1
            too where bytes are cast on arrival, which leaves the buffer to the next block; else it waits.
        resident_nbytes: of blocks as they lie on disk, kept between visits beyond the slots.
        temporary_nbytes: for each visit to a block, there and back, and for its neighbour where that is the head or the
            optimizer: of blocks that are temporarily resident beyond those, in the room that outputs will take.
        in_memory: all weights stay in memory, and all blocks form one graph with the head: ordinary training.
        keep_head: the head's layers stay in memory.
        head_ahead: they are read ahead like one more block, through the same buffers; else in pieces when used.
        kept: for each visit to a block, the frozen layers (names within the block) whose outputs are kept from the
            forward pass for the recomputation.
        spilled: block inputs of the first so many visits go to disk.
        rows: of a micro-batch at a time; None for all.
        head_tokens: whose logits exist at once; None for the engine's default.
        mlp_tokens: that go through a block's feed-forward layers at once; None for all.
        attention_queries: of an attention at once; None for all.
        cache_nbytes: of freed buffers that MLX keeps for reuse.
        head_cache_nbytes: the same while the head computes; None for as many.
        keep_buffers: MLX keeps whatever a step frees for the next one of the same shape: for all blocks in one graph.
        reads_in_flight: requests that are under way to the drive at once.
        group_nbytes: blocks come without their layers of experts, and these in groups of so many bytes, as they are
            computed with; None for whole blocks.
        active_nbytes: beyond which MLX stops allocating ahead of the computation; None for MLX's default. On the CPU
            backend it then waits for all that is under way, so that one core computes at a time.
        head_active_nbytes: the same while the head computes; None for as many.
        total_nbytes: of arrays and of freed buffers together: what arrays leave of it, while a block or the head is
            computed, MLX may keep for reuse beyond `cache_nbytes`.
        workspace_nbytes: of arrays that computing a block, or an optimizer's update, makes at most.
        head_workspace_nbytes: the same of the head (with all blocks, if in memory), its weights included where they do
            not stay.
        head_reuses_blocks: these take up what blocks freed, rather than asking for other sizes.
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
    head_cache_nbytes: int | None = None
    keep_buffers: bool = False
    reads_in_flight: int = 1
    active_nbytes: int | None = None
    head_active_nbytes: int | None = None
    total_nbytes: int = 0
    workspace_nbytes: int = 0
    head_workspace_nbytes: int = 0
    head_reuses_blocks: bool = False
    group_nbytes: int | None = None
