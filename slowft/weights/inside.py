"""Checks that the files a model makes us read lie inside it: in its directory, or in its own tree of the hub's cache.

Comes in: the directory of a model, and names of files that the model's own files give. Goes out: yes or no, or an
error that names the file. No file is opened. A person may put links to anywhere into a directory; a download may not.
"""

import os
from pathlib import Path, PurePath

from ..errors import ModelError

MAX_NAME = 255  # bytes of a file's name, in most file systems
# what slowft, mlx-lm and transformers open in a model's directory
READ = (".json", ".jsonl", ".safetensors", ".jinja", ".model", ".txt", ".tiktoken", ".py")


def is_inside(name: object) -> bool:
    """Whether this is the name of a file in the directory that it is relative to, or in one below."""
    if not isinstance(name, str) or not name.isprintable() or not 0 < len(name.encode()) <= MAX_NAME:
        return False
    return not PurePath(name).is_absolute() and ".." not in PurePath(name).parts


def check_inside(directory: Path) -> None:
    """Refuse a directory with a pipe or device where a file is read, or a hub snapshot whose links leave its tree.

    Raises:
        ModelError: names the file.
    """
    trees = _trees(Path(os.path.abspath(directory))) or _trees(_real(directory))
    for file in [directory, *sorted(directory.rglob("*") if trees else directory.glob("*"))]:
        if trees and not any(_real(file).is_relative_to(tree) for tree in trees):
            raise ModelError(
                f"{file} is a link to {_real(file)}, outside the model's own part of the hub's cache. Download the "
                "model again, or make a directory elsewhere for links of your own"
            )
        if file.suffix in READ and file.exists() and not (file.is_file() or file.is_dir()):
            raise ModelError(f"{file} is a pipe or a device, not a file. Download it again")


def _trees(directory: Path) -> list[Path]:
    """Where the files of a hub snapshot may lie (a person may have moved the blobs to another drive); else []."""
    cache = directory.parent.parent
    if directory.parent.name == "snapshots" and (cache.name.startswith("models--") or (cache / "blobs").is_dir()):
        return [_real(cache), _real(cache / "blobs")]
    return []


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))  # `Path.resolve` raises if links form a circle
