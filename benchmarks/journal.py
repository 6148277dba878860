"""Measures what writing finished blocks to disk adds to a step. Steps with and without it take turns in one run.

python benchmarks/journal.py                       # 4 blocks of the 1.1 B Llama shape, 4x128 tokens
python benchmarks/journal.py --dir DIR             # journal on another disk

Processor seconds are printed too, because other work on the machine disturbs them less. They are those of the whole
process, with the threads that write and hash. The first two steps are not counted.
"""

import slowft  # noqa: F401, I001  (before mlx: it loads OpenBLAS)

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import mlx.core as mx

from slowft.bench.shapes import cached, config_of
from slowft.weights.journal import Journal


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="llama-1b")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--micro-batches", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=8, help="pairs of a step with and a step without")
    parser.add_argument("--dir", help="directory of the journal; default: the one for temporary files")
    args = parser.parse_args()
    model = slowft.open_model(cached(config_of(args.shape, args.layers)))
    mx.random.seed(0)
    model.add_lora(num_layers=-1, rank=8)
    model.train()
    batches = [
        (mx.random.randint(0, 1000, (args.rows, args.tokens + 1)), mx.array([[1, args.tokens]] * args.rows))
        for _ in range(args.micro_batches)
    ]
    times: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    with tempfile.TemporaryDirectory(dir=args.dir) as directory:
        journal = Journal(Path(directory) / "journal")
        for i in range(args.pairs + 1):
            for journals in ((False, True), (True, False))[i % 2]:
                model.engine.journal_steps(journal if journals else None)
                begin, begin_cpu = time.perf_counter(), time.process_time()
                model.loss_and_grads(batches)
                times[journals].append((time.perf_counter() - begin, time.process_time() - begin_cpu))
        problem, written, wait_s = journal.problem, journal.bytes_written, journal.wait_s
        journal.close()
    model.close()
    if problem:
        raise SystemExit(problem)
    for clock, index in (("wall", 0), ("processor", 1)):
        off, on = ([step[index] for step in times[journals][1:]] for journals in (False, True))
        ratios = [b / a for a, b in zip(off, on)]
        print(
            f"{clock:9} seconds a step: fastest {min(off):.3f} without, {min(on):.3f} with; "
            f"medians {statistics.median(off):.3f}, {statistics.median(on):.3f}, ratio {statistics.median(ratios):.3f}"
        )
    steps = args.pairs + 1
    print(f"{written / steps / 1e6:.1f} MB written a step; {wait_s / steps * 1e3:.1f} ms of it waited for")


if __name__ == "__main__":
    main()
