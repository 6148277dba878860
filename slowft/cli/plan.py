"""`slowft plan`: what a job would take on this machine, from headers alone."""

import json
from contextlib import contextmanager
from pathlib import Path

import click

from ..errors import ConfigError


@click.command()
@click.option("--model", help="Model directory or hub id; of one that is not here only the headers are fetched.")
@click.option("--config", "config_file", type=click.Path(dir_okay=False), help="A model's config.json: needs no weights.")
@click.option("--memory", help="Ceiling for the whole process, such as 8GB [default: half of this machine's].")
@click.option("--batch-size", default=4, show_default=True, type=click.IntRange(1), help="Sequences in a micro-batch.")
@click.option("--max-seq-length", default=2048, show_default=True, type=click.IntRange(2), help="Longest sequence.")
@click.option("--grad-accumulation-steps", default=1, show_default=True, type=click.IntRange(1), help="Micro-batches a step.")
@click.option("--num-layers", default=16, show_default=True, help="Blocks to fine-tune, from the last; -1 for all.")
@click.option("--rank", default=8, show_default=True, type=click.IntRange(1), help="Of the LoRA matrices.")
@click.option("--optimizer", default="adam", show_default=True, type=click.Choice(["adam", "adamw", "muon", "sgd", "adafactor"]))
@click.option("--compute-dtype", type=click.Choice(["float32", "float16", "bfloat16", "native"]), help="As in finetune.")
@click.option("--tokens", type=click.IntRange(1), help="Tokens of the training data: adds hours and bytes written.")
@click.option("--epochs", default=1.0, show_default=True, help="Passes over them.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on standard output, bytes and seconds.")
def plan(
    model, config_file, memory, batch_size, max_seq_length, grad_accumulation_steps, num_layers, rank, optimizer,
    compute_dtype, tokens, epochs, as_json,
):  # fmt: skip
    """Say what fine-tuning a model would take here: memory, reads, seconds, and what to keep in memory.

    Reads headers only: neither weights nor data. The model need not be on this disk, nor fit it.

    Examples:

        slowft plan --model Qwen/Qwen3-0.6B --memory 2GB

        slowft plan --config config.json --memory 16GB --batch-size 1 --tokens 2000000 --epochs 3
    """
    if (model is None) == (config_file is None):
        raise click.UsageError("give a model: --model with a directory or hub id, or --config with its config.json")
    from ..engine.budget import default_memory
    from ..engine.model import open_model, parse_nbytes
    from ..reports import plan as words
    from ..training.config import OPTIMIZER_COPIES

    nbytes = default_memory() if memory is None else parse_nbytes(memory)
    with _directory(model, config_file) as directory:
        opened = open_model(directory, compute_dtype=compute_dtype)
        try:
            opened.add_lora(num_layers=num_layers, rank=rank)
            planner = opened.planner(
                batch_size, max_seq_length - 1, grad_accumulation_steps, OPTIMIZER_COPIES[optimizer]
            )
            least = planner.least()
            chosen = planner.choose(nbytes)
            if chosen is None and memory is not None and not as_json:
                raise ConfigError(planner.too_little(nbytes))
            table = [least]
            for scale in (1.5, 2.0):
                table.append(planner.choose(int(least.peak_nbytes * scale)))
            table.append(planner.most())
            about = f"{getattr(opened, 'model_type', 'model')}, {words.size(opened.nbytes_on_disk)} on disk"
            sizes = {"nbytes_on_disk": opened.nbytes_on_disk, "embedding_nbytes": opened.embedding_nbytes}
            _print(planner.machine, chosen, table, about, sizes, tokens, epochs, as_json)
        finally:
            opened.close()


@contextmanager
def _directory(model: str | None, config_file: str | None):
    from ..models.loading import find_local
    from ..models.outline import outline_of_config, outline_of_hub

    if config_file is not None:
        with outline_of_config(Path(config_file)) as directory:
            yield directory
    elif (local := find_local(model)) is not None:
        yield local
    else:
        with outline_of_hub(model) as directory:
            yield directory


def _print(machine, chosen, table, about: str, sizes: dict, tokens, epochs, as_json: bool) -> None:
    from ..reports import plan as words

    if as_json:
        from dataclasses import asdict

        result = {
            "machine": asdict(machine),
            "model": sizes,
            "plan": None if chosen is None else words.as_dict(chosen),
            "table": [words.as_dict(plan) for plan in table],
        }
        if tokens and chosen:
            result["run"] = _run(chosen, tokens, epochs)
        click.echo(json.dumps(result))
        return
    from rich.console import Console
    from rich.table import Table

    best = chosen or table[0]
    head, *rest = words.describe_job(best)
    click.echo(f"Machine  {words.describe_machine(machine)}")
    click.echo(f"Model    {about}: {head}; embedding {words.size(sizes['embedding_nbytes'])}")
    for line in rest:
        click.echo(f"Job      {line}")
    first, *rest = words.three_lines(best)
    click.echo(first if chosen else f"This machine's half is too little; the least that works: {words.choices(best)}")
    for line in rest:
        click.echo(line)
    parts = sorted(best.parts.items(), key=lambda part: -part[1])
    click.echo("  of the peak: " + ", ".join(f"{name} {words.size(nbytes)}" for name, nbytes in parts))
    if tokens:
        run = _run(best, tokens, epochs)
        click.echo(
            f"  {epochs:g} x {tokens:,} tokens: {run['steps']:,} steps, {words.duration(run['seconds'])}, "
            f"{words.size(run['read_nbytes'])} read, {words.size(run['written_nbytes'])} written to the disk"
        )
    shown = Table(title=None, box=None, pad_edge=False, header_style="bold")
    for column in ("budget", "peak", "read/step", "written/step", "step", "bound by"):
        shown.add_column(column, justify="right", no_wrap=True)
    shown.add_column("what is kept")
    names = ("least", "1.5x", "2x", "all of it")
    for name, row in zip(names, table):
        budget = row.memory or row.peak_nbytes
        shown.add_row(
            f"{name} {words.size(budget)}",
            words.size(row.peak_nbytes),
            words.size(row.read_nbytes),
            words.size(row.written_nbytes) if row.written_nbytes else "0",
            words.duration(row.step_s),
            row.bound,
            words.choices(row),
        )
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    console.print()
    console.print(shown)


def _run(plan, tokens: int, epochs: float) -> dict:
    job = plan.job
    steps = max(1, round(tokens * epochs / (job.micro_batches * job.rows * job.tokens)))
    return {
        "steps": steps,
        "seconds": steps * plan.step_s,
        "read_nbytes": steps * plan.read_nbytes,
        "written_nbytes": steps * plan.written_nbytes,
        "written_nbytes_per_hour": round(plan.written_nbytes / plan.step_s * 3600),
    }
