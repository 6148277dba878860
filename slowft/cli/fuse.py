"""`slowft fuse`: an adapter into its base model, block by block."""

from pathlib import Path

import click

from . import options
from .prepare import writing_model


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
@options.awake
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
    output = Path(save_path)
    from ..convert.fuse import fuse as fuse_model

    with writing_model("Fusing", output, as_json) as (progress, note):
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
