"""One step over the whole model: forward over the blocks, the head, backward over the blocks.

Comes in: token batches. Goes out: loss and gradients, the numbers that `nn.value_and_grad` gives on the
whole model in memory. The model's own `__call__` drives everything; its units' calls arrive here.
"""

import threading
import warnings
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map

from .. import platform
from ..errors import ConfigError, SlowftError, SlowftWarning
from ..models.seams import Cut, Probe, Unit, array_entries, trainable_entries
from ..models.weights import Param, read_whole
from ..storage.reader import Reader
from ..streaming.residency import Residency
from ..streaming.threads import MicroBatches
from .block import UnitCall
from .head import HeadLoss, loss_mask, token_loss, treats_tokens_alike
from .randomness import dropout_seed
from .stats import Stats
from .trees import attach, detach, pack, unpack

HEAD = "head"  # stands for all layers behind the last block where units are named
SPARE_SHARE = 0.8  # of the memory that a step left unused goes to blocks before the next: steps differ
LOGITS_NBYTES = 64 << 20  # of logits that may exist at once, unless all of them are fewer


class Engine:
    """Runs the units of one opened model.

    Attributes:
        seed, step: what dropout masks are drawn from, together with block and micro-batch. `step` goes up by
            one with every forward pass in training mode, or every `loss_and_grads`.
        memory: bytes that the process may take; what steps leave of it keeps blocks in memory.
        head_chunk_tokens: tokens whose logits may exist at once; None: as many as fit `LOGITS_NBYTES`.
    """

    def __init__(self, model: nn.Module, cut: Cut, reader: Reader):
        self._model, self._cut = model, cut
        self._residency = Residency(cut.blocks, reader)
        self._micro_batches = MicroBatches()
        self._local = threading.local()  # what the calling thread is in the middle of
        self._head_in_chunks: bool | None = None  # not known before the head's weights were seen
        self._vocab_size: int | None = None
        self._outside: list[tuple[Any, Any]] = []  # (owner, key) of trainable parameters outside the blocks
        self._lowest_trained = 0  # the first visit of a forward pass to a block with trainable parameters
        self._expects_backward = False
        units = [*cut.blocks, *(unit for units in cut.outside.values() for unit in units)]
        self._on_disk = {(id(p.owner), p.key) for unit in units for p in unit.params}
        self.stats = Stats(reader, self._residency)
        self.seed = 0
        self.step = 0
        self.head_chunk_tokens: int | None = None
        self.memory: int | None = None
        self._warned_of_memory = False
        self.tokens_of_last_step = 0

    # --- What the model's units do when they are called -------------------------------------------

    def on_block(self, unit: Unit, inner: Callable, args: tuple, kwargs: dict) -> Any:
        if (part := self._part) is not None:
            return part.on_block(unit, inner, args, kwargs)
        position, seed = self._next_position(unit)
        needed = not self._in_step or bool(self._outside) or position > self._lowest_trained
        output = self._stream(unit, inner, args, kwargs, seed, inputs_need_gradient=needed)
        if (hidden := getattr(self._local, "hidden", None)) is not None and position == len(self._cut.order) - 1:
            hidden.output = output
        return output

    def on_matmul(self, unit: Unit, inner: Callable, args: tuple, kwargs: dict) -> Any:
        if (part := self._part) is not None:
            return part.on_matmul(unit, inner, args, kwargs)
        hidden = getattr(self._local, "hidden", None)
        if hidden is not None and hidden.output is not None:  # behind the last block: the head's own pass does it
            return mx.zeros(inner(*args, **kwargs).shape)
        return self._stream(unit, inner, args, kwargs, seed=0, inputs_need_gradient=True)

    def on_rows(self, unit: Unit, inner: Callable, args: tuple, kwargs: dict) -> Any:
        if (part := self._part) is not None:
            return part.on_rows(unit, inner, args, kwargs)
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

        return self._residency.look_up(unit, rows.tolist(), job)

    @property
    def _part(self):
        """Stands in for the units while the calling thread runs only a part of the model."""
        return getattr(self._local, "part", None)

    @contextmanager
    def _running_part(self, part):
        self._local.part, before = part, self._part
        try:
            yield part
        finally:
            self._local.part = before

    def _stream(self, unit: Unit, inner, args, kwargs, seed: int, inputs_need_gradient: bool) -> Any:
        entries = unit.adapter()
        params = [self._traced(owner, key) for owner, key in entries]
        trainable = {(id(owner), key) for _, owner, key in unit.trainable()}
        call = UnitCall(
            inner,
            args,
            kwargs,
            entries,
            params,
            # only in a step of our own is it known which gradients nobody asks for
            trained=[not self._in_step or (id(owner), key) in trainable for owner, key in entries],
            serve=lambda job, backward: self._serve(unit, job, backward, entries, params),
            seed=seed,
            inputs_need_gradient=inputs_need_gradient,
        )
        return call()

    @property
    def _in_step(self) -> bool:
        """Whether the calling thread traces a micro-batch of `loss_and_grads`, rather than somebody else's function."""
        return getattr(self._local, "trace", None) is not None

    def _serve(self, unit: Unit | str, job: Callable, backward: bool = False, entries=(), params=()) -> Any:
        """The job's result, with the unit's weights in place; micro-batches of a step are served together."""
        if backward and not self._expects_backward:  # a gradient of a model that is not in training mode
            self._expect(backward=True)
        try:
            if self._micro_batches.index is None:
                return self._serve_together(unit, [job])[0]
            return self._micro_batches.meet(unit, job)
        finally:
            for (owner, key), value in zip(entries, params):
                owner[key] = value
            self._put_trace_in_place()

    def _serve_together(self, unit: Unit | str, jobs: Sequence[Callable]) -> list:
        if unit is HEAD:
            return self._residency.with_outside(jobs)
        if unit in self._cut.blocks:
            return self._residency.with_block(unit, jobs)
        return self._residency.with_outside([lambda job=job: (self._residency.bring(unit), job())[1] for job in jobs])

    # --- Where in the model a trace is ---------------------------------------------------------------

    def _next_position(self, unit: Unit) -> tuple[int, int]:
        """Which visit of a forward pass this is, and the random seed it runs under."""
        order, local = self._cut.order, self._local
        position = getattr(local, "position", -1) + 1
        if position >= len(order) or order[position] != unit.index:  # a new pass, or one that was broken off
            position = order.index(unit.index)
        local.position = position
        micro_batch = self._micro_batches.index
        if position == 0 and micro_batch is None:
            local.step = self.step
            self.step += bool(self._model.training)
            self._expect(backward=self._model.training)
        step = self.step if micro_batch is not None else getattr(local, "step", self.step)
        return position, dropout_seed(self.seed, step, position, micro_batch or 0)

    def _expect(self, backward: bool) -> None:
        """Look at what is trainable now, and tell which blocks will be visited in which order."""
        order = self._cut.order
        entries = trainable_entries(self._model)
        for name, owner, key in entries:
            if (id(owner), key) in self._on_disk:
                raise SlowftError(
                    f"{name} is trainable, but base weights stay on disk. Call model.freeze() and add_lora instead"
                )
        trained = {unit.index: unit.trainable() for unit in self._cut.blocks}
        in_blocks = {(id(o), k) for of_block in trained.values() for _, o, k in of_block}
        self._outside = [(o, k) for _, o, k in entries if (id(o), k) not in in_blocks]
        self._lowest_trained = next((p for p, index in enumerate(order) if trained[index]), len(order))
        self._expects_backward = backward
        lowest = 0 if self._outside else self._lowest_trained
        self._residency.expect(order + order[lowest:][::-1] if backward else order)

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
        entries = [(o, k, a) for o, k, a in array_entries(self._model) if (id(o), k) not in self._on_disk]
        arrays = [mx.stop_gradient(array) for _, _, array in entries]
        mx.eval(arrays)
        for (owner, key, _), array in zip(entries, arrays):
            owner[key] = array

    # --- Steps --------------------------------------------------------------------------------------

    def loss_and_grads(self, micro_batches: Sequence[tuple[mx.array, mx.array]]):
        """((loss, ntoks), gradients) over all micro-batches, normalised by their tokens together."""
        entries = trainable_entries(self._model)
        if not entries:
            raise SlowftError("the model has no trainable parameters. Call add_lora first")
        self._untrace()
        parameters = self._model.trainable_parameters()

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

        originals = [owner[key] for _, owner, key in entries]
        self.stats.begin_step()
        try:
            self._expect(backward=True)
            losses, ntoks = self._run_micro_batches(micro_batches, differentiate, gradients=True)
        finally:
            for (_, owner, key), array in zip(entries, originals):
                owner[key] = array
            self.stats.end_step()
        self.step += 1
        self.tokens_of_last_step = ntoks.item()
        self._use_spare_memory()
        loss, gradients = losses[0]
        for other_loss, other_gradients in losses[1:]:
            loss = loss + other_loss
            gradients = tree_map(mx.add, gradients, other_gradients)
        mx.eval(loss, gradients)
        return (loss, ntoks), gradients

    def loss(self, batch: mx.array, lengths: mx.array) -> tuple[mx.array, mx.array]:
        """(loss, ntoks) without gradients: blocks are read once, logits never exist whole."""
        self._untrace()
        self._expect(backward=False)

        def evaluate(loss: Callable[[], mx.array]) -> mx.array:
            value = loss()
            mx.eval(value)
            return value

        losses, ntoks = self._run_micro_batches([(batch, lengths)], evaluate, gradients=False)
        return losses[0], ntoks

    def _run_micro_batches(self, micro_batches, evaluate: Callable[[Callable], Any], gradients: bool):
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

        functions = [lambda b=batch, m=mask: run(b, m) for (batch, _), mask in zip(micro_batches, masks)]
        return self._micro_batches.run(functions, self._serve_together), ntoks

    def _loss(self, inputs, targets, mask, total, gradients: bool) -> mx.array:
        if not self._cut.head_is_separable:
            return token_loss(self._model(inputs), targets, mask, total)
        self._local.hidden = _Hidden()
        self._model(inputs)  # what follows the last block is built lazily and never evaluated
        hidden, self._local.hidden = self._local.hidden.output, None
        return self._head_loss(hidden, detach(targets), mask, total, gradients)

    def _head_loss(self, hidden: Any, targets, mask, total, gradients: bool) -> mx.array:
        arrays: list[mx.array] = []
        spec = pack(hidden, arrays)
        entries = self._outside
        params = [self._traced(owner, key) for owner, key in entries]
        saved: list[mx.array] = []
        seed = dropout_seed(self.seed, self.step, len(self._cut.order), self._micro_batches.index or 0)

        @mx.custom_function
        def head_function(*xs):
            detached = [detach(x) for x in xs]

            def job():
                xs = [attach(x) for x in detached]
                tree, values = unpack(spec, xs[: len(arrays)]), xs[len(arrays) :]
                mx.random.seed(seed)
                chunk = self._chunk_tokens(tree, targets.values.size)
                head = HeadLoss(self._head, attach(targets), mask, total, entries, chunk)
                return head.compute(tree, values, gradients)

            loss, of_arrays, of_params = self._serve(HEAD, job, entries=entries, params=params)
            saved[:] = [*of_arrays, *of_params]
            return loss

        @head_function.vjp
        def head_vjp(_, cotangent, __):
            return tuple(cotangent.astype(g.dtype) * g for g in saved)

        return head_function(*arrays, *params)

    def _chunk_tokens(self, hidden: Any, n_tokens: int) -> int | None:
        """How many tokens' logits may exist at once; None when all may, or when the head cannot be cut."""
        limit = self.head_chunk_tokens
        if limit is None:
            if self._vocab_size is None:
                one_token = mx.zeros_like(hidden[:1, :1]) if isinstance(hidden, mx.array) else hidden
                self._vocab_size = self._head(one_token, 1, 1).shape[-1]  # lazy: never evaluated
            limit = max(1, LOGITS_NBYTES // (4 * self._vocab_size))
        if n_tokens <= limit or not (isinstance(hidden, mx.array) and self._cut.plain_blocks and hidden.ndim == 3):
            return None
        if self._head_in_chunks is None:
            self._head_in_chunks = treats_tokens_alike(self._head, hidden)
        return limit if self._head_in_chunks else None

    def _head(self, hidden: Any, n_rows: int, n_tokens: int) -> mx.array:
        """Logits `[n_rows, n_tokens, V]` of the last block's output: the model's own call, its blocks skipped."""
        with self._running_part(_HeadPart(self._cut, self._residency, hidden)):
            return self._model(mx.zeros((n_rows, n_tokens), mx.int32))

    def _use_spare_memory(self) -> None:
        if self.memory is None:
            return
        peak = self.stats.last.peak_memory
        spare = self.memory - peak
        more = self._residency.keep_within(int(SPARE_SHARE * spare) if spare > 0 else spare)
        if spare < 0 and not more and not self._warned_of_memory:
            self._warned_of_memory = True
            warnings.warn(
                f"a step takes {peak / 1e9:.2f} GB, more than the memory of {self.memory / 1e9:.2f} GB it was given. "
                "Make batches or sequences smaller, or give more",
                SlowftWarning,
                stacklevel=4,
            )

    # --- Opening and closing ------------------------------------------------------------------------

    def probe(self, part: Probe) -> mx.array:
        """Logits of a few tokens, every unit's call answered by `part`."""
        with self._running_part(part):
            return self._model(mx.array([[0, 1, 2, 3, 0], [1, 0, 3, 2, 1]]))

    def make_resident(self, params: Sequence[Param]) -> None:
        for param in params:
            param.placeholder = self._residency.on_thread(lambda p=param: read_whole(self._residency.reader, p.source))
            param.clear()

    def least_memory(self) -> int:
        """Bytes without which no step can run: the process, two blocks on their way, the larger of block and head."""
        blocks = self._cut.blocks
        outside = max((u.compute_nbytes for units in self._cut.outside.values() for u in units), default=0)
        largest = max(max(unit.compute_nbytes for unit in blocks), outside)
        return platform.memory_in_use() + 2 * max(unit.nbytes for unit in blocks) + largest

    def compute_magnitudes(self) -> None:
        """Give every DoRA layer the norms of its base weight's rows, each block read once.

        Raises:
            ConfigError: a DoRA layer outside the blocks, which would use its base weight past the seam.
        """
        from mlx_lm.tuner.dora import DoRAEmbedding, DoRALinear

        in_blocks: set[int] = set()
        for unit in self._cut.blocks:
            layers = [module for module in unit.module.modules() if isinstance(module, DoRALinear)]
            in_blocks |= {id(layer) for layer in layers}

            def job(layers=layers):
                for layer in layers:
                    layer.set_linear(layer.linear)
                mx.eval([layer.m for layer in layers])

            if layers:
                self._residency.with_block(unit, [job])
        for name, module in self._model.named_modules():
            if isinstance(module, (DoRALinear, DoRAEmbedding)) and id(module) not in in_blocks:
                raise ConfigError(f"DoRA cannot be attached to {name}, outside the blocks. Use LoRA there")

    def close(self) -> None:
        self._micro_batches.close()
        self._residency.close()


class _Hidden:
    """The last block's output of a pass that is to stop there."""

    output: Any = None


class _HeadPart:
    """Answers for the units while only the head runs: blocks hand over `hidden`, head layers get their weights."""

    def __init__(self, cut: Cut, residency: Residency, hidden: Any):
        self._last, self._visits = len(cut.order) - 1, -1
        self._residency, self._hidden, self._plain = residency, hidden, cut.plain_blocks

    def on_block(self, unit: Unit, inner, args, kwargs):
        self._visits += 1
        if self._visits == self._last:
            return self._hidden
        return args[0] if self._plain else _unevaluated_zeros(inner(*args, **kwargs))

    def on_rows(self, unit: Unit, inner, args, kwargs):
        return _unevaluated_zeros(inner(*args, **kwargs))

    def on_matmul(self, unit: Unit, inner, args, kwargs):
        self._residency.bring(unit)
        return inner(*args, **kwargs)


def _unevaluated_zeros(tree):
    return tree_map(lambda a: mx.zeros(a.shape, a.dtype) if isinstance(a, mx.array) else a, tree)
