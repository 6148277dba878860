"""A child memory cgroup, version 1 or 2: the kernel's own count, page cache and swap included. Needs root."""

import os
import subprocess
import sys
import uuid
from contextlib import contextmanager
from pathlib import Path

V1 = Path("/sys/fs/cgroup/memory")
V2 = Path("/sys/fs/cgroup")


def why_unavailable() -> str | None:
    """None if a memory limit can be set here, else the reason."""
    if sys.platform != "linux":
        return "cgroups are Linux's"
    try:
        with limit(1 << 30):
            return None
    except OSError as e:
        return f"no memory cgroup can be made ({e}); run as root"


@contextmanager
def limit(nbytes: int):
    """A cgroup whose processes may use `nbytes` of memory, cache and swap together; gives its directory."""
    name = f"slowft-test-{uuid.uuid4().hex[:8]}"
    if V1.is_dir():
        own = next(line for line in Path("/proc/self/cgroup").read_text().splitlines() if ":memory:" in line)
        parent = V1 / own.split(":", 2)[2].lstrip("/")
        group = (parent if parent.is_dir() else V1) / name
        limits = {"memory.limit_in_bytes": nbytes, "memory.memsw.limit_in_bytes": nbytes}
    else:
        own = Path("/proc/self/cgroup").read_text().strip().split("::", 1)[1]
        group = (V2 / own.lstrip("/")).parent / name
        limits = {"memory.max": nbytes, "memory.swap.max": 0}
    group.mkdir()
    try:
        for file, value in limits.items():
            if (group / file).exists() or "memsw" not in file:  # memsw needs swap accounting
                (group / file).write_text(str(value))
        yield group
    finally:
        group.rmdir()


def run(command: list[str], nbytes: int, **kwargs) -> tuple[subprocess.CompletedProcess, int]:
    """The finished process, run under the limit, and the most bytes the kernel counted for it."""
    with limit(nbytes) as group:

        def enter():
            (group / "cgroup.procs").write_text(str(os.getpid()))

        done = subprocess.run(command, preexec_fn=enter, capture_output=True, text=True, **kwargs)
        # with swap where version 1 counts it; version 2 allows none
        counters = ("memory.memsw.max_usage_in_bytes", "memory.max_usage_in_bytes") if V1.is_dir() else ("memory.peak",)
        peaks = [int((group / name).read_text()) for name in counters if (group / name).exists()]
        return done, max(peaks, default=0)
