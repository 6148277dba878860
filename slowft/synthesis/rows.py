"""Reads and writes rows of a data set, one JSON object a line.

They are read one at a time, in any of the usual forms. A file is written completely or not at all. Between the steps a
row has "messages" (or "text"), an "id", and a "history": a list of what each step did with it. Other fields of a row
stay in it.
"""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from .. import platform
from ..data.files import SUFFIXES, Features, Found, Source
from ..data.samples import BadSample, Chat, understand
from ..errors import DataError, SlowftError, printable, reason_of

Row = dict[str, Any]

# Fields of an answer by `slowft generate` that a row's history keeps
ANSWER_FIELDS = ("model", "adapter", "sampler", "seed", "finish_reason", "tokens")
SAMPLE_KEYS = {"prompt", "completion", "text", "messages", "conversations", "system", "instruction", "input", "output"}
END_OF_THOUGHT = "</think>"


def read(files: Iterable[Path]) -> Iterator[Row]:
    """Rows of files of any kind that `--data` takes, and of files that `slowft generate` wrote.

    Raises:
        DataError: a file or a line cannot be read; names both.
    """
    for file in files:
        if not file.is_file():
            raise DataError(f"{file} is not there. Give a file of rows such as train.jsonl")
        if not file.name.lower().removesuffix(".gz").endswith(tuple(SUFFIXES)):
            raise DataError(f"{file} is of no kind that slowft reads. Known are {', '.join(SUFFIXES)}")
        for found in Source([file]).read():
            if found.reason:
                raise DataError(f"{found.place} {found.reason}")
            try:
                yield row_of(found)
            except BadSample as e:
                raise DataError(f"{found.place} {printable(str(e))}") from None


def row_of(found: Found) -> Row:
    """A sample as a row. An empty answer is accepted here, because a rule leaves it out later.

    Raises:
        BadSample: the sample has no known form.
    """
    sample = found.sample
    row = {"id": sample.get("id", found.place.rpartition("/")[2])}
    rest = {key: value for key, value in sample.items() if key not in SAMPLE_KEYS and key != "id"}
    history = rest.pop("history", [])
    if not isinstance(history, list):
        raise BadSample('has a "history" that is no list')
    answer = next((key for key in ("completion", "text") if isinstance(sample.get(key), str)), None)
    if _are_messages(sample.get("messages")):
        row["messages"] = sample["messages"]
    elif "prompt" in sample and (_are_messages(sample["prompt"]) or isinstance(sample["prompt"], str)):
        prompt = sample["prompt"]
        row["messages"] = list(prompt) if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        if _are_messages(sample.get("chosen")) and _are_messages(sample.get("rejected")):
            row["messages"] += rest.pop("chosen")
            row["rejected"] = {"content": rest.pop("rejected")[-1]["content"]}
        elif answer is not None:
            row["messages"].append({"role": "assistant", "content": sample[answer]})
        if "sampler" in sample:
            history = [*history, {"step": "answer"} | {key: rest.pop(key) for key in ANSWER_FIELDS if key in rest}]
            row["finish_reason"] = sample.get("finish_reason")
            rest.pop("prompt_tokens", None)
    elif isinstance(sample.get("text"), str):
        row["text"] = sample["text"]
    else:
        understood = understand(sample, Features())
        if isinstance(understood, Chat):
            row["messages"] = understood.messages
        else:
            row["text"] = understood.text
    return row | rest | {"history": history}


def _are_messages(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value
        )
    )


# --- What is in a row -----------------------------------------------------------------------------------


def prompt_of(row: Row) -> str:
    """What is asked; empty for plain text. The system prompt is left out, because many rows may share it."""
    messages = row.get("messages", [])
    messages = messages[:-1] if messages and messages[-1]["role"] == "assistant" else messages
    return "\n".join(m["content"] for m in messages if m["role"] != "system")


def answer_of(row: Row) -> str:
    """The last answer, or the whole of a plain text."""
    messages = row.get("messages")
    if messages is None:
        return row["text"]
    return messages[-1]["content"] if messages and messages[-1]["role"] == "assistant" else ""


def without_reasoning(answer: str) -> str:
    """An answer without the reasoning before it."""
    return answer.rpartition(END_OF_THOUGHT)[2].strip()


def with_answer(row: Row, answer: str) -> Row:
    """The row, whose messages end with a question, with the answer after them."""
    return row | {"messages": [*row["messages"], {"role": "assistant", "content": answer}]}


def noted(row: Row, entry: dict[str, Any]) -> Row:
    """The row with one more entry in its history."""
    return row | {"history": [*row.get("history", []), entry]}


# --- Files ----------------------------------------------------------------------------------------------


def lines(file: Path) -> Iterator[Row]:
    """The rows of a file that was made with `written`."""
    with open(file, "rb") as content:
        for line in content:
            yield json.loads(line)


def whole_lines(file: Path) -> Iterator[bytes]:
    """The lines of a file, without a last line that was cut off. None if the file does not exist."""
    if file.exists():
        with open(file, "rb") as content:
            yield from (line for line in content if line.endswith(b"\n"))


def count(file: Path) -> int:
    """How many lines a file has."""
    with open(file, "rb") as content:
        return sum(piece.count(b"\n") for piece in iter(lambda: content.read(1 << 20), b""))


class Out:
    """A file that is being written."""

    def __init__(self, file: BinaryIO):
        self._file = file

    def row(self, row: Row) -> None:
        self._file.write((json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass"))

    def line(self, line: bytes) -> None:
        self._file.write(line)

    def text(self, text: str) -> None:
        self._file.write(text.encode())


def check_replaceable(files: Iterable[Path]) -> None:
    """Check that no file has rows that slowft did not write. Its own have a history, or the group they were split by.

    Raises:
        DataError: one of the files has other rows.
    """
    for file in files:
        try:
            with open(file, "rb") as content:
                first = content.readline()
            row = json.loads(first) if first.strip() else {"history": []}
        except FileNotFoundError:
            continue
        except (OSError, ValueError, RecursionError):
            row = None
        if not isinstance(row, dict) or not row.keys() & {"history", "group"}:
            raise DataError(
                f"{file} is there already, and slowft did not write it. Give another --output, or move it away"
            )


@contextmanager
def written(*files: Path, optional: Sequence[Path] = ()) -> Iterator[list[Out]]:
    """Files to write. They are replaced when this is left without an error, and otherwise stay as they were.

    Args:
        optional: files that are removed if they would be empty.
    """
    temporaries = [file.with_name(f".{file.name}.tmp") for file in files]  # what a kill left there is written over
    opened: list[BinaryIO] = []
    try:
        for file, temporary in zip(files, temporaries):
            file.parent.mkdir(parents=True, exist_ok=True)
            opened.append(open(temporary, "wb"))
        yield [Out(file) for file in opened]
        for file, temporary, out in zip(files, temporaries, opened):
            if file in optional and not out.tell():
                file.unlink(missing_ok=True)
                continue
            out.flush()
            platform.sync_file(out.fileno())
            out.close()
            os.replace(temporary, file)
    except OSError as e:
        raise SlowftError(f"{e.filename or files[0]} cannot be written: {reason_of(e)}") from None
    finally:
        for out in opened:
            out.close()
        for temporary in temporaries:
            temporary.unlink(missing_ok=True)
