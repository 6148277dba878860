"""Runs a step of making data: files in, files out, counts of what was left out and why.

When its output is complete, a step writes a manifest: hashes of its inputs, its options, hashes of its outputs, and
the counts. A step is skipped if its manifest would be the same now.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import DataError, reason_of
from ..models.loading import find_local
from ..reports.base import Report, late
from .rows import Out, Row, noted, written

FORMAT = 1  # after a change of this number all steps are run again


@dataclass
class Counts:
    """Counts of a step's rows.

    Attributes:
        left_out: reason -> rows.
        about: what only some steps count.
        was_done: the step was skipped, and this is what it counted before.
    """

    name: str
    came_in: int = 0
    went_out: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    was_done: bool = False

    def leave_out(self, why: str) -> None:
        self.left_out[why] = self.left_out.get(why, 0) + 1

    def as_dict(self) -> dict[str, Any]:
        left_out = dict(sorted(self.left_out.items(), key=lambda item: (-item[1], item[0])))
        return {"in": self.came_in, "out": self.went_out, "left_out": left_out} | self.about

    def sentence(self) -> str:
        """A line such as "rules: 90 of 100 rows; left out: 7 cut off, 3 empty"."""
        reasons = ", ".join(f"{n:,} {why}" for why, n in self.as_dict()["left_out"].items())
        of_all = f" of {self.came_in:,}" if self.came_in >= self.went_out else ""
        left_out = f"; left out: {reasons}" if reasons else ""
        return f"{self.name}: {self.went_out:,}{of_all} rows{left_out}" + " (done before)" * self.was_done


def run(
    name: str,
    manifest: Path,
    inputs: Sequence[Path],
    outputs: Sequence[Path],
    options: dict[str, Any],
    work: Callable[[Counts, list[Out]], None],
    optional: Sequence[Path] = (),
    made: Sequence[Path] = (),
) -> Counts:
    """Run a step, unless it was done before.

    Args:
        work: called with the counts to fill and the outputs to write.
        optional: outputs that are removed if they would be empty.
        made: further outputs, which `work` writes itself.
    """
    all_outputs = [*outputs, *made]
    about = json.loads(json.dumps({"format": FORMAT, "step": name, "options": options}))
    about["inputs"] = [digest(file) for file in inputs]
    before = _read(manifest)
    if before is not None and {key: before.get(key) for key in about} == about:
        if before.get("outputs") == {file.name: digest(file) for file in all_outputs if file.exists()}:
            rest = dict(before["counts"])
            came_in, went_out, left_out = (rest.pop(key) for key in ("in", "out", "left_out"))
            return Counts(name, came_in, went_out, left_out, rest, was_done=True)
    counts = Counts(name)
    with written(*outputs, optional=optional) as outs:
        work(counts, outs)
    about["outputs"] = {file.name: digest(file) for file in all_outputs if file.exists()}
    with written(manifest) as (out,):
        out.text(json.dumps(about | {"counts": counts.as_dict()}, indent=1, ensure_ascii=False) + "\n")
    return counts


def digest(file: Path) -> str:
    """A hash of a file's contents."""
    try:
        with open(file, "rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest()
    except OSError as e:
        raise DataError(f"{file} cannot be read: {reason_of(e)}") from None


def files_of(model: str) -> list[tuple[str, Any]]:
    """Values that identify the model's files: names and sizes of its weights, and its configuration."""
    directory = find_local(model)
    if directory is None:
        return []
    files: list[tuple[str, Any]] = sorted((file.name, file.stat().st_size) for file in directory.glob("*.safetensors"))
    return files + [(n, digest(directory / n)) for n in ("config.json",) if (directory / n).exists()]


def _read(manifest: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(manifest.read_text())
        return content if isinstance(content, dict) and isinstance(content.get("counts"), dict) else None
    except (OSError, ValueError):
        return None


def sift(
    sifted: Iterable[tuple[Row, dict[str, Any], str | None]],
    counts: Counts,
    kept: Out,
    left_out: Out | None,
    report: Report,
    total: int,
) -> None:
    """Write each (row, entry for its history, why it is left out) to the file where it belongs, and count it."""
    for row, entry, why in late(report, sifted, counts.name.capitalize(), total):
        counts.came_in += 1
        entry = {"step": counts.name} | entry
        if why is None:
            counts.went_out += 1
            kept.row(noted(row, entry))
        else:
            counts.leave_out(why)
            if left_out is not None:
                left_out.row(noted(row, entry | {"left_out": why}))
