"""Recognises files that are not what their name says: a pointer, an error page, half a download, another format.

Comes in: a file that could not be read as what it should be. Goes out: words for an error message, and how to get the
real file. Only the first bytes are read.
"""

import json
import re
from pathlib import Path
from typing import Any

from ..errors import ModelError, SlowftError, reason_of

FIRST_NBYTES = 4096
PARTIAL = (".incomplete", ".part", ".partial", ".tmp", ".aria2", ".crdownload", ".download")  # unfinished downloads
AGAIN = "Download it again"
# Real files are far smaller. A limit is needed because JSON of nothing but brackets takes 27 times its bytes in Python.
MAX_JSON_NBYTES = 20_000_000
MAX_NBYTES = {"tokenizer.json": 200_000_000, "model.safetensors.index.json": 50_000_000}


def recognise(file: Path) -> tuple[str, str] | None:
    """(what the file is, what to do), or None if it is not recognised.

    This is only for a file that could not be read as what its name says: a good safetensors file may begin with any
    byte.
    """
    try:
        size = file.stat().st_size
        with open(file, "rb") as opened:
            start = opened.read(FIRST_NBYTES)
    except OSError:
        return None
    return recognise_start(start, size)


def recognise_start(start: bytes, size: int) -> tuple[str, str] | None:
    """The same as `recognise`, from a file's first bytes and its size."""
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n")
    if size == 0:
        return "an empty file: the download did not get it", AGAIN
    if start.startswith((b"version https://git-lfs", b"version https://hawser", b"# xet version")):
        return (
            f"a pointer of git's large-file storage ({size} bytes) in place of the file",
            "Run git lfs pull in the clone, or download the model with hf download",
        )
    if not start.strip(b"\0"):
        return "filled with zeros: the download did not finish", AGAIN
    if start.startswith(b"PK"):
        kind = "a PyTorch file (torch.save)" if b"data.pkl" in start else "a zip archive"
        return kind, "Get the safetensors file: a renamed one is none"
    if re.match(rb"\x80[\x02-\x05]", start) and size > 2:
        return "a Python pickle, such as a PyTorch file", "Get the safetensors file: a renamed one is none"
    for magic, kind in (
        (b"GGUF", "a GGUF file"),
        (b"\x89HDF", "an HDF5 file"),
        (b"\x93NUMPY", "a NumPy file"),
        (b"\x1f\x8b", "a gzip archive"),
        (b"\x28\xb5\x2f\xfd", "a zstd archive"),
        (b"\xfd7zXZ", "an xz archive"),
    ):
        if start.startswith(magic):
            fix = "Give it the name .gguf, then: slowft prepare" if magic == b"GGUF" else "Get the safetensors file"
            return kind, fix
    if start[257:262] == b"ustar":
        return "a tar archive", "Unpack it"
    if text.startswith(b"<"):
        kind = "an XML page" if text.startswith((b"<?xml", b"<Error")) else "an HTML page"
        return f"{kind} that a server sent in place of the file ({_excerpt(text)})", f"{AGAIN}, logged in if it asks"
    if text[:1] in (b"{", b"["):
        return f"JSON that a server sent in place of the file ({_excerpt(text)})", f"{AGAIN}, logged in if it asks"
    if _is_text(start):
        return f"text ({_excerpt(text)})", f"{AGAIN}, logged in if it asks"
    return None


def explain(file: Path, expected: str) -> str | None:
    """One line for an error: `file` is not `expected` but what it is, and what to do. None if it is not recognised."""
    if (recognised := recognise(file)) is None:
        return None
    kind, fix = recognised
    return f"{file} is not {expected} but {kind}. {fix}"


def read_json(file: Path, error: type[SlowftError] = ModelError) -> Any:
    """The contents of a JSON file.

    Raises:
        SlowftError: of the class `error`. The file cannot be read, or is something else under that name.
    """
    try:
        most = MAX_NBYTES.get(file.name, MAX_JSON_NBYTES)
        if (nbytes := file.stat().st_size) > most:
            raise error(f"{file} is not JSON that can be read: it has {nbytes} bytes, no such file has {most}")
        content = file.read_bytes()
    except OSError as e:
        dangling = " (a broken link: the download did not finish)" if file.is_symlink() and not file.exists() else ""
        raise error(f"{file} cannot be read: {reason_of(e)}{dangling}") from None
    try:
        return json.loads(content.decode("utf-8"))  # json.loads of bytes takes half characters, which mlx-lm refuses
    except RecursionError:
        raise error(f"{file} is not JSON that can be read: it is nested too deeply") from None
    except ValueError as e:  # (also from bytes that are not text)
        kind, fix = recognise(file) or ("", "")
        if kind and not kind.startswith(("JSON", "text")):
            raise error(f"{file} is not JSON but {kind}. {fix}") from None
        reason = f"{e}: it is {kind}" if kind.startswith("text") else str(e)
        raise error(f"{file} is not JSON ({reason})") from None


def partial_downloads(directory: Path, name: str) -> list[Path]:
    """Files that unfinished downloads of `name` left, beside it and where huggingface-hub keeps its own."""
    beside = [directory / f"{name}{ending}" for ending in PARTIAL]
    # `hf download --local-dir` names them by hashes, so it is not known which file they belong to
    cache = directory / ".cache" / "huggingface" / "download"
    return [file for file in beside if file.exists()] + sorted(cache.glob("**/*.incomplete"))


def _excerpt(text: bytes) -> str:
    words = re.sub(r"<[^>]*>|\s+", " ", text[:400].decode("utf-8", "replace")).split()
    shown = " ".join(words)
    return f'"{shown[:60]}..."' if len(shown) > 60 else f'"{shown}"'


def _is_text(start: bytes) -> bool:
    try:
        decoded = start.decode("utf-8")
    except UnicodeDecodeError as e:
        if e.start < len(start) - 4:  # else it may be a character that is cut in two
            return False
        decoded = start[: e.start].decode("utf-8")
    return len(decoded) > 3 and all(c.isprintable() or c in "\r\n\t" for c in decoded)
