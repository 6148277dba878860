"""The finished blocks of a step that takes minutes, on disk, so that a kill costs a block and not the step.

Comes in: what blocks put out, there and back, as a step makes it. Goes out: where a step that was broken off goes on,
and what it needs for that. What is stored belongs to a key made of everything that determines a step's bits: no other
step finds it. Knows neither weights nor runs.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence

import mlx.core as mx

from ..errors import SlowftError
from ..weights.journal import Journal
from .chain import Chain, Passenger
from .hidden import HiddenStates

Written = tuple[str, list[mx.array], list[str]]  # a piece's name, its arrays, the pieces that it makes needless


class StepJournal:
    """What is finished of one step after the other; made anew for each by `begin`.

    The input of each visit (`h`), the cotangent of that (`c`), and the gradients as the visit on the way back left them
    (`g`), the head being the visit after the last. A visit's input goes when its gradients are there.

    Args:
        journal: where it is written to.
        identity: of the model, the software and whatever else determines bits and is not in memory.
        after_block: is called after each finished block, and may raise to end the step there.
        lags: a piece is written when the next one is handed in: a GPU computes that meanwhile, and is not waited for.

    Attributes:
        start: the first visit of the forward pass that is still to be done; above the last: not even the head is.
        below: the backward pass is done from this visit on.
        losses, gradients, cotangents: as the part of the step that was done left them.
        blocks_found: how many visits were done, there and back.
    """

    def __init__(self, journal: Journal, identity: str, after_block: Callable[[], None], lags: bool):
        self.journal, self._identity, self._after_block, self._lags = journal, identity, after_block, lags
        self._held: Written | None = None
        self.blocks_found = 0

    def begin(
        self,
        chain: Chain,
        batches: Sequence[Passenger],
        hidden: HiddenStates,
        facts: list,
        arrays: Iterable[mx.array],
    ) -> None:
        """A step begins: find what is done of it, and put the hidden states that it needs in place.

        Args:
            facts, arrays: what determines its bits besides micro-batches and `identity`.
        """
        self._chain, self._batches, self._held = chain, batches, None
        n, lowest = len(chain.visits), chain.lowest_trained
        self.losses: list[mx.array] = []
        self.gradients: dict[str, mx.array] = {}
        self.cotangents: dict[int, mx.array] = {}
        of_batches = [array for b in batches for array in (b.tokens, b.targets, b.mask, b.total)]
        teachers = [b.teacher for b in batches if b.teacher is not None]
        of_batches += [array for teacher in teachers for array in teacher.arrays]
        shapes = [[b.tokens.shape, str(b.adapter)] for b in batches]
        shapes += [[teacher.weight, teacher.temperature] for teacher in teachers]
        facts = [self._identity, facts, shapes, chain.seed, chain.step, lowest, n, [name for name, *_ in chain.outside]]
        self.journal.begin(_digest(facts, [*of_batches, *arrays]))
        self._found: set[str] = set()
        self.start, self.below = 0, n + 1
        while self.below > lowest and self._take_gradients(self.below - 1):
            self.below -= 1
        inputs = range(lowest, self.below)
        if self.below <= n and self._take_cotangents() and all(map(self._has_input, inputs)):
            self.start = n + 1
        else:
            self.losses, self.gradients, self.cotangents, self.below = [], {}, {}, n + 1
            self.start = next((p for p in range(lowest, 0, -1) if self._has_input(p)), 0)
            while lowest <= self.start < n and self._has_input(self.start + 1):
                self.start += 1
            inputs = range(min(lowest, self.start), self.start + 1)
        self._put(inputs, hidden)
        self.blocks_found = min(self.start, n) + n + 1 - self.below

    def passed(self, position: int, batch: Passenger, output: mx.array) -> None:
        """The forward pass is done with a visit for a micro-batch."""
        is_last = batch is [b for b in self._batches if b.first <= position][-1]
        needless = self._names("h", position) if is_last and position < self._chain.lowest_trained else []
        self._write(f"h.{position + 1}.{batch.index}", [output], needless)
        if is_last:
            self._after_block()

    def came_back(
        self, position: int, batch: Passenger, cotangent: mx.array | None, losses: list, gradients: dict
    ) -> None:
        """The backward pass is done with a visit (or the head) for a micro-batch.

        Args:
            losses: of the micro-batches so far. gradients: all there are, by name.
        """
        if cotangent is not None:
            self._write(f"c.{position}.{batch.index}", [cotangent])
        if batch is self._batches[-1]:
            found = [gradients[name] for name in self._trained(position)]
            is_head = position == len(self._chain.visits)
            needless = [*self._names("c", position + 1), *self._names("h", position)]
            self._write(f"g.{position}", [*(losses if is_head else ()), *found], needless)
            self._after_block()

    def finish(self) -> None:
        """Write what is held back."""
        if self._held is not None:
            self.journal.write(*self._held)
            self._held = None
        self.journal.finish_writing()

    def _write(self, name: str, arrays: list[mx.array], needless: Sequence[str] = ()) -> None:
        now: Written | None = (name, arrays, list(needless))
        if self._lags:
            now, self._held = self._held, now
        if now is not None and now[0] not in self._found:
            self.journal.write(*now)

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
        if not self._chain.passes_on(self.below):
            return True
        found = [self._read(name) for name in self._names("c", self.below)]
        self.cotangents = {i: arrays[0] for i, arrays in enumerate(found) if arrays is not None}
        return len(self.cotangents) == len(found)

    def _stored(self, position: int) -> list[Passenger]:
        """The micro-batches whose input of this visit is not there anyway: embedded now, or stored between steps."""
        return [batch for batch in self._batches if batch.first < position]

    def _has_input(self, position: int) -> bool:
        return all(self._read(f"h.{position}.{batch.index}") for batch in self._stored(position))

    def _put(self, positions: range, hidden: HiddenStates) -> None:
        """Put the inputs of these visits in place. The last one is what the forward pass goes on with, if it does."""
        for position in positions:
            for batch in self._stored(position):
                arrays = self._read(f"h.{position}.{batch.index}")
                if arrays is None:
                    raise SlowftError(f"{self.journal.directory} was changed while it was read. Start again")
                hidden.put((batch.index, position), arrays[0], position >= self._chain.lowest_trained)
            for batch in self._batches if position < self.start else ():
                hidden.passed((batch.index, position))


def _digest(facts: list, arrays: Iterable[mx.array]) -> str:
    digest = hashlib.sha256(json.dumps(facts).encode())
    for array in arrays:
        digest.update(f"{array.dtype} {array.shape}".encode())
        digest.update(memoryview(array.reshape(-1).view(mx.uint8)) if array.size else b"")
    return digest.hexdigest()
