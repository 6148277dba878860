"""What a step cost, as counted by the reader, the clock and the operating system."""

import time
from dataclasses import dataclass

from .. import platform
from ..planning.measure import Measurements
from ..weights.activation_cache import ActivationCache
from ..weights.journal import Journal


@dataclass
class StepStats:
    """Counts over one step, or over all steps.

    Attributes:
        bytes_read: from the weight files, embedding rows included, of spilled block inputs, and of stored activations.
        bytes_written: of spilled block inputs, stored activations and journalled blocks.
        from_cache: micro-batches that began at their stored activations.
        wait_s: seconds the computation waited for reads and writes.
        compute_s: seconds spent computing (and casting) in blocks and head.
        peak_memory: bytes, the most the process held, as the operating system counts it.
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
        last: the last `loss_and_grads`.
    """

    def __init__(self, reader, residency, activations):
        self._reader, self._residency, self._activations = reader, residency, activations
        self._peak_memory = 0
        self._cache: ActivationCache | None = None
        self._journal: Journal | None = None
        self._from_cache = 0  # micro-batches so far that began at stored activations
        self.last = StepStats()

    def count_stored(self, cache: ActivationCache) -> None:
        """From now on count what activations stored there cost."""
        self._cache = cache

    def count_journal(self, journal: Journal) -> None:
        """From now on count what finished blocks written there cost."""
        self._journal = journal

    def began_at_stored(self) -> None:
        """A micro-batch began at its stored activations."""
        self._from_cache += 1

    @property
    def total(self) -> StepStats:
        """Everything since the model was opened."""
        peak = max(self._peak_memory, platform.peak_memory())
        reader, spilled = self._reader, self._activations
        read, written = reader.bytes_read + spilled.bytes_read, spilled.bytes_written
        held_up = spilled.wait_s  # while a block was computed
        waited = reader.wait_s
        if (cache := self._cache) is not None:
            read, written = read + cache.bytes_read, written + cache.bytes_written
            held_up, waited = held_up + cache.write_wait_s, waited + cache.read_wait_s
        if (journal := self._journal) is not None:
            written, held_up = written + journal.bytes_written, held_up + journal.wait_s
        computed = self._residency.compute_s - held_up
        return StepStats(read, written, self._from_cache, waited + held_up, computed, peak)

    def begin_step(self) -> None:
        self._at_begin, self._begin_s = self.total, time.perf_counter()
        self._read_at_begin = self._reader.bytes_read, self._reader.read_s
        self._peak_memory = self._at_begin.peak_memory
        platform.reset_peak_memory()

    def end_step(self, measurements: Measurements) -> None:
        """A step is over; `measurements` gets its reads, waiting and peak."""
        now, begin = self.total, self._at_begin
        self.last = StepStats(
            now.bytes_read - begin.bytes_read,
            now.bytes_written - begin.bytes_written,
            now.from_cache - begin.from_cache,
            now.wait_s - begin.wait_s,
            now.compute_s - begin.compute_s,
            platform.peak_memory(),
        )
        nbytes, seconds = self._read_at_begin
        read = self._reader.bytes_read - nbytes, self._reader.read_s - seconds
        step_s = time.perf_counter() - self._begin_s
        measurements.finish(*read, self.last.wait_s, self.last.peak_memory, step_s)
