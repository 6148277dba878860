"""Where questions come from: topics with quotas, documents in chunks, recorded requests, a few examples, or nothing.

Comes in: a recipe's `Seed`. Goes out: rows. One that asks the model for a question has it under "ask", or "opening"
where the model is to write in the user's place; others have their "messages" already. Every row says which group it
is of.
"""

import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..data.files import find
from ..errors import DataError
from .recipe import Recipe, Seed
from .rows import Row, prompt_of, read
from .split import group_of


def rows(recipe: Recipe) -> Iterator[Row]:
    """Of all seeds, in their order.

    Raises:
        DataError: a file or folder that is not there, or holds nothing.
    """
    for seed in recipe.seeds:
        found = _KINDS[seed.kind](seed, recipe)
        first = next(found, None)
        if first is None:
            raise DataError(f"seeds of {seed.name} are none: {seed.folder or seed.file} is empty")
        yield first
        yield from found


def raw(recipe: Recipe) -> Iterator[Row]:
    """What people wrote that the seeds are made of: documents in chunks, requests, examples. Topics have nothing.

    Rows have a "text" or "messages", and their "group".
    """
    for seed in recipe.seeds:
        if seed.kind == "documents":
            plain = replace(seed, prompt="{chunk}", writes="answer", answer_prompt=None, count=1)
            for row in _documents(plain, recipe):
                yield {"id": row["id"], "text": row["messages"][0]["content"], "group": row["group"]}
        elif seed.kind == "requests":
            for row in read([recipe.path(seed.file)]):
                yield {"group": group_of(row)} | {key: row[key] for key in ("id", "text", "messages") if key in row}
        elif seed.kind == "examples":
            for i, text in enumerate(_listed(seed, recipe)):
                yield {"id": f"{seed.name}/{i}", "text": text, "group": f"{seed.name} {i}"}


def quotas(recipe: Recipe) -> dict[tuple[str, str], int]:
    """(name of the seeds, topic) -> rows wanted."""
    return {(seed.name, topic): quota for seed in recipe.seeds for topic, quota in seed.topics.items()}


def fixed_parts(recipe: Recipe) -> list[str]:
    """What prompts have in common because the recipe says so: pieces of them between what is put in."""
    prompts = [seed.prompt for seed in recipe.seeds if seed.writes == "answer"]
    return [part for prompt in prompts for part in re.split(r"\{(?:topic|chunk|examples)\}", prompt) if part.strip()]


def filled(prompt: str, **values: Any) -> str:
    """The prompt with {name} replaced by each value, and nothing else: prompts may have braces of their own."""
    return re.sub(
        r"\{(" + "|".join(map(re.escape, values)) + r")\}", lambda found: str(values[found[1]]), prompt
    ).strip()


def _row(seed: Seed, number: str, group: str, values: dict[str, str], **about: Any) -> Row:
    row = {"id": f"{seed.name}/{number}", "source": seed.name, "group": group, **about}
    asked = filled(seed.prompt, **values)
    if seed.writes == "answer":
        row["messages"] = [{"role": "user", "content": asked}]
    else:
        row["ask"] = asked
    if seed.answer_prompt is not None:
        row["answer_prompt"], row["put_in"] = seed.answer_prompt, values
    return row | {"history": [{"step": "seed", "source": seed.name, "kind": seed.kind}]}


def _topics(seed: Seed, recipe: Recipe) -> Iterator[Row]:
    for topic, quota in seed.topics.items():
        for i in range(round(seed.spare * quota)):
            yield _row(seed, f"{topic}/{i}", f"{seed.name}/{topic}", {"topic": topic}, topic=topic)


def _documents(seed: Seed, recipe: Recipe) -> Iterator[Row]:
    folder = recipe.path(seed.folder)
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder that is there. Give one of text files")
    sources, _ = find(folder, None)
    for found in sources["train"].read():
        if found.reason:
            raise DataError(f"{found.place} {found.reason}")
        name = Path(found.file).relative_to(folder).as_posix() + (f" {found.number}" if found.unit else "")
        text = found.sample.get("text")
        if not isinstance(text, str):
            raise DataError(f'{found.place} has no "text". Give a folder of text files')
        for i, piece in enumerate(chunks(text, seed.chunk)):
            for k in range(seed.count):
                about = {"document": name, "chunk": i}
                yield _row(seed, f"{name}/{i}/{k}", f"{seed.name}/{name}", {"chunk": piece}, **about)


def _requests(seed: Seed, recipe: Recipe) -> Iterator[Row]:
    file = recipe.path(seed.file)
    for i, row in enumerate(read([file])):
        messages = row.get("messages") or [{"role": "user", "content": row["text"]}]
        if messages[-1]["role"] == "assistant":  # an answer that somebody recorded
            messages = messages[:-1]
        if not messages or not messages[-1]["content"].strip():
            raise DataError(f"{file} row {i + 1} asks nothing. Remove it")
        entry = {"step": "seed", "source": seed.name, "kind": seed.kind, "request": row["id"]}
        made = {"id": f"{seed.name}/{i}", "source": seed.name, "group": group_of(row)}
        yield made | {"messages": messages, "history": [entry]}


def _examples(seed: Seed, recipe: Recipe) -> Iterator[Row]:
    listed = _listed(seed, recipe)
    for i in range(seed.count):
        drawn = random.Random(f"{recipe.seed} {seed.name} {i}").sample(listed, min(seed.shown, len(listed)))
        text = "\n".join(f"- {example}" for example in drawn)
        yield _row(seed, str(i), f"{seed.name}/{i}", {"examples": text})


def _listed(seed: Seed, recipe: Recipe) -> list[str]:
    return seed.examples or [prompt_of(row) or row.get("text", "") for row in read([recipe.path(seed.file)])]


def _template(seed: Seed, recipe: Recipe) -> Iterator[Row]:
    for i in range(seed.count):
        row = {"id": f"{seed.name}/{i}", "source": seed.name, "group": f"{seed.name}/{i}", "opening": seed.system or ""}
        yield row | {"history": [{"step": "seed", "source": seed.name, "kind": seed.kind}]}


_KINDS = {
    "topics": _topics,
    "documents": _documents,
    "requests": _requests,
    "examples": _examples,
    "template": _template,
}


def chunks(text: str, size: int) -> Iterator[str]:
    """Pieces of at most `size` characters, cut between paragraphs if that can be, else sentences, words, characters."""
    left = text.strip()
    while len(left) > size:
        cut = _cut(left, size)
        yield left[:cut].strip()
        left = left[cut:].strip()
    if left:
        yield left


def _cut(text: str, size: int) -> int:
    for between in (r"\n\s*\n", r"(?<=[.!?。！？])\s+|(?<=[。！？])", r"\s+"):
        ends: Iterable[int] = (found.start() for found in re.finditer(between, text[: size + 1]))
        at = max(ends, default=0)
        if at > size // 4:  # no tiny pieces
            return at
    return size
