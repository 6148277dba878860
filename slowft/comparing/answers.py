"""A file of answers, a JSON object a line, under a hash of all that decides them: what was asked before is not asked
again, whatever else of a suite has changed.

Answers are appended, and synced to the disk, as they come; a line that a kill cut off is dropped. Of two lines with one
key the later one counts.
"""

import fcntl
import hashlib
import json
import os
import threading
from pathlib import Path
from typing import Any

from ..errors import ConfigError, SlowftError, reason_of
from ..inference.results import append

FORMAT = 1  # of keys: raised when the same key would mean another answer


def key_of(about: dict[str, Any]) -> str:
    """The hash of a request and of who answers it."""
    text = json.dumps([FORMAT, about], sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


class Answers:
    """Answers by key. May be used from several threads; one process at a time.

    Args:
        asks_again: what the file has is not looked at; new answers are appended all the same.

    Raises:
        ConfigError: the file is something else, or another comparison writes it.
        SlowftError: it cannot be read or written.
    """

    def __init__(self, file: Path, asks_again: bool = False):
        self._file, self._lock = file, threading.Lock()
        self._found: dict[str, dict[str, Any]] = {}
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            # what was asked may be private: like recorded requests, it is the user's alone
            self._out = open(file, "a+b", buffering=0, opener=lambda path, flags: os.open(path, flags, 0o600))
        except OSError as e:
            raise SlowftError(f"{file} cannot be written: {reason_of(e)}") from None
        try:
            try:
                fcntl.flock(self._out.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ConfigError(
                    f"{file} is written by another comparison. Wait, or give `cache` another name"
                ) from None
            whole = self._read()
            self._out.truncate(whole)
        except BaseException:
            self._out.close()
            raise
        if asks_again:
            self._found.clear()

    def __enter__(self) -> "Answers":
        return self

    def __exit__(self, *_) -> None:
        with self._lock:
            self._out.close()

    def get(self, key: str) -> dict[str, Any] | None:
        with self._lock:
            return self._found.get(key)

    def add(self, key: str, answer: dict[str, Any]) -> None:
        """Append an answer; when this returns, it is on the disk."""
        line = (json.dumps({"key": key} | answer, ensure_ascii=True) + "\n").encode()
        with self._lock:
            if self._out.closed:  # the comparison has ended while this was asked for
                return
            append(self._out, self._file, line, len(self._found))
            self._found[key] = answer

    def _read(self) -> int:
        """Take up what is there; bytes of whole lines."""
        self._out.seek(0)
        content = self._out.readall()
        whole = content.rfind(b"\n") + 1
        for n, line in enumerate(content[:whole].splitlines(), 1):
            try:
                row = json.loads(line)
                self._found[row.pop("key")] = row
            except (ValueError, KeyError, AttributeError, TypeError):
                raise ConfigError(
                    f"{self._file} line {n} is no answer of slowft compare. Give `cache` another name, or move it away"
                ) from None
        begin = b'{"key": "'
        if not whole and not (content.startswith(begin) or begin.startswith(content)):
            raise ConfigError(f"{self._file} holds no answers of slowft compare. Give `cache` another name")
        return whole
