"""Finds and removes texts that all prompts of a data set share: the pruning rules.

A model that is fine-tuned on prompts without these texts learns what they said, and answers sooner. This is OpenPipe's
idea. Comes in: messages. Goes out: messages, and the rules. The rules are in a file beside the data (`slowft requests
export --prune`) and the adapter (`slowft finetune`), and `apply` is used wherever the adapter is.
"""

import json
import re
from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from .. import platform
from ..errors import DataError, SlowftError, reason_of

FILE = "pruning_rules.json"
SHORTEST = 40  # characters of a rule, about ten tokens. A shorter one saves too little for an odd prompt.
SYSTEM = ("system", "developer")
KEEP = ("assistant",)  # the messages of these roles are not pruned

Messages = Sequence[dict[str, Any]]


def apply(rules: Sequence[str], messages: Messages) -> list[dict[str, Any]]:
    """Remove the texts of the rules from messages.

    A system message is left out if nothing of it remains. Any other message of which nothing would remain stays as it
    was, so that there is always something to answer.
    """
    if not rules:
        return list(messages)
    pruned = []
    for message in messages:
        if message.get("role") in KEEP:
            pruned.append(message)
            continue
        content = _without(rules, message.get("content"))
        if _is_blank(content) and not _is_blank(message.get("content")):
            if message.get("role") not in SYSTEM:
                pruned.append(message)
            continue
        pruned.append(message if content == message.get("content") else {**message, "content": content})
    return pruned or list(messages)


def find(prompts: Iterable[Messages]) -> list[str]:
    """The longest texts of whole words that every prompt has, the longest first. A single prompt has none.

    Each prompt reduces the texts of the first one to what both have. So one pass is enough, and no more than one prompt
    is in memory.
    """
    shared: list[str] | None = None
    first: list[str] = []
    all_equal = True
    for messages in prompts:
        said = [text for message in messages if message.get("role") not in KEEP for text in _texts(message)]
        if shared is None:
            shared, first = [text.strip() for text in said if len(text.strip()) >= SHORTEST], said
            continue
        all_equal = all_equal and said == first
        shared = [piece for text in shared for piece in _pieces(text, said)]
        if not shared:
            return []
    return [] if all_equal or shared is None else sorted(dict.fromkeys(shared), key=len, reverse=True)


def load(folder: str | Path) -> list[str]:
    """Read the rules in a folder of data or of an adapter; it may have none. Raises DataError if their file is bad."""
    file = Path(folder).expanduser() / FILE
    try:
        content = json.loads(file.read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as e:
        raise DataError(f"{file} cannot be read: {reason_of(e)}") from None
    except (ValueError, RecursionError):
        content = None
    rules = content.get("remove") if isinstance(content, dict) else None
    if not isinstance(rules, list) or not all(isinstance(rule, str) and rule for rule in rules):
        raise DataError(f'{file} holds no pruning rules: {{"remove": ["a text", ...]}}. Correct it or remove it')
    return rules


def save(folder: Path, rules: Sequence[str]) -> None:
    """Write the rules into a folder, all or none. If there are no rules, the file of earlier ones is removed."""
    file, temporary = folder / FILE, folder / f".{FILE}.tmp"
    try:
        if not rules:
            file.unlink(missing_ok=True)
            return
        folder.mkdir(parents=True, exist_ok=True)
        with open(temporary, "w", encoding="utf-8") as out:
            out.write(json.dumps({"remove": list(rules)}, indent=1, ensure_ascii=False) + "\n")
            out.flush()
            platform.sync_file(out.fileno())
        temporary.replace(file)
    except OSError as e:
        raise SlowftError(f"{file} cannot be written: {reason_of(e)}") from None


def _texts(message: dict[str, Any]) -> list[str]:
    content = message.get("content")
    if isinstance(content, str):
        return [content]
    parts = content if isinstance(content, list) else []
    return [part["text"] for part in parts if isinstance(part, dict) and isinstance(part.get("text"), str)]


def _without(rules: Sequence[str], content: Any) -> Any:
    if isinstance(content, str):
        pruned = content
        for rule in rules:
            pruned = pruned.replace(rule, "")
        return content if pruned == content else pruned.strip()
    if not isinstance(content, list):
        return content
    return [
        {**part, "text": _without(rules, part["text"])} if isinstance(part, dict) and "text" in part else part
        for part in content
    ]


def _is_blank(content: Any) -> bool:
    if isinstance(content, list):
        return all(isinstance(part, dict) and "text" in part and _is_blank(part["text"]) for part in content)
    return content is None or (isinstance(content, str) and not content.strip())


def _pieces(text: str, said: Sequence[str]) -> list[str]:
    """The pieces of a text that one of the texts `said` has too: the one that has most of it."""
    if any(text in other for other in said):
        return [text]
    common = (_common(text, other) for other in said)
    return max(common, key=lambda pieces: sum(map(len, pieces)), default=[])


def _common(text: str, other: str) -> list[str]:
    """The runs of whole words that both texts have, in the same order."""
    mine, theirs = re.findall(r"\s+|\S+", text), re.findall(r"\s+|\S+", other)
    begin = 0
    while begin < min(len(mine), len(theirs)) and mine[begin] == theirs[begin]:
        begin += 1
    end = 0
    while end < min(len(mine), len(theirs)) - begin and mine[-1 - end] == theirs[-1 - end]:
        end += 1
    # Prompts by one template share mostly a beginning and an end, which are cheap to find. The middle is compared.
    middle = SequenceMatcher(None, mine[begin : len(mine) - end], theirs[begin : len(theirs) - end])
    runs = [mine[:begin]]
    runs += [mine[begin + block.a : begin + block.a + block.size] for block in middle.get_matching_blocks()]
    runs.append(mine[len(mine) - end :])
    return [piece for piece in ("".join(run).strip() for run in runs) if len(piece) >= SHORTEST]
