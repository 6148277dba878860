"""A file of answers, one JSON object a line, which a run continues after it was stopped.

Answers are appended, and synced to the disk, as they are finished. When all are there, they are put in the order of
the prompts. A file of another run's answers, or of anything else, is never changed.
"""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import platform
from ..errors import ConfigError, SlowftError, reason_of
from ..weights.tensorfile import write_file
from ..weights.transfers import append_all
from .generate import Answer
from .prompts import Asked

SAME = ("sampler", "model", "adapter", "emulated")  # keys of a row that must be the same in a run that continues a file


def append(out: io.RawIOBase, file: Path, line: bytes, n_whole: int) -> None:
    """Append a line to an unbuffered file of `n_whole` answers. When this returns, the line is on the disk.

    Raises:
        SlowftError: the file cannot be written.
    """
    try:
        append_all(out, line)
        platform.sync_file(out.fileno())
    except OSError as e:
        raise SlowftError(
            f"{file} cannot be written ({len(line)} bytes): {reason_of(e)}. The {n_whole} answers in it are whole; "
            "give the same command again to go on"
        ) from None


class Results:
    """The answers of one run, in `file`.

    Args:
        about: keys that are the same in all rows: "sampler", "model" and "adapter" (fingerprints), "emulated".

    Attributes:
        done: numbers of the prompts that were answered before.

    Raises:
        ConfigError: the file holds answers of another run.
        SlowftError: the file cannot be read or written.
    """

    def __init__(self, file: Path, prompts: Sequence[Asked], about: dict[str, Any]):
        self._file, self._prompts, self._about = file, list(prompts), about
        self._numbers = {json.dumps(one.id): i for i, one in enumerate(prompts)}
        self._lines: dict[int, bytes] = {}
        whole = self._read()
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._out = open(file, "r+b" if whole else "w+b", buffering=0)
            self._out.truncate(whole)  # removes a line that a kill cut off
            self._out.seek(whole)
        except OSError as e:
            raise SlowftError(f"{file} cannot be written: {e.strerror}") from None
        self.done = set(self._lines)

    def add(self, answer: Answer) -> None:
        """Append an answer."""
        one = self._prompts[answer.number]
        row = {
            "id": one.id,
            "prompt": one.prompt,
            "text": answer.text,
            "finish_reason": answer.finish_reason,
            "prompt_tokens": answer.prompt_tokens,
            "tokens": len(answer.tokens),
            **self._about,
        }
        line = (json.dumps(row, ensure_ascii=False) + "\n").encode()
        append(self._out, self._file, line, len(self._lines))
        self._lines[answer.number] = line

    def finish(self) -> None:
        """Put the answers in order, now that all are there."""
        numbers = list(self._lines)
        self._out.close()
        if numbers == sorted(numbers):
            return
        try:
            write_file(self._file, b"".join(self._lines[number] for number in sorted(numbers)))
        except SlowftError as e:
            raise SlowftError(f"{e}. It has all answers, in the order in which they were finished") from None

    def close(self) -> None:
        self._out.close()

    def _read(self) -> int:
        """Read the answers that are there; returns how many bytes their whole lines take."""
        try:
            content = self._file.read_bytes() if self._file.exists() else b""
        except OSError as e:
            raise SlowftError(f"{self._file} cannot be read: {e.strerror}") from None
        whole = content.rfind(b"\n") + 1
        for n, line in enumerate(content[:whole].splitlines(keepends=True), 1):
            number = self._number(line, n)
            self._lines[number] = line
        return whole

    def _number(self, line: bytes, n: int) -> int:
        """The number of the prompt that a line answers."""
        remedy = "Give another --output, or move it away"
        try:
            row = json.loads(line)
            number = self._numbers.get(json.dumps(row["id"]))
        except (ValueError, KeyError, TypeError):
            raise ConfigError(f"{self._file} line {n} is no answer of slowft generate. {remedy}") from None
        if number is None or row.get("prompt") != _plain(self._prompts[number].prompt):
            raise ConfigError(f"{self._file} line {n} answers a prompt that is not among those given. {remedy}")
        for name in SAME:
            if row.get(name) != _plain(self._about.get(name)):
                raise ConfigError(
                    f"{self._file} line {n} was generated with another {name}: {row.get(name)}, now "
                    f"{self._about.get(name)}. {remedy}"
                )
        return number


def _plain(value: Any) -> Any:
    """The value as it comes back from a JSON file: with lists for tuples, and text keys."""
    return json.loads(json.dumps(value))
