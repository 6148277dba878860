"""Fits an adapter: batches, steps, evaluation, saving, reports. Knows nothing of blocks or files of weights.

Batches come in mlx-lm's order and padding, initial adapters from its own initialisation:
in float32, without dropout and accumulation, a run ends with the very adapter `mlx_lm.lora` trains.
"""

import json
import math
import tempfile
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.optimizers import clip_grad_norm
from mlx.utils import tree_flatten, tree_unflatten

from .. import platform
from ..data.batches import BatchStream, batch_order, iterate, padded_tokens
from ..data.datasets import check_size
from ..data.store import Samples, TokenDataset, as_datasets
from ..engine.budget import STEPS_TO_LEARN_FROM
from ..engine.model import parse_nbytes, usual_activation_cache
from ..errors import AdapterError, ConfigError, DataError, Interrupted, SlowftError
from ..planning.caching import Caching
from ..reports.base import Report
from ..weights.activation_cache import ActivationCache
from .checkpoint import DIRECTORY, Checkpoint, Checkpoints
from .config import OPERATIONAL, OPTIMIZER_COPIES, TrainConfig
from .status import Status
from .stopping import Stop, listening, parse_seconds


class Trainer:
    """Trains the adapter of an opened model.

        slowft.Trainer(model, slowft.TrainConfig(iters=100)).fit(train, valid)

    Args:
        model: from `slowft.open_model`; an adapter is attached as `config` says unless it has one.
        config: a `TrainConfig`.
        report: is told what happens; by default nothing is shown.
    """

    def __init__(self, model, config: TrainConfig | None = None, report: Report | None = None):
        self.model, self.config = model, config or TrainConfig()
        self.config.check()
        self.report = report or Report()
        self.trained_tokens = 0
        self.caching: Caching | None = None
        self._taken_up: Checkpoint | None = None

    def attach(self) -> None:
        """Attach the adapter that the config asks for, initialised from its seed, if none is attached."""
        c = self.config
        if not self.model.has_adapter:
            mx.random.seed(c.seed)
            self.model.add_lora(c.num_layers, use_dora=c.fine_tune_type == "dora", **c.lora_parameters)
        if c.resume_adapter_file is not None:
            self.model.load_adapter(c.resume_adapter_file)

    def plan(self, *datasets: Samples | None, memory: str | int | None = None, follow: bool = True):
        """The plan for steps on these datasets (see `StreamedModel.plan`), which the steps then follow.

        Args:
            memory: ceiling; None: the one the model was opened with.
        Raises:
            ConfigError: the ceiling is too low; names the least that would do.
        """
        c, datasets = self.config, as_datasets(*datasets)
        longest = max((int(data.lengths.max()) for data in datasets if data is not None and len(data)), default=1)
        tokens = padded_tokens(longest, c.max_seq_length)
        copies = OPTIMIZER_COPIES[c.optimizer.lower()]
        return self.model.plan(
            c.batch_size, tokens, min(c.grad_accumulation_steps, c.iters), memory, copies, follow=follow
        )

    def cache_activations(self, plan, *datasets: Samples | None, use: bool = True) -> Caching:
        """Have the model store activations between epochs, where the config says so or, without a word, where it pays.

        Args:
            plan: of the steps; None if there is none, and then only the config decides.
            datasets: the training set first.
            use: False only looks whether it would.
        Raises:
            ConfigError: the config names a directory, and this model has no use for it, or it cannot be used.
        """
        c, datasets = self.config, as_datasets(*datasets)
        caching = Caching(reason="there is no plan of the steps")
        if plan is not None:
            n_batches = len(datasets[0]) // c.batch_size if datasets[0] is not None and c.train else 0
            first, later = min(c.iters, n_batches), max(c.iters - n_batches, 0) if n_batches else 0
            steps = c.grad_accumulation_steps
            caching = self.model.plan_caching(plan, first / steps, later / steps)
            per_token = plan.job.hidden_nbytes / (plan.job.rows * plan.job.tokens)
            caching = replace(caching, nbytes=int(per_token * sum(map(self._padded_tokens, datasets))))
        if c.activation_cache == "off":
            caching = replace(caching, reason="--activation-cache is off")
        elif c.activation_cache is not None:
            caching = replace(caching, reason=None, directory=Path(c.activation_cache).expanduser())
            if (reason := self.model.why_no_activation_cache()) is not None:
                raise ConfigError(f"--activation-cache {c.activation_cache} has no use here: {reason}")
        elif caching.reason is None:
            where = usual_activation_cache()
            size = c.activation_cache_size
            limit = ActivationCache.usual_limit(where) if size is None else parse_nbytes(size)
            full = f"{caching.nbytes / 1e9:.2f} GB would not fit into the {limit / 1e9:.2f} GB it may take on disk"
            caching = replace(caching, reason=full) if caching.nbytes > limit else replace(caching, directory=where)
        if use and caching.directory is not None:
            try:
                self.model.cache_activations(caching.directory, c.activation_cache_size)
            except ConfigError as e:
                if c.activation_cache is not None:
                    raise
                caching = replace(caching, directory=None, reason=str(e))
        self.caching = caching
        return caching

    def _padded_tokens(self, dataset: TokenDataset | None) -> int:
        """Of all batches of a dataset together, as mlx-lm pads them."""
        if dataset is None or not len(dataset):
            return 0
        c = self.config
        longest = dataset.lengths[self._order(dataset)].max(axis=1)
        return sum(c.batch_size * padded_tokens(int(length), c.max_seq_length) for length in longest)

    def take_up(self, train: Samples, valid: Samples | None = None) -> None:
        """With `resume`: find the checkpoint to go on from, and have the model cut its work as that run did.

        Raises:
            AdapterError: there is none that is whole.
            ConfigError: model, data or options have changed since, and `resume_anyway` is not set.
        """
        c = self.config
        if not c.resume or self._taken_up is not None:
            return
        train, valid = as_datasets(train, valid)
        found, wrong = Checkpoints(self._directory, c.keep_checkpoints).newest()
        for what in wrong:
            self.report.note(f"Warning: {what}")
        if found is None:
            raise AdapterError(
                f"--resume: {self._directory / DIRECTORY} has no checkpoint. Leave --resume out to begin"
            )
        now, then = self._identity(train, valid), found.state["identity"]
        changed = [name for name in ("model", "data") if now[name] != then[name]]
        options = {name: (then["options"].get(name), value) for name, value in now["options"].items()}
        changed += [f"{name} ({old!r}, now {new!r})" for name, (old, new) in options.items() if old != new]
        if changed and not c.resume_anyway:
            raise ConfigError(
                f"--resume: the run in {self._directory} had another {', another '.join(changed)}. Give what it had, "
                "or --resume-anyway"
            )
        if now["software"] != then["software"]:
            self.report.note("Warning: MLX, mlx-lm or the BLAS are not those of the run so far: last bits may differ")
        self.model.keep_cuts(found.state["cuts"])
        self._taken_up = found

    def fit(self, train: Samples, valid: Samples | None = None) -> dict[str, Any]:
        """Train for `config.iters` micro-batches; evaluate before, between and after; save as configured.

        Args:
            train, valid: sequences of (tokens, prompt offset), as `load_data` gives them.
        Returns:
            {"train_loss": of the last report, "valid_loss_before", "valid_loss": None without valid; "stopped": why,
            if it was before the last step}.
        Raises:
            SlowftError: the data is too small, the loss is not finite, or the adapter cannot be written.
            Interrupted: a signal asked to stop; a checkpoint was written.
        """
        c, model = self.config, self.model
        train, valid = as_datasets(train, valid)
        valid = valid if valid is not None and len(valid) else None
        if not len(train):
            raise DataError("the training set is empty or missing. Put samples into train.jsonl")
        check_size(train, c.batch_size, "training")
        check_size(valid if valid is not None else [], c.batch_size, "validation")
        check_writable(Path(c.adapter_path))
        optimizer = c.build_optimizer()
        self.attach()
        self.take_up(train, valid)
        plan = self.plan(train, valid) if model.memory is not None else None
        if self.caching is None:
            self.cache_activations(plan, train, valid)
        run = _Run(self, optimizer, train, valid)
        self.note_schedule()
        self.report.begin(c, model)
        try:
            with listening(run.stop, self.report.note):
                result = run.go()
        except BaseException as e:
            run.status("stopped" if isinstance(e, KeyboardInterrupt | Interrupted) else "failed", error=str(e))
            raise
        finally:
            run.checkpoints.close()
        self.report.end()
        return result

    @property
    def _directory(self) -> Path:
        return Path(self.config.adapter_path).expanduser()

    def _identity(self, train: TokenDataset, valid: TokenDataset | None) -> dict[str, Any]:
        """What a run is of: what must not change when it goes on."""
        import mlx_lm

        options = {k: v for k, v in asdict(self.config).items() if k not in OPERATIONAL}
        data = [train.fingerprint(), None if valid is None or not len(valid) else valid.fingerprint()]
        software = [mx.__version__, mlx_lm.__version__, platform.blas_description(), str(mx.default_device())]
        identity = {"model": self.model.fingerprint(), "data": data, "options": options, "software": software}
        return json.loads(json.dumps(identity))  # as a checkpoint has it: lists for tuples

    def note_schedule(self) -> None:
        """Report that the run is over before the learning rate's schedule, if it is. `fit` does; a dry run has to."""
        if self.config.train and (note := self.config.schedule_note()) is not None:
            self.report.note(note)

    def save(self, numbered: int | None = None, is_current: bool = True) -> Path:
        """Write the adapter with this run's configuration; returns the (numbered) file.

        Args:
            is_current: False leaves adapters.safetensors as it is.

        Raises:
            SlowftError: the adapter is not finite, or cannot be written; what was saved before stays as it is.
        """
        _check_finite(self.model)
        config = {k: v for k, v in asdict(self.config).items() if v is not None}
        return self.model.save_adapter(self.config.adapter_path, numbered, config, is_current)

    def evaluate(self, dataset: Samples, num_batches: int = -1, stop: Stop | None = None) -> float:
        """Mean loss per token over `num_batches` batches (-1: all), as mlx-lm's `evaluate` counts it.

        Args:
            stop: asked for meanwhile, it raises `StopAsked`.
        """
        self.model.eval()
        (dataset,) = as_datasets(dataset)
        total, tokens = 0.0, 0
        n_batches = len(dataset) // self.config.batch_size
        n_batches = n_batches if num_batches == -1 else min(n_batches, num_batches)
        batches = iterate(dataset, self._order(dataset), self.config.max_seq_length)
        with self.report.evaluating(n_batches) as done:
            for _, (batch, lengths) in zip(range(n_batches), batches):
                loss, n = self.model.loss(batch, lengths)
                total += loss.item() * n.item()
                tokens += n.item()
                done()
                if stop is not None and stop.is_asked_for:
                    raise StopAsked
        return total / tokens

    def _order(self, dataset: TokenDataset) -> np.ndarray:
        return batch_order(dataset, self.config.batch_size, self.config.seed if self.config.group_by_length else None)


class _Run:
    """One `fit`: where it is, and what happens after each step.

    A checkpoint is of the moment right after an optimizer step. What follows a step (reports, validation, adapters) is
    done again by the run that goes on from there, from the same random state, so it comes out the same.
    """

    def __init__(self, trainer: Trainer, optimizer, train: TokenDataset, valid: TokenDataset | None):
        c = trainer.config
        self._trainer, self._optimizer, self._valid = trainer, optimizer, valid
        self._config, self._model, self._report = c, trainer.model, trainer.report
        self._identity = trainer._identity(train, valid)
        self._batches = BatchStream(train, trainer._order(train), c.max_seq_length)
        self._step_s: list[float] = []
        self.stop = Stop(None if c.max_time is None else parse_seconds(c.max_time))
        self.checkpoints = Checkpoints(trainer._directory, c.keep_checkpoints)
        self._status = Status(trainer._directory)
        self._begin_s, self._began_at = time.perf_counter(), 0
        self.progress = Progress()
        self._model.seed, self._model.step = c.seed, 0
        np.random.seed(c.seed)
        self._is_taken_up = trainer._taken_up is not None
        self._window = _Window(self._model)
        if trainer._taken_up is not None:
            self._go_on_from(trainer._taken_up)

    def go(self) -> dict[str, Any]:
        """Steps until the last, or until asked to stop."""
        c, p = self._config, self.progress
        is_over = self._is_taken_up and self._after_step()
        while p.iteration < c.iters and not is_over:
            n = min(c.grad_accumulation_steps, c.iters - p.iteration)
            micro_batches = [next(self._batches) for _ in range(n)]
            if p.iteration == 0 and self._valid is not None:
                p.valid_loss_before = p.valid_loss = self._validate(before_any_step=True)
                self._window = _Window(self._model)
            self._step(micro_batches)
            is_over = self._after_step()
        if p.stopped is None:
            if c.keep != "best" or p.best_iteration is None:
                self._report.saved(self._trainer.save())
            self.checkpoints.wait()
        self._say_how_it_went()
        self.status("finished" if p.stopped is None else "stopped")
        if self.stop.signal is not None and p.stopped is not None:
            raise Interrupted(p.stopped, self.stop.signal)
        result = {"train_loss": p.train_loss, "valid_loss_before": p.valid_loss_before, "valid_loss": p.valid_loss}
        return result | ({} if p.stopped is None else {"stopped": p.stopped})

    def _step(self, micro_batches: list[tuple[mx.array, mx.array]]) -> None:
        c, model, p, n = self._config, self._model, self.progress, len(micro_batches)
        model.train()
        begin = time.perf_counter()
        (loss, n_tokens), gradients = model.loss_and_grads(micro_batches)
        norm = _norm(gradients)
        if not (math.isfinite(loss.item()) and math.isfinite(norm)):
            self._refuse(loss.item(), micro_batches, gradients)
            p.skipped_steps += 1
        else:
            if c.max_grad_norm is not None:
                gradients, _ = clip_grad_norm(gradients, c.max_grad_norm)
            self._optimizer.update(model, gradients)
            mx.eval(model.trainable_parameters(), self._optimizer.state)
            p.trained_tokens += n_tokens.item()
            p.losses.append([p.iteration + n, loss.item(), n_tokens.item()])
            self._window.add(n, loss.item(), n_tokens.item(), time.perf_counter() - begin)
        self._trainer.trained_tokens = p.trained_tokens
        p.previous, p.iteration = p.iteration, p.iteration + n
        self._step_s.append(time.perf_counter() - begin)
        self._report.advance(n, loss.item(), model)

    def _after_step(self) -> bool:
        """What is due after a step: a checkpoint, reports, validation, adapters. Returns whether the run is over."""
        c, p = self._config, self.progress
        self._random_state = np.random.get_state()
        self._order = self._batches.permutation, self._batches.at
        is_last = p.iteration == c.iters
        if not self._is_taken_up and (self._due(c.save_every) or is_last):
            self._write_checkpoint()
        self._is_taken_up = False
        if self.stop.is_asked_for and not is_last:
            return self._stop()
        if (self._due(c.steps_per_report) or is_last) and self._window.tokens:
            info = self._window.summary(p.iteration, self._optimizer.learning_rate.item(), p.trained_tokens)
            p.train_loss = info["train_loss"]
            self._report.trained(info)
            self._window = _Window(self._model)
        self.status("running")
        if self._valid is not None and (self._due(c.steps_per_eval) or is_last):
            try:
                p.valid_loss = self._validate()
            except StopAsked:
                return self._stop()
            if p.best_loss is None or p.valid_loss < p.best_loss:
                p.best_loss, p.best_iteration, p.validations_since = p.valid_loss, p.iteration, 0
                if c.keep == "best":
                    self._report.saved(self._trainer.save())
            else:
                p.validations_since += 1
        if self._due(c.save_every):
            self._report.saved(self._trainer.save(numbered=p.iteration, is_current=c.keep != "best"))
        if c.early_stop is not None and p.validations_since >= c.early_stop and not is_last:
            self._report.note(
                f"Stopped early: {p.validations_since} validations in turn were no better than iteration "
                f"{p.best_iteration} (loss {p.best_loss:.3f})"
            )
            return True
        return False

    def _due(self, every: int) -> bool:
        return self.progress.iteration // every > self.progress.previous // every

    def _validate(self, before_any_step: bool = False) -> float:
        begin, c = time.perf_counter(), self._config
        loss = self._trainer.evaluate(self._valid, c.val_batches, None if before_any_step else self.stop)
        self._report.validated(
            {"iteration": self.progress.iteration, "val_loss": loss, "val_time": time.perf_counter() - begin}
        )
        return loss

    def _stop(self) -> bool:
        p = self.progress
        self._write_checkpoint()
        self.checkpoints.wait()
        why = f"--max-time {self._config.max_time} is over" if self.stop.signal is None else "Interrupted"
        p.stopped = f"{why} after iteration {p.iteration}. To go on: the same command with --resume"
        if self.stop.signal is None:
            self._report.note(p.stopped)
        return True

    def _refuse(self, loss: float, micro_batches, gradients) -> None:
        """Loss or gradients are not finite: say where, and raise unless such steps are skipped."""
        p, c = self.progress, self._config
        where = self._model.first_not_finite(micro_batches) or _first_gradient(gradients)
        what = f"the loss is {loss}" if not math.isfinite(loss) else "gradients are not finite"
        said = f"{what} at iteration {p.iteration + 1}" + (f", first in {where}" if where else "")
        if c.on_nan == "skip":
            self._report.note(f"Warning: {said}. The step is skipped")
            return
        helps = "Lower --learning-rate, or check the weights for NaN"
        if "float16" == str(self._model.engine.compute_dtype).rsplit(".", 1)[-1]:
            helps = (
                "float16 overflows above 65504: --compute-dtype bfloat16 or float32 helps. Else lower --learning-rate"
            )
        raise SlowftError(f"{said}; nothing was saved since the last checkpoint. {helps}")

    # --- Checkpoints --------------------------------------------------------------------------------

    def _write_checkpoint(self) -> None:
        _check_finite(self._model)
        permutation, at = self._order
        _, keys, position, has_gauss, gauss = self._random_state
        arrays = {f"adapter.{name}": array for name, array in tree_flatten(self._model.trainable_parameters())}
        arrays |= {f"optimizer.{name}": array for name, array in tree_flatten(self._optimizer.state)}
        arrays |= {"random": mx.array(keys), "permutation": mx.array(permutation.astype(np.int64))}
        window = [self._window.iterations, self._window.tokens, self._window.loss_sum, self._window.seconds]
        state = {
            "identity": self._identity,
            "progress": asdict(self.progress),
            "cuts": self._model.cuts,
            "step": self._model.step,
            "at": at,
            "random": [position, has_gauss, gauss],
            "window": window,
        }
        self.checkpoints.write(self.progress.iteration, arrays, state)

    def _go_on_from(self, found: Checkpoint) -> None:
        arrays, state = found.arrays, found.state

        def of(prefix: str) -> list[tuple[str, mx.array]]:
            return [(name.removeprefix(prefix), a) for name, a in arrays.items() if name.startswith(prefix)]

        expected = {name: (a.shape, a.dtype) for name, a in tree_flatten(self._model.trainable_parameters())}
        if {name: (a.shape, a.dtype) for name, a in of("adapter.")} != expected:
            raise AdapterError(f"{found.file} holds another adapter: other layers, rank or dtype than are trained now")
        self._model.update(tree_unflatten(of("adapter.")))
        self._optimizer.state = tree_unflatten(of("optimizer."))
        position, has_gauss, gauss = state["random"]
        np.random.set_state(("MT19937", np.array(arrays["random"]), position, has_gauss, gauss))
        self._batches.permutation, self._batches.at = np.array(arrays["permutation"]), state["at"]
        self._model.step = state["step"]
        self.progress = Progress(**state["progress"])
        self._trainer.trained_tokens, self._began_at = self.progress.trained_tokens, self.progress.iteration
        w = self._window
        w.iterations, w.tokens, w.loss_sum, w.seconds = state["window"]
        self._report.note(f"Going on after iteration {self.progress.iteration}, from {found.file}")

    # --- What it says -------------------------------------------------------------------------------

    def status(self, state: str, **fields: Any) -> None:
        """Write the run's status beside its adapter."""
        p, c, total = self.progress, self._config, self._model.stats.total
        done, seconds = p.iteration - self._began_at, time.perf_counter() - self._begin_s
        left = seconds / done * (c.iters - p.iteration) if done else None
        self._status.write(
            state,
            iteration=p.iteration,
            iters=c.iters,
            train_loss=p.train_loss,
            valid_loss=p.valid_loss,
            best_iteration=p.best_iteration,
            iterations_per_second=done / seconds,
            seconds_left=left if state == "running" else None,
            memory_nbytes=platform.memory_in_use(),
            peak_nbytes=total.peak_memory,
            read_nbytes=total.bytes_read,
            written_nbytes=total.bytes_written,
            **fields,
        )

    def _say_how_it_went(self) -> None:
        model, p, step_s = self._model, self.progress, self._step_s
        if self._config.keep == "best" and p.best_iteration is not None:
            self._report.note(
                f"adapters.safetensors is of iteration {p.best_iteration}, whose validation loss was the lowest "
                f"({p.best_loss:.3f})"
            )
        if p.skipped_steps:
            self._report.note(f"Warning: {p.skipped_steps} steps were skipped: loss or gradients were not finite")
        if (plan := model.followed_plan) is not None and len(step_s) > STEPS_TO_LEARN_FROM:
            median = sorted(step_s[STEPS_TO_LEARN_FROM:])[(len(step_s) - STEPS_TO_LEARN_FROM) // 2]
            peak, planned, given = (n / 1e9 for n in (model.stats.total.peak_memory, plan.peak_nbytes, model.memory))
            self._report.note(
                f"A step took {median:.3g} s, and the process {peak:.2f} GB at most; planned were "
                f"{plan.step_s:.3g} s and {planned:.2f} GB, within {given:.2f} GB"
            )


@dataclass
class Progress:
    """Where a run is. The last step began at iteration `previous`; `losses` are [iteration, loss, tokens]."""

    iteration: int = 0
    previous: int = 0
    trained_tokens: int = 0
    skipped_steps: int = 0
    train_loss: float | None = None
    valid_loss_before: float | None = None
    valid_loss: float | None = None
    best_loss: float | None = None
    best_iteration: int | None = None
    validations_since: int = 0
    stopped: str | None = None
    losses: list[list[float]] = field(default_factory=list)


class StopAsked(Exception):  # noqa: N818  (no error)
    """Raised out of an evaluation, when a stop is asked for."""


def _norm(gradients) -> float:
    """Not finite if any gradient is not."""
    return sum(mx.abs(gradient.astype(mx.float32)).max() for _, gradient in tree_flatten(gradients)).item()


def _check_finite(model) -> None:
    for name, array in tree_flatten(model.trainable_parameters()):
        if not mx.isfinite(array).all().item():  # the last update's doing: no loss has seen it yet
            raise SlowftError(f"{name} is no longer finite, so the adapter is not saved. Lower --learning-rate")


def _first_gradient(gradients) -> str | None:
    """The first gradient that the backward pass came to, the last in the model, that is not finite."""
    names = [name for name, gradient in tree_flatten(gradients) if not mx.isfinite(gradient).all().item()]
    return f"the gradient of {names[-1]}" if names else None


class _Window:
    """What happened since the last report."""

    def __init__(self, model):
        self._model, self._begin = model, model.stats.total
        self.iterations = self.tokens = 0
        self.loss_sum = self.seconds = 0.0

    def add(self, iterations: int, loss: float, tokens: int, seconds: float) -> None:
        self.iterations += iterations
        self.tokens += tokens
        self.loss_sum += loss * tokens
        self.seconds += seconds

    def summary(self, iteration: int, learning_rate: float, trained_tokens: int) -> dict[str, Any]:
        now = self._model.stats.total
        return {
            "iteration": iteration,
            "train_loss": self.loss_sum / self.tokens,
            "learning_rate": learning_rate,
            "iterations_per_second": self.iterations / self.seconds,
            "tokens_per_second": self.tokens / self.seconds,
            "trained_tokens": trained_tokens,
            "read_gb": (now.bytes_read - self._begin.bytes_read) / 1e9,
            "wait_share": (now.wait_s - self._begin.wait_s) / self.seconds,
            "memory_gb": platform.memory_in_use() / 1e9,
            "peak_memory": now.peak_memory / 1e9,
        }


def check_writable(directory: Path) -> None:
    """Raises AdapterError unless files can be written to `directory`. Leaves nothing behind, not even the directory."""
    directory = directory.expanduser()
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
        for path in missing:
            path.rmdir()
    except OSError as e:
        raise AdapterError(f"--adapter-path {directory} cannot be written: {e.strerror}. Choose another") from None
