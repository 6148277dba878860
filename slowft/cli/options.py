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
