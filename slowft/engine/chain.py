"""A model whose blocks form a chain, as functions of arrays: up to the first block, each block, what follows the last.

Comes in: micro-batches, hidden states. Goes out: unevaluated arrays, made by the model's own calls. The weights that
a function computes with have to be in place. Knows neither where hidden states are kept nor when weights come.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..models.adapters import AdapterSwitch
from ..models.calls import Arguments
from ..models.seams import FLOATS, CutModel, Unit, inner_call, trainable_entries
from . import cores
from .block import BlockFunction
from .distillation import Teacher
from .head import Blocks, HeadLoss, token_loss, treats_tokens_alike, usual_chunk
from .kept import KeptOutputs, LayerOutputs
from .log_probabilities import LogProbabilities, Mixing, log_probabilities
from .offloaded import OffloadedExperts
from .parts import EmbedPart, HeadPart, unevaluated_zeros
from .pieces import Pieces, PieceWork
from .randomness import dropout_seed
from .trees import in_trace

Entry = tuple[str, Any, Any]  # (name in the model, owner, key) of a trainable parameter


@dataclass(eq=False)
class Passenger:
    """Rows that go through the model together: a micro-batch, or as many of its rows as are computed at a time.

    Attributes:
        index: among those of the step.
        tokens, targets: int32 `[B, T]`; mask: bool `[B, T]`, which targets count in the loss.
        total: int32 `[]`, what its loss is divided by.
        adapter: True, with the adapter that is trained; False, without any; a name, with that one.
        teacher: whose probabilities its loss is taken against too.
        first: the first visit that it takes part in. Above 0 the hidden state that goes in there is stored.
        side: what each visit's block is called with, from `Chain.embed`.
        cache: mlx-lm's caches of what its rows said before, one for each block; targets and mask are None then.
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


@dataclass
class Kept:
    """What a block's forward pass keeps for its recomputation: outputs of frozen layers, by layer."""

    outputs: LayerOutputs
    by_groups: bool


class Chain:
    """The functions of one opened model.

    Args:
        answering: `answering(part)` is entered while a part of the model answers for its units.

    Attributes:
        visits: the blocks in the order in which a forward pass visits them.
        step: the number of the step that dropout masks are drawn for; seed: what they are drawn from.
        pieces: how much of a block is computed at once.
        kind_of: equal for blocks that compute the same.
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
        self.visits = [cut.blocks[index] for index in cut.order]
        self.adapters = AdapterSwitch(model)
        self.seed = self.step = 0
        self.pieces = Pieces()
        self._head_in_chunks: bool | None = None  # not known before the head's weights were seen
        self.outside: list[Entry] = []

    def begin_step(self, seed: int, step: int, pieces: Pieces) -> None:
        """From now on dropout masks are drawn from `seed` for this step, and blocks are computed in such pieces."""
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
    def head_units(self) -> list[Unit]:
        """The large layers that follow the last block."""
        return self._cut.head

    @property
    def lowest_trained(self) -> int:
        """The first visit that the backward pass comes back to."""
        if self.outside:
            return 0
        return next((i for i, unit in enumerate(self.visits) if self._trainable[unit]), len(self.visits))

    def trainable(self, position: int) -> list[Entry]:
        """The trainable parameters of the block at this visit."""
        return self._trainable[self.visits[position]]

    # --- The parts of a pass ------------------------------------------------------------------------

    def embed(self, batch: Passenger, training: bool) -> mx.array:
        """What goes into the first block `[B, T, D]`. Notes what every block is called with in `batch.side`."""
        answers = (self._look_up, self._multiply) if batch.first == 0 else (_unread, _unread)
        part = EmbedPart(self._cut, *answers)
        with_cache = {} if batch.cache is None else {"cache": batch.cache}

        def call() -> list[mx.array]:
            with self._answering(part):
                self._model(
                    batch.tokens, **with_cache
                )  # what follows the last block is built lazily and never evaluated
            return [part.calls[0].arrays[0]]

        with self.adapters.using(batch.adapter):
            (hidden,) = in_trace(call) if training else call()
        batch.side = part.calls
        mx.eval([arguments.arrays[1:] for arguments in part.calls])
        if batch.first == 0:
            mx.eval(hidden)
        return hidden

    def embed_gradients(self, batch: Passenger, cotangent: mx.array) -> list[mx.array]:
        """Gradients of the trainable parameters outside the blocks, by way of the first block's input."""
        values = [owner[key] for _, owner, key in self.outside]
        part = EmbedPart(self._cut, self._look_up, self._multiply)

        def call(*params: mx.array) -> list[mx.array]:
            part.calls.clear()
            _put(self.outside, params)
            with self._answering(part):
                self._model(batch.tokens)
            return [part.calls[0].arrays[0]]

        try:
            return mx.vjp(call, values, [cotangent])[1]
        finally:
            _put(self.outside, values)

    def forward(
        self, position: int, batch: Passenger, hidden: mx.array, training: bool, keep: Sequence[str] = ()
    ) -> tuple[mx.array, Kept]:
        """(output `[B, T, D]` of the block, outputs of its layers `keep`)."""
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

        At the lowest trained block nobody asks for the former: it is None.
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
        """Logits `[B, n, V]` of some tokens of a micro-batch, of whose last block's output `[B, n, D]` is given."""
        with self._cutting(len(self.visits), batch), self.adapters.using(batch.adapter):
            return self._head(hidden, *hidden.shape[:2])

    def gives_tokens_alone(self, batch: Passenger, hidden: mx.array) -> bool:
        """Whether the head may be computed for some of the tokens. Its weights have to be in place."""
        if self._head_in_chunks is None and hidden.shape[0] * hidden.shape[1] > 1:
            with self.adapters.using(batch.adapter):
                self._head_in_chunks = treats_tokens_alike(self._head, hidden)
        return self._head_in_chunks is not False

    def loss(self, batch: Passenger, hidden: mx.array, chunk_tokens: int | None) -> mx.array:
        """Loss of what the last block put out."""
        head = self._head_loss(batch, hidden, chunk_tokens)
        with self._cutting(len(self.visits), batch), self.adapters.using(batch.adapter):
            return head.loss(hidden, [owner[key] for _, owner, key in self.outside])

    def log_probabilities(
        self,
        group: Sequence[Passenger],
        hidden: Sequence[mx.array],
        chunk_tokens: int | None,
        top_k: int,
        token_ids: Sequence[int],
        mixing: Mixing,
    ) -> list[LogProbabilities]:
        """Of the targets that count, what is mixed of passengers that have the same, by what the last block put out."""
        first, mix = group[0], mixing.begin(group[0].tokens)
        chunk = self._chunk(hidden[0], chunk_tokens)
        with self._cutting(len(self.visits), first):
            each = [self._logits_of(batch, of_batch, chunk is not None) for batch, of_batch in zip(group, hidden)]

            def logits_of(numbers: np.ndarray) -> Sequence[mx.array]:
                return mix(numbers, [of_numbers(mx.array(numbers)) for of_numbers in each])

            at_once = mixing.at_once(first.tokens.size, chunk)
            return log_probabilities(logits_of, mixing.results, first.targets, first.mask, at_once, top_k, token_ids)

    def _logits_of(self, batch: Passenger, hidden: mx.array, in_chunks: bool) -> Callable[[mx.array], mx.array]:
        """A function that gives logits `[n, V]` of targets by their numbers."""

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
        """(loss, cotangent of what the last block put out, gradients of the parameters outside the blocks)."""
        head = self._head_loss(batch, hidden, chunk_tokens)
        params = [owner[key] for _, owner, key in self.outside]
        needs_cotangent = self.lowest_trained < len(self.visits)
        differentiated = list(range(0 if needs_cotangent else 1, 1 + len(params)))
        with self._cutting(len(self.visits), batch):
            try:
                loss, gradients = head.loss_and_grads(hidden, params, differentiated)
            finally:
                _put(self.outside, params)
        return loss, gradients[0] if needs_cotangent else None, gradients[1:] if needs_cotangent else gradients

    def loss_and_grads(
        self, first: int, batch: Passenger, hidden: mx.array, chunk_tokens: int | None
    ) -> tuple[mx.array, mx.array | None, dict[str, mx.array]]:
        """(loss, cotangent of `hidden`, gradients by name): ordinary training, from the visit `first` on one graph.

        All weights have to be in place. The cotangent is None if nobody asks for it.
        """
        entries = [entry for unit in dict.fromkeys(self.visits) for entry in self._trainable[unit]]
        params = [owner[key] for _, owner, key in [*entries, *self.outside]]
        head = self._head_loss(batch, hidden, chunk_tokens, entries, lambda h: self._through(first, batch, h))
        differentiated = list(range(0 if self.outside else 1, 1 + len(params)))
        with self._cutting(len(self.visits), batch):
            try:
                loss, gradients = head.loss_and_grads(hidden, params, differentiated)
            finally:
                _put([*entries, *self.outside], params)
        cotangent = gradients.pop(0) if self.outside else None
        return loss, cotangent, {name: g for (name, _, _), g in zip([*entries, *self.outside], gradients, strict=True)}

    # --- Underneath -----------------------------------------------------------------------------------

    def _through(self, first: int, batch: Passenger, hidden: mx.array) -> mx.array:
        """The blocks from a visit on, as one graph; then the head's own random seed."""
        for position in range(first, len(self.visits)):
            mx.random.seed(self._seed(position, batch))
            args, kwargs, _ = batch.side[position].with_arrays([hidden, *batch.side[position].arrays[1:]])
            hidden = inner_call(self.visits[position])(*args, **kwargs)
        mx.random.seed(self._seed(len(self.visits), batch))
        return hidden

    def _function(self, position: int, batch: Passenger, hidden: mx.array) -> tuple[BlockFunction, list[mx.array]]:
        """The visit as a function, and its arrays."""
        unit, side = self.visits[position], batch.side[position]
        entries = [(owner, key) for _, owner, key in self._trainable[unit]] if batch.adapter is True else []
        arrays = [hidden, *side.arrays[1:], *(owner[key] for owner, key in entries)]
        n = len(side.arrays)
        differentiated = [i for i in range(len(arrays)) if (i >= n or i == 0 and self.passes_on(position))]
        differentiated = [i for i in differentiated if arrays[i].dtype in FLOATS]
        inner = inner_call(unit)

        def call(*args, **kwargs) -> Any:
            with self._cutting(position, batch):
                return inner(*args, **kwargs)

        seed = self._seed(position, batch)
        return BlockFunction(call, side, entries, differentiated, seed, self._layers), arrays

    def passes_on(self, position: int) -> bool:
        """Whether the backward pass goes on below this visit."""
        return position > self.lowest_trained or bool(self.outside)

    def _begin(self, backward: bool) -> bool:
        """A pass through the block in place begins. Returns whether some of its layers come by groups."""
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

        chunk = self._chunk(hidden, chunk_tokens)
        in_blocks, outside = ([(owner, key) for _, owner, key in es] for es in (block_entries, self.outside))
        what = batch.targets, batch.mask, batch.total, chunk
        return HeadLoss(self._head, *what, outside, blocks or seeded, in_blocks, batch.teacher)

    def _chunk(self, hidden: mx.array, limit: int | None) -> int | None:
        """How many tokens' logits may exist at once; None when all may, or when the head cannot be cut."""
        limit = limit or usual_chunk(self._cut.vocab_size)
        if hidden.ndim != 3 or hidden.shape[0] * hidden.shape[1] <= limit:
            return None
        if self._head_in_chunks is None:
            self._head_in_chunks = treats_tokens_alike(self._head, hidden)
        return limit if self._head_in_chunks else None

    @property
    def head_may_be_cut(self) -> bool:
        """Whether logits may be computed some tokens at a time, as far as it is known."""
        return len(self._cut.hidden_shape) == 3 and self._head_in_chunks is not False

    def _head(self, hidden: mx.array, n_rows: int, n_tokens: int) -> mx.array:
        """Logits `[n_rows, n_tokens, V]` of the last block's output: the model's own call, its blocks skipped."""
        with self._answering(HeadPart(self._cut, hidden)):
            return self._model(mx.zeros((n_rows, n_tokens), mx.int32))


def _unread(unit: Unit, inner: Callable, args: tuple, kwargs: dict) -> Any:
    """Stands for what an embedding puts out where nobody asks for its values."""
    return unevaluated_zeros(inner(*args, **kwargs))


def plain_loss(model: nn.Module, batch: Passenger) -> mx.array:
    """Loss of a micro-batch by the model's own call, logits whole."""
    return token_loss(model(batch.tokens), batch.targets, batch.mask, batch.total, batch.teacher)


def _put(entries: Sequence[Entry], values: Sequence[mx.array]) -> None:
    for (_, owner, key), value in zip(entries, values):
        owner[key] = value
