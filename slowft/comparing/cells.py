"""The cells of a comparison: what each variant is asked in each scenario, and what it answered."""

from dataclasses import dataclass, field
from typing import Any

from .asking import Messages, messages_for
from .scenarios import Scenario
from .suite import Suite, Variant


@dataclass
class Cell:
    """One cell of the comparison.

    Attributes:
        row, column: numbers of the scenario and the variant.
        messages: the conversation that is sent.
        key: the answer's key in the file of answers.
        answer: "text", "finish_reason", "prompt_tokens", "tokens", "seconds", and "model" if a server named it.
        error: why there is no answer.
        was_known: the answer was in the file of answers.
        failures: for each check of the scenario, why the answer fails it; None if it passes.
    """

    row: int
    column: int
    variant: Variant
    scenario: Scenario
    messages: Messages
    key: str = ""
    answer: dict[str, Any] | None = None
    error: str | None = None
    was_known: bool = False
    failures: list[str | None] = field(default_factory=list)

    @property
    def text(self) -> str | None:
        return None if self.answer is None else self.answer["text"]

    @property
    def passes(self) -> bool | None:
        """Whether all checks pass; None if there are no checks or there is no answer."""
        if self.answer is None or not self.scenario.checks:
            return None
        return not any(self.failures)

    def check(self) -> None:
        """Fill `failures`."""
        if self.answer is not None:
            self.failures = [
                check.why_not(self.answer["text"], self.answer["tokens"]) for check in self.scenario.checks
            ]


def cells_of(suite: Suite, scenarios: list[Scenario]) -> list[Cell]:
    """The cells of all scenarios and variants, scenario by scenario.

    Raises:
        ConfigError: a variant has no prompt for a scenario.
    """
    variants = suite.whole_variants
    return [
        Cell(row, column, variant, scenario, messages_for(variant, scenario))
        for row, scenario in enumerate(scenarios)
        for column, variant in enumerate(variants)
    ]
