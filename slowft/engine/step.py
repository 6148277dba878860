"""A step: two loops over blocks, forward and backward, with the head between them.

    hidden[0] = embed(tokens);  hidden[i + 1] = block_i(hidden[i]);  loss = head(hidden[n])
    cotangent of hidden[n] from the head;  (cotangent of hidden[i], gradients of block i) = vjp of block_i at hidden[i]

Each block's weights are in place once a loop, for all micro-batches, and are recomputed with in the second (as mlx-lm's
`grad_checkpoint` does). Losses and gradients are those of `nn.value_and_grad` on the whole model, to the last bit.
"""

from collections.abc import Callable, Sequence

import mlx.core as mx

from ..planning.measure import BACKWARD, FORWARD, GRAPH, HEAD
from ..planning.schedule import Schedule
from ..weights.residency import Residency
from .chain import Chain, Kept, Passenger
from .hidden import HiddenStates
from .journal import StepJournal
from .log_probabilities import LogProbabilities, Mixing
from .spilled_caches import SpilledCaches


class Gradients:
    """Gradients by the parameter's name, summed over micro-batches in their order."""

    def __init__(self):
        self.by_name: dict[str, mx.array] = {}

    def add(self, names: Sequence[str], gradients: Sequence[mx.array]) -> list[mx.array]:
        """Returns the sums, unevaluated."""
        for name, gradient in zip(names, gradients, strict=True):
            before = self.by_name.get(name)
            self.by_name[name] = gradient if before is None else before + gradient
        return [self.by_name[name] for name in names]


def loss_and_grads(
    chain: Chain,
    batches: Sequence[Passenger],
    weights: Residency,
    hidden: HiddenStates,
    schedule: Schedule,
    head_tokens: int | None,
    journal: StepJournal | None = None,
) -> tuple[list[mx.array], dict[str, mx.array]]:
    """(loss of each micro-batch, gradients by name, summed over them).

    Args:
        head_tokens: whose logits exist at once; None for the usual number.
        journal: has what is finished of this step already, and is told what else is.
    """
    lowest, losses, gradients = chain.lowest_trained, [], Gradients()
    kept: dict[tuple[int, int], Kept] = {}
    cotangents: dict[int, mx.array] = {}
    start, done = 0, len(chain.visits) + 1
    if journal is not None:
        start, done, losses, cotangents = journal.start, journal.below, journal.losses, journal.cotangents
        gradients.by_name = journal.gradients

    def forward(position: int, batch: Passenger) -> None:
        keep = schedule.kept[position] if position < len(schedule.kept) and position >= lowest else ()
        key = batch.index, position
        output, of_layers = chain.forward(position, batch, hidden.get(key), True, keep)
        weights.hand_over(output, of_layers.outputs)
        if of_layers.outputs:
            kept[key] = of_layers
        if position >= lowest:
            hidden.passed(key)
        else:
            hidden.discard(key)
        hidden.put((batch.index, position + 1), output, may_spill=position + 1 >= lowest)
        if journal is not None:
            journal.passed(position, batch, output)

    def head(batch: Passenger) -> None:
        key = batch.index, len(chain.visits)
        last = hidden.pop(key, following(batches, *key))
        loss, cotangent, of_outside = chain.loss_and_cotangent(batch, last, head_tokens)
        sums = gradients.add([name for name, _, _ in chain.outside], of_outside)
        weights.hand_over(loss, [] if cotangent is None else cotangent, sums)
        losses.append(loss)
        if cotangent is not None:
            cotangents[batch.index] = cotangent
        if journal is not None:
            journal.came_back(len(chain.visits), batch, cotangent, losses, gradients.by_name)

    def backward(position: int, batch: Passenger) -> None:
        key = batch.index, position
        into = hidden.pop(key, following(batches, *key))
        below, of_block = chain.backward(position, batch, into, cotangents.pop(batch.index), kept.pop(key, None))
        del into
        sums = gradients.add([name for name, _, _ in chain.trainable(position)], of_block)
        weights.hand_over([] if below is None else below, sums)
        if below is not None:
            cotangents[batch.index] = below
        if journal is not None:
            journal.came_back(position, batch, below, losses, gradients.by_name)

    embed(chain, batches, hidden, training=True, start=start)
    run_forward(chain, batches, weights, forward, start)
    if done > len(chain.visits):
        run_head(chain, batches, weights, head)
    for position, block in reversed(list(enumerate(chain.visits))[lowest:done]):
        with weights.in_place(block):
            for batch in batches:
                with weights.computing(block.name, chain.kind_of(block), BACKWARD, batch.index):
                    backward(position, batch)
    for batch in batches if chain.outside else ():
        add_embed_gradients(chain, batch, cotangents.pop(batch.index), gradients)
    return losses, gradients.by_name


def losses(
    chain: Chain, batches: Sequence[Passenger], weights: Residency, hidden: HiddenStates, head_tokens: int | None
) -> list[mx.array]:
    """Loss of each micro-batch, with the adapter that it asks for. Each block is read once for all of them."""
    found: list[mx.array] = []

    def head(batch: Passenger) -> None:
        found.append(chain.loss(batch, hidden.pop((batch.index, len(chain.visits))), head_tokens))
        weights.hand_over(found[-1])

    run_forward_only(chain, batches, weights, hidden, training=False)
    run_head(chain, batches, weights, head)
    return found


def decode(
    chain: Chain,
    batches: Sequence[Passenger],
    weights: Residency,
    hidden: HiddenStates,
    head_tokens: int,
    wanted: Sequence[mx.array],
    take: Callable[[int, int, mx.array], None],
    spilled: SpilledCaches | None = None,
) -> None:
    """A forward pass that reads and writes each micro-batch's key-value cache. Each block is read once for all.

    Args:
        head_tokens: whose logits exist at once.
        wanted: for each micro-batch, places in its tokens `[B x T]` (flat, int32 `[n]`) whose logits are asked for.
        take: `take(micro_batch, first, logits)` gets them, `[n, V]`, of the wanted places from `first` on.
        spilled: knows those caches that are on disk.
    """

    def caches(position: int, batch: Passenger) -> list:
        return [leaf for leaf in batch.side[position].objects if hasattr(leaf, "state")]

    def forward(position: int, batch: Passenger) -> None:
        of_batch = caches(position, batch)
        if spilled is not None:
            if batch is batches[0] and position + 1 < len(chain.visits):
                spilled.ahead([cache for other in batches for cache in caches(position + 1, other)])
            for cache in of_batch:
                spilled.bring(cache)
        output, _ = chain.forward(position, batch, hidden.pop((batch.index, position)), training=False)
        weights.hand_over(output, [cache.state for cache in of_batch])
        if spilled is not None:
            mx.eval(output)
            for cache in of_batch:
                spilled.put_away(cache)
        hidden.put((batch.index, position + 1), output, may_spill=False)

    def head(batch: Passenger) -> None:
        last, places = hidden.pop((batch.index, len(chain.visits))), wanted[batch.index]
        if not chain.gives_tokens_alone(batch, last):
            logits = chain.logits(batch, last)
            take(batch.index, 0, logits.reshape(-1, logits.shape[-1])[places])
            return
        flat = last.reshape(1, -1, last.shape[-1])
        for first in range(0, places.size, head_tokens):
            take(batch.index, first, chain.logits(batch, flat[:, places[first : first + head_tokens]])[0])

    embed(chain, batches, hidden, training=False)
    run_forward(chain, batches, weights, forward)
    run_head(chain, batches, weights, head)


def first_not_finite(
    chain: Chain, batches: Sequence[Passenger], weights: Residency, hidden: HiddenStates, head_tokens: int | None
) -> tuple[int, int] | None:
    """(micro-batch, visit) of the first block, in a forward pass of training, that puts out what is not finite."""
    found: list[tuple[int, int]] = []

    def look(position: int, batch: Passenger, output: mx.array) -> None:
        if not mx.isfinite(output).all().item():
            found.append((batch.index, position))

    run_forward_only(chain, batches, weights, hidden, training=True, passed=look)
    for batch in batches:
        hidden.pop((batch.index, len(chain.visits)))
    return found[0] if found else None


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
    """Of each group's targets, what is mixed of its passengers' logits. Each block is read once for all of them.

    Args:
        on_visit: called after each block has served all micro-batches.
        groups: of micro-batches with the same tokens and targets, in the order in which their last ones come.
    """
    found: list[list[LogProbabilities]] = []
    waiting = iter(groups)
    group = next(waiting)

    def passed(position: int, batch: Passenger, output: mx.array) -> None:
        if batch is batches[-1]:
            on_visit()

    def head(batch: Passenger) -> None:
        nonlocal group
        if batch is not group[-1]:
            return
        last = [hidden.pop((one.index, len(chain.visits))) for one in group]
        found.append(chain.log_probabilities(group, last, head_tokens, top_k, token_ids, mixing))
        group = next(waiting, group)

    run_forward_only(chain, batches, weights, hidden, training=False, passed=passed)
    run_head(chain, batches, weights, head)
    return found


def loss_and_grads_in_memory(
    chain: Chain,
    batches: Sequence[Passenger],
    weights: Residency,
    hidden: HiddenStates,
    head_tokens: int | None,
    first: int,
) -> tuple[list[mx.array], dict[str, mx.array]]:
    """The same as `loss_and_grads` where all weights are in memory: ordinary training, one graph for each micro-batch.

    Args:
        first: the visit at which the graph begins, no higher than the lowest trained: what goes in there is stored.
    """
    losses, gradients = [], Gradients()
    run_forward_only(chain, batches, weights, hidden, training=True, end=first)
    with weights.everything_in_place():
        for batch in batches:
            with weights.computing(GRAPH, GRAPH, FORWARD, batch.index, is_head=True):
                weights.reuse.begin_graph((batch.tokens.shape, first))
                into = hidden.pop((batch.index, first))
                loss, cotangent, of_batch = chain.loss_and_grads(first, batch, into, head_tokens)
                del into
                sums = gradients.add(list(of_batch), list(of_batch.values()))
                mx.eval(loss, [] if cotangent is None else cotangent, sums)
                losses.append(loss)
            if cotangent is not None:
                add_embed_gradients(chain, batch, cotangent, gradients)
    return losses, gradients.by_name


def embed(chain: Chain, batches: Sequence[Passenger], hidden: HiddenStates, training: bool, start: int = 0) -> None:
    """The first block's input, of the micro-batches that begin there; and what all blocks are called with.

    Args:
        start: the forward pass begins at this visit.
    """
    for batch in batches:
        first = chain.embed(batch, training)
        if batch.first == 0 and (start == 0 or chain.lowest_trained == 0):
            hidden.put((batch.index, 0), first, may_spill=False)


def add_embed_gradients(chain: Chain, batch: Passenger, cotangent: mx.array, gradients: Gradients) -> None:
    """Add what parameters outside the blocks get by way of the first block's input, whose cotangent is given."""
    mx.eval(gradients.add([name for name, _, _ in chain.outside], chain.embed_gradients(batch, cotangent)))


def run_forward(
    chain: Chain, batches: Sequence[Passenger], weights: Residency, forward, start: int = 0, end: int | None = None
) -> None:
    """`forward(position, batch)` of every block (from the visit `start` to `end`) for all batches that take part."""
    first = max(start, min(batch.first for batch in batches))
    for position, block in list(enumerate(chain.visits))[first:end]:
        with weights.in_place(block):
            for batch in batches:
                if batch.first <= position:
                    with weights.computing(block.name, chain.kind_of(block), FORWARD, batch.index):
                        forward(position, batch)


def run_forward_only(
    chain: Chain,
    batches: Sequence[Passenger],
    weights: Residency,
    hidden: HiddenStates,
    training: bool,
    passed: Callable[[int, Passenger, mx.array], None] | None = None,
    end: int | None = None,
) -> None:
    """A forward pass that nothing comes back from: of each micro-batch only the last block's output stays.

    Args:
        passed: `passed(position, batch, output)` is called after each block.
        end: the visit before which it ends.
    """

    def forward(position: int, batch: Passenger) -> None:
        output, _ = chain.forward(position, batch, hidden.pop((batch.index, position)), training)
        weights.hand_over(output)
        if passed is not None:
            passed(position, batch, output)
        hidden.put((batch.index, position + 1), output, may_spill=False)

    embed(chain, batches, hidden, training)
    run_forward(chain, batches, weights, forward, end=end)


def run_head(chain: Chain, batches: Sequence[Passenger], weights: Residency, head) -> None:
    """`head(batch)` of every micro-batch."""
    with weights.head_in_place(chain.head_units):
        for batch in batches:
            with weights.computing(HEAD, HEAD, FORWARD, batch.index, is_head=True):
                head(batch)


def following(batches: Sequence[Passenger], index: int, position: int) -> tuple[int, int]:
    """The (micro-batch, visit) whose hidden state the backward pass comes to next."""
    return (index + 1, position) if index + 1 < len(batches) else (0, position - 1)
