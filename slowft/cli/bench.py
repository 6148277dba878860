"""`slowft bench`: what a step takes on this machine, how fast it reads, where it is bound, how others do."""

import datetime
import json
from contextlib import contextmanager
from pathlib import Path

import click

from ..errors import ConfigError, SlowftError
from ..reports.plan import duration, size

AT_LEAST_1 = click.IntRange(1)
DEFAULT_SHAPE = "llama-135m"


def _options(*options):
    def decorate(command):
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


_of_model = _options(
    click.option("--model", help="Model directory, instead of a shape."),
    click.option(
        "--shape",
        help="llama-135m, -1b, -3b, -8b, -13b or -70b with random weights, which are made once and kept in the user's "
        f"cache directory [default: {DEFAULT_SHAPE}].",
    ),
    click.option("--layers", type=AT_LEAST_1, help="Blocks of the shape, instead of its own number."),
    click.option("--bits", type=click.Choice(["4", "8"]), help="Quantize the shape [default: bfloat16]."),
)
_of_job = _options(
    click.option("--memory", help="slowft's ceiling, such as 2GB [default: half of this machine's]."),
    click.option("--batch-size", default=4, show_default=True, type=AT_LEAST_1, help="Sequences in a micro-batch."),
    click.option(
        "--max-seq-length",
        default=129,
        show_default=True,
        type=click.IntRange(2),
        help="Longest sequence, as in finetune.",
    ),
    click.option("--num-layers", default=-1, show_default=True, help="Blocks with LoRA, from the last; -1 for all."),
)
_accumulation = click.option(
    "--grad-accumulation-steps", default=1, show_default=True, type=AT_LEAST_1, help="Micro-batches a step."
)
_steps = click.option("--steps", default=3, show_default=True, type=AT_LEAST_1, help="Measured, after a warm-up.")
_limits = _options(
    click.option("--limit-memory", help="Enforce this much memory by a control group (Linux, root)."),
    click.option("--limit-read", help="Hold reads to this many bytes a second, such as 150MB (Linux, root)."),
)
_output = _options(
    click.option("--json", "as_json", is_flag=True, help="One JSON object on standard output, bytes and seconds."),
    click.option("--save", metavar="DIR", help="Also write the JSON to a dated file in this directory."),
)


@click.group()
def bench():
    """Measure steps, reads and others' trainers on this machine.

    Every command has --json, and --save DIR, which keeps dated results.

    Example:

        slowft bench step
    """


@bench.command(short_help="Steps: seconds, reads, waiting, memory, against the machine's limits.")
@_of_model
@_of_job
@_accumulation
@_steps
@_limits
@_output
def step(model, shape, layers, bits, limit_memory, limit_read, as_json, save, **options):
    """Seconds, reads, waiting and memory of optimizer steps, and how near they come to the machine's limits.

    Example:

        slowft bench step --shape llama-1b --layers 4 --memory 1GB
    """
    from ..bench import step as of_step

    job = _job(model, shape, layers, bits, as_json, **options)
    limits = _parse_limits(limit_memory, limit_read)
    job = job.with_(memory=job.memory or limits.memory_nbytes)
    with _progress("Steps", as_json) as told:
        result = of_step.measure(job, limits, lambda n: told(n, job.steps + 1))
    _finish("step", result, as_json, save, _print_step)


@bench.command(short_help="slowft's reader against raw reads of the same files.")
@_of_model
@click.option("--size", "most", default="1GB", show_default=True, help="Read at most this much of the files.")
@click.option("--rounds", default=5, show_default=True, type=AT_LEAST_1, help="Readings of each kind, in turns.")
@_output
def io(model, shape, layers, bits, most, rounds, as_json, save):
    """slowft's reader against raw reads of the same files: fio, dd past the file cache, plain preads.

    Example:

        slowft bench io --shape llama-1b --layers 4
    """
    from ..bench import reading

    job = _job(model, shape, layers, bits, as_json)
    if not job.files:
        raise ConfigError(f"{job.name} has no model*.safetensors to read")
    total = reading.n_readings(job.files[0], rounds)
    with _progress("Reading", as_json) as told:
        result = reading.measure(job.files, _parse(most), rounds, lambda done: told(done, total))
    _finish("io", {"job": {"name": job.name}} | result, as_json, save, _print_io)


@bench.command(short_help="Where a job is bound, reading or computing; with a plot.")
@_of_model
@_of_job
@click.option("--micro-batches", "most", default=64, show_default=True, type=AT_LEAST_1, help="Look up to this many.")
@click.option("--limit-read", help="Suppose that reads are no faster than this, such as 150MB a second.")
@click.option("--plot", default="roofline.png", show_default=True, help="PNG to draw; not with --json.")
@_output
def roofline(model, shape, layers, bits, most, limit_read, plot, as_json, save, **options):
    """Where a job is bound: reading and computing against the micro-batches of a step, predicted.

    Says from how many micro-batches on (--grad-accumulation-steps of finetune) reading disappears behind computing.

    Example:

        slowft bench roofline --layers 4 --memory 500MB --limit-read 10MB
    """
    from ..bench import roofline as of_roofline

    if not as_json:
        of_roofline.check_plot()
        _check_directory(plot)
    job = _job(model, shape, layers, bits, as_json, **options)
    with _progress("Planning", as_json) as told:
        slower = _parse_limits(None, limit_read).read_bytes_per_s
        result = of_roofline.predict(job, most, slower, lambda done: told(done, most.bit_length()))
    if not as_json:
        of_roofline.plot(result, plot)
    _finish("roofline", result, as_json, save, lambda result: _print_roofline(result, plot))


@bench.command(short_help="The same job by slowft, mlx-lm and slowllama.")
@_of_model
@_of_job
@_accumulation
@_steps
@click.option("--turns", default=2, show_default=True, type=AT_LEAST_1, help="Processes of each, in turns.")
@click.option("--slowllama", metavar="DIR", help="Also slowllama, a checkout of it; needs PyTorch.")
@click.option("--keys", help="Layers with LoRA, with commas [default: all linear ones; with --slowllama its q and v].")
@_limits
@_output
def compare(model, shape, layers, bits, turns, slowllama, keys, limit_memory, limit_read, as_json, save, **options):
    """The same job by slowft, by mlx-lm's trainer in memory, and by slowllama, in turns, in one run.

    mlx-lm runs with and without --grad-checkpoint. --limit-memory holds those that stream; mlx-lm's models have to
    fit in memory. --limit-read holds everybody.

    Example:

        slowft bench compare --shape llama-1b --layers 2 --memory 1GB
    """
    from ..bench import compare as of_compare
    from ..bench.slowllama import KEYS

    job = _job(model, shape, layers, bits, as_json, **options)
    limits = _parse_limits(limit_memory, limit_read)
    names = keys.split(",") if keys else KEYS if slowllama else None
    job = job.with_(keys=None if names is None else tuple(names), memory=job.memory or limits.memory_nbytes)
    of_compare.check(job, limits, slowllama)
    with _progress("Comparing", as_json) as told:
        result = of_compare.measure(job, turns, limits, slowllama, told.of)
    _finish("compare", result, as_json, save, _print_compare)


@bench.command(short_help="One step as a trace for Perfetto.")
@_of_model
@_of_job
@_accumulation
@click.option("--out", default="trace.json", show_default=True, help="File for the trace.")
@_output
def trace(model, shape, layers, bits, out, as_json, save, **options):
    """One step as a trace for ui.perfetto.dev or chrome://tracing: what is read, cast, computed, waited for, spilled.

    Example:

        slowft bench trace --shape llama-1b --layers 4 --memory 1GB --out trace.json
    """
    from ..bench import step as of_step

    _check_directory(out)
    job = _job(model, shape, layers, bits, as_json, steps=1, **options)
    with _progress("Steps", as_json) as told:
        result = of_step.trace(job, str(Path(out).absolute()), lambda n: told(n, 2))
    _finish("trace", result, as_json, save, lambda result: _print_trace(result, out))


# --- What is measured -----------------------------------------------------------------------------


def _job(model, shape, layers, bits, as_json, memory=None, batch_size=4, max_seq_length=129, **options):
    """The job, of random weights that are made now if they are not there."""
    from ..bench.shapes import cached, config_of
    from ..bench.workload import Workload
    from ..models.loading import find_local, resolve

    if model is not None and (shape, layers, bits) != (None, None, None):
        raise click.UsageError("--shape, --layers and --bits make random weights; leave them out with --model")
    nbytes = None if memory is None else _parse(memory)
    if model is not None:
        directory = resolve(model)
        name = model if find_local(model) is None else directory.name
    else:
        config = config_of(shape or DEFAULT_SHAPE, layers, None if bits is None else int(bits))
        name = f"{shape or DEFAULT_SHAPE}, {config['num_hidden_layers']} blocks" + (f", {bits} bits" if bits else "")
        with _progress("Writing random weights", as_json) as told:
            directory = cached(config, told)
    options["micro_batches"] = options.pop("grad_accumulation_steps", 1)
    return Workload(str(directory), name, batch_size, max_seq_length - 1, memory=nbytes, **options)


def _check_directory(file: str) -> None:
    if not Path(file).absolute().parent.is_dir():
        raise ConfigError(f"{file} cannot be written: there is no directory {Path(file).parent}. Give another name")


def _parse(amount: str) -> int:
    from ..engine.model import parse_nbytes

    return parse_nbytes(amount)


def _parse_limits(memory: str | None, read: str | None):
    from ..bench.limits import Limits

    return Limits(memory and _parse(memory), read and _parse(read.removesuffix("/s")))


# --- What is shown --------------------------------------------------------------------------------


class _Told:
    """Takes (done, total) of a bar that may not be shown."""

    def __init__(self, bar=None, task=None):
        self._bar, self._task = bar, task

    def __call__(self, done: float, total: float) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total)

    def of(self, who: str, steps: int) -> None:
        """For what comes in turns: who is at work, and how many steps it has done."""
        if self._bar is not None:
            self._bar.update(self._task, description=f"{who}: {steps} steps")


@contextmanager
def _progress(description: str, as_json: bool):
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if as_json or not console.is_terminal:
        yield _Told()
        return
    columns = TextColumn("{task.description}"), BarColumn(bar_width=24), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as bar:
        yield _Told(bar, bar.add_task(description, total=None))


def _finish(name: str, result: dict, as_json: bool, save: str | None, show) -> None:
    """Print the result, for programs or for people, and keep it if asked to."""
    from ..bench import system

    result = {"benchmark": name, "system": system.describe(), **result}
    if as_json:
        click.echo(json.dumps(result))
    else:
        device = (result.get("machine") or {}).get("device")
        click.echo(f"Machine  {system.one_line(result['system'], device)}")
        show(result)
    if save is not None:
        now = datetime.datetime.now()
        file = Path(save) / f"{name}_{now:%Y-%m-%d_%H%M%S}.json"
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(result, indent=2) + "\n")
        except OSError as e:
            raise SlowftError(f"{file} cannot be written: {e.strerror}. Give --save another directory") from None
        if not as_json:
            click.echo(f"Saved {file}")


def _table(header: list[str], rows: list[list[str]], left: tuple[int, ...] = (0,)) -> None:
    from rich.table import Table

    from ..reports.tables import print_table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for i, column in enumerate(header):
        table.add_column(column, justify="left" if i in left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    print_table(table)


def _describe(job: dict) -> str:
    micro = f"{job['micro_batches']} x " if job["micro_batches"] > 1 else ""
    blocks = "all" if job["num_layers"] == -1 else f"the last {job['num_layers']}"
    layers = "" if job["keys"] is None else f" ({', '.join(job['keys'])})"
    return (
        f"{job['name']}; {micro}{job['batch_size']}x{job['tokens']} tokens a step, LoRA of rank {job['rank']} on "
        f"{blocks} blocks{layers}"
    )


def _predicted(of: dict) -> str:
    return "too little memory to predict" if of["is_for_assumed_machine"] else f"predicted {duration(of['step_s'])}"


def _seconds(of: dict) -> str:
    return f"{of['step_s']:.2f} s ± {of['spread_s'] / 2:.2f}"


def _print_step(result: dict) -> None:
    machine = result["machine"]
    click.echo(f"Job      {_describe(result['job'])}, within {size(result['memory'])}")
    click.echo(f"Plan     {result['kept']}")
    kernel = result["kernel_peak_nbytes"]
    rows = [
        ["step", _seconds(result), _predicted(result["predicted"])],
        ["speed", f"{result['tokens_per_s']:.0f} tokens/s", f"loss {result['losses'][-1]:.3f}"],
        [
            "read",
            f"{size(result['read_nbytes'])} a step, {size(result['read_bytes_per_s'])}/s",
            f"this drive: {size(machine['read_bytes_per_s'] or 0)}/s",
        ],
        ["waiting for reads", f"{100 * result['wait_share']:.1f}%", "of the step"],
        [
            "computed",
            f"{result['flops_per_s'] / 1e9:.0f} GFLOP/s",
            f"matmuls here: {machine['matmul_flops_per_s'] / 1e9:.0f} GFLOP/s",
        ],
        [
            "of the roofline",
            f"{100 * result['roofline_share']:.0f}%",
            f"computing {duration(result['compute_s'])}, reading {duration(result['read_s'])}",
        ],
        [
            "peak memory",
            size(result["peak_nbytes"]),
            f"predicted {size(result['predicted']['peak_nbytes'])}"
            + (f", control group's {size(kernel)}" if kernel else ""),
        ],
    ]
    if result["written_nbytes"]:
        rows.insert(3, ["written", f"{size(result['written_nbytes'])} a step", ""])
    _table(["", f"median of {len(result['steps'])}", ""], rows, left=(0, 1, 2))


def _print_io(result: dict) -> None:
    click.echo(f"Files    {result['job']['name']}: {size(result['nbytes'])} of them, cold")
    rows = []
    for name, rates in result["rates"].items():
        median = result["median_bytes_per_s"][name]
        ratio = "" if name == "slowft" else f"{result['ratios'][name]:.2f}"
        processor = f"{result['processor_s_per_gb'][name]:.3f} s/GB"
        rows.append([name, f"{size(median)}/s", f"{size(min(rates))} - {size(max(rates))}", processor, ratio])
    _table(["", f"median of {len(result['rates']['slowft'])}", "from - to", "processor", "slowft / this"], rows)
    click.echo(f"slowft reads at {100 * result['ratio']:.0f}% of {result['raw']}, the fastest raw way, round by round")


def _print_roofline(result: dict, plot: str) -> None:
    click.echo(f"Job      {_describe(result['job'])}, within {size(result['job']['memory'])}")
    rows = [
        [
            str(p["micro_batches"]),
            str(p["tokens"]),
            duration(p["read_s"]),
            duration(p["compute_s"]),
            duration(p["step_s"]),
            f"{p['tokens_per_s']:.0f}",
            p["bound"],
        ]
        for p in result["points"]
    ]
    _table(["micro-batches", "tokens", "reading", "computing", "step", "tokens/s", "bound by"], rows)
    crossover, most = result["crossover"], result["points"][-1]["micro_batches"]
    if crossover is None:
        click.echo(f"Reading takes longer than computing up to {most} micro-batches, as many as were looked at or fit")
    else:
        click.echo(f"Computing takes as long as reading from {crossover} micro-batch{'es' * (crossover > 1)} a step on")
    click.echo(f"Plot     {plot}")


def _print_compare(result: dict) -> None:
    click.echo(f"Job      {_describe(result['job'])}")
    ours, limits = result["slowft"], result["limits"]
    click.echo(f"slowft   within {size(ours['memory'])}: {ours['kept']}")
    limited = [f"memory of those that stream {size(limits['memory_nbytes'])}"] if limits["memory_nbytes"] else []
    limited += [f"reads {size(limits['read_bytes_per_s'])}/s"] if limits["read_bytes_per_s"] else []
    if limited:
        click.echo(f"Limits   {', '.join(limited)}")
    rows, failed = [], {name: of["failed"] for name, of in result["results"].items() if "failed" in of}
    for name, of_name in result["results"].items():
        if name in failed:
            continue
        kernel = of_name["kernel_peak_nbytes"]
        ratio = result["times_as_fast"].get(name)
        rows.append(
            [
                name,
                _seconds(of_name),
                f"{of_name['tokens_per_s']:.0f}",
                size(of_name["peak_nbytes"]),
                size(kernel) if kernel else "",
                "" if ratio is None else f"{ratio:.2f}",
            ]
        )
    _table(["", "step", "tokens/s", "peak", "control group's", "its step / slowft's"], rows)
    for reason in failed.values():
        click.echo(f"Failed   {reason}")


def _print_trace(result: dict, out: str) -> None:
    click.echo(f"Job      {_describe(result['job'])}; {result['kept']}")
    click.echo(
        f"Step     {duration(result['step_s'])}: computing {duration(result['compute_s'])}, waiting for reads "
        f"{duration(result['wait_s'])}, {size(result['read_nbytes'])} read"
    )
    click.echo(f"Trace    {out}: open it at https://ui.perfetto.dev")
