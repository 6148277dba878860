"""Makes the first rows: from topics with quotas, documents in chunks, recorded requests, a few examples, or nothing.

Comes in: a recipe's `Seed`. Goes out: rows. A row whose question the model has to write has the prompt for it under
"ask", or has an "opening" if the model writes in the user's place. Other rows have their "messages" already. Every row
names its group.
"""

import random
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..data.files import find
from ..errors import DataError
from .recipe import Recipe, Seed
from .rows import Row, prompt_of, read
from .split import group_of


def rows(recipe: Recipe) -> Iterator[Row]:
    """The rows of all seeds, in the recipe's order.

    Raises:
        DataError: a file or folder is missing or empty.
    """
    for seed in recipe.seeds:
        of_seed = _KINDS[seed.kind](seed, recipe)
        first = next(of_seed, None)
        if first is None:
            raise DataError(f"seeds of {seed.name} are none: {seed.folder or seed.file} is empty")
        yield first
        yield from of_seed


def raw(recipe: Recipe) -> Iterator[Row]:
    """The texts of people that the seeds are made of: documents in chunks, requests, examples. Topics have none.

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
    """(name of the seed, topic) -> how many rows are wanted."""
    return {(seed.name, topic): quota for seed in recipe.seeds for topic, quota in seed.topics.items()}


def fixed_parts(recipe: Recipe) -> list[str]:
    """The parts of the recipe's prompts between their placeholders, which many questions have in common."""
    prompts = [seed.prompt for seed in recipe.seeds if seed.writes == "answer"]
    return [part for prompt in prompts for part in re.split(r"\{(?:topic|chunk|examples)\}", prompt) if part.strip()]


def filled(prompt: str, **values: Any) -> str:
    """The prompt with each {name} replaced by its value. Other braces stay, because prompts may have their own."""
    placeholder = r"\{(" + "|".join(map(re.escape, values)) + r")\}"
    return re.sub(placeholder, lambda match: str(values[match[1]]), prompt).strip()


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
        if messages[-1]["role"] == "assistant":  # the recorded answer
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
    """Pieces of at most `size` characters, cut between paragraphs if possible, else sentences, words, characters."""
    remaining = text.strip()
    while len(remaining) > size:
        cut = _cut(remaining, size)
        yield remaining[:cut].strip()
        remaining = remaining[cut:].strip()
    if remaining:
        yield remaining


def _cut(text: str, size: int) -> int:
    """Where to cut the first piece off."""
    for between in (r"\n\s*\n", r"(?<=[.!?。！？])\s+|(?<=[。！？])", r"\s+"):
        cut = max((match.start() for match in re.finditer(between, text[: size + 1])), default=0)
        if cut > size // 4:  # avoids tiny pieces
            return cut
    return size
