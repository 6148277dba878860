"""An opened model's engine: answers the calls of its units, and runs steps over micro-batches.

Comes in: token batches. Goes out: loss and gradients, the numbers that `nn.value_and_grad` gives on the whole model in
memory. `step` computes models whose blocks form a chain. `traced` computes the others, and whatever a user traces.
Says which blocks are needed in which order, and follows schedules.
"""

import functools
import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from .. import tracing
from ..errors import ConfigError, SlowftError, SlowftWarning
from ..memory import computes_on_gpu, limits
from ..models.seams import FLOATS, TOKENS, Arrays, CutModel, Probe, Unit, array_entries, trainable_entries
from ..planning.experts import GROUP_NBYTES
from ..planning.measure import Measurements
from ..planning.schedule import Schedule
from ..planning.shapes import signature
from ..weights.activation_cache import ActivationCache
from ..weights.journal import Journal
from ..weights.reader import Reader
from ..weights.residency import Residency
from ..weights.reuse import Reuse
from ..weights.sources import Param, read_whole
from . import step
from .boundary import Boundary, why_not
from .chain import Chain
from .distillation import Teacher
from .head import usual_chunk
from .hidden import HiddenStates
from .journal import StepJournal
from .kept import KeptOutputs
from .log_probabilities import PLAIN, LogProbabilities, Mixing
from .micro_batches import Passenger, n_parts, passengers
from .offloaded import OffloadedExperts
from .parts import CachedProbe
from .pieces import Pieces, PieceWork
from .randomness import keeping_random_state
from .spilled_caches import SpilledCaches
from .stats import Stats
from .traced import TracedPath
from .trees import detach, is_compiling, uncompiled


class Engine:
    """Runs the units of one opened model.

    Attributes:
        units: the blocks, and the large layers outside of them.
        traced: answers the units' calls where the engine runs no part of its own.
        expects_backward: whether a backward pass follows the pass under way.
        seed, step: what dropout masks are drawn from, together with block and micro-batch. `step` goes up by one with
            every forward pass in training mode, or every `loss_and_grads`.
        schedule: what is kept in memory, and how the work is cut; see `follow`.
        peaks_known: (kind, direction) of passes whose memory need not be measured again.
        measurements: of the last `loss_and_grads`, or of the one under way.
        head_chunk_tokens: how many tokens' logits may exist at once; None for the schedule's number.
        chain: the model as functions; None until `make_chain`.
    """

    def __init__(self, model: nn.Module, cut: CutModel, reader: Reader):
        self.model, self.cut = model, cut
        self.weights = Residency(cut.blocks, reader)
        self.traced = TracedPath(self)
        self._part: Any = self.traced  # answers the units' calls
        self.expects_backward = False
        self.units = [*cut.blocks, *(unit for units in cut.outside.values() for unit in units)]
        self._on_disk = {(id(p.owner), p.key) for unit in self.units for p in unit.params}
        self.seed = 0
        self.step = 0
        self.head_chunk_tokens: int | None = None
        self.tokens_of_last_step = 0
        self.schedule = Schedule()
        self.hidden = HiddenStates()
        self._boundary: Boundary | None = None
        self._boundary_visit = 0  # the visit whose input is stored on disk between steps; 0 for none
        self._has_warned = False
        self._journal: StepJournal | None = None
        self._kinds: dict[Unit, str] = {}
        self.peaks_known: set[tuple[str, str]] = set()
        self.measurements = Measurements()
        self.kept = KeptOutputs()
        self.pieces = PieceWork()
        self.layers = OffloadedExperts(self.weights)
        for unit in cut.blocks:
            self.layers.watch(unit)
        self.chain: Chain | None = None
        self.stats = Stats(reader, self.weights, self.hidden)

    def make_chain(self) -> None:
        """Make the model's functions, once `seams.probe` has seen how its call goes."""
        work = self.pieces, self.kept, self.layers
        answers = self.running_part, self.look_up, self._multiply, self.kind_of
        self.chain = Chain(self.model, self.cut, *work, *answers)

    # --- Calls of the model's units ---------------------------------------------------------------

    def on_block(self, unit: Unit, inner: Callable, args: tuple, kwargs: dict) -> Any:
        return self._part.on_block(unit, inner, args, kwargs)

    def on_matmul(self, unit: Unit, inner: Callable, args: tuple, kwargs: dict) -> Any:
        return self._part.on_matmul(unit, inner, args, kwargs)

    def on_rows(self, unit: Unit, inner: Callable, args: tuple, kwargs: dict) -> Any:
        return self._part.on_rows(unit, inner, args, kwargs)

    def look_up(self, unit: Unit, inner: Callable, args: tuple, kwargs: dict) -> Any:
        """The embedding's output for these token ids. Only their rows are read."""
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

        def compute() -> mx.array:
            with tracing.span("compute", unit.name, **{"pass": "forward", "rows": rows.size}):
                output = inner(index)
                mx.eval(output)
                return output

        return self.weights.look_up(unit, rows.tolist(), compute)

    def _multiply(self, unit: Unit, inner: Callable, args: tuple, kwargs: dict) -> Any:
        """The output of a large layer before the blocks."""
        return self.weights.with_params(unit.params, lambda: inner(*args, **kwargs))

    @contextmanager
    def running_part(self, part: Any) -> Iterator[Any]:
        """While this is entered, `part` answers the units' calls."""
        self._part, outer = part, self._part
        arrays = Arrays(self.model) if self.cut.keeps_arrays else None
        try:
            yield part
        finally:
            self._part = outer
            if arrays is not None:
                arrays.restore()

    # --- The order of blocks --------------------------------------------------------------------------

    def begin_traced_pass(self, tokens: int | None, is_step: bool) -> int:
        """Begin a pass by the model's own call. Returns the step that its dropout masks are drawn for.

        Args:
            tokens: how many it has; None if that is not known.
            is_step: the pass belongs to a step of the engine's, which is counted when it is over.
        """
        step = self.step
        self.step += bool(self.model.training and not is_step)
        self.expect(backward=self.model.training, tokens=tokens)
        return step

    def expect(self, backward: bool, batches: Sequence[Passenger] = (), tokens: int | None = None) -> None:
        """Note what is trainable now, and say in which order blocks will be needed.

        Args:
            batches: the micro-batches of an engine's step, which may begin at the boundary.
            tokens: of each micro-batch; None if that is not known.
        """
        order = self.cut.order
        entries = trainable_entries(self.model)
        for name, owner, key in entries:
            if (id(owner), key) in self._on_disk:
                raise SlowftError(
                    f"{name} is trainable, but base weights stay on disk. Call model.freeze() and add_lora instead"
                )
        self.chain.look_at_trainable()
        if backward and entries and self.chain.lowest_trained == len(order):
            raise SlowftError(
                f"nothing would be learnt: the model's own code never calls the block of {entries[0][0]}, nor any "
                "other that is trained. Check num_hidden_layers in config.json, or raise --num-layers"
            )
        self.expects_backward = backward
        self._begin_at_boundary(batches)
        start, below = self._begin_journal(batches) if backward and batches else (0, None)
        temporary = self.schedule.temporary_nbytes if backward else ()
        visits = list(itertools.zip_longest(order, temporary, fillvalue=0))
        forward = visits[max(start, min((batch.first for batch in batches), default=0)) :]
        of_backward = visits[self.chain.lowest_trained : below][::-1] if backward else ()
        if self.schedule.group_nbytes is not None:
            offloaded = self.layers.by_block()
        elif backward or tokens is None:  # a backward pass needs whole blocks
            offloaded = {}
        else:
            offloaded = self.layers.on_demand(tokens, len(batches) or 1)
        self.weights.expect(forward, of_backward, offloaded)

    def kind_of(self, unit: Unit) -> str:
        """A text that is equal for blocks that compute the same."""
        if unit not in self._kinds:
            self._kinds[unit] = signature(unit)
        return self._kinds[unit]

    def adapter_changed(self) -> None:
        """Forget the blocks' kinds: with another adapter they compute something else."""
        self._kinds.clear()

    # --- Steps --------------------------------------------------------------------------------------

    def loss_and_grads(
        self,
        micro_batches: Sequence[tuple[mx.array, mx.array]],
        measure: bool = False,
        teachers: Sequence[Teacher | None] = (),
    ):
        """((loss, ntoks), gradients) over all micro-batches, divided by the number of all their tokens.

        Args:
            teachers: for each micro-batch, the teacher whose probabilities its loss is taken against too.
            measure: note in `measurements` the memory and time of each pass. A GPU then finishes each before the next.
        """
        entries = trainable_entries(self.model)
        if not entries:
            raise SlowftError("the model has no trainable parameters. Call add_lora first")
        given = [(*pair, True) for pair in micro_batches]
        batches, ntoks = passengers(given, self.schedule.rows, together=True, teachers=teachers)
        self.measurements = Measurements(self.peaks_known)
        with self.stats.step(self.measurements):
            try:
                with uncompiled(), self._step_over(batches, gradients=True, measure=measure):
                    if not self.cut.is_chain:
                        losses, gradients = self.traced.loss_and_grads(batches, entries)
                    elif self.schedule.in_memory:
                        losses, gradients = step.loss_and_grads_in_memory(*self._inputs(batches), self._boundary_visit)
                    else:
                        losses, gradients = step.loss_and_grads(*self._inputs(batches), self.schedule, self._journal)
            finally:
                if self._journal is not None:
                    self._journal.finish()
        self.step += 1
        self.tokens_of_last_step = ntoks[0].item()
        loss = sum(losses[1:], losses[0])
        tree = [
            (name, gradients[name] if name in gradients else mx.zeros_like(owner[key])) for name, owner, key in entries
        ]
        mx.eval(loss, tree)
        return (loss, ntoks[0]), tree_unflatten(tree)

    def losses(self, micro_batches: Sequence[tuple[mx.array, mx.array, bool | str]]) -> list:
        """(loss, ntoks) of each (batch, lengths, adapter), without gradients. Each block of a chain is read once."""
        batches, ntoks = passengers(micro_batches, self.schedule.rows, together=False)
        with self._step_over(batches, gradients=False):
            if self.cut.is_chain:
                losses = step.losses(*self._inputs(batches, gradients=False))
            else:
                losses = [self.traced.loss(batch) for batch in batches]
        results, remaining = [], iter(losses)
        for (batch, _, _), n in zip(micro_batches, ntoks):
            parts = [next(remaining) for _ in range(n_parts(batch, self.schedule.rows))]
            results.append((sum(parts[1:], parts[0]), n))
        mx.eval(results)
        return results

    def decode(
        self,
        batches: Sequence[tuple[mx.array, list[Any], mx.array, bool | str]],
        take: Callable[[int, int, mx.array], None],
        spilled: SpilledCaches | None = None,
    ) -> None:
        """A forward pass with key-value caches; see `step.decode`.

        Args:
            batches: (tokens `[B, T]`, caches, places `[n]` whose logits are needed, adapter) of each micro-batch.
        """
        given = [
            Passenger(i, tokens, adapter=adapter, cache=cache) for i, (tokens, cache, _, adapter) in enumerate(batches)
        ]
        places = [of_batch for _, _, of_batch, _ in batches]
        mx.eval([batch.tokens for batch in given], places)
        head_tokens = self._head_tokens(gradients=False)
        with self.stats.step(), self._step_over(given, gradients=False):
            if self.cut.is_chain:
                step.decode(self.chain, given, self.weights, self.hidden, head_tokens, places, take, spilled)
            else:
                for batch, of_batch in zip(given, places):
                    take(batch.index, 0, self.traced.logits(batch)[of_batch])

    def first_not_finite(self, micro_batches: Sequence[tuple[mx.array, mx.array]]) -> str | None:
        """Where a value was first not finite in the last step's forward pass, in words; None: nowhere, or no chain."""
        if not self.cut.is_chain:
            return None
        batches, _ = passengers([(*pair, True) for pair in micro_batches], self.schedule.rows, together=True)
        self.step -= 1  # so that dropout is what it was
        try:
            with uncompiled(), self._step_over(batches, gradients=False):
                place = step.first_not_finite(self.chain, batches, self.weights, self.hidden)
        finally:
            self.step += 1
        if place is None:
            return None
        index, position = place
        parts = [n_parts(batch, self.schedule.rows) for batch, _ in micro_batches]
        number = next(i for i in range(len(parts)) if index < sum(parts[: i + 1]))
        return f"micro-batch {number + 1} of {len(parts)}, {self.chain.visits[position].name}"

    def log_probabilities(
        self,
        micro_batches: Sequence[tuple[mx.array, mx.array, bool | str]],
        top_k: int,
        token_ids: Sequence[int],
        on_visit: Callable[[int], object],
        mixing: Mixing = PLAIN,
    ) -> list[LogProbabilities]:
        """Log-probabilities for each (batch, lengths, adapter).

        Blocks of a chain are read once for all of them; blocks of other models once for each.

        Args:
            on_visit: is called with the number of block passes (one block, one micro-batch) since the last call.
            mixing: makes its results of each group of micro-batches that follow each other.
        """
        batches, _ = passengers(micro_batches, self.schedule.rows, together=False)
        n, at = mixing.passengers, 0
        groups, parts = [], [n_parts(batch, self.schedule.rows) for batch, _, _ in micro_batches[::n]]
        for k in parts:
            groups += [batches[at + part : at + n * k : k] for part in range(k)]
            at += n * k
        with self.stats.step(), self._step_over(batches, gradients=False):
            if self.cut.is_chain:
                visited = functools.partial(on_visit, len(micro_batches))
                inputs = self._inputs(batches, gradients=False)
                results = step.log_probabilities(*inputs, top_k, token_ids, visited, groups, mixing)
            else:
                results = []
                for group in groups:
                    results.append(self.traced.log_probabilities(group, top_k, token_ids, mixing))
                    on_visit(n * len(self.cut.order))
        remaining = iter(results)
        by_result = [zip(*(next(remaining) for _ in range(k))) for k in parts]
        return [LogProbabilities.joined(of_parts) for group in by_result for of_parts in group]

    def _inputs(self, batches: Sequence[Passenger], gradients: bool = True) -> tuple:
        """The arguments that the functions of `step` begin with."""
        return self.chain, batches, self.weights, self.hidden, self._head_tokens(gradients)

    def _head_tokens(self, gradients: bool) -> int | None:
        """How many tokens' logits exist at once; None for all. See `Schedule`."""
        head_tokens = self.head_chunk_tokens or self.schedule.head_tokens
        return head_tokens if head_tokens or gradients else usual_chunk(self.cut.vocab_size)

    @contextmanager
    def _step_over(self, batches: Sequence[Passenger], gradients: bool, measure: bool = False) -> Iterator[None]:
        """Prepare a pass over the model's blocks, and clean up on leaving."""
        self._evaluate_arrays()
        self.chain.begin_step(self.seed, self.step, self.cuts)
        if gradients:
            self.hidden.reserve([batch.tokens.size * self.cut.hidden_nbytes for batch in batches])
        try:
            self.expect(gradients, batches, max(batch.tokens.size for batch in batches))
            self.weights.measure(self.measurements if measure else None, self.kind_of)
            with keeping_random_state():
                yield
        finally:
            self.weights.rest()
            self.hidden.clear()
            self._warn_of_lost_activations()

    def _evaluate_arrays(self) -> None:
        """Replace every array in memory by an evaluated one that belongs to no trace.

        `nn.value_and_grad` leaves traced arrays in the module (in all of it, if it was broken off). `stop_gradient`
        shares their memory, but not their graph.
        """
        entries = [(o, k, a) for o, k, a in array_entries(self.model) if (id(o), k) not in self._on_disk]
        arrays = [mx.stop_gradient(array) for _, _, array in entries]
        mx.eval(arrays)
        for (owner, key, _), array in zip(entries, arrays):
            owner[key] = array

    # --- The schedule ---------------------------------------------------------------------------------

    def follow(self, schedule: Schedule, directory: Path | None = None) -> None:
        """From now on keep in memory what `schedule` says, and free the rest.

        Args:
            directory: block inputs are spilled to a file in it.
        Raises:
            SlowftError: the disk has no room for them.
        """
        if schedule.in_memory and not self.cut.is_chain:
            raise ValueError("only the blocks of a chain form one graph with the head")
        self.schedule = schedule
        blocks = [self.cut.blocks[index] for index in dict.fromkeys(self.cut.order)] if schedule.in_memory else []
        resident = [*blocks, *(self.cut.head if schedule.keep_head or blocks else ())]
        self.layers.use_groups_of(schedule.group_nbytes or GROUP_NBYTES)
        read_ahead = self.cut.head if schedule.head_ahead else ()
        sizes = schedule.slots, schedule.resident_nbytes, schedule.reads_in_flight
        offloaded = {} if schedule.group_nbytes is None else self.layers.by_block()
        self.weights.resize(*sizes, offloaded, read_ahead)
        if schedule.in_memory:
            self.weights.cache.clear()  # nothing comes through its buffers
        self.weights.keep_resident(resident)  # after `resize` has freed memory
        for unit in self.cut.blocks:
            if any(schedule.kept):
                self.kept.watch(unit.module)
            if schedule.mlp_tokens is not None:
                self.pieces.watch(unit.module)
        self.hidden.spill(schedule.spilled, directory)
        if schedule.cache_nbytes is not None:
            self.weights.follow(Reuse(schedule))
            limits().keep_freed(schedule.cache_nbytes)
        freed_nbytes = schedule.cache_nbytes or 0
        limits().hold(schedule.active_nbytes, freed_nbytes)
        resident_nbytes = schedule.resident_nbytes + sum(unit.compute_nbytes for unit in resident)
        everything = max(resident_nbytes, (schedule.active_nbytes or 0) + freed_nbytes)
        limits().wire(everything if resident_nbytes else 0)

    @property
    def cuts(self) -> Pieces:
        return Pieces(self.schedule.mlp_tokens, self.schedule.attention_queries)

    # --- The boundary ---------------------------------------------------------------------------------

    def store_activations(self, directory: Path, limit_nbytes: int | None, model_path: Path) -> None:
        """From now on store the lowest trained block's input in `directory`, and begin steps there if it is stored.

        Raises:
            ConfigError: the directory cannot be used.
        """
        self.forget_activations()
        self._boundary = Boundary(ActivationCache(directory, limit_nbytes), self.cut, self.weights.reader, model_path)
        self.stats.count_stored(self._boundary.cache)

    @property
    def activation_cache(self) -> ActivationCache | None:
        return None if self._boundary is None else self._boundary.cache

    def forget_activations(self) -> None:
        """Store and use no activations from now on. Those on disk stay there."""
        if self._boundary is not None:
            self._boundary.cache.close()
            self._boundary = None

    def why_no_boundary(self) -> str | None:
        """Why no activations can be stored with what is trainable now; None if they can."""
        self.expect(backward=self.expects_backward)
        return why_not(self.cut, self.chain.lowest_trained, bool(self.chain.outside))

    def _begin_at_boundary(self, batches: Sequence[Passenger]) -> None:
        """Let those micro-batches begin at the boundary whose hidden state there is stored, and store the others'."""
        self._boundary_visit = 0
        self.hidden.watch(None)
        chain = self.chain
        if self._boundary is None or not batches or any(batch.adapter is not True for batch in batches):
            return
        if why_not(self.cut, chain.lowest_trained, bool(chain.outside)):
            return
        self._boundary_visit = chain.lowest_trained
        cuts = self.schedule.mlp_tokens, self.schedule.attention_queries
        if computes_on_gpu():  # It uses other kernels in training, and for other numbers of experts.
            cuts += (self.schedule.group_nbytes, self.expects_backward)
        keys = self._boundary.keys(self._boundary_visit, cuts, [batch.tokens for batch in batches])
        for batch, hidden in zip(batches, self._boundary.find(keys)):
            if hidden is not None:
                self.hidden.put((batch.index, self._boundary_visit), hidden, may_spill=self.expects_backward)
                batch.first = self._boundary_visit
                self.stats.count_begun_at_stored()
        self.hidden.watch(self._boundary_visit, self._boundary.keep)

    def _warn_of_lost_activations(self) -> None:
        """Warn once that activations are no longer stored."""
        if self._boundary is not None and self._boundary.cache.problem is not None and not self._has_warned:
            self._has_warned = True
            warnings.warn(self._boundary.cache.problem, SlowftWarning, stacklevel=5)

    # --- The journal ----------------------------------------------------------------------------------

    def journal_steps(
        self, journal: Journal | None, identity: str = "", after_block: Callable[[], None] = lambda: None
    ) -> None:
        """From now on write finished blocks of a step to `journal`, and let a step go on from what is there of it.

        Args:
            identity, after_block: see `StepJournal`.
        """
        lags = computes_on_gpu()
        self._journal = None if journal is None else StepJournal(journal, identity, after_block, lags=lags)
        if journal is not None:
            self.stats.count_journal(journal)

    @property
    def blocks_found(self) -> int:
        """How many block passes, forward and backward, the last step found finished in the journal."""
        return 0 if self._journal is None else self._journal.blocks_found

    def _begin_journal(self, batches: Sequence[Passenger]) -> tuple[int, int | None]:
        """Let the journal put in place what it has of this step. Returns its `forward_from` and `backward_below`."""
        if self._journal is None or self.schedule.in_memory or not self.cut.is_chain:
            return 0, None
        facts = [str(self.cuts), self._head_tokens(gradients=True), is_compiling()]
        if computes_on_gpu():
            facts.append(self.schedule.group_nbytes)
        in_memory = [a for owner, key, a in array_entries(self.model) if (id(owner), key) not in self._on_disk]
        self._journal.begin(self.chain, batches, self.hidden, facts, in_memory)
        return self._journal.forward_from, self._journal.backward_below

    # --- Opening and closing ------------------------------------------------------------------------

    def probe(self, part: Probe) -> mx.array:
        """Logits of a few tokens, while `part` answers every unit's call."""
        tokens = mx.array(TOKENS)
        with self.running_part(part), self.layers.noting() as calls:
            logits = self.model(tokens)
        self.layers.learn_routing(calls, tokens.size)
        return logits

    def call_on_placeholders(self, tokens: mx.array | None = None, cache: list[Any] | None = None) -> None:
        """Call every block on a few tokens, or on these with a key-value cache. Nothing is read or evaluated."""
        with keeping_random_state():
            if cache is None:
                self.probe(Probe(0.25))
                return
            with self.running_part(CachedProbe()):
                self.model(tokens, cache=cache)

    def make_resident(self, params: Sequence[Param]) -> None:
        for param in params:
            param.keep(read_whole(self.weights.reader, param.source))

    def compute_magnitudes(self) -> None:
        """Give every DoRA layer the norms of its base weight's rows, one layer at a time.

        Raises:
            ConfigError: a DoRA layer is outside the blocks, where its base weight is not put in place for it.
        """
        from mlx_lm.tuner.dora import DoRAEmbedding, DoRALinear

        in_blocks: set[int] = set()
        for unit in self.cut.blocks:
            for layer in [module for module in unit.module.modules() if isinstance(module, DoRALinear)]:
                in_blocks.add(id(layer))

                def compute(layer=layer):
                    layer.set_linear(layer.linear)
                    mx.eval(layer.m)

                self.weights.with_params([param for param in unit.params if param.owner is layer.linear], compute)
        for name, module in self.model.named_modules():
            if isinstance(module, (DoRALinear, DoRAEmbedding)) and id(module) not in in_blocks:
                raise ConfigError(f"DoRA cannot be attached to {name}, outside the blocks. Use LoRA there")

    @property
    def files(self) -> tuple[str, ...]:
        """The files that hold the blocks."""
        extents = (e for unit in self.cut.blocks for param in unit.params for e in param.source.extents)
        return tuple(dict.fromkeys(e.file for e in extents))

    @property
    def compute_dtype(self) -> mx.Dtype:
        """The dtype that the blocks' weights are computed with. For packed ones it is that of their scales."""
        dtypes = [p.source.result_dtype for unit in self.cut.blocks for p in unit.params]
        return next((dtype for dtype in dtypes if dtype in FLOATS), mx.float16)

    @property
    def head_may_be_cut(self) -> bool:
        """See `Chain.head_may_be_cut`; False for models that are no chain."""
        return self.cut.is_chain and self.chain.head_may_be_cut

    def close(self) -> None:
        self.forget_activations()
        if self.weights.is_open:
            self.hidden.close()
        self.traced.close()
        self.weights.close()
        limits().restore()  # with a limit below what is in use, MLX would wait at every later operation
        limits().give_back()  # freed buffers, of sizes that nothing will need again
