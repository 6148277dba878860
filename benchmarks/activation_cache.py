"""Compares epochs with activations stored at the boundary with the first epoch, and with epochs without the store.

python benchmarks/activation_cache.py                                    # 8 blocks of 1024/2816, the last 2 trained
python benchmarks/activation_cache.py --memory 500MB --limit-read 60MB    # a laptop's ratio of reading to computing

The vocabulary is small, so that the head has the share of the work that it has in a model of 8 B parameters (2%).
`--limit-read` needs root and a cgroup.
"""

import slowft  # noqa: F401, I001  (before mlx: it loads OpenBLAS)

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten

from slowft.bench import cgroup
from slowft.bench.shapes import write_random

SHAPE = {
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-5,
    "vocab_size": 2000,
    "tie_word_embeddings": False,
}


def train(directory: str, store: str | None, args: argparse.Namespace) -> dict:
    """Train epochs over a few batches in a changing order. Returns medians of seconds and bytes read, by epoch."""
    model = slowft.open_model(directory, memory=args.memory)
    mx.random.seed(0)
    model.add_lora(num_layers=max(args.layers // 4, 1), rank=8)
    model.train()
    batches = [
        (
            mx.random.randint(0, SHAPE["vocab_size"], (args.rows, args.tokens + 1)),
            mx.array([[1, args.tokens]] * args.rows),
        )
        for _ in range(args.batches)
    ]
    if args.memory is not None:
        model.plan(args.rows, args.tokens, follow=True)
    if store is not None:
        model.cache_activations(store)
    optimizer = optim.Adam(1e-4)
    epochs = []
    for epoch in range(args.epochs):
        seconds, read, losses = [], [], []
        for i in range(args.batches):
            begin = time.perf_counter()
            (loss, _), gradients = model.loss_and_grads(*batches[(i + epoch) % args.batches])
            optimizer.update(model, gradients)
            mx.eval(model.trainable_parameters(), optimizer.state)
            seconds.append(time.perf_counter() - begin)
            read.append(model.stats.last.bytes_read)
            losses.append(loss.item())
        epochs.append({"step_s": statistics.median(seconds), "read_nbytes": statistics.median(read), "losses": losses})
    adapter = sum(mx.abs(array).sum().item() for _, array in tree_flatten(model.trainable_parameters()))
    return {"epochs": epochs, "adapter": adapter, "waited_s": model.stats.last.wait_s}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--batches", type=int, default=4, help="batches in an epoch")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--memory", help="ceiling of the plan; default: two blocks at a time, nothing kept")
    parser.add_argument("--limit-read", help="limit of reads in bytes a second, such as 150MB")
    parser.add_argument("--one", choices=["off", "on"], help=argparse.SUPPRESS)
    parser.add_argument("--dir", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(train(args.dir, args.dir + "/store" if args.one == "on" else None, args)))
        return
    from slowft.engine.model import parse_nbytes

    limit = None if args.limit_read is None else parse_nbytes(args.limit_read)
    with tempfile.TemporaryDirectory() as directory:
        write_random(Path(directory), SHAPE | {"num_hidden_layers": args.layers})
        results = {}
        limited = nullcontext() if limit is None else cgroup.limit(read_bytes_per_s=limit, files=[Path(directory)])
        with limited as group:
            for kind in ("off", "on"):
                command = [sys.executable, __file__, *sys.argv[1:], "--one", kind, "--dir", directory]
                command = command if group is None else group.entered(command)
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                results[kind] = json.loads(done.stdout)
    first, *later = results["on"]["epochs"]
    assert [e["losses"] for e in results["on"]["epochs"]] == [e["losses"] for e in results["off"]["epochs"]]
    assert results["on"]["adapter"] == results["off"]["adapter"]
    off = results["off"]["epochs"][1:]
    shape = (
        f"{args.layers} blocks, {args.layers // 4} trained, {args.rows}x{args.tokens} tokens, {args.batches} batches"
    )
    summary = {"shape": f"{shape}, {platform.machine()} {platform.system()}", "memory": args.memory}
    for name, epochs in (("without", off), ("first epoch", [first]), ("later epochs", later)):
        summary[name] = {k: statistics.median(e[k] for e in epochs) for k in ("step_s", "read_nbytes")}
    for name in ("step_s", "read_nbytes"):
        summary[f"later / without, {name}"] = round(summary["later epochs"][name] / summary["without"][name], 3)
        summary[f"later / first, {name}"] = round(summary["later epochs"][name] / summary["first epoch"][name], 3)
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main()
