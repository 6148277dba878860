"""`slowft distil`: a large model makes data and teaches a small one, and a table says what it was worth."""

import json
from pathlib import Path

import click

from .finetune import make_report, option, warnings_noted
from .options import awake


@click.command()
@click.option("--teacher", help="The large model: a directory or a hub id [default: the recipe's model].")
@click.option("--student", required=True, help="The small model, of the same vocabulary.")
@click.option("--recipe", required=True, metavar="RECIPE.yaml", help="As for `slowft data make`.")
@click.option("--output", required=True, metavar="DIR", help="Folder for data, probabilities, adapters and the table.")
@click.option("--held-out", metavar="FILE", help="Rows to measure on, in place of the made test set.")
@click.option(
    "--top-k", type=click.IntRange(1), default=64, show_default=True, help="The teacher's most probable tokens."
)
@option("distil_weight", type=float)
@option("distil_temperature", type=float)
@option("iters", type=int)
@option("batch_size", type=int)
@option("learning_rate", type=float)
@option("num_layers", type=int)
@option("max_seq_length", type=int)
@option("train_on", type=click.Choice(["assistant"]))
@option("mask_prompt", is_flag=True)
@option("seed", type=int)
@option("memory")
@option("compute_dtype", type=click.Choice(["float32", "float16", "bfloat16", "native"]))
@option("trust_remote_code", is_flag=True)
@option("chat_template", metavar="FILE")
@click.option("-c", "--config", metavar="FILE.yaml", help="YAML file of options of training, as for finetune.")
@click.option("--json", "as_json", is_flag=True, help="Everything as JSON lines on standard output, nothing else.")
@awake
def distil(teacher, student, recipe, output, held_out, top_k, config, as_json, **options):
    """Make data with a large model, train a small one on it, and say what that was worth.

    The student is trained three times, with equally many steps: on the raw seeds (the documents, requests and examples
    of the recipe), on the data that the teacher made of them, and on that data with the teacher's probabilities. The
    table has the loss of each on held-back rows and, if the recipe has a judge, how often it prefers the student's
    answer to the held-back one. Given again, the command goes on where it was stopped.

    Example:

        slowft distil --teacher Qwen/Qwen3-8B --student Qwen/Qwen3-0.6B --recipe recipe.yaml --output distilled
    """
    from dataclasses import replace

    from ..errors import ConfigError
    from ..synthesis.recipe import load
    from ..training.config import load_config

    weight, temperature = options.pop("distil_weight"), options.pop("distil_temperature")
    settings, notes = load_config(config, options | {"model": student})
    for name in ("data", "teacher_cache", "resume", "test", "adapter_path"):
        if getattr(settings, name) != getattr(type(settings), name):
            raise ConfigError(f"{config}: {name} has no effect here: distil sets it itself. Leave it out")
    wanted = load(Path(recipe).expanduser())
    given = {"memory": settings.memory} if settings.memory is not None else {}
    if teacher is not None:
        directory = Path(teacher).expanduser()
        given["model"] = str(directory.resolve()) if directory.is_dir() else teacher
    wanted = replace(wanted, **given)
    from ..synthesis.distil import Distillation
    from ..training.machines import of_launch

    if of_launch().size > 1:
        raise ConfigError("distil runs on one machine. Of its steps, slowft finetune runs on several")

    report = make_report(as_json)
    for note in notes:
        report.note(note)
    held_out = None if held_out is None else Path(held_out).expanduser()
    with warnings_noted(report):
        try:
            how = held_out, top_k, weight, temperature
            result = Distillation(wanted, settings, Path(output).expanduser(), report, *how).run()
        finally:
            report.end()
    if as_json:
        click.echo(json.dumps({"event": "distilled"} | result))
    else:
        click.echo(table(result))


def table(result: dict) -> str:
    """The result in words."""
    from ..synthesis.distil import WHAT

    has_wins = any("win_rate" in found for found in result["students"].values())
    about = result["held_out"]
    rows = [(WHAT[name], found) for name, found in result["students"].items()] + [("the teacher", result["teacher"])]
    width = max(len(name) for name, _ in rows) + 2
    shown = [" " * width + f"{'held-out loss':>15}{'±':>9}" + (f"{'wins':>8}" if has_wins else "")]
    for name, found in rows:
        wins = f"{100 * found['win_rate']:>7.0f}%" if "win_rate" in found else ""
        shown.append(f"{name:<{width}}{found['loss']:>15.4f}{found['loss_stderr']:>9.4f}{wins}")
    told = f"{about['samples']} rows of {about['file']}, {about['tokens']:,} tokens; {result['iters']} iterations each"
    if has_wins:
        told += "; wins: how often the judge prefers the student's answer to the one that was held back"
    return "\n".join([*shown, told])
