"""The public face of an opened model: mlx-lm's own class, with its weights on disk."""

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from .. import _mlx_was_imported_first, platform, tracing
from ..errors import ConfigError, SlowftError, SlowftWarning
from ..memory import computes_on_gpu
from ..models import adapters, loading, seams
from ..models.imports import TOKENIZERS_NBYTES
from ..planning.caching import Caching
from ..planning.plan import Plan, Planner
from ..planning.schedule import Schedule
from ..sizes import parse_nbytes
from ..weights.fingerprint import of_contents
from ..weights.reader import Reader
from ..weights.sources import placeholder
from ..weights.transfers import check_directory
from .budget import Budget
from .engine import Engine
from .head import unbounded_chunk
from .log_probabilities import PLAIN, RESULT_NBYTES, LogProbabilities, Mixing
from .micro_batches import MicroBatch, checked, checked_with_adapters, largest_shape, without_teachers
from .spilled_caches import SpilledCaches
from .stats import Stats

# Without a plan, MLX keeps freed buffers up to this share of a block's weights: fresh pages cost more than the cast
# that fills them (0.137 against 0.015 s for 176 MB).
CACHE_PER_BLOCK = 0.5
CACHE_FLOOR_NBYTES = 64 << 20
BASE = "base"  # the name that results without an adapter have
CUTS = ("rows", "mlp_tokens", "attention_queries", "head_tokens")  # the fields of a schedule that cut the work
# On a GPU the number of experts at a time does too: Metal chooses kernels by it (GatherQMM::eval_gpu).
CUTS_ON_GPU = (*CUTS, "group_nbytes")


class StreamedModel(nn.Module):
    """An mlx-lm model whose weights stream from disk, block by block, whenever it is called.

    Made by `open_model`; also an instance of the mlx-lm class of its architecture. `nn.value_and_grad(model,
    default_loss)` and mlx-lm's own trainer run on it (outside of `mx.compile`); `loss_and_grads` gives the
    same numbers with less memory and fewer reads.

    Attributes:
        seed, step: dropout masks are a function of (seed, step, block, micro-batch).
        stats: bytes read, seconds waited and computed, peak memory; of the last step in `stats.last`, of all in
            `stats.total`.
    """

    @property
    def stats(self) -> Stats:
        return self.engine.stats

    @property
    def memory(self) -> int | None:
        """The ceiling, in bytes, that steps are planned within; None if there is none."""
        return self.budget.memory

    @property
    def seed(self) -> int:
        return self.engine.seed

    @seed.setter
    def seed(self, seed: int):
        self.engine.seed = seed

    @property
    def step(self) -> int:
        return self.engine.step

    @step.setter
    def step(self, step: int):
        self.engine.step = step

    @property
    def head_chunk_tokens(self) -> int | None:
        """The most tokens whose logits may exist at once; None for the plan's number."""
        return self.engine.head_chunk_tokens

    @head_chunk_tokens.setter
    def head_chunk_tokens(self, tokens: int | None):
        self.engine.head_chunk_tokens = tokens

    @property
    def path(self) -> Path:
        """The directory the weights are read from."""
        return self._skeleton.path

    @property
    def nbytes_on_disk(self) -> int:
        """Bytes of all weights."""
        return sum(p.nbytes for p in self._skeleton.params)

    @property
    def tokens_of_last_step(self) -> int:
        """The number of tokens that counted in the last `loss_and_grads`."""
        return self.engine.tokens_of_last_step

    @property
    def has_adapter(self) -> bool:
        return self._adapter is not None

    @property
    def adapter_notes(self) -> list[str]:
        """Sentences about keys of the attached adapter that match fewer layers than one may expect."""
        return [] if self._adapter is None else list(self._adapter_notes)

    @property
    def embedding_rows(self) -> int | None:
        """The number of rows of the token embedding, which token ids must be below; None if there is no such table."""
        rows = self.engine.cut.outside[seams.Use.ROWS]
        return max((unit.params[0].source.shape[0] for unit in rows), default=None)

    @property
    def embedding_nbytes(self) -> int:
        """Bytes on disk of the token embedding."""
        return sum(unit.nbytes for unit in self.engine.cut.outside[seams.Use.ROWS])

    def add_lora(
        self,
        num_layers: int = 16,
        rank: int = 8,
        scale: float = 20.0,
        dropout: float = 0.0,
        keys: Sequence[str] | None = None,
        use_dora: bool = False,
    ) -> "StreamedModel":
        """Attach trainable LoRA (or DoRA) layers to the last `num_layers` blocks, as mlx-lm does.

        Args:
            num_layers: -1 for all; the default of 16 also means all if a model has fewer.
            keys: names of the linear layers within a block, such as "self_attn.q_proj"; None: all of them.
                Full names, such as "lm_head", attach outside the blocks.
        Raises:
            ConfigError: impossible values, keys that match nothing, or an adapter is attached already.
        """
        parameters: dict[str, Any] = {"rank": rank, "scale": scale, "dropout": dropout}
        if keys is not None:
            parameters["keys"] = keys
        self._attach(adapters.AdapterSpec("dora" if use_dora else "lora", num_layers, parameters), magnitudes=True)
        return self

    def expect_lora(self, num_layers: int = 16, rank: int = 8, use_dora: bool = False) -> "StreamedModel":
        """Count in plans what such layers and a tokenizer would take. The layers have no values and cannot be trained.

        Raises:
            ConfigError: as `add_lora` does.
        """
        spec = adapters.AdapterSpec(
            "dora" if use_dora else "lora", num_layers, {"rank": rank, "scale": 20.0, "dropout": 0.0}
        )
        self._attach(spec, magnitudes=False, has_values=False)
        return self

    def load_adapter(self, path: str | Path) -> "StreamedModel":
        """Attach the adapter saved in directory `path`, or load an adapter file into the attached layers."""
        path = Path(path).expanduser()
        if path.is_dir() or self._adapter is None:
            if self._adapter is not None:
                raise ConfigError(f"{path} is a directory. Give the file in it: {path / adapters.WEIGHTS}")
            self._attach(adapters.read_spec(path), magnitudes=False)
            path = path / adapters.WEIGHTS
        adapters.load_weights(self, self._adapter_parameters(), path)
        return self

    def save_adapter(
        self, path: str | Path, numbered: int | None = None, config: dict | None = None, is_current: bool = True
    ) -> Path:
        """Write the adapter to directory `path`, as `mlx_lm.generate --adapter-path` reads it. Atomic.

        Args:
            numbered: also write `0000123_adapters.safetensors`.
            config: further entries for `adapter_config.json`.
            is_current: False writes the numbered file only.
        """
        if self._adapter is None:
            raise ConfigError("no adapter is attached. Call add_lora first")
        entries = {**(config or {}), **self._adapter.as_config(), "model": str(self.path)}
        return adapters.save(self._adapter_parameters(), Path(path).expanduser(), entries, numbered, is_current)

    def _adapter_parameters(self) -> dict[str, mx.array]:
        """The attached layers' parameters, frozen ones included, and whatever else is trainable."""
        trainable = dict(tree_flatten(self.trainable_parameters()))
        return {n: a for n, a in tree_flatten(self.parameters()) if n in trainable or n in self._adapter_names}

    def loss_and_grads(self, batch, lengths: mx.array | None = None):
        """Loss and gradients of the trainable parameters, over one batch or over a list of micro-batches.

        The result is exactly what `nn.value_and_grad(m, mlx_lm.tuner.trainer.default_loss)(m, batch, lengths)` gives on
        the whole model in memory. Over a list, it is the sum of the losses divided by the number of all their tokens,
        with its gradients. Each block is read at most twice, however many micro-batches there are.

        Args:
            batch: int32 `[B, T+1]` token ids, or a list of (batch, lengths) or (batch, lengths, `Teacher`). With a
                teacher the loss is that of `engine/distillation.py`.
            lengths: int32 `[B, 2]`: prompt offset and length of each row; or `[B, 2n]`, n stretches of targets.
        Returns:
            ((loss float32 `[]`, ntoks int32 `[]`), gradients as a tree like `trainable_parameters()`).
        """
        given, teachers = without_teachers(batch, lengths)
        micro_batches = checked(given, lengths)
        shape = largest_shape([tokens for tokens, _ in micro_batches])
        self.budget.expect_teacher(max((t.top_k for t in teachers if t is not None), default=0))
        self.budget.cover(*shape)
        result = self.engine.loss_and_grads(micro_batches, self.budget.is_measuring, teachers)
        if not self.engine.blocks_found:  # part of a step tells nothing of a whole one
            self.budget.after_step(*shape)
        return result

    def loss(self, batch, lengths: mx.array | None = None):
        """(loss, ntoks) of a batch, without gradients. Each block is read at most once.

        For a list of `MicroBatch`es it is a list of those, all from one pass over the weights: with the adapter and
        without it, or with several adapters. The numbers are the same as in a pass for each.

        Args:
            batch: int32 `[B, T+1]` token ids, or a list of `MicroBatch`.
            lengths: int32 `[B, 2]`: prompt offset and length of each row; or `[B, 2n]`, n stretches of targets.
        Raises:
            ConfigError: no adapter has such a name.
        """
        micro_batches = checked_with_adapters(batch, lengths)
        self._check_adapters(micro_batches)
        self.budget.cover(*largest_shape([m.batch for m in micro_batches]))
        losses = self.engine.losses([(m.batch, m.lengths, m.adapter) for m in micro_batches])
        return losses[0] if lengths is not None else losses

    def log_probabilities(
        self,
        micro_batches: Sequence[MicroBatch],
        top_k: int = 0,
        token_ids: Sequence[int] = (),
        on_visit: Callable[[int], object] = lambda n: None,
        mixing: Mixing = PLAIN,
        first: int = 0,
    ) -> Iterator[LogProbabilities]:
        """Log-probabilities at the targets that count, one micro-batch after the other, computed as they are iterated.

        As many micro-batches go through the model together as memory has room for, whatever their adapters. Each block
        is read once for all of them. The results of a pass are yielded before the next pass begins. Put the longest
        micro-batch first: then later ones need no more memory.

        Args:
            micro_batches: for each row `(first, last)` in `lengths`, tokens number `first` to `last`, counted from 0,
                are targets; token 0 is never one.
            top_k: how many of the most probable tokens are also given.
            token_ids: tokens whose log-probabilities are also given.
            on_visit: is called with the number of block passes (one block, one micro-batch) since the last call.
            mixing: makes its results of each group of micro-batches that follow each other, in place of one of each.
            first: micro-batches before this one are left out, but planned for, so that others' last bits are the same.
        Raises:
            ConfigError: no adapter has such a name, or the memory is too little; names the least that would do.
        """
        given = checked_with_adapters(list(micro_batches), None)
        self._check_adapters(given)
        tokens = max(m.batch.shape[1] for m in given) - 1
        # No micro-batch takes more memory than this shape: attention's scores grow with the square of the tokens
        rows = max(-(-m.batch.shape[0] * (m.batch.shape[1] - 1) // tokens) for m in given)
        adapters = {m.adapter for m in given}
        results_nbytes = mixing.results * rows * tokens * (RESULT_NBYTES + 8 * top_k + 4 * len(token_ids))
        start, n = first, mixing.passengers
        while start < len(given):
            sizes = n, mixing.nbytes, results_nbytes
            at_once = n * self.budget.cover_passes(rows, tokens, len(given) // n, adapters, *sizes)
            of_pass = [(m.batch, m.lengths, m.adapter) for m in given[start : start + at_once]]
            with self._not_training():
                results = self.engine.log_probabilities(of_pass, top_k, token_ids, on_visit, mixing)
            self.budget.after_pass()
            yield from results
            start += at_once

    def _check_adapters(self, micro_batches: Sequence[MicroBatch]) -> None:
        for adapter in {m.adapter for m in micro_batches} - {True, False}:
            if adapter not in self.engine.chain.adapters.names:
                raise ConfigError(f"no adapter is named {adapter!r}. Load one with add_adapter")

    def decode(
        self,
        batches: Sequence[tuple[mx.array, list[Any], mx.array, bool | str]],
        take: Callable[[int, int, mx.array], None],
        spilled: SpilledCaches | None = None,
    ) -> None:
        """A forward pass over several batches that each have a key-value cache; each block is read once for all.

        The numbers are those of `model(tokens, cache=cache)` for each of them.

        Args:
            batches: of each (tokens int32 `[B, T]`; mlx-lm's caches, one for each block, which take the tokens in;
                places int32 `[n]`, the tokens whose logits are needed, numbered in the flat `[B x T]`; adapter, as in
                `MicroBatch`).
            take: `take(batch, first, logits)` is given logits `[m, V]` of the places from number `first` on.
            spilled: loads and stores those caches that are on disk.
        """
        with self._not_training():
            self.engine.decode(batches, take, spilled)

    def takes(self, tokens: mx.array, cache: list[Any]) -> bool:
        """Whether the model can be called with these caches. Only shapes are computed; do not use the caches again."""
        try:
            self.engine.call_on_placeholders(tokens, cache)
        except (ValueError, TypeError, RuntimeError, AttributeError, NotImplementedError):
            return False
        return True

    # --- The rest of `Decoder` (`inference/decoder.py`), for generating -------------------------------

    def new_cache(self, max_kv_size: int | None = None) -> list[Any]:
        """mlx-lm's caches for a new row, one for each block."""
        from mlx_lm.models.cache import make_prompt_cache

        return make_prompt_cache(self, max_kv_size)

    @property
    def passengers_of_row(self) -> int:
        """How many micro-batches a row makes in one pass over the weights."""
        return 1

    @property
    def n_logits(self) -> int:
        """How many logits a token has."""
        return self.engine.cut.vocab_size

    def block_passes(self, adapters: Sequence[bool | str]) -> int:
        """How many block passes it takes to score a micro-batch with each of these adapters."""
        return len(adapters) * len(self.engine.cut.order)

    @property
    def scored(self) -> dict[str, bool | str]:
        """What is scored in any case: by its name, the adapter of a `MicroBatch`."""
        return {BASE: False}

    @property
    def adapter_names(self) -> Sequence[str]:
        """The names of the adapters that `add_adapter` loaded."""
        return self.engine.chain.adapters.names

    @property
    def can_spill(self) -> bool:
        """Whether caches can be on disk: only if blocks form a chain, so that one's caches are in use at a time."""
        return self.engine.cut.is_chain

    def streamed_caches(self, caches: Sequence[Any]) -> Sequence[Any]:
        """Of a list with an entry for each of a row's caches, those of streamed blocks: here all."""
        return caches

    def look(self, tokens: mx.array, cache: list[Any]) -> None:
        """Give the caches the shapes that they have after these tokens. Nothing is read or computed."""
        self.engine.call_on_placeholders(tokens, cache)

    def beside_nbytes(self, rows: int, drafted: int, tokens: int) -> int:
        """Bytes that a pass takes and the budget does not know of: none here."""
        return 0

    def beside_s(self, rows: int) -> float:
        """Seconds that a pass takes for models that do not stream: none here."""
        return 0.0

    def drafter_model(self) -> None:
        """A model in memory that predicts this one's tokens well: there is none here."""

    @contextmanager
    def _not_training(self) -> Iterator[None]:
        """While this is entered, the model is in evaluation mode, without dropout."""
        training = [module for module in self.modules() if module.training]
        self.eval()
        try:
            yield
        finally:
            for module in training:
                module._training = True

    def first_not_finite(self, micro_batches: Sequence[tuple[mx.array, mx.array]]) -> str | None:
        """Where a value was first not finite in the last step, which was over these micro-batches, in words.

        This takes a forward pass. None if all blocks' outputs are finite, or if the model is no chain.
        """
        return self.engine.first_not_finite([(batch, lengths) for batch, lengths, *_ in micro_batches])

    @property
    def cuts(self) -> dict[str, int | None]:
        """How the work of a step is cut now, which decides the last bits of gradients; None where it is not cut."""
        return {name: getattr(self.engine.schedule, name) for name in (CUTS_ON_GPU if computes_on_gpu() else CUTS)}

    def keep_cuts(self, cuts: dict[str, int | None]) -> None:
        """From now on cut the work like this, whatever the ceiling: a resumed run then gets the same bits.

        From then on, a ceiling that is too low for it is refused with the least memory that would do.
        """
        of_groups = [name for name in CUTS_ON_GPU if name in cuts and name not in CUTS]
        schedule = replace(self.engine.schedule, **{name: cuts.get(name) for name in (*CUTS, *of_groups)})
        self.budget.cut_like(schedule, groups_too=bool(of_groups))
        if self.memory is None:
            self.engine.follow(schedule)

    def fingerprint(self) -> str:
        """A digest of the weights' files, by their headers and samples of their contents; a copy has the same."""
        return of_contents({file: self.engine.weights.reader.descriptor(file) for file in self.engine.cut.files})

    def add_adapter(self, name: str, path: str | Path) -> None:
        """Load the adapter saved in directory `path` beside the attached one, for `MicroBatch(adapter=name)`.

        It is not trained. It may have any rank and any layers.

        Raises:
            AdapterError: there is no adapter, or it belongs to another model.
        """
        self.engine.chain.adapters.add(name, Path(path).expanduser())
        self.engine.adapter_changed()
        self.budget.measure_anew()

    @property
    def followed_plan(self) -> Plan | None:
        """The plan that steps follow now; None without a ceiling, or before the first step."""
        return self.budget.plan

    @property
    def activation_cache(self) -> Path | None:
        """Where the lowest trained block's input is stored between steps; None if it is not."""
        cache = self.engine.activation_cache
        return None if cache is None else cache.directory

    def cache_activations(
        self, directory: str | Path | None = None, max_size: str | int | None = None
    ) -> "StreamedModel":
        """Store the lowest trained block's input on disk, so that no micro-batch goes through the blocks below twice.

        From then on `loss_and_grads` and `loss` begin at that block for every micro-batch (of the same token ids and
        padding) whose activations are stored, by this run or an earlier one. Losses and gradients are the same to the
        last bit, because activations are stored in the dtype of the computation: the model's own would round them.
        Call it after `add_lora`. An entry is a hidden state of `B x T x D` values.

        Args:
            directory: by default in the user's cache directory.
            max_size: such as "20GB"; entries that have not been used for the longest are removed to stay below it. None
                for a quarter of the free disk.
        Raises:
            ConfigError: there is no block below the lowest trained one, or its output cannot be stored; says why. Or
                the directory cannot be used.
        """
        path = usual_activation_cache() if directory is None else Path(directory).expanduser()
        limit = None if max_size is None else parse_nbytes(max_size, "a size to store activations in")
        if (reason := self.why_no_activation_cache()) is not None:
            raise ConfigError(f"--activation-cache {path} has no use here: {reason}")
        self.engine.store_activations(path, limit, self._skeleton.path)
        return self

    def why_no_activation_cache(self) -> str | None:
        """Why `cache_activations` has no use with the adapter that is attached now; None if it has."""
        return self.engine.why_no_boundary()

    def plan_caching(self, plan: Plan, first_steps: float, later_steps: float) -> Caching:
        """What `cache_activations` would save of a run of steps under `plan`, the last plan that was made.

        Args:
            first_steps: how many steps store activations, usually those of an epoch.
            later_steps: how many begin at stored activations.
        Returns:
            A `Caching` with the plan of later steps, and the reason if it is not possible or does not pay.
        """
        if (reason := self.why_no_activation_cache()) is not None:
            return Caching(reason=reason)
        later, is_worthwhile = self.budget.caching(plan, first_steps, later_steps)
        if later_steps <= 0:
            return Caching(reason="there is one epoch only", later=later)
        return Caching(reason=None if is_worthwhile else "it would save no time", later=later)

    def planner(
        self, batch_size: int, tokens: int, micro_batches: int = 1, optimizer_copies: int = 2, measure: bool = False
    ) -> Planner:
        """Makes plans for such steps under any ceiling; see `plan`.

        Args:
            measure: measure now, in about half a second, what no run has measured on this machine yet.
        """
        self.budget.expect_optimizer(optimizer_copies)
        if measure:
            self.budget.measure_machine()
        return self.budget.planner(batch_size, tokens, micro_batches)

    def plan(
        self,
        batch_size: int,
        tokens: int,
        micro_batches: int = 1,
        memory: str | int | None = None,
        optimizer_copies: int = 2,
        follow: bool = False,
    ) -> Plan:
        """What a step over `micro_batches` of `[batch_size, tokens]` will keep in memory, read, and take.

        Args:
            memory: ceiling, such as "2GB"; None for the one that the model was opened with, or none at all.
            optimizer_copies: how many times the trainable parameters the optimizer keeps (Adam: 2).
            follow: steps (up to this shape) stay within the ceiling from now on. The first one keeps next to nothing
                and is measured, which corrects the plan (see `followed_plan`).
        Raises:
            ConfigError: the ceiling is too low; names the least that would do. Nothing was read.
        """
        budget = self.budget
        budget.expect_optimizer(optimizer_copies)
        nbytes = budget.memory if memory is None else parse_nbytes(memory)
        if follow and nbytes is not None:
            budget.limit(nbytes)
            budget.cover(batch_size, tokens, micro_batches)
        return budget.make(nbytes, batch_size, tokens, micro_batches)

    @contextmanager
    def trace(self, file: str | Path) -> Iterator[None]:
        """While this is entered, record what is read, cast, computed, waited for and spilled, and when.

        On leaving, `file` is written: JSON for Perfetto (ui.perfetto.dev) or chrome://tracing.

        Raises:
            SlowftError: it cannot be written.
        """
        with tracing.recording() as recorder:
            recorder.write(file)  # an error in writing is raised now
            try:
                yield
            finally:
                extents = [(e, u.name) for u in self.engine.units for p in u.params for e in p.source.extents]
                recorder.name_reads([(e.file, e.offset, e.offset + e.nbytes, name) for e, name in extents])
                recorder.write(file)

    def __enter__(self) -> "StreamedModel":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """End the threads and close the files. The model cannot be used afterwards."""
        self.engine.close()

    def save_weights(self, file: str):
        """Refused: the model has placeholders, and the weights are on disk. See `save_adapter`."""
        raise SlowftError(f"a streamed model's weights stay in {self.path}. Use save_adapter, then mlx_lm.fuse")

    def __deepcopy__(self, memo):
        raise SlowftError("a streamed model cannot be copied. Open it once more instead")

    def __reduce__(self):
        raise SlowftError("a streamed model cannot be pickled. Open it where it is needed instead")

    def _attach(self, spec: adapters.AdapterSpec, magnitudes: bool, has_values: bool = True) -> None:
        if self._adapter is not None:
            raise ConfigError("an adapter is attached already. Open the model anew to attach another")
        notes = adapters.attach(self, spec)
        spec, more_notes = adapters.without_hidden_weights(self, spec, self.engine.call_on_placeholders)
        self._adapter_notes = notes + more_notes
        if spec.fine_tune_type == "dora" and magnitudes:
            self.engine.compute_magnitudes()
        planned_nbytes = 0
        if not has_values:
            trainable = self.trainable_parameters()
            planned_nbytes = sum(array.nbytes for _, array in tree_flatten(trainable)) + TOKENIZERS_NBYTES
            self.update(tree_map(lambda array: placeholder(array.shape, array.dtype), trainable))
        mx.eval(self.trainable_parameters())
        self.budget.measure_anew(planned_nbytes)
        self._adapter = spec
        self._adapter_names = frozenset(name for name, _ in tree_flatten(self.trainable_parameters()))


def open_model(
    path_or_hub_id: str | Path,
    memory: str | int | None = None,
    adapter_path: str | Path | None = None,
    compute_dtype: str | None = None,
    spill_dir: str | Path | None = None,
    trust_remote_code: bool = False,
) -> StreamedModel:
    """Open a model for streaming: headers only, nothing resident.

    Args:
        path_or_hub_id: an mlx-lm (or hub) model directory, or a hub id, which is downloaded.
        memory: such as "2GB" (or bytes): a ceiling for the whole process as the operating system counts it. Each
            step's shape is planned within it (see `StreamedModel.plan`). None: two blocks at a time, nothing kept.
        adapter_path: directory of a saved adapter, which is attached and trainable.
        compute_dtype: "float32", "float16", "bfloat16", or "native" for the model's own, with quantized layers packed.
            None is "native" on a GPU and "float32" on a CPU.
        spill_dir: block inputs that `memory` has no room for go there; by default in the user's cache directory.
        trust_remote_code: let the model run code of its own (`model_file` in its config.json).
    Raises:
        ModelError: missing or corrupt files, an unknown architecture, or one that cannot be streamed.
        ConfigError: `memory` is below what a step of one token needs; names that. Or `spill_dir` cannot be written to.
    """
    platform.fix_malloc_threshold()
    _warn_of_slow_blas()
    memory_nbytes = None if memory is None else parse_nbytes(memory)
    spills_to = None if spill_dir is None else Path(spill_dir).expanduser()
    if spills_to is not None:
        check_directory("--spill-dir", spills_to)
    dtype = compute_dtype_of(compute_dtype)
    skeleton = loading.load_skeleton(loading.resolve(str(path_or_hub_id)), StreamedModel, dtype, trust_remote_code)
    model = skeleton.model
    cut = seams.find_units(model, skeleton.params)
    reader = Reader()
    reader.expect_unchanged({e.file for param in skeleton.params for e in param.source.extents})
    engine = Engine(model, cut, reader)
    model._skeleton, model.engine, model._adapter = skeleton, engine, None
    model.budget = Budget(engine, memory_nbytes, spills_to)
    try:
        engine.make_resident(cut.resident)
        seams.install(cut, engine.on_block, engine.on_rows, engine.on_matmul)
        seams.probe(model, cut, engine.probe, engine.make_resident)
        engine.make_chain()
        mx.eval([array for _, array in tree_flatten(model)])  # no unevaluated table may reach the compute thread
        block_nbytes = max(unit.compute_nbytes for unit in cut.blocks)
        slots = 1 if all(p.source.is_copied for unit in cut.blocks for p in unit.params) else 2
        cache_nbytes = int(CACHE_PER_BLOCK * block_nbytes) + CACHE_FLOOR_NBYTES
        engine.follow(Schedule(slots, cache_nbytes=cache_nbytes, head_tokens=unbounded_chunk(cut.vocab_size)))
        model.budget.check()
        if adapter_path is not None:
            model.load_adapter(adapter_path)
    except BaseException:
        engine.close()
        raise
    return model


def usual_activation_cache() -> Path:
    """Where activations are stored by default."""
    return platform.cache_directory() / "activations"


@functools.cache  # once in a process
def _warn_of_slow_blas() -> None:
    if slow := platform.slow_blas_warning(_mlx_was_imported_first):
        warnings.warn(slow, SlowftWarning, stacklevel=3)


def compute_dtype_of(name: str | None) -> mx.Dtype | None:
    """The dtype that `open_model` computes in when it is given this name; None for the files' own."""
    if name == "native":
        return None
    if name is None:
        return None if computes_on_gpu() else mx.float32
    dtypes: dict[str, Any] = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
    if name not in dtypes:
        raise ConfigError(f"compute_dtype must be one of {', '.join(dtypes)} or native, got {name}")
    return dtypes[name]
