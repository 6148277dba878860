"""Fits an adapter: batches, steps, evaluation, saving, reports. Knows nothing of blocks or files of weights.

Batches come in mlx-lm's order and padding, initial adapters from its own initialisation:
in float32, without dropout and accumulation, a run ends with the very adapter `mlx_lm.lora` trains.
"""

import math
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from .. import platform
from ..data.batches import batch_order, iterate, padded_tokens
from ..data.datasets import check_size
from ..data.store import Samples, TokenDataset, as_datasets
from ..engine.budget import STEPS_TO_LEARN_FROM
from ..engine.model import parse_nbytes, usual_activation_cache
from ..errors import AdapterError, ConfigError, DataError, SlowftError
from ..planning.caching import Caching
from ..reports.base import Report
from ..weights.activation_cache import ActivationCache
from .config import OPTIMIZER_COPIES, TrainConfig


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

    def fit(self, train: Samples, valid: Samples | None = None) -> dict[str, Any]:
        """Train for `config.iters` micro-batches; evaluate before, between and after; save as configured.

        Args:
            train, valid: sequences of (tokens, prompt offset), as `load_data` gives them.
        Returns:
            {"train_loss": of the last report, "valid_loss_before", "valid_loss": None without valid}.
        Raises:
            SlowftError: the data is too small, the loss is not finite, or the adapter cannot be written.
        """
        c, model = self.config, self.model
        train, valid = as_datasets(train, valid)
        if not len(train):
            raise DataError("the training set is empty or missing. Put samples into train.jsonl")
        check_size(train, c.batch_size, "training")
        check_size(valid if valid is not None else [], c.batch_size, "validation")
        check_writable(Path(c.adapter_path))
        optimizer = c.build_optimizer()
        self.attach()
        plan = self.plan(train, valid) if model.memory is not None else None
        if self.caching is None:
            self.cache_activations(plan, train, valid)
        model.seed = c.seed
        np.random.seed(c.seed)
        batches = self._batches(train, loop=True)
        self.note_schedule()
        self.report.begin(c, model)
        result: dict[str, Any] = {"train_loss": None, "valid_loss_before": None, "valid_loss": None}
        window = _Window(model)
        iteration, step_s = 0, []
        while iteration < c.iters:
            n = min(c.grad_accumulation_steps, c.iters - iteration)
            micro_batches = [next(batches) for _ in range(n)]
            if iteration == 0 and valid is not None and len(valid):
                result["valid_loss_before"] = result["valid_loss"] = self._validate(valid, 0)
                window = _Window(model)
            model.train()
            begin = time.perf_counter()
            (loss, n_tokens), gradients = model.loss_and_grads(micro_batches)
            if not math.isfinite(loss.item()):
                raise SlowftError(
                    f"the loss is {loss.item()} at iteration {iteration + 1}; nothing was saved since the last "
                    "checkpoint. Lower --learning-rate, or check the weights for NaN"
                )
            optimizer.update(model, gradients)
            mx.eval(model.trainable_parameters(), optimizer.state)
            previous, iteration = iteration, iteration + n
            self.trained_tokens += n_tokens.item()
            step_s.append(time.perf_counter() - begin)
            window.add(n, loss.item(), n_tokens.item(), step_s[-1])
            self.report.advance(n, loss.item(), model)

            def due(every: int) -> bool:
                return iteration // every > previous // every  # noqa: B023

            if due(c.steps_per_report) or iteration == c.iters:
                info = window.summary(iteration, optimizer.learning_rate.item(), self.trained_tokens)
                result["train_loss"] = info["train_loss"]
                self.report.trained(info)
                window = _Window(model)
            if valid is not None and len(valid) and (due(c.steps_per_eval) or iteration == c.iters):
                result["valid_loss"] = self._validate(valid, iteration)
            if due(c.save_every):
                self.report.saved(self.save(numbered=iteration))
        self.report.saved(self.save())
        if (plan := model.followed_plan) is not None and len(step_s) > STEPS_TO_LEARN_FROM:
            median = sorted(step_s[STEPS_TO_LEARN_FROM:])[(len(step_s) - STEPS_TO_LEARN_FROM) // 2]
            peak, planned, given = (n / 1e9 for n in (model.stats.total.peak_memory, plan.peak_nbytes, model.memory))
            self.report.note(
                f"A step took {median:.3g} s, and the process {peak:.2f} GB at most; planned were "
                f"{plan.step_s:.3g} s and {planned:.2f} GB, within {given:.2f} GB"
            )
        self.report.end()
        return result

    def note_schedule(self) -> None:
        """Report that the run is over before the learning rate's schedule, if it is. `fit` does; a dry run has to."""
        if self.config.train and (note := self.config.schedule_note()) is not None:
            self.report.note(note)

    def save(self, numbered: int | None = None) -> Path:
        """Write the adapter with this run's configuration; returns the (numbered) file.

        Raises:
            SlowftError: the adapter is not finite, or cannot be written; what was saved before stays as it is.
        """
        for name, array in tree_flatten(self.model.trainable_parameters()):
            if not mx.isfinite(array).all().item():  # the last update's doing: no loss has seen it yet
                raise SlowftError(f"{name} is no longer finite, so the adapter is not saved. Lower --learning-rate")
        config = {k: v for k, v in asdict(self.config).items() if v is not None}
        return self.model.save_adapter(self.config.adapter_path, numbered, config)

    def evaluate(self, dataset: Samples, num_batches: int = -1) -> float:
        """Mean loss per token over `num_batches` batches (-1: all), as mlx-lm's `evaluate` counts it."""
        self.model.eval()
        (dataset,) = as_datasets(dataset)
        total, tokens = 0.0, 0
        n_batches = len(dataset) // self.config.batch_size
        n_batches = n_batches if num_batches == -1 else min(n_batches, num_batches)
        with self.report.evaluating(n_batches) as done:
            for _, (batch, lengths) in zip(range(n_batches), self._batches(dataset)):
                loss, n = self.model.loss(batch, lengths)
                total += loss.item() * n.item()
                tokens += n.item()
                done()
        return total / tokens

    def _validate(self, valid: TokenDataset, iteration: int) -> float:
        begin = time.perf_counter()
        loss = self.evaluate(valid, self.config.val_batches)
        self.report.validated({"iteration": iteration, "val_loss": loss, "val_time": time.perf_counter() - begin})
        return loss

    def _order(self, dataset: TokenDataset) -> np.ndarray:
        return batch_order(dataset, self.config.batch_size, self.config.seed if self.config.group_by_length else None)

    def _batches(self, dataset: TokenDataset, loop: bool = False):
        return iterate(dataset, self._order(dataset), self.config.max_seq_length, loop)


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
