"""The `slowft` group: finds commands, turns a user's mistakes into one line, and keeps imports lazy."""

import importlib
import os
import sys

import click

from .. import __version__, platform
from ..errors import ConfigError, Interrupted, SlowftError, gpu_error, reason_of
from .options import meant

GROUPS = {
    "Train": "finetune data distil plan status",
    "Use what was trained": "generate score fuse adapter",
    "Learn from an expensive model": "serve requests compare",
    "Prepare models": "prepare verify",
    "Try this machine": "bench doctor demo",
}
COMMANDS = {
    "finetune": "Train a LoRA adapter with the base model streamed from disk.",
    "data": "Show what will be trained on; make data with a large model, clean it, split it.",
    "generate": "Answer prompts, many in each reading of the weights.",
    "score": "Score texts, answers or marks: log-probabilities of base and adapters in one pass.",
    "compare": "Compare models, adapters and prompts on scenarios: checks, a judge, a page.",
    "serve": "Answer over HTTP as OpenAI does: models here and another server's, recorded if you like.",
    "distil": "Have a large model make data and teach a small one; say what it was worth.",
    "plan": "Say what a job would take on this machine: memory, reads, seconds.",
    "fuse": "Add an adapter to its base model, and write a model of its own.",
    "adapter": "Look at adapters, compare and sum them, carry them to and from PEFT and llama.cpp.",
    "prepare": "Write a model anew so that it streams: experts stacked, quantized if asked for.",
    "verify": "Check a model's files against their checksums.",
    "bench": "Measure steps, reads and others' trainers on this machine.",
    "status": "Say how a run stands, from the directory of its adapter.",
    "requests": "Look at recorded requests; have them answered anew; make training data of them.",
    "doctor": "Check in half a minute that all of it works on this machine.",
    "demo": "Fine-tune a real small model on real text, from nothing, in minutes.",
}


class Commands(click.Group):
    """Imports a command's module only when it is used: `slowft --help` must not import MLX."""

    def list_commands(self, ctx):
        return list(COMMANDS)

    def get_command(self, ctx, name):
        if name not in COMMANDS:
            return None
        return getattr(importlib.import_module(f"slowft.cli.{name}"), name)

    def resolve_command(self, ctx, args):
        if args[0] not in COMMANDS and not args[0].startswith("-"):
            ctx.fail(f"No such command '{args[0]}'.{meant(args[0], COMMANDS)}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx, formatter):
        for title, names in GROUPS.items():
            with formatter.section(title):
                formatter.write_dl([(name, COMMANDS[name]) for name in names.split()])


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="slowft")
def slowft():
    """Fine-tune language models larger than memory: weights stream from the SSD, block by block.

    Example:

        slowft finetune --model Qwen/Qwen3-0.6B --data my-data --iters 200
    """


def main() -> None:
    """Entry point: a user's mistake ends in one line on standard error, status 1 (2 for usage)."""
    platform.allow_open_files()
    _open_standard_streams()
    try:
        slowft(prog_name="slowft", standalone_mode=False)
    except click.ClickException as e:
        e.show()
        sys.exit(e.exit_code)
    except Interrupted as e:
        click.echo(f"\n{e}", err=True)
        sys.exit(128 + e.signal)
    except SlowftError as e:
        click.echo(f"Error: {e}", err=True)
        sys.exit(2 if isinstance(e, ConfigError) else 1)
    except (KeyboardInterrupt, click.exceptions.Abort):  # click's name for it
        click.echo("\nInterrupted. What was saved so far is intact.", err=True)
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
    except RuntimeError as e:
        if (of_gpu := gpu_error(e)) is None:
            raise
        click.echo(f"Error: {of_gpu}", err=True)
        sys.exit(1)
    except OSError as e:  # a disk or a limit that no room below has words for, such as a folder that cannot be listed
        click.echo(f"Error: {e.filename or 'a file, or standard output,'} cannot be used: {reason_of(e)}", err=True)
        sys.exit(1)


def _open_standard_streams() -> None:
    """Open those that a caller closed (`<&-`): a file would get such a number, and what is printed go into it."""
    for fd, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
            setattr(sys, name, open(fd, mode, closefd=False))
