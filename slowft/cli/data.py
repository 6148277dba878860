"""`slowft data`: what will be trained on, before anybody pays for it; and the steps that make data (`data_steps`)."""

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import click

from .finetune import make_report, option, warnings_noted
from .options import meant

SHOWN_CHARACTERS = 600  # of a sample
BAR = 40


STEPS = {
    "make": "Make a data set by a recipe: a large model writes, the rest is left out.",
    "dedup": "Leave out rows that say what an earlier one said.",
    "check": "Leave out rows by rules, and those that share words with a test set.",
    "split": "Share rows out to train, valid and test, by document or topic.",
    "convert": "Write rows as conversations, or as prompt, chosen and rejected.",
}


class Show(click.Command):
    """The command of no name: its help tells of the others too."""

    def format_epilog(self, ctx, formatter):
        with formatter.section("Steps that make data (slowft data STEP --help; a folder of such a name is ./make)"):
            formatter.write_dl(list(STEPS.items()))


class Data(click.Group):
    """`slowft data STEP ...` does a step; `slowft data` with anything else shows what is there."""

    def make_context(self, info_name, args, parent=None, **extra):
        if len(args) > 1 and (hint := meant(args[0], STEPS)) and args[0] not in STEPS and not Path(args[0]).exists():
            raise click.UsageError(f"{args[0]} is neither a step nor data that is there.{hint}")
        if not args or args[0] not in STEPS:
            return show.make_context(info_name, args, parent, **extra)
        return super().make_context(info_name, args, parent, **extra)

    def list_commands(self, ctx):
        return list(STEPS)

    def get_command(self, ctx, name):
        return getattr(importlib.import_module("slowft.cli.data_steps"), name) if name in STEPS else None


@click.command(cls=Show)
@click.argument("data")
@option("model")
@option("max_seq_length", type=int)
@option("mask_prompt", is_flag=True)
@option("train_on", type=click.Choice(["assistant"]))
@option("valid_split", type=float)
@option("skip_bad_samples", is_flag=True)
@option("batch_size", type=int)
@option("group_by_length", is_flag=True)
@option("trust_remote_code", is_flag=True)
@option("chat_template", metavar="FILE")
@click.option("-c", "--config", metavar="FILE.yaml", help="YAML file of options, as for finetune.")
@click.option("--samples", default=3, show_default=True, type=click.IntRange(0), help="Samples to show of each set.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on standard output, nothing else.")
def show(data, config, samples, as_json, **options):
    """Show what will be trained on: counts, lengths, and the first samples, trained and masked tokens apart.

    DATA is what `slowft finetune --data` takes. The model's tokenizer is loaded, its weights are not opened.

    Example:

        slowft data my-data --model Qwen/Qwen3-0.6B --mask-prompt
    """
    from ..training.config import load_config

    settings, _ = load_config(config, options | {"data": data})
    if settings.model is None:
        raise click.UsageError("no model given. Use --model with a directory or a hub id such as Qwen/Qwen3-0.6B")
    from ..data.datasets import load_data, no_training_samples
    from ..data.survey import histogram, survey
    from ..data.tokenizer import load_tokenizer, tokenizer_files

    report = make_report(as_json)
    directory = tokenizer_files(settings.model)
    with warnings_noted(report):
        tokenizer = load_tokenizer(directory, None, settings.trust_remote_code, settings.chat_template)
        loaded = load_data(data, tokenizer, replace(settings, test=True), progress=report.progress)
    if not len(loaded[0]):
        raise no_training_samples(data)
    seed = settings.seed if settings.group_by_length else None
    found, train = {}, None
    for name, dataset in zip(("train", "valid", "test"), loaded):
        if len(dataset):
            found[name] = dataset, *survey(dataset, settings.batch_size, settings.max_seq_length, seed, train)
            train = found[name][2] if name == "train" else train
    if as_json:
        sets = {name: counts.as_dict() | {"lengths": histogram(d)} for name, (d, counts, _) in found.items()}
        click.echo(json.dumps({"event": "data", "sets": sets}))
        return
    for name, (dataset, counts, _) in found.items():
        _print(name, dataset, counts)
    if list(found) == ["train"]:
        click.echo("\nNo validation set: write a valid.jsonl, or give --valid-split 0.05")
    for name, (dataset, _, _) in found.items():
        for i in range(min(samples, len(dataset))):
            click.echo(f"\n{click.style(f'{name}: {dataset.where(i)}', bold=True)}, {dataset.lengths[i]} tokens")
            click.echo(_shown(dataset, i, tokenizer))


data = Data("data")


def _print(name: str, dataset, counts) -> None:
    from ..data.survey import histogram

    click.echo(
        f"\n{click.style(name, bold=True)}: {counts.samples:,} samples, {counts.tokens:,} tokens, of which "
        f"{counts.trained_tokens:,} are trained ({100 * counts.masked_share:.0f}% masked). A sample has "
        f"{counts.median:,} in the middle, {counts.longest:,} at most; {100 * counts.padding_share:.0f}% of batches is "
        "padding"
    )
    parts = [(counts.cut, "cut"), (counts.skipped, "left out"), (counts.duplicates, "repeated")]
    parts.append((counts.in_train, "in the training set too"))
    if told := ", ".join(f"{n:,} {what}" for n, what in parts if n):
        click.echo(click.style(told, fg="yellow"))
    bins = histogram(dataset)
    most, width = max(n for _, _, n in bins), len(f"{bins[-1][1]:,}")
    for first, last, n in bins:
        bar = "█" * -(-BAR * n // most)
        click.echo(f"  {first:>{width},} to {last:>{width},} tokens {bar:<{BAR}} {n:,}")


def _shown(dataset, i: int, tokenizer) -> str:
    """A sample's text: what is trained in green, what is masked dim; where there is no colour, in brackets and not."""
    from ..data.survey import stretches

    is_coloured, shown, left = sys.stdout.isatty(), [], SHOWN_CHARACTERS
    for is_trained, tokens in stretches(dataset, i):
        text = tokenizer.decode(tokens)
        text, more = text[:left], len(text) > left
        left -= len(text)
        text += "…" if more else ""
        if is_coloured:
            shown.append(click.style(text, fg="green", bold=True) if is_trained else click.style(text, dim=True))
        else:
            shown.append(f"⟦{text}⟧" if is_trained else text)
        if more:
            break
    return "".join(shown)
