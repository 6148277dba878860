"""How far reading hides behind computing: the step against reading alone and computing alone, and the share of waiting.

python benchmarks/overlap.py                # 8 blocks of the 1.1 B shape, 4x128 tokens
python benchmarks/overlap.py --layers 22 --rows 1 --resident 4

Three regimes: reads as fast as they come, and reads held (by a pause after each, in here only) to what makes reading
take 0.9 and 1.1 times as long as computing. In every round each of these is measured once, medians are told:

- compute alone: a step of the same model whose blocks all stay in memory as they lie on disk, so that they are cast
  at every visit as in streaming; what it waits for the head and the embedding is taken off.
- read alone: every read of a step again, in its order, by the same reader under the same limit, nothing else going on.
- step: the streaming step, with room for `--resident` blocks beside the one on its way.

Forward takes less computing a block than backward, and the head none of reading: where both are about equal, forward
waits for reads and backward's reads for room, unless some blocks lie ready. That is what `--resident` shows.
"""

import slowft  # noqa: F401, I001  (before mlx: it loads OpenBLAS)

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import mlx.core as mx

from memory_ladder import SHAPE
from slowft.bench.shapes import write_random
from slowft.storage.buffers import read_buffer

REGIMES = {"unlimited": None, "reading 0.9 of computing": 0.9, "reading 1.1 of computing": 1.1}


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
    begin = time.perf_counter()
    model.loss_and_grads(batch, lengths)
    return time.perf_counter() - begin, model.stats.last.wait_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--resident", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    mx.random.seed(0)
    batch = mx.random.randint(0, SHAPE["vocab_size"], (args.rows, args.tokens + 1))
    lengths = mx.array([[1, args.tokens]] * args.rows)
    with tempfile.TemporaryDirectory() as directory:
        path = write_random(Path(directory), SHAPE | {"num_hidden_layers": args.layers})
        streaming, resident = (slowft.open_model(path).add_lora(num_layers=-1, rank=8).train() for _ in range(2))
        blocks_nbytes = sum(unit.nbytes for unit in resident._cut.blocks)
        resident._engine.follow(replace(resident._engine.schedule, resident_nbytes=blocks_nbytes))
        kept_nbytes = args.resident * blocks_nbytes // args.layers
        streaming._engine.follow(replace(streaming._engine.schedule, resident_nbytes=kept_nbytes))
        reads = Watched(streaming)
        for model in (streaming, resident):
            timed_step(model, batch, lengths)
        reads.record = []
        timed_step(streaming, batch, lengths)
        recorded, reads.record = reads.record, None
        nbytes = sum(r.nbytes for ranges, _ in recorded for r in ranges)
        buffer = memoryview(read_buffer(max(n for _, n in recorded)))
        compute_s, read_s, step_s, wait_s = [], {k: [] for k in REGIMES}, {k: [] for k in REGIMES}, {}
        for _ in range(args.rounds):
            took, waited = timed_step(resident, batch, lengths)
            compute_s.append(took - waited)
            for regime, share in REGIMES.items():
                reads.bytes_per_s = share and nbytes / (share * statistics.median(compute_s))
                read_s[regime].append(reads.replay(recorded, buffer))
                took, waited = timed_step(streaming, batch, lengths)
                step_s[regime].append(took)
                wait_s.setdefault(regime, []).append(waited)
        for model in (streaming, resident):
            model.close()
    compute = statistics.median(compute_s)
    results = {
        "shape": f"{args.layers} blocks, {args.rows}x{args.tokens} tokens, {args.resident} resident",
        "read_gb": nbytes / 1e9,
        "compute_alone_s": compute,
        "compute_all_s": compute_s,
    }
    for regime in REGIMES:
        read, step = statistics.median(read_s[regime]), statistics.median(step_s[regime])
        results[regime] = {
            "read_alone_s": read,
            "step_s": step,
            "step_to_larger": step / max(read, compute),
            "wait_share": statistics.median(wait_s[regime]) / step,
            "steps_s": step_s[regime],
        }
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
