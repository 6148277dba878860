"""SmolLM2-135M with every second block dropped, healed by a little training on plain text: a small model to experiment
with that has the tokenizer of a large one.

    python scripts/halved_model.py DIRECTORY     # downloads 93 MB; half an hour on two cores

Writes DIRECTORY/model (the whole one, as `slowft demo` makes it) and DIRECTORY/small (16 of its 30 blocks). It is
healed by LoRA of rank 64 on the entries of the Jargon File with even numbers, as plain text (DIRECTORY/text), which is
fused at the end. What is done already is kept: a run that was stopped goes on.
"""

import slowft  # noqa: F401, I001  (before mlx: it loads OpenBLAS)

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import mlx.core as mx

from slowft import demo
from slowft.reports.base import Report

ITERS = 150
WARMUP = 10


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def halve(model: Path, to: Path) -> Path:
    """The model without every second one of its inner blocks: the first two and the last one stay."""
    if (to / "config.json").exists():
        return to
    to.mkdir(parents=True, exist_ok=True)
    config = json.loads((model / "config.json").read_text())
    n = config["num_hidden_layers"]
    number = {old: new for new, old in enumerate(sorted({0, n - 1} | set(range(1, n, 2))))}
    weights = {}
    for file in sorted(model.glob("*.safetensors")):
        for name, array in mx.load(str(file)).items():
            parts = name.split(".")
            if "layers" in parts:
                at = parts.index("layers") + 1
                if int(parts[at]) not in number:
                    continue
                parts[at] = str(number[int(parts[at])])
            weights[".".join(parts)] = array
    mx.save_safetensors(str(to / "model.safetensors"), weights, {"format": "mlx"})
    for file in model.iterdir():
        if file.name.startswith("tokenizer") or file.suffix == ".jinja":
            (to / file.name).write_bytes(file.read_bytes())
    (to / "config.json").write_text(json.dumps(config | {"num_hidden_layers": len(number)}, indent=4))
    return to


class Noted(Report):
    """The losses of a run, on standard error."""

    def trained(self, report) -> None:
        note(f"  {report}")

    def validated(self, report) -> None:
        note(f"  {report}")


def tune(model: Path, data: Path, adapter: Path, iters: int, **how) -> Path:
    """An adapter of all blocks. Goes on from its newest checkpoint, if it was begun."""
    if (adapter / "done").exists():
        return adapter
    note(f"Tuning {model.name} on {data.name}: {iters} iterations")
    begin = time.perf_counter()
    how = {
        "num_layers": -1,
        "save_every": 20,
        "group_by_length": True,
        "resume": any((adapter / "checkpoints").glob("*")),
    } | how
    config = replace(
        demo.config(adapter.parent, iters), model=str(model), data=str(data), adapter_path=str(adapter), **how
    )
    with slowft.open_model(model, "4GB") as opened:
        tokenizer = slowft.load_tokenizer(opened.path, opened.embedding_rows)
        train, valid, _ = slowft.load_data(str(data), tokenizer, config)
        found = slowft.Trainer(opened, config, Noted()).fit(train, valid)
    (adapter / "done").write_text(json.dumps(found))
    note(f"  {time.perf_counter() - begin:.0f} s: {found}")
    return adapter


def plain_text(data: Path, to: Path) -> Path:
    """A data folder of every second entry, without its question."""
    to.mkdir(exist_ok=True)
    for name, step in (("train", 2), ("valid", 1)):
        lines = (data / f"{name}.jsonl").read_text("utf-8").splitlines()[::step]
        texts = [json.dumps({"text": json.loads(line)["completion"]}) + "\n" for line in lines]
        (to / f"{name}.jsonl").write_text("".join(texts), "utf-8")
    return to


def healed(directory: Path) -> Path:
    """DIRECTORY/small, made unless it is there."""
    large, small = demo.fetch_model(directory, note), directory / "small"
    half = halve(large, directory / "half")
    text = plain_text(demo.write_data(directory), directory / "text")
    much = {"rank": 64, "scale": 2.0, "dropout": 0.0}
    falling = {"name": "cosine_decay", "warmup": WARMUP, "arguments": [5e-4, ITERS - WARMUP, 2e-5]}
    heal = tune(half, text, directory / "heal", ITERS, mask_prompt=False, lora_parameters=much, lr_schedule=falling)
    if not (small / "config.json").exists():
        slowft.fuse(half, heal, small, dequantize=True)
    return small


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    print(healed(parser.parse_args().directory))
