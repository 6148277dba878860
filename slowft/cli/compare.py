"""`slowft compare`: models, adapters and prompts side by side on scenarios, with checks, a judge and a page."""

import json
import sys
from pathlib import Path

import click

from .finetune import make_report, warnings_noted
from .options import awake


@click.command()
@click.argument("suite", required=False, metavar="SUITE.yaml")
@click.option("--html", metavar="FILE", help="Write a page with every answer, which needs no network.")
@click.option("--json", "as_json", is_flag=True, help="All results as one JSON object on standard output.")
@click.option("--again", is_flag=True, help="Ask for all answers anew, whatever was answered before.")
@click.option("--memory", metavar="SIZE", help="Ceiling for the whole process, in place of the suite's.")
@click.option("--example", is_flag=True, help="Print a suite with every field explained, and stop.")
@awake
def compare(suite, html, as_json, again, memory, example):
    """Compare models, adapters and prompts: variants answer scenarios, checks and a judge say how well.

    Variants are local models, streamed, with adapters or without, or servers with OpenAI's interface. Scenarios have
    variables for the prompt, or are recorded requests, or lines of a file. Answers are kept: given again, the command
    asks only for what is new. Shares come with 95% confidence intervals, differences with an exact test.

    Example:

        slowft compare --example > suite.yaml && slowft compare suite.yaml --html suite.html
    """
    from dataclasses import replace

    from ..comparing.suite import EXAMPLE, load

    if example:
        click.echo(EXAMPLE.read_text("utf-8"), nl=False)
        return
    if suite is None:
        raise click.UsageError("no suite given. `slowft compare --example` prints one")
    from ..comparing import page
    from ..comparing.run import compare
    from ..comparing.table import lines
    from ..reports.terminal import LineReport

    wanted = load(Path(suite).expanduser())
    if memory is not None:
        wanted = replace(wanted, memory=memory)
    report = LineReport(sys.stderr) if as_json else make_report(False)
    with warnings_noted(report):
        found = compare(wanted, report, again)
    results = page.results(found)
    if html is not None:
        page.write(Path(html).expanduser(), results)
    if as_json:
        click.echo(json.dumps(results, ensure_ascii=False))
    else:
        for line in lines(results):
            click.echo(line)
        if html is not None:
            click.echo(f"{html} shows every answer")
    if found.errors:
        click.echo(_errors(found.errors), err=True)
        sys.exit(1)


def _errors(cells) -> str:
    first, n = cells[0], len(cells)
    return (
        f"{n} of the answers did not come; the first, {first.variant.name} on {first.scenario.name}: {first.error}. "
        "The same command again asks for those alone"
    )
