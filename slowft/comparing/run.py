"""Runs a comparison, from its suite to its results.

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
    """A finished comparison."""

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
        """The cost of a cell's answer by the suite's prices; None if there is no price or no answer."""
        prices = {name: vars(price) for name, price in self.suite.prices.items()}
        if cell.answer is None:
            return None
        return cost(prices, cell.variant.model, cell.answer["prompt_tokens"], cell.answer["tokens"])

    def summary(self, column: int) -> dict[str, Any]:
        """A variant's shares with 95% intervals, tokens, seconds and cost. Cells without an answer do not count."""
        cells = [cell for cell in self.of(column) if cell.answer is not None]
        passes = [cell.passes for cell in cells if cell.passes is not None]
        checks: dict[str, list[bool]] = {}
        for cell in cells:
            for check, why in zip(cell.scenario.checks, cell.failures):
                checks.setdefault(check.name, []).append(why is None)
        costs = [c for c in map(self.cost_of, cells) if c is not None]
        seconds = [cell.answer["seconds"] for cell in cells]
        return {
            "answers": len(cells),
            "errors": len(self.of(column)) - len(cells),
            "passed": _share(passes),
            "checks": {name: _share(passed) for name, passed in checks.items()},
            "prompt_tokens": _total(cell.answer["prompt_tokens"] for cell in cells),
            "tokens": _total(cell.answer["tokens"] for cell in cells),
            "seconds": statistics.median(seconds) if seconds else None,
            "cost": sum(costs) if costs else None,
        }

    def against_baseline(self, column: int) -> dict[str, Any] | None:
        """Compares a variant with the baseline on the same scenarios; None for the baseline itself."""
        if column == self.suite.first:
            return None
        pairs = [(a.passes, b.passes) for a, b in zip(self.of(column), self.of(self.suite.first))]
        pairs = [(a, b) for a, b in pairs if a is not None and b is not None]
        better, worse = sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)
        result: dict[str, Any] = {"scenarios": len(pairs), "better": better, "worse": worse}
        result |= {"difference": (better - worse) / len(pairs) if pairs else None, "p": sign_test(better, worse)}
        if self.suite.judge is not None:
            result["judge"] = self._judge_summary(column)
        return result

    def _judge_summary(self, column: int) -> dict[str, Any]:
        """What the judge says of a variant's answers against the baseline's."""
        verdicts = [v for v in self.verdicts if v.second == column and (v.orders or v.why == "the same answer")]
        wins, losses = (sum(v.better == side for v in verdicts) for side in ("second", "first"))
        low, high = wilson(wins, wins + losses)
        return {
            "won": wins,
            "lost": losses,
            "ties": len(verdicts) - wins - losses,
            "unclear": sum(v.orders is not None and None in v.orders for v in verdicts),
            "share": wins / (wins + losses) if wins + losses else None,
            "low": low,
            "high": high,
            "p": sign_test(wins, losses),
        }


def compare(suite: Suite, report: Report, asks_again: bool = False) -> Comparison:
    """Make a comparison. Answers are taken from the suite's file of answers if they are there; new ones are added.

    Args:
        asks_again: ask for all answers anew.

    Raises:
        ConfigError, DataError: the suite or its files are wrong. Nothing has been asked then.
    """
    scenarios = scenarios_of(suite)
    cells = cells_of(suite, scenarios)
    with Answers(suite.cache_file, asks_again) as answers:
        remote_cells = remote.RemoteCells(suite, cells, answers)
        try:
            for model_cells in local.by_model(cells):
                local.answer(suite, model_cells, answers, report)
            remote_cells.settle(report)
        finally:
            remote_cells.stop()
        for cell in cells:
            cell.check()
        verdicts = judged(suite, cells, answers, report)
    n_known = sum(cell.was_known for cell in cells)
    report.note(f"{len(cells)} cells, {n_known} of them were answered before ({suite.cache_file.name})")
    return Comparison(suite, scenarios, cells, verdicts)


def _share(passed: Sequence[bool]) -> dict[str, Any] | None:
    if not passed:
        return None
    k, n = sum(passed), len(passed)
    low, high = wilson(k, n)
    return {"k": k, "n": n, "share": k / n, "low": low, "high": high}


def _total(counts) -> int | None:
    """The sum; None if a server did not give one of the counts."""
    counts = list(counts)
    return None if None in counts else sum(counts)
