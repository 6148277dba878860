"""`slowft fuse`: an adapter into its base model, block by block."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import click

from . import options
from .finetune import warnings_noted
from .prepare import progress_bar


@click.command()
@options.model
@options.adapter_path
@click.option(
    "--save-path",
    "--output",
    default="fused_model",
    show_default=True,
    help="Directory to write: new, empty, or of an unfinished run.",
)
@click.option("--dequantize", is_flag=True, help="Of a quantized model, write all weights unquantized.")
@options.memory
@options.trust_remote_code
@options.as_json
def fuse(model, adapter_path, save_path, dequantize, memory, trust_remote_code, as_json):
    """Add an adapter to the weights of its base model, and write the result as a model of its own.

    What mlx_lm.fuse writes, tensor by tensor and bit by bit, within --memory, whatever the model's size: a file for
    each block instead of files of 5 GB, tokenizer files as they are, and checksums (slowft verify). Layers of a
    quantized model are quantized again after the sum. A run that was cut off goes on where it was when the same
    command is given again. mlx_lm.fuse's --upload-repo and --export-gguf are not here: hf upload does the one, and
    slowft adapter export --format gguf gives llama.cpp the adapter alone.

    Example:

        slowft fuse --model Qwen/Qwen3-0.6B --adapter-path adapters --save-path fused_model
    """
    output, notes = Path(save_path), []
    from ..convert.fuse import fuse as fuse_model

    note = notes.append if as_json else click.echo
    try:
        with warnings_noted(SimpleNamespace(note=note)), progress_bar("Fusing", not as_json) as progress:
            fuse_model(
                model,
                adapter_path,
                output,
                dequantize=dequantize,
                memory=memory,
                trust_remote_code=trust_remote_code,
                progress=progress,
                note=note,
            )
    except KeyboardInterrupt:
        click.echo(f"\nInterrupted. What is finished stays in {output}: the same command goes on from there.", err=True)
        sys.exit(130)
    nbytes = sum(file.stat().st_size for file in output.glob("*.safetensors"))
    if as_json:
        click.echo(json.dumps({"output": str(output), "nbytes": nbytes, "notes": notes}))
    else:
        click.echo(f"Wrote {output} ({nbytes / 1e9:.2f} GB). Check it at any time: slowft verify {output}")
