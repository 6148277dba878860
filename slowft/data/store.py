"""Holds tokenised samples: a few in memory, many in a file on disk from which each is read when it is used.

Comes in: tokens and which of them are trained, sample by sample. Goes out: a `TokenDataset`. A file is written under a
temporary name and renamed when it is whole. Its name has a hash of everything that it was made from.

A record consists of int32 numbers: the number of tokens, the number of pairs, the sample's line (or item) in its file,
the file's number, a hash (two numbers), the pairs, the tokens. Memory holds where each record begins, 12 bytes a
sample. Records are read and not mapped, because mapped pages count as the process's memory.
"""

import hashlib
import json
import os
import tempfile
import weakref
from array import array
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .. import platform
from ..errors import DataError, reason_of
from ..sizes import size_in_words
from ..weights.transfers import read_bytes
from .files import place

IN_MEMORY_NBYTES = 16 << 20  # larger sets of records go to disk
DROP_EVERY = 8192  # after this many reads of records, their pages are dropped from the file cache
DROP_NBYTES = 64 << 20  # after this many bytes were written, they are dropped from the file cache
READ_NBYTES = 1 << 20  # read at a time where all records are read
HEAD = 6  # numbers in a record before its pairs
INDEX, RECORDS = "index.npz", "records"

Pairs = Sequence[tuple[int, int]]


@dataclass
class Summary:
    """What a person should know about a dataset.

    Attributes:
        n_cut: number of samples that were too long and were cut.
        n_skipped: number of samples that were left out as bad.
        notes: other things, a sentence each.
    """

    n_cut: int = 0
    n_skipped: int = 0
    notes: list[str] = field(default_factory=list)


class TokenDataset:
    """Tokenised samples: `[i]` gives (int32 tokens, prompt offset), `where(i)` the file and line it came from.

    Args:
        samples: (tokens, prompt offset) of each sample.
        places: where each sample came from.

    Attributes:
        lengths: number of tokens of each sample, int32.
        summary: what a person should know about it.
    """

    def __init__(self, samples: Sequence[tuple[np.ndarray, int]] = (), places: Sequence[str] = (), n_cut: int = 0):
        writer = TokenWriter()
        for i, (tokens, offset) in enumerate(samples):
            writer.add(tokens, [(offset, len(tokens))], places[i], "", 0)
        self._take(bytes(writer.records), writer.begins, writer.lengths, writer.files, Summary(n_cut))

    def _take(
        self, records: "bytes | Path", begins, lengths, files: Sequence[tuple[str, str]], summary: Summary
    ) -> None:
        """Set the attributes. `records` are the records themselves, or the file that has them."""
        self._begins, self.lengths = np.asarray(begins, np.int64), np.asarray(lengths, np.int32)
        self._files, self.summary = [tuple(file) for file in files], summary
        self._n_reads = 0
        self._name = str(records) if isinstance(records, Path) else ""
        self._records = records if isinstance(records, bytes) else os.open(records, os.O_RDONLY)
        if isinstance(self._records, int):
            platform.read_nothing_ahead(self._records)
            weakref.finalize(self, os.close, self._records)

    @property
    def n_cut(self) -> int:
        """Number of samples that were too long and were cut."""
        return self.summary.n_cut

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> tuple[np.ndarray, int]:
        tokens, pairs = self.sample(i)
        return tokens, int(pairs[0, 0])

    def sample(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """(int32 tokens, int32 pairs [n, 2]). The tokens from the first to the last number of a pair are predicted."""
        record = self._record(i)
        end = HEAD + 2 * int(record[1])
        return record[end:], record[HEAD:end].reshape(-1, 2)

    def where(self, i: int) -> str:
        """The file and line that a sample came from."""
        record = self._record(i)
        return place(*self._files[int(record[3])], int(record[2]))

    def digest(self, i: int) -> int:
        """A hash of the sample's tokens and of which of them are trained."""
        return int(self._record(i)[4:6].copy().view(np.int64)[0])

    def fingerprint(self) -> str:
        """A hash of all samples, in their order."""
        hashed = hashlib.blake2b(self.lengths.tobytes(), digest_size=16)
        for begin in range(0, int(self._begins[-1]), READ_NBYTES):
            hashed.update(self._read(begin, min(begin + READ_NBYTES, int(self._begins[-1]))))
        return hashed.hexdigest()

    def _record(self, i: int) -> np.ndarray:
        return np.frombuffer(self._read(int(self._begins[i]), int(self._begins[i + 1])), np.int32)

    def _read(self, begin: int, end: int) -> bytes:
        if isinstance(self._records, bytes):
            return self._records[begin:end]
        data = read_bytes(self._name, self._records, end - begin, begin, DataError)
        self._n_reads += 1
        if self._n_reads % DROP_EVERY == 0:
            platform.drop_cached(self._records, 0, 0)
        if len(data) < end - begin:
            raise DataError(f"{self._name} (tokenised samples) was cut while it was in use. Start again")
        return data


# A dataset, or anything else whose items are (tokens, prompt offset).
Samples = TokenDataset | Sequence[tuple[Sequence[int], int]]


def as_datasets(*samples: Samples | None) -> list[TokenDataset | None]:
    """Each set of samples as a dataset."""
    return [
        s if s is None or isinstance(s, TokenDataset) else TokenDataset(s, [f"sample {i + 1}" for i in range(len(s))])
        for s in samples
    ]


class TokenWriter:
    """Collects samples in memory or, above `IN_MEMORY_NBYTES`, in a file in `directory` (if one is given).

    Attributes:
        begins: the byte at which each record begins, and the end of the last one.
        lengths: number of tokens of each sample.
    """

    def __init__(self, directory: Path | None = None):
        self.records = bytearray()
        self.begins, self.lengths = array("q", [0]), array("i")
        self.summary = Summary()
        self._directory, self._file, self._dropped = directory, None, 0
        self._numbers: dict[tuple[str, str], int] = {}

    @property
    def is_on_disk(self) -> bool:
        return self._file is not None

    @property
    def files(self) -> list[tuple[str, str]]:
        """(File, unit) pairs that samples came from, by their number."""
        return list(self._numbers)

    def add(self, tokens: Sequence[int], pairs: Pairs, file: str, unit: str, number: int) -> None:
        """Add a sample, and where it came from."""
        body = np.concatenate([np.asarray(pairs, np.int32).reshape(-1), np.asarray(tokens, np.int32)])
        file_number = self._numbers.setdefault((file, unit), len(self._numbers))
        head = np.array([len(tokens), len(pairs), number, file_number, 0, 0], np.int32)
        head[4:] = np.frombuffer(digest_of(body), np.int32)
        record = head.tobytes() + body.tobytes()
        self.begins.append(self.begins[-1] + len(record))
        self.lengths.append(len(tokens))
        if self._file is None:
            self.records += record
            if self._directory is not None and len(self.records) > IN_MEMORY_NBYTES:
                self._to_disk()
        else:
            self._write(lambda: self._file.write(record))
            if self.begins[-1] - self._dropped > DROP_NBYTES:
                self._dropped = self.begins[-1]
                self._write(self._drop)

    def finish(self, name: str) -> TokenDataset:
        """The samples as a dataset. If they went to disk, its files there are called `name`."""
        dataset = TokenDataset.__new__(TokenDataset)
        if self._file is None:
            dataset._take(bytes(self.records), self.begins, self.lengths, self.files, self.summary)
            return dataset
        records, index = (self._directory / f"{name}.{kind}" for kind in (RECORDS, INDEX))
        partial = self._directory / f".{name}.{os.getpid()}.{INDEX}"
        meta = np.frombuffer(json.dumps({"files": self.files, "summary": vars(self.summary)}).encode(), np.uint8)
        arrays = np.frombuffer(self.begins, np.int64), np.frombuffer(self.lengths, np.int32)

        def put() -> None:
            self._file.flush()
            os.fsync(self._file.fileno())
            np.savez(partial, begins=arrays[0], lengths=arrays[1], meta=meta)
            os.replace(self._file.name, records)
            os.replace(partial, index)

        try:
            self._write(put)
        except DataError:
            partial.unlink(missing_ok=True)
            raise
        self._file.close()
        self._write(lambda: dataset._take(records, *arrays, self.files, self.summary))
        return dataset

    def abandon(self) -> None:
        """Delete the file, unless `finish` has renamed it."""
        if self._file is not None:
            with suppress(OSError):  # its buffer may not fit on the disk, and need not be written
                self._file.close()
            Path(self._file.name).unlink(missing_ok=True)

    def _to_disk(self) -> None:
        def make() -> None:
            self._directory.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.NamedTemporaryFile(  # noqa: SIM115  (open until `finish` or `abandon`)
                dir=self._directory, prefix=".tokens-", suffix=".partial", delete=False, buffering=1 << 20
            )
            self._file.write(self.records)

        self._write(make)
        self.records = bytearray()

    def _drop(self) -> None:
        """Drop what was written from the file cache, which counts as the process's memory."""
        self._file.flush()
        if not platform.MACOS:  # on macOS nothing is dropped
            os.fdatasync(self._file.fileno())
        platform.drop_cached(self._file.fileno(), 0, 0)

    def _write(self, write: Callable[[], object]) -> None:
        try:
            write()
        except OSError as e:
            raise DataError(
                f"tokenised samples ({size_in_words(self.begins[-1])} so far) cannot be written to {self._directory}: "
                f"{reason_of(e)}. Free some of that disk, or set XDG_CACHE_HOME to a directory on another"
            ) from None


def digest_of(numbers: np.ndarray) -> bytes:
    """A hash of eight bytes. Two samples have the same hash only if they are the same."""
    return hashlib.blake2b(numbers.tobytes(), digest_size=8).digest()


def load(directory: Path, name: str) -> TokenDataset | None:
    """The dataset that was stored under this name; None if there is none that is whole."""
    records = directory / f"{name}.{RECORDS}"
    try:
        with np.load(directory / f"{name}.{INDEX}") as index:
            begins, lengths, meta = index["begins"], index["lengths"], json.loads(index["meta"].tobytes())
        if records.stat().st_size != begins[-1]:
            return None
        dataset = TokenDataset.__new__(TokenDataset)
        dataset._take(records, begins, lengths, meta["files"], Summary(**meta["summary"]))
        return dataset
    except (OSError, ValueError, KeyError, TypeError):
        return None
