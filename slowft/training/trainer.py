"""Trains an adapter: batches, steps, evaluation, saving, reports. Knows nothing of blocks or of files of weights.

Batches have mlx-lm's order and padding, and adapters its initialisation. So in float32, without dropout and
accumulation, a run ends with the same adapter, bit for bit, that `mlx_lm.lora` trains.
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
        model: from `slowft.open_model`. If it has no adapter, one is attached as `config` says.
        config: a `TrainConfig`.
        report: is called with what happens; by default nothing is shown. With several machines, only the first's is.

    Attributes:
        machines: the machines that train together. Each takes its own rows of every batch.
        rows: rows of a batch that this machine takes.
        lessons: what a teacher gave for the training data, if the config names its cache.
        caching: whether and where activations are stored between epochs; None before that is decided.
        checkpoint: the checkpoint that this run goes on from; None if it begins anew.
        pruning: rules by which the data's prompts were pruned. They are saved with the adapter.
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
            c = self.config
            values = (d if v is None else v for v, d in zip((c.distil_weight, c.distil_temperature), DISTIL))
            self.lessons = Lessons(TeacherCache(c.teacher_cache), *values, model.n_logits)
        self.trained_tokens = 0
        self.caching: Caching | None = None
        self.checkpoint: Checkpoint | None = None
        self.pruning = [] if self.config.data is None else pruning.load(self.config.data)

    def attach(self) -> None:
        """Attach the adapter that the config asks for, initialised from its seed, if none is attached."""
        c = self.config
        if not self.model.has_adapter:
            mx.random.seed(c.seed)
            self.model.add_lora(c.num_layers, use_dora=c.fine_tune_type == "dora", **c.lora_parameters)
        if c.resume_adapter_file is not None:
            self.model.load_adapter(c.resume_adapter_file)

    def plan(self, *datasets: Samples | None, memory: str | int | None = None, follow: bool = True):
        """The plan for steps on these datasets (see `StreamedModel.plan`).

        Args:
            memory: the ceiling; None means the one that the model was opened with.
            follow: the steps follow this plan.
        Raises:
            ConfigError: the ceiling is too low; names the lowest that is enough.
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
        """Have the model store activations between epochs, if the config says so or, by default, if that saves time.

        Args:
            plan: the plan of the steps. Without one, only the config decides.
            datasets: the training set comes first.
            use: False decides without storing anything.
        Raises:
            ConfigError: the config names a directory that cannot be used, or this model cannot store activations.
        """
        caching = self._plan_caching(plan, as_datasets(*datasets))
        if use and caching.directory is not None:
            try:
                self.model.cache_activations(caching.directory, self.config.activation_cache_size)
            except SlowftError as e:
                if self.config.activation_cache is not None:
                    raise
                caching = replace(caching, directory=None, reason=str(e))
        self.caching = caching
        return caching

    def _plan_caching(self, plan, datasets: list[TokenDataset | None]) -> Caching:
        c = self.config
        caching = Caching(reason="there is no plan of the steps")
        if plan is not None:
            n_batches = len(datasets[0]) // c.batch_size if datasets[0] is not None and c.train else 0
            first_epoch, later_epochs = min(c.iters, n_batches), max(c.iters - n_batches, 0) if n_batches else 0
            n = c.grad_accumulation_steps
            caching = self.model.plan_caching(plan, first_epoch / n, later_epochs / n)
            per_token = plan.job.hidden_nbytes / (plan.job.rows * plan.job.tokens)
            caching = replace(caching, nbytes=int(per_token * sum(map(self._padded_tokens, datasets))))
        if c.activation_cache == "off":
            caching = replace(caching, reason="--activation-cache is off")
        elif c.activation_cache is not None:
            caching = replace(caching, reason=None, directory=Path(c.activation_cache).expanduser())
            if (reason := self.model.why_no_activation_cache()) is not None:
                raise ConfigError(f"--activation-cache {c.activation_cache} has no use here: {reason}")
        elif caching.reason is None:
            directory = usual_activation_cache()
            size = c.activation_cache_size
            limit = ActivationCache.usual_limit(directory) if size is None else parse_nbytes(size)
            full = f"{caching.nbytes / 1e9:.2f} GB would not fit into the {limit / 1e9:.2f} GB it may take on disk"
            caching = replace(caching, reason=full) if caching.nbytes > limit else replace(caching, directory=directory)
        return caching

    def _padded_tokens(self, dataset: TokenDataset | None) -> int:
        """Number of tokens of all batches of a dataset together, with mlx-lm's padding."""
        if dataset is None or not len(dataset):
            return 0
        c = self.config
        longest = dataset.lengths[self.order(dataset)].max(axis=1)
        return sum(self.rows * padded_tokens(int(length), c.max_seq_length) for length in longest)

    def agree(self, *datasets: Samples | None) -> None:
        """Check that all machines have the same model, data, options and initial adapter.

        Raises:
            ConfigError: a machine differs from the first; names the machine and what differs.
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
            if "adapter" in differ and len(differ) > 1:  # the others are the cause
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

    def find_checkpoint(self, train: Samples, valid: Samples | None = None) -> None:
        """With `resume`: find the checkpoint to go on from, and have the model cut its work as that run did.

        Raises:
            AdapterError: there is no checkpoint that is whole.
            ConfigError: model, data or options have changed since, and `resume_anyway` is not set.
        """
        c = self.config
        if not c.resume or self.checkpoint is not None:
            return
        train, valid = as_datasets(train, valid)
        checkpoint, problems = self._newest(now := self.identity(train, valid))
        for problem in problems:
            self.report.note(f"Warning: {problem}")
        if checkpoint is None and problems:
            raise AdapterError(f"--resume: no checkpoint in {self.directory / DIRECTORY} can be read: {problems[0]}")
        if checkpoint is None:
            raise AdapterError(f"--resume: {self.directory / DIRECTORY} has no checkpoint. Leave --resume out to begin")
        then = {"machines": 1} | checkpoint.state["identity"]
        changed = [name for name in ("model", "data") if now[name] != then[name]]
        if now["machines"] != then["machines"]:
            changed.append(f"number of machines ({then['machines']}, now {now['machines']})")
        options = {name: (then["options"].get(name), value) for name, value in now["options"].items()}
        changed += [f"{name} ({old!r}, now {new!r})" for name, (old, new) in options.items() if old != new]
        if changed and not c.resume_anyway:
            raise ConfigError(
                f"--resume: the run in {self.directory} had another {', another '.join(changed)}. Give what it had, "
                "or --resume-anyway"
            )
        if now["software"] != then["software"]:
            self.report.note("Warning: MLX, mlx-lm or the BLAS are not those of the run so far: last bits may differ")
        cuts = checkpoint.state["cuts"]
        if isinstance(cuts, list):  # one entry per machine
            cuts = cuts[self.machines.rank if self.machines.rank < len(cuts) else 0]
        self.model.keep_cuts(cuts)
        self.checkpoint = checkpoint

    def _newest(self, identity: dict[str, Any]) -> tuple[Checkpoint | None, list[str]]:
        """As `Checkpoints.newest`, over all machines. The one that has the newest checkpoint sends it to the others.

        It need not be the first machine: if that was lost, another one wrote the last checkpoint.
        """
        checkpoint, problems = Checkpoints(self.directory, self.config.keep_checkpoints).newest()
        own = None
        if checkpoint is not None:
            state = checkpoint.state
            own = [state["identity"] == identity, state["progress"]["iteration"], checkpoint.digest]
        every = self.machines.gather(own)
        ranks = [rank for rank, one in enumerate(every) if one is not None]
        if not ranks:
            return None, problems
        source = max(
            ranks, key=lambda rank: (*every[rank][:2], -rank)
        )  # checkpoints of this run before those of others
        if all(one is not None and one[2] == every[source][2] for one in every):
            return checkpoint, problems
        data = self.machines.send(source, checkpoint.file.read_bytes() if source == self.machines.rank else None)
        if source == self.machines.rank:
            return checkpoint, problems
        iteration = every[source][1]
        return parse(data, Path(f"the checkpoint of iteration {iteration} of machine {source + 1}")), problems

    def fit(self, train: Samples, valid: Samples | None = None) -> dict[str, Any]:
        """Train for `config.iters` micro-batches; evaluate before, between and after; save as configured.

        Args:
            train, valid: sequences of (tokens, prompt offset), as `load_data` gives them.
        Returns:
            {"train_loss": the last report's, "valid_loss_before", "valid_loss": None without `valid`}. If the run ended
            before the last step, "stopped" says why.
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
        self.find_checkpoint(train, valid)
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
        """Model, data, options, software and number of machines: what must not change when the run goes on."""
        import mlx_lm

        options = {k: v for k, v in asdict(self.config).items() if k not in OPERATIONAL}
        data = [train.fingerprint(), None if valid is None or not len(valid) else valid.fingerprint()]
        data += [] if self.lessons is None else [self.lessons.cache.fingerprint]
        software = [mx.__version__, mlx_lm.__version__, platform.blas_description(), str(mx.default_device())]
        identity = {"model": self.model.fingerprint(), "data": data, "options": options, "software": software}
        identity["machines"] = self.machines.size
        return json.loads(json.dumps(identity))  # as a checkpoint stores it: tuples become lists

    def note_schedule(self) -> None:
        """Note if the run ends before the learning rate's schedule does. `fit` calls this; a dry run has to."""
        if self.config.train and (note := self.config.schedule_note()) is not None:
            self.report.note(note)

    def save(self, numbered: int | None = None, is_current: bool = True) -> Path:
        """Write the adapter with this run's configuration, on the first machine. Returns the (numbered) file.

        Args:
            numbered: also write a copy with this number in its name.
            is_current: False leaves adapters.safetensors as it is.

        Raises:
            SlowftError: the adapter is not finite, or cannot be written. What was saved before stays as it is.
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
        """Mean loss per token over `num_batches` batches (-1 for all), as mlx-lm's `evaluate` counts it.

        Args:
            stop: is looked at after each batch, on all machines.
            only_signals: ignore the time limit of `stop`.
        Raises:
            StopAsked: `stop` of one machine asks to end.
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
        """This machine's samples of each batch, `[batches, rows]`: of n machines, each takes every n-th sample."""
        order = batch_order(dataset, self.config.batch_size, self.config.seed if self.config.group_by_length else None)
        return order[:, self.machines.rank :: self.machines.size]


def rows_of(config: TrainConfig, machines: Machines) -> int:
    """The rows of a batch that one machine takes.

    Raises:
        ConfigError: the rows cannot be shared evenly.
    """
    rows, remainder = divmod(config.batch_size, machines.size)
    if remainder:
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
