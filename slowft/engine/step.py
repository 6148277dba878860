"""A step: two loops over blocks, forward and backward, with the head between them.

    hidden[0] = embed(tokens);  hidden[i + 1] = block_i(hidden[i]);  loss = head(hidden[n])
    cotangent of hidden[n] from the head;  (cotangent of hidden[i], gradients of block i) = vjp of block_i at hidden[i]

Each loop puts a block's weights in place once, for all micro-batches. The backward loop recomputes each block, as
mlx-lm's `grad_checkpoint` does. Losses and gradients are those of `nn.value_and_grad` on the whole model, to the last
bit.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx

from ..planning.measure import BACKWARD, FORWARD, GRAPH, HEAD
from ..planning.schedule import Schedule
from ..weights.residency import Residency
from .chain import Chain, Entry, Kept
from .hidden import HiddenStates, Key
from .journal import StepJournal
from .log_probabilities import LogProbabilities, Mixing
from .micro_batches import Passenger
from .spilled_caches import SpilledCaches

BlockPass = Callable[[int, Passenger], None]  # (visit, micro-batch)


class Gradients:
    """Gradients by the parameter's name, summed over micro-batches in their order."""

    def __init__(self):
        self.by_name: dict[str, mx.array] = {}

    def add(self, names: Sequence[str], gradients: Sequence[mx.array]) -> list[mx.array]:
        """Add these gradients, and return the sums so far, unevaluated."""
        for name, gradient in zip(names, gradients, strict=True):
            previous = self.by_name.get(name)
            self.by_name[name] = gradient if previous is None else previous + gradient
        return [self.by_name[name] for name in names]


def loss_and_grads(
    chain: Chain,
    batches: Sequence[Passenger],
    weights: Residency,
    hidden: HiddenStates,
    head_tokens: int | None,
    schedule: Schedule,
    journal: StepJournal | None,
) -> tuple[list[mx.array], dict[str, mx.array]]:
    """(loss of each micro-batch, gradients by name, summed over them).

    Args:
        head_tokens: how many tokens' logits exist at once; None for all.
        journal: says which blocks of this step are finished already, and writes down those that finish now.
    """
    step = _TrainingStep(chain, batches, weights, hidden, head_tokens, schedule, journal)
    embed(chain, batches, hidden, training=True, start=step.forward_from)
    run_forward(chain, batches, weights, step.forward, step.forward_from)
    if step.backward_below > len(chain.visits):
        run_head(chain, batches, weights, step.head)
    run_backward(chain, batches, weights, step.backward, step.backward_below)
    for batch in batches if chain.outside else ():
        add_embed_gradients(chain, batch, step.cotangents.pop(batch.index), step.gradients)
    return step.losses, step.gradients.by_name


@dataclass(eq=False)
class _TrainingStep:
    """What a training step computes for one micro-batch: at a block forward, at the head, and at a block backward.

    Attributes:
        forward_from: the visit at which the forward pass begins.
        backward_below: the backward pass is still to be made through the visits below this one. The head counts as the
            visit after the last block's.
        cotangents: by micro-batch, of what the backward pass came to last: a visit's input.
    """

    chain: Chain
    batches: Sequence[Passenger]
    weights: Residency
    hidden: HiddenStates
    head_tokens: int | None
    schedule: Schedule
    journal: StepJournal | None

    def __post_init__(self):
        self._lowest = self.chain.lowest_trained
        self._kept: dict[Key, Kept] = {}
        self.gradients = Gradients()
        self.forward_from, self.backward_below = 0, len(self.chain.visits) + 1
        self.losses: list[mx.array] = []
        self.cotangents: dict[int, mx.array] = {}
        if (journal := self.journal) is not None:
            self.forward_from, self.backward_below = journal.forward_from, journal.backward_below
            self.losses, self.cotangents = journal.losses, journal.cotangents
            self.gradients.by_name = journal.gradients

    def forward(self, position: int, batch: Passenger) -> None:
        key, is_trained = (batch.index, position), position >= self._lowest
        keep = self.schedule.kept_at(position) if is_trained else ()
        output, kept = self.chain.forward(position, batch, self.hidden.get(key), True, keep)
        self.weights.hand_over(output, kept.outputs)
        if kept.outputs:
            self._kept[key] = kept
        if is_trained:
            self.hidden.forward_done(key)
        else:
            self.hidden.discard(key)
        self.hidden.put((batch.index, position + 1), output, may_spill=position + 1 >= self._lowest)
        if self.journal is not None:
            self.journal.forward_done(position, batch, output)

    def head(self, batch: Passenger) -> None:
        key = batch.index, len(self.chain.visits)
        last = self.hidden.pop(key, next_backward(self.batches, *key))
        loss, cotangent, gradients = self.chain.loss_and_cotangent(batch, last, self.head_tokens)
        self.losses.append(loss)
        self._finish_backward(key, batch, cotangent, self.chain.outside, gradients, loss)

    def backward(self, position: int, batch: Passenger) -> None:
        key = batch.index, position
        hidden = self.hidden.pop(key, next_backward(self.batches, *key))
        above, kept = self.cotangents.pop(batch.index), self._kept.pop(key, None)
        cotangent, gradients = self.chain.backward(position, batch, hidden, above, kept)
        del hidden, above, kept  # so that their memory is free as soon as the gradients are computed
        self._finish_backward(key, batch, cotangent, self.chain.trainable(position), gradients)

    def _finish_backward(
        self,
        key: Key,
        batch: Passenger,
        cotangent: mx.array | None,
        entries: Sequence[Entry],
        gradients: Sequence[mx.array],
        *results: mx.array,
    ) -> None:
        """Have the cotangent of a visit's input, the sums of gradients and `results` computed, and keep them."""
        sums = self.gradients.add([name for name, _, _ in entries], gradients)
        self.weights.hand_over(*results, [] if cotangent is None else cotangent, sums)
        if cotangent is not None:
            self.cotangents[batch.index] = cotangent
        if self.journal is not None:
            self.journal.backward_done(key[1], batch, cotangent, self.losses, self.gradients.by_name)


def losses(
    chain: Chain, batches: Sequence[Passenger], weights: Residency, hidden: HiddenStates, head_tokens: int | None
) -> list[mx.array]:
    """Loss of each micro-batch, with the adapter that it asks for. Each block is read once for all of them."""
    results: list[mx.array] = []

    def head(batch: Passenger) -> None:
        results.append(chain.loss(batch, hidden.pop((batch.index, len(chain.visits))), head_tokens))
        weights.hand_over(results[-1])

    run_forward_only(chain, batches, weights, hidden, training=False)
    run_head(chain, batches, weights, head)
    return results


def decode(
    chain: Chain,
    batches: Sequence[Passenger],
    weights: Residency,
    hidden: HiddenStates,
    head_tokens: int,
    places: Sequence[mx.array],
    take: Callable[[int, int, mx.array], None],
    spilled: SpilledCaches | None = None,
) -> None:
    """A forward pass that reads and writes each micro-batch's key-value cache. Each block is read once for all.

    Args:
        head_tokens: how many tokens' logits exist at once.
        places: for each micro-batch, int32 `[n]`: the tokens whose logits are needed, numbered in the flat `[B x T]`.
        take: `take(micro_batch, first, logits)` is given logits `[m, V]` of the places from number `first` on.
        spilled: loads and stores those caches that are on disk.
    """

    def caches(position: int, batch: Passenger) -> list:
        return [leaf for leaf in batch.side[position].objects if hasattr(leaf, "state")]

    def forward(position: int, batch: Passenger) -> None:
        batch_caches = caches(position, batch)
        if spilled is not None:
            if batch is batches[0] and position + 1 < len(chain.visits):
                spilled.read_ahead([cache for other in batches for cache in caches(position + 1, other)])
            for cache in batch_caches:
                spilled.load(cache)
        output, _ = chain.forward(position, batch, hidden.pop((batch.index, position)), training=False)
        weights.hand_over(output, [cache.state for cache in batch_caches])
        if spilled is not None:
            mx.eval(output)
            for cache in batch_caches:
                spilled.store(cache)
        hidden.put((batch.index, position + 1), output, may_spill=False)

    def head(batch: Passenger) -> None:
        last, batch_places = hidden.pop((batch.index, len(chain.visits))), places[batch.index]
        if not chain.treats_tokens_alike(batch, last):
            logits = chain.logits(batch, last)
            take(batch.index, 0, logits.reshape(-1, logits.shape[-1])[batch_places])
            return
        flat = last.reshape(1, -1, last.shape[-1])
        for first in range(0, batch_places.size, head_tokens):
            take(batch.index, first, chain.logits(batch, flat[:, batch_places[first : first + head_tokens]])[0])

    embed(chain, batches, hidden, training=False)
    run_forward(chain, batches, weights, forward)
    run_head(chain, batches, weights, head)


def first_not_finite(
    chain: Chain, batches: Sequence[Passenger], weights: Residency, hidden: HiddenStates
) -> tuple[int, int] | None:
    """(micro-batch, visit) of the first block whose output, in a forward pass of training, is not finite; or None."""
    not_finite: list[tuple[int, int]] = []

    def check(position: int, batch: Passenger, output: mx.array) -> None:
        if not mx.isfinite(output).all().item():
            not_finite.append((batch.index, position))

    run_forward_only(chain, batches, weights, hidden, training=True, after_block=check)
    for batch in batches:
        hidden.pop((batch.index, len(chain.visits)))
    return not_finite[0] if not_finite else None


def log_probabilities(
    chain: Chain,
    batches: Sequence[Passenger],
    weights: Residency,
    hidden: HiddenStates,
    head_tokens: int | None,
    top_k: int,
    token_ids: Sequence[int],
    on_visit: Callable[[], object],
    groups: Sequence[Sequence[Passenger]],
    mixing: Mixing,
) -> list[list[LogProbabilities]]:
    """For each group, log-probabilities of its targets by the logits that `mixing` makes of its micro-batches' logits.

    Each block is read once for all micro-batches.

    Args:
        on_visit: is called when a block has served all micro-batches.
        groups: of micro-batches with the same tokens and targets, ordered by their last members' places in `batches`.
    """
    results: list[list[LogProbabilities]] = []
    remaining = iter(groups)
    group = next(remaining)

    def after_block(position: int, batch: Passenger, output: mx.array) -> None:
        if batch is batches[-1]:
            on_visit()

    def head(batch: Passenger) -> None:
        nonlocal group
        if batch is not group[-1]:
            return
        last = [hidden.pop((member.index, len(chain.visits))) for member in group]
        results.append(chain.log_probabilities(group, last, head_tokens, top_k, token_ids, mixing))
        group = next(remaining, group)

    run_forward_only(chain, batches, weights, hidden, training=False, after_block=after_block)
    run_head(chain, batches, weights, head)
    return results


def loss_and_grads_in_memory(
    chain: Chain,
    batches: Sequence[Passenger],
    weights: Residency,
    hidden: HiddenStates,
    head_tokens: int | None,
    first: int,
) -> tuple[list[mx.array], dict[str, mx.array]]:
    """The same as `loss_and_grads`, with all weights in memory: ordinary training, one graph for each micro-batch.

    Args:
        first: the visit at which the graph begins, the lowest trained one or one below. Its input comes from the blocks
            below, or from the stored activations.
    """
    losses, gradients = [], Gradients()
    run_forward_only(chain, batches, weights, hidden, training=True, end=first)
    with weights.everything_in_place():
        for batch in batches:
            with weights.computing(GRAPH, GRAPH, FORWARD, batch.index, is_head=True):
                weights.reuse.begin_graph((batch.tokens.shape, first))
                graph_input = hidden.pop((batch.index, first))
                loss, cotangent, by_name = chain.loss_and_grads(first, batch, graph_input, head_tokens)
                del graph_input
                sums = gradients.add(list(by_name), list(by_name.values()))
                mx.eval(loss, [] if cotangent is None else cotangent, sums)
                losses.append(loss)
            if cotangent is not None:
                add_embed_gradients(chain, batch, cotangent, gradients)
    return losses, gradients.by_name


def embed(chain: Chain, batches: Sequence[Passenger], hidden: HiddenStates, training: bool, start: int = 0) -> None:
    """Compute the first block's input for the micro-batches that begin there, and note what blocks are called with.

    Args:
        start: the visit at which the forward pass begins.
    """
    for batch in batches:
        embedded = chain.embed(batch, training)
        if batch.first == 0 and (start == 0 or chain.lowest_trained == 0):
            hidden.put((batch.index, 0), embedded, may_spill=False)


def add_embed_gradients(chain: Chain, batch: Passenger, cotangent: mx.array, gradients: Gradients) -> None:
    """Add the gradients of the parameters below the first block, given the cotangent of that block's input."""
    mx.eval(gradients.add([name for name, _, _ in chain.outside], chain.embed_gradients(batch, cotangent)))


def run_forward(
    chain: Chain,
    batches: Sequence[Passenger],
    weights: Residency,
    forward: BlockPass,
    start: int = 0,
    end: int | None = None,
) -> None:
    """Call `forward` for every visit from `start` on and below `end`, and for every batch that takes part in it."""
    first = max(start, min(batch.first for batch in batches))
    for position, block in list(enumerate(chain.visits))[first:end]:
        with weights.in_place(block):
            for batch in batches:
                if batch.first <= position:
                    with weights.computing(block.name, chain.kind_of(block), FORWARD, batch.index):
                        forward(position, batch)


def run_backward(
    chain: Chain, batches: Sequence[Passenger], weights: Residency, backward: BlockPass, below: int
) -> None:
    """Call `backward` for every visit below `below`, down to the lowest trained one, and for every batch."""
    for position, block in reversed(list(enumerate(chain.visits))[chain.lowest_trained : below]):
        with weights.in_place(block):
            for batch in batches:
                with weights.computing(block.name, chain.kind_of(block), BACKWARD, batch.index):
                    backward(position, batch)


def run_forward_only(
    chain: Chain,
    batches: Sequence[Passenger],
    weights: Residency,
    hidden: HiddenStates,
    training: bool,
    after_block: Callable[[int, Passenger, mx.array], None] | None = None,
    end: int | None = None,
) -> None:
    """A forward pass that no backward pass follows: only the last block's output is kept, for each micro-batch.

    Args:
        after_block: `after_block(position, batch, output)` is called after each block and micro-batch.
        end: the visit before which the pass ends.
    """

    def forward(position: int, batch: Passenger) -> None:
        output, _ = chain.forward(position, batch, hidden.pop((batch.index, position)), training)
        weights.hand_over(output)
        if after_block is not None:
            after_block(position, batch, output)
        hidden.put((batch.index, position + 1), output, may_spill=False)

    embed(chain, batches, hidden, training)
    run_forward(chain, batches, weights, forward, end=end)


def run_head(chain: Chain, batches: Sequence[Passenger], weights: Residency, head: Callable[[Passenger], None]) -> None:
    """Call `head(batch)` for every micro-batch."""
    with weights.head_in_place(chain.head_units):
        for batch in batches:
            with weights.computing(HEAD, HEAD, FORWARD, batch.index, is_head=True):
                head(batch)


def next_backward(batches: Sequence[Passenger], index: int, position: int) -> Key:
    """The (micro-batch, visit) whose hidden state the backward pass needs after this one's."""
    return (index + 1, position) if index + 1 < len(batches) else (0, position - 1)
