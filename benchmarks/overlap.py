"""How far reading hides behind computing: the step against reading alone and computing alone, and the share of waiting.

python benchmarks/overlap.py                               # 8 blocks of the 1.1 B shape, 4x128 tokens, 1 GB
python benchmarks/overlap.py --layers 22 --memory 1.4GB

Three drives: as fast as this one is, and held (by a pause after each read, in here only) to what makes reading every
block twice take 0.9 and 1.1 times as long as computing. For each the step is planned within `--memory`, as it would be
on a machine with such a drive. In every round each of these is measured once, medians are told:

- compute alone: a step under the same plan, but with all blocks and the head in memory as they lie on disk, so that
  they are cast at every visit as in streaming; what it waits for the embedding is taken off.
- read alone: every read of a step again, in its order, by the same reader under the same limit, nothing else going on.
- step: the step as it is planned.
"""

import slowft  # noqa: F401, I001  (before mlx: it loads OpenBLAS)

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import mlx.core as mx

from memory_ladder import SHAPE
from slowft.bench.shapes import write_random
from slowft.reports.plan import choices
from slowft.sizes import parse_nbytes
from slowft.storage.buffers import read_buffer

DRIVES = {"this drive": None, "reading 0.9 of computing": 0.9, "reading 1.1 of computing": 1.1}


class Watched:
    """The reads of an opened model: recorded, held to a rate, replayed."""

    def __init__(self, model):
        self.reader = model._engine._residency.reader
        self.bytes_per_s: float | None = None
        self.record: list | None = None
        self._read, self.reader._read = self.reader._read, self._held_read
        self._free_at = 0.0

    def _held_read(self, ranges, buffer) -> None:
        if self.record is not None:
            self.record.append((ranges, len(buffer)))
        begin = time.perf_counter()
        self._read(ranges, buffer)
        if self.bytes_per_s is not None:
            self._free_at = max(self._free_at, begin) + sum(r.nbytes for r in ranges) / self.bytes_per_s
            time.sleep(max(0.0, self._free_at - time.perf_counter()))

    def replay(self, reads: list, buffer: memoryview) -> float:
        begin = time.perf_counter()
        for ranges, nbytes in reads:
            self.reader.wait(self.reader.submit(ranges, buffer[:nbytes]))
        return time.perf_counter() - begin


def timed_step(model, batch, lengths) -> tuple[float, float]:
    """(seconds, seconds waited) of a step."""
    mx.set_memory_limit(model._engine.schedule.active_nbytes)  # is the process's: the last that was set
    begin = time.perf_counter()
    model.loss_and_grads(batch, lengths)
    return time.perf_counter() - begin, model.stats.last.wait_s


def on_drive(watched: Watched, streaming, resident, compute_s: float | None, share: float | None, args) -> dict:
    """Seconds of reading, computing and both, planned for a drive that reads all twice in `share` of `compute_s`."""
    batch, lengths = args.batch
    blocks_nbytes = sum(unit.nbytes for unit in streaming._cut.blocks)
    planner = streaming.planner(args.rows, args.tokens, 1)
    if share is not None:
        watched.bytes_per_s = 2 * blocks_nbytes / (share * compute_s)
        planner.machine = replace(planner.machine, read_bytes_per_s=watched.bytes_per_s)
    plan = planner.choose(parse_nbytes(args.memory))
    head_nbytes = sum(unit.nbytes for unit in streaming._cut.head)
    everything = blocks_nbytes + head_nbytes
    # MLX's limits are the process's, in which the other model keeps all its blocks, and a buffer that it has no use for
    others = everything + head_nbytes
    s = replace(plan.schedule, active_nbytes=plan.schedule.active_nbytes + others)
    if s.total_nbytes:
        s = replace(s, total_nbytes=s.total_nbytes + others)
    streaming._engine.follow(s)
    # between its steps it holds blocks besides, for the next one's forward pass
    lent = max(s.lent_nbytes, default=0)
    beside = replace(s, resident_nbytes=everything, lent_nbytes=(), active_nbytes=s.active_nbytes + lent)
    resident._engine.follow(replace(beside, total_nbytes=s.total_nbytes + lent if s.total_nbytes else 0))
    for model in (resident, streaming):
        timed_step(model, batch, lengths)
    watched.record = recorded = []
    timed_step(streaming, batch, lengths)
    watched.record = None
    buffer = memoryview(read_buffer(max(n for _, n in recorded)))
    computing, reading, steps, waiting = [], [], [], []
    for _ in range(args.rounds):
        took, waited = timed_step(resident, batch, lengths)
        computing.append(took - waited)
        reading.append(watched.replay(recorded, buffer))
        took, waited = timed_step(streaming, batch, lengths)
        steps.append(took)
        waiting.append(waited)
    compute, read, step = (statistics.median(a) for a in (computing, reading, steps))
    return {
        "bytes_per_s": watched.bytes_per_s,
        "kept": choices(plan),
        "read_gb": sum(r.nbytes for ranges, _ in recorded for r in ranges) / 1e9,
        "predicted_step_s": plan.step_s,
        "compute_alone_s": compute,
        "read_alone_s": read,
        "step_s": step,
        "steps_s": steps,
        "step_to_larger": step / max(read, compute),
        "wait_share": statistics.median(waiting) / step,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--memory", default="1GB")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    mx.random.seed(0)
    batch = mx.random.randint(0, SHAPE["vocab_size"], (args.rows, args.tokens + 1))
    args.batch = batch, mx.array([[1, args.tokens]] * args.rows)
    results, compute_s = {"shape": f"{args.layers} blocks, {args.rows}x{args.tokens} tokens, {args.memory}"}, None
    with tempfile.TemporaryDirectory() as directory:
        path = write_random(Path(directory), SHAPE | {"num_hidden_layers": args.layers})
        streaming, resident = (slowft.open_model(path).add_lora(num_layers=-1, rank=8).train() for _ in range(2))
        watched = Watched(streaming)
        for drive, share in DRIVES.items():
            results[drive] = on_drive(watched, streaming, resident, compute_s, share, args)
            compute_s = compute_s or results[drive]["compute_alone_s"]
            print(f"{drive}: {results[drive]['step_to_larger']:.2f} of the larger", file=sys.stderr)
        for model in (streaming, resident):
            model.close()
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
