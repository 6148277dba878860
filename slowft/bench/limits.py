"""Limits of the measured processes, by control groups: on Linux, root can give any machine a laptop's proportions."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError
from . import cgroup
from .workload import Workload


@dataclass(frozen=True)
class Limits:
    """Limits of memory and of reads; None: no limit."""

    memory_nbytes: int | None = None
    read_bytes_per_s: int | None = None

    def check(self, workload: Workload) -> None:
        """Raises ConfigError if the limits cannot be enforced here."""
        given = {"--limit-memory": self.memory_nbytes, "--limit-read": self.read_bytes_per_s}
        options = [name for name, value in given.items() if value is not None]
        if options and (reason := cgroup.why_unavailable(workload.files[0] if self.read_bytes_per_s else None)):
            raise ConfigError(f"{' and '.join(options)}: {reason}")

    @contextmanager
    def group(self, workload: Workload, memory: bool = True) -> Iterator[cgroup.Group | None]:
        """The control group for the workload's processes; None if there is nothing to limit.

        Args:
            memory: False for a process that needs the whole model in memory.
        """
        memory_nbytes = self.memory_nbytes if memory else None
        if memory_nbytes is None and self.read_bytes_per_s is None:
            yield None
        else:
            with cgroup.limit(memory_nbytes, self.read_bytes_per_s, workload.files) as group:
                yield group

    def on(self, machine: dict[str, Any]) -> dict[str, Any]:
        """The machine's figures under these limits."""
        rates = [rate for rate in (machine["read_bytes_per_s"], self.read_bytes_per_s) if rate is not None]
        return machine | {"read_bytes_per_s": min(rates, default=None)}

    def as_dict(self) -> dict[str, int | None]:
        return {"memory_nbytes": self.memory_nbytes, "read_bytes_per_s": self.read_bytes_per_s}
