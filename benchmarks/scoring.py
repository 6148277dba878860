"""Measures scoring within a ceiling: the kernel's peak, readings of the model, seconds; base alone and with adapters.

    python benchmarks/scoring.py [--memory 600MB ...] [--texts 64] [--tokens 256] [--adapters 0 2]

Each run is a process in a cgroup of exactly that memory, with page cache and swap (needs root on Linux). The model is
a random one of a shape of `slowft bench`.
"""

import slowft  # noqa: F401, I001  (before mlx: it loads OpenBLAS)

import json
import sys
import tempfile
from pathlib import Path

import click
import mlx.core as mx
from mlx.utils import tree_map

from slowft.bench import cgroup
from slowft.bench.shapes import cached, config_of
from slowft.sizes import parse_nbytes

RUN = """
import json, sys, time
import slowft
import numpy as np

directory, memory, n, tokens, top_k, *adapters = sys.argv[1:]
numbers = np.random.default_rng(0)
lengths = numbers.integers(int(tokens) // 2, int(tokens) + 1, int(n))
model = slowft.open_model(directory, memory=int(memory))
texts = [(numbers.integers(0, model.embedding_rows, length).tolist(), 0) for length in lengths]
visits = []
begin = time.perf_counter()
named = {f"a{i}": path for i, path in enumerate(adapters)}
scores = slowft.score(model, texts, named, top_k=int(top_k), on_visit=visits.append)
total = model.stats.total
print(json.dumps({
    "seconds": time.perf_counter() - begin, "passes": len(visits) / len(model.layers),
    "readings": total.bytes_read / model.nbytes_on_disk, "planned": model.followed_plan.peak_nbytes,
    "own_peak": total.peak_memory, "tokens": scores["base"].tokens, "perplexity": scores["base"].perplexity,
}))
"""


@click.command()
@click.option("--shape", default="llama-135m")
@click.option("--layers", type=int)
@click.option("--memory", multiple=True, default=["400MB", "600MB"])
@click.option("--texts", default=64)
@click.option("--tokens", default=256, help="Tokens of the longest text; the shortest has half.")
@click.option("--adapters", multiple=True, type=int, default=[0, 2])
@click.option("--top-k", default=0)
def main(shape, layers, memory, texts, tokens, adapters, top_k):
    directory = cached(config_of(shape, layers))
    with tempfile.TemporaryDirectory() as temporary:
        paths = [_adapter(directory, Path(temporary) / f"a{i}", i) for i in range(max(adapters))]
        for ceiling in memory:
            for n in adapters:
                nbytes = parse_nbytes(ceiling)
                arguments = [str(directory), str(nbytes), str(texts), str(tokens), str(top_k), *map(str, paths[:n])]
                done, peak = cgroup.run([sys.executable, "-c", RUN, *arguments], nbytes)
                if done.returncode:
                    print(f"{ceiling}, {n} adapters: {done.returncode}, kernel's peak {peak}: {done.stderr[-300:]}")
                    continue
                figures = json.loads(done.stdout.splitlines()[-1])
                per_s = figures["tokens"] * (n + 1) / figures["seconds"]
                print(
                    f"{ceiling}, {n} adapters: kernel's peak {peak / 1e6:.0f} MB, planned "
                    f"{figures['planned'] / 1e6:.0f}; {figures['passes']:.0f} passes, "
                    f"{figures['readings']:.2f} readings, {figures['seconds']:.1f} s, {per_s:.0f} tokens/s, "
                    f"perplexity {figures['perplexity']:.3f}",
                    flush=True,
                )


def _adapter(directory: Path, path: Path, seed: int) -> Path:
    with slowft.open_model(directory) as model:
        model.add_lora(num_layers=-1, rank=8)
        mx.random.seed(seed)
        model.update(tree_map(lambda a: mx.random.normal(a.shape) * 0.01, model.trainable_parameters()))
        model.save_adapter(path)
    return path


if __name__ == "__main__":
    main()
