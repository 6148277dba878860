"""`slowft status`: how a run stands, from the directory of its adapter."""

import json
import time
from pathlib import Path

import click

from ..training import status as of_run


@click.command()
@click.argument("directory", default="adapters")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on standard output, bytes and seconds.")
def status(directory, as_json):
    """Say how the run stands that writes its adapter to DIRECTORY [default: adapters], running or not.

    Example:

        slowft status adapters
    """
    found = of_run.read(Path(directory).expanduser())
    if as_json:
        click.echo(json.dumps({"event": "status", **found}))
        return
    ago = _duration(time.time() - found["written"])
    click.echo(f"{found['state']}, iteration {found['iteration']} of {found['iters']}, written {ago} ago")
    losses = [(name, found.get(key)) for name, key in (("train loss", "train_loss"), ("valid loss", "valid_loss"))]
    click.echo(", ".join(f"{name} {loss:.3f}" for name, loss in losses if loss is not None) or "no loss reported yet")
    left = f", {_duration(found['seconds_left'])} left" if found.get("seconds_left") is not None else ""
    click.echo(
        f"{found['iterations_per_second']:.3g} iterations/s{left}; memory {found['memory_nbytes'] / 1e9:.2f} GB (peak "
        f"{found['peak_nbytes'] / 1e9:.2f}); {found['read_nbytes'] / 1e9:.2f} GB read, "
        f"{found['written_nbytes'] / 1e9:.2f} GB written"
    )
    if found.get("error"):
        click.echo(found["error"])
    if found["state"] in ("killed", "stopped", "failed"):
        click.echo("To go on: the same slowft finetune command with --resume")


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
