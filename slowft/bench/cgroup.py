"""Limits a process's memory (with page cache and swap) and its rate of reads by a control group, version 1 or 2.

This needs Linux and root; `why_unavailable` says what is missing. Other systems cannot limit a process in this way.
"""

import os
import shlex
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError

ROOT = Path("/sys/fs/cgroup")
V1 = ROOT / "memory"


@dataclass(frozen=True)
class Group:
    """A control group. It has one directory, or under version 1 one for each controller."""

    directories: tuple[Path, ...]

    def entered(self, command: list[str]) -> list[str]:
        """A command that enters the group and then becomes `command`."""
        enter = "".join(f"echo $$ > {shlex.quote(str(d / 'cgroup.procs'))} && " for d in self.directories)
        return ["sh", "-c", enter + 'exec "$@"', "sh", *command]

    @property
    def makeup(self) -> dict[str, int]:
        """Bytes that the kernel counts now, by kind: memory of processes (anon, rss), of files (file, cache), ..."""
        lines = [line.split() for d in self.directories for line in _read(d / "memory.stat").splitlines()]
        kinds = "rss", "cache", "mapped_file", "anon", "file", "file_mapped", "kernel", "file_dirty", "dirty"
        return {name: int(nbytes) for name, nbytes in lines if name in kinds}

    @property
    def peak_nbytes(self) -> int | None:
        """The most bytes that the kernel counted. Version 1 includes swap if it counts it; under 2 none is allowed."""
        names = "memory.memsw.max_usage_in_bytes", "memory.max_usage_in_bytes", "memory.peak"
        files = [d / name for d in self.directories for name in names if (d / name).exists()]
        return max((int(file.read_text()) for file in files), default=None)


@contextmanager
def limit(
    memory_nbytes: int | None = None, read_bytes_per_s: int | None = None, files: Iterable[Path] = ()
) -> Iterator[Group]:
    """A group whose processes may use so much memory, and read so fast from the drives that hold `files`.

    Raises:
        OSError: this process is not root's, or the kernel lacks the controller.
        ConfigError: the files are not on a drive whose reads can be limited.
    """
    limits: dict[str, dict[str, list[str]]] = {}  # controller -> file -> what to write to it
    is_v1 = V1.is_dir()
    if memory_nbytes is not None:
        names = ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes") if is_v1 else ("memory.max",)
        limits["memory"] = {name: [str(memory_nbytes)] for name in names}
        if not is_v1:
            limits["memory"]["memory.swap.max"] = ["0"]
    if read_bytes_per_s is not None:
        drives = sorted({drive_of(file) for file in files})
        if is_v1:
            limits["blkio"] = {"blkio.throttle.read_bps_device": [f"{drive} {read_bytes_per_s}" for drive in drives]}
        else:
            limits["io"] = {"io.max": [f"{drive} rbps={read_bytes_per_s}" for drive in drives]}
    name = f"slowft-{uuid.uuid4().hex[:8]}"
    if is_v1:
        groups = {controller: _own(controller) / name for controller in limits}
    else:
        parent = _own("").parent if _own("") != ROOT else ROOT
        groups = dict.fromkeys(limits, parent / name)
        _enable(parent, limits)
    directories = tuple(dict.fromkeys(groups.values()))
    try:
        for directory in directories:
            directory.mkdir()
        for controller, entries in limits.items():
            for file, values in entries.items():
                path = groups[controller] / file
                for value in values:
                    # the files for swap are there only if the kernel counts swap
                    if path.exists() or not file.startswith(("memory.memsw", "memory.swap")):
                        path.write_text(value)
        yield Group(directories)
    finally:
        for directory in directories:
            if directory.exists():
                directory.rmdir()


def _own(controller: str) -> Path:
    """This process's group for a controller; "" is version 2's. In a container that cannot see its group, the root."""
    root = ROOT / controller if controller else ROOT
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            group = root / path.lstrip("/")
            return group if group.is_dir() else root
    return root


def _enable(parent: Path, controllers: Iterable[str]) -> None:
    enabled = (parent / "cgroup.subtree_control").read_text().split()
    for controller in controllers:
        if controller not in enabled:
            (parent / "cgroup.subtree_control").write_text(f"+{controller}")


def drive_of(file: Path) -> str:
    """ "major:minor" of the whole drive that holds a file, because partitions cannot be limited.

    Raises:
        ConfigError: the file is not on one drive, but for example in memory or on btrfs.
    """
    device = os.stat(file).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    block = Path("/sys/dev/block") / number
    if not block.exists():
        raise ConfigError(
            f"reads from {file} cannot be limited: device {number} is no drive. To fix it: files on a disk "
            "(XDG_CACHE_HOME, or --model), or leave --limit-read out"
        )
    block = block.resolve()
    drive = block.parent if (block / "partition").exists() else block
    return (drive / "dev").read_text().strip()


def why_unavailable(read_from: Path | None = None) -> str | None:
    """Why memory (with `read_from`, also reads of that file) cannot be limited here; None if it can."""
    if sys.platform != "linux":
        return "control groups are Linux's"
    try:
        with limit(1 << 30, None if read_from is None else 1 << 30, () if read_from is None else [read_from]):
            return None
    except (OSError, ConfigError) as e:
        return f"no control group can be made ({e}); run as root"


def run(
    command: list[str], nbytes: int, read_bytes_per_s: int | None = None, files: Iterable[Path] = (), **kwargs
) -> tuple[subprocess.CompletedProcess, int]:
    """Run a command within `nbytes` of memory. Returns the finished process and the most bytes the kernel counted.

    If the process was killed, its `stderr` ends with the kernel's count at the highest that was seen.

    Args:
        read_bytes_per_s, files: see `limit`.
    """
    with limit(nbytes, read_bytes_per_s, files) as group, _highest_makeup(group) as highest:
        done = subprocess.run(group.entered(command), capture_output=True, text=True, **kwargs)
        if done.returncode == -signal.SIGKILL:
            done.stderr += f"Killed. The kernel's count, when seen at its highest: {highest}\n"
        return done, group.peak_nbytes or 0


@contextmanager
def _highest_makeup(group: Group, every_s: float = 0.02) -> Iterator[dict[str, int]]:
    """A dict with the largest `makeup` of the group so far. A thread looks every 20 ms while this is entered."""
    highest: dict[str, int] = {}
    is_over = threading.Event()

    def look():
        while not is_over.wait(every_s):
            makeup = group.makeup
            if sum(makeup.values()) > sum(highest.values()):
                highest.update(makeup)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield highest
    finally:
        is_over.set()
        thread.join()


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""
