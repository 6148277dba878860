"""Stores a teacher's probabilities on disk: the K most probable tokens at every trained token of a data set.

Comes in: ids and log-probabilities, sample after sample. Goes out: those of a sample, found by the hash of its tokens
and of which of them are trained. So other data, or the same data rendered in another way, finds nothing.

A cache is a directory. `rows` has a record for each token: K ids in 3 bytes each (vocabularies have up to 2^18 ids, and
a few more), then K + 1 log-probabilities in 3 bytes each; the last one is that of all other tokens together. These are
float32 without the last 8 bits, exact to one part in 65,536, where float16 is exact to one in 2,048. With K = 64 a
record has 387 bytes. `samples` has (hash, tokens) of each sample in the order of the rows, `vocabulary.json` the text
of each id. `manifest.json` is written last: a cache that has it is whole.
"""

import hashlib
import json
import os
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .. import platform
from ..errors import ConfigError, DataError, SlowftError, reason_of
from ..weights.tensorfile import write_file
from ..weights.transfers import append_all, read_bytes
from .store import TokenDataset

FORMAT = 1
MANIFEST, UNFINISHED, ROWS, SAMPLES = "manifest.json", "unfinished.json", "rows", "samples"
VOCABULARY = "vocabulary.json"
SAMPLE = np.dtype([("hash", "<i8"), ("tokens", "<i4")])
READ_NBYTES = 1 << 20
ANOTHER = "Give another --output, or remove that directory"


def counted(pairs: np.ndarray, n_tokens: int) -> np.ndarray:
    """Numbers (from 1) of a sample's trained tokens: those that `pairs` name, without the padding after the end."""
    is_counted = np.zeros(n_tokens, bool)
    for first, last in pairs:
        is_counted[max(first, 1) : last + 1] = True
    return np.flatnonzero(is_counted)


def record_nbytes(top_k: int) -> int:
    return 6 * top_k + 3


def pack(ids: np.ndarray, log_probabilities: np.ndarray) -> bytes:
    """Records of ids `[n, K]` and float32 log-probabilities `[n, K + 1]`."""
    bits = np.ascontiguousarray(log_probabilities, "<f4").view("<u4")
    numbers = np.concatenate([ids.astype("<u4"), (bits + 0x80) >> 8], axis=1, dtype="<u4")
    return numbers.view(np.uint8).reshape(*numbers.shape, 4)[..., :3].tobytes()


def unpack(data: bytes, top_k: int) -> tuple[np.ndarray, np.ndarray]:
    """(int32 ids `[n, K]`, float32 log-probabilities `[n, K + 1]`) of records."""
    low_bytes = np.frombuffer(data, np.uint8).reshape(-1, 2 * top_k + 1, 3)
    numbers = np.zeros((*low_bytes.shape[:2], 4), np.uint8)
    numbers[..., :3] = low_bytes
    numbers = numbers.view("<u4")[..., 0]
    return numbers[:, :top_k].astype(np.int32), (numbers[:, top_k:] << 8).view("<f4").astype(np.float32)


# --- Writing ------------------------------------------------------------------------------------------


class TeacherWriter:
    """Writes a cache, one sample's rows after the other's. It goes on with an unfinished cache in the directory.

    Args:
        about: whose probabilities these are, and how many. It has to be the same for a run that goes on.
        samples: `SAMPLE`s, in the order of the rows.
        vocabulary: text -> id.

    Attributes:
        is_whole: the cache is finished already.
        there: number of samples whose rows were written before.

    Raises:
        ConfigError: the directory holds a cache of another teacher or of other samples.
        SlowftError: the directory cannot be read or written.
    """

    def __init__(self, directory: Path, about: Mapping[str, Any], samples: np.ndarray, vocabulary: Mapping[str, int]):
        self.directory, self._samples = directory, samples
        self._nbytes = record_nbytes(about["top_k"])
        self._ends = np.cumsum(samples["tokens"], dtype=np.int64) * self._nbytes
        texts = json.dumps({i: text for text, i in sorted(vocabulary.items(), key=lambda item: item[1])})
        self._about = {"format": FORMAT} | json.loads(json.dumps(about))
        self._about |= {"vocabulary": _hash(texts.encode()), "samples": _hash(samples.tobytes())}
        self._about |= {"n_samples": len(samples), "n_tokens": int(samples["tokens"].sum())}
        self._about["n_ids"] = len(set(vocabulary.values()))
        self.is_whole = self._is_same(MANIFEST)
        if self.is_whole:
            self.there = len(samples)
            return
        is_begun = self._is_same(UNFINISHED)
        try:
            if not is_begun and directory.exists() and any(directory.iterdir()):
                raise ConfigError(f"{directory} is there, and no cache of a teacher's probabilities. {ANOTHER}")
            directory.mkdir(parents=True, exist_ok=True)
            if not is_begun:
                write_file(directory / UNFINISHED, json.dumps(self._about, indent=1).encode())
            write_file(directory / VOCABULARY, texts.encode())
            self._file = open(directory / ROWS, "r+b" if (directory / ROWS).exists() else "w+b", buffering=0)
            n = os.fstat(self._file.fileno()).st_size
        except OSError as e:
            raise SlowftError(f"{directory} cannot be written: {reason_of(e)}") from None
        self.there = int(np.searchsorted(self._ends, n, side="right"))

    def go_on_from(self, n_samples: int) -> None:
        """Keep the rows of the first `n_samples` samples, and write the next ones after them."""
        at = int(self._ends[n_samples - 1]) if n_samples else 0
        self._write(lambda: (self._file.truncate(at), self._file.seek(at)))

    def add(self, ids: np.ndarray, log_probabilities: np.ndarray) -> None:
        """Write the rows of the next sample."""
        data = pack(ids, log_probabilities)
        self._write(lambda: append_all(self._file, data))

    def sync(self) -> None:
        """Wait until everything that was added is on the drive."""

        def write() -> None:
            platform.sync_file(self._file.fileno())
            platform.drop_cached(self._file.fileno(), 0, 0)

        self._write(write)

    def finish(self) -> None:
        """Finish the cache. All rows have been added."""
        self._file.close()
        write_file(self.directory / SAMPLES, self._samples.tobytes())
        digest = hashlib.sha256()
        with open(self.directory / ROWS, "rb") as rows:
            while piece := rows.read(READ_NBYTES):
                digest.update(piece)
            platform.drop_cached(rows.fileno(), 0, 0)
        manifest = self._about | {"rows": digest.hexdigest()}
        write_file(self.directory / MANIFEST, json.dumps(manifest, indent=1).encode())
        (self.directory / UNFINISHED).unlink(missing_ok=True)

    def close(self) -> None:
        if not self.is_whole:
            self._file.close()

    def _is_same(self, name: str) -> bool:
        """Whether there is a file `name`, which describes the same cache.

        Raises:
            ConfigError: the file describes another cache.
        """
        written = _read_json(self.directory / name)
        if written is None:
            return False
        for key, what in WHAT.items():
            if written.get(key) != self._about.get(key):
                shown = "" if key in HASHES else f" ({written.get(key)}, now {self._about.get(key)})"
                raise ConfigError(f"{self.directory} was written with another {what}{shown}. {ANOTHER}")
        return True

    def _write(self, write) -> None:
        try:
            write()
        except OSError as e:
            raise SlowftError(
                f"{self.directory / ROWS} cannot be written ({self._about['n_tokens'] * self._nbytes / 1e9:.2f} GB in "
                f"all): {reason_of(e)}. What is there stays; give the same command again to go on"
            ) from None


# key of a manifest -> what it describes
WHAT = {
    "format": "version of slowft",
    "top_k": "--top-k",
    "vocabulary": "vocabulary",
    "teacher": "model",
    "adapter": "adapter",
    "emulated": "emulated model",
    "samples": "data, or other options of how they are read",
}
HASHES = ("vocabulary", "teacher", "adapter", "samples")


# --- Reading ------------------------------------------------------------------------------------------


class TeacherCache:
    """A finished cache.

    Attributes:
        top_k: number of tokens in a record.
        fingerprint: a hash of everything in the cache.

    Raises:
        DataError: the directory holds no cache, or one that is not whole.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory).expanduser()
        manifest = _read_json(self.directory / MANIFEST)
        if manifest is None:
            unfinished = (self.directory / UNFINISHED).exists()
            state = "is not finished. Give the command that began it again" if unfinished else "is no teacher's cache"
            how = "" if unfinished else ". slowft score --top-k 64 --output DIR writes one"
            raise DataError(f"{self.directory} {state}{how}")
        if manifest.get("format") != FORMAT:
            raise DataError(f"{self.directory} was written by another version of slowft. Write it anew")
        self.top_k, self.fingerprint = manifest["top_k"], _hash(json.dumps(manifest, sort_keys=True).encode())
        self._manifest, self._nbytes = manifest, record_nbytes(manifest["top_k"])
        rows = self.directory / ROWS
        try:
            samples = np.frombuffer((self.directory / SAMPLES).read_bytes(), SAMPLE)
            self._rows = os.open(rows, os.O_RDONLY)
        except (OSError, ValueError) as e:
            raise DataError(f"{self.directory} is not whole: {e}. Write it anew") from None
        weakref.finalize(self, os.close, self._rows)
        platform.read_nothing_ahead(self._rows)
        ends = np.cumsum(samples["tokens"], dtype=np.int64)
        if _hash(samples.tobytes()) != manifest["samples"] or os.fstat(self._rows).st_size != ends[-1] * self._nbytes:
            raise DataError(f"{self.directory} is not as it was written. Write it anew")
        order = np.argsort(samples["hash"], kind="stable")
        self._hashes, self._tokens = samples["hash"][order], samples["tokens"][order]
        self._begins = (ends - samples["tokens"])[order]

    def check_vocabulary(self, vocabulary: Mapping[str, int], whose: Path) -> None:
        """Raises ConfigError unless the student's vocabulary is the teacher's; names the first id that differs.

        The number of rows of the embeddings does not matter.
        """
        theirs = {int(i): text for i, text in (_read_json(self.directory / VOCABULARY) or {}).items()}
        if len(theirs) != self._manifest["n_ids"]:
            raise DataError(f"{self.directory} is not as it was written. Write it anew")
        ours = {i: text for text, i in vocabulary.items()}
        first = min((i for i in ours.keys() | theirs.keys() if ours.get(i) != theirs.get(i)), default=None)
        if first is None:
            return
        here, there = ("nothing" if first not in texts else repr(texts[first]) for texts in (ours, theirs))
        raise ConfigError(
            f"{whose} has another vocabulary than the teacher of {self.directory}: id {first} is {here} here and "
            f"{there} there. A student needs a teacher of its own vocabulary"
        )

    def check_samples(self, dataset: TokenDataset) -> None:
        """Raises DataError if the cache lacks a sample with the same tokens trained; names the first one."""
        hashes = np.fromiter((dataset.digest(i) for i in range(len(dataset))), np.int64, len(dataset))
        missing = np.flatnonzero(~np.isin(hashes, self._hashes))
        if missing.size:
            raise DataError(
                f"{self.directory} knows nothing of {len(missing)} of {len(dataset)} training samples, such as "
                f"{dataset.where(int(missing[0]))}: it was made of other data, or with another --mask-prompt, "
                "--train-on, --chat-template or --max-seq-length. Give the same options, or write it anew"
            )

    def of(self, digest: int) -> tuple[np.ndarray, np.ndarray]:
        """(int32 ids `[n, K]`, float32 log-probabilities `[n, K + 1]`) of the n counted tokens of a sample."""
        i = int(np.searchsorted(self._hashes, digest))
        if i == len(self._hashes) or self._hashes[i] != digest:
            raise DataError(f"{self.directory} knows nothing of a sample. Write it anew")
        n, begin = int(self._tokens[i]) * self._nbytes, int(self._begins[i]) * self._nbytes
        data = read_bytes(str(self.directory / ROWS), self._rows, n, begin, DataError)
        if len(data) < n:
            raise DataError(f"{self.directory / ROWS} was cut while it was in use. Write it anew")
        return unpack(data, self.top_k)


def samples_of(datasets: Sequence[TokenDataset]) -> tuple[np.ndarray, np.ndarray]:
    """(`SAMPLE`s without duplicates; the place of each: (number of its dataset, number in that), `[n, 2]`).

    The longest samples come first. Samples without trained tokens come last.
    """
    places = np.array([(d, i) for d, dataset in enumerate(datasets) for i in range(len(dataset))], np.int64)
    lengths = np.concatenate([dataset.lengths for dataset in datasets])
    samples = np.zeros(len(places), SAMPLE)
    for number, (d, i) in enumerate(places):
        tokens, pairs = datasets[d].sample(int(i))
        samples[number] = datasets[d].digest(int(i)), len(counted(pairs, len(tokens)))
    order = np.lexsort((-lengths, samples["tokens"] == 0))
    _, firsts = np.unique(samples["hash"][order], return_index=True)
    order = order[np.sort(firsts)]
    return samples[order], places[order]


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]


def _read_json(file: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        return None
    except NotADirectoryError:
        raise DataError(f"{file.parent} is a file. Give a directory") from None
    except (OSError, ValueError) as e:
        raise DataError(f"{file} cannot be read: {e}") from None
    if not isinstance(content, dict):
        raise DataError(f"{file} is not what slowft wrote. Write it anew")
    return content
