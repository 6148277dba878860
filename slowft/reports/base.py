"""What a report is told, and when. This one shows nothing."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BAR_AFTER_S = 2  # what is done sooner needs no bar


class Report:
    """Told of a run by the trainer. Subclasses show it."""

    def begin(self, config, model) -> None:
        """Before the first step; the adapter is attached."""

    def joined(self, machines: int, rows: int) -> None:
        """Several machines train together, each with `rows` of a micro-batch; memory is the first's."""

    def planned(self, plan, note: str = "", caching=None) -> None:
        """What the run keeps in memory and is predicted to take; `note` says where its ceiling comes from."""

    def advance(self, iterations: int, loss: float, model) -> None:
        """After every optimizer step."""

    def trained(self, info: dict[str, Any]) -> None:
        """Every `steps_per_report` iterations: loss, speed, reads, memory since the last time."""

    def validated(self, info: dict[str, Any]) -> None:
        """After an evaluation: iteration, val_loss, val_time."""

    def tested(self, info: dict[str, Any]) -> None:
        """After the test set: test_loss, test_ppl."""

    def saved(self, file: Path) -> None:
        """An adapter file was written."""

    def note(self, text: str) -> None:
        """Something the user should know."""

    def end(self) -> None:
        """After the last save, or when a run breaks off."""

    @contextmanager
    def evaluating(self, n_batches: int) -> Iterator[Callable[[], None]]:
        """Around an evaluation; the function it gives is called after every batch."""
        yield lambda: None

    def progress(self, items: Iterable, description: str, total: int) -> Iterable:
        """The same items, their number shown as they are taken."""
        return items

    @contextmanager
    def generating(self, n_prompts: int) -> Iterator[Callable[[Any, int], None]]:
        """Around a generation; `tell(generation, prompts answered)` is called after every reading of the weights."""
        yield lambda generation, answered: None

    def generated(self, generation, seconds: float, file: Path) -> None:
        """All prompts are answered, and the answers in `file`."""


class Reports(Report):
    """Tells several reports the same."""

    def __init__(self, *reports: Report):
        self._first, self._all = reports[0], reports

    def begin(self, config, model):
        for report in self._all:
            report.begin(config, model)

    def joined(self, machines, rows):
        for report in self._all:
            report.joined(machines, rows)

    def planned(self, plan, note="", caching=None):
        for report in self._all:
            report.planned(plan, note, caching)

    def advance(self, iterations, loss, model):
        for report in self._all:
            report.advance(iterations, loss, model)

    def trained(self, info):
        for report in self._all:
            report.trained(info)

    def validated(self, info):
        for report in self._all:
            report.validated(info)

    def tested(self, info):
        for report in self._all:
            report.tested(info)

    def saved(self, file):
        for report in self._all:
            report.saved(file)

    def note(self, text):
        for report in self._all:
            report.note(text)

    def end(self):
        for report in self._all:
            report.end()

    def evaluating(self, n_batches):
        return self._first.evaluating(n_batches)

    def generating(self, n_prompts):
        return self._first.generating(n_prompts)

    def generated(self, generation, seconds, file):
        for report in self._all:
            report.generated(generation, seconds, file)

    def progress(self, items, description, total):
        return self._first.progress(items, description, total)


def late(report: Report, items: Iterable, description: str, total: int) -> Iterator:
    """The same items, their number shown once they have taken two seconds."""
    begin, left = time.monotonic(), iter(items)
    for n, item in enumerate(left, 1):
        yield item
        if time.monotonic() - begin > BAR_AFTER_S:
            yield from report.progress(left, description, max(total - n, 0))


@contextmanager
def late_bar(report: Report, total: int) -> Iterator[Callable[[int], None]]:
    """A bar of the blocks that are still to be computed, once that has taken two seconds."""
    begin, done, bar, advance = time.perf_counter(), 0, None, None

    def on_visit(n: int) -> None:
        nonlocal done, bar, advance
        done += n
        if bar is None and time.perf_counter() - begin > BAR_AFTER_S:
            bar = report.evaluating(total)
            advance, n = bar.__enter__(), done
        for _ in range(n if advance else 0):
            advance()

    try:
        yield on_visit
    finally:
        if bar is not None:
            bar.__exit__(None, None, None)
