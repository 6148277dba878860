"""Recorded requests become a data set: lines that training takes, split by conversation, without what is of no use.

Comes in: the file of requests and filters. Goes out: a folder with train.jsonl, valid.jsonl and test.jsonl, perhaps
with the pruning rules that its prompts were pruned by. One row is in memory at a time, whatever there are.
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

FORMS = ("messages", "alpaca", "preferences")
# Rows up to which conversations are counted, so that shares are met exactly; of more, the first must not wait
COUNTED = 2000
CUT_OFF = {"length": "cut off", "content_filter": "cut off by a filter"}
COMPLETE = Filter("status", "equal", "complete")

Sample = dict[str, Any]
# (row, its sample, why it is left out); one of the last two is None
Found = tuple[Recorded, Sample | None, str | None]


@dataclass(frozen=True)
class Export:
    """What to write.

    Attributes:
        form: "messages"; "alpaca": instruction, output, system and history; "preferences": prompt, chosen, rejected.
        valid, test: shares of the samples, about. seed: of which conversations those are.
        by: tag that says what belongs together; without, and of rows that do not have it: a conversation, which is all
            requests with the same first message of the user.
        prune: remove texts that all prompts share, and write the rules.
    """

    form: str = "messages"
    valid: float = 0.05
    test: float = 0.05
    seed: int = 0
    by: str | None = None
    prune: bool = False


def export(store: RequestStore, filters: Sequence[Filter], folder: Path, wanted: Export) -> Counts:
    """Write the folder. Files of an earlier export are replaced when all is written.

    Raises:
        DataError: nothing is left, too few conversations to split, or the folder has rows that slowft did not write.
    """
    check_shares(wanted.valid, wanted.test)
    counts, rules = Counts("export"), []
    if wanted.prune:
        rules = pruning.find(sample["prompt"] for _, sample, _ in _samples(store, filters, wanted, []) if sample)

    def samples() -> Iterator[Found]:
        return _samples(store, filters, wanted, rules)

    split_of = _splits(samples, wanted)
    shares = {"train": 1, "valid": wanted.valid, "test": wanted.test}
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
            split = split_of(_group(row, wanted.by))
            sizes[split] += 1
            out_of[split].row({"id": row.id} | _in_form(sample, wanted.form) | {"group": _group(row, wanted.by)})
        counts.about = {"rows": sizes, "pruned": rules}
        if not counts.went_out:
            what = " Only requests that were relabelled, or kept and discarded, have pairs." * (
                wanted.form == "preferences"
            )
            raise DataError(f"nothing is left to export. {counts.sentence()}.{what} Give other filters")
        if not sizes["train"]:
            raise DataError(f"no rows are left to train on. {counts.sentence()}. Lower --valid and --test")
    pruning.save(folder, rules)
    return counts


def _splits(samples: Callable[[], Iterator[Found]], wanted: Export) -> Callable[[str], str]:
    """The split of a conversation: so that shares are met, or of many samples by a hash of the conversation's name."""
    share = (wanted.valid, wanted.test, wanted.seed)
    if not wanted.valid and not wanted.test:
        return lambda group: "train"
    first = [sample and _group(row, wanted.by) for row, sample, _ in islice(samples(), COUNTED + 1)]
    groups = [group for group in first if group]
    splits: Mapping[str, str] = {}
    if groups and len(first) <= COUNTED:  # these are all
        counts = counted(groups)
        if len(counts) <= sum(map(bool, share[:2])):
            raise DataError(
                f"{len(groups)} samples of {len(counts)} conversation{'s' * (len(counts) != 1)} cannot be split: a "
                "conversation is never in two. Give --valid 0 --test 0, or a tag with --by"
            )
        splits = assign(counts, *share)
    return lambda group: splits.get(group) or drawn(group, *share)


def _group(row: Recorded, by: str | None) -> str:
    if by is not None and by in row.tags:
        return f"{by}={row.tags[by]}"
    return f"{row.conversation:012x}"


def _samples(store: RequestStore, filters: Sequence[Filter], wanted: Export, rules: Sequence[str]) -> Iterator[Found]:
    """{"prompt": messages, "answer": message} of rows, or {"prompt", "answer", "rejected"}, newest first."""
    rows = _pairs(store, filters) if wanted.form == "preferences" else _answers(store, filters)
    with _Seen() as seen:
        for row, sample, why in rows:
            if sample is not None:
                sample["prompt"] = pruning.apply(rules, sample["prompt"])
                why = _not_of_form(sample) if wanted.form == "alpaca" else None
                if why is None and not seen.is_new(sample):
                    why = "the same as a newer one"
            yield row, None if why else sample, why


def _answers(store: RequestStore, filters: Sequence[Filter]) -> Iterator[Found]:
    """Rows with their answers. Of one that was answered anew, the newest answer among those asked for stands for it."""
    with _Seen() as anew:
        for row in store.rows([*filters, COMPLETE], newest_first=True):
            was_anew = anew.has(row.id) or (row.relabels is not None and anew.has(row.relabels))
            sample, why = (None, "answered anew") if was_anew else _sample(row)
            if row.relabels is not None and (sample is not None or was_anew):
                anew.is_new(row.relabels)
            yield row, sample, why


def _pairs(store: RequestStore, filters: Sequence[Filter]) -> Iterator[Found]:
    """Rows with the better and the worse of two answers: the one that was kept, and not discarded; else the new one."""
    for old in store.rows([*filters, COMPLETE, Filter("relabelled", "equal", "yes")], newest_first=True):
        for new in map(store.get, reversed(store.relabelled(old.id))):
            if new.status == "complete":
                better, worse = (old, new) if _rank(old) > _rank(new) else (new, old)
                yield _pair(old, better, worse)
    kept: dict[bytes, Recorded] = {}  # the newest of each prompt; somebody looked at each of these: they are few
    for row in store.rows([*filters, COMPLETE, Filter("kept", "equal", "yes")]):
        kept[_prompt_key(row)] = row
    for row in store.rows([*filters, COMPLETE, Filter("kept", "equal", "no")], newest_first=True):
        better = kept.get(_prompt_key(row))
        if better is not None and better.relabels != row.id and row.relabels != better.id:
            yield _pair(row, better, row)


def _rank(row: Recorded) -> int:
    return {True: 1, None: 0, False: -1}[row.kept]


def _pair(row: Recorded, better: Recorded, worse: Recorded) -> Found:
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
    """(sample, None) or (None, why not)."""
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
    """Why a sample cannot be Alpaca's: a question after pairs of questions and answers, all of them texts."""
    turns = sample["prompt"][sample["prompt"][0]["role"] == "system" :]
    roles = [turn["role"] for turn in turns]
    has_calls = "tools" in sample or any("tool_calls" in turn for turn in (*turns, sample["answer"]))
    return (
        "not of Alpaca's form"
        if has_calls or roles != (["user", "assistant"] * len(roles))[: len(roles)] or (len(roles) % 2 == 0)
        else None
    )


def _in_form(sample: Sample, form: str) -> Sample:
    tools = {"tools": sample["tools"]} if "tools" in sample else {}
    if form == "preferences":
        pair = {"prompt": sample["prompt"], "chosen": [sample["answer"]], "rejected": [sample["rejected"]]}
        return pair | tools
    if form == "messages":
        return {"messages": [*sample["prompt"], sample["answer"]]} | tools
    *before, asked = [turn["content"] for turn in sample["prompt"] if turn["role"] != "system"]
    made = {"instruction": asked, "input": "", "output": sample["answer"]["content"]}
    if sample["prompt"][0]["role"] == "system":
        made["system"] = sample["prompt"][0]["content"]
    return made | ({"history": [before[i : i + 2] for i in range(0, len(before), 2)]} if before else {})


def _prompt_key(row: Recorded) -> bytes:
    return _digest([prompt_messages(row.request), row.request.get("tools")])


def _digest(value: Any) -> bytes:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).digest()


class _Seen:
    """What came before, on disk: a million of them take no memory. A context manager."""

    def __init__(self):
        self._db = sqlite3.connect("", isolation_level=None)  # a file of SQLite's own, gone when it is closed
        self._db.execute("PRAGMA journal_mode = OFF")
        self._db.execute("CREATE TABLE seen (value PRIMARY KEY) WITHOUT ROWID")
        self._db.execute("BEGIN")

    def __enter__(self) -> "_Seen":
        return self

    def __exit__(self, *_) -> None:
        self._db.close()

    def is_new(self, value: Any) -> bool:
        """Whether it was not seen before; from now on it was."""
        key = value if isinstance(value, int) else _digest(value)
        return self._db.execute("INSERT OR IGNORE INTO seen VALUES (?)", [key]).rowcount == 1

    def has(self, value: int) -> bool:
        return self._db.execute("SELECT 1 FROM seen WHERE value = ?", [value]).fetchone() is not None
