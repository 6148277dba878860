"""Options that several commands have, each said once."""

import functools
from collections.abc import Iterable
from difflib import get_close_matches

import click

from .. import platform

MODEL_HELP = "Base model: a directory that mlx-lm loads, or a hub id"


def meant(word: str, known: Iterable[str]) -> str:
    """A question to put behind "no such word"."""
    close = get_close_matches(word, known, 1)
    return f" Did you mean '{close[0]}'?" if close else ""


def need(**partners: str) -> None:
    """Say on standard error which options of the running command were given without what they have an effect with.

    Such a command line runs nevertheless, as it does in mlx-lm. A default counts as not given.

    Args:
        partners: of each such option, by parameter names, those one of which is needed, with spaces between.
    """
    params = click.get_current_context().params
    for name in filter(_is_given, partners):
        needed = partners[name].split()
        if not any(params[partner] for partner in needed):
            usable = " or ".join(_written(partner) + (" above 0" if partner == "temp" else "") for partner in needed)
            click.echo(f"Warning: {_written(name)} has no effect without {usable}", err=True)


def no_effect_with(other: str, *names: str) -> None:
    """Say on standard error which of these options were given, if another was given that leaves them no effect."""
    if click.get_current_context().params[other]:
        for name in filter(_is_given, names):
            click.echo(f"Warning: {_written(name)} has no effect with {_written(other)}", err=True)


def _parameter(name: str) -> click.Parameter:
    return next(p for p in click.get_current_context().command.params if p.name == name)


def _is_given(name: str) -> bool:
    context = click.get_current_context()
    is_typed = context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
    return is_typed and context.params[name] != _parameter(name).get_default(context)


def _written(name: str) -> str:
    parameter = _parameter(name)
    return name.upper() if isinstance(parameter, click.Argument) else next(o for o in parameter.opts if o[:2] == "--")


def adapter_path(command):
    return click.option(
        "--adapter-path", default="adapters", show_default=True, help="Directory of an adapter: mlx-lm's or PEFT's."
    )(command)


def model(command):
    return click.option("--model", required=True, help=f"{MODEL_HELP}.")(command)


def base_model(command):
    """Of commands that need no more than its configuration, if that."""
    return click.option("--model", help=f"{MODEL_HELP} [default: what the adapter names].")(command)


def output(command):
    return click.option("--output", required=True, help="Directory to write (of gguf: a file), not there yet.")(command)


def memory(command):
    text = "Ceiling for the whole process, such as 2GB [default: half of this machine's]."
    return click.option("--memory", help=text)(command)


def emulation(command):
    """Of commands that use a model: `emulate`, `delta` and `delta_top_p`."""
    for option in (
        click.option(
            "--delta-top-p", type=float, help="Outside of this share of what SMALL would say, --model has no say."
        ),
        click.option("--delta", multiple=True, metavar="ADAPTER[:WEIGHT]", help="What SMALL learnt; several add up."),
        click.option(
            "--emulate", metavar="SMALL", help="Base model whose fine-tuning --model is to behave by; see --delta."
        ),
    ):
        command = option(command)
    return command


def awake(command):
    """Of commands that work long: a Mac does not fall asleep meanwhile. No option; the innermost decorator."""

    @functools.wraps(command)
    def working(*args, **kwargs):
        with platform.kept_awake():
            return command(*args, **kwargs)

    return working


def trust_remote_code(command):
    return click.option("--trust-remote-code", is_flag=True, help="Let the model run code of its own.")(command)


def as_json(command):
    return click.option("--json", "as_json", is_flag=True, help="One JSON object on standard output, nothing else.")(
        command
    )
