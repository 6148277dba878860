"""Measures how much other work slows down beside a run, with --gentle and without, and how much the run slows down.

python benchmarks/gentle.py     # about 3 minutes

The other work is SHA-256 over memory on every core, and reading a file that is not in the page cache, for some seconds
each. It runs alone, beside a run, and beside a gentle run, in turns. Its speeds are printed as shares of those alone,
with the run's steps a second.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from slowft.bench.shapes import write_random

SHAPE = {
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-5,
    "vocab_size": 2000,
    "tie_word_embeddings": False,
}
RUN = """
import sys, time, json
import slowft
from slowft import platform
import mlx.core as mx
model, gentle = sys.argv[1:]
if gentle == "True":
    platform.be_gentle()
model = slowft.open_model(model, memory="600MB").add_lora(num_layers=-1)
batch, lengths = mx.random.randint(0, 2000, (4, 129)), mx.array([[1, 128]] * 4)
model.loss_and_grads(batch, lengths)
print("READY", flush=True)
while True:
    begin = time.perf_counter()
    model.loss_and_grads(batch, lengths)
    print(time.perf_counter() - begin, flush=True)
"""


def hashed(seconds: float) -> float:
    """GB a second of SHA-256, by one process for each core."""
    with multiprocessing.Pool() as pool:
        return sum(pool.map(_hash, [seconds] * os.cpu_count())) / seconds / 1e9


def _hash(seconds: float) -> int:
    block, n, end = bytes(1 << 20), 0, time.monotonic() + seconds
    while time.monotonic() < end:
        hashlib.sha256(block).digest()
        n += len(block)
    return n


def read(file: Path, seconds: float) -> float:
    """GB a second from the drive."""
    n, end = 0, time.monotonic() + seconds
    fd = os.open(file, os.O_RDONLY)
    try:
        while time.monotonic() < end:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.lseek(fd, 0, os.SEEK_SET)
            while (nbytes := len(os.read(fd, 1 << 22))) and time.monotonic() < end:
                n += nbytes
    finally:
        os.close(fd)
    return n / seconds / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=12)
    parser.add_argument("--turns", type=int, default=2)
    args = parser.parse_args()
    rates: dict[str, list[tuple[float, float, float]]] = {"alone": [], "beside a run": [], "beside a gentle run": []}
    with tempfile.TemporaryDirectory(dir=Path.home()) as scratch:
        model = write_random(Path(scratch) / "model", SHAPE)
        other = Path(scratch) / "other"
        other.write_bytes(os.urandom(1 << 28))
        for _ in range(args.turns):
            for name, gentle in (("alone", None), ("beside a run", False), ("beside a gentle run", True)):
                process = None
                if gentle is not None:
                    command = [sys.executable, "-c", RUN, str(model), str(gentle)]
                    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
                    process.stdout.readline()
                hashes, reads = hashed(args.seconds), read(other, args.seconds)
                steps = 0.0
                if process is not None:
                    process.kill()
                    times = [float(line) for line in process.stdout.read().split()]
                    steps = len(times) / (2 * args.seconds)
                rates[name].append((hashes, reads, steps))
    means = {name: [sum(values) / len(values) for values in zip(*turns)] for name, turns in rates.items()}
    for name, (hashes, reads, steps) in means.items():
        alone = means["alone"]
        print(
            f"{name:20} hashing {hashes:.2f} GB/s ({hashes / alone[0]:.0%}), reading {reads:.2f} GB/s "
            f"({reads / alone[1]:.0%}), the run {steps:.2f} steps/s"
        )
    print(json.dumps(means))


if __name__ == "__main__":
    main()
