"""A file of answers, one JSON object a line, each under a hash of all that decides it.

An answer that is in the file is not asked for again, whatever else in the suite has changed. Answers are appended and
synced to the disk as they come. A line that a kill cut off is dropped. If two lines have the same key, the later one
counts.
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

FORMAT = 1  # part of each key, so that a new number makes all answers be asked for again


def key_of(about: dict[str, Any]) -> str:
    """The hash of a request and of who answers it."""
    text = json.dumps([FORMAT, about], sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


class Answers:
    """Answers by key. Several threads may use them, but only one process at a time.

    Args:
        asks_again: answers in the file are ignored. New ones are appended as usual.

    Raises:
        ConfigError: the file holds something else, or another comparison is writing it.
        SlowftError: it cannot be read or written.
    """

    def __init__(self, file: Path, asks_again: bool = False):
        self._file, self._lock = file, threading.Lock()
        self._by_key: dict[str, dict[str, Any]] = {}
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            # what was asked may be private, so only the user may read the file, as with recorded requests
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
            self._out.truncate(self._read())
        except BaseException:
            self._out.close()
            raise
        if asks_again:
            self._by_key.clear()

    def __enter__(self) -> "Answers":
        return self

    def __exit__(self, *_) -> None:
        with self._lock:
            self._out.close()

    def get(self, key: str) -> dict[str, Any] | None:
        with self._lock:
            return self._by_key.get(key)

    def add(self, key: str, answer: dict[str, Any]) -> None:
        """Append an answer. It is on the disk when this returns."""
        line = (json.dumps({"key": key} | answer, ensure_ascii=True) + "\n").encode()
        with self._lock:
            if self._out.closed:  # the comparison ended before this answer came
                return
            append(self._out, self._file, line, len(self._by_key))
            self._by_key[key] = answer

    def _read(self) -> int:
        """Read the answers in the file. Returns how many bytes its complete lines have."""
        self._out.seek(0)
        content = self._out.readall()
        complete_nbytes = content.rfind(b"\n") + 1
        for n, line in enumerate(content[:complete_nbytes].splitlines(), 1):
            try:
                row = json.loads(line)
                self._by_key[row.pop("key")] = row
            except (ValueError, KeyError, AttributeError, TypeError):
                raise ConfigError(
                    f"{self._file} line {n} is no answer of slowft compare. Give `cache` another name, or move it away"
                ) from None
        begin = b'{"key": "'
        if not complete_nbytes and not (content.startswith(begin) or begin.startswith(content)):
            raise ConfigError(f"{self._file} holds no answers of slowft compare. Give `cache` another name")
        return complete_nbytes
