"""Makes a data set of recorded requests: rows that training takes, split by conversation.

Comes in: the file of requests and filters. Goes out: a folder with train.jsonl, valid.jsonl and test.jsonl, and the
pruning rules if prompts were pruned. One row is in memory at a time, however many there are.
"""

import hashlib
import json
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..requests import pruning
from ..requests.filters import Filter
from ..requests.store import Recorded, RequestStore
from ..requests.texts import answer_message, message_text, plain_messages, prompt_messages
from .rows import check_replaceable, written
from .split import SPLITS, assign, check_shares, counted, drawn
from .steps import Counts

# Up to so many rows, conversations are counted and shares are met exactly. With more rows, counting would take too long
COUNTED = 2000
CUT_OFF = {"length": "cut off", "content_filter": "cut off by a filter"}
COMPLETE = Filter("status", "equal", "complete")

Sample = dict[str, Any]
# (row, its sample, why it is left out); one of the last two is None
Candidate = tuple[Recorded, Sample | None, str | None]


@dataclass(frozen=True)
class Export:
    """What to write.

    Attributes:
        form: "messages"; "alpaca": instruction, output, system and history; "preferences": prompt, chosen, rejected.
        valid, test: approximate shares of the samples. seed: decides which conversations are in them.
        by: rows with the same value of this tag stay together. If it is None, and for rows that lack the tag, those of
            one conversation do: all requests with the same first message of the user.
        prune: texts that all prompts share are removed, and the rules are written.
    """

    form: str = "messages"
    valid: float = 0.05
    test: float = 0.05
    seed: int = 0
    by: str | None = None
    prune: bool = False


def export(store: RequestStore, filters: Sequence[Filter], folder: Path, how: Export) -> Counts:
    """Write the folder. Files of an earlier export are replaced once everything is written.

    Raises:
        DataError: nothing is left, too few conversations to split, or the folder has rows that slowft did not write.
    """
    check_shares(how.valid, how.test)
    counts, rules = Counts("export"), []
    if how.prune:
        rules = pruning.find(sample["prompt"] for _, sample, _ in _samples(store, filters, how, []) if sample)

    def samples() -> Iterator[Candidate]:
        return _samples(store, filters, how, rules)

    split_of = _splits(samples, how)
    shares = {"train": 1, "valid": how.valid, "test": how.test}
    files = [folder / f"{split}.jsonl" for split in SPLITS]
    check_replaceable(files)
    sizes = {split: 0 for split in SPLITS if shares[split]}
    with written(*files, optional=files[1:]) as outs:
        out_of = dict(zip(SPLITS, outs))
        for row, sample, why in samples():
            counts.came_in += 1
            if sample is None:
                counts.leave_out(why)
                continue
            counts.went_out += 1
            group = _group(row, how.by)
            split = split_of(group)
            sizes[split] += 1
            out_of[split].row({"id": row.id} | _in_form(sample, how.form) | {"group": group})
        counts.about = {"rows": sizes, "pruned": rules}
        if not counts.went_out:
            hint = ""
            if how.form == "preferences":
                hint = " Only requests that were relabelled, or kept and discarded, have pairs."
            raise DataError(f"nothing is left to export. {counts.sentence()}.{hint} Give other filters")
        if not sizes["train"]:
            raise DataError(f"no rows are left to train on. {counts.sentence()}. Lower --valid and --test")
    pruning.save(folder, rules)
    return counts


def _splits(samples: Callable[[], Iterator[Candidate]], how: Export) -> Callable[[str], str]:
    """A function that gives a conversation's split. It meets the shares, or with many samples hashes the name."""
    if not how.valid and not how.test:
        return lambda group: "train"
    shares_and_seed = (how.valid, how.test, how.seed)
    first = [sample and _group(row, how.by) for row, sample, _ in islice(samples(), COUNTED + 1)]
    groups = [group for group in first if group]
    splits: Mapping[str, str] = {}
    if groups and len(first) <= COUNTED:  # these are all rows
        counts = counted(groups)
        if len(counts) <= bool(how.valid) + bool(how.test):
            raise DataError(
                f"{len(groups)} samples of {len(counts)} conversation{'s' * (len(counts) != 1)} cannot be split: a "
                "conversation is never in two. Give --valid 0 --test 0, or a tag with --by"
            )
        splits = assign(counts, *shares_and_seed)
    return lambda group: splits.get(group) or drawn(group, *shares_and_seed)


def _group(row: Recorded, by: str | None) -> str:
    if by is not None and by in row.tags:
        return f"{by}={row.tags[by]}"
    return f"{row.conversation:012x}"


def _samples(store: RequestStore, filters: Sequence[Filter], how: Export, rules: Sequence[str]) -> Iterator[Candidate]:
    """The rows, newest first. A sample is {"prompt": messages, "answer": message}, with "rejected" if it is a pair."""
    candidates = _pairs(store, filters) if how.form == "preferences" else _answers(store, filters)
    with _Seen() as seen:
        for row, sample, why in candidates:
            if sample is not None:
                sample["prompt"] = pruning.apply(rules, sample["prompt"])
                why = _not_of_form(sample) if how.form == "alpaca" else None
                if why is None and not seen.add(sample):
                    why = "the same as a newer one"
            yield row, None if why else sample, why


def _answers(store: RequestStore, filters: Sequence[Filter]) -> Iterator[Candidate]:
    """Rows with their answers. If a request was answered anew, only its newest answer that passes the filters is taken.

    `relabelled` holds the ids of the requests that a newer row answers.
    """
    with _Seen() as relabelled:
        for row in store.rows([*filters, COMPLETE], newest_first=True):
            is_outdated = relabelled.has(row.id) or (row.relabels is not None and relabelled.has(row.relabels))
            sample, why = (None, "answered anew") if is_outdated else _sample(row)
            if row.relabels is not None and (sample is not None or is_outdated):
                relabelled.add(row.relabels)
            yield row, sample, why


def _pairs(store: RequestStore, filters: Sequence[Filter]) -> Iterator[Candidate]:
    """Rows with a better and a worse answer. Marks (kept, discarded) decide; without them the newer one is better."""
    for old in store.rows([*filters, COMPLETE, Filter("relabelled", "equal", "yes")], newest_first=True):
        for new in map(store.get, reversed(store.relabelled(old.id))):
            if new.status == "complete":
                better, worse = (old, new) if _rank(old) > _rank(new) else (new, old)
                yield _pair(old, better, worse)
    kept: dict[bytes, Recorded] = {}  # the newest for each prompt. People marked them one by one, so they are few
    for row in store.rows([*filters, COMPLETE, Filter("kept", "equal", "yes")]):
        kept[_prompt_key(row)] = row
    for row in store.rows([*filters, COMPLETE, Filter("kept", "equal", "no")], newest_first=True):
        better = kept.get(_prompt_key(row))
        if better is not None and better.relabels != row.id and row.relabels != better.id:
            yield _pair(row, better, row)


def _rank(row: Recorded) -> int:
    return {True: 1, None: 0, False: -1}[row.kept]


def _pair(row: Recorded, better: Recorded, worse: Recorded) -> Candidate:
    if better.kept is False:
        return row, None, "discarded"
    sample, why = _sample(better, prompt_of=row)
    rejected, why_not = _sample(worse, even_discarded=True)
    if sample is None or rejected is None:
        return row, None, why or why_not
    if message_text(sample["answer"]) == message_text(rejected["answer"]):
        return row, None, "the same answer twice"
    return row, sample | {"rejected": rejected["answer"]}, None


def _sample(row: Recorded, prompt_of: Recorded | None = None, even_discarded: bool = False):
    """(sample, None), or (None, why there is none)."""
    if row.kept is False and not even_discarded:
        return None, "discarded"
    if row.finish_reason in CUT_OFF:
        return None, CUT_OFF[row.finish_reason]
    asked = (prompt_of or row).request
    answer = answer_message(row.response)
    prompt = plain_messages(prompt_messages(asked))
    answers = None if answer is None else plain_messages([answer])
    if prompt is None or (answer is not None and answers is None):
        return None, "with images or sounds"
    if not prompt or not answers or not (answers[0]["content"].strip() or answers[0].get("tool_calls")):
        return None, "without an answer" if prompt else "without a prompt"
    sample = {"prompt": prompt, "answer": answers[0] | {"role": "assistant"}}
    return sample | ({"tools": asked["tools"]} if asked.get("tools") else {}), None


def _not_of_form(sample: Sample) -> str | None:
    """Why a sample does not fit Alpaca's form, which is a question after pairs of questions and answers, all texts."""
    turns = sample["prompt"][sample["prompt"][0]["role"] == "system" :]
    roles = [turn["role"] for turn in turns]
    has_calls = "tools" in sample or any("tool_calls" in turn for turn in (*turns, sample["answer"]))
    alternate = roles == (["user", "assistant"] * len(roles))[: len(roles)]
    ends_with_question = len(roles) % 2 == 1
    return None if alternate and ends_with_question and not has_calls else "not of Alpaca's form"


def _in_form(sample: Sample, form: str) -> Sample:
    tools = {"tools": sample["tools"]} if "tools" in sample else {}
    if form == "preferences":
        pair = {"prompt": sample["prompt"], "chosen": [sample["answer"]], "rejected": [sample["rejected"]]}
        return pair | tools
    if form == "messages":
        return {"messages": [*sample["prompt"], sample["answer"]]} | tools
    *before, asked = [turn["content"] for turn in sample["prompt"] if turn["role"] != "system"]
    alpaca = {"instruction": asked, "input": "", "output": sample["answer"]["content"]}
    if sample["prompt"][0]["role"] == "system":
        alpaca["system"] = sample["prompt"][0]["content"]
    return alpaca | ({"history": [before[i : i + 2] for i in range(0, len(before), 2)]} if before else {})


def _prompt_key(row: Recorded) -> bytes:
    return _digest([prompt_messages(row.request), row.request.get("tools")])


def _digest(value: Any) -> bytes:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).digest()


class _Seen:
    """A set of values on disk, so that a million of them take no memory. A context manager."""

    def __init__(self):
        self._db = sqlite3.connect("", isolation_level=None)  # a temporary file, which SQLite removes at the end
        self._db.execute("PRAGMA journal_mode = OFF")
        self._db.execute("CREATE TABLE seen (value PRIMARY KEY) WITHOUT ROWID")
        self._db.execute("BEGIN")

    def __enter__(self) -> "_Seen":
        return self

    def __exit__(self, *_) -> None:
        self._db.close()

    def add(self, value: Any) -> bool:
        """Add a value. Returns whether it was not there before."""
        key = value if isinstance(value, int) else _digest(value)
        return self._db.execute("INSERT OR IGNORE INTO seen VALUES (?)", [key]).rowcount == 1

    def has(self, value: int) -> bool:
        return self._db.execute("SELECT 1 FROM seen WHERE value = ?", [value]).fetchone() is not None
