"""Writes how a run stands to a small file beside its adapter, which `slowft status` reads.

Comes in: what the trainer knows after a step. Goes out: `status.json`, replaced all at once. A run never stops because
this file cannot be written.
"""

import json
import math
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import AdapterError

FILE = "status.json"
EVERY_S = 1.0


class Status:
    """Writes the status of a run to `directory`, once a second at most."""

    def __init__(self, directory: Path):
        self._file, self._written_at = directory / FILE, 0.0
        self._begin = time.time()

    def write(self, state: str, **fields: Any) -> None:
        """Write the status. `state` is running, finished, stopped or failed."""
        if state == "failed" and not self._written_at:  # the run had not begun
            return
        if state == "running" and time.monotonic() - self._written_at < EVERY_S:
            return
        self._written_at = time.monotonic()
        entries = {"state": state, "pid": os.getpid(), "began": self._begin, "written": time.time(), **fields}
        entries = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in entries.items()}
        partial = self._file.with_name(f".{FILE}.{os.getpid()}.tmp")
        with suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            try:
                partial.write_text(json.dumps(entries, indent=1))
                os.replace(partial, self._file)
            finally:
                partial.unlink(missing_ok=True)


def read(directory: Path) -> dict[str, Any]:
    """The status of the run that writes to `directory`; its state is "killed" if the process ended without a word.

    Raises:
        AdapterError: there is none.
    """
    file = directory / FILE
    try:
        status = json.loads(file.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise AdapterError(
            f"{directory} has no {FILE}: no run writes its adapter there. Give its --adapter-path"
        ) from None
    except (OSError, ValueError) as e:
        raise AdapterError(f"{file} cannot be read: {e}") from None
    if status.get("state") == "running" and not _is_alive(status.get("pid", 0)):
        status["state"] = "killed"
    return status


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
