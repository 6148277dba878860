"""A model whose blocks form a chain, as functions of arrays: up to the first block, each block, what follows the last.

Comes in: micro-batches and hidden states. Goes out: unevaluated arrays, made by the model's own calls. The weights that
a function computes with have to be in place. Knows neither where hidden states are kept nor when weights are read.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..models.adapters import AdapterSwitch
from ..models.seams import FLOATS, CutModel, Unit, inner_call, trainable_entries
from . import cores
from .block import BlockFunction
from .head import Blocks, HeadLoss, token_loss
from .kept import KeptOutputs, LayerOutputs
from .log_probabilities import LogitsOf, LogProbabilities, Mixing, log_probabilities
from .micro_batches import Passenger
from .offloaded import OffloadedExperts
from .parts import EmbedPart, HeadPart, unevaluated_zeros
from .pieces import Pieces, PieceWork, treats_tokens_alike
from .randomness import dropout_seed
from .trees import arrays_of, in_trace, put

Entry = tuple[str, Any, Any]  # (name in the model, owner, key) of a trainable parameter


@dataclass
class Kept:
    """What a block's forward pass keeps for its recomputation.

    Attributes:
        outputs: of frozen layers, by layer.
        by_groups: whether some of the block's layers were offloaded then, so that LoRA's part is not in the outputs.
    """

    outputs: LayerOutputs
    by_groups: bool


class Chain:
    """The functions of one opened model.

    Args:
        answering: `answering(part)` is entered while `part` (see `parts`) answers the calls of the model's units.
        look_up, multiply: answer the calls of an embedding, and of a large layer before the blocks.

    Attributes:
        visits: the blocks in the order in which a forward pass visits them. A visit is numbered by its position here.
        head_units: the large layers that follow the last block.
        seed, step: what dropout masks are drawn from, together with the visit and the micro-batch.
        pieces: how much of a block is computed at once.
        kind_of: gives the same text for blocks that compute the same.
        outside: the trainable parameters that belong to no block.
    """

    def __init__(
        self,
        model: nn.Module,
        cut: CutModel,
        piece_work: PieceWork,
        kept: KeptOutputs,
        layers: OffloadedExperts,
        answering: Callable,
        look_up: Callable,
        multiply: Callable,
        kind_of: Callable[[Unit], str],
    ):
        self._model, self._cut, self._piece_work = model, cut, piece_work
        self._kept, self._layers, self._answering = kept, layers, answering
        self._look_up, self._multiply, self.kind_of = look_up, multiply, kind_of
        self.visits, self.head_units = [cut.blocks[index] for index in cut.order], cut.head
        self.adapters = AdapterSwitch(model)
        self.seed = self.step = 0
        self.pieces = Pieces()
        self._head_in_chunks: bool | None = None  # None until it is tried, with the head's weights
        self.outside: list[Entry] = []

    def begin_step(self, seed: int, step: int, pieces: Pieces) -> None:
        """From now on draw dropout masks from this seed and step, and compute blocks in these pieces."""
        self.seed, self.step, self.pieces = seed, step, pieces

    def look_at_trainable(self) -> None:
        """Note which parameters are trainable now."""
        self._trainable = {
            unit: [(f"{unit.name}.{name}", owner, key) for name, owner, key in unit.trainable()]
            for unit in self._cut.blocks
        }
        in_blocks = {name for entries in self._trainable.values() for name, _, _ in entries}
        self.outside = [entry for entry in trainable_entries(self._model) if entry[0] not in in_blocks]

    @property
    def lowest_trained(self) -> int:
        """The first visit that takes part in the backward pass."""
        if self.outside:
            return 0
        return next((i for i, unit in enumerate(self.visits) if self._trainable[unit]), len(self.visits))

    def trainable(self, position: int) -> list[Entry]:
        """The trainable parameters of the block at this visit."""
        return self._trainable[self.visits[position]]

    # --- The parts of a pass ------------------------------------------------------------------------

    def embed(self, batch: Passenger, training: bool) -> mx.array:
        """The first block's input `[B, T, D]`. Every block's arguments are noted in `batch.side`."""
        answers = (self._look_up, self._multiply) if batch.first == 0 else (_unread, _unread)
        part = EmbedPart(self._cut, *answers)
        cache = {} if batch.cache is None else {"cache": batch.cache}

        def call() -> list[mx.array]:
            with self._answering(part):
                self._model(batch.tokens, **cache)  # what follows the last block is lazy, and never evaluated
            return [part.calls[0].arrays[0]]

        with self.adapters.using(batch.adapter):
            (hidden,) = in_trace(call) if training else call()
        batch.side = part.calls
        mx.eval([arguments.arrays[1:] for arguments in part.calls])
        if batch.first == 0:
            mx.eval(hidden)
        return hidden

    def embed_gradients(self, batch: Passenger, cotangent: mx.array) -> list[mx.array]:
        """Gradients of the trainable parameters outside the blocks, given the cotangent of the first block's input."""
        values = arrays_of(self.outside)
        part = EmbedPart(self._cut, self._look_up, self._multiply)

        def call(*params: mx.array) -> list[mx.array]:
            part.calls.clear()
            put(self.outside, params)
            with self._answering(part):
                self._model(batch.tokens)
            return [part.calls[0].arrays[0]]

        try:
            return mx.vjp(call, values, [cotangent])[1]
        finally:
            put(self.outside, values)

    def forward(
        self, position: int, batch: Passenger, hidden: mx.array, training: bool, keep: Sequence[str] = ()
    ) -> tuple[mx.array, Kept]:
        """(the block's output `[B, T, D]`, outputs of those of its layers that `keep` names)."""
        function, arrays = self._function(position, batch, hidden)
        by_groups = self._begin(backward=False)
        unit = self.visits[position]
        with self._kept.recording(keep, with_lora=not by_groups) as outputs:
            with self.adapters.using(batch.adapter, unit.name):
                (output,) = function.forward(arrays, training)
        return output, Kept(outputs, by_groups)

    def backward(
        self, position: int, batch: Passenger, hidden: mx.array, cotangent: mx.array, kept: Kept | None
    ) -> tuple[mx.array | None, list[mx.array]]:
        """(cotangent of the block's input, gradients of its trainable parameters).

        The cotangent is None at the lowest trained block: no other block needs it.
        """
        function, arrays = self._function(position, batch, hidden)
        by_groups = self._begin(backward=True)
        outputs = kept.outputs if kept is not None and kept.by_groups == by_groups else {}
        with (self._layers if by_groups else self._kept).replaying(outputs):
            gradients = function.gradients(arrays, [cotangent])
        if self.passes_on(position):
            return gradients[0], gradients[1:]
        return None, gradients

    def logits(self, batch: Passenger, hidden: mx.array) -> mx.array:
        """Logits `[B, n, V]` of some of a micro-batch's tokens, from the last block's output for these, `[B, n, D]`."""
        with self._cutting(len(self.visits), batch), self.adapters.using(batch.adapter):
            return self._head(hidden, *hidden.shape[:2])

    def treats_tokens_alike(self, batch: Passenger, hidden: mx.array) -> bool:
        """Whether the head may be computed for some of the tokens only. Its weights have to be in place."""
        if self._head_in_chunks is None and hidden.shape[0] * hidden.shape[1] > 1:
            tokens = hidden.reshape(1, -1, hidden.shape[-1])[:, :3]
            with self.adapters.using(batch.adapter):
                self._head_in_chunks = treats_tokens_alike(lambda h: self._head(h, *h.shape[:2]), tokens)
        return self._head_in_chunks is not False

    def loss(self, batch: Passenger, hidden: mx.array, chunk_tokens: int | None) -> mx.array:
        """The loss of a micro-batch, from the last block's output."""
        head = self._head_loss(batch, hidden, chunk_tokens)
        with self._cutting(len(self.visits), batch), self.adapters.using(batch.adapter):
            return head.loss(hidden, arrays_of(self.outside))

    def log_probabilities(
        self,
        group: Sequence[Passenger],
        hidden: Sequence[mx.array],
        chunk_tokens: int | None,
        top_k: int,
        token_ids: Sequence[int],
        mixing: Mixing,
    ) -> list[LogProbabilities]:
        """Log-probabilities at the targets that count, by the logits that `mixing` makes of a group's logits.

        Args:
            group: micro-batches with the same tokens and targets.
            hidden: the last block's output, for each of them.
        """
        first, mix = group[0], mixing.begin(group[0].tokens)
        chunk = self._chunk(first, hidden[0], chunk_tokens)
        with self._cutting(len(self.visits), first):
            each = [self._logits_of(batch, output, chunk is not None) for batch, output in zip(group, hidden)]
            return log_probabilities(each, mixing, mix, first.targets, first.mask, chunk, top_k, token_ids)

    def _logits_of(self, batch: Passenger, hidden: mx.array, in_chunks: bool) -> LogitsOf:
        """A function that gives the logits `[n, V]` of the targets with these numbers `[n]`."""

        def head(hidden: mx.array, n_rows: int, n_tokens: int) -> mx.array:
            with self.adapters.using(batch.adapter):
                return self._head(hidden, n_rows, n_tokens)

        if in_chunks:
            flat = hidden.reshape(-1, hidden.shape[-1])
            return lambda numbers: head(flat[numbers][None], 1, numbers.size)[0]
        whole = head(hidden, *batch.tokens.shape)
        whole = whole.reshape(-1, whole.shape[-1])
        return lambda numbers: whole[numbers]

    def loss_and_cotangent(
        self, batch: Passenger, hidden: mx.array, chunk_tokens: int | None
    ) -> tuple[mx.array, mx.array | None, list[mx.array]]:
        """(loss, cotangent of the last block's output, gradients of the parameters outside the blocks).

        The cotangent is None if the backward pass ends at the head.
        """
        head = self._head_loss(batch, hidden, chunk_tokens)
        needs_cotangent = self.lowest_trained < len(self.visits)
        return self._differentiate(batch, head, hidden, self.outside, needs_cotangent)

    def loss_and_grads(
        self, first: int, batch: Passenger, hidden: mx.array, chunk_tokens: int | None
    ) -> tuple[mx.array, mx.array | None, dict[str, mx.array]]:
        """(loss, cotangent of `hidden`, gradients by name): ordinary training, one graph from the visit `first` on.

        All weights have to be in place. The cotangent is None if no parameter outside the blocks is trained.
        """
        entries = [entry for unit in dict.fromkeys(self.visits) for entry in self._trainable[unit]]
        head = self._head_loss(batch, hidden, chunk_tokens, entries, lambda h: self._through(first, batch, h))
        entries += self.outside
        loss, cotangent, gradients = self._differentiate(batch, head, hidden, entries, bool(self.outside))
        return loss, cotangent, {name: g for (name, _, _), g in zip(entries, gradients, strict=True)}

    # --- Underneath -----------------------------------------------------------------------------------

    def _differentiate(
        self, batch: Passenger, head: HeadLoss, hidden: mx.array, entries: Sequence[Entry], needs_cotangent: bool
    ) -> tuple[mx.array, mx.array | None, list[mx.array]]:
        """(loss, cotangent of `hidden` if it is needed, gradients of the entries)."""
        params = arrays_of(entries)
        with self._cutting(len(self.visits), batch):
            try:
                differentiated = range(0 if needs_cotangent else 1, 1 + len(params))
                loss, gradients = head.loss_and_grads(hidden, params, differentiated)
            finally:
                put(entries, params)
        return loss, gradients.pop(0) if needs_cotangent else None, gradients

    def _through(self, first: int, batch: Passenger, hidden: mx.array) -> mx.array:
        """The last block's output, as one graph from a visit's input on. Ends with setting the head's random seed."""
        for position in range(first, len(self.visits)):
            mx.random.seed(self._seed(position, batch))
            args, kwargs, _ = batch.side[position].with_arrays([hidden, *batch.side[position].arrays[1:]])
            hidden = inner_call(self.visits[position])(*args, **kwargs)
        mx.random.seed(self._seed(len(self.visits), batch))
        return hidden

    def _function(self, position: int, batch: Passenger, hidden: mx.array) -> tuple[BlockFunction, list[mx.array]]:
        """A visit's block as a function, and the arrays to call it with."""
        unit, side = self.visits[position], batch.side[position]
        entries = [(owner, key) for _, owner, key in self._trainable[unit]] if batch.adapter is True else []
        arrays = [hidden, *side.arrays[1:], *arrays_of(entries)]
        n = len(side.arrays)
        differentiated = [i for i in range(len(arrays)) if i >= n or i == 0 and self.passes_on(position)]
        differentiated = [i for i in differentiated if arrays[i].dtype in FLOATS]
        inner = inner_call(unit)

        def call(*args, **kwargs) -> Any:
            with self._cutting(position, batch):
                return inner(*args, **kwargs)

        seed = self._seed(position, batch)
        return BlockFunction(call, side, entries, differentiated, seed, self._layers), arrays

    def passes_on(self, position: int) -> bool:
        """Whether the backward pass goes on below this visit, and so needs the cotangent of its input."""
        return position > self.lowest_trained or bool(self.outside)

    def _begin(self, backward: bool) -> bool:
        """Begin a pass through the block in place. Returns whether some of its layers are offloaded."""
        if self._layers.are_offloaded:
            self._layers.begin(backward)
        return self._layers.are_offloaded

    def _seed(self, position: int, batch: Passenger) -> int:
        return dropout_seed(self.seed, self.step, position, batch.index)

    @contextmanager
    def _cutting(self, position: int, batch: Passenger) -> Iterator[None]:
        with cores.shared(), self._piece_work.cutting(self.pieces, self._seed(position, batch)):
            yield

    def _head_loss(
        self,
        batch: Passenger,
        hidden: mx.array,
        chunk_tokens: int | None,
        block_entries: Sequence[Entry] = (),
        blocks: Blocks | None = None,
    ) -> HeadLoss:
        def seeded(hidden: mx.array) -> mx.array:
            mx.random.seed(self._seed(len(self.visits), batch))
            return hidden

        chunk = self._chunk(batch, hidden, chunk_tokens)
        in_blocks, outside = ([(owner, key) for _, owner, key in es] for es in (block_entries, self.outside))
        loss_arguments = batch.targets, batch.mask, batch.total, chunk
        return HeadLoss(self._head, *loss_arguments, outside, blocks or seeded, in_blocks, batch.teacher)

    def _chunk(self, batch: Passenger, hidden: mx.array, limit: int | None) -> int | None:
        """`limit`, how many tokens' logits may exist at once; None if all may, or if the head cannot be cut."""
        if limit is None or hidden.ndim != 3 or hidden.shape[0] * hidden.shape[1] <= limit:
            return None
        return limit if self.treats_tokens_alike(batch, hidden) else None

    @property
    def head_may_be_cut(self) -> bool:
        """Whether logits may be computed for some tokens at a time; True until the head's weights have been tried."""
        return len(self._cut.hidden_shape) == 3 and self._head_in_chunks is not False

    def _head(self, hidden: mx.array, n_rows: int, n_tokens: int) -> mx.array:
        """Logits `[n_rows, n_tokens, V]` from the last block's output: the model's own call, its blocks skipped."""
        with self._answering(HeadPart(self._cut, hidden)):
            return self._model(mx.zeros((n_rows, n_tokens), mx.int32))


def _unread(unit: Unit, inner: Callable, args: tuple, kwargs: dict) -> Any:
    """Zeros in place of an embedding's output, whose values nobody needs."""
    return unevaluated_zeros(inner(*args, **kwargs))


def plain_loss(model: nn.Module, batch: Passenger) -> mx.array:
    """Loss of a micro-batch by the model's own call, with all logits at once."""
    return token_loss(model(batch.tokens), batch.targets, batch.mask, batch.total, batch.teacher)
