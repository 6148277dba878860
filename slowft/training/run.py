"""Does a whole run as its config says: open, check, train, test. This is what `slowft finetune` does.

Comes in: a config. Goes out: the result, and an adapter on disk. Checks are made in the order of their cost: options,
model, adapter, data, weights.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict
from pathlib import Path

from .. import platform
from ..data.batches import Lessons
from ..data.datasets import check_size, load_data, no_training_samples
from ..data.tokenizer import load_tokenizer
from ..engine.budget import default_memory
from ..engine.model import open_model, parse_nbytes
from ..errors import AdapterError, ConfigError, DataError, SlowftError
from ..reports.base import Report, Reports
from ..reports.json_lines import CallbackReport
from ..weights.transfers import check_directory
from .checkpoint import DIRECTORY as CHECKPOINTS
from .config import TrainConfig
from .machines import Machines, of_launch
from .trainer import Trainer, check_writable, rows_of


def run(config: TrainConfig, report: Report) -> dict:
    """Train and test.

    Returns:
        What `Trainer.fit` returns, with test_loss and test_ppl if the config asks for a test. Empty after a dry run.
    Raises:
        SlowftError: something that the user can put right; the message is one line.
    """
    with of_launch().failing():
        return _run(config, report)


def _run(config: TrainConfig, report: Report) -> dict:
    machines = of_launch()
    if machines.rank:
        report = Report()
    config.check()
    config.build_optimizer()
    rows_of(config, machines)
    if config.train:
        machines.in_turn(lambda: check_writable(Path(config.adapter_path)))
    if config.gentle:
        platform.be_gentle()
    if config.activation_cache_size is not None:
        parse_nbytes(config.activation_cache_size, "a size to store activations in")
    if config.activation_cache not in (None, "off"):
        check_directory("--activation-cache", Path(config.activation_cache).expanduser())
    if config.trace:
        file = Path(config.trace).expanduser()
        check_directory("--trace", file.parent)
        if file.is_dir() or not file.parent.is_dir():
            raise ConfigError(f"--trace {file}: no file can be written there. Give a file in a directory that is there")
    if config.memory is not None:
        parse_nbytes(config.memory)
    model = open_model(  # without a ceiling: the plan of the steps sets it, or tells what they need at least
        config.model,
        compute_dtype=config.compute_dtype,
        spill_dir=config.spill_dir,
        trust_remote_code=config.trust_remote_code,
    )
    try:
        return _train_and_test(model, config, report, machines)
    finally:
        model.close()


def _train_and_test(model, config: TrainConfig, report: Report, machines: Machines) -> dict:
    if machines.size > 1:
        report.joined(machines.size, config.batch_size // machines.size)
    reports = report
    if config.report_to and machines.rank == 0:
        reports = Reports(report, CallbackReport(_callback(config)))
    trainer = Trainer(model, config, reports)
    if config.train:
        trainer.attach()
    else:
        _load_adapter_to_test(model, config, report)
    for note in model.adapter_notes:
        report.note(note)
    train, valid, test = _load_data(model, config, report, trainer.lessons)
    trainer.agree(train, valid, test)
    if config.train:
        trainer.find_checkpoint(train, valid)
    memory = default_memory() if config.memory is None else config.memory
    plan = trainer.plan(train, valid, test, memory=memory, follow=not config.dry_run)
    caching = trainer.cache_activations(plan, train, valid, use=not config.dry_run)
    note = " (half of this machine's memory; --memory sets it)" if config.memory is None else ""
    report.planned(plan, note, caching)
    if config.train:
        _note_what_is_replaced(config, report)
    if config.dry_run:
        trainer.note_schedule()
        return {}
    if config.train and trainer.pruning:
        report.note(f"The prompts were pruned by {len(trainer.pruning)} rules, which go with the adapter")
    is_traced, is_written = config.trace and machines.rank == 0, config.train and machines.rank == 0
    with (
        _alone_in(Path(config.adapter_path).expanduser()) if is_written else nullcontext(),
        model.trace(config.trace) if is_traced else nullcontext(),
    ):
        result = trainer.fit(train, valid) if config.train else {}
        if config.test:
            result |= _test(trainer, test)
            reports.tested({key: result[key] for key in ("test_loss", "test_ppl")})
    return result


@contextmanager
def _alone_in(directory: Path) -> Iterator[None]:
    """Raises AdapterError while another run writes there: each would take the other's files for its own."""
    with suppress(OSError):  # whoever writes there says why it cannot
        directory.mkdir(parents=True, exist_ok=True)
    with platform.alone_in(directory) as is_alone:
        if not is_alone:
            raise AdapterError(
                f"another run is writing to {directory} (slowft status {directory}). Wait for it, stop it, or give "
                "another --adapter-path"
            )
        yield


def _note_what_is_replaced(config: TrainConfig, report: Report) -> None:
    directory = Path(config.adapter_path).expanduser()
    if config.resume or config.dry_run:
        return
    if (directory / "adapters.safetensors").exists():
        what = "the adapter of an earlier run"
    elif any((directory / CHECKPOINTS).glob("*.safetensors")):
        what = "the checkpoints of an earlier run"
    else:
        return
    report.note(
        f"{directory} has {what}, which this one will replace. --adapter-path names another directory, --resume goes "
        "on with that run"
    )


def _load_adapter_to_test(model, config: TrainConfig, report: Report) -> None:
    directory = Path(config.adapter_path).expanduser()
    if config.adapter_path == "":  # mlx_lm.lora's way to ask for the base model
        report.note("No --adapter-path: testing the base model")
    elif directory.exists():
        model.load_adapter(directory)
    elif config.adapter_path == TrainConfig.adapter_path:  # the user named none
        report.note(f"No adapter in {directory}: testing the base model")
    else:
        raise AdapterError(
            f"{directory} does not exist, and --test alone trains nothing. Add --train, or leave --adapter-path out to "
            "test the base model"
        )


def _load_data(model, config: TrainConfig, report: Report, lessons: Lessons | None):
    tokenizer = load_tokenizer(model.path, model.embedding_rows, config.trust_remote_code, config.chat_template)
    if lessons is not None:
        lessons.cache.check_vocabulary(tokenizer.get_vocab(), model.path)
    splits = (["train", "valid"] if config.train else []) + (["test"] if config.test else [])
    train, valid, test = load_data(config.data, tokenizer, config, splits, model.embedding_rows, report.progress)
    if config.train and not len(train):
        raise no_training_samples(config.data)
    for option, value in (("--keep best", config.keep), ("--early-stop", config.early_stop)):
        if config.train and value is not None and not len(valid):
            report.note(f"Warning: {option} has no effect without a validation set: --valid-split 0.05 makes one")
    if lessons is not None:
        lessons.cache.check_samples(train)
        report.note(
            f"The teacher's {lessons.cache.top_k} most probable tokens count {lessons.weight:g} in the training loss, "
            f"at temperature {lessons.temperature:g}; validation is the plain loss"
        )
    if config.test and not len(test):
        raise DataError(f"{config.data} has no test samples. Put them into test.jsonl")
    for name, data in (("training", train), ("validation", valid), ("test", test)):
        check_size(data, config.batch_size, name)
        if data.n_cut:
            report.note(
                f"Warning: {data.n_cut} of {len(data)} {name} samples are cut to {config.max_seq_length} tokens"
            )
    if config.train and not len(valid):
        report.note("Warning: no valid.jsonl, so the loss on held-back text will not be known")
    return train, valid, test


def _test(trainer: Trainer, test) -> dict[str, float]:
    loss = trainer.evaluate(test, trainer.config.test_batches)
    if not math.isfinite(loss):
        raise SlowftError(f"the loss on the test set is {loss}. Check the weights of model and adapter for NaN")
    return {"test_loss": loss, "test_ppl": math.exp(min(loss, 700))}  # e^710 is more than a float can be


def _callback(config: TrainConfig):
    from mlx_lm.tuner.callbacks import get_reporting_callbacks

    try:
        return get_reporting_callbacks(
            config.report_to, project_name=config.project_name, log_dir=config.adapter_path, config=asdict(config)
        )
    except (ImportError, ValueError) as e:
        raise ConfigError(f"--report-to {config.report_to}: {e}") from None
