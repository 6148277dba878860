"""Runs steps under a plan in a process of their own: what was predicted, and what the kernel and the clock measured.

The other benchmarks call `measure`.
"""

import slowft  # noqa: F401, I001  (before mlx: it loads OpenBLAS)

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
from slowft import platform
from slowft.bench import cgroup


def measure(directory: Path, memory: int | None, read_bytes_per_s: int | None = None, **job) -> dict:
    """Run `job` within `memory` bytes; None: as much as is useful.

    A cgroup enforces the memory, if one can be made.

    Args:
        read_bytes_per_s: the cgroup's limit of reads; None: no limit.
        job: rows, tokens, micro_batches, steps; num_layers and use_dora of the adapter; compute_dtype of the model.
            With `vary` every other step has rows of half the length.
    """
    command = [sys.executable, __file__, str(directory), str(memory or ""), json.dumps(job)]
    peak = None
    if memory is not None and cgroup.why_unavailable() is None:
        done, peak = cgroup.run(command, memory, read_bytes_per_s, Path(directory).glob("*.safetensors"))
    else:
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"failed within {memory} bytes (peak {peak}): {done.stderr[-2000:]}")
    return json.loads(done.stdout) | {"kernel_peak_nbytes": peak}


def plans(directory: Path, **job) -> dict[str, int]:
    """The predicted peaks of the least plan ("least") and of the one that keeps everything ("most")."""
    done = subprocess.run(
        [sys.executable, __file__, str(directory), "plans", json.dumps(job)], check=True, capture_output=True, text=True
    )
    return json.loads(done.stdout)


def _open(directory: str, memory=None, num_layers=-1, use_dora=False, compute_dtype=None, **_):
    mx.random.seed(0)
    model = slowft.open_model(directory, memory=memory, compute_dtype=compute_dtype)
    model.add_lora(num_layers=num_layers, rank=8, use_dora=use_dora)
    model.train()
    return model


def _shape(job: dict) -> tuple[int, int, int]:
    """(rows, tokens, micro-batches)."""
    return job.get("rows", 4), job.get("tokens", 128), job.get("micro_batches", 1)


def _batches(job: dict, vocab: int, is_short: bool) -> list:
    rows, tokens, n = _shape(job)
    if is_short:
        tokens = -(-tokens // 2)
    return [(mx.random.randint(0, vocab, (rows, tokens + 1)), mx.array([[1, tokens]] * rows)) for _ in range(n)]


def _run(directory: str, memory: str, job: dict) -> dict:
    import mlx.optimizers as optim

    model = _open(directory, memory=int(memory) if memory else "1000GB", **job)
    begin = time.perf_counter()
    model.plan(*_shape(job), follow=True)
    plan_s = time.perf_counter() - begin
    vocab = model.embedding_rows
    mx.random.seed(0)
    batches, short = (_batches(job, vocab, is_short) for is_short in (False, True))
    optimizer, times, peaks = optim.Adam(1e-4), [], []

    def step(batches: list) -> mx.array:
        (loss, _), gradients = model.loss_and_grads(batches)
        optimizer.update(model, gradients)
        mx.eval(model.trainable_parameters(), optimizer.state)
        return loss

    for i in range(job.get("steps", 2) + 1):
        if job.get("vary") and i:
            step(short)
        platform.reset_peak_memory()
        begin = time.perf_counter()
        loss = step(batches)
        times.append(time.perf_counter() - begin)
        peaks.append(max(platform.peak_memory(), model.stats.last.peak_memory))
    last, plan = model.stats.last, model.followed_plan
    return {
        "memory": plan.memory,
        "predicted": {
            "peak_nbytes": plan.peak_nbytes,
            "step_s": plan.step_s,
            "read_nbytes": plan.read_nbytes,
            "written_nbytes": plan.written_nbytes,
        },
        "measured": {
            "peak_nbytes": max(peaks),
            "step_s": statistics.median(times[1:]),
            "spread_s": max(times[1:]) - min(times[1:]),
            "read_nbytes": last.bytes_read,
            "written_nbytes": last.bytes_written,
            "wait_s": last.wait_s,
        },
        "kept": _choices(plan),
        "plan_s": plan_s,
        "loss": loss.item(),
    }


def _choices(plan) -> str:
    from slowft.reports.plan import choices

    return choices(plan)


if __name__ == "__main__":
    directory_, memory_, job_ = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    if memory_ == "plans":
        planner = _open(directory_, **job_).planner(*_shape(job_))
        print(json.dumps({"least": planner.least().peak_nbytes, "most": planner.most().peak_nbytes}))
    else:
        print(json.dumps(_run(directory_, memory_, job_)))
