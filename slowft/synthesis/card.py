"""The page of a data set: a README.md with the hub's header, how it was made, what was left out and why, and examples.

https://huggingface.co/docs/hub/datasets-cards
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
SPLIT_NAMES = {"train": "train", "valid": "validation", "test": "test"}  # the hub's
SHOWN_CHARACTERS = 1500  # of a text

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
    """Args: files: by split, and by preferences/split."""
    name = recipe.card.name or recipe.path(recipe.output).name
    parts = [header(recipe, files), f"# {name}\n"]
    rows = ", ".join(f"{count(file):,} in `{file_name(key)}`" for key, file in files.items())
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
    of_rows = [{"split": SPLIT_NAMES[key], "path": f"{key}.jsonl"} for key in files if "/" not in key]
    of_pairs = [{"split": SPLIT_NAMES[key.rpartition("/")[2]], "path": f"{key}.jsonl"} for key in files if "/" in key]
    about: dict[str, Any] = {"license": recipe.card.license or "other", "pretty_name": recipe.card.name}
    about |= {"language": list(recipe.card.language), "task_categories": ["text-generation"]}
    about |= {"tags": ["synthetic", "slowft"], "size_categories": [size]}
    about["configs"] = [{"config_name": "default", "data_files": of_rows}]
    if of_pairs:
        about["configs"].append({"config_name": "preferences", "data_files": of_pairs})
    about = {key: value for key, value in about.items() if value}
    return f"---\n{yaml.safe_dump(about, sort_keys=False, allow_unicode=True)}---\n"


def file_name(key: str) -> str:
    return f"{key}.jsonl"


def table(counts: Sequence[Counts]) -> str:
    rows = ["| step | what | in | out | left out |", "|---|---|---:|---:|---|"]
    for one in counts:
        reasons = ", ".join(f"{n:,} {why}" for why, n in one.as_dict()["left_out"].items())
        cells = [one.name, WHAT_STEPS_DO[one.name], f"{one.came_in:,}", f"{one.went_out:,}", reasons]
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
    """What a model's own page says, in its directory or on the hub."""
    file = page_of(path)
    found = re.match(r"---\n(.*?)\n---\n", file.read_text("utf-8", "replace"), re.DOTALL) if file is not None else None
    try:
        about = yaml.safe_load(found[1]) if found else None
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
    except Exception:  # the library raises many kinds, all of which mean: not to be had
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
    """How was generated and left out, as in the recipe; of files, the names alone."""
    parts = []
    for title, how in (("Questions", recipe.questions), ("Answers", recipe.answers)):
        usual = {f.name: f.default for f in fields(how)}
        given = {
            name: v for name, v in asdict(how).items() if v and (v != usual[name] or name in ("temp", "max_tokens"))
        }
        parts.append(f"{title}: `{json.dumps(given | {'seed': how.seed}, ensure_ascii=False)}`\n")
    parts.append(f"Random seed: {recipe.seed}\n")
    for title, given in (
        ("Rules", recipe.rules),
        ("Duplicates", recipe.duplicates),
        ("Contamination", recipe.contamination),
        ("Split", recipe.split),
    ):
        shown = {name: value for name, value in asdict(given).items() if value not in (None, [])}
        if "files" in shown:
            shown["files"] = [Path(file).name for file in shown["files"]]
        parts.append(f"{title}: `{json.dumps(shown, ensure_ascii=False)}`\n")
    return "\n".join(parts)


def examples(recipe: Recipe, file: Path) -> str:
    parts = []
    for row, _ in zip(lines(file), range(recipe.card.examples)):
        parts.append(fenced("\n\n".join(f"{role}: {_shortened(said)}" for role, said in _turns(row))))
    return "\n".join(parts) or "None.\n"


def _turns(row: Row) -> list[tuple[str, str]]:
    if "messages" in row:
        return [(message["role"], message["content"]) for message in row["messages"]]
    return [("text", row["text"])]


def _shortened(said: str) -> str:
    return said if len(said) <= SHOWN_CHARACTERS else said[:SHOWN_CHARACTERS] + " ..."


def fenced(content: str, kind: str = "text") -> str:
    """As Markdown shows it as it is: the fence is longer than any in it."""
    longest = max((len(ticks) for ticks in re.findall("`+", content)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{kind}\n{content.rstrip()}\n{fence}\n"
