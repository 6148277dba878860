"""The methods that a run calls to report what happens. The base class shows nothing."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BAR_AFTER_S = 2  # work that is done sooner needs no bar


class Report:
    """What the trainer calls during a run. Subclasses show it."""

    def begin(self, config, model) -> None:
        """The first step is next, and the adapter is attached."""

    def joined(self, machines: int, rows: int) -> None:
        """Several machines train together, each with `rows` of a micro-batch. Memory is the first machine's."""

    def planned(self, plan, note: str = "", caching=None) -> None:
        """The plan of the run is made. `note` says where its ceiling comes from."""

    def advance(self, iterations: int, loss: float, model) -> None:
        """An optimizer step was made."""

    def trained(self, info: dict[str, Any]) -> None:
        """`steps_per_report` iterations were made. `info` has their loss, speed, reads and memory."""

    def validated(self, info: dict[str, Any]) -> None:
        """An evaluation is done. `info` has iteration, val_loss, val_time."""

    def tested(self, info: dict[str, Any]) -> None:
        """The test set is evaluated. `info` has test_loss, test_ppl."""

    def saved(self, file: Path) -> None:
        """An adapter file was written."""

    def note(self, text: str) -> None:
        """There is something that the user should know."""

    def end(self) -> None:
        """The last file is saved, or an error ends the run."""

    @contextmanager
    def evaluating(self, n_batches: int) -> Iterator[Callable[[], None]]:
        """A context for an evaluation. The function that it yields is called after every batch."""
        yield lambda: None

    def progress(self, items: Iterable, description: str, total: int) -> Iterable:
        """Gives the same items, and shows how many were taken."""
        return items

    @contextmanager
    def generating(self, n_prompts: int) -> Iterator[Callable[[Any, int], None]]:
        """A context for a generation. The function that it yields is called after each reading of the weights."""
        yield lambda generation, answered: None

    def generated(self, generation, seconds: float, file: Path) -> None:
        """All prompts are answered. The answers are in `file`."""


class Reports(Report):
    """Passes every call on to several reports. The first one shows progress bars."""

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
    """Gives the same items, and shows how many were taken as soon as that has lasted `BAR_AFTER_S`."""
    begin, remaining = time.monotonic(), iter(items)
    for n, item in enumerate(remaining, 1):
        yield item
        if time.monotonic() - begin > BAR_AFTER_S:
            yield from report.progress(remaining, description, max(total - n, 0))


@contextmanager
def late_bar(report: Report, total: int) -> Iterator[Callable[[int], None]]:
    """Shows a bar of the computed block passes once they have taken `BAR_AFTER_S`.

    Yields a function to call with the number of passes that were computed since the last call.
    """
    begin, done, bar, advance = time.perf_counter(), 0, None, None

    def on_passes(n: int) -> None:
        nonlocal done, bar, advance
        done += n
        if bar is None and time.perf_counter() - begin > BAR_AFTER_S:
            bar = report.evaluating(total)
            advance, n = bar.__enter__(), done
        for _ in range(n if advance else 0):
            advance()

    try:
        yield on_passes
    finally:
        if bar is not None:
            bar.__exit__(None, None, None)
