"""Shows a run on the screen: a progress bar in a terminal, plain lines elsewhere."""

import time
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from .. import platform
from .base import Report
from .plan import three_lines

SECONDS_BETWEEN_LINES = 30

WIDE, MEDIUM = 130, 80  # columns of a terminal, for all of a bar and for a short one


def describe_run(config, model) -> str:
    """One line about the training that is about to begin."""
    n_trained = sum(array.size for array in _leaves(model.trainable_parameters()))
    kind = {"lora": "LoRA", "dora": "DoRA"}[config.fine_tune_type]
    return (
        f"{getattr(model, 'model_type', 'model')} with {len(model.layers)} blocks, {model.nbytes_on_disk / 1e9:.2f} GB "
        f"on disk; training {n_trained / 1e6:.2f} M {kind} parameters for {config.iters} iterations"
    )


def train_line(info: dict[str, Any]) -> str:
    return (
        f"Iter {info['iteration']}: train loss {info['train_loss']:.3f}, lr {info['learning_rate']:.2e}, "
        f"{info['tokens_per_second']:.0f} tokens/s, {info['read_gb']:.2f} GB read, "
        f"{100 * info['wait_share']:.0f}% waiting for reads, memory {info['memory_gb']:.2f} GB"
    )


def validation_line(info: dict[str, Any]) -> str:
    return f"Iter {info['iteration']}: valid loss {info['val_loss']:.3f} ({info['val_time']:.1f} s)"


def generation_state(generation) -> str:
    """The speed of a generation in words."""
    speed = generation.tokens / max(generation.seconds, 1e-9)
    drafts = f", {100 * generation.accepted / generation.drafted:.0f}% of drafts right" if generation.drafted else ""
    drafts += f", {generation.gain:.2g} times as fast as without drafts" if generation.gain is not None else ""
    return f"{speed:.3g} tok/s, {generation.tokens_per_reading:.3g} tokens per reading of the weights{drafts}"


class LineReport(Report):
    """Prints a plain line for each event, for files and pipes."""

    def __init__(self, out=None):
        self._out, self._machines = out, 1

    def _print(self, line: str) -> None:
        print(line, file=self._out, flush=True)

    def begin(self, config, model):
        self._iters, self._done, self._begin = config.iters, 0, time.perf_counter()
        self._print(describe_run(config, model))

    def joined(self, machines, rows):
        self._machines = machines
        self._print(
            f"{machines} machines, each with {rows} of a batch's {machines * rows} rows; memory, reads and plan are of "
            "the first"
        )

    def planned(self, plan, note="", caching=None):
        for line in three_lines(plan, note, caching):
            self._print(line)

    def advance(self, iterations, loss, model):
        self._done += iterations

    def trained(self, info):
        left_s = (time.perf_counter() - self._begin) / max(self._done, 1) * (self._iters - self._done)
        self._print(f"{train_line(info)}, {_duration(left_s)} left")

    def validated(self, info):
        self._print(validation_line(info))

    def tested(self, info):
        self._print(f"Test loss {info['test_loss']:.3f}, perplexity {info['test_ppl']:.3f}")

    def saved(self, file):
        self._print(f"Saved {file}")

    def note(self, text):
        self._print(text)

    @contextmanager
    def generating(self, n_prompts):
        last = time.monotonic()

        def advance(generation, answered):
            nonlocal last
            if time.monotonic() - last >= SECONDS_BETWEEN_LINES:
                last = time.monotonic()
                self._print(f"{answered} of {n_prompts} answered: {generation_state(generation)}")

        yield advance

    def generated(self, generation, seconds, file):
        self._print(f"{generation.prompts} answers in {file}: {generation_state(generation)}, {_duration(seconds)}")


class BarReport(LineReport):
    """Shows a progress bar with loss, speed, reads, waiting and memory. Lines scroll past above it."""

    def __init__(self, console: Console | None = None):
        super().__init__()
        self._console = console or Console()
        self._bar: Progress | None = None

    def _print(self, line):
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def begin(self, config, model):
        super().begin(config, model)
        self._bar = _timed_bar(self._console)
        self._task = self._bar.add_task("Training", total=config.iters, state="")
        self._bar.start()

    def advance(self, iterations, loss, model):
        super().advance(iterations, loss, model)
        last = model.stats.last
        share = last.wait_s / max(last.wait_s + last.compute_s, 1e-9)
        speed = self._machines * model.tokens_of_last_step / max(last.wait_s + last.compute_s, 1e-9)
        parts = [f"loss {loss:.3f}", f"{speed:.0f} tok/s", f"{last.bytes_read / 1e9:.2f} GB/step"]
        parts += [f"{100 * share:.0f}% wait", f"{platform.memory_in_use() / 1e9:.2f} GB"]
        width = self._console.width
        room = width - (72 if width >= WIDE else 43 if width >= MEDIUM else 32)  # minus what the rest of the bar takes
        while len(parts) > 1 and len("  ".join(parts)) > room:
            parts.pop()
        self._bar.update(self._task, advance=iterations, state="  ".join(parts))

    def end(self):
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    @contextmanager
    def evaluating(self, n_batches):
        if self._bar is not None:
            task = self._bar.add_task("Evaluating", total=n_batches, state="")
            try:
                yield lambda: self._bar.advance(task)
            finally:
                self._bar.remove_task(task)
            return
        with Progress(
            TextColumn("Evaluating"), BarColumn(), MofNCompleteColumn(), console=self._console, transient=True
        ) as bar:
            task = bar.add_task("", total=n_batches)
            yield lambda: bar.advance(task)

    @contextmanager
    def generating(self, n_prompts):
        with _timed_bar(self._console) as bar:
            task = bar.add_task("Generating", total=n_prompts, state="")
            yield lambda generation, answered: bar.update(task, completed=answered, state=generation_state(generation))

    def progress(self, items, description, total):
        with Progress(
            TextColumn(description), BarColumn(), MofNCompleteColumn(), console=self._console, transient=True
        ) as bar:
            yield from bar.track(items, total=total)


def _timed_bar(console: Console) -> Progress:
    """A bar for tasks that have a `state` in words. It shows the time left, and the elapsed time if there is room."""
    columns: list[ProgressColumn] = [TextColumn("{task.description}")]
    if console.width >= MEDIUM:
        columns.append(BarColumn(bar_width=24 if console.width >= WIDE else 10))
    columns += [MofNCompleteColumn(), TextColumn("{task.fields[state]}")]
    if console.width >= WIDE:
        columns += [TimeElapsedColumn(), TextColumn("gone,")]
    columns += [TimeRemainingColumn(), TextColumn("left")]
    return Progress(*columns, console=console, transient=True)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"


def _leaves(tree):
    from mlx.utils import tree_flatten

    return [array for _, array in tree_flatten(tree)]
