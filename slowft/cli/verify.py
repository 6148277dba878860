"""`slowft verify`: whether a model's files are what they were when they were written."""

import json
import sys
import time
from dataclasses import asdict

import click

from ..errors import ModelError
from .options import awake
from .prepare import progress_bar

WITHOUT = {
    "manifest": "all as it was written",
    "hub": "all as the hub has it (by the hashes that the download noted)",
    "nothing": "whole, and every number finite. There is no slowft.json to compare with: a changed bit that leaves a "
    "number finite goes unseen",
}


@click.command()
@click.argument("directory")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on standard output, nothing else.")
@awake
def verify(directory, as_json):
    """Read a model's files and compare them with the checksums that slowft prepare wrote (slowft.json).

    Names the tensor and the file of whatever has changed. Without slowft.json: sizes, headers, index, and NaN or
    infinity in the weights. Exit status 0 if all is well, 1 if not.

    Example:

        slowft verify qwen3-4bit
    """
    from ..convert.verify import verify as verify_model

    begin = time.perf_counter()
    with progress_bar("Verifying", not as_json) as progress:
        found = verify_model(directory, progress)
    seconds = time.perf_counter() - begin
    if as_json:
        faults = [asdict(fault) for fault in found.faults]
        result = {"ok": not faults, "checked_with": found.checked_with, "faults": faults, "notes": found.notes}
        result |= {"files": found.n_files, "tensors": found.n_tensors, "nbytes": found.nbytes, "seconds": seconds}
        click.echo(json.dumps(result))
        sys.exit(1 if faults else 0)
    for line in (*found.notes, *found.faults):
        click.echo(str(line))
    if found.faults:
        damaged = len({fault.file for fault in found.faults})
        raise ModelError(
            f"{directory}: {damaged} of {found.n_files} files are not as they should be. Write them again: prepare or "
            "download the model anew"
        )
    click.echo(
        f"{found.n_files} files, {found.n_tensors} tensors, {found.nbytes / 1e9:.2f} GB in {seconds:.1f} s "
        f"({found.nbytes / 1e9 / max(seconds, 1e-9):.2f} GB/s): {WITHOUT[found.checked_with]}."
    )
