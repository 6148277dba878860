"""A step of making data: files in, files out, counts of what was left out and why. Done again only after a change.

When its output is there whole, a step writes a manifest: hashes of what came in, its options, hashes of what went out,
and the counts. A step whose manifest is as it would be now is skipped.
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

FORMAT = 1  # a change makes what was done before be done again


@dataclass
class Counts:
    """Rows into and out of a step; `left_out` counts by reason, `about` is of some steps only."""

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
        """Such as "rules: 90 of 100 rows; left out 7 cut off, 3 empty"."""
        reasons = ", ".join(f"{n:,} {why}" for why, n in self.as_dict()["left_out"].items())
        rows = (
            f"{self.went_out:,} of {self.came_in:,} rows"
            if self.came_in >= self.went_out
            else f"{self.went_out:,} rows"
        )
        return (
            f"{self.name}: {rows}" + (f"; left out: {reasons}" if reasons else "") + (" (done before)" * self.was_done)
        )


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
    """Do a step, unless it was done.

    Args:
        work: is handed the counts to fill, and the outputs to write.
        optional: those of the outputs that are not there if they would be empty.
        made: more outputs, that it writes by itself.
    """
    every = [*outputs, *made]
    about = json.loads(json.dumps({"format": FORMAT, "step": name, "options": options}))
    about["inputs"] = [digest(file) for file in inputs]
    before = _read(manifest)
    if before is not None and {key: before.get(key) for key in about} == about:
        if before.get("outputs") == {file.name: digest(file) for file in every if file.exists()}:
            counts, rest = before["counts"], dict(before["counts"])
            for key in ("in", "out", "left_out"):
                rest.pop(key)
            return Counts(name, counts["in"], counts["out"], counts["left_out"], rest, True)
    counts = Counts(name)
    with written(*outputs, optional=optional) as outs:
        work(counts, outs)
    about["outputs"] = {file.name: digest(file) for file in every if file.exists()}
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
    """What tells that a model is another one: names and sizes of its weights, and its configuration."""
    directory = find_local(model)
    if directory is None:
        return []
    files: list[tuple[str, Any]] = sorted((file.name, file.stat().st_size) for file in directory.glob("*.safetensors"))
    return files + [(n, digest(directory / n)) for n in ("config.json",) if (directory / n).exists()]


def _read(manifest: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(manifest.read_text())
        return found if isinstance(found, dict) and isinstance(found.get("counts"), dict) else None
    except (OSError, ValueError):
        return None


def sift(
    found: Iterable[tuple[Row, dict[str, Any], str | None]],
    counts: Counts,
    kept: Out,
    left_out: Out | None,
    report: Report,
    total: int,
) -> None:
    """Write (row, what its history says, why it is left out) to where each belongs; a row that was kept says so too."""
    for row, entry, why in late(report, found, f"{counts.name}".capitalize(), total):
        counts.came_in += 1
        entry = {"step": counts.name} | entry
        if why is None:
            counts.went_out += 1
            kept.row(noted(row, entry))
        else:
            counts.leave_out(why)
            if left_out is not None:
                left_out.row(noted(row, entry | {"left_out": why}))
