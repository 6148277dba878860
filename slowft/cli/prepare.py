"""`slowft prepare`: any model into a directory that streams well, quantized if asked for."""

import json
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import click

from ..errors import ConfigError
from .finetune import warnings_noted
from .options import awake

RECIPES = ["mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6"]
DTYPES = ["float16", "bfloat16", "float32"]


@click.command()
@click.argument("model")
@click.option("--output", "--mlx-path", required=True, help="Directory to write: new, empty, or of an unfinished run.")
@click.option("-q", "--quantize", is_flag=True, help="Quantize, as mlx_lm.convert does: the same bits.")
@click.option("--bits", "--q-bits", type=int, help="Bits per weight [default: the mode's, 4 for affine].")
@click.option("--group-size", "--q-group-size", type=int, help="Weights that share a scale [default: the mode's].")
@click.option(
    "--mode",
    "--q-mode",
    default="affine",
    show_default=True,
    type=click.Choice(["affine", "mxfp4", "nvfp4", "mxfp8"]),
    help="Kind of quantization.",
)
@click.option("--quant-predicate", type=click.Choice(RECIPES), help="Recipe of mixed bits, instead of --bits.")
@click.option("--dtype", type=click.Choice(DTYPES), help="Of what is not quantized [default: the config's].")
@click.option("--memory", help="Ceiling for the whole process, such as 2GB [default: half of this machine's].")
@click.option("--trust-remote-code", is_flag=True, help="Let the model run code of its own.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on standard output, nothing else.")
@awake
def prepare(model, output, memory, trust_remote_code, as_json, **options):
    """Write a model anew so that it can be streamed: experts stacked, a file for each block, checksums.

    MODEL is a directory, a hub id, or a .gguf file. One pass, within --memory, whatever the model's size. The result
    is an ordinary mlx-lm model. A run that was cut off goes on where it was when the same command is given again;
    slowft verify checks the result against its checksums at any later time. Models whose files can be streamed as
    they are need none of this (slowft plan says which).

    Example:

        slowft prepare Qwen/Qwen3-0.6B --output qwen3-4bit --quantize --bits 4
    """
    output = Path(output)
    from ..convert.prepare import prepare as prepare_model
    from ..convert.prepare import prepare_gguf

    with writing_model("Preparing", output, as_json) as (progress, note):
        if model.lower().endswith(".gguf"):
            if memory is not None:
                raise ConfigError("--memory has no effect on a GGUF file. Leave it out")
            prepare_gguf(model, output, **options, progress=progress)
        else:
            options |= {"memory": memory, "trust_remote_code": trust_remote_code}
            prepare_model(model, output, **options, progress=progress, note=note)


@contextmanager
def writing_model(description: str, output: Path, as_json: bool):
    """While this is entered a model is written to `output`: gives (progress, note); then says what was written."""
    notes: list[str] = []
    note = notes.append if as_json else click.echo
    try:
        with warnings_noted(SimpleNamespace(note=note)), progress_bar(description, not as_json) as progress:
            yield progress, note
    except KeyboardInterrupt:
        click.echo(f"\nInterrupted. What is finished stays in {output}: the same command goes on from there.", err=True)
        sys.exit(130)
    nbytes = sum(file.stat().st_size for file in output.glob("*.safetensors"))
    if as_json:
        click.echo(json.dumps({"output": str(output), "nbytes": nbytes, "notes": notes}))
    else:
        click.echo(f"Wrote {output} ({nbytes / 1e9:.2f} GB). Check it at any time: slowft verify {output}")


@contextmanager
def progress_bar(description: str, wanted: bool):
    """A bar in bytes, told (done, in all), on a terminal; elsewhere None."""
    if not (wanted and sys.stderr.isatty()):
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = TextColumn(description), BarColumn(24), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    with Progress(*columns, TextColumn("left"), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
