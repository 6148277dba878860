"""Writes the checksums of a model directory into its `slowft.json`, and verifies them at the speed of the drive.

Comes in: a directory. Goes out: the manifest, or what is wrong with which tensor of which file. Without a manifest,
what can be checked is checked. Nothing but the manifest is changed.
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
# The files of a directory that mlx-lm reads (mlx_lm.utils.DEFAULT_ALLOW_PATTERNS). No other file can change a result.
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
        checked_with: "manifest"; "hub" if there is no manifest but the hub's hash of every weight file was known and
            compared; else "nothing", so that a changed bit is not noticed if the number stays finite.
        faults: empty if all is well.
        notes: what else a person should know of the files, a sentence each.
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
        made: where the model comes from, for people who read the manifest.
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
    """Write the manifest. `files` are its entries."""
    write_file(directory / NAME, encode(made, files))


def encode(made: dict[str, Any], files: dict[str, dict]) -> bytes:
    return (json.dumps({"format": 1, "made": made, "files": dict(sorted(files.items()))}, indent=1) + "\n").encode()


def entry_of(contents: bytes) -> dict:
    """The manifest's entry for a file with these contents that holds no weights."""
    return {"nbytes": len(contents), "sha256": hashlib.sha256(contents).hexdigest()}


def load(file: Path) -> dict[str, Any]:
    """Read a manifest. Raises ModelError if the file cannot be read or is no manifest."""
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
    """Compare a model directory with its manifest, or check what can be checked without one. Every byte is read.

    Args:
        path: a directory.
        progress: is called with (bytes done, bytes in all), from other threads, one call at a time.
    Raises:
        ModelError: the directory does not exist or holds no model.
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
        result = verify_entries(directory, manifest["files"], progress)
        for name in sorted(p.name for p in directory.iterdir()):
            if name != NAME and name not in manifest["files"] and any(fnmatch.fnmatch(name, u) for u in USED):
                result.faults.append(Fault(name, None, "is not in the manifest, and mlx-lm would read it"))
        return result
    return _verify_without_manifest(directory, progress)


def verify_entries(directory: Path, files: dict[str, dict], progress: Progress | None = None) -> Verification:
    """Compare files of a directory with their entries in a manifest."""
    result = Verification(directory, "manifest")
    checks: list[tuple[Segment, str, Fault]] = []  # (what to hash, the expected hash, the fault if it is another)
    for name, entry in files.items():
        file = directory / name
        result.n_files += 1
        result.n_tensors += len(entry.get("tensors", ()))
        result.nbytes += entry["nbytes"]
        if not file.is_file():
            result.faults.append(Fault(name, None, "is missing"))
            continue
        size = file.stat().st_size
        is_whole = size == entry["nbytes"]
        parts = _hashed_parts(entry)
        if not is_whole:
            result.faults.append(Fault(name, None, _wrong_size(size, entry["nbytes"], parts)))
        for tensor, offset, nbytes, expected, problem in parts:
            if offset + nbytes <= size and (is_whole or "tensors" in entry):
                checks.append((Segment(str(file), offset, nbytes), expected, Fault(name, tensor, problem)))
    digests = _hash([segment for segment, _, _ in checks], progress)
    for digest, (_, expected, fault) in zip(digests, checks):
        if isinstance(digest, ModelError):
            result.faults.append(Fault(fault.file, fault.tensor, f"cannot be read: {digest}"))
        elif digest != expected:
            result.faults.append(fault)
    return result


def _hashed_parts(entry: dict) -> list[tuple[str | None, int, int, str, str]]:
    """Parts of a file that have hashes of their own: (tensor, offset, bytes, hash, problem if it is another).

    They are its header and its tensors. A file of no tensors is one part.
    """
    changed = "has changed (its SHA-256 is another)"
    if "tensors" not in entry:
        return [(None, 0, entry["nbytes"], entry["sha256"], changed)]
    start = min((t["offset"] for t in entry["tensors"].values()), default=entry["nbytes"])
    header = (None, 0, start, entry["header_sha256"], "has a changed header (its SHA-256 is another)")
    tensors = entry["tensors"].items()
    return [header, *((name, t["offset"], t["nbytes"], t["sha256"], changed) for name, t in tensors)]


def _wrong_size(size: int, expected: int, parts: list[tuple[str | None, int, int, str, str]]) -> str:
    problem = f"{'is cut short' if size < expected else 'is too long'}: {size} bytes, the manifest has {expected}"
    incomplete = [tensor for tensor, offset, nbytes, *_ in parts if tensor and offset + nbytes > size]
    if incomplete:
        more = f" and {len(incomplete) - 1} more" if len(incomplete) > 1 else ""
        problem += f"; tensor {incomplete[0]}{more} incomplete"
    return problem


def _hash(segments: list[Segment], progress: Progress | None) -> list[str | ModelError]:
    return scan(segments, (Sha256() for _ in segments), _counting(segments, progress))


def _counting(segments: list[Segment], progress: Progress | None) -> Callable[[int], None] | None:
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
    result = Verification(directory, "nothing")
    extents = _verify_headers(result)
    hashes = {file: sha for file in {e.file for e in extents} if (sha := _hash_of_hub(Path(file)))}
    if hashes and len(hashes) == result.n_files:
        result.checked_with = "hub"
    floats = [e for e in extents if e.dtype in EXPONENTS]
    segments = [Segment(e.file, e.offset, e.nbytes) for e in floats]
    segments += [Segment(file, 0, Path(file).stat().st_size) for file in hashes]
    consumers = [NotFinite(e.dtype) for e in floats] + [Sha256() for _ in hashes]
    scanned = scan(segments, consumers, _counting(segments, progress))
    for e, first in zip(floats, scanned):
        name = Path(e.file).name
        if isinstance(first, ModelError):
            result.faults.append(Fault(name, e.name, f"cannot be read: {first}"))
        elif first is not None:
            result.faults.append(Fault(name, e.name, f"holds NaN or infinity, first at element {first}"))
    for (file, expected), digest in zip(hashes.items(), scanned[len(floats) :]):
        if digest != expected:
            result.faults.append(Fault(Path(file).name, None, "is not what the hub has: its SHA-256 is another"))
    return result


def _verify_headers(result: Verification) -> list:
    """Check headers, sizes and the index. Returns the extents of the files whose headers are sound."""
    extents: dict[str, Any] = {}
    wrong = None
    try:
        weights = find_model_weights(result.path)
        files, result.notes = weights.files, weights.notes
    except ModelError as e:  # every weight file there is gets checked, so that all faults are named
        files, wrong = sorted(result.path.glob("model*.safetensors")), e
        if not files:
            raise
    for file in files:
        result.n_files += 1
        try:
            own = read_header(file)
        except ModelError as e:
            result.faults.append(Fault(file.name, None, str(e).removeprefix(f"{file}").lstrip(": ")))
            continue
        size = file.stat().st_size
        result.nbytes += size
        result.n_tensors += len(own)
        end = min((e.offset for e in own.values()), default=size)
        for e in sorted(own.values(), key=lambda e: e.offset):
            if e.offset != end:
                result.faults.append(
                    Fault(file.name, e.name, f"begins at byte {e.offset}, the one before ends at {end}")
                )
            end = e.offset + e.nbytes
        if end != size:
            result.faults.append(Fault(file.name, None, f"has {size} bytes, its tensors end at {end}"))
        for name in sorted(own.keys() & extents.keys()):
            result.faults.append(Fault(file.name, name, f"is in {Path(extents[name].file).name} as well"))
        extents |= own
    if not (result.path / "config.json").exists():
        result.faults.append(Fault("config.json", None, "is missing"))
    if wrong is not None and not result.faults:
        result.faults.append(Fault(INDEX, None, str(wrong)))
    return list(extents.values())


def _hash_of_hub(file: Path) -> str | None:
    """The SHA-256 that huggingface-hub had for a downloaded file: blobs in its cache have it as their name."""
    blob = file.resolve().name if file.is_symlink() else ""
    return blob if re.fullmatch("[0-9a-f]{64}", blob) else None
