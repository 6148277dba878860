"""Micro-batches: as a caller gives them, and as they go through the model, some of their rows at a time.

Comes in: token ids and lengths, in the forms that the public calls take. Goes out: `Passenger`s. Never calls the model.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from ..errors import SlowftError
from ..models.calls import Arguments
from .distillation import Teacher
from .head import loss_mask


@dataclass(frozen=True)
class MicroBatch:
    """Rows that go through the model together, and which adapter they go with.

    Attributes:
        batch: int32 `[B, T+1]` token ids.
        lengths: int32 `[B, 2]`: prompt offset and length of each row.
        adapter: True, the attached adapter; False, none; or the name of one that `add_adapter` loaded.
    """

    batch: mx.array
    lengths: mx.array
    adapter: bool | str = True


@dataclass(eq=False)
class Passenger:
    """Rows that go through the model together: a micro-batch, or as many of its rows as are computed at a time.

    Attributes:
        index: its number among those of the step, from 0.
        tokens, targets: int32 `[B, T]`.
        mask: bool `[B, T]`, which targets count in the loss.
        total: int32 `[]`, what the loss is divided by.
        adapter: True for the adapter that is trained; False for none; a name for the adapter of that name.
        teacher: the loss is taken against its probabilities too.
        first: the first visit that the rows take part in. If it is above 0, its input was stored by an earlier step.
        side: each visit's arguments, as `Chain.embed` notes them.
        cache: mlx-lm's caches of the tokens before these, one for each block; targets and mask are None then.
    """

    index: int
    tokens: mx.array
    targets: mx.array | None = None
    mask: mx.array | None = None
    total: mx.array | None = None
    adapter: bool | str = True
    teacher: Teacher | None = None
    first: int = 0
    side: list[Arguments] = field(default_factory=list)
    cache: list[Any] | None = None


def checked(batch, lengths) -> list[tuple[mx.array, mx.array]]:
    """(batch, lengths) of each micro-batch, arrays of the documented shapes and dtypes.

    Raises:
        SlowftError: they are none; says what was given.
    """
    pairs = [(batch, lengths)] if lengths is not None else [batch] if isinstance(batch, tuple) else list(batch)
    if not pairs:
        raise SlowftError("no micro-batch given")
    result = []
    for pair in pairs:
        try:
            tokens, lengths = (mx.array(part) for part in pair)
        except (TypeError, ValueError):
            raise SlowftError("give a batch and its lengths, or a list of such pairs") from None
        if tokens.ndim != 2 or tokens.shape[1] < 2 or not mx.issubdtype(tokens.dtype, mx.integer):
            raise SlowftError(f"batch must be integers [B, T+1], got {tokens.dtype} {list(tokens.shape)}")
        if lengths.ndim != 2 or lengths.shape[0] != tokens.shape[0] or lengths.shape[1] % 2 or not lengths.shape[1]:
            raise SlowftError(f"lengths must be [{tokens.shape[0]}, 2] for this batch, got {list(lengths.shape)}")
        result.append((tokens, lengths))
    return result


def checked_with_adapters(batch, lengths) -> list[MicroBatch]:
    """The same, where `batch` may also be a list of `MicroBatch`."""
    if lengths is None and all(isinstance(given, MicroBatch) for given in batch):
        pairs = checked([(given.batch, given.lengths) for given in batch], None)
        return [MicroBatch(*pair, given.adapter) for pair, given in zip(pairs, batch)]
    return [MicroBatch(*pair) for pair in checked(batch, lengths)]


def without_teachers(batch, lengths) -> tuple[Any, list[Teacher | None]]:
    """(micro-batches without their teachers, the teacher of each)."""
    if lengths is not None or isinstance(batch, tuple):
        return batch, []
    given = [tuple(micro_batch) for micro_batch in batch]
    teachers = [micro_batch[2] if len(micro_batch) == 3 else None for micro_batch in given]
    for (tokens, *_), teacher in zip(given, teachers):
        if teacher is not None and teacher.ids.shape[:2] != (tokens.shape[0], tokens.shape[1] - 1):
            raise SlowftError(f"a teacher of {list(teacher.ids.shape[:2])} targets is given for {list(tokens.shape)}")
    return [micro_batch[:2] if len(micro_batch) == 3 else micro_batch for micro_batch in given], teachers


def largest_shape(batches: Sequence[mx.array]) -> tuple[int, int, int]:
    """(rows, tokens, number) of the largest step that batches `[B, T+1]` could be."""
    rows, tokens = (max(batch.shape[axis] for batch in batches) for axis in (0, 1))
    return rows, tokens - 1, len(batches)


def n_parts(batch: mx.array, rows: int | None) -> int:
    """How many passengers a micro-batch makes, with so many `rows` at a time; None for all."""
    return -(-batch.shape[0] // (rows or batch.shape[0]))


def passengers(
    micro_batches: Sequence[tuple[mx.array, mx.array, bool | str]],
    rows: int | None,
    together: bool,
    teachers: Sequence[Teacher | None] = (),
) -> tuple[list[Passenger], list[mx.array]]:
    """(passengers, the number of tokens that each micro-batch's loss is divided by).

    Args:
        micro_batches: (batch, lengths, adapter) of each.
        rows: at a time; None for all of a micro-batch's.
        together: each loss is divided by the tokens of all micro-batches.
    """
    masks = [loss_mask(lengths, batch.shape[1] - 1) for batch, lengths, _ in micro_batches]
    ntoks = [mask.sum() for mask in masks]
    if together:
        ntoks = [sum(ntoks)] * len(ntoks)
    mx.eval(masks, ntoks)
    if any(n.item() == 0 for n in ntoks):
        raise SlowftError("no token of the batch counts in the loss (lengths leave none to train on)")
    result: list[Passenger] = []
    teachers = list(teachers) or [None] * len(micro_batches)
    for (batch, _, adapter), teacher, mask, n in zip(micro_batches, teachers, masks, ntoks, strict=True):
        step = rows or batch.shape[0]
        for first in range(0, batch.shape[0], step):
            last = first + step
            tokens, of_teacher = batch[first:last], None if teacher is None else teacher.rows(first, last)
            what = tokens[:, :-1], tokens[:, 1:], mask[first:last], n, adapter, of_teacher
            result.append(Passenger(len(result), *what))
    mx.eval([[p.tokens, p.targets, p.mask, p.teacher.arrays if p.teacher else []] for p in result])
    return result, ntoks
