"""What a step cost, as the reader, the clock and the operating system count it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from .. import platform
from ..planning.measure import Measurements
from ..weights.activation_cache import ActivationCache
from ..weights.journal import Journal
from ..weights.reader import Reader
from ..weights.residency import Residency
from .hidden import HiddenStates


@dataclass
class StepStats:
    """Counts over one step, or over all steps.

    Attributes:
        bytes_read: of the weight files (embedding rows included), spilled block inputs and stored activations.
        bytes_written: of spilled block inputs, stored activations and journalled blocks.
        from_cache: micro-batches that began at their stored activations.
        wait_s: seconds that the computation waited for reads and writes.
        compute_s: seconds spent computing (and casting) in blocks and head.
        peak_memory: the most bytes that the process had in memory, as the operating system counts them.
    """

    bytes_read: int = 0
    bytes_written: int = 0
    from_cache: int = 0
    wait_s: float = 0.0
    compute_s: float = 0.0
    peak_memory: int = 0


class Stats:
    """Costs of an opened model's steps.

    Attributes:
        last: of the last step: a `loss_and_grads`, or a pass that scores or generates.
    """

    def __init__(self, reader: Reader, residency: Residency, hidden: HiddenStates):
        self._reader, self._residency, self._hidden = reader, residency, hidden
        self._peak_memory = 0
        self._cache: ActivationCache | None = None
        self._journal: Journal | None = None
        self._from_cache = 0  # micro-batches so far that began at stored activations
        self.last = StepStats()

    def count_stored(self, cache: ActivationCache) -> None:
        """From now on count the reads and writes of these stored activations."""
        self._cache = cache

    def count_journal(self, journal: Journal) -> None:
        """From now on count the writes of this journal."""
        self._journal = journal

    def count_begun_at_stored(self) -> None:
        """Count a micro-batch that begins at its stored activations."""
        self._from_cache += 1

    @property
    def total(self) -> StepStats:
        """The costs of everything since the model was opened."""
        peak = max(self._peak_memory, platform.peak_memory())
        reader, hidden = self._reader, self._hidden
        read, written = reader.bytes_read + hidden.bytes_read, hidden.bytes_written
        wait_s, wait_in_blocks_s = reader.wait_s, hidden.wait_s  # the latter is part of the residency's compute_s
        if (cache := self._cache) is not None:
            read, written = read + cache.bytes_read, written + cache.bytes_written
            wait_s, wait_in_blocks_s = wait_s + cache.read_wait_s, wait_in_blocks_s + cache.write_wait_s
        if (journal := self._journal) is not None:
            written, wait_in_blocks_s = written + journal.bytes_written, wait_in_blocks_s + journal.wait_s
        compute_s = self._residency.compute_s - wait_in_blocks_s
        return StepStats(read, written, self._from_cache, wait_s + wait_in_blocks_s, compute_s, peak)

    @contextmanager
    def step(self, measurements: Measurements | None = None) -> Iterator[None]:
        """While this is entered, a step runs. Its reads, waiting and peak are noted in `measurements` too."""
        begin, begin_s = self.total, time.perf_counter()
        nbytes, seconds = self._reader.bytes_read, self._reader.read_s
        self._peak_memory = begin.peak_memory
        platform.reset_peak_memory()
        try:
            yield
        finally:
            now = self.total
            self.last = StepStats(
                now.bytes_read - begin.bytes_read,
                now.bytes_written - begin.bytes_written,
                now.from_cache - begin.from_cache,
                now.wait_s - begin.wait_s,
                now.compute_s - begin.compute_s,
                platform.peak_memory(),
            )
            if measurements is not None:
                read = self._reader.bytes_read - nbytes, self._reader.read_s - seconds
                step_s = time.perf_counter() - begin_s
                measurements.finish(*read, self.last.wait_s, self.last.peak_memory, step_s)
