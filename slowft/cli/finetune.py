"""`slowft finetune`: the options of `mlx_lm.lora`, and a few of our own."""

import sys
import warnings
from contextlib import contextmanager
from dataclasses import fields

import click

from ..errors import Interrupted, SlowftError, SlowftWarning
from ..reports.base import Report
from ..training.config import NEEDLESS, OPTIMIZERS, TrainConfig, load_config
from .options import awake

_HELP = {f.name: f.metadata.get("help", "") for f in fields(TrainConfig)}
_DEFAULT = {
    f.name: f.default
    for f in fields(TrainConfig)
    if not isinstance(f.default, bool) and isinstance(f.default, (int, float, str))
}


def option(name: str, **kwargs):
    """An option of TrainConfig: unset is None, so that the YAML file's value counts."""
    default = f" [default: {_DEFAULT[name]}]" if name in _DEFAULT else ""
    return click.option(f"--{name.replace('_', '-')}", help=_HELP[name] + default, default=None, **kwargs)


@click.command()
@option("model")
@option("data")
@option("adapter_path")
@option("iters", type=int)
@option("batch_size", type=int)
@option("grad_accumulation_steps", type=int)
@option("learning_rate", type=float)
@option("num_layers", type=int)
@option("max_seq_length", type=int)
@option("mask_prompt", is_flag=True)
@option("train_on", type=click.Choice(["assistant"]))
@option("valid_split", type=float)
@option("skip_bad_samples", is_flag=True)
@option("group_by_length", is_flag=True)
@option("fine_tune_type", type=click.Choice(["lora", "dora", "full"]))
@option("optimizer", type=click.Choice(OPTIMIZERS))
@option("steps_per_report", type=int)
@option("steps_per_eval", type=int)
@option("val_batches", type=int)
@option("save_every", type=int)
@option("resume_adapter_file")
@option("resume", is_flag=True)
@option("resume_anyway", is_flag=True)
@option("keep_checkpoints", type=int)
@option("keep", type=click.Choice(["best"]))
@option("early_stop", type=int)
@option("max_time")
@option("max_grad_norm", type=float)
@option("teacher_cache", metavar="DIR")
@option("distil_weight", type=float)
@option("distil_temperature", type=float)
@option("on_nan", type=click.Choice(["stop", "skip"]))
@option("gentle", is_flag=True)
@option("train", is_flag=True)
@option("test", is_flag=True)
@option("test_batches", type=int)
@option("seed", type=int)
@option("memory")
@option("dry_run", is_flag=True)
@option("spill_dir")
@option("activation_cache", metavar="DIR|off")
@option("activation_cache_size")
@option("compute_dtype", type=click.Choice(["float32", "float16", "bfloat16", "native"]))
@option("trace")
@option("report_to")
@option("project_name")
@option("trust_remote_code", is_flag=True)
@option("chat_template", metavar="FILE")
@click.option("-c", "--config", metavar="FILE.yaml", help="YAML file of options; one written for mlx_lm.lora works.")
@click.option("--grad-checkpoint", is_flag=True, help="Accepted for mlx_lm.lora: blocks are always recomputed.")
@click.option("--clear-cache-threshold", hidden=True)
@click.option("--lora-layers", type=int, hidden=True)  # this and the next two: what older versions of mlx-lm have
@click.option("--use-dora", is_flag=True, default=None, hidden=True)
@click.option("--wandb", hidden=True)
@click.option("--json", "as_json", is_flag=True, help="Metrics as JSON lines on standard output, nothing else.")
@awake
def finetune(config, grad_checkpoint, clear_cache_threshold, as_json, **options):
    """Train a LoRA or DoRA adapter, the base model streamed block by block from disk.

    DATA is a folder with train.jsonl and, better, valid.jsonl: lines of {"text": ...}, {"prompt": ...,
    "completion": ...} or {"messages": [...]}; or a file, or a folder of text files. `slowft data` shows what will be
    trained on, and docs/data.md says what is read and how. The adapter goes to --adapter-path, where mlx_lm.generate
    --adapter-path finds it.

    Started by mlx.launch on several machines, each takes its share of every batch's rows (README, "Several Macs").

    Example:

        slowft finetune --model Qwen/Qwen3-0.6B --data my-data --iters 200
    """
    settings, notes = load_config(config, options)
    for name, given in (("grad_checkpoint", grad_checkpoint), ("clear_cache_threshold", clear_cache_threshold)):
        if given:
            notes.append(f"--{name.replace('_', '-')} is ignored: {NEEDLESS[name]}")
    if settings.model is None:
        raise click.UsageError("no model given. Use --model with a directory or a hub id such as Qwen/Qwen3-0.6B")
    if settings.data is None and settings.hf_dataset is None:
        raise click.UsageError("no data given. Use --data with a folder that holds train.jsonl")
    from ..training.machines import of_launch
    from ..training.run import run

    machines = of_launch()
    report = make_report(as_json) if machines.rank == 0 else Report()
    for note in notes:
        report.note(note)
    try:
        with warnings_noted(report):
            run(settings, report)
    except SlowftError as e:
        if machines.speaks:
            raise
        sys.exit(128 + e.signal if isinstance(e, Interrupted) else 1)
    finally:
        report.end()


def make_report(as_json: bool):
    """JSON lines, a progress bar, or plain lines where there is no terminal."""
    from ..reports.json_lines import JsonReport
    from ..reports.terminal import BarReport, LineReport

    if as_json:
        return JsonReport()
    return BarReport() if sys.stdout.isatty() else LineReport()


@contextmanager
def warnings_noted(report):
    """Show slowft's own warnings as the report shows notes."""
    show = warnings.showwarning

    def note(message, category, *rest, **kwargs):
        if issubclass(category, SlowftWarning):
            report.note(f"Warning: {message}")
        else:
            show(message, category, *rest, **kwargs)

    with warnings.catch_warnings():
        warnings.simplefilter("always", SlowftWarning)  # whatever PYTHONWARNINGS says
        warnings.showwarning = note
        yield
