"""Measures the memory that many samples take, and the time that batches of samples of similar length save.

python benchmarks/data.py --many 5000000     # short samples in a cgroup; needs root on Linux; a quarter of an hour
python benchmarks/data.py --by-length        # SmolLM2-135M on the Jargon File, an epoch in file order and by length

The first command prints the kernel's peak of a process that loads the samples and draws batches, beside the peak of
the same process with one sample. It does so for the first start (which tokenises) and for the second. The second
command trains both ways in turns.
"""

import argparse
import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import slowft  # noqa: F401  (before mlx: it loads OpenBLAS)
from slowft import demo
from slowft.bench import cgroup
from slowft.data.survey import survey
from slowft.reports.base import Report

LOAD = """
import sys, time
import slowft
from pathlib import Path
from slowft.data.batches import BatchStream, batch_order
data, model = sys.argv[1:]
begin = time.perf_counter()
tokenizer = slowft.load_tokenizer(Path(model), None)
train, _, _ = slowft.load_data(data, tokenizer, slowft.TrainConfig(mask_prompt=True))
loaded = time.perf_counter() - begin
n = min(len(train), 4)
batches = BatchStream(train, batch_order(train, n), 2048)
for _ in range(20_000):
    next(batches)
print(len(train), round(loaded, 1))
"""


def many(n: int, directory: Path) -> None:
    model = demo.fetch_model(directory, print)
    peaks = []
    for size in (1, n):
        folder = directory / f"{size}"
        folder.mkdir()
        with open(folder / "train.jsonl", "w") as lines:
            for i in range(size):
                lines.write(json.dumps({"prompt": f"What is {i}?", "completion": f"It is {i} and no more."}) + "\n")
        for start in ("first", "second"):
            done, peak = cgroup.run([sys.executable, "-c", LOAD, str(folder), str(model)], 1 << 40)
            printed = done.stdout.strip() or done.stderr[-500:]
            peaks.append(peak)
            print(f"{size:,} samples, {start} start: (samples, seconds) {printed}; kernel's peak {peak / 1e6:.0f} MB")
    limit = peaks[1] + 300_000_000
    done, peak = cgroup.run([sys.executable, "-c", LOAD, str(folder), str(model)], limit)
    printed = done.stdout.strip() or "killed"
    print(f"Within {limit / 1e6:.0f} MB (one sample and 300 MB): {printed}, {peak / 1e6:.0f} MB")


def by_length(directory: Path, turns: int, iters: int) -> None:
    demo.fetch_model(directory, print)
    demo.write_data(directory)
    model = slowft.open_model(directory / "model")
    tokenizer = slowft.load_tokenizer(model.path, model.embedding_rows)
    config = replace(demo.config(directory, iters), save_every=iters, steps_per_report=iters)
    train, _, _ = slowft.load_data(config.data, tokenizer, config)
    for seed in (None, 0):
        counts, _ = survey(train, config.batch_size, config.max_seq_length, seed)
        print(f"{'by length' if seed == 0 else 'file order'}: {100 * counts.padding_share:.0f}% of batches is padding")
    model.add_lora(**config.lora_parameters)
    for _ in range(turns):
        for grouped in (False, True):
            begin, trainer = time.perf_counter(), None
            trainer = slowft.Trainer(model, replace(config, group_by_length=grouped), Report())
            trainer.fit(train)
            seconds = time.perf_counter() - begin
            print(f"group_by_length={grouped}: {trainer.trained_tokens / seconds:.0f} trained tokens/s", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--many", type=int)
    parser.add_argument("--by-length", action="store_true")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--iters", type=int, default=100)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        if args.many:
            many(args.many, Path(temporary))
        if args.by_length:
            by_length(Path(temporary), args.turns, args.iters)
