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
        cache: where activations are stored, if they are.
        journal: where finished blocks are, if they are.
        from_cache: micro-batches so far that began there.
    """

    def __init__(self, reader, residency, activations):
        self._reader, self._residency, self._activations = reader, residency, activations
        self._peak_memory = 0
        self.cache: ActivationCache | None = None
        self.journal: Journal | None = None
        self.from_cache = 0
        self.last = StepStats()

    @property
    def total(self) -> StepStats:
        """Everything since the model was opened."""
        peak = max(self._peak_memory, platform.peak_memory())
        reader, spilled = self._reader, self._activations
        read, written = reader.bytes_read + spilled.bytes_read, spilled.bytes_written
        held_up = spilled.wait_s  # while a block was computed
        waited = reader.wait_s
        if self.cache is not None:
            read, written = read + self.cache.bytes_read, written + self.cache.bytes_written
            held_up, waited = held_up + self.cache.write_wait_s, waited + self.cache.read_wait_s
        if self.journal is not None:
            written, held_up = written + self.journal.bytes_written, held_up + self.journal.wait_s
        computed = self._residency.compute_s - held_up
        return StepStats(read, written, self.from_cache, waited + held_up, computed, peak)

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
        measurements.read_nbytes = self._reader.bytes_read - nbytes
        measurements.read_s = self._reader.read_s - seconds
        measurements.wait_s, measurements.peak_nbytes = self.last.wait_s, self.last.peak_memory
        measurements.step_s = time.perf_counter() - self._begin_s
