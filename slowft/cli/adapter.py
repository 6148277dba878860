"""`slowft adapter`: look at adapters, compare and sum them, carry them to and from other programs' formats."""

import json
from dataclasses import asdict
from pathlib import Path

import click

from ..errors import AdapterError, ConfigError
from . import options

FORMATS = click.Choice(["peft", "mlx", "gguf"])


@click.group()
def adapter():
    """Look at adapters, compare and sum them, and carry them to and from PEFT and llama.cpp.

    An adapter is a directory, mlx-lm's (slowft's too) or PEFT's. A PEFT directory need not be imported to be used:
    --adapter-path takes it as it is, in every command.

    Example:

        slowft adapter info adapters
    """


@adapter.command(short_help="Rank, layers, norms, and what it was trained on.")
@click.argument("directory", default="adapters")
@options.memory
@options.as_json
def info(directory, memory, as_json):
    """Say what the adapter in DIRECTORY is: rank, layers, norms, what it was trained on.

    A norm is the Frobenius norm of what the adapter adds to a weight (scale times the product of its factors). Of DoRA
    that is before the magnitudes.

    Example:

        slowft adapter info adapters
    """
    from ..convert import adapters

    described = adapters.describe(adapters.read(directory), memory)
    if as_json:
        click.echo(json.dumps(asdict(described) | {"norm": described.norm}))
        return
    kind = {"lora": "LoRA", "dora": "DoRA"}[described.kind]
    click.echo(
        f"{kind} ({described.format}), rank {described.rank}, scale {described.scale:g}, {len(described.layers)} layers"
        f", {described.n_parameters:,} parameters, {described.nbytes / 1e6:.1f} MB"
    )
    if described.base:
        click.echo(f"Trained on {described.base}")
    if described.trained_with:
        click.echo("Trained with " + ", ".join(f"{k} {v}" for k, v in described.trained_with.items()))
    click.echo(f"Norm {described.norm:.4g} in all:")
    for name, layer in described.layers.items():
        experts = f", {layer['experts']} experts" if "experts" in layer else ""
        click.echo(f"  {layer['norm']:10.4g}  {name} (rank {layer['rank']}{experts})")


@adapter.command(short_help="How two adapters differ, layer by layer.")
@click.argument("first")
@click.argument("second")
@options.memory
@options.as_json
def diff(first, second, memory, as_json):
    """Compare what two adapters add to the weights: settings, layers, norms, and the angle between them.

    Example:

        slowft adapter diff adapters adapters-longer
    """
    from ..convert import adapters

    found = adapters.diff(adapters.read(first), adapters.read(second), memory)
    if as_json:
        click.echo(json.dumps(found))
        return
    for key, (one, other) in found["settings"].items():
        click.echo(f"{key}: {one} | {other}")
    for which, path in (("first", first), ("second", second)):
        for name in found[f"only_in_{which}"]:
            click.echo(f"only in {path}: {name}")
    click.echo(_compared("in all", found["total"]))
    for name, layer in found["layers"].items():
        click.echo(f"  {_compared(name, layer)}")


def _compared(name: str, of: dict) -> str:
    return (
        f"{name}: norms {of['first']:.4g} and {of['second']:.4g}, difference {of['difference']:.4g} "
        f"({of['relative']:.2%}), cosine {of['cosine']:.4f}"
    )


@adapter.command(short_help="The weighted sum of LoRA adapters, exactly or at a rank.")
@click.argument("directories", nargs=-1, required=True, metavar="DIRECTORY...")
@click.option("--weights", help="A number for each, such as 0.7,0.3 [default: 1 for each].")
@click.option("--rank", type=click.IntRange(1), help="Of the result, by SVD [default: the ranks' sum, exactly].")
@options.output
@options.memory
def merge(directories, weights, rank, output, memory):
    """Write the weighted sum of LoRA adapters of one model as one adapter.

    Without --rank the sum is exact, and its rank that of all of them together. With --rank it is the closest adapter of
    that rank (SVD).

    Example:

        slowft adapter merge adapters adapters-longer --weights 0.7,0.3 --output merged
    """
    from ..convert import adapters

    try:
        numbers = [float(word) for word in weights.split(",")] if weights is not None else [1.0] * len(directories)
    except ValueError:
        raise ConfigError(f"--weights {weights} are not numbers with commas between, such as 0.7,0.3") from None
    adapters.merge([adapters.read(d) for d in directories], numbers, output, rank, memory)
    click.echo(f"Wrote {output}")


@adapter.command("import", short_help="Another program's adapter to mlx-lm's format.")
@click.argument("path")
@click.option("--format", "kind", type=FORMATS, help="Of PATH [default: what it is].")
@click.option("--model", help=f"{options.MODEL_HELP}: layers get the names that it has for them. Needed for gguf.")
@options.output
@options.memory
def import_(path, kind, model, output, memory):
    """Write the adapter at PATH (a PEFT directory, or llama.cpp's GGUF file) as mlx-lm's and slowft's own.

    Example:

        slowft adapter import lora.gguf --model Qwen/Qwen3-0.6B --output adapters
    """
    from ..convert import adapters

    kind = kind or ("gguf" if path.lower().endswith(".gguf") else None)
    if kind == "gguf":
        from ..convert.gguf_adapter import import_gguf

        if model is None:
            raise ConfigError("an adapter in GGUF does not say which model it belongs to. Give --model")
        found = import_gguf(path, adapters.config_of(model), model, memory)
    else:
        found = adapters.read(path)
        if kind is not None and (kind == "peft") != found.is_peft:
            raise AdapterError(f"{path} is {'a PEFT' if found.is_peft else 'an mlx-lm'} adapter, not one of {kind}")
        if model is not None:
            found = adapters.renamed(found, model)
    adapters.write_mlx(found, output, memory)
    click.echo(f"Wrote {output}")


@adapter.command(short_help="An adapter to another program's format.")
@click.argument("directory", default="adapters")
@click.option("--format", "kind", type=FORMATS, required=True, help="To write: PEFT's, mlx-lm's, or llama.cpp's.")
@options.base_model
@options.output
@options.memory
def export(directory, kind, model, output, memory):
    """Write the adapter in DIRECTORY as PEFT (peft), mlx-lm (mlx) or llama.cpp (gguf) reads it.

    Example:

        slowft adapter export adapters --format peft --output adapters-peft
    """
    from ..convert import adapters

    found = adapters.read(directory)
    if kind == "gguf":
        from ..convert.gguf_adapter import export_gguf

        base = model or found.base
        if base is None:
            raise ConfigError(f"{directory} does not name its base model. Give --model")
        adapters.check_memory([found], memory, "exporting")
        export_gguf(found, adapters.config_of(base), Path(output))
    elif kind == "peft":
        adapters.export_peft(found, output, model, memory=memory)
    else:
        adapters.write_mlx(found, output, memory)
    click.echo(f"Wrote {output}")
