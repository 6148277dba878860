"""Checksums of a model directory, in its `slowft.json`: written once, and verified at the speed of the drive.

Comes in: a directory. Goes out: the manifest, or what is wrong with which tensor of which file. A directory without
a manifest is checked for what can be checked. Changes nothing but the manifest.
"""

import fnmatch
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ModelError
from ..models.building import find_model_weights
from ..models.directories import snapshot_of_cache
from ..weights.extents import INDEX, read_header
from ..weights.inside import check_inside, is_inside
from ..weights.tensorfile import UNFINISHED, write_file
from .scan import EXPONENTS, NotFinite, Segment, Sha256, scan

NAME = "slowft.json"
JOURNAL = "slowft.journal"  # the manifest of a directory that is not finished
# what mlx-lm reads of a directory (mlx_lm.utils.DEFAULT_ALLOW_PATTERNS): nothing else there can change a result
USED = ("*.json", "model*.safetensors", "*.py", "tokenizer.model", "*.tiktoken", "*.txt", "*.jsonl", "*.jinja")

Progress = Callable[[int, int], None]  # (bytes done, bytes in all)


@dataclass(frozen=True)
class Fault:
    """What is wrong with a file, or with one tensor in it."""

    file: str
    tensor: str | None
    problem: str

    def __str__(self) -> str:
        return f"{self.file}: " + (f"tensor {self.tensor} " if self.tensor else "") + self.problem


@dataclass
class Verification:
    """What `verify` found.

    Attributes:
        checked_with: "manifest"; "hub" if there is none and every weight file was compared with the hash that the hub
            gave for it; else "nothing", so that a changed bit which leaves a number finite goes unseen.
        faults: empty if all is well.
        notes: what a person should know of the files besides, a sentence each.
    """

    path: Path
    checked_with: str
    n_files: int = 0
    n_tensors: int = 0
    nbytes: int = 0
    faults: list[Fault] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


# --- Writing ----------------------------------------------------------------------------------------


def write_manifest(directory: Path, made: dict[str, Any], progress: Progress | None = None) -> None:
    """Hash every file of a finished model directory and write its manifest.

    Args:
        made: where the model comes from, for whoever reads the manifest.
    Raises:
        ModelError: a file cannot be read.
        SlowftError: the manifest cannot be written.
    """
    entries: dict[str, dict] = {}
    segments: dict[tuple, Segment] = {}
    for file in sorted(directory.iterdir()):
        if not file.is_file() or file.name == NAME or file.name.startswith(".") or file.name.endswith(UNFINISHED):
            continue
        size = file.stat().st_size
        entries[file.name] = {"nbytes": size}
        segments[file.name, "sha256"] = Segment(str(file), 0, size)
        if file.suffix == ".safetensors":
            extents = read_header(file)
            start = min((e.offset for e in extents.values()), default=size)
            segments[file.name, "header_sha256"] = Segment(str(file), 0, start)
            entries[file.name]["tensors"] = {
                name: {"offset": e.offset, "nbytes": e.nbytes} for name, e in extents.items()
            }
            for name, e in extents.items():
                segments[file.name, "tensors", name, "sha256"] = Segment(str(file), e.offset, e.nbytes)
    for (*path, last), digest in zip(segments, _hash(list(segments.values()), progress)):
        if isinstance(digest, ModelError):
            raise digest
        entry: dict = entries
        for key in path:
            entry = entry[key]
        entry[last] = digest
    save(directory, made, entries)


def save(directory: Path, made: dict[str, Any], files: dict[str, dict]) -> None:
    """Write the manifest of files whose checksums are known."""
    write_file(directory / NAME, encode(made, files))


def encode(made: dict[str, Any], files: dict[str, dict]) -> bytes:
    return (json.dumps({"format": 1, "made": made, "files": dict(sorted(files.items()))}, indent=1) + "\n").encode()


def entry_of(contents: bytes) -> dict:
    """The manifest's entry of a file with these contents, other than weights."""
    return {"nbytes": len(contents), "sha256": hashlib.sha256(contents).hexdigest()}


def load(file: Path) -> dict[str, Any]:
    """A manifest.

    Raises:
        ModelError: it cannot be read or is not one.
    """
    try:
        manifest = json.loads(file.read_bytes())
        for name, entry in manifest["files"].items():
            if not is_inside(name):
                raise ValueError
            int(entry["nbytes"]), str(entry["sha256"])
            for tensor in entry.get("tensors", {}).values():
                int(tensor["offset"]), int(tensor["nbytes"]), str(tensor["sha256"])
        return manifest
    except OSError as e:
        raise ModelError(f"{file} cannot be read: {e.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ModelError(f"{file} is damaged: it is not a manifest that slowft prepare wrote") from None


# --- Verifying --------------------------------------------------------------------------------------


def verify(path: str | Path, progress: Progress | None = None) -> Verification:
    """Compare a model directory with its manifest, or check what can be checked without one. Reads all of it.

    Args:
        path: a directory.
        progress: told (bytes done, bytes in all), from other threads, one call at a time.
    Raises:
        ModelError: no such directory, or not a model directory.
    """
    directory = Path(path).expanduser()
    if not directory.is_dir():
        kind = "is a file" if directory.exists() else "does not exist"
        raise ModelError(f"{directory} {kind}. Give the directory of a model")
    directory = snapshot_of_cache(directory) or directory
    check_inside(directory)
    if (directory / JOURNAL).exists() and not (directory / "config.json").exists():
        raise ModelError(f"{directory} is an unfinished slowft prepare or fuse. Run the same command again: it goes on")
    if (directory / NAME).exists():
        manifest = load(directory / NAME)
        found = Verification(directory, "manifest")
        _verify_entries(found, manifest["files"], progress)
        for name in sorted(p.name for p in directory.iterdir()):
            if name != NAME and name not in manifest["files"] and any(fnmatch.fnmatch(name, u) for u in USED):
                found.faults.append(Fault(name, None, "is not in the manifest, and mlx-lm would read it"))
        return found
    return _verify_without_manifest(directory, progress)


def verify_entries(directory: Path, files: dict[str, dict], progress: Progress | None = None) -> list[Fault]:
    """What is wrong with these files of a directory, by their entries of a manifest."""
    found = Verification(directory, "manifest")
    _verify_entries(found, files, progress)
    return found.faults


def _verify_entries(found: Verification, files: dict[str, dict], progress: Progress | None) -> None:
    checks: list[tuple[Segment, str, Fault]] = []  # what to hash, the hash expected, what it is if that is not it
    for name, entry in files.items():
        file = found.path / name
        found.n_files += 1
        found.n_tensors += len(entry.get("tensors", ()))
        found.nbytes += entry["nbytes"]
        if not file.is_file():
            found.faults.append(Fault(name, None, "is missing"))
            continue
        size = file.stat().st_size
        parts = [(None, 0, entry["nbytes"], entry["sha256"], "has changed (its SHA-256 is another)")]
        if "tensors" in entry:  # and the header: together they are the file
            start = min((t["offset"] for t in entry["tensors"].values()), default=entry["nbytes"])
            parts = [(None, 0, start, entry["header_sha256"], "has a changed header (its SHA-256 is another)")]
            parts += [
                (tensor, t["offset"], t["nbytes"], t["sha256"], "has changed (its SHA-256 is another)")
                for tensor, t in entry["tensors"].items()
            ]
        if size != entry["nbytes"]:
            what = "is cut short" if size < entry["nbytes"] else "is too long"
            problem = f"{what}: {size} bytes, the manifest has {entry['nbytes']}"
            cut = [tensor for tensor, offset, nbytes, *_ in parts if tensor and offset + nbytes > size]
            if cut:
                problem += f"; tensor {cut[0]}" + (f" and {len(cut) - 1} more" if len(cut) > 1 else "") + " incomplete"
            found.faults.append(Fault(name, None, problem))
        for tensor, offset, nbytes, expected, problem in parts:
            if offset + nbytes <= size and not (tensor is None and "tensors" not in entry and size != nbytes):
                checks.append((Segment(str(file), offset, nbytes), expected, Fault(name, tensor, problem)))
    digests = _hash([segment for segment, _, _ in checks], progress)
    for digest, (_, expected, fault) in zip(digests, checks):
        if isinstance(digest, ModelError):
            found.faults.append(Fault(fault.file, fault.tensor, f"cannot be read: {digest}"))
        elif digest != expected:
            found.faults.append(fault)


def _hash(segments: list[Segment], progress: Progress | None) -> list[str | ModelError]:
    return scan(segments, (Sha256() for _ in segments), _counted(segments, progress))


def _counted(segments: list[Segment], progress: Progress | None) -> Callable[[int], None] | None:
    if progress is None:
        return None
    total, done = sum(s.nbytes for s in segments), 0
    progress(0, total)

    def count(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress(done, total)

    return count


# --- Without a manifest -----------------------------------------------------------------------------


def _verify_without_manifest(directory: Path, progress: Progress | None) -> Verification:
    found = Verification(directory, "nothing")
    extents = _verify_headers(found)
    hashes = {file: sha for file in {e.file for e in extents} if (sha := _hash_of_hub(Path(file)))}
    if hashes and len(hashes) == found.n_files:
        found.checked_with = "hub"
    floats = [e for e in extents if e.dtype in EXPONENTS]
    segments = [Segment(e.file, e.offset, e.nbytes) for e in floats]
    segments += [Segment(file, 0, Path(file).stat().st_size) for file in hashes]
    consumers = [NotFinite(e.dtype) for e in floats] + [Sha256() for _ in hashes]
    results = scan(segments, consumers, _counted(segments, progress))
    for e, first in zip(floats, results):
        name = Path(e.file).name
        if isinstance(first, ModelError):
            found.faults.append(Fault(name, e.name, f"cannot be read: {first}"))
        elif first is not None:
            found.faults.append(Fault(name, e.name, f"holds NaN or infinity, first at element {first}"))
    for (file, expected), digest in zip(hashes.items(), results[len(floats) :]):
        if digest != expected:
            found.faults.append(Fault(Path(file).name, None, "is not what the hub has: its SHA-256 is another"))
    return found


def _verify_headers(found: Verification) -> list:
    """Headers, sizes, the index. Returns the extents of the files that are sound."""
    extents: dict[str, Any] = {}
    wrong = None
    try:
        weights = find_model_weights(found.path)
        files, found.notes = weights.files, weights.notes
    except ModelError as e:  # each file that may be meant is looked at, so that all faults are named
        files, wrong = sorted(found.path.glob("model*.safetensors")), e
        if not files:
            raise
    for file in files:
        found.n_files += 1
        try:
            own = read_header(file)
        except ModelError as e:
            found.faults.append(Fault(file.name, None, str(e).removeprefix(f"{file}").lstrip(": ")))
            continue
        size = file.stat().st_size
        found.nbytes += size
        found.n_tensors += len(own)
        end = min((e.offset for e in own.values()), default=size)
        for e in sorted(own.values(), key=lambda e: e.offset):
            if e.offset != end:
                found.faults.append(
                    Fault(file.name, e.name, f"begins at byte {e.offset}, the one before ends at {end}")
                )
            end = e.offset + e.nbytes
        if end != size:
            found.faults.append(Fault(file.name, None, f"has {size} bytes, its tensors end at {end}"))
        for name in sorted(own.keys() & extents.keys()):
            found.faults.append(Fault(file.name, name, f"is in {Path(extents[name].file).name} as well"))
        extents |= own
    if not (found.path / "config.json").exists():
        found.faults.append(Fault("config.json", None, "is missing"))
    if wrong is not None and not found.faults:
        found.faults.append(Fault(INDEX, None, str(wrong)))
    return list(extents.values())


def _hash_of_hub(file: Path) -> str | None:
    """The SHA-256 that huggingface-hub noted for a downloaded file: a blob in its cache is named so."""
    blob = file.resolve().name if file.is_symlink() else ""
    return blob if re.fullmatch("[0-9a-f]{64}", blob) else None
