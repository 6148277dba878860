"""The directory that a model is written to: it is locked, journalled, and becomes a model only when it is finished.

Comes in: a `Conversion`, and a function that fills one file of weights. An unfinished directory is continued.
"""

import fcntl
import json
import os
from collections.abc import Callable
from pathlib import Path

from ..errors import ModelError, SlowftError, reason_of
from ..weights.tensorfile import UNFINISHED, TensorFile, header, sync_directory, write_file
from ..weights.transfers import free_nbytes
from . import verify as manifest
from .conversion import INDEX, Conversion
from .parts import File


def refuse_unusable(output: Path) -> None:
    """Raises SlowftError if `output` exists and is neither empty nor an unfinished run."""
    if not output.exists():
        return
    if not output.is_dir():
        raise SlowftError(f"{output} is a file. Give a directory for the model to be written")
    names = set(os.listdir(output))
    if names and manifest.JOURNAL not in names:
        if manifest.NAME in names:
            raise SlowftError(
                f"{output} holds a finished model already. Check it (slowft verify {output}) or give another directory"
            )
        raise SlowftError(f"{output} is not empty and not slowft's. Give another --output")


def check_free_space(directory: Path, needed: int, unfinished: int = 0) -> None:
    """Raises SlowftError if a directory's disk has less than `needed` bytes free or taken by `unfinished` files."""
    free = free_nbytes(directory) + unfinished
    if free < needed:
        raise SlowftError(
            f"{directory} needs {needed / 1e6:,.0f} MB, and its disk has {free / 1e6:,.0f} MB free. "
            "Make room, or give another --output"
        )


class OutputDirectory:
    """A directory that is being written. No other process can write to it meanwhile.

    Its journal, `slowft.journal`, exists from before the first file until after the last one. That is config.json,
    without which no program takes the directory for a model.

    Attributes:
        done: the manifest's entries of finished files, by name.
    """

    def __init__(self, directory: Path, conversion: Conversion, note: Callable[[str], None]):
        self._directory, self._conversion, self._note = directory, conversion, note
        self.done: dict[str, dict] = {}
        self._identity, self._command = conversion.identity(), conversion.transform.command
        self._copied = conversion.copied()

    def __enter__(self) -> "OutputDirectory":
        if not self._directory.exists():
            self.check_room()  # before anything is created
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(self._directory, os.O_RDONLY)
        except OSError as e:
            raise SlowftError(f"{self._directory} cannot be created: {e.strerror}") from None
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._fd)
            message = f"another slowft {self._command} is writing to {self._directory}. Let it finish"
            raise SlowftError(message) from None
        return self

    def __exit__(self, *exception) -> None:
        os.close(self._fd)

    def keep_finished(self, progress: manifest.Progress | None) -> None:
        """Keep what an earlier run finished. Raises SlowftError if that run had other arguments."""
        refuse_unusable(self._directory)
        journal = self._directory / manifest.JOURNAL
        if not journal.exists():
            return
        try:
            earlier = manifest.load(journal)
            identity, files = earlier["made"], earlier["files"]
        except (ModelError, KeyError):
            identity, files = {}, {}
        differing = [key for key, value in self._identity.items() if identity.get(key) != value]
        if differing:
            raise SlowftError(
                f"{self._directory} holds an unfinished slowft {self._command} of another job (other {differing[0]}). "
                "Delete it, or give another --output"
            )
        faults = {fault.file for fault in manifest.verify_entries(self._directory, files, progress).faults}
        names = {file.name for file in self._conversion.files}
        self.done = {name: entry for name, entry in files.items() if name in names and name not in faults}
        n, n_damaged = len(self.done), len(names & files.keys() & faults)
        again = f"; {n_damaged} damaged since, written again" if n_damaged else ""
        self._note(f"Going on with an earlier run: {n} of {len(names)} files are there{again}")

    def check_room(self) -> None:
        """Raises SlowftError if the disk has too little room for what is not written yet."""
        needed = sum(f.nbytes + len(header(f.tensors)) for f in self._conversion.files if f.name not in self.done)
        needed += sum(file.stat().st_size for file in self._copied) + (1 << 20)
        unfinished = [self._directory / (f.name + UNFINISHED) for f in self._conversion.files]
        check_free_space(self._directory, needed, sum(file.stat().st_size for file in unfinished if file.exists()))

    def write(self, file: File, fill: Callable[[TensorFile, File], None], max_pending_nbytes: int) -> None:
        """Write one file of weights, which `fill` fills, and enter it in the journal."""
        try:
            if not (self._directory / manifest.JOURNAL).exists():
                self._write_journal()  # before the first byte, so that whatever is in the directory is known to be ours
            out = TensorFile(self._directory / file.name, file.tensors, max_pending_nbytes)
            try:
                fill(out, file)
                self.done[file.name] = out.finish()
            except BaseException:
                out.abandon()
                raise
            self._write_journal()
        except SlowftError as e:
            raise self._explained(e) from None

    def complete(self) -> None:
        """Write all the other files. config.json is the last."""
        try:
            for file in self._copied:
                self._add(file.name, _contents(file))
            self._add(INDEX, json.dumps(self._conversion.index, indent=4).encode())
            config = self._conversion.config_text().encode()
            entries = self.done | {"config.json": manifest.entry_of(config)}
            manifest.save(self._directory, self._identity, entries)
            write_file(self._directory / "config.json", config)
            (self._directory / manifest.JOURNAL).unlink()
            sync_directory(self._directory)
        except OSError as e:
            raise SlowftError(f"{self._directory} cannot be written: {e.strerror}") from None
        except SlowftError as e:
            raise self._explained(e) from None

    def _add(self, name: str, contents: bytes) -> None:
        write_file(self._directory / name, contents)
        self.done[name] = manifest.entry_of(contents)

    def _write_journal(self) -> None:
        write_file(self._directory / manifest.JOURNAL, manifest.encode(self._identity, self.done))

    def _explained(self, error: SlowftError) -> SlowftError:
        if isinstance(error, ModelError):
            return error
        n, total = len(self.done.keys() & {f.name for f in self._conversion.files}), len(self._conversion.files)
        return SlowftError(f"{error}. {n} of {total} files are done: make room, then the same command goes on")


def _contents(file: Path) -> bytes:
    """The contents of one of the model's files. Raises ModelError if it cannot be read."""
    try:
        return file.read_bytes()
    except OSError as e:
        raise ModelError(f"{file} cannot be read: {reason_of(e)}") from None
