"""`slowft requests`: what was recorded, and what becomes of it."""

import json
import os
from datetime import datetime
from pathlib import Path

import click

from ..errors import printable
from .finetune import make_report, warnings_noted
from .options import awake, need, trust_remote_code

SHOWN = 60  # characters of a question in a list


def db(command):
    return click.option(
        "--db", default="requests.db", show_default=True, metavar="FILE", help="File of recorded requests."
    )(command)


def where(command):
    return click.option(
        "--where",
        multiple=True,
        metavar="FILTER",
        help="FIELD=VALUE, != is not, ~ contains, !~ lacks; several must all be true. Fields: model, status, tag.NAME, "
        "time (>=, <), text, prompt, answer, source, path, kept, relabelled; see docs/requests.md.",
    )(command)


def as_json(command):
    return click.option("--json", "as_json", is_flag=True, help="JSON lines on standard output, nothing else.")(command)


@click.group()
@click.option("--db", metavar="FILE", help="File of recorded requests, of whichever command follows.")
@click.option("--json", "as_json", is_flag=True, help="As --json of the command that follows.")
@click.pass_context
def requests(ctx, db, as_json):
    """Look at recorded requests, tag them, have them answered anew, and make training data of them.

    They are in one file, which `slowft serve --record`, `slowft.record(client)` and `slowft requests import` write.

    Example:

        slowft requests list
    """
    given = {name: value for name, value in (("db", db), ("as_json", as_json)) if value}
    ctx.default_map = {name: given for name in ctx.command.commands}


def _store(db: str):
    """The file, which has to be there; if it may be written, requests of processes that are gone are marked broken."""
    from ..requests.store import RequestStore

    return RequestStore(db, read_only=not os.access(Path(db).expanduser(), os.W_OK))


def _filters(where):
    from ..requests.filters import parse

    return [parse(text) for text in where]


@requests.command("list")
@db
@where
@click.option("--limit", type=click.IntRange(1), default=50, show_default=True, help="Rows at most.")
@click.option("--before", type=int, metavar="ID", help="Rows older than this one: the next page.")
@as_json
def list_(db, where, limit, before, as_json):
    """List requests, the newest first.

    Example:

        slowft requests list --where model=gpt-4o --where status!=complete --where "text~refund"
    """
    filters = _filters(where)
    with _store(db) as store:
        found = store.list(filters, before, limit)
    for row in found:
        click.echo(_as_json(row) if as_json else _line(row))
    if not as_json and len(found) == limit:
        click.echo(f"Older ones: --before {found[-1].id}")
    if not as_json and not found:
        click.echo("No such requests")


@requests.command()
@click.argument("id", type=int)
@db
@as_json
def show(id, db, as_json):
    """Show a request and its answer.

    Example:

        slowft requests show 12
    """
    with _store(db) as store:
        row = store.get(id)
        anew = store.relabelled(id)
    if as_json:
        click.echo(_as_json(row))
        return
    from ..requests.texts import answer_message, message_text, prompt_messages

    click.echo(_line(row))
    if row.error:
        click.echo(f"Error: {printable(row.error)}")
    if anew:
        click.echo(f"Answered anew by {', '.join(map(str, anew))}")
    answer = answer_message(row.response)
    for message in [*prompt_messages(row.request), *([answer] if answer else [])]:
        click.echo(f"\n{click.style(_printable(message.get('role', 'user')), bold=True)}")
        click.echo("\n".join(map(_printable, message_text(message).split("\n"))))


@requests.command()
@click.argument("ids", type=int, nargs=-1, metavar="[ID]...")
@db
@where
@click.option("--set", "values", multiple=True, metavar="NAME=VALUE", help="Tag to give; several.")
@click.option("--remove", multiple=True, metavar="NAME", help="Tag to take away; several.")
@click.option("--keep/--discard", "kept", default=None, help="As a training sample.")
@as_json
def tag(ids, db, where, values, remove, kept, as_json):
    """Tag requests, and keep or discard them as training samples.

    Example:

        slowft requests tag 12 13 --set reviewed=yes --keep
    """
    if not ids and not where:
        raise click.UsageError("which ones? Give ids, or --where")
    tags = dict.fromkeys(remove)
    for text in values:
        name, sign, value = text.partition("=")
        if not sign or not name:
            raise click.UsageError(f"--set {text!r} is not NAME=VALUE")
        tags[name] = value
    if not tags and kept is None:
        raise click.UsageError("nothing to do. Give --set, --remove, --keep or --discard")
    filters = _filters(where)
    with _store(db) as store:
        chosen = [*ids, *(store.ids(filters) if where else ())]
        store.mark(chosen, tags, kept)
    if as_json:
        click.echo(json.dumps({"marked": len(chosen)}))
    else:
        click.echo(f"{len(chosen):,} request{'s' * (len(chosen) != 1)} marked")


@requests.command("import", short_help="Import others' logs: OpenPipe's, OpenAI's, conversations.")
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@db
@click.option("--redact", multiple=True, metavar="REGEX", help="Replaced in every text before it is written; several.")
@click.option("--prices", metavar="FILE.yaml", help="What a million tokens of each model cost; see docs/requests.md.")
@click.option("--tag", "tags", multiple=True, metavar="NAME=VALUE", help="Tag of all rows; several.")
@as_json
def import_(files, db, redact, prices, tags, as_json):
    """Import others' logs: OpenPipe's export, OpenAI's batches and stored completions, conversations.

    All lines are imported or none: those that are malformed are named with their numbers.

    Example:

        slowft requests import openpipe.jsonl --tag from=openpipe
    """
    from ..requests import imports
    from ..requests.prices import load
    from ..requests.store import RequestStore

    more = dict(text.partition("=")[::2] for text in tags)
    rows = imports.read([Path(file).expanduser() for file in files])
    is_new = not Path(db).expanduser().exists()
    with RequestStore(db, redact=redact, prices=load(prices) if prices else None) as store:
        try:
            n = store.add({**row, "tags": row["tags"] | more} for row in rows)
        except BaseException:
            if is_new:
                store.remove()
            raise
    if as_json:
        click.echo(json.dumps({"imported": n}))
    else:
        click.echo(f"{n:,} request{'s' * (n != 1)} imported into {db}")


@requests.command(short_help="Have another model answer requests anew.")
@db
@where
@click.option("--model", required=True, help="Who answers: a directory that mlx-lm loads, or a hub id.")
@click.option("--adapter-path", metavar="DIR", help="Adapter to answer with.")
@click.option("--name", help="What new rows say as their model. [default: --model]")
@click.option("--limit", type=click.IntRange(1), help="Rows at most, the newest.")
@click.option(
    "-m", "--max-tokens", type=int, default=1024, show_default=True, help="Of an answer whose request says none."
)
@click.option("--temp", type=float, default=0.0, show_default=True, help="0 takes the likeliest token.")
@click.option("--top-p", type=float, default=1.0, show_default=True, help="Of the likeliest tokens, this much.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of random numbers; each row has its own.")
@click.option("--wave", type=int, help="Rows at a time; by default as many as --memory lets.")
@click.option("--memory", metavar="SIZE", help="Ceiling for the whole process. [default: half of the machine's]")
@trust_remote_code
@as_json
@awake
def relabel(db, where, model, adapter_path, name, limit, memory, trust_remote_code, as_json, **how):
    """Have another model answer requests anew, many in each reading of its weights.

    The new answer is a row of its own beside the old one. Given again, the command goes on where it was stopped.

    Example:

        slowft requests relabel --model Qwen/Qwen3-32B --where tag.app=shop --limit 500
    """
    need(top_p="temp")
    from ..inference.session import Session, Settings
    from ..synthesis import relabel as anew

    filters, report = _filters(where), make_report(as_json)
    with _store(db) as store, warnings_noted(report):
        with Session(model, Settings(**how), adapter_path, memory, None, trust_remote_code) as session:
            counts = anew.relabel(store, filters, session, name or model, report, limit)
    _tell(counts, report, as_json)


@requests.command(short_help="Make training data of complete answers.")
@db
@where
@click.option("--output", required=True, metavar="DIR", help="Folder to write.")
@click.option(
    "--form",
    type=click.Choice(["messages", "alpaca", "preferences"]),
    default="messages",
    show_default=True,
    help="Conversations; instruction and output; or prompt, chosen and rejected.",
)
@click.option("--valid", type=float, default=0.05, show_default=True, help="Share of the samples, about.")
@click.option("--test", type=float, default=0.05, show_default=True, help="Share of the samples, about.")
@click.option("--by", metavar="TAG", help="Tag that says what is never split. [default: the user's first message]")
@click.option("--seed", type=int, default=0, show_default=True, help="Of which conversations are held back.")
@click.option("--prune", is_flag=True, help="Remove texts that all prompts share; the rules go with data and adapter.")
@as_json
def export(db, where, output, as_json, **how):
    """Make training data of complete answers: no duplicates, and never a conversation in two splits.

    Of a request that was answered anew, the new answer is taken; of preferences it is the chosen one. What was
    discarded or cut off is left out.

    Example:

        slowft requests export --where tag.app=shop --prune --output my-data
    """
    from ..synthesis.export import Export
    from ..synthesis.export import export as write

    filters, folder, report = _filters(where), Path(output).expanduser(), make_report(as_json)
    with _store(db) as store:
        counts = write(store, filters, folder, Export(**how))
    if how["prune"] and not as_json:
        rules = counts.about["pruned"]
        removed = "; ".join(f"{len(rule):,} characters ({printable(rule[:SHOWN])}...)" for rule in rules)
        report.note(f"Removed of all prompts: {removed}" if rules else "The prompts share no text of 40 characters")
    _tell(counts, report, as_json)


def _tell(counts, report, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps({"event": counts.name} | counts.as_dict()))
    else:
        report.note(counts.sentence())


def _as_json(row) -> str:
    return json.dumps(vars(row), ensure_ascii=False)


def _line(row) -> str:
    """Such as "12  2026-11-28 13:30:05  gpt-4o  complete  310+45 tokens  $0.0012  app=shop  What is ..."."""
    from ..requests.texts import opening

    at = datetime.fromtimestamp(row.began).strftime("%Y-%m-%d %H:%M:%S")
    tokens = f"{row.prompt_tokens}+{row.completion_tokens} tokens" if row.prompt_tokens is not None else ""
    cost = "" if row.cost is None else f"costs {row.cost:.6f}"
    kept = {True: "kept", False: "discarded", None: ""}[row.kept]
    anew = "" if row.relabels is None else f"anew of {row.relabels}"
    tags = " ".join(f"{name}={value}" for name, value in sorted(row.tags.items()))
    question = " ".join(opening(row.request)[: 4 * SHOWN].split())
    question = question if len(question) <= SHOWN else f"{question[: SHOWN - 3]}..."
    parts = [str(row.id), at, row.model or "-", row.status, tokens, cost, kept, anew, tags, question]
    return _printable("  ".join(part for part in parts if part))


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))
