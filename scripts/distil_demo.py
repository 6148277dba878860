"""What a half of SmolLM2-135M learns of the whole one: `slowft distil` on real models, from nothing.

    python scripts/distil_demo.py DIRECTORY [options of slowft distil]     # downloads 93 MB; an hour on two cores

The teacher is SmolLM2-135M-Instruct. The student is what `halved_model.py` makes of it: every second block, healed a
little. The seeds are questions and answers of the Jargon File. DIRECTORY keeps what is done already; a stopped run goes
on.
"""

import slowft  # noqa: F401, I001  (before mlx: it loads OpenBLAS)

import argparse
import json
import sys
from pathlib import Path

from halved_model import healed, note
from slowft import demo
from slowft.cli.main import main

REQUESTS, LONGEST = 96, 240  # entries of the Jargon File, and characters of one
RECIPE = """
output: data
model: model
memory: 1GB
seeds:
  - kind: requests
    file: requests.jsonl
answers: {max_tokens: 48}
rules: {cut_off: false}
judge: {}
split: {valid: 0, test: 0.15}
"""
CONFIG = "lora_parameters: {rank: 32, scale: 10.0, dropout: 0.0}\nmax_grad_norm: 1.0\n"
OPTIONS = "--iters 60 --batch-size 2 --learning-rate 1e-4 --num-layers -1 --max-seq-length 128 --memory 1GB".split()


def prepare(directory: Path) -> None:
    demo.fetch_model(directory, note)
    if not (directory / "small" / "config.json").exists():
        healed(directory)
    rows = [json.loads(line) for line in (demo.write_data(directory) / "train.jsonl").read_text("utf-8").splitlines()]
    short = [row for row in rows if len(row["completion"]) <= LONGEST]
    chosen = short[:: len(short) // REQUESTS][:REQUESTS]
    (directory / "requests.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen), "utf-8")
    (directory / "recipe.yaml").write_text(RECIPE, "utf-8")
    (directory / "training.yaml").write_text(CONFIG, "utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parsed, more = parser.parse_known_args()
    folder = parsed.directory
    prepare(folder)
    files = ["--recipe", folder / "recipe.yaml", "--output", folder / "distilled", "-c", folder / "training.yaml"]
    models = ["--teacher", folder / "model", "--student", folder / "small"]
    sys.argv[1:] = ["distil", *map(str, [*models, *files]), *OPTIONS, *more]
    main()
