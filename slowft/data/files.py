"""Finds and reads the files that people have data in, sample by sample, with the place of each.

Comes in: a folder, a file, or the id of a dataset on the hub. Goes out: `Found` samples as they were written, or the
reason why one cannot be read. Knows nothing of what a sample means, and never holds a whole file of lines in memory.
"""

import csv
import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from .. import platform
from ..errors import DataError, printable, reason_of

SPLITS = ("train", "valid", "test")
NAMES = {"train": ("train",), "valid": ("valid", "validation", "val"), "test": ("test",)}  # names of their files
TABLES = (".jsonl", ".jsonl.gz", ".json", ".csv", ".tsv", ".parquet")
TEXTS = (".txt", ".md")
SUFFIXES = (*TABLES, *TEXTS)
DROP_EVERY = 100_000  # lines
MAX_LINE_NBYTES = 64 << 20  # far beyond any --max-seq-length; a few kilobytes of gzip may hold a line of gigabytes
ROWS_AT_ONCE = 1000  # read from a Parquet file
KNOWN = "Known are " + ", ".join(SUFFIXES)


@dataclass(frozen=True)
class Features:
    """The keys of a sample's parts. The defaults are mlx-lm's."""

    prompt: str = "prompt"
    completion: str = "completion"
    chat: str = "messages"
    text: str = "text"

    @classmethod
    def of(cls, config: Any) -> "Features":
        """The keys that a `TrainConfig`, or an entry of its `hf_dataset`, names."""
        get = config.get if isinstance(config, dict) else lambda name, default: getattr(config, name, default)
        return cls(**{name: get(f"{name}_feature", default) for name, default in vars(cls()).items()})


@dataclass
class Found:
    """One sample as it stands in a file.

    Attributes:
        file, unit, number: its place, as in "train.jsonl", "line", 7. A document has no unit.
        sample: what is there. None if it cannot be read, and then `reason` says why.
        is_document: the sample is a whole text file, which is cut into pieces.
        features: the keys by which it is read.
    """

    file: str
    unit: str
    number: int
    sample: Any = None
    reason: str = ""
    is_document: bool = False
    features: Features = field(default_factory=Features)

    @property
    def place(self) -> str:
        return place(self.file, self.unit, self.number)


def place(file: str, unit: str, number: int) -> str:
    """A sample's place in words, such as "train.jsonl line 7"."""
    return f"{file} {unit} {number}" if unit else file


@dataclass
class Source:
    """Where a split comes from: files, or (name, rows, features) of datasets on the hub."""

    files: list[Path] = field(default_factory=list)
    rows: list[tuple[str, Any, Features]] = field(default_factory=list)
    features: Features = field(default_factory=Features)

    def __bool__(self) -> bool:
        return bool(self.files or self.rows)

    @property
    def nbytes(self) -> int:
        return sum(file.stat().st_size for file in self.files)

    @property
    def n_samples(self) -> int:
        """About how many samples there are. The lines of a large file are estimated from its first MB."""
        return sum(_n_samples(file) for file in self.files) + sum(len(rows) for _, rows, _ in self.rows)

    def read(self) -> Iterator[Found]:
        """Every sample, in order.

        Raises:
            DataError: a file cannot be read at all.
        """
        for file in self.files:
            for found in _read(file):
                found.features = self.features
                yield found
        for name, rows, features in self.rows:
            for i, row in enumerate(rows):
                yield Found(name, "sample", i + 1, row, features=features)


def find(path: str | Path | None, config: Any) -> tuple[dict[str, Source], list[str]]:
    """The source of each split, and notes about files there that are not read.

    Args:
        config: a `TrainConfig`; `hf_dataset` and the names of the features are used.
    Raises:
        DataError: there is no such folder, file or dataset.
    """
    features, notes = Features.of(config), []
    if getattr(config, "hf_dataset", None):
        return _on_hub(config.hf_dataset, bool(getattr(config, "test", False))), notes
    if path is None:
        raise DataError("no data given. Use --data with a folder that holds train.jsonl, or with a file")
    location = Path(path).expanduser()
    sources = {split: Source(features=features) for split in SPLITS}
    if location.is_file():
        if _suffix(location) not in SUFFIXES:
            raise DataError(f"{location} is of no kind that slowft reads. {KNOWN}")
        sources["train"].files = [location]
    elif location.is_dir():
        for split in SPLITS:
            sources[split].files, others = _files_of_split(location, split)
            if others:
                names = ", ".join(file.name for file in others)
                notes.append(f"{names} in {location} is not read: {sources[split].files[0].name} is")
        if not sources["train"]:
            sources["train"].files = _texts(location, [file for source in sources.values() for file in source.files])
        if not any(sources.values()):
            raise DataError(f"{location} holds no data. {_what_instead(location)}")
    elif not location.exists() and _looks_like_hub_id(str(path)):
        return _on_hub(str(path), features), notes
    else:
        raise DataError(f"{location} is not a folder or file that is there. Give one that holds train.jsonl")
    return sources, notes


def _files_of_split(folder: Path, split: str) -> tuple[list[Path], list[Path]]:
    """(The split's file, or its numbered parts; other files with the split's name, which are not read)."""
    kinds: list[list[Path]] = []
    for name in NAMES[split]:
        for suffix in SUFFIXES:
            whole = folder / f"{name}{suffix}"
            parts = sorted(f for f in _listed(folder) if f.name.startswith(f"{name}-") and _suffix(f) == suffix)
            kinds += [files for files in ([whole] if whole.is_file() else [], parts) if files]
    return (kinds[0], [file for files in kinds[1:] for file in files]) if kinds else ([], [])


def _texts(folder: Path, taken: list[Path]) -> list[Path]:
    """All text files below a folder, except those taken and those in hidden folders."""
    texts = sorted(file for file in folder.rglob("*") if file.suffix.lower() in TEXTS and file.is_file())
    hidden = [f for f in texts if any(part.startswith(".") for part in f.relative_to(folder).parts)]
    return [file for file in texts if file not in taken and file not in hidden]


def _what_instead(folder: Path) -> str:
    others = [file for file in sorted(_listed(folder)) if _suffix(file) in TABLES]
    if others:
        return f"Is it in {others[0]}? Give that file, or name it train{_suffix(others[0])}"
    return "Put samples into train.jsonl (and valid.jsonl) there"


def _listed(folder: Path) -> list[Path]:
    return [file for file in folder.iterdir() if file.is_file()]


def _suffix(file: Path) -> str:
    name = file.name.lower()
    return ".jsonl.gz" if name.endswith(".jsonl.gz") else file.suffix.lower()


# --- Files --------------------------------------------------------------------------------------------


def _read(file: Path) -> Iterator[Found]:
    readers = {".jsonl": _lines, ".jsonl.gz": _lines, ".json": _json, ".csv": _table, ".tsv": _table}
    readers |= {".parquet": _parquet} | dict.fromkeys(TEXTS, _document)
    try:
        yield from readers[_suffix(file)](file)
    except (EOFError, gzip.BadGzipFile, zlib.error) as e:
        raise DataError(f"{file} is damaged or cut off ({e}). Compress or download it again") from None
    except OSError as e:
        raise DataError(f"{file} cannot be read: {reason_of(e)}") from None


def _n_samples(file: Path) -> int:
    if _suffix(file) in TEXTS:
        return 1
    try:
        with open(file, "rb") as data:
            start = data.read(1 << 20)
        nbytes = file.stat().st_size
    except OSError:  # reading it raises the error
        return 1
    lines = max(start.count(b"\n"), 1)
    return lines if len(start) < 1 << 20 else round(nbytes * lines / len(start))


def _open(file: Path) -> BinaryIO:
    return gzip.open(file) if _suffix(file) == ".jsonl.gz" else open(file, "rb")


def _lines(file: Path) -> Iterator[Found]:
    """The samples of a file of JSON lines. Only a newline ends a line: a text may contain Unicode's other line ends."""
    with _open(file) as lines:
        for number, line in enumerate(iter(lambda: lines.readline(MAX_LINE_NBYTES), b""), 1):
            if len(line) == MAX_LINE_NBYTES and not line.endswith(b"\n"):
                while (rest := lines.readline(MAX_LINE_NBYTES)) and not rest.endswith(b"\n"):
                    pass
                reason = f"is longer than {MAX_LINE_NBYTES} bytes. Split it, or give a text of this size as a .txt file"
                yield Found(str(file), "line", number, reason=reason)
                continue
            if number == 1:
                _check_encoding(file, line)
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield _parsed(str(file), number, line)
            if number % DROP_EVERY == 0:  # pages in the file cache count as the process's memory
                platform.drop_cached(lines.fileno(), 0, 0)


def _parsed(file: str, number: int, line: bytes) -> Found:
    def bad(reason: str) -> Found:
        return Found(file, "line", number, reason=reason)

    try:
        sample = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as e:
        return bad(f"is not UTF-8 (byte {e.start + 1} of the line). Save the file as UTF-8")
    except json.JSONDecodeError as e:
        return bad(f"is not JSON: {e.msg} at column {e.colno}")
    except RecursionError:
        return bad("is not JSON that can be read: it is nested too deeply")
    except ValueError as e:  # an integer of thousands of digits
        return bad(f"is not JSON that can be read: {str(e).split(';')[0]}")
    return _as_object(file, "line", number, sample)


def _as_object(file: str, unit: str, number: int, sample: Any) -> Found:
    if not isinstance(sample, dict):
        return Found(file, unit, number, reason='is not an object such as {"text": "..."}')
    return Found(file, unit, number, sample)


def _check_encoding(file: Path, start: bytes) -> None:
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{file} is UTF-16. Save it as UTF-8")
    if b"\0" in start:
        raise DataError(f"{file} is not text: it has zero bytes. Was it downloaded or unpacked whole?")


def _json(file: Path) -> Iterator[Found]:
    """The samples of a JSON file: a list of objects, an object with one such list, or JSON lines in a .json file."""
    text = _text_of(file)
    start = len(text) - len(text.lstrip())
    if text[start : start + 1] == "[":
        yield from _listed_objects(file, text, start + 1)
        return
    try:
        whole, end = json.JSONDecoder().raw_decode(text, start)
    except (ValueError, RecursionError):  # reading it as lines says where it is wrong
        yield from _lines(file)
        return
    lists = [(key, v) for key, v in whole.items() if isinstance(v, list)] if isinstance(whole, dict) else []
    if text[end:].strip() or not (len(lists) == 1 and all(isinstance(item, dict) for item in lists[0][1])):
        yield from _lines(file)
    elif "role" in (lists[0][1] or [{}])[0] or "from" in (lists[0][1] or [{}])[0]:  # one conversation
        yield Found(str(file), "", 0, whole)
    else:
        for i, sample in enumerate(lists[0][1]):
            yield _as_object(str(file), "item", i + 1, sample)


def _listed_objects(file: Path, text: str, at: int) -> Iterator[Found]:
    """The items of a JSON list, parsed one at a time: all objects together take several times the text's memory."""
    decoder, item = json.JSONDecoder(), 0
    while True:
        while at < len(text) and text[at] in " \t\r\n,":
            at += 1
        item += 1
        if text[at : at + 1] == "]":
            return
        try:
            sample, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as e:  # nobody can tell where the next item begins
            reason = f"{e.msg} at line {e.lineno} column {e.colno}" if isinstance(e, json.JSONDecodeError) else str(e)
            yield Found(str(file), "item", item, reason=f"is not JSON: {reason}. Nothing after it was read")
            return
        yield _as_object(str(file), "item", item, sample)


def _text_of(file: Path) -> str:
    data = file.read_bytes()
    _check_encoding(file, data[:4096])
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = data.count(b"\n", 0, e.start) + 1
        raise DataError(f"{file} line {line} is not UTF-8 (byte {e.start}). Save it as UTF-8") from None


def _table(file: Path) -> Iterator[Found]:
    """The rows of a CSV file, whose first line has the names. A cell may hold a list or an object as JSON."""
    with open(file, "rb") as start:
        _check_encoding(file, start.read(4096))
    with open(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
        header = lines.readline()
        lines.seek(0)
        before = csv.field_size_limit(1 << 30)
        try:
            rows = csv.reader(lines, delimiter=max(",;\t", key=header.count), strict=True)
            names, line = next(rows, []), rows.line_num
            for cells in rows:
                number, line = line + 1, rows.line_num
                if not any(cells):
                    continue
                if len(cells) != len(names):
                    reason = f"has {len(cells)} cells, the first line names {len(names)}"
                    yield Found(str(file), "line", number, reason=reason)
                elif any("\udc80" <= c <= "\udcff" for cell in cells for c in cell):
                    yield Found(str(file), "line", number, reason="is not UTF-8. Save the file as UTF-8")
                else:
                    sample = {name: _cell(cell) for name, cell in zip(names, cells)}
                    yield Found(str(file), "line", number, sample)
        except csv.Error as e:
            yield Found(str(file), "line", rows.line_num, reason=f"is not CSV: {e}. Nothing after it was read")
        finally:
            csv.field_size_limit(before)


def _cell(cell: str) -> Any:
    if cell.lstrip()[:2] in ("[{", "[]") or cell.lstrip().startswith("{"):
        try:
            return json.loads(cell)
        except (ValueError, RecursionError):
            return cell
    return cell


def _parquet(file: Path) -> Iterator[Found]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise DataError(f"{file}: Parquet needs a library more: pip install 'slowft[parquet]'") from None
    try:
        rows = parquet.ParquetFile(file, memory_map=False)
        number = 0
        for batch in rows.iter_batches(ROWS_AT_ONCE):
            for row in batch.to_pylist():
                number += 1
                yield Found(str(file), "row", number, row)
    except (ValueError, OSError) as e:  # pyarrow's own errors are of these classes
        reason = printable((str(e) or type(e).__name__).splitlines()[0])
        raise DataError(f"{file} is not a Parquet file that can be read: {reason}") from None


def _document(file: Path) -> Iterator[Found]:
    if text := _text_of(file):
        yield Found(str(file), "", 0, {"text": text}, is_document=True)


# --- The hub ------------------------------------------------------------------------------------------


def _looks_like_hub_id(path: str) -> bool:
    return not path.startswith((".", "/", "~")) and path.count("/") == 1


def _on_hub(dataset: str | dict | list[dict], options: Any) -> dict[str, Source]:
    """Splits of a hub dataset given by its id, or of the datasets that `hf_dataset` configures, in mlx-lm's way.

    Args:
        options: for an id, the features of the dataset; else whether a test set is needed.
    """
    name = dataset if isinstance(dataset, str) else "hf_dataset"
    try:
        from datasets import load_dataset
    except ImportError:
        raise DataError(f"{name} is not a folder here; a hub dataset needs: pip install 'slowft[datasets]'") from None
    sources = {split: Source() for split in SPLITS}
    try:
        if isinstance(dataset, str):
            loaded = load_dataset(dataset)
            for split in SPLITS:
                on_hub = next((n for n in NAMES[split] if n in loaded), None)
                sources[split].rows = [(f"{dataset} {split}", loaded[on_hub], options)] if on_hub else []
            return sources
        for entry in [dataset] if isinstance(dataset, dict) else dataset:
            parts = {
                "train": entry.get("train_split", "train[:80%]"),
                "valid": entry.get("valid_split", "train[-10%:]"),
            }
            parts |= {"test": entry.get("test_split")} if options else {}
            for split, part in parts.items():
                rows = load_dataset(entry["path"], split=part, **entry.get("config", {}))
                sources[split].rows.append((f"{entry['path']} {split}", rows, Features.of(entry)))
    except Exception as e:  # the library raises many classes of errors
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise DataError(f"{name} cannot be loaded from the hub: {reason}") from None
    return sources
