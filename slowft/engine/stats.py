"""What a step cost, as counted by the reader, the clock and the operating system."""

from dataclasses import dataclass

from .. import platform


@dataclass
class StepStats:
    """Counts over one step, or over all steps.

    Attributes:
        bytes_read: from the weight files, embedding rows included.
        wait_s: seconds the computation waited for reads.
        compute_s: seconds spent computing (and casting) in blocks and head.
        peak_memory: bytes, the most the process held, as the operating system counts it.
    """

    bytes_read: int = 0
    wait_s: float = 0.0
    compute_s: float = 0.0
    peak_memory: int = 0


class Stats:
    """Costs of an opened model's steps.

    Attributes:
        last: the last `loss_and_grads`.
    """

    def __init__(self, reader, residency):
        self._reader, self._residency = reader, residency
        self._peak_memory = 0
        self.last = StepStats()

    @property
    def total(self) -> StepStats:
        """Everything since the model was opened."""
        peak = max(self._peak_memory, platform.peak_memory())
        return StepStats(self._reader.bytes_read, self._reader.wait_s, self._residency.compute_s, peak)

    def begin_step(self) -> None:
        self._at_begin = self.total
        self._peak_memory = self._at_begin.peak_memory
        platform.reset_peak_memory()

    def end_step(self) -> None:
        now, begin = self.total, self._at_begin
        self.last = StepStats(
            now.bytes_read - begin.bytes_read,
            now.wait_s - begin.wait_s,
            now.compute_s - begin.compute_s,
            platform.peak_memory(),
        )
