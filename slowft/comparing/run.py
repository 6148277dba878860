"""A comparison from its suite to its results: the order of it all.

Comes in: a suite. Goes out: a `Comparison`, which `page` writes as HTML or JSON and the command prints as a table.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..reports.base import Report
from ..requests.prices import cost
from . import local, remote
from .answers import Answers
from .cells import Cell, cells_of
from .judging import Verdict, judged
from .scenarios import Scenario, scenarios_of
from .statistics import sign_test, wilson
from .suite import Suite, Variant


@dataclass
class Comparison:
    """What was found."""

    suite: Suite
    scenarios: list[Scenario]
    cells: list[Cell]
    verdicts: list[Verdict]

    @property
    def variants(self) -> list[Variant]:
        return self.suite.whole_variants

    @property
    def errors(self) -> list[Cell]:
        return [cell for cell in self.cells if cell.error is not None]

    def of(self, column: int) -> list[Cell]:
        """A variant's cells, scenario by scenario."""
        return [cell for cell in self.cells if cell.column == column]

    def cost_of(self, cell: Cell) -> float | None:
        """By the suite's prices; a local model costs what it costs to run."""
        prices = {name: vars(price) for name, price in self.suite.prices.items()}
        if cell.answer is None:
            return None
        return cost(prices, cell.variant.model, cell.answer["prompt_tokens"], cell.answer["tokens"])

    def summary(self, column: int) -> dict[str, Any]:
        """Of a variant: shares with 95% intervals, tokens, seconds, cost. Cells without an answer do not count."""
        cells = [cell for cell in self.of(column) if cell.answer is not None]
        marked = [cell.passes for cell in cells if cell.passes is not None]
        checks: dict[str, list[bool]] = {}
        for cell in cells:
            for check, why in zip(cell.scenario.checks, cell.failures):
                checks.setdefault(check.name, []).append(why is None)
        costs = [c for c in map(self.cost_of, cells) if c is not None]
        seconds = [cell.answer["seconds"] for cell in cells]
        return {
            "answers": len(cells),
            "errors": len(self.of(column)) - len(cells),
            "passed": _share(marked),
            "checks": {name: _share(found) for name, found in checks.items()},
            "prompt_tokens": _total(cell.answer["prompt_tokens"] for cell in cells),
            "tokens": _total(cell.answer["tokens"] for cell in cells),
            "seconds": statistics.median(seconds) if seconds else None,
            "cost": sum(costs) if costs else None,
        }

    def against_baseline(self, column: int) -> dict[str, Any] | None:
        """A variant and the baseline on the same scenarios; None of the baseline itself."""
        if column == self.suite.first:
            return None
        pairs = [(a.passes, b.passes) for a, b in zip(self.of(column), self.of(self.suite.first))]
        pairs = [(a, b) for a, b in pairs if a is not None and b is not None]
        better, worse = sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)
        found: dict[str, Any] = {"scenarios": len(pairs), "better": better, "worse": worse}
        found |= {"difference": (better - worse) / len(pairs) if pairs else None, "p": sign_test(better, worse)}
        verdicts = [v for v in self.verdicts if v.second == column and (v.orders or v.why == "the same answer")]
        if self.suite.judge is not None:
            wins, losses = (sum(v.better == side for v in verdicts) for side in ("second", "first"))
            low, high = wilson(wins, wins + losses)
            found["judge"] = {
                "won": wins,
                "lost": losses,
                "ties": len(verdicts) - wins - losses,
                "unclear": sum(v.orders is not None and None in v.orders for v in verdicts),
                "share": wins / (wins + losses) if wins + losses else None,
                "low": low,
                "high": high,
                "p": sign_test(wins, losses),
            }
        return found


def compare(suite: Suite, report: Report, asks_again: bool = False) -> Comparison:
    """Make a comparison. Answers that are known are taken from the suite's file of answers; new ones go there.

    Args:
        asks_again: ask for all of them.

    Raises:
        ConfigError, DataError: the suite or its files are wrong; nothing has been asked then.
    """
    scenarios = scenarios_of(suite)
    cells = cells_of(suite, scenarios)
    with Answers(suite.cache_file, asks_again) as answers:
        away = remote.RemoteCells(suite, cells, answers)
        try:
            for of_model in local.by_model(cells):
                local.answer(suite, of_model, answers, report)
            away.settle(report)
        finally:
            away.stop()
        for cell in cells:
            cell.check()
        verdicts = judged(suite, cells, answers, report)
    n_known = sum(cell.was_known for cell in cells)
    report.note(f"{len(cells)} cells, {n_known} of them were answered before ({suite.cache_file.name})")
    return Comparison(suite, scenarios, cells, verdicts)


def _share(found: Sequence[bool]) -> dict[str, Any] | None:
    if not found:
        return None
    k, n = sum(found), len(found)
    low, high = wilson(k, n)
    return {"k": k, "n": n, "share": k / n, "low": low, "high": high}


def _total(counts) -> int | None:
    """None where a server did not say."""
    known = list(counts)
    return None if None in known else sum(known)
