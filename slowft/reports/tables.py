"""Prints tables and long lines to fit a terminal; to a pipe or a file as wide as they are, with no spaces at the ends.

Comes in: a rich table, or a line of text. Goes out: text on standard output.
"""

import re
import textwrap

import click
from rich.console import Console
from rich.table import Table

PIPE_WIDTH = 200  # of a table where no terminal says a width


def print_table(table: Table) -> None:
    console = Console()
    if console.is_terminal:
        console.print(table)
        return
    console = Console(width=PIPE_WIDTH)
    with console.capture() as printed:
        console.print(table)
    click.echo("\n".join(line.rstrip() for line in printed.get().splitlines()))


def print_line(text: str) -> None:
    """Print a line. What does not fit a terminal's width goes on below: four spaces in, or below a "Name     "."""
    console, name = Console(), re.match(r"\w* {2,}(?=\S)", text)
    if console.is_terminal:
        indent = " " * (4 if name is None or len(name[0]) == 2 else len(name[0]))
        options = {"subsequent_indent": indent, "break_long_words": False, "break_on_hyphens": False}
        text = textwrap.fill(text, console.width, **options)
    click.echo(text)
