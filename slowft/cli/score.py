"""`slowft score`: log-probabilities and perplexity of texts, right answers, a judge's marks; base against adapters."""

import json
import math
import time

import click

from . import options
from .finetune import make_report, option, warnings_noted

SPLITS = ("test", "valid", "train")  # of a folder, the first that is there


@click.command()
@option("model")
@option("data")
@click.option(
    "--adapter-path",
    "adapters",
    multiple=True,
    metavar="[NAME=]DIR",
    help="Score with this adapter too; may be given several times. NAME is the directory's unless given.",
)
@options.emulation
@click.option(
    "--split", type=click.Choice(SPLITS), help="Which set of a folder; unless given, test, else valid, else train."
)
@option("mask_prompt", is_flag=True)
@option("train_on", type=click.Choice(["assistant"]))
@click.option("--judge", metavar="FROM-TO", help="Samples ask for a mark: give its expected value, such as 0-9 or 1-5.")
@click.option("--plain", is_flag=True, help="Write prompts of questions as they are, not by the chat template.")
@click.option(
    "--top-k",
    type=int,
    metavar="K",
    help="Write the K most probable tokens of every place that training would count, for `finetune --teacher-cache`.",
)
@click.option("--output", metavar="DIR", help="With --top-k, the directory to write; gone on with if it is unfinished.")
@option("max_seq_length", type=int)
@option("valid_split", type=float)
@option("skip_bad_samples", is_flag=True)
@option("memory")
@option("compute_dtype", type=click.Choice(["float32", "float16", "bfloat16", "native"]))
@option("trust_remote_code", is_flag=True)
@option("chat_template", metavar="FILE")
@click.option("--json", "as_json", is_flag=True, help="Each sample, then the scores, as JSON lines, nothing else.")
@options.awake
def score(adapters, emulate, delta, delta_top_p, split, judge, plain, top_k, output, as_json, **given):
    """Score texts: perplexity and log-probabilities, of the base model and of adapters, in one pass over the weights.

    DATA is what `slowft finetune --data` takes. Tokens that training would count are scored (with --mask-prompt, those
    of the last answer), but for the padding token that mlx-lm counts after each sample.

    Lines of {"question": ..., "choices": [...], "answer": number or text} are multiple choice: accuracy by the answers'
    log-probabilities, and by those a character. Lines of {"question": ..., "answer": ...} are exact match: whether
    greedy decoding would begin with the answer. With --judge, lines of {"prompt": ...} or {"messages": ...} ask for a
    mark, which is the mean of the marks by their probabilities: nothing is generated, nothing is parsed.

    With --top-k 64 --output DIR, DIR gets what the model, as a teacher, holds for probable of the training set and the
    validation set, in 387 bytes a token; `slowft finetune --teacher-cache DIR` trains another model on it.

    Example:

        slowft score --model Qwen/Qwen3-0.6B --data my-data --adapter-path adapters --memory 2GB

    --emulate scores the model as it behaves with what a small one learnt, beside itself:

        slowft score --model Qwen/Qwen3-32B --emulate Qwen/Qwen3-0.6B --delta adapters --data my-data
    """
    from ..training.config import load_config

    settings, _ = load_config(None, given)
    if settings.model is None:
        raise click.UsageError("no model given. Use --model with a directory or a hub id such as Qwen/Qwen3-0.6B")
    if settings.data is None:
        raise click.UsageError("no data given. Use --data with a file, or with a folder that holds test.jsonl")
    from ..inference.scoring_session import ScoringSession
    from ..reports.base import late_bar

    report, emulation = make_report(as_json), (emulate, delta, delta_top_p)
    if top_k is not None or output is not None:
        _refuse_beside_cache(top_k, output, {"--split": split, "--judge": judge, "--plain": plain})
        with warnings_noted(report):
            _write_cache(settings, _named(adapters), top_k, output, report, as_json, emulation)
        return
    if settings.valid_split is not None:
        raise click.UsageError("--valid-split has no effect without --top-k: --split says which set is scored")
    with warnings_noted(report):
        session = ScoringSession(settings, _named(adapters), split, judge, plain, report, emulation)
        try:
            begin = time.perf_counter()
            with late_bar(report, session.n_visits) as on_visit:
                result = session.run(on_visit)
            work = session.work() | {"seconds": time.perf_counter() - begin}
            if as_json:
                for sample in session.samples(result):
                    _print_json("sample", sample)
                _print_json("score", {"kind": session.kind, "scores": session.summary(result)} | work)
            else:
                _print_table(session.kind, session.summary(result), work)
        finally:
            session.close()


def _refuse_beside_cache(top_k, output, given) -> None:
    if top_k is None or output is None:
        raise click.UsageError("--top-k K and --output DIR write what another model is trained on. Give both")
    for name, value in given.items():
        if value:
            raise click.UsageError(f"{name} has no effect with --top-k: all that training counts is written")


def _write_cache(settings, adapters, top_k, output, report, as_json, emulation) -> None:
    from ..inference.teaching import TeachingSession
    from ..reports.base import late_bar

    session = TeachingSession(settings, adapters, top_k, output, report, emulation)
    try:
        begin = time.perf_counter()
        with late_bar(report, session.n_visits) as on_visit:
            session.run(on_visit)
        work = session.work() | {"seconds": time.perf_counter() - begin}
    finally:
        session.close()
    if as_json:
        _print_json("cache", {"output": output} | work)
    elif work["was_done"]:
        click.echo(f"{output} was whole already: {work['tokens']:,} tokens of {work['samples']:,} samples")
    else:
        click.echo(
            f"{output} has the {top_k} most probable tokens at {work['tokens']:,} places of {work['samples']:,} "
            f"samples, in {work['seconds']:.1f} s; the model was read {work['readings']:.2f} times; peak memory "
            f"{work['peak_memory']:.2f} GB"
        )


def _named(adapters: tuple[str, ...]) -> dict[str, str]:
    """The directories by name, as [NAME=]DIR says."""
    from pathlib import Path

    from ..errors import ConfigError

    named: dict[str, str] = {}
    for given in adapters:
        name, equals, directory = given.partition("=")
        if not equals or "/" in name:  # a path may have an equals sign in it
            name, directory = Path(given).expanduser().resolve().name, given
        if not name or not directory:
            raise ConfigError(f"--adapter-path {given}: give DIR or NAME=DIR")
        if name in named:
            raise ConfigError(f"two adapters are named {name}. Name them: --adapter-path NAME=DIR")
        named[name] = directory
    return named


def _print_json(event: str, fields: dict) -> None:
    click.echo(json.dumps({"event": event} | _finite(fields)))


def _finite(value):
    """The same with null for what JSON has no number for."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


COLUMNS = {
    "texts": ("perplexity", "±", "log-probability", "±", "tokens", "exact"),
    "choices": ("accuracy", "±", "by length", "±", "exact", "±"),
    "answers": ("exact", "±", "log-probability"),
    "marks": ("mean mark", "±", "on marks"),
}
KEYS = {
    "texts": ("perplexity", "perplexity_stderr", "log_probability", "log_probability_stderr", "tokens", "exact"),
    "choices": ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr", "exact", "exact_stderr"),
    "answers": ("exact", "exact_stderr", "log_probability"),
    "marks": ("mark", "mark_stderr", "share"),
}


def _cell(value: float) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return "-" if math.isnan(value) else f"{value:.4f}"  # one sample alone has no standard error


def _print_table(kind: str, summary: dict[str, dict[str, float]], work: dict[str, float]) -> None:
    width = max(len(name) for name in summary) + 2
    click.echo(" " * width + "".join(f"{column:>17}" for column in COLUMNS[kind]))
    for name, values in summary.items():
        cells = [values[key] for key in KEYS[kind]]
        click.echo(f"{name:<{width}}" + "".join(f"{_cell(c):>17}" for c in cells))
    click.echo(
        f"{work['samples']:,} samples in {work['seconds']:.1f} s; {work['read_gb']:.2f} GB read, which is the model "
        f"{work['readings']:.2f} times, {work['samples'] / max(work['readings'], 1e-9):,.0f} samples a reading; peak "
        f"memory {work['peak_memory']:.2f} GB"
    )
