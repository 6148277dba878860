"""One step over the whole model: forward over the blocks, the head, backward over the blocks.

Comes in: token batches. Goes out: loss and gradients, the numbers that `nn.value_and_grad` gives on the
whole model in memory. The model's own `__call__` drives everything; its units' calls arrive here.
"""

import itertools
import threading
import warnings
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from .. import tracing
from ..errors import ConfigError, SlowftError, SlowftWarning
from ..memory import limits
from ..models.layers import Layer
from ..models.seams import FLOATS, TOKENS, Arrays, Cut, Probe, Unit, array_entries, trainable_entries
from ..models.weights import Param, placeholder, read_whole
from ..planning.experts import GROUP_NBYTES, is_read_on_demand
from ..planning.graph import keeping_random_state
from ..planning.schedule import Schedule
from ..storage.activation_cache import ActivationCache
from ..storage.reader import Reader
from ..streaming.residency import Residency
from ..streaming.reuse import Reuse
from ..streaming.threads import MicroBatches
from .activations import Activations
from .block import Memory, UnitCall
from .boundary import Boundary, why_not
from .cores import Cores
from .head import HeadLoss, loss_mask, token_loss, treats_tokens_alike, usual_chunk
from .kept import KeptProducts, Products
from .layers import LayerWork
from .parts import HeadPart, Tail, TailCall, alias, unevaluated_zeros
from .pieces import Pieces, PieceWork
from .randomness import dropout_seed
from .stats import Stats
from .trees import attach, detach, uncompiled

HEAD = "head"  # stands for the tail and all layers behind the last block where units are named


class Engine:
    """Runs the units of one opened model.

    Attributes:
        seed, step: what dropout masks are drawn from, together with block and micro-batch. `step` goes up by
            one with every forward pass in training mode, or every `loss_and_grads`.
        schedule: what is kept in memory; see `follow`.
        head_chunk_tokens: tokens whose logits may exist at once; None: the schedule's, else as many as fit
            in 64 MB.
    """

    def __init__(self, model: nn.Module, cut: Cut, reader: Reader):
        self.model, self.cut = model, cut
        self._residency = Residency(cut.blocks, reader)
        self._micro_batches = MicroBatches()
        self._local = threading.local()  # what the calling thread is in the middle of
        self._head_in_chunks: bool | None = None  # not known before the head's weights were seen
        self._outside: list[tuple[Any, Any]] = []  # (owner, key) of trainable parameters outside the blocks
        self._lowest_trained = 0  # the first visit of a forward pass to a block with trainable parameters
        self._expects_backward = False
        units = [*cut.blocks, *(unit for units in cut.outside.values() for unit in units)]
        self._on_disk = {(id(p.owner), p.key) for unit in units for p in unit.params}
        self.seed = 0
        self.step = 0
        self.head_chunk_tokens: int | None = None
        self.tokens_of_last_step = 0
        self.schedule = Schedule()
        self._activations = Activations()
        self._stored: Boundary | None = None
        self._boundary = 0  # the visit whose input is stored on disk between steps; 0 for none
        self._from_boundary: set[int] = set()  # micro-batches of this step that begin there
        self._all_from_boundary = False
        self._has_warned = False
        self._routed_to: dict[Layer, float] = {}  # experts of each layer that a token goes to
        self._gradients: dict[tuple[int, Any], mx.array] = {}  # of blocks' own arrays, summed over micro-batches
        self.kept = KeptProducts()
        self.pieces = PieceWork()
        self.layers = LayerWork(self._residency)
        for unit in cut.blocks:
            self.layers.watch(unit)
        self.cores = Cores(self._residency.streams)
        self.stats = Stats(reader, self._residency, self._activations)

    # --- What the model's units do when they are called -------------------------------------------

    def on_block(self, unit: Unit, inner: Callable, args: tuple, kwargs: dict) -> Any:
        if (part := self._part) is not None:
            return part.on_block(unit, inner, args, kwargs)
        first = args[0] if args else None
        tokens = first.size // first.shape[-1] if isinstance(first, mx.array) and first.ndim == 3 else None
        position, seed = self._next_position(unit, tokens)
        if self._is_below_start(position):
            if not self._all_from_boundary:  # stay in step with the micro-batches that begin below
                self._serve(unit, lambda: None)
            return args[0]
        collected = getattr(self._local, "hidden", None)
        if collected is not None and self._in_step and position >= self._first_tail:
            collected.tail.append(TailCall(unit, args, kwargs, seed))
            collected.is_complete = position == len(self.cut.order) - 1
            return alias(args[0])  # the head's own pass computes it: this only stands for it
        needed = not self._in_step or bool(self._outside) or position > self._lowest_trained
        output = self._stream(unit, inner, args, kwargs, seed, needed, self._memory_of(position))
        if collected is not None and position == len(self.cut.order) - 1:
            collected.output, collected.is_complete = alias(output), True
        return output

    def on_matmul(self, unit: Unit, inner: Callable, args: tuple, kwargs: dict) -> Any:
        if (part := self._part) is not None:
            return part.on_matmul(unit, inner, args, kwargs)
        hidden = getattr(self._local, "hidden", None)
        if hidden is not None and hidden.is_complete:  # behind the last block: the head's own pass does it
            return mx.zeros(inner(*args, **kwargs).shape)
        return self._stream(unit, inner, args, kwargs, seed=0, inputs_need_gradient=True, memory=Memory())

    def on_rows(self, unit: Unit, inner: Callable, args: tuple, kwargs: dict) -> Any:
        if (part := self._part) is not None:
            return part.on_rows(unit, inner, args, kwargs)
        if self._is_below_start(0):
            return unevaluated_zeros(inner(*args, **kwargs))
        ids = detach(args[0]).values
        if ids.size == 0:
            return inner(args[0])
        rows, inverse = np.unique(ids, return_inverse=True)
        n_rows = unit.params[0].source.shape[0]
        if not 0 <= rows[0] <= rows[-1] < n_rows:
            raise SlowftError(
                f"token id {rows[-1] if rows[-1] >= n_rows else rows[0]} is outside of {unit.name} ({n_rows} rows)"
            )
        index = mx.array(inverse.reshape(ids.shape).astype(np.int32))

        def job():
            output = inner(index)
            mx.eval(output)
            return output

        job = tracing.spanned(job, "compute", unit.name, **{"pass": "forward", "rows": rows.size})
        return self._residency.look_up(unit, rows.tolist(), job)

    @property
    def _part(self):
        """Stands in for the units while the calling thread runs only a part of the model."""
        return getattr(self._local, "part", None)

    @contextmanager
    def running_part(self, part):
        self._local.part, before = part, self._part
        arrays = Arrays(self.model) if self.cut.keeps_arrays else None
        try:
            yield part
        finally:
            self._local.part = before
            if arrays is not None:
                arrays.restore()  # what a part makes may be of another thread

    def _stream(self, unit: Unit, inner, args, kwargs, seed: int, inputs_need_gradient: bool, memory: Memory) -> Any:
        entries = unit.adapter()
        params = [self._traced(owner, key) for owner, key in entries]
        trainable = {(id(owner), key) for _, owner, key in unit.trainable()}

        def in_pieces(*args, **kwargs):
            with self.cores.shared(), self.pieces.cutting(self.cuts, seed):
                return inner(*args, **kwargs)

        call = UnitCall(
            in_pieces,
            args,
            kwargs,
            entries,
            params,
            # only in a step of our own is it known which gradients nobody asks for
            trained=[not self._in_step or (id(owner), key) in trainable for owner, key in entries],
            serve=lambda job, backward: self._serve(unit, job, backward, entries, params),
            seed=seed,
            inputs_need_gradient=inputs_need_gradient,
            memory=memory,
            carriers=self.cut.carriers,
            layers=self.layers,
            in_training=self._expects_backward,
        )
        return call()

    def _memory_of(self, position: int) -> Memory:
        """What is kept of a visit: of the calling micro-batch's step, or of an evaluation."""
        key = self._micro_batches.index, position
        if not self._in_step:
            at_boundary = key[0] is not None and self._boundary in (position, position + 1)
            return _BoundaryMemory(self, key) if self._boundary and at_boundary else Memory()
        names = self.schedule.kept[position] if position < len(self.schedule.kept) else ()
        return _VisitMemory(self, key, names if self.comes_back(position) else ())

    def comes_back(self, position: int) -> bool:
        """Whether the backward pass gets to this visit."""
        return bool(self._outside) or position >= self._lowest_trained

    def _is_below_start(self, position: int) -> bool:
        """Whether the calling micro-batch begins at the boundary, and this visit lies below."""
        return position < self._boundary and self._micro_batches.index in self._from_boundary

    @property
    def _in_step(self) -> bool:
        """Whether the calling thread traces a micro-batch of `loss_and_grads`, rather than somebody else's function."""
        return getattr(self._local, "trace", None) is not None

    def _serve(self, unit: Unit | str, job: Callable, backward: bool = False, entries=(), params=()) -> Any:
        """The job's result, with the unit's weights in place; micro-batches of a step are served together."""
        if backward and not self._expects_backward:  # a gradient of a model that is not in training mode
            self._expect(backward=True)
        micro_batch = self._micro_batches.index
        name, direction = (HEAD, HEAD) if unit is HEAD else (unit.name, "backward" if backward else "forward")
        job = tracing.spanned(job, "compute", name, **{"pass": direction, "micro-batch": micro_batch or 0})
        if unit is not HEAD:
            job = self.layers.in_order(job, backward)
        try:
            if micro_batch is None:
                return self._serve_together(unit, [job])[0]
            return self._micro_batches.meet(unit, job)
        finally:
            for (owner, key), value in zip(entries, params):
                owner[key] = value
            self._put_trace_in_place()

    def _serve_together(self, unit: Unit | str, jobs: Sequence[Callable]) -> list:
        if unit is HEAD:
            return self._residency.with_outside(jobs, is_head=True)
        if unit in self.cut.blocks:
            return self._residency.with_block(unit, jobs)
        return self._residency.with_outside([lambda job=job: (self._residency.bring(unit), job())[1] for job in jobs])

    # --- Where in the model a trace is ---------------------------------------------------------------

    def _next_position(self, unit: Unit, tokens: int | None) -> tuple[int, int]:
        """Which visit of a forward pass (over `tokens` tokens) this is, and the random seed it runs under."""
        order, local = self.cut.order, self._local
        position = getattr(local, "position", -1) + 1
        if position >= len(order) or order[position] != unit.index:  # a new pass, or one that was broken off
            position = order.index(unit.index)
        local.position = position
        micro_batch = self._micro_batches.index
        if position == 0 and micro_batch is None:
            local.step = self.step
            self.step += bool(self.model.training)
            self._expect(backward=self.model.training, tokens=tokens)
        step = self.step if micro_batch is not None else getattr(local, "step", self.step)
        return position, dropout_seed(self.seed, step, position, micro_batch or 0)

    def _expect(
        self, backward: bool, micro_batches: Sequence[tuple[mx.array, mx.array]] = (), tokens: int | None = None
    ) -> None:
        """Look at what is trainable now, and tell which blocks will be visited in which order.

        Args:
            micro_batches: of a step of our own, which may begin at the boundary.
            tokens: of each micro-batch; None if it is not known.
        """
        order = self.cut.order
        entries = trainable_entries(self.model)
        for name, owner, key in entries:
            if (id(owner), key) in self._on_disk:
                raise SlowftError(
                    f"{name} is trainable, but base weights stay on disk. Call model.freeze() and add_lora instead"
                )
        trained = {unit.index: unit.trainable() for unit in self.cut.blocks}
        in_blocks = {(id(o), k) for of_block in trained.values() for _, o, k in of_block}
        self._outside = [(o, k) for _, o, k in entries if (id(o), k) not in in_blocks]
        self._lowest_trained = next((p for p, index in enumerate(order) if trained[index]), len(order))
        self._expects_backward = backward
        self._find_boundary(micro_batches)
        lowest = 0 if self._outside else self._lowest_trained
        lent = self.schedule.lent_nbytes if backward else ()
        visits = list(itertools.zip_longest(order, lent, fillvalue=0))
        forward = visits[self._boundary :] if self._all_from_boundary else visits
        of_backward = visits[lowest:][::-1] if backward else ()
        apart = self._apart(tokens, len(micro_batches) or 1, backward)
        self._residency.expect(forward, of_backward, apart)

    def _apart(self, tokens: int | None = None, passes: int = 1, backward: bool = False) -> dict[int, list[Layer]]:
        """The layers that do not come with their blocks, by block.

        Args:
            tokens: of each of the `passes` through a block, one way.
            backward: there is a way back, for which blocks come whole if they are not to come by groups.
        """
        s = self.schedule
        if s.group_nbytes is None and (backward or tokens is None or not self._routed_to):
            return {}
        apart = {}
        for unit in self.cut.blocks:
            layers = self.layers.of(unit)
            if s.group_nbytes is None:
                layers = [layer for layer in layers if layer in self._routed_to]
                layers = layers if self._is_routed(layers, tokens, passes) else []
            if layers:
                apart[unit.index] = layers
        return apart

    def _is_routed(self, layers: Sequence[Layer], tokens: int, passes: int) -> bool:
        """Whether a block comes without these layers of experts, of which only those are read that are needed."""
        experts = [(layer.nbytes, layer.n, self._routed_to[layer]) for layer in layers]
        seen = (self.layers.routed_share(layer, tokens * self._routed_to[layer]) for layer in layers)
        seen = max((share for share in seen if share is not None), default=None)
        return is_read_on_demand(experts, tokens, passes, seen)

    # --- Traces -----------------------------------------------------------------------------------

    def _traced(self, owner, key) -> mx.array:
        """A trainable parameter as the calling micro-batch's trace knows it."""
        trace = getattr(self._local, "trace", None) or {}
        return trace.get((id(owner), key), owner[key])

    def _put_trace_in_place(self) -> None:
        """Layers outside the blocks read parameters from their modules: give them the calling trace's."""
        trace = getattr(self._local, "trace", None)
        if trace is not None:
            for owner, key in self._outside:
                owner[key] = trace[id(owner), key]

    def _untrace(self) -> None:
        """Make every array in memory a plain evaluated one: only such may cross threads.

        `nn.value_and_grad` leaves its tracers in the module, a broken-off one in all of it; `stop_gradient` shares
        their memory, not their graph.
        """
        entries = [(o, k, a) for o, k, a in array_entries(self.model) if (id(o), k) not in self._on_disk]
        arrays = [mx.stop_gradient(array) for _, _, array in entries]
        mx.eval(arrays)
        for (owner, key, _), array in zip(entries, arrays):
            owner[key] = array

    # --- Steps --------------------------------------------------------------------------------------

    def loss_and_grads(self, micro_batches: Sequence[tuple[mx.array, mx.array]]):
        """((loss, ntoks), gradients) over all micro-batches, normalised by their tokens together."""
        entries = trainable_entries(self.model)
        if not entries:
            raise SlowftError("the model has no trainable parameters. Call add_lora first")
        self._untrace()
        parameters = self.model.trainable_parameters()

        def differentiate(loss: Callable[[], mx.array]):
            def of_parameters(tree):
                arrays = [array for _, array in tree_flatten(tree)]
                self._local.trace = {(id(o), k): array for (_, o, k), array in zip(entries, arrays)}
                self._put_trace_in_place()
                return loss()

            # a tree of its own: MLX puts tracers into the very dicts it is given while it traces
            value, gradients = mx.value_and_grad(of_parameters)(tree_map(lambda a: a, parameters))
            mx.eval(value, gradients)
            return value, gradients

        self._gradients.clear()
        originals = [owner[key] for _, owner, key in entries]
        self.stats.begin_step()
        try:
            with uncompiled():
                losses, ntoks = self._run_micro_batches(micro_batches, differentiate, gradients=True)
        finally:
            for (_, owner, key), array in zip(entries, originals):
                owner[key] = array
            self.stats.end_step()
        self.step += 1
        self.tokens_of_last_step = ntoks.item()
        loss, gradients = losses[0]
        for other_loss, other_gradients in losses[1:]:
            loss = loss + other_loss
            gradients = tree_map(mx.add, gradients, other_gradients)
        of_blocks = [self._gradients.pop((id(owner), key), None) for _, owner, key in entries]
        of_trace = tree_flatten(gradients)
        gradients = tree_unflatten([(n, g if b is None else b) for (n, g), b in zip(of_trace, of_blocks, strict=True)])
        mx.eval(loss, gradients)
        return (loss, ntoks), gradients

    def loss(self, batch: mx.array, lengths: mx.array) -> tuple[mx.array, mx.array]:
        """(loss, ntoks) without gradients: blocks are read once, logits never exist whole."""
        self._untrace()

        def evaluate(loss: Callable[[], mx.array]) -> mx.array:
            value = loss()
            mx.eval(value)
            return value

        losses, ntoks = self._run_micro_batches([(batch, lengths)], evaluate, gradients=False)
        loss = sum(losses[1:], losses[0])
        mx.eval(loss)
        return loss, ntoks

    def _run_micro_batches(self, micro_batches, evaluate: Callable[[Callable], Any], gradients: bool):
        micro_batches = [piece for pair in micro_batches for piece in _rows_at_a_time(*pair, self.schedule.rows)]
        self._n_micro_batches = len(micro_batches)
        masks = [loss_mask(lengths, batch.shape[1] - 1) for batch, lengths in micro_batches]
        ntoks = sum(mask.sum() for mask in masks)
        mx.eval(micro_batches, masks, ntoks)
        if ntoks.item() == 0:
            raise SlowftError("no token of the batch counts in the loss (lengths leave none to train on)")

        def run(batch, mask):
            def loss():
                return self._loss(batch[:, :-1], batch[:, 1:], mask, ntoks, gradients)

            self._local.position = -1
            try:
                return evaluate(loss)
            finally:
                self._local.trace = self._local.hidden = None

        if gradients:
            nbytes = [mask.size * self.cut.hidden_nbytes for mask in masks]
            self.on_thread(lambda: self._activations.reserve(nbytes))
        functions = [lambda b=batch, m=mask: run(b, m) for (batch, _), mask in zip(micro_batches, masks)]
        try:
            self._expect(gradients, micro_batches, max(mask.size for mask in masks))
            return self._micro_batches.run(functions, self._serve_together), ntoks
        finally:
            self._residency.rest()
            if self._residency.is_open:
                self._residency.on_thread(self._activations.clear)
            self._from_boundary = set()
            self._warn_of_lost_activations()

    def _loss(self, inputs, targets, mask, total, gradients: bool) -> mx.array:
        if not self.cut.head_is_separable:
            return token_loss(self.model(inputs), targets, mask, total)
        hidden = self._local.hidden = _Hidden()
        self.model(inputs)  # what follows the last block is built lazily and never evaluated
        self._local.hidden = None
        return self._head_loss(hidden, detach(targets), mask, total, gradients)

    def _head_loss(self, hidden: "_Hidden", targets, mask, total, gradients: bool) -> mx.array:
        tail = Tail(self.cut, hidden.tail, hidden.tail[0].args[0] if hidden.tail else hidden.output)
        entries = [*tail.entries, *self._outside]
        params = [self._traced(owner, key) for owner, key in entries]
        n, in_step, micro_batch = len(tail.arrays), self._in_step, self._micro_batches.index or 0
        seed = dropout_seed(self.seed, self.step, len(self.cut.order), micro_batch)
        is_hidden, key = in_step and self._hides_between(tail.first), (micro_batch, tail.first)
        following = self.following(key)
        everything = not in_step or bool(self._outside)
        wanted = tail.wanted(everything or tail.first > self._lowest_trained, everything) + [True] * len(self._outside)
        inputs = [*tail.arrays, *params]
        wrt = [i for i, (a, w) in enumerate(zip(inputs, wanted, strict=True)) if w and a.dtype in FLOATS]
        found: list[mx.array] = []

        def run_tail(values: list[mx.array]) -> Any:
            for unit in tail.units:
                self._residency.bring(unit)
            output = tail.run(values, self.model, self.running_part, targets.values.shape)
            mx.random.seed(seed)
            return output

        def compute(xs: list[mx.array]):
            chunk = self._chunk_tokens(tail.hidden(xs[:n]), targets.values.size)
            loss = HeadLoss(run_tail, self._head, attach(targets), mask, total, tail.entries, self._outside, chunk)
            with self.cores.shared(), self.pieces.cutting(self.cuts, seed):
                if gradients:
                    return loss.loss_and_grads(xs[:n], xs[n:], wrt)
                return loss.loss(xs[:n], xs[n:]), []

        @mx.custom_function
        def head_function(*xs):
            detached = [None if is_hidden and i == 0 else detach(x) for i, x in enumerate(xs)]

            def job():
                self._residency.reuse.begin_graph((targets.values.shape, gradients))
                xs = [None if d is None else attach(d) for d in detached]
                if is_hidden:
                    xs[0] = self._activations.pop(key, following)
                loss, of_wrt = compute(xs)
                del xs
                mx.eval(loss, of_wrt)
                for at, i in enumerate(wrt[: len(of_wrt)]):
                    if in_step and n <= i < n + len(tail.entries):
                        of_wrt[at] = self.add_gradient(*entries[i - n], of_wrt[at])
                return loss, of_wrt

            loss, found[:] = self._serve(HEAD, job, entries=entries, params=params)
            return loss

        @head_function.vjp
        def head_vjp(primals, cotangent, _):
            primals = primals if isinstance(primals, (tuple, list)) else [primals]
            result = [mx.zeros_like(x) for x in primals]  # lazy: nobody evaluates those that are not wanted
            for i, gradient in zip(wrt, found):
                result[i] = cotangent.astype(gradient.dtype) * gradient
            return tuple(result) if len(result) > 1 else result[0]

        return head_function(*inputs)

    def _chunk_tokens(self, hidden: Any, n_tokens: int) -> int | None:
        """How many tokens' logits may exist at once; None when all may, or when the head cannot be cut."""
        limit = self.head_chunk_tokens
        if limit is None:
            limit = self.schedule.head_tokens or usual_chunk(self.cut.vocab_size)
        if n_tokens <= limit or not (isinstance(hidden, mx.array) and self.cut.plain_blocks and hidden.ndim == 3):
            return None
        if self._head_in_chunks is None:
            self._head_in_chunks = treats_tokens_alike(self._head, hidden)
        return limit if self._head_in_chunks else None

    def _head(self, hidden: Any, n_rows: int, n_tokens: int) -> mx.array:
        """Logits `[n_rows, n_tokens, V]` of the last block's output: the model's own call, its blocks skipped."""
        with self.running_part(HeadPart(self.cut, hidden, self._residency.bring)):
            return self.model(mx.zeros((n_rows, n_tokens), mx.int32))

    def add_gradient(self, owner, key, gradient: mx.array) -> mx.array:
        """Sum a block's gradient over micro-batches here, not in each one's trace, which gets nothing to hold."""
        total = self._gradients.get((id(owner), key))
        if total is not None:
            gradient = total + gradient
            mx.eval(gradient)
        self._gradients[id(owner), key] = gradient
        return nothing(gradient)

    # --- The schedule ---------------------------------------------------------------------------------

    def follow(self, schedule: Schedule, directory: Path | None = None) -> None:
        """From now on keep in memory what `schedule` says, and give the rest back.

        Args:
            directory: where block inputs are spilled to.
        Raises:
            SlowftError: the disk has no room for them.
        """
        order = self.cut.order
        if schedule.tail and not self.cut.is_chain:
            raise ValueError("only a plain chain of blocks has a tail")
        self.schedule = schedule
        tail = [self.cut.blocks[index] for index in dict.fromkeys(order[len(order) - schedule.tail :])]
        whole = [*tail, *(self.cut.head if schedule.keep_head else ())]
        self._residency.keep_whole(whole)
        self.layers.group_nbytes = schedule.group_nbytes or GROUP_NBYTES
        head = self.cut.head if schedule.head_ahead else ()
        sizes = schedule.slots, schedule.resident_nbytes, schedule.reads_in_flight
        self._residency.resize(*sizes, self._apart(), head)
        for unit in self.cut.blocks:
            if any(schedule.kept):
                self.kept.watch(unit.module)
            if schedule.mlp_tokens is not None:
                self.pieces.watch(unit.module)
        self._residency.on_thread(lambda: self._activations.spill(schedule.spilled, directory))
        if schedule.cache_nbytes is not None:
            self._residency.reuse = Reuse(schedule)
            limits().keep_freed(schedule.cache_nbytes)
        limits().hold(schedule.active_nbytes)
        limits().wire(schedule.resident_nbytes + sum(unit.compute_nbytes for unit in whole))

    def reuse_more(self, nbytes: int) -> None:
        """The last step left so many bytes of its memory (below 0: took more): freed buffers may take them."""
        self._residency.reuse.raise_by(nbytes)

    @property
    def _first_tail(self) -> int:
        """The first visit of the tail, which begins no lower than where stored activations go in."""
        return max(len(self.cut.order) - self.schedule.tail, self._boundary)

    def _hides_between(self, position: int) -> bool:
        """Whether the hidden state that goes into this visit stays out of the trace."""
        return self.cut.is_chain and position > 0

    def following(self, key: tuple[int, int]) -> tuple[int, int]:
        """The (micro-batch, visit) that the backward pass comes to next."""
        micro_batch, position = key
        return (micro_batch + 1, position) if micro_batch + 1 < self._n_micro_batches else (0, position - 1)

    @property
    def cuts(self) -> Pieces:
        return Pieces(self.schedule.mlp_tokens, self.schedule.attention_queries)

    # --- The boundary ---------------------------------------------------------------------------------

    def store_activations(self, directory: Path, limit_nbytes: int | None, model_path: Path) -> None:
        """From now on the lowest trained block's input is stored in `directory`, and steps begin there if they can.

        Raises:
            ConfigError: the directory cannot be used.
        """
        self.forget_activations()
        self._stored = Boundary(ActivationCache(directory, limit_nbytes), self.cut, self._residency.reader, model_path)
        self.stats.cache = self._stored.cache

    @property
    def activation_cache(self) -> ActivationCache | None:
        return None if self._stored is None else self._stored.cache

    def forget_activations(self) -> None:
        """Store and use no activations any more. Those that are stored stay."""
        if self._stored is not None:
            self._stored.cache.close()
            self._stored = None

    def why_no_boundary(self) -> str | None:
        """Why no activations can be stored for what is trainable now; None if they can."""
        self._expect(backward=self._expects_backward)
        return why_not(self.cut, self._lowest_trained, bool(self._outside))

    def _find_boundary(self, micro_batches: Sequence[tuple[mx.array, mx.array]]) -> None:
        """Put in place what is stored of these micro-batches, and note which of them begin at the boundary."""
        self._boundary, self._from_boundary, self._all_from_boundary = 0, set(), False
        if self._stored is None or not micro_batches or why_not(self.cut, self._lowest_trained, bool(self._outside)):
            return
        self._boundary = self._lowest_trained
        cuts = self.schedule.mlp_tokens, self.schedule.attention_queries
        if self._expects_backward and mx.default_device() != mx.Device(mx.cpu):
            # in which a GPU's kernels are others than in an evaluation; on MLX's CPU backend, all give the same bits
            cuts += ("in training",)
        keys = self._stored.keys(self._boundary, cuts, [batch[:, :-1] for batch, _ in micro_batches])

        def find():
            for i, hidden in enumerate(self._stored.find(keys)):
                if hidden is not None:
                    self._activations.put((i, self._boundary), hidden, may_spill=self._expects_backward)
                    self._from_boundary.add(i)

        self.on_thread(find)
        self._all_from_boundary = len(self._from_boundary) == len(micro_batches)
        self.stats.from_cache += len(self._from_boundary)

    def arrived_at_boundary(self, key: tuple[int, int], hidden: mx.array) -> None:
        """Store the hidden state that goes into (micro-batch, visit), if that is the boundary."""
        if key[1] == self._boundary and self._stored is not None:
            self._stored.keep(key[0], hidden)

    def _warn_of_lost_activations(self) -> None:
        """Say once that activations are no longer stored."""
        if self._stored is not None and self._stored.cache.problem is not None and not self._has_warned:
            self._has_warned = True
            warnings.warn(self._stored.cache.problem, SlowftWarning, stacklevel=5)

    # --- Opening and closing ------------------------------------------------------------------------

    def probe(self, part: Probe) -> mx.array:
        """Logits of a few tokens, every unit's call answered by `part`."""
        tokens = mx.array(TOKENS)
        with self.running_part(part), self.layers.noting() as calls:
            logits = self.model(tokens)
        self._routed_to = {layer: c.n_routed / tokens.size for layer, c in calls.items()}
        return logits

    def look(self) -> None:
        """Have every block called on a few tokens, unevaluated."""
        with keeping_random_state():
            self.probe(Probe(self.cut, 0.25))

    def make_resident(self, params: Sequence[Param]) -> None:
        for param in params:
            param.placeholder = self._residency.on_thread(lambda p=param: read_whole(self._residency.reader, p.source))
            param.clear()

    def compute_magnitudes(self) -> None:
        """Give every DoRA layer the norms of its base weight's rows, one layer at a time.

        Raises:
            ConfigError: a DoRA layer outside the blocks, which would use its base weight past the seam.
        """
        from mlx_lm.tuner.dora import DoRAEmbedding, DoRALinear

        in_blocks: set[int] = set()
        for unit in self.cut.blocks:
            layers = [module for module in unit.module.modules() if isinstance(module, DoRALinear)]
            in_blocks |= {id(layer) for layer in layers}

            for layer in layers:

                def job(layer=layer):
                    layer.set_linear(layer.linear)
                    mx.eval(layer.m)

                params = [param for param in unit.params if param.owner is layer.linear]
                self._residency.with_params(params, job)
        for name, module in self.model.named_modules():
            if isinstance(module, (DoRALinear, DoRAEmbedding)) and id(module) not in in_blocks:
                raise ConfigError(f"DoRA cannot be attached to {name}, outside the blocks. Use LoRA there")

    def on_thread(self, job: Callable[[], Any]) -> Any:
        """`job()` on the compute thread."""
        return self._residency.on_thread(job)

    @property
    def files(self) -> tuple[str, ...]:
        """The files that hold the blocks."""
        extents = (e for unit in self.cut.blocks for param in unit.params for e in param.source.extents)
        return tuple(dict.fromkeys(e.file for e in extents))

    @property
    def compute_dtype(self) -> mx.Dtype:
        """Of the blocks' weights as they are computed with; packed ones have that of their scales."""
        dtypes = [p.source.result_dtype for unit in self.cut.blocks for p in unit.params]
        return next((dtype for dtype in dtypes if dtype in FLOATS), mx.float16)

    @property
    def head_may_be_cut(self) -> bool:
        """Whether logits may be computed some tokens at a time, as far as it is known."""
        return self.cut.is_chain and len(self.cut.hidden_shape) == 3 and self._head_in_chunks is not False

    def close(self) -> None:
        self.forget_activations()
        if self._residency.is_open:
            self._residency.on_thread(self._activations.close)
        self._micro_batches.close()
        self._residency.close()
        limits().restore()  # below what is in use, MLX would wait at every operation of whatever follows
        limits().give_back()  # buffers of sizes that nobody will ask for


def nothing(array: mx.array) -> mx.array:
    """Zeros of the same shape and dtype that take no memory."""
    zeros = mx.broadcast_to(mx.zeros((), array.dtype), array.shape)
    mx.eval(zeros)
    return zeros


def _rows_at_a_time(batch: mx.array, lengths: mx.array, rows: int | None) -> list[tuple[mx.array, mx.array]]:
    """A micro-batch as several of `rows` rows; a row without trained tokens is left out only with its whole piece."""
    n = batch.shape[0]
    if rows is None or rows >= n:
        return [(batch, lengths)]
    return [(batch[i : i + rows], lengths[i : i + rows]) for i in range(0, n, rows)]


class _Hidden:
    """Where a pass stops: the last block's output, or what goes into the blocks of the tail."""

    def __init__(self):
        self.output: Any = None
        self.tail: list[TailCall] = []
        self.is_complete = False


class _VisitMemory(Memory):
    """One micro-batch's visit to a block in a step of `loss_and_grads`.

    Args:
        key: (micro-batch, visit).
        names: layers whose outputs are kept for the recomputation.
    """

    def __init__(self, engine: Engine, key: tuple[int, int], names: Sequence[str]):
        self._engine, self._key, self._names = engine, key, names
        self.hides_input, self.hides_output = engine._hides_between(key[1]), engine._hides_between(key[1] + 1)
        self._products: Products = {}
        self._are_by_groups = False

    def input(self, backward: bool) -> mx.array:
        activations = self._engine._activations
        return activations.pop(self._key, self._engine.following(self._key)) if backward else activations.get(self._key)

    def gradient(self, owner, key, gradient: mx.array) -> mx.array:
        return self._engine.add_gradient(owner, key, gradient)

    def output(self, array: mx.array) -> mx.array:
        activations, (micro_batch, position) = self._engine._activations, self._key
        if self.hides_input:
            (activations.passed if self._engine.comes_back(position) else activations.discard)(self._key)
        self._engine.arrived_at_boundary((micro_batch, position + 1), array)
        activations.put((micro_batch, position + 1), array, may_spill=self._engine.comes_back(position + 1))
        return placeholder(array.shape, array.dtype)

    @contextmanager
    def recording(self):
        self._are_by_groups = self._engine.layers.are_apart
        with self._engine.kept.recording(self._names, with_lora=not self._are_by_groups) as products:
            yield products
        self._products = products

    @contextmanager
    def replaying(self):
        products, self._products = self._products, {}
        by_groups = self._engine.layers.are_apart
        if by_groups != self._are_by_groups:
            products = {}
        with (self._engine.layers if by_groups else self._engine.kept).replaying(products):
            yield


class _BoundaryMemory(Memory):
    """An evaluation's visit to the block below the boundary, or to the one above.

    Args:
        key: (micro-batch, visit).
    """

    def __init__(self, engine: Engine, key: tuple[int, int]):
        self._engine, self._key = engine, key
        self.hides_input, self.hides_output = (engine._boundary == at for at in (key[1], key[1] + 1))

    def input(self, backward: bool) -> mx.array:
        return self._engine._activations.pop(self._key)

    def output(self, array: mx.array) -> mx.array:
        above = self._key[0], self._key[1] + 1
        self._engine.arrived_at_boundary(above, array)
        self._engine._activations.put(above, array, may_spill=False)
        return placeholder(array.shape, array.dtype)
