"""Fits an adapter: batches, steps, evaluation, saving, reports. Knows nothing of blocks or files of weights.

Batches come in mlx-lm's order and padding, initial adapters from its own initialisation:
in float32, without dropout and accumulation, a run ends with the very adapter `mlx_lm.lora` trains.
"""

import json
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from .. import platform
from ..data.batches import Lessons, batch_order, iterate, padded_tokens
from ..data.datasets import check_size
from ..data.store import Samples, TokenDataset, as_datasets
from ..data.teacher import TeacherCache
from ..engine.model import parse_nbytes, usual_activation_cache
from ..errors import AdapterError, ConfigError, DataError, Interrupted, PeerLost, SlowftError, gpu_error, reason_of
from ..planning.caching import Caching
from ..reports.base import Report
from ..requests import pruning
from ..weights.activation_cache import ActivationCache
from .checkpoint import DIRECTORY, Checkpoint, Checkpoints, check_finite, parse
from .config import DISTIL, MACHINES_OWN, OPERATIONAL, OPTIMIZER_COPIES, TrainConfig
from .fitting import Fit
from .machines import COPIES, Machines, checksum, of_launch
from .stopping import Stop, StopAsked, listening


class Trainer:
    """Trains the adapter of an opened model.

        slowft.Trainer(model, slowft.TrainConfig(iters=100)).fit(train, valid)

    Args:
        model: from `slowft.open_model`; an adapter is attached as `config` says unless it has one.
        config: a `TrainConfig`.
        report: is told what happens; by default nothing is shown. Of several machines only the first's is told.

    Attributes:
        machines: that train together, each its rows of every batch.
        lessons: of a teacher, if the config names its cache.
    """

    def __init__(self, model, config: TrainConfig | None = None, report: Report | None = None):
        self.model, self.config = model, config or TrainConfig()
        self.config.check()
        self.machines = of_launch()
        self.rows = rows_of(self.config, self.machines)
        self.report = report if report is not None and self.machines.rank == 0 else Report()
        self._have_agreed = False
        self.lessons: Lessons | None = None
        if self.config.teacher_cache is not None:
            c, usual = self.config, DISTIL
            values = (u if v is None else v for v, u in zip((c.distil_weight, c.distil_temperature), usual))
            self.lessons = Lessons(TeacherCache(c.teacher_cache), *values, model.n_logits)
        self.trained_tokens = 0
        self.caching: Caching | None = None
        self.taken_up: Checkpoint | None = None
        self.pruning = [] if self.config.data is None else pruning.load(self.config.data)  # go with the adapter

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
        self.model.budget.expect_teacher(0 if self.lessons is None else self.lessons.cache.top_k)
        copies = OPTIMIZER_COPIES[c.optimizer.lower()] + (COPIES if self.machines.size > 1 else 0)
        return self.model.plan(
            self.rows, tokens, min(c.grad_accumulation_steps, c.iters), memory, copies, follow=follow
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
            except SlowftError as e:
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
        longest = dataset.lengths[self.order(dataset)].max(axis=1)
        return sum(self.rows * padded_tokens(int(length), c.max_seq_length) for length in longest)

    def agree(self, *datasets: Samples | None) -> None:
        """Make sure that all machines are about to do the same: model, data, options, adapter to begin with.

        Raises:
            ConfigError: one is not; names it, and what differs from the first.
        """
        if self.machines.size == 1 or self._have_agreed:
            return
        self._have_agreed = True
        data = [None if d is None or not len(d) else d.fingerprint() for d in as_datasets(*datasets)]
        data += [] if self.lessons is None else [self.lessons.cache.fingerprint]
        options = {name: value for name, value in asdict(self.config).items() if name not in MACHINES_OWN}
        own = {"model": self.model.fingerprint(), "data": data, "adapter": checksum(self.model), **options}
        first, *others = self.machines.gather(json.loads(json.dumps(own)))
        for rank, other in enumerate(others, 1):
            differ = [name for name in first if other.get(name) != first[name]]
            if "adapter" in differ and len(differ) > 1:  # it follows from the others
                differ.remove("adapter")
            if differ:
                shown = [
                    name + (f" ({first[name]!r}, there {other.get(name)!r})" if name in options else "")
                    for name in differ
                ]
                raise ConfigError(
                    f"machine {rank + 1} of {self.machines.size} has another {', another '.join(shown)} than the "
                    "first. All need copies of the same files, and the same command"
                )

    def take_up(self, train: Samples, valid: Samples | None = None) -> None:
        """With `resume`: find the checkpoint to go on from, and have the model cut its work as that run did.

        Raises:
            AdapterError: there is none that is whole.
            ConfigError: model, data or options have changed since, and `resume_anyway` is not set.
        """
        c = self.config
        if not c.resume or self.taken_up is not None:
            return
        train, valid = as_datasets(train, valid)
        found, wrong = self._newest(now := self.identity(train, valid))
        for what in wrong:
            self.report.note(f"Warning: {what}")
        if found is None and wrong:
            raise AdapterError(f"--resume: no checkpoint in {self.directory / DIRECTORY} can be read: {wrong[0]}")
        if found is None:
            raise AdapterError(f"--resume: {self.directory / DIRECTORY} has no checkpoint. Leave --resume out to begin")
        then = {"machines": 1} | found.state["identity"]
        changed = [name for name in ("model", "data") if now[name] != then[name]]
        options = {name: (then["options"].get(name), value) for name, value in now["options"].items()}
        if now["machines"] != then["machines"]:
            changed.append(f"number of machines ({then['machines']}, now {now['machines']})")
        changed += [f"{name} ({old!r}, now {new!r})" for name, (old, new) in options.items() if old != new]
        if changed and not c.resume_anyway:
            raise ConfigError(
                f"--resume: the run in {self.directory} had another {', another '.join(changed)}. Give what it had, "
                "or --resume-anyway"
            )
        if now["software"] != then["software"]:
            self.report.note("Warning: MLX, mlx-lm or the BLAS are not those of the run so far: last bits may differ")
        cuts = found.state["cuts"]
        if isinstance(cuts, list):  # of each machine
            cuts = cuts[self.machines.rank if self.machines.rank < len(cuts) else 0]
        self.model.keep_cuts(cuts)
        self.taken_up = found

    def _newest(self, identity: dict[str, Any]) -> tuple[Checkpoint | None, list[str]]:
        """As `Checkpoints.newest`, over all machines: when the first is lost, another has the newest, and sends it."""
        found, wrong = Checkpoints(self.directory, self.config.keep_checkpoints).newest()
        own = None
        if found is not None:
            own = [found.state["identity"] == identity, found.state["progress"]["iteration"], found.digest]
        every = self.machines.gather(own)
        there = [rank for rank, one in enumerate(every) if one is not None]
        if not there:
            return None, wrong
        source = max(there, key=lambda rank: (*every[rank][:2], -rank))  # of another run none, if one is of this
        if all(one is not None and one[2] == every[source][2] for one in every):
            return found, wrong
        data = self.machines.send(source, found.file.read_bytes() if source == self.machines.rank else None)
        if source == self.machines.rank:
            return found, wrong
        iteration = every[source][1]
        return parse(data, Path(f"the checkpoint of iteration {iteration} of machine {source + 1}")), wrong

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
            GpuError: the GPU did not finish a step; a checkpoint of the one before was written.
        """
        c, model = self.config, self.model
        train, valid = as_datasets(train, valid)
        valid = valid if valid is not None and len(valid) else None
        if not len(train):
            raise DataError("the training set is empty or missing. Put samples into train.jsonl")
        check_size(train, c.batch_size, "training")
        check_size(valid if valid is not None else [], c.batch_size, "validation")
        if self.lessons is not None:
            self.lessons.cache.check_samples(train)
        self.machines.in_turn(lambda: check_writable(Path(c.adapter_path)))
        optimizer = c.build_optimizer()
        self.attach()
        self.agree(train, valid)
        self.take_up(train, valid)
        plan = self.plan(train, valid) if model.memory is not None else None
        if self.caching is None:
            self.cache_activations(plan, train, valid)
        run = Fit(self, optimizer, train, valid)
        self.note_schedule()
        self.report.begin(c, model)
        try:
            with self.machines.failing(), listening(run.stop, self.report.note, self.machines.size > 1):
                try:
                    result = run.go()
                except PeerLost as e:
                    raise run.save_after(e) from None
                except RuntimeError as e:
                    if (of_gpu := gpu_error(e)) is None:
                        raise
                    raise run.save_after_failure(of_gpu) from None
        except BaseException as e:
            stopped = "stopped" if isinstance(e, KeyboardInterrupt | Interrupted) else "failed"
            run.status(stopped, e if isinstance(e, PeerLost) else None, error=str(e))
            raise
        finally:
            run.checkpoints.close()
            run.journal.close()
        self.report.end()
        return result

    @property
    def directory(self) -> Path:
        return Path(self.config.adapter_path).expanduser()

    def identity(self, train: TokenDataset, valid: TokenDataset | None) -> dict[str, Any]:
        """What a run is of: what must not change when it goes on."""
        import mlx_lm

        options = {k: v for k, v in asdict(self.config).items() if k not in OPERATIONAL}
        data = [train.fingerprint(), None if valid is None or not len(valid) else valid.fingerprint()]
        data += [] if self.lessons is None else [self.lessons.cache.fingerprint]
        software = [mx.__version__, mlx_lm.__version__, platform.blas_description(), str(mx.default_device())]
        identity = {"model": self.model.fingerprint(), "data": data, "options": options, "software": software}
        identity["machines"] = self.machines.size
        return json.loads(json.dumps(identity))  # as a checkpoint has it: lists for tuples

    def note_schedule(self) -> None:
        """Report that the run is over before the learning rate's schedule, if it is. `fit` does; a dry run has to."""
        if self.config.train and (note := self.config.schedule_note()) is not None:
            self.report.note(note)

    def save(self, numbered: int | None = None, is_current: bool = True) -> Path:
        """Write the adapter with this run's configuration, on the first machine; returns the (numbered) file.

        Args:
            is_current: False leaves adapters.safetensors as it is.

        Raises:
            SlowftError: the adapter is not finite, or cannot be written; what was saved before stays as it is.
        """
        check_finite(self.model)
        if self.machines.rank:
            return self.directory
        config = {k: v for k, v in asdict(self.config).items() if v is not None}
        file = self.model.save_adapter(self.config.adapter_path, numbered, config, is_current)
        pruning.save(self.directory, self.pruning)
        return file

    def evaluate(
        self, dataset: Samples, num_batches: int = -1, stop: Stop | None = None, only_signals: bool = False
    ) -> float:
        """Mean loss per token over `num_batches` batches (-1: all), as mlx-lm's `evaluate` counts it.

        Args:
            stop: looked at after each batch, on all machines; where one asks to end, `StopAsked` is raised.
            only_signals: its time limit is not heard.
        """
        self.model.eval()
        (dataset,) = as_datasets(dataset)
        total, tokens = 0.0, 0
        n_batches = len(dataset) // self.config.batch_size
        n_batches = n_batches if num_batches == -1 else min(n_batches, num_batches)
        batches = iterate(dataset, self.order(dataset), self.config.max_seq_length)
        with self.report.evaluating(n_batches) as done:
            for _, (batch, lengths) in zip(range(n_batches), batches):
                loss, n = self.model.loss(batch, lengths)
                own = loss.item() * n.item() if n.item() or self.machines.size == 1 else 0.0
                asked = stop.asks if stop is not None else (None, False)
                asked = (asked[0], asked[1] and not only_signals)
                losses, numbers, asks = zip(*self.machines.gather((own, n.item(), asked)))
                total, tokens = total + sum(losses), tokens + sum(numbers)
                done()
                if stop is not None and stop.take(asks):
                    raise StopAsked
        return total / tokens

    def order(self, dataset: TokenDataset) -> np.ndarray:
        """The samples of each batch, `[n, rows]`, that this machine has: of several machines each takes every n-th."""
        order = batch_order(dataset, self.config.batch_size, self.config.seed if self.config.group_by_length else None)
        return order[:, self.machines.rank :: self.machines.size]


def rows_of(config: TrainConfig, machines: Machines) -> int:
    """Of a batch, the rows that one machine takes.

    Raises:
        ConfigError: they cannot be shared evenly.
    """
    rows, n = divmod(config.batch_size, machines.size)
    if n:
        raise ConfigError(
            f"--batch-size {config.batch_size}, of all machines together, cannot be shared by {machines.size}. Choose "
            f"{(rows + 1) * machines.size}" + (f" or {rows * machines.size}" if rows else "")
        )
    return rows


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
        raise AdapterError(f"--adapter-path {directory} cannot be written: {reason_of(e)}. Choose another") from None
