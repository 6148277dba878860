"""`slowft doctor`: whether all of it works on this machine."""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict

import click

STYLES = {"ok": "green", "note": "yellow", "failed": "bold red"}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object to attach to a report, without user names.")
def doctor(as_json):
    """Check that slowft works on this machine: its parts, its speeds, and small jobs whose results are known.

    Gradients are compared with those of mlx-lm in memory, and a model is trained in less memory than it has on disk.
    Takes about half a minute and 1 GB of disk; nothing stays there. Exit status 0 if nothing failed, 1 if something
    did.

    Example:

        slowft doctor --json > doctor.json
    """
    from .. import doctor

    begin, checks = time.perf_counter(), []
    is_terminal = sys.stdout.isatty() and not as_json
    with _progress(is_terminal) as told, closing(doctor.examine(told)) as results:
        for check in results:
            checks.append(check)
            if not is_terminal and not as_json:
                click.echo(_line(check))
    failed = [check for check in checks if check.verdict == "failed"]
    seconds = time.perf_counter() - begin
    if as_json:
        click.echo(json.dumps({"ok": not failed, "seconds": seconds, "checks": [asdict(check) for check in checks]}))
        sys.exit(1 if failed else 0)
    if is_terminal:
        _print_table(checks)
    for check in failed:
        click.echo(f"{check.name} failed. To do: {check.todo}")
    if not failed:
        click.echo(f"All is well ({len(checks)} checks in {seconds:.0f} s).")
    sys.exit(1 if failed else 0)


@contextmanager
def _progress(is_shown: bool) -> Iterator:
    """A line that says what is being checked, on a terminal; gives what is to be told of it."""
    if not is_shown:
        yield lambda doing: None
        return
    from rich.console import Console

    with Console().status("") as status:
        yield lambda doing: status.update(f"Checking {doing}")


def _line(check) -> str:
    todo = f". To do: {check.todo}" if check.todo else ""
    return f"{check.verdict:<8}{check.name:<42}{check.result}{todo}"


def _print_table(checks) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("Check", "Result", "Verdict", "What to do")
    for check in checks:
        verdict = Text(check.verdict, STYLES[check.verdict])
        table.add_row(Text(check.name), Text(check.result), verdict, Text(check.todo))
    Console().print(table)
