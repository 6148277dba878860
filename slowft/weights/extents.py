"""Finds which files of a directory are the model, and where each tensor lies in them, from headers alone.

Comes in: a model directory (one file, shards with an index, or a hub snapshot of symlinks). Goes out: a map of
tensor name -> `Extent`, which alone decides which files are used. Headers and file sizes are read, never tensor data,
and no file is mapped into memory.
Format: https://github.com/huggingface/safetensors#format
"""

import json
import math
import os
import re
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from json.decoder import scanstring
from pathlib import Path
from typing import Any

from ..errors import ModelError, reason_of
from .inside import check_inside, is_inside
from .recognise import AGAIN, PARTIAL, explain, partial_downloads, read_json

SPACES = re.compile(r"[ \t\n\r]*")

# Each safetensors type that MLX reads -> (the dtype it becomes in MLX (mlx/io/safetensors.cpp), its size in bytes).
DTYPES = {
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U64": ("uint64", 8),
    "U32": ("uint32", 4),
    "U16": ("uint16", 2),
    "U8": ("uint8", 1),
    "BOOL": ("bool_", 1),
    "F8_E4M3": ("uint8", 1),
    "F8_E8M0": ("uint8", 1),
}

MAX_HEADER_NBYTES = 100_000_000  # the limit of the safetensors library
MAX_LENGTH = 2**31 - 1  # of an axis: MLX keeps shapes as 32-bit integers
MAX_OFFSET = 2**63 - 1  # in a file
MAX_NAME = 500  # characters of a tensor's name
MAX_ENTRY = 10_000  # characters of a tensor's entry in the header
MAX_AXES = 32  # real tensors have at most five; the product of very many lengths would take minutes


@dataclass(frozen=True, slots=True)
class Extent:
    """Where one tensor lies: `nbytes` bytes at `offset` of `file`. `shape` and `dtype` (MLX's name) are the array's.

    `stored` is the file's own name of the type. It tells 8-bit floats from bytes.
    """

    name: str
    file: str
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]
    stored: str = ""

    @property
    def row_nbytes(self) -> int:
        """Bytes of one entry along the first axis."""
        return self.nbytes // self.shape[0]


def read_header(path: str | os.PathLike) -> dict[str, Extent]:
    """The extents of one safetensors file, by tensor name.

    Raises:
        ModelError: it is not a safetensors file, it is cut short, or its header contradicts itself.
    """
    path = Path(path)
    if not path.exists():
        raise _missing(path)
    if not path.is_file():
        raise ModelError(f"{path} is a directory, a pipe or a device, not a safetensors file. {AGAIN}")
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            prefix = file.read(8)
            (header_nbytes,) = struct.unpack("<Q", prefix) if len(prefix) == 8 else (0,)
            if not 2 <= header_nbytes <= MAX_HEADER_NBYTES:
                raise ModelError(
                    explain(path, f"a safetensors file ({size} bytes)")
                    or f"{path} is not a safetensors file ({size} bytes). {AGAIN}"
                )
            if 8 + header_nbytes > size:
                raise ModelError(
                    f"{path} is cut short: its header alone needs {8 + header_nbytes} bytes, the file has {size}. "
                    "Download it again"
                )
            header = file.read(header_nbytes)
    except OSError as e:
        raise ModelError(f"{path} cannot be read: {reason_of(e)}") from None
    start, extents = 8 + header_nbytes, {}
    try:
        for name, entry in _entries(header.decode()):
            if name in extents:
                raise ValueError("a key is there twice")
            extents[name] = _extent(path, name, entry, start, size)
    except RecursionError:
        raise ModelError(f"{path} has a corrupt header (it is nested too deeply). Download it again") from None
    except ValueError as e:
        raise ModelError(f"{path} has a corrupt header ({e}). Download it again") from None
    return extents


def _extent(path: Path, name: str, entry: Any, start: int, size: int) -> Extent:
    """The extent that a header's entry describes, in a file of `size` bytes whose data begin at `start`."""
    if not _is_name(name):
        raise ValueError(f"a tensor's name is {ascii(name[:40])}")
    try:
        stored, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not (_is_name(stored) and isinstance(shape, list) and len(shape) <= MAX_AXES):
            raise ValueError
        if not all(_is_size(n, MAX_LENGTH) for n in shape):
            raise ValueError
        if not (_is_size(begin, MAX_OFFSET) and _is_size(end, MAX_OFFSET)):
            raise ValueError
    except (TypeError, KeyError, ValueError):
        raise ModelError(f"{path}: the header entry of tensor {name} is malformed. Download it again") from None
    if stored not in DTYPES:
        raise ModelError(f"{path}: tensor {name} is of type {stored}, which MLX does not read")
    dtype, itemsize = DTYPES[stored]
    if end - begin != math.prod(shape) * itemsize:
        raise ModelError(
            f"{path}: tensor {name} {shape} of {stored} needs {math.prod(shape) * itemsize} bytes, "
            f"its header gives {end - begin}. Download it again"
        )
    if start + end > size:
        raise ModelError(
            f"{path} is cut short: tensor {name} ends at byte {start + end}, the file has {size}. Download it again"
        )
    return Extent(name, str(path), start + begin, end - begin, dtype, tuple(shape), stored)


def _entries(text: str) -> Iterator[tuple[str, Any]]:
    """(name, entry) of each tensor in a header, as MLX's and safetensors' parsers take it: no NaN, no half characters.

    Entries are parsed one after the other, so that a wrong one is found before the next is made. Parsed as a whole,
    100 MB of brackets took 2.7 GB.

    Raises:
        ValueError: the text is not such a header.
    """
    decoder = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse_constant)
    at, has_metadata = _expect(text, _expect(text, 0, "{") + 1, '"', "}"), False
    while text[at] != "}":
        name, end = _string(text, at)
        at = SPACES.match(text, _expect(text, end, ":") + 1).end()
        if name == "__metadata__":
            if has_metadata:
                raise ValueError("a key is there twice")
            has_metadata, end = True, _skip_metadata(text, at)
        else:
            end = text.find("}", at) + 1
            is_object = text.startswith("{", at) and 0 < end - at <= MAX_ENTRY
            entry = decoder.decode(text[at:end]) if is_object else None
            if is_object and "\\u" in text[at:end]:
                json.dumps(entry, ensure_ascii=False).encode()  # raises for half a character
            yield name, entry
            end = end if is_object else at
        at = _next_key(text, end)
    _expect(text, at + 1, "")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(entries := dict(pairs)) < len(pairs):
        raise ValueError("a key is there twice")
    return entries


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _expect(text: str, at: int, *allowed: str) -> int:
    """The place of the next character after spaces. It has to be one of `allowed`; "" stands for the end."""
    at = SPACES.match(text, at).end()
    if text[at : at + 1] not in allowed:
        raise ValueError(f"character {at} is not {' or '.join(allowed) or 'the end'}")
    return at


def _next_key(text: str, at: int) -> int:
    """The place of the next key of an object after a value that ends at `at`, or of the bracket that closes it."""
    at = _expect(text, at, ",", "}")
    return _expect(text, at + 1, '"') if text[at] == "," else at


def _string(text: str, at: int) -> tuple[str, int]:
    """(the JSON string that begins at or after `at`, where it ends)"""
    string, end = scanstring(text, _expect(text, at, '"') + 1)
    if "\\u" in text[at:end]:
        string.encode()  # raises for half a character
    return string, end


def _skip_metadata(text: str, at: int) -> int:
    """Where the metadata that begin at `at` end: an object of strings, which nobody needs here, or null."""
    if text.startswith("null", at):
        return at + 4
    at = _expect(text, _expect(text, at, "{") + 1, '"', "}")
    while text[at] != "}":
        _, end = _string(text, _expect(text, _string(text, at)[1], ":") + 1)
        at = _next_key(text, end)
    return at + 1


def _is_size(n: object, most: int) -> bool:
    return type(n) is int and 0 <= n <= most  # (isinstance takes True for an int)


def _is_name(name: object) -> bool:
    """Whether an error can show it on one line."""
    return isinstance(name, str) and name.isprintable() and len(name) <= MAX_NAME


@dataclass(frozen=True)
class Weights:
    """The tensors of a model by name, and what a person should know about the files around them, a sentence each."""

    extents: dict[str, Extent]
    notes: list[str] = field(default_factory=list)

    @property
    def files(self) -> list[Path]:
        """The files that the tensors lie in."""
        return sorted({Path(e.file) for e in self.extents.values()})


INDEX = "model.safetensors.index.json"
SHARD = re.compile(r"(.*?)-?(\d+)-of-(\d+)\.safetensors")
# (tensors, names in the index that are not among them) -> whether the tensors are the whole model nevertheless
IsWhole = Callable[[dict[str, Extent], Iterable[str]], bool]


def index_model(directory: str | os.PathLike) -> dict[str, Extent]:
    """The extents of every tensor of the model in `directory`, as far as index and headers can tell.

    Raises:
        ModelError: as `find_weights` does.
    """
    return find_weights(directory).extents


def find_weights(directory: str | os.PathLike, is_whole: IsWhole | None = None) -> Weights:
    """Find which files of a directory are the model, and where its tensors lie.

    If there is an index and all of its files exist, these files are the model, and no others. If one is missing, the
    existing files are the model if they hold all tensors of the index, or if `is_whole` says so. Without an index, the
    files `model*.safetensors` are the model as long as no two hold the same tensor. If two do, the model is a set of
    files that belong together by their names (`model.safetensors`, or `model-00001-of-00003.safetensors` and so on).

    Args:
        is_whole: called only where index and names are not enough; None if nobody can say.
    Raises:
        ModelError: there are no weights, a needed shard is missing, files contradict each other, or a file is cut
            short, corrupt, or not inside the directory.
    """
    directory = Path(directory)
    check_inside(directory)
    model_files = sorted(directory.glob("model*.safetensors"))
    weight_map, notes = _read_index(directory / INDEX)
    if weight_map:
        weights = _by_index(directory, model_files, weight_map, is_whole)
    else:
        weights = _by_names(directory, model_files, is_whole)
    if not weights.extents:
        raise ModelError(_explain_no_weights(directory))
    notes += weights.notes
    if unused := _unused(directory, weights.files):
        shown = ", ".join(unused[:3]) + (f" and {len(unused) - 3} more" if len(unused) > 3 else "")
        notes.append(f"{directory}: not part of the model, and not used: {shown}")
    return Weights(weights.extents, notes)


def _read_index(file: Path) -> tuple[dict[str, str], list[str]]:
    """(tensor name -> file name, notes). The map is empty if there is no index, or if it is not a valid one."""
    if not file.exists():
        return {}, []
    try:
        weight_map = dict(read_json(file)["weight_map"].items())
        if weight_map and all(_is_name(n) and isinstance(shard, str) and shard for n, shard in weight_map.items()):
            return weight_map, []
    except (ModelError, KeyError, TypeError, AttributeError):
        pass
    return {}, [f"{file} is not a safetensors index (it has no weight_map of tensors to files): not used"]


def _by_index(
    directory: Path, model_files: list[Path], weight_map: dict[str, str], is_whole: IsWhole | None
) -> Weights:
    named = sorted(set(weight_map.values()))
    if outside := [name for name in named if not is_inside(name)]:
        raise ModelError(
            f"{directory / INDEX} names {ascii(outside[0][:100])}, which is no file inside the model's directory. "
            "Download the model again"
        )
    missing_files = [name for name in named if not (directory / name).exists()]
    existing = [directory / name for name in named if name not in missing_files and name.endswith(".safetensors")]
    loaded = [file for file in existing if file in model_files] or existing  # those that mlx-lm loads
    extents: dict[str, Extent] = {}
    for file in existing:
        if (header := read_header(file) if file in loaded else _header_or_none(file)) is not None:
            extents |= {n: e for n, e in header.items() if n not in extents or weight_map.get(n) == file.name}
    loaded_extents = {name: e for name, e in extents.items() if Path(e.file) in loaded}
    missing_tensors = {name: shard for name, shard in weight_map.items() if name not in extents}

    def is_model(candidate: dict[str, Extent]) -> bool:
        return is_whole is not None and is_whole(candidate, weight_map.keys() - candidate.keys())

    if not missing_tensors:
        # beside mlx-lm's files, the index may name heads for several tokens at once, which mlx-lm does not load
        used = loaded_extents if len(loaded) < len(existing) and is_model(loaded_extents) else extents
        if set(model_files) <= set(existing) or is_whole is None or is_model(used):
            return Weights(used)
    candidates = [loaded_extents, extents, _header_or_none(directory / "model.safetensors")]
    try:
        candidates.append(_by_names(directory, model_files, None).extents)
    except ModelError:  # what is wrong with the index is the error to show
        pass
    for candidate in candidates:
        if candidate and ((missing_tensors and weight_map.keys() <= candidate.keys()) or is_model(candidate)):
            return Weights(candidate, [_stale(directory / INDEX, missing_tensors, missing_files)])
    if not missing_tensors:
        return Weights(extents)  # files are not what is wrong with it
    name, shard = next(iter(missing_tensors.items()))
    if missing_files:
        raise _missing(directory / missing_files[0], f", and {INDEX} names it")
    raise ModelError(f"{INDEX} puts tensor {name} in {shard}, which does not hold it. Download the model again")


def _header_or_none(file: Path) -> dict[str, Extent] | None:
    try:
        return read_header(file)
    except ModelError:
        return None


def _stale(index: Path, missing_tensors: dict[str, str], missing_files: list[str]) -> str:
    """The note on an index that does not fit its files.

    Args:
        missing_tensors: tensor name -> file name, of tensors that no file holds.
        missing_files: names of files that do not exist.
    """
    if missing_files:
        return f"{index} names {missing_files[0]}, which is not here; the files that are here hold the whole model"
    if missing_tensors:
        name, shard = next(iter(missing_tensors.items()))
        return f"{index} puts {name} in {shard}, which does not hold it; the files hold the whole model without it"
    return f"{index} does not name all of the model; the files beside it hold the rest"


def _by_names(directory: Path, model_files: list[Path], is_whole: IsWhole | None) -> Weights:
    """The model without an index: all files, or the first that belong together by name if two hold the same tensor."""
    sets: dict[str, list[Path]] = {}
    for file in model_files:
        shard = SHARD.fullmatch(file.name)
        sets.setdefault(f"{shard[1]} of {shard[3]}" if shard else file.name, []).append(file)
    # transformers' order: the single file, then the shards of the plain name
    order = sorted(sets, key=lambda name: (name != "model.safetensors", not name.startswith("model of "), name))
    first_is_usual = bool(order) and (order[0] == "model.safetensors" or order[0].startswith("model of "))
    extents: dict[str, Extent] = {}
    used: list[Path] = []
    for name in order:
        if used and first_is_usual:  # files beside it may be anything, and are ignored if they cannot be read
            headers = [_header_or_none(file) or {} for file in sets[name]]
        else:
            headers = [read_header(file) for file in sets[name]]
        of_set = {n: e for header in headers for n, e in header.items()}
        duplicate = next((n for n in of_set if n in extents), None)
        if duplicate is None:
            extents |= of_set
            used += sets[name] if of_set else []
        elif not first_is_usual:
            other = Path(extents[duplicate].file).name
            raise ModelError(
                f"{directory}: {other} and {Path(of_set[duplicate].file).name} both hold {duplicate}, and no index "
                "says which one counts. Move one of them elsewhere"
            )
    missing_file = _missing_of_numbered(used)
    if missing_file and is_whole is not None and not is_whole(extents, ()):
        raise _missing(directory / missing_file, ", by the names of the files beside it")
    return Weights(extents)


def _missing_of_numbered(files: list[Path]) -> str | None:
    """The first missing name of `model-00001-of-00003.safetensors` and so on; None if none is missing."""
    names = {file.name for file in files}
    for file in files:
        if shard := SHARD.fullmatch(file.name):
            start = file.name[: shard.start(2)]
            for i in range(1, min(int(shard[3]), 10_000) + 1):
                name = f"{start}{i:0{len(shard[2])}d}-of-{shard[3]}.safetensors"
                if name not in names:
                    return name
    return None


def _unused(directory: Path, files: list[Path]) -> list[str]:
    return sorted(
        file.name
        for file in directory.glob("*.safetensors")
        if file not in files and not file.name.startswith(".") and not file.is_dir()
    )


def _missing(file: Path, why_needed: str = "") -> ModelError:
    """The error for a file that does not exist, or is a link to one that does not."""
    dangling = " (a broken link: the download did not finish)" if file.is_symlink() else ""
    partial = partial_downloads(file.parent, file.name)
    reason = f"{partial[0].name} is an unfinished download. " if partial else ""
    fix = f"{reason}Download the model again: hf download goes on where it stopped"
    return ModelError(f"{file} is missing{dangling}{why_needed}. {fix}")


def _explain_no_weights(directory: Path) -> str:
    others = sorted(p.name for p in directory.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".gguf", ".safetensors"))
    adapter = [name for name in others if name.startswith("adapter")]
    gguf = [name for name in others if name.endswith(".gguf")]
    pytorch = [name for name in others if name.endswith((".bin", ".pt", ".pth"))]
    found = f" (found {', '.join(others[:3])}, which mlx-lm does not load)" if others else ""
    fix = "Look for a copy of the model in safetensors"
    partial = sorted(p.name for p in directory.iterdir() if p.name.endswith(PARTIAL) and ".safetensors" in p.name)
    if partial:
        found = f" ({partial[0]} is an unfinished download)"
        fix = "Download the model again: hf download goes on where it stopped"
    elif gguf:
        fix = f"Prepare it: slowft prepare {directory / gguf[0]} --output {Path(gguf[0]).stem}"
    elif adapter:
        found = f" (found {adapter[0]}: an adapter)"
        fix = "Give the base model that the adapter was trained on"
    elif pytorch:
        found = f" (found {', '.join(pytorch[:3])}: PyTorch's own format, which mlx-lm does not load)"
        fix = (
            "Look for a copy in safetensors, or write one where PyTorch is installed: transformers' "
            "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW)"
        )
    return f"{directory} has no model*.safetensors{found}. {fix}"
