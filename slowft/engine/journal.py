"""The finished blocks of a step that takes minutes, on disk, so that a kill costs a block and not the step.

Comes in: what blocks put out in the forward and in the backward pass. Goes out: where a step that was broken off goes
on, and the arrays that it needs for that. They are stored under a key made of everything that determines a step's bits,
so no other step finds them. Knows neither weights nor runs.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence

import mlx.core as mx

from ..errors import SlowftError
from ..weights.journal import Journal
from .chain import Chain
from .hidden import HiddenStates
from .micro_batches import Passenger

Piece = tuple[str, list[mx.array], list[str]]  # its name, its arrays, names of pieces to drop once it is written


class StepJournal:
    """The finished part of one step after the other; `begin` starts the next step.

    It consists of each visit's input (`h`), the cotangent of that (`c`), and the gradients after the backward pass
    through that visit (`g`). The head counts as the visit after the last. A visit's input is removed once its gradients
    are written.

    Args:
        journal: where the pieces are written.
        identity: says which model, software and other settings, which are not in memory, determine the step's bits.
        after_block: is called after each finished block, and may raise to end the step there.
        lags: a piece is written only when the next one is handed in, so that a GPU goes on computing meanwhile.

    Attributes:
        forward_from: the visit at which the forward pass goes on; above the head's visit if the head is done too.
        backward_below: the backward pass is done for this visit and those above it.
        losses, gradients, cotangents: what the finished part of the step has computed of them.
        blocks_found: how many visits the journal has finished, forward and backward.
    """

    def __init__(self, journal: Journal, identity: str, after_block: Callable[[], None], lags: bool):
        self.journal, self._identity, self._after_block, self._lags = journal, identity, after_block, lags
        self._delayed: Piece | None = None  # with `lags`: what is written next
        self.blocks_found = 0

    def begin(
        self, chain: Chain, batches: Sequence[Passenger], hidden: HiddenStates, facts: list, arrays: Iterable[mx.array]
    ) -> None:
        """Begin a step: read which part of it is finished, and put the hidden states that the rest needs into `hidden`.

        Args:
            facts, arrays: what determines the step's bits besides the micro-batches and `identity`.
        """
        self._chain, self._batches, self._delayed = chain, batches, None
        n, lowest = len(chain.visits), chain.lowest_trained
        self.losses: list[mx.array] = []
        self.gradients: dict[str, mx.array] = {}
        self.cotangents: dict[int, mx.array] = {}
        self.journal.begin(_digest([self._identity, facts, *self._step_facts()], [*self._step_arrays(), *arrays]))
        self._found: set[str] = set()
        self.forward_from, self.backward_below = 0, n + 1
        while self.backward_below > lowest and self._take_gradients(self.backward_below - 1):
            self.backward_below -= 1
        inputs = range(lowest, self.backward_below)
        if self.backward_below <= n and self._take_cotangents() and all(map(self._has_input, inputs)):
            self.forward_from = n + 1
        else:
            self.losses, self.gradients, self.cotangents, self.backward_below = [], {}, {}, n + 1
            self.forward_from = next((p for p in range(lowest, 0, -1) if self._has_input(p)), 0)
            while lowest <= self.forward_from < n and self._has_input(self.forward_from + 1):
                self.forward_from += 1
            inputs = range(min(lowest, self.forward_from), self.forward_from + 1)
        self._put(inputs, hidden)
        self.blocks_found = min(self.forward_from, n) + n + 1 - self.backward_below

    def forward_done(self, position: int, batch: Passenger, output: mx.array) -> None:
        """The forward pass of a visit is done for a micro-batch."""
        is_last = batch is [b for b in self._batches if b.first <= position][-1]
        drop = self._names("h", position) if is_last and position < self._chain.lowest_trained else []
        self._write(f"h.{position + 1}.{batch.index}", [output], drop)
        if is_last:
            self._after_block()

    def backward_done(
        self, position: int, batch: Passenger, cotangent: mx.array | None, losses: list, gradients: dict
    ) -> None:
        """The backward pass of a visit (or of the head) is done for a micro-batch.

        Args:
            losses: of the micro-batches so far.
            gradients: all that there are so far, by name.
        """
        if cotangent is not None:
            self._write(f"c.{position}.{batch.index}", [cotangent])
        if batch is self._batches[-1]:
            of_visit = [gradients[name] for name in self._trained(position)]
            is_head = position == len(self._chain.visits)
            drop = [*self._names("c", position + 1), *self._names("h", position)]
            self._write(f"g.{position}", [*(losses if is_head else ()), *of_visit], drop)
            self._after_block()

    def finish(self) -> None:
        """Write the piece that was delayed, and wait until all are written."""
        if self._delayed is not None:
            self.journal.write(*self._delayed)
            self._delayed = None
        self.journal.finish_writing()

    def _step_facts(self) -> list:
        """What determines the step's bits, as JSON: shapes, adapters, teachers, seeds and what is trained."""
        shapes = [[batch.tokens.shape, str(batch.adapter)] for batch in self._batches]
        shapes += [[batch.teacher.weight, batch.teacher.temperature] for batch in self._batches if batch.teacher]
        chain, outside = self._chain, [name for name, *_ in self._chain.outside]
        return [shapes, chain.seed, chain.step, chain.lowest_trained, len(chain.visits), outside]

    def _step_arrays(self) -> list[mx.array]:
        """The arrays of the micro-batches and their teachers."""
        arrays = [array for b in self._batches for array in (b.tokens, b.targets, b.mask, b.total)]
        return arrays + [array for b in self._batches if b.teacher for array in b.teacher.arrays]

    def _write(self, name: str, arrays: list[mx.array], drop: Sequence[str] = ()) -> None:
        piece: Piece | None = (name, arrays, list(drop))
        if self._lags:
            piece, self._delayed = self._delayed, piece
        if piece is not None and piece[0] not in self._found:
            self.journal.write(*piece)

    def _names(self, kind: str, position: int) -> list[str]:
        return [f"{kind}.{position}.{batch.index}" for batch in self._batches]

    def _trained(self, position: int) -> list[str]:
        is_head = position == len(self._chain.visits)
        return [name for name, _, _ in (self._chain.outside if is_head else self._chain.trainable(position))]

    def _read(self, name: str) -> list[mx.array] | None:
        arrays = self.journal.read(name)
        self._found |= set() if arrays is None else {name}
        return arrays

    def _take_gradients(self, position: int) -> bool:
        arrays = self._read(f"g.{position}")
        if arrays is None:
            return False
        names = self._trained(position)
        n_losses = len(arrays) - len(names)
        self.losses += arrays[:n_losses]
        self.gradients.update(zip(names, arrays[n_losses:], strict=True))
        return True

    def _take_cotangents(self) -> bool:
        if not self._chain.passes_on(self.backward_below):
            return True
        pieces = [self._read(name) for name in self._names("c", self.backward_below)]
        self.cotangents = {i: arrays[0] for i, arrays in enumerate(pieces) if arrays is not None}
        return len(self.cotangents) == len(pieces)

    def _journalled(self, position: int) -> list[Passenger]:
        """The micro-batches whose input of this visit only the journal has: others are embedded, or stored anyway."""
        return [batch for batch in self._batches if batch.first < position]

    def _has_input(self, position: int) -> bool:
        return all(self._read(f"h.{position}.{batch.index}") for batch in self._journalled(position))

    def _put(self, positions: range, hidden: HiddenStates) -> None:
        """Put the inputs of these visits into `hidden`. The forward pass, if it is not done, goes on with the last."""
        for position in positions:
            for batch in self._journalled(position):
                arrays = self._read(f"h.{position}.{batch.index}")
                if arrays is None:
                    raise SlowftError(f"{self.journal.directory} was changed while it was read. Start again")
                hidden.put((batch.index, position), arrays[0], position >= self._chain.lowest_trained)
            for batch in self._batches if position < self.forward_from else ():
                hidden.forward_done((batch.index, position))


def _digest(facts: list, arrays: Iterable[mx.array]) -> str:
    digest = hashlib.sha256(json.dumps(facts).encode())
    for array in arrays:
        digest.update(f"{array.dtype} {array.shape}".encode())
        digest.update(memoryview(array.reshape(-1).view(mx.uint8)) if array.size else b"")
    return digest.hexdigest()
