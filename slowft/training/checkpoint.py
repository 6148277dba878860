"""Writes and reads checkpoints: one file with all that a run needs to go on as if it had never been stopped.

Comes in: arrays (adapter, optimizer, order of the data) and numbers (where the run is). Goes out: a safetensors file in
`checkpoints/` of the adapter's directory, or the contents of the newest whole one. Never leaves a half-written file
under a checkpoint's name. A thread waits for the drive during the next step, which needs no copy of the arrays.
"""

import hashlib
import io
import json
import os
import re
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from ..errors import AdapterError, SlowftError, printable
from ..weights.tensorfile import cannot_write, load_arrays, save_arrays, sync, sync_directory

FORMAT = 1
DIRECTORY = "checkpoints"
NAME = re.compile(r"(\d{7,})\.safetensors")


@dataclass
class Checkpoint:
    """What a file holds. `state` is JSON, `file` is where it was read from, `digest` is a hash of the contents."""

    arrays: dict[str, mx.array]
    state: dict[str, Any]
    file: Path | None = None
    digest: str | None = None


class Checkpoints:
    """The checkpoints of the run that writes its adapter to `directory`. The newest `keep` are kept."""

    def __init__(self, directory: Path, keep: int):
        self.directory, self._keep = directory / DIRECTORY, keep
        self._writer: ThreadPoolExecutor | None = None
        self._pending: Future | None = None
        self._nbytes = 0  # size of the last checkpoint's arrays
        self._own: list[Path] = []  # written by this run

    def write(
        self, iteration: int, arrays: Mapping[str, mx.array], state: Mapping[str, Any], only_adds: bool = False
    ) -> Path:
        """Write a checkpoint. It is on the drive when `wait` has returned.

        Args:
            only_adds: remove no older file, because other processes write checkpoints of this step or the one before.
        Raises:
            AdapterError: this checkpoint or the one before it cannot be written. Earlier checkpoints are untouched.
        """
        self.wait()
        file = self.directory / f"{iteration:07d}.safetensors"
        partial = self.directory / f".{file.name}.{os.getpid()}.tmp.safetensors"
        self._nbytes = sum(array.nbytes for array in arrays.values())
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            text = json.dumps(state)
            metadata = {"slowft": text, "format": str(FORMAT), "digest": digest(arrays, text)}
            save_arrays(partial, arrays, metadata)
        except OSError as e:
            partial.unlink(missing_ok=True)
            raise self._cannot_write(e) from None
        self._writer = self._writer or ThreadPoolExecutor(1, thread_name_prefix="slowft-checkpoint")
        self._pending = self._writer.submit(self._put, partial, file, only_adds)
        return file

    def wait(self) -> None:
        """Return when the last checkpoint is on the drive.

        Raises:
            AdapterError: it could not be written.
        """
        if self._pending is not None:
            pending, self._pending = self._pending, None
            try:
                pending.result()
            except OSError as e:
                raise self._cannot_write(e) from None

    def close(self) -> None:
        """End the writing thread."""
        if self._writer is not None:
            self._writer.shutdown()
            self._writer = None

    def newest(self) -> tuple[Checkpoint | None, list[str]]:
        """(The newest checkpoint that is whole, what is wrong with newer ones)."""
        problems = []
        for file in reversed(self._files()):
            try:
                return read(file), problems
            except AdapterError as e:
                problems.append(str(e))
        return None, problems

    def _files(self) -> list[Path]:
        numbered = [(int(m[1]), f) for f in self.directory.glob("*.safetensors") if (m := NAME.fullmatch(f.name))]
        return [file for _, file in sorted(numbered)]

    def _put(self, partial: Path, file: Path, only_adds: bool) -> None:
        try:
            sync(partial)
            os.replace(partial, file)
            sync_directory(self.directory)
        except OSError:
            partial.unlink(missing_ok=True)
            raise
        self._own = [other for other in self._own if other != file] + [file]
        keep = self._own[-self._keep :]
        for other in [] if only_adds else self._files():  # those of an earlier run go too
            if other not in keep:
                other.unlink(missing_ok=True)

    def _cannot_write(self, error: OSError) -> AdapterError:
        reason = cannot_write(self.directory, error, self._nbytes)
        return AdapterError(f"a checkpoint in {reason}. Earlier ones are untouched")


def read(file: Path) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        AdapterError: the file is no checkpoint, or differs from what was written.
    """
    return _read(str(file), file)


def parse(data: bytes, file: Path) -> Checkpoint:
    """The checkpoint in `file` of another machine, from the file's bytes. Raises as `read` does."""
    return _read(io.BytesIO(data), file)


def _read(source: str | io.BytesIO, file: Path) -> Checkpoint:
    try:
        if isinstance(source, str):
            arrays, metadata = load_arrays(file)
        else:
            arrays, metadata = mx.load(source, format="safetensors", return_metadata=True)
            mx.eval(arrays)
        text = metadata["slowft"]
        state = json.loads(text)
    except Exception as e:  # MLX raises several kinds for a damaged file
        raise AdapterError(
            f"{file} is not a whole checkpoint ({printable(str(e).splitlines()[0] if str(e) else repr(e))})"
        ) from None
    if metadata.get("format") != str(FORMAT):
        raise AdapterError(f"{file} was written by another version of slowft (format {metadata.get('format')})")
    if metadata.get("digest") != digest(arrays, text):
        raise AdapterError(f"{file} is damaged: it is not what was written")
    return Checkpoint(arrays, state, file, metadata["digest"])


def digest(arrays: Mapping[str, mx.array], text: str) -> str:
    """A hash of everything in a checkpoint."""
    hashed = hashlib.blake2b(text.encode(), digest_size=16)
    for name, array in sorted(arrays.items()):
        hashed.update(f"{name} {array.dtype} {array.shape}".encode())
        hashed.update(memoryview(array.reshape(-1).view(mx.uint8)) if array.size else b"")
    return hashed.hexdigest()


def check_finite(model) -> None:
    """Raises SlowftError if a trainable parameter is not finite: such an adapter is not worth saving."""
    for name, array in tree_flatten(model.trainable_parameters()):
        if not mx.isfinite(array).all().item():  # the last update can cause it, and no loss has shown it yet
            raise SlowftError(f"{name} is no longer finite, so the adapter is not saved. Lower --learning-rate")
