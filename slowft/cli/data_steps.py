"""`slowft data make|dedup|check|split|convert`: data by a recipe, and each of its steps alone."""

import json
from contextlib import contextmanager
from pathlib import Path

import click

from .finetune import make_report, warnings_noted
from .options import as_json, awake, need

OVERLAP_WORDS = 13  # as in the recipe
OUT_HELP = "Lines of JSON to write; not written again while nothing has changed."


def files(command):
    return click.argument("files", nargs=-1, required=True, metavar="FILE...")(command)


def output(command):
    return click.option("--output", required=True, metavar="OUT.jsonl", help=OUT_HELP)(command)


def left_out(command):
    return click.option(
        "--left-out", metavar="FILE", help="Rows that were left out, with the reason in their history."
    )(command)


@click.command()
@click.argument("recipe", required=False, metavar="RECIPE.yaml")
@click.option("--output", metavar="DIR", help="Folder to make, in place of the recipe's.")
@click.option("--memory", metavar="SIZE", help="Ceiling for the whole process, in place of the recipe's.")
@click.option("--example", is_flag=True, help="Print a recipe with every field explained, and stop.")
@click.option(
    "--json", "as_json", is_flag=True, help="Notes and counts as JSON lines on standard output, nothing else."
)
@awake
def make(recipe, output, memory, example, as_json):
    """Make a data set: a large model writes questions and answers; rules, marks and duplicates thin them out.

    The steps are: seeds, questions, answers, rules, judge, duplicates, contamination, split, and a page that says what
    was done. Given again, the command goes on where it was stopped, and does again what a changed recipe changes.

    Example:

        slowft data make --example > recipe.yaml
    """
    from dataclasses import replace

    from ..synthesis.recipe import EXAMPLE, load

    if example:
        click.echo(EXAMPLE.read_text("utf-8"), nl=False)
        return
    if recipe is None:
        raise click.UsageError("no recipe given. `slowft data make --example` prints one")
    from ..synthesis.make import make

    file = Path(recipe).expanduser()
    wanted = load(file)
    if output is not None:
        wanted = replace(wanted, output=str(Path(output).expanduser().resolve()))
    if memory is not None:
        wanted = replace(wanted, memory=memory)
    report = make_report(as_json)
    with warnings_noted(report):
        counts = make(wanted, report)
    folder, rows = wanted.path(wanted.output), counts[-1].about["rows"]
    if as_json:
        steps = {one.name: one.as_dict() | {"was_done": one.was_done} for one in counts}
        click.echo(json.dumps({"event": "made", "output": str(folder), "rows": rows, "steps": steps}))
    else:
        told = ", ".join(f"{n:,} in {name}.jsonl" for name, n in rows.items())
        click.echo(f"{folder} holds {told}; README.md says how they were made")


@click.command()
@files
@output
@left_out
@click.option(
    "--on",
    type=click.Choice(["question", "answer", "both"]),
    default="both",
    show_default=True,
    help="What of a row is compared; short answers always with their question.",
)
@click.option("--threshold", type=float, default=0.8, show_default=True, help="How alike (Jaccard); 1: the same words.")
@click.option("--words", type=int, default=3, show_default=True, help="In the runs of words that are compared.")
@as_json
def dedup(files, output, left_out, on, threshold, words, as_json):
    """Leave out rows that say what an earlier row said: in the same words, or nearly (MinHash).

    Case, signs and spaces make no difference. Rows are any that `slowft finetune --data` takes, and `generate`'s.

    Example:

        slowft data dedup answers.jsonl --output unique.jsonl --on answer
    """
    from ..synthesis import filters

    with _step("dedup", files, output, left_out, as_json) as do:
        options = {"on": on, "threshold": threshold, "words": words}
        do(lambda reading, seen: filters.without_duplicates(reading, on, threshold, words, seen), options)


@click.command()
@files
@output
@left_out
@click.option("--language", metavar="CODE", help="What answers must be in, such as en.")
@click.option(
    "--script", "scripts", multiple=True, help="Unicode's name of what letters may be, such as LATIN; several."
)
@click.option("--answers-are-json", is_flag=True, help="Answers must be JSON whatever the question asks for.")
@click.option(
    "--repetition", type=float, default=0.3, show_default=True, help="Most of runs of 4 words that came before."
)
@click.option("--copies", type=float, default=0.5, show_default=True, help="Most of runs of 8 words from the question.")
@click.option("--refusal", "refusals", multiple=True, metavar="REGEX", help="How refusals begin, too; several.")
@click.option("--own", multiple=True, metavar="RULE", help='file.py:function, or "! command"; several. See the docs.')
@click.option("--against", multiple=True, metavar="FILE", help="Leave out what shares words with this file; several.")
@click.option("--words", type=int, default=OVERLAP_WORDS, show_default=True, help="In a run that rows must not share.")
@as_json
def check(files, output, left_out, against, words, answers_are_json, as_json, **options):
    """Leave out rows by rules: cut off, empty, refused, repeated, copied, of another language, no valid JSON, your own.

    With --against, also those whose question or answer shares a run of 13 words with a test set.

    Example:

        slowft data check answers.jsonl --output good.jsonl --language en --against test.jsonl
    """
    need(words="against")
    from ..synthesis import contamination, filters, rows, steps
    from ..synthesis.rules import Rules

    listed = {key: list(value) if isinstance(value, tuple) else value for key, value in options.items()}
    rules = Rules(**listed, json="always" if answers_are_json else "asked")
    rules.check()
    others = [Path(file).expanduser() for file in against]
    own = [name.rpartition(":")[0] for name in rules.own]
    given = listed | {"json": rules.json, "words": words}
    given["files"] = [steps.digest(Path(name)) for name in own if Path(name).is_file()]

    def found(reading, _):
        if not others:
            return filters.by_rules(reading(), rules, Path())
        texts = contamination.Texts(rows.read(others), words)
        names = ", ".join(file.name for file in others)
        shared = texts.shared(reading())
        return (
            (row, entry, why or (f"shares words with {names}" if n else None))
            for (row, entry, why), n in zip(filters.by_rules(reading(), rules, Path()), shared)
        )

    with _step("check", files, output, left_out, as_json, others) as do:
        do(found, given)


@click.command()
@files
@click.option("--output", required=True, metavar="DIR", help="Folder for train.jsonl, valid.jsonl and test.jsonl.")
@left_out
@click.option("--valid", type=float, default=0.05, show_default=True, help="Share of the rows, about.")
@click.option("--test", type=float, default=0.05, show_default=True, help="Share of the rows, about.")
@click.option("--by", metavar="KEY", help="What of a row is never split. [default: group, document, topic or question]")
@click.option("--seed", type=int, default=0, show_default=True, help="Of which groups are held back.")
@click.option("--words", type=int, default=OVERLAP_WORDS, show_default=True, help="In a run that rows must not share.")
@as_json
def split(files, output, left_out, valid, test, by, seed, words, as_json):
    """Share rows out to train, valid and test by group, never by row: a document, a topic, at least a question.

    Rows of train that share a run of words with valid or test are left out, as are those of valid with test.

    Example:

        slowft data split rows.jsonl --output my-data --valid 0.1 --by document
    """
    from ..errors import DataError
    from ..reports.base import late
    from ..synthesis import filters, rows
    from ..synthesis.convert import as_messages
    from ..synthesis.split import SPLITS, check_shares

    check_shares(valid, test)
    report, folder = make_report(as_json), Path(output).expanduser()
    inputs = [Path(file).expanduser() for file in files]
    used = [s for s in SPLITS if {"train": 1, "valid": valid, "test": test}[s]]
    outputs = [folder / f"{name}.jsonl" for name in used]
    outputs += [Path(left_out).expanduser()] if left_out else []

    def work(counts, outs):
        out_of, sizes = dict(zip(used, outs)), dict.fromkeys(used, 0)
        total = sum(rows.count(file) for file in inputs if file.is_file())
        reading = filters.into_splits(
            lambda: rows.read(inputs),
            *(valid, test, seed, by, words),
            watched=lambda listed: late(report, listed, "Comparing", total),
        )
        for row, name, why in late(report, reading, "Split", total):
            counts.came_in += 1
            if why is None:
                counts.went_out += 1
                sizes[name] += 1
                out_of[name].row(as_messages(rows.noted(row, {"step": "split", "split": name})))
                continue
            counts.leave_out(why)
            if left_out:
                outs[-1].row(rows.noted(row, {"step": "split", "split": name, "left_out": why}))
        counts.about = {"rows": sizes}
        if not sizes["train"]:
            raise DataError(
                f"no rows are left to train on. {counts.sentence()}. Give more, or lower --valid and --test"
            )

    options = {"valid": valid, "test": test, "by": by, "seed": seed, "words": words}
    optional = [file for name, file in zip(used, outputs) if name != "train"]
    counts = _run("split", folder / "split.manifest.json", inputs, outputs, options, work, optional)
    _tell(counts, report, as_json)


@click.command()
@files
@output
@click.option(
    "--to", type=click.Choice(["messages", "preferences"]), default="messages", show_default=True, help="Form to write."
)
@as_json
def convert(files, output, to, as_json):
    """Write rows of any form as conversations, or as prompt, chosen and rejected where two answers were judged.

    Example:

        slowft data convert answers.jsonl --output train.jsonl
    """
    from ..synthesis import convert as forms
    from ..synthesis import rows

    inputs, file = [Path(name).expanduser() for name in files], Path(output).expanduser()

    def work(counts, outs):
        for row in rows.read(inputs):
            counts.came_in += 1
            made = forms.as_messages(row) if to == "messages" else forms.as_preference(row)
            if made is None:
                counts.leave_out("one answer alone")
            else:
                counts.went_out += 1
                outs[0].row(made)

    counts = _run("convert", _manifest(file), inputs, [file], {"to": to}, work)
    _tell(counts, make_report(as_json), as_json)


@contextmanager
def _step(name: str, files, output: str, left_out: str | None, as_json: bool, others=()):
    """A step over files, which the function that this gives does."""
    from ..reports.base import late
    from ..synthesis import rows, steps

    report, file = make_report(as_json), Path(output).expanduser()
    inputs = [Path(name).expanduser() for name in files]
    outputs = [file] + ([Path(left_out).expanduser()] if left_out else [])

    def do(found, options):
        def work(counts, outs):
            total = sum(rows.count(file) for file in inputs if file.is_file())
            kept, *rest = outs
            reading = found(lambda: rows.read(inputs), lambda listed: late(report, listed, "Comparing", total))
            steps.sift(reading, counts, kept, rest[0] if rest else None, report, total)

        counts = _run(name, _manifest(file), [*inputs, *others], outputs, options, work)
        _tell(counts, report, as_json)

    yield do


def _run(name: str, manifest: Path, inputs, outputs, *rest):
    """`steps.run`, which may write over what a step wrote, but not over rows of the user's own."""
    from ..errors import ConfigError
    from ..synthesis import rows, steps

    if same := {file.resolve() for file in inputs} & {file.resolve() for file in outputs}:
        raise ConfigError(f"{min(same)} is read, and cannot be written too. Give another --output")
    if not manifest.exists():
        rows.check_replaceable(outputs)
    return steps.run(name, manifest, inputs, outputs, *rest)


def _manifest(file: Path) -> Path:
    return file.with_name(f"{file.name}.manifest.json")


def _tell(counts, report, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps({"event": counts.name} | counts.as_dict() | {"was_done": counts.was_done}))
    else:
        report.note(counts.sentence())
