"""How far reading hides behind computing: the step against reading alone and computing alone, and the share of waiting.

python benchmarks/overlap.py                               # 8 blocks of the 1.1 B shape, 4x128 tokens, 1 GB
python benchmarks/overlap.py --layers 22 --memory 1.4GB

Three drives: as fast as this one is, and held (by a pause after each read, in here only) to what makes reading every
block twice take 0.9 and 1.1 times as long as computing. For each the step is planned within `--memory`, as it would be
on a machine with such a drive. In every round each of these is measured once, medians are told:

- compute alone: a step of a process that goes by the same plan, but has all blocks and the head in memory as they lie
  on disk, so that they are cast at every visit as in streaming; what it waits for the embedding is taken off.
- read alone: every read of a step again, in its order, by the same reader under the same limit, nothing else going on.
- step: the step as it is planned.

Fresh pages (memory that the kernel had to give: 4 KB a fault) are told of both, as freed buffers that blocks on their
way leave no room for are what a step computes longer with than computing alone does.
"""

import slowft  # noqa: F401, I001  (before mlx: it loads OpenBLAS)

import argparse
import json
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from memory_ladder import SHAPE
from slowft.bench.shapes import write_random
from slowft.planning.schedule import Schedule
from slowft.weights.buffers import read_buffer, take_pages

DRIVES = {"this drive": None, "reading 0.9 of computing": 0.9, "reading 1.1 of computing": 1.1}
WARM_UP_STEPS = 3  # after which freed buffers have what the first ones left of the plan's memory


class Streaming:
    """A model that is trained as users train it, on a drive held to a rate."""

    def __init__(self, path: Path, memory: str, rows: int, tokens: int):
        import mlx.core as mx

        mx.random.seed(0)
        self.batch = mx.random.randint(0, SHAPE["vocab_size"], (rows, tokens + 1)), mx.array([[1, tokens]] * rows)
        self.shape = rows, tokens, 1
        self.model = slowft.open_model(path, memory=memory).add_lora(num_layers=-1, rank=8).train()
        self.engine, self.budget = self.model.engine, self.model.budget
        self.machine_within = self.budget._machine_within
        self.reader = self.engine._residency.reader
        self.read, self.reader._read = self.reader._read, self.held_read
        self.bytes_per_s: float | None = None
        self.free_at = 0.0
        self.record: list | None = None

    def held_read(self, ranges, buffer) -> None:
        if self.record is not None:
            self.record.append((ranges, len(buffer)))
        begin = time.perf_counter()
        self.read(ranges, buffer)
        if self.bytes_per_s is not None:
            self.free_at = max(self.free_at, begin) + sum(r.nbytes for r in ranges) / self.bytes_per_s
            time.sleep(max(0.0, self.free_at - time.perf_counter()))

    def plan(self, bytes_per_s: float | None) -> dict[str, Any]:
        """Go by the plan for such a drive."""
        from slowft.reports.plan import choices

        self.bytes_per_s, held = bytes_per_s, {} if bytes_per_s is None else {"read_bytes_per_s": bytes_per_s}
        self.budget._machine_within = lambda memory: replace(self.machine_within(memory), **held)
        self.budget._shape = (0, 0, 0)
        plan = self.budget.cover(*self.shape)
        return {"kept": choices(plan), "predicted_step_s": plan.step_s}

    def follows(self) -> tuple[Schedule, int]:
        """(the schedule, with what is found free in memory by now; bytes of its buffers for blocks)."""
        schedule, residency = self.engine.schedule, self.engine._residency
        total = schedule.total_nbytes and residency.reuse._total
        return replace(schedule, total_nbytes=total), residency._cache.capacity

    def step(self) -> dict[str, float]:
        faults, begin = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
        self.model.loss_and_grads(*self.batch)
        took, faults = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
        return {"step_s": took, "wait_s": self.model.stats.last.wait_s, "fresh_gb": faults * 4096 / 1e9}

    def recorded_step(self) -> float:
        """A step whose reads `replay` repeats; GB of them."""
        self.record = []
        self.step()
        self.recorded, self.record = self.record, None
        return sum(r.nbytes for ranges, _ in self.recorded for r in ranges) / 1e9

    def replay(self) -> float:
        buffer = memoryview(read_buffer(max(n for _, n in self.recorded)))  # in no step: it is not planned for
        take_pages(buffer)
        begin = time.perf_counter()
        for ranges, nbytes in self.recorded:
            self.reader.wait(self.reader.submit(ranges, buffer[:nbytes]))
        return time.perf_counter() - begin

    def nbytes(self) -> tuple[int, int]:
        """Of (all blocks, the head's layers), on disk."""
        return sum(unit.nbytes for unit in self.engine.cut.blocks), sum(unit.nbytes for unit in self.engine.cut.head)


class Resident(Streaming):
    """The same model with all that is streamed in memory."""

    def follow(self, schedule: Schedule, buffers_nbytes: int) -> None:
        self.budget.memory = None
        everything = sum(self.nbytes())
        more = everything - buffers_nbytes
        here = replace(schedule, resident_nbytes=everything, temporary_nbytes=())
        here = replace(here, active_nbytes=here.active_nbytes + more, head_active_nbytes=here.head_active_nbytes + more)
        self.engine.follow(replace(here, total_nbytes=here.total_nbytes and here.total_nbytes + more))


def serve(pipe, kind: type[Streaming], *args) -> None:
    """In a process of its own: call methods as they are asked for."""
    model = kind(*args)
    while (request := pipe.recv()) is not None:
        method, *args = request
        pipe.send(getattr(model, method)(*args))
    model.model.close()


@contextmanager
def in_process(kind: type[Streaming], *args):
    """A function that calls a method, by name, of such a model in a process of its own."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, kind, *args))
    process.start()
    theirs.close()

    def call(*request):
        ours.send(request)
        return ours.recv()

    try:
        yield call
        ours.send(None)
    finally:
        ours.close()
        process.join()


def on_drive(streaming, resident, compute_s: float | None, share: float | None, rounds: int) -> dict[str, Any]:
    """Seconds of reading, computing and both, planned for a drive that reads all twice in `share` of `compute_s`."""
    blocks_nbytes, _ = streaming("nbytes")
    bytes_per_s = None if share is None else 2 * blocks_nbytes / (share * compute_s)
    result = {"bytes_per_s": bytes_per_s} | streaming("plan", bytes_per_s)
    for _ in range(WARM_UP_STEPS):
        streaming("step")
    result["read_gb"] = streaming("recorded_step")
    resident("follow", *streaming("follows"))
    for _ in range(2):
        resident("step")
    alone, reading, steps = [], [], []
    for _ in range(rounds):
        alone.append(resident("step"))
        reading.append(streaming("replay"))
        steps.append(streaming("step"))
    computing = [step["step_s"] - step["wait_s"] for step in alone]
    compute = statistics.median(computing)
    read = statistics.median(reading)
    step, waited = (statistics.median(step[figure] for step in steps) for figure in ("step_s", "wait_s"))
    return result | {
        "compute_alone_s": compute,
        "read_alone_s": read,
        "step_s": step,
        "steps_s": [step["step_s"] for step in steps],
        "computing_alone_s": computing,
        "fresh_gb": statistics.median(step["fresh_gb"] for step in steps),
        "fresh_alone_gb": statistics.median(step["fresh_gb"] for step in alone),
        "step_to_larger": step / max(read, compute),
        "wait_share": waited / step,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--memory", default="1GB")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    results = {"shape": f"{args.layers} blocks, {args.rows}x{args.tokens} tokens, {args.memory}"}
    compute_s = None
    with tempfile.TemporaryDirectory() as directory:
        path = write_random(Path(directory), SHAPE | {"num_hidden_layers": args.layers})
        model = path, args.memory, args.rows, args.tokens
        with in_process(Streaming, *model) as streaming, in_process(Resident, *model) as resident:
            for drive, share in DRIVES.items():
                results[drive] = found = on_drive(streaming, resident, compute_s, share, args.rounds)
                compute_s = compute_s or found["compute_alone_s"]
                print(f"{drive}: {found['step_to_larger']:.2f} of the larger", file=sys.stderr)
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
