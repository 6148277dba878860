"""A unit's call inside a trace that is not ours: a function MLX can differentiate, whose weights come and go.

This is streaming as a custom vjp, one step beyond mlx-lm's `grad_checkpoint`. The primal puts the unit's weights in
place, runs it, and keeps only its output. The vjp puts them in place again, recomputes, and returns the cotangents of
all inputs and of the adapter's arrays. MLX's autodiff of the model's own call connects the units, whatever the model
does between them: values handed past the chain, tuples, containers that blocks write into (see `models.calls`).

It serves a user's own `nn.value_and_grad(model, loss)`, mlx-lm's generation, and steps on models whose blocks form no
chain. On chains `step` gives the same bits with fewer reads.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx

from ..errors import SlowftError
from ..models.calls import Arguments
from ..models.seams import FLOATS, Unit
from ..planning.measure import BACKWARD, FORWARD
from ..weights.threads import Worker
from . import cores
from .block import BlockFunction
from .chain import Entry, plain_loss
from .log_probabilities import LogProbabilities, Mixing, log_probabilities
from .micro_batches import Passenger
from .randomness import dropout_seed
from .step import Gradients
from .trees import arrays_of, attach, detach, put

# run(job, backward) -> the result of `job()`, on a thread that traces nothing, with the unit's weights in place
Run = Callable[[Callable[[], Any], bool], Any]


class TracedPath:
    """Answers the units' calls where the engine runs no part of its own; makes passes by the model's own call.

    Args:
        engine: the `Engine` whose units these are.
    """

    def __init__(self, engine):
        self._engine = engine
        self._thread: Worker | None = None  # computes blocks; started when the first one is called
        self._position = -1  # the visit that the pass under way has come to
        self._step = 0  # the step that the pass under way draws its dropout masks for
        self._is_step = False  # whether the pass belongs to an engine's step, of which the needed gradients are known

    # --- Calls of units ----------------------------------------------------------------------------------

    def on_block(self, unit: Unit, inner: Callable, args: tuple, kwargs: dict) -> Any:
        engine = self._engine
        first = args[0] if args else None
        tokens = first.size // first.shape[-1] if isinstance(first, mx.array) and first.ndim == 3 else None
        self._go_to(unit, tokens)
        seed = dropout_seed(engine.seed, self._step, self._position, 0)
        passes_on = not self._is_step or engine.chain.passes_on(self._position)
        return self._call(unit, inner, args, kwargs, seed, passes_on, lambda: engine.weights.in_place(unit))

    def on_matmul(self, unit: Unit, inner: Callable, args: tuple, kwargs: dict) -> Any:
        return self._call(unit, inner, args, kwargs, 0, True, lambda: self._engine.weights.head_in_place([unit]))

    def on_rows(self, unit: Unit, inner: Callable, args: tuple, kwargs: dict) -> Any:
        return self._engine.look_up(unit, inner, args, kwargs)

    def _go_to(self, unit: Unit, tokens: int | None) -> None:
        """Note that the pass under way comes to this block. The first block begins a pass over `tokens` tokens."""
        order = self._engine.cut.order
        position = self._position + 1
        if position >= len(order) or order[position] != unit.index:  # a pass begins, maybe after one was broken off
            position = order.index(unit.index)
        self._position = position
        if position == 0:
            self._step = self._engine.begin_traced_pass(tokens, self._is_step)

    def _call(
        self, unit: Unit, inner: Callable, args: tuple, kwargs: dict, seed: int, passes_on: bool, in_place: Callable
    ) -> Any:
        """The result of a unit's call, which MLX can differentiate.

        Args:
            passes_on: whether gradients of its inputs may be needed.
            in_place: gives the context in which the unit's weights are in place.
        """
        engine = self._engine
        entries = unit.adapter()
        params = arrays_of(entries)
        arguments = Arguments(args, kwargs, engine.cut.state_objects)
        arrays = [*arguments.arrays, *params]
        n = len(arguments.arrays)
        differentiated = [i for i, a in enumerate(arrays) if a.dtype in FLOATS and (passes_on or i >= n)]

        def call(*args, **kwargs) -> Any:
            with cores.shared(), engine.pieces.cutting(engine.cuts, seed):
                return inner(*args, **kwargs)

        def run(job: Callable[[], Any], backward: bool) -> Any:
            if backward and not engine.expects_backward:  # the model is not in training mode
                engine.expect(backward=True)

            def run_in_place():
                direction = BACKWARD if backward else FORWARD
                with in_place(), engine.weights.computing(unit.name, engine.kind_of(unit), direction, 0):
                    if engine.layers.are_offloaded:
                        engine.layers.begin(backward)
                    return job()

            try:
                return self._on_thread(run_in_place)
            finally:
                put(entries, params)

        function = BlockFunction(call, arguments, entries, differentiated, seed, engine.layers)
        in_training = engine.model.training and not any(hasattr(leaf, "state") for leaf in arguments.objects)
        return TracedCall(function, arguments, params, differentiated, in_training, run)()

    def _on_thread(self, job: Callable[[], Any]) -> Any:
        """The result of `job()`, called on a thread that traces nothing."""
        if self._thread is None:
            self._thread = Worker("slowft-compute")
        return self._thread.run(job)

    def close(self) -> None:
        if self._thread is not None:
            self._thread.close()

    # --- Passes by the model's own call -----------------------------------------------------------------

    def loss_and_grads(
        self, batches: Sequence[Passenger], entries: Sequence[Entry]
    ) -> tuple[list[mx.array], dict[str, mx.array]]:
        """(loss of each micro-batch, gradients of `entries` by name), one micro-batch after the other."""
        losses, gradients = [], Gradients()
        originals = arrays_of(entries)

        def loss(parameters: list[mx.array], batch: Passenger) -> mx.array:
            put(entries, parameters)
            return plain_loss(self._engine.model, batch)

        try:
            for batch in batches:
                with self._pass_of_step(batch):
                    value, of_batch = mx.value_and_grad(loss)(list(originals), batch)
                    mx.eval(value, gradients.add([name for name, _, _ in entries], of_batch))
                losses.append(value)
        finally:
            put(entries, originals)
        return losses, gradients.by_name

    def loss(self, batch: Passenger) -> mx.array:
        with self._pass_of_step(batch):
            loss = plain_loss(self._engine.model, batch)
            mx.eval(loss)
            return loss

    def logits(self, batch: Passenger) -> mx.array:
        """All logits of a micro-batch, `[B x T, V]`. The contents of its caches are evaluated too."""
        with self._pass_of_step(batch):
            if batch.cache is None:
                logits = self._engine.model(batch.tokens)
            else:
                logits = self._engine.model(batch.tokens, cache=batch.cache)
            mx.eval(logits, [cache.state for cache in batch.cache or ()])
        return logits.reshape(-1, logits.shape[-1])

    def log_probabilities(
        self, group: Sequence[Passenger], top_k: int, token_ids: Sequence[int], mixing: Mixing
    ) -> list[LogProbabilities]:
        """Log-probabilities of a group's targets, by the logits that `mixing` makes of its micro-batches' logits."""
        first, mix = group[0], mixing.begin(group[0].tokens)
        each = [self.logits(batch).__getitem__ for batch in group]  # gives the logits with some numbers
        return log_probabilities(each, mixing, mix, first.targets, first.mask, None, top_k, token_ids)

    @contextmanager
    def _pass_of_step(self, batch: Passenger) -> Iterator[None]:
        """Enter this around the model's own call for a micro-batch of an engine's step."""
        self._position, self._is_step = -1, True
        try:
            with self._engine.chain.adapters.using(batch.adapter):
                yield
        finally:
            self._is_step = False


class TracedCall:
    """One call of a unit, as a function with a vjp of its own.

    Args:
        function: the call as a function of arrays.
        arguments: the call's arguments.
        params: the adapter's arrays as the trace has them.
        differentiated: numbers of the arrays whose gradients may be needed, as `function` has them.
        in_training: see `BlockFunction.forward`.
        run: computes what the primal and the vjp need.
    """

    def __init__(
        self,
        function: BlockFunction,
        arguments: Arguments,
        params: list[mx.array],
        differentiated: list[int],
        in_training: bool,
        run: Run,
    ):
        self._function, self._arguments, self._params = function, arguments, params
        self._differentiated, self._in_training, self._run = differentiated, in_training, run
        self._states = [leaf for leaf in arguments.objects if hasattr(leaf, "state")]  # key-value caches

    def __call__(self) -> Any:
        function = mx.custom_function(self._primal)
        function.vjp(self._vjp)
        function.jvp(_refuse("forward-mode derivatives"))
        outputs = function(*self._arguments.arrays, *self._params)
        return self._arguments.take_over(self._function.outcome, _as_list(outputs))

    def _primal(self, *xs: mx.array) -> tuple[mx.array, ...]:
        detached = [detach(x) for x in xs]

        def forward() -> list[mx.array]:
            outputs = self._function.forward([attach(d) for d in detached], self._in_training)
            mx.eval(outputs, [cache.state for cache in self._states])
            return outputs

        outputs = self._run(forward, False)
        for at, i in self._function.outcome.handed_on:
            outputs[at] = xs[i]  # the array itself, not a second copy of it
        return tuple(outputs)

    def _vjp(self, primals, cotangents, _):
        if self._states:
            raise SlowftError("gradients through a key-value cache cannot be streamed. Call the model without a cache")
        primals = _as_list(primals)
        detached, detached_cotangents = [detach(x) for x in primals], [detach(c) for c in _as_list(cotangents)]

        def backward() -> list[mx.array]:
            xs, cotangents = ([attach(d) for d in ds] for ds in (detached, detached_cotangents))
            gradients = self._function.gradients(xs, cotangents)
            mx.eval(gradients)
            return gradients

        result = [mx.zeros_like(x) for x in primals]  # lazy: MLX evaluates only those that are used
        for i, gradient in zip(self._differentiated, self._run(backward, True) if self._differentiated else []):
            result[i] = gradient
        n = len(self._arguments.arrays)
        # one guard each for inputs and parameters: with a common one, cotangents live as long as adapters' gradients
        return *_differentiable_once(result[:n], primals), *_differentiable_once(result[n:], primals)


def _differentiable_once(gradients: list[mx.array], primals: list[mx.array]) -> list[mx.array]:
    """The same gradients, which refuse to be differentiated: they are constants, so MLX would give zeros."""
    if not gradients:
        return []
    guard = mx.custom_function(lambda *_: tuple(gradients))
    guard.vjp(_refuse("second derivatives"))
    return _as_list(guard(*primals))


def _refuse(what: str) -> Callable:
    def refuse(*_, **__):
        raise SlowftError(f"{what} cannot be streamed, only gradients")

    return refuse


def _as_list(arrays) -> list[mx.array]:
    return list(arrays) if isinstance(arrays, (tuple, list)) else [arrays]
