"""Prints the results of a comparison as tables for a terminal."""

from collections.abc import Iterator
from typing import Any

from ..errors import printable

HEADS = ("", "passed", "95%", "against the baseline", "tokens", "seconds", "cost")


def lines(results: dict[str, Any]) -> Iterator[str]:
    """The lines of three tables: the variants, their checks if there are several, and the judge's verdicts if any."""
    variants = results["variants"]
    yield from _table([HEADS, *(_of_variant(variant, results) for variant in variants)])
    checks = list(dict.fromkeys(name for variant in variants for name in variant["summary"]["checks"]))
    if len(checks) > 1:
        yield ""
        rows = [[name, *(_of_check(v["summary"]["checks"].get(name)) for v in variants)] for name in checks]
        yield from _table([["check", *(variant["name"] for variant in variants)], *rows])
    judged = [v for v in variants if (v["against_baseline"] or {}).get("judge")]
    if judged:
        yield ""
        rows = [_of_judge(variant) for variant in judged]
        baseline = variants[results["baseline"]]["name"]
        heads = [f"judged against {printable(baseline)}", "won", "lost", "ties", "of won and lost", "95%", "p"]
        yield from _table([heads, *rows])


def _of_variant(variant: dict[str, Any], results: dict[str, Any]) -> list[str]:
    summary, against = variant["summary"], variant["against_baseline"]
    passed = summary["passed"]
    errors = f", {summary['errors']} without an answer" if summary["errors"] else ""
    shown = f"{passed['k']}/{passed['n']} {_percent(passed['share'])}{errors}" if passed else f"-{errors}"
    difference = "the baseline" if against is None else "-"
    if against is not None and against["difference"] is not None:
        difference = f"{against['difference']:+.0%}: {against['better']} better, {against['worse']} worse"
        difference += f", p = {against['p']:.2g}"
    seconds = "-" if summary["seconds"] is None else f"{summary['seconds']:.2f}"
    tokens = "-" if summary["tokens"] is None else f"{summary['tokens']:,}"
    cost = "-" if summary["cost"] is None else f"{summary['cost']:.4f}"
    return [variant["name"], shown, _interval(passed), difference, tokens, seconds, cost]


def _of_check(share: dict[str, Any] | None) -> str:
    return f"{share['k']}/{share['n']}" if share else "-"


def _of_judge(variant: dict[str, Any]) -> list[str]:
    judge = variant["against_baseline"]["judge"]
    share = "-" if judge["share"] is None else _percent(judge["share"])
    interval = _interval(judge if judge["share"] is not None else None)
    return [variant["name"], *(str(judge[k]) for k in ("won", "lost", "ties")), share, interval, f"{judge['p']:.2g}"]


def _interval(share: dict[str, Any] | None) -> str:
    return f"{_percent(share['low'])} to {_percent(share['high'])}" if share else "-"


def _percent(share: float) -> str:
    return f"{share:.0%}"


def _table(rows: list) -> Iterator[str]:
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        yield "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths)).rstrip()
