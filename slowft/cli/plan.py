"""`slowft plan`: what a job would take on this machine, from headers alone."""

import atexit
import gc
import json
import sys
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

import click

from ..errors import ConfigError, NeedsPreparing
from ..planning.several import LINK_NBYTES_S
from ..reports.plan import (
    as_dict,
    choices,
    describe_job,
    describe_machine,
    duration,
    later_step,
    several_lines,
    size,
    three_lines,
)
from ..training.config import OPTIMIZER_COPIES, OPTIMIZERS
from .finetune import warnings_noted

AT_LEAST_1 = click.IntRange(1)
MOST = 2**31 - 1  # of MLX's numbers of rows and columns
WIDE = 120  # columns of a terminal that has room for the table's last column
DTYPES = ["float32", "float16", "bfloat16", "native"]


@click.command()
@click.option("--model", help="Model directory or hub id; of one that is not here only the headers are fetched.")
@click.option("--config", "config_file", help="Instead, a model's config.json: needs no weights.")
@click.option("--memory", help="Ceiling for the whole process, such as 8GB [default: half of this machine's].")
@click.option("--batch-size", default=4, show_default=True, type=AT_LEAST_1, help="Sequences in a micro-batch.")
@click.option("--max-seq-length", default=2048, show_default=True, type=click.IntRange(2), help="Longest sequence.")
@click.option("--grad-accumulation-steps", default=1, show_default=True, type=AT_LEAST_1, help="Micro-batches a step.")
@click.option("--num-layers", default=16, show_default=True, help="Blocks to fine-tune, from the last; -1 for all.")
@click.option("--rank", default=8, show_default=True, type=AT_LEAST_1, help="Of the LoRA matrices.")
@click.option(
    "--fine-tune-type", default="lora", show_default=True, type=click.Choice(["lora", "dora"]), help="Adapter."
)
@click.option("--optimizer", default="adam", show_default=True, type=click.Choice(OPTIMIZERS), help="As in finetune.")
@click.option("--compute-dtype", type=click.Choice(DTYPES), help="As in finetune.")
@click.option("--tokens", type=AT_LEAST_1, help="Tokens of the training data: adds hours and bytes written.")
@click.option("--epochs", type=click.FloatRange(0, min_open=True), help="Passes over them [default: 1].")
@click.option("--trust-remote-code", is_flag=True, help="Let the model run code of its own.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on standard output, bytes and seconds.")
def plan(model, config_file, memory, tokens, epochs, trust_remote_code, as_json, **job):
    """Say what fine-tuning a model would take here: memory, reads, seconds, and what to keep in memory.

    Reads headers only: neither weights nor data. The model need not be on this disk, nor fit it.

    Example:

        slowft plan --model Qwen/Qwen3-0.6B --memory 2GB --batch-size 1 --tokens 2000000 --epochs 3
    """
    if model is not None and config_file is not None:
        raise click.UsageError("give --model or --config, not both")
    if model is None and config_file is None:
        raise click.UsageError("give a model: --model with a directory or hub id, or --config with its config.json")
    if epochs is not None and tokens is None:
        raise click.UsageError("--epochs says nothing without --tokens, the number of tokens in the training data")
    if (tokens_at_once := job["batch_size"] * job["max_seq_length"]) > MOST:
        raise click.UsageError(
            f"--batch-size x --max-seq-length is {tokens_at_once:,} tokens at once; MLX counts to {MOST:,}. Lower it"
        )
    _start_quickly()
    from ..engine.budget import default_memory
    from ..engine.model import open_model
    from ..models.building import read_used_config
    from ..models.loading import prepare_command
    from ..models.outline import outline_of_config
    from ..planning.caching import from_boundary, pays
    from ..planning.several import MACHINES, shared
    from ..sizes import parse_nbytes
    from ..training.machines import COPIES

    nbytes = default_memory() if memory is None else parse_nbytes(memory)
    files = {"in_place": True}
    notes: list[str] = []
    with ExitStack() as stack:
        stack.enter_context(warnings_noted(SimpleNamespace(note=notes.append)))
        directory = stack.enter_context(_directory(model, config_file, trust_remote_code))
        try:
            opened = open_model(directory, compute_dtype=job["compute_dtype"], trust_remote_code=trust_remote_code)
        except NeedsPreparing as e:
            files = {"in_place": False, "reason": e.reason, "nbytes": e.nbytes, "command": prepare_command(model)}
            used, _ = read_used_config(directory, trust_remote_code)
            outline = outline_of_config(directory / "config.json", used, trust_remote_code)  # as it will be prepared
            opened = open_model(stack.enter_context(outline), compute_dtype=job["compute_dtype"])
        try:
            use_dora = job["fine_tune_type"] == "dora"
            opened.expect_lora(job["num_layers"], rank=job["rank"], use_dora=use_dora)
            of_step = job["max_seq_length"] - 1, job["grad_accumulation_steps"], OPTIMIZER_COPIES[job["optimizer"]]
            planner = opened.planner(job["batch_size"], *of_step, measure=True)
            chosen = planner.choose(nbytes)
            if chosen is None and memory is not None and not as_json:
                raise ConfigError(planner.too_little(nbytes))
            later = from_boundary(planner, chosen or planner.least())
            least = planner.least()
            table = [least, *(planner.choose(int(least.peak_nbytes * scale)) for scale in (1.5, 2.0)), planner.most()]
            several = [
                shared(n, job["batch_size"], nbytes, lambda rows: opened.planner(rows, *of_step), COPIES)
                for n in MACHINES
            ]
            notes += opened.adapter_notes
            about = f"{getattr(opened, 'model_type', 'model')}, {size(opened.nbytes_on_disk)} on disk"
            sizes = {"nbytes_on_disk": opened.nbytes_on_disk, "embedding_nbytes": opened.embedding_nbytes}
        finally:
            opened.close()
    data = None
    if tokens:
        tokens_of_step = job["batch_size"] * (job["max_seq_length"] - 1) * job["grad_accumulation_steps"]
        data = Data(tokens, epochs or 1.0, tokens_of_step)
        if later is None or not pays(planner, chosen or least, later, min(data.epochs, 1), data.epochs - 1):
            later = None
    if as_json:
        _print_json(planner.machine, chosen, table, several, sizes, files, notes, data, later)
    else:
        _print(planner.machine, chosen, table, several, about, sizes["embedding_nbytes"], files, notes, data, later)


def _start_quickly() -> None:
    """What a process does without that does nothing else: tokenizers, and looking for cycles among what it made."""
    from ..models.imports import import_mlx_lm_without_tokenizers

    if "mlx_lm" not in sys.modules:
        gc.disable()
        atexit.register(gc.freeze)  # Python looks once more as it exits
        import_mlx_lm_without_tokenizers()


@dataclass(frozen=True)
class Data:
    """Training data: its size, how often it is gone through, and how much of it makes a step."""

    tokens: int
    epochs: float
    tokens_of_step: int


@contextmanager
def _directory(model: str | None, config_file: str | None, trust_remote_code: bool):
    from ..models.loading import find_local
    from ..models.outline import outline_of_config, outline_of_hub

    if config_file is not None:
        with outline_of_config(Path(config_file), trust_remote_code=trust_remote_code) as directory:
            yield directory
    elif (local := find_local(model)) is not None:
        yield local
    else:
        with outline_of_hub(model) as directory:
            yield directory


def _print_json(machine, chosen, table, several, sizes: dict, files: dict, notes, data: Data | None, later) -> None:
    result = {
        "machine": asdict(machine),
        "model": sizes,
        "files": files,
        "notes": notes,
        "plan": None if chosen is None else as_dict(chosen),
        "table": [as_dict(plan) for plan in table],
        "several": {"link_nbytes_per_s": LINK_NBYTES_S, "machines": [asdict(one) for one in several]},
    }
    if data and chosen:
        result["run"] = _run(chosen, data, later)
    click.echo(json.dumps(result))


def _print(
    machine, chosen, table, several, about, embedding_nbytes, files: dict, notes, data: Data | None, later
) -> None:
    from rich.console import Console
    from rich.table import Table

    from ..planning.plan import enough
    from ..reports.tables import print_line, print_table

    shown = chosen or table[0]
    of_blocks, of_step = describe_job(shown)
    print_line(f"Machine  {describe_machine(machine)}")
    print_line(f"Model    {about}: {of_blocks}; embedding {size(embedding_nbytes)}")
    if files["in_place"]:
        print_line("Files    streamed as they lie on the disk: nothing to prepare")
    else:
        print_line(f"Files    need preparing: {files['reason']} ({size(files['nbytes'])}). What follows holds after")
        click.echo(f"         {files['command']}")  # whole, to be copied
    print_line(f"Job      {of_step}")
    for note in notes:
        print_line(f"         {note}")
    first, *rest = three_lines(shown)
    print_line(
        first if chosen else f"Half of this machine's memory is too little. The least that works: {choices(shown)}"
    )
    for line in rest:
        print_line(line)
    parts = sorted(shown.parts.items(), key=lambda part: -part[1])
    print_line("  of the peak: " + ", ".join(f"{name} {size(nbytes)}" for name, nbytes in parts))
    if machine.rates.read is None:
        print_line("  reading is not in these seconds: no weights are here to measure the disk with")
    if data:
        run = _run(shown, data, later)
        written = size(run["written_nbytes"]) if run["written_nbytes"] else "nothing"
        print_line(
            f"  {data.epochs:g} x {data.tokens:,} tokens: {run['steps']:,} steps, {duration(run['seconds'])}, "
            f"{size(run['read_nbytes'])} read, {written} written to the disk"
        )
        if later is not None:
            print_line(f"  activations of the lower blocks are stored: from the second epoch {later_step(later)}")
    for line in several_lines(several):
        print_line(line)
    rows = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("budget", "peak", "read/step", "written/step", "step", "bound by"):
        rows.add_column(column, justify="right", no_wrap=True)
    console = Console()
    is_narrow = console.is_terminal and console.width < WIDE
    if not is_narrow:
        rows.add_column("what is kept")
    named = list(zip(("least", "1.5x", "2x", "all of it"), table))
    for name, row in named:
        rows.add_row(
            f"{name} {size(row.memory or enough(row.peak_nbytes))}",
            size(row.peak_nbytes),
            size(row.read_nbytes),
            size(row.written_nbytes) if row.written_nbytes else "0",
            duration(row.step_s),
            row.bound,
            *([] if is_narrow else [choices(row)]),
        )
    click.echo()
    print_table(rows)
    if is_narrow:
        for name, row in named:
            print_line(f"{name}: {choices(row)}")


def _run(plan, data: Data, later) -> dict:
    """Totals; `later` is the plan of steps that begin at stored activations, None if there are none."""
    steps = max(1, round(data.tokens * data.epochs / data.tokens_of_step))
    whole = min(steps, max(1, round(data.tokens / data.tokens_of_step))) if later else steps
    stored = whole * plan.job.hidden_nbytes * plan.job.micro_batches if later else 0
    rest = [(steps - whole, later)] if later else []
    seconds, read, written = (
        sum(n * getattr(kind, name) for n, kind in [(whole, plan), *rest])
        for name in ("step_s", "read_nbytes", "written_nbytes")
    )
    return {
        "steps": steps,
        "seconds": seconds,
        "read_nbytes": read,
        "written_nbytes": written + stored,
        "written_nbytes_per_hour": round((written + stored) / seconds * 3600),
        "later": None if later is None else {"step_s": later.step_s, "read_nbytes": later.read_nbytes},
    }
