"""Writes the page of a data set: a README.md with the hub's header, how the set was made, what was left out, examples.

The header's fields are described in https://huggingface.co/docs/hub/datasets-cards.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import yaml

from ..models.loading import find_local
from ..version import __version__
from .recipe import Recipe
from .rows import Row, count, lines
from .steps import Counts

SIZES = [
    (1_000, "n<1K"),
    (10_000, "1K<n<10K"),
    (100_000, "10K<n<100K"),
    (1_000_000, "100K<n<1M"),
    (10_000_000, "1M<n<10M"),
]
SPLIT_NAMES = {"train": "train", "valid": "validation", "test": "test"}  # ours -> the hub's
SHOWN_CHARACTERS = 1500  # an example's longer texts are cut here

WHAT_STEPS_DO = {
    "seeds": "What questions come from",
    "questions": "Questions by the model",
    "question duplicates": "Questions that were asked before",
    "answers": "Answers by the model",
    "rules": "Rules",
    "judge": "Marks by a model",
    "answer duplicates": "Answers that were given before",
    "contamination": "Words shared with other data",
    "quotas": "Rows wanted of each topic",
    "split": "Shared out by group; train shares no run of words with valid and test",
}


def text(recipe: Recipe, counts: Sequence[Counts], files: dict[str, Path]) -> str:
    """The whole page.

    Args:
        counts: what each step counted, in their order.
        files: the data set's files by name, such as "train" or "preferences/train".
    """
    name = recipe.card.name or recipe.path(recipe.output).name
    parts = [header(recipe, files), f"# {name}\n"]
    rows = ", ".join(f"{count(file):,} in `{key}.jsonl`" for key, file in files.items())
    parts.append(
        f"Questions and answers written by a language model with slowft {__version__}: {rows}. "
        "Each row's `history` says what made it and what it passed.\n"
    )
    parts.append("## Steps\n\n" + table(counts))
    parts.append("## Models\n\n" + models(recipe))
    parts.append("## Prompts\n\n" + prompts(recipe))
    parts.append("## Settings\n\n" + settings(recipe))
    parts.append("## Examples\n\n" + examples(recipe, files["train"]))
    return "\n".join(parts)


def header(recipe: Recipe, files: dict[str, Path]) -> str:
    """The YAML that the hub reads."""
    n = sum(count(file) for key, file in files.items() if "/" not in key)
    size = next((name for limit, name in SIZES if n < limit), "n>10M")
    row_files = [{"split": SPLIT_NAMES[key], "path": f"{key}.jsonl"} for key in files if "/" not in key]
    pair_files = [{"split": SPLIT_NAMES[key.rpartition("/")[2]], "path": f"{key}.jsonl"} for key in files if "/" in key]
    about: dict[str, Any] = {"license": recipe.card.license or "other", "pretty_name": recipe.card.name}
    about |= {"language": list(recipe.card.language), "task_categories": ["text-generation"]}
    about |= {"tags": ["synthetic", "slowft"], "size_categories": [size]}
    about["configs"] = [{"config_name": "default", "data_files": row_files}]
    if pair_files:
        about["configs"].append({"config_name": "preferences", "data_files": pair_files})
    about = {key: value for key, value in about.items() if value}
    return f"---\n{yaml.safe_dump(about, sort_keys=False, allow_unicode=True)}---\n"


def table(counts: Sequence[Counts]) -> str:
    rows = ["| step | what | in | out | left out |", "|---|---|---:|---:|---|"]
    for step in counts:
        reasons = ", ".join(f"{n:,} {why}" for why, n in step.as_dict()["left_out"].items())
        cells = [step.name, WHAT_STEPS_DO[step.name], f"{step.came_in:,}", f"{step.went_out:,}", reasons]
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def models(recipe: Recipe) -> str:
    listed = [("writes questions and answers", recipe.model)]
    if recipe.judge is not None:
        listed.append(("judges answers", recipe.judge.model or recipe.model))
    rows = ["| model | does | licence |", "|---|---|---|"]
    for what, name in listed:
        path = recipe.model_path(name)
        shown = Path(name).name if find_local(path) is not None and Path(path).exists() else name
        rows.append(f"| {shown} | {what} | {licence(path) or 'its page names none'} |")
    return "\n".join(rows) + "\n\nWhat a model's licence says of its output holds for this data set.\n"


def licence(path: str) -> str | None:
    """The licence that a model's own page names, in its directory or on the hub; None if it names none."""
    file = page_of(path)
    if file is None:
        return None
    header = re.match(r"---\n(.*?)\n---\n", file.read_text("utf-8", "replace"), re.DOTALL)
    try:
        about = yaml.safe_load(header[1]) if header else None
    except yaml.YAMLError:
        return None
    if not isinstance(about, dict) or not about.get("license"):
        return None
    return str(about.get("license_name") or about["license"])


def page_of(path: str) -> Path | None:
    """A model's README.md, if there is one."""
    directory = find_local(path)
    if directory is not None:
        file = directory / "README.md"
        return file if file.is_file() else None
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(path, "README.md"))
    except Exception:  # the library raises many kinds, which all mean that the page cannot be had
        return None


def prompts(recipe: Recipe) -> str:
    parts = []
    for seed in recipe.seeds:
        what = f"### {seed.name}\n\nSeeds of kind {seed.kind}"
        if seed.topics:
            what += ": " + ", ".join(f"{topic} ({quota})" for topic, quota in seed.topics.items())
        elif seed.folder or seed.file:
            what += f": {Path(seed.folder or seed.file).name}"
        parts.append(what + ".\n")
        if seed.kind == "template":
            parts.append("The model wrote in the user's place, after its chat template's opening (2406.08464).\n")
        for title, prompt in (
            ("Asked for a " + seed.writes, seed.prompt),
            ("Asked for the answer", seed.answer_prompt),
        ):
            if prompt:
                parts.append(f"{title}:\n\n{fenced(prompt)}")
        if seed.examples:
            parts.append(fenced("\n".join(f"- {example}" for example in seed.examples)))
    if recipe.judge is not None:
        parts.append(f"### Judge\n\nMarks {recipe.judge.marks}, threshold {recipe.judge.threshold:g}.\n")
        parts.append(fenced(recipe.judge.prompt))
        if recipe.judge.pairs:
            parts.append(fenced(recipe.judge.pair_prompt))
    return "\n".join(parts)


def settings(recipe: Recipe) -> str:
    """The recipe's settings for generating and for leaving rows out. Files are shown without their folders."""
    parts = []
    for title, how in (("Questions", recipe.questions), ("Answers", recipe.answers)):
        defaults = {f.name: f.default for f in fields(how)}
        given = {
            name: v for name, v in asdict(how).items() if v and (v != defaults[name] or name in ("temp", "max_tokens"))
        }
        parts.append(f"{title}: `{json.dumps(given | {'seed': how.seed}, ensure_ascii=False)}`\n")
    parts.append(f"Random seed: {recipe.seed}\n")
    for title, part in (
        ("Rules", recipe.rules),
        ("Duplicates", recipe.duplicates),
        ("Contamination", recipe.contamination),
        ("Split", recipe.split),
    ):
        shown = {name: value for name, value in asdict(part).items() if value not in (None, [])}
        if "files" in shown:
            shown["files"] = [Path(file).name for file in shown["files"]]
        parts.append(f"{title}: `{json.dumps(shown, ensure_ascii=False)}`\n")
    return "\n".join(parts)


def examples(recipe: Recipe, file: Path) -> str:
    parts = []
    for row, _ in zip(lines(file), range(recipe.card.examples)):
        parts.append(fenced("\n\n".join(f"{role}: {_shortened(content)}" for role, content in _turns(row))))
    return "\n".join(parts) or "None.\n"


def _turns(row: Row) -> list[tuple[str, str]]:
    if "messages" in row:
        return [(message["role"], message["content"]) for message in row["messages"]]
    return [("text", row["text"])]


def _shortened(content: str) -> str:
    return content if len(content) <= SHOWN_CHARACTERS else content[:SHOWN_CHARACTERS] + " ..."


def fenced(content: str) -> str:
    """The text in a fence of Markdown that is longer than any fence in the text, so that it is shown unchanged."""
    longest = max((len(ticks) for ticks in re.findall("`+", content)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{content.rstrip()}\n{fence}\n"
