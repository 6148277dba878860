"""Everything that a run needs to go on as if it had never been stopped, in one file, in place all at once.

Comes in: arrays (adapter, optimizer, order of the data) and numbers (where the run is). Goes out: a safetensors file in
`checkpoints/` of the adapter's directory, or what the newest whole one holds. Never leaves a half-written file under a
checkpoint's name. What lasts, the drive taking it, happens behind the next step; nothing is copied for that.
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
    """What a file holds. `state` is JSON; `file` is where it was read from, `digest` of all that is in it."""

    arrays: dict[str, mx.array]
    state: dict[str, Any]
    file: Path | None = None
    digest: str | None = None


class Checkpoints:
    """The checkpoints of the run that writes its adapter to `directory`; the newest `keep` of them stay."""

    def __init__(self, directory: Path, keep: int):
        self.directory, self._keep = directory / DIRECTORY, keep
        self._writer: ThreadPoolExecutor | None = None
        self._pending: Future | None = None
        self._nbytes = 0  # of the last one's arrays
        self._own: list[Path] = []

    def write(
        self, iteration: int, arrays: Mapping[str, mx.array], state: Mapping[str, Any], only_adds: bool = False
    ) -> Path:
        """Write a checkpoint; `wait` tells when it is on the drive.

        Args:
            only_adds: older ones stay: other processes write theirs now, of this step or the one before.
        Raises:
            AdapterError: it cannot be written, or the one before could not. Earlier checkpoints are untouched.
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
        """End the thread that writes."""
        if self._writer is not None:
            self._writer.shutdown()
            self._writer = None

    def newest(self) -> tuple[Checkpoint | None, list[str]]:
        """(the newest checkpoint that is whole, what is wrong with newer ones)."""
        wrong = []
        for file in reversed(self._files()):
            try:
                return read(file), wrong
            except AdapterError as e:
                wrong.append(str(e))
        return None, wrong

    def _files(self) -> list[Path]:
        found = [(int(m[1]), f) for f in self.directory.glob("*.safetensors") if (m := NAME.fullmatch(f.name))]
        return [file for _, file in sorted(found)]

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
        for other in [] if only_adds else self._files():  # of an earlier run too, which this one does not go on with
            if other not in keep:
                other.unlink(missing_ok=True)

    def _cannot_write(self, error: OSError) -> AdapterError:
        said = cannot_write(self.directory, error, self._nbytes)
        return AdapterError(f"a checkpoint in {said}. Earlier ones are untouched")


def read(file: Path) -> Checkpoint:
    """What the file holds.

    Raises:
        AdapterError: it is no checkpoint, or not as it was written.
    """
    return _read(str(file), file)


def parse(data: bytes, file: Path) -> Checkpoint:
    """What `file` of another machine holds, given its bytes. Raises as `read` does."""
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
    found = hashlib.blake2b(text.encode(), digest_size=16)
    for name, array in sorted(arrays.items()):
        found.update(f"{name} {array.dtype} {array.shape}".encode())
        found.update(memoryview(array.reshape(-1).view(mx.uint8)) if array.size else b"")
    return found.hexdigest()


def check_finite(model) -> None:
    """Raises SlowftError if a trainable parameter is not finite: nothing of it is worth saving."""
    for name, array in tree_flatten(model.trainable_parameters()):
        if not mx.isfinite(array).all().item():  # the last update's doing: no loss has seen it yet
            raise SlowftError(f"{name} is no longer finite, so the adapter is not saved. Lower --learning-rate")
