"""`memory=X` is a promise: the kernel's own count of a process never passes X, whatever X buys, and gradients are
the same for every X.

Jobs run in processes of their own, in cgroups that count the file cache and swap too. The least budget is
the one that a refusal names.
"""

import slowft  # noqa: F401, I001  (before mlx: it loads OpenBLAS)

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

import cgroup
from conftest import LLAMA, must_run, random_batch, save_random
from slowft import platform
from slowft.storage import spill

BILLION = LLAMA | {  # 1.1 billion parameters, 2.2 GB in bfloat16
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
}
HALF = BILLION | {"num_hidden_layers": 11}  # 1.2 GB
SMALL = LLAMA | {"hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 8, "num_key_value_heads": 8}

JOB = """
import hashlib, json, sys
import slowft
import mlx.core as mx
import mlx.optimizers
import numpy as np
from mlx.utils import tree_flatten
from slowft import platform

job = json.loads(sys.argv[1])
model = slowft.open_model(job["model"], memory=job["memory"], spill_dir=job["spill_dir"])
mx.random.seed(0)
model.add_lora(num_layers=-1, rank=8, keys=job["keys"])
values = {n: mx.random.normal(a.shape) * 0.01 for n, a in tree_flatten(model.trainable_parameters())}
model.load_weights(list(values.items()), strict=False)  # fresh LoRA has zeros, hence zero gradients
mx.eval(model.trainable_parameters())
model.train()
optimizer = mlx.optimizers.Adam(1e-3)
numbers = np.random.default_rng(0)
said = {"losses": [], "digests": [], "norms": [], "in_use": [], "peaks": []}
job["follow"] and model._engine.follow(__import__("slowft.planning.schedule").planning.schedule.Schedule(**job["follow"]))
for _ in range(job["steps"]):
    rows, tokens, n = job["shape"]
    batches = [
        (mx.array(numbers.integers(0, model.embedding_rows, (rows, tokens + 1))), mx.array([[1, tokens]] * rows))
        for _ in range(n)
    ]
    (loss, _), gradients = model.loss_and_grads(batches)
    digest, norms = hashlib.sha256(), {}
    for name, gradient in sorted(tree_flatten(gradients)):
        array = np.array(gradient)
        digest.update(name.encode() + array.tobytes())
        norms[name] = float(np.linalg.norm(array.astype(np.float64))), float(array.astype(np.float64).sum())
    optimizer.update(model, gradients)
    mx.eval(model.trainable_parameters(), optimizer.state)
    del gradients, gradient, array, batches
    said["losses"].append(loss.item())
    said["digests"].append(digest.hexdigest())
    said["norms"].append(norms)
    said["in_use"].append(platform.memory_in_use())
    said["peaks"].append(model.stats.last.peak_memory)
plan = model._budget.plan
if plan is not None:
    said |= {"predicted": plan.peak_nbytes, "least": plan.least_nbytes, "parts": plan.parts}
    said["schedule"] = dict(vars(plan.schedule))
    said |= {"read": model.stats.last.bytes_read, "written": model.stats.last.bytes_written}
print(json.dumps(said))
"""


def command(directory: Path, memory: int | None, shape: tuple[int, int, int], steps=1, keys=None, **more) -> list[str]:
    """A process that takes optimizer steps of (rows, tokens, micro-batches) and tells of them in JSON."""
    job = {"model": str(directory), "memory": memory, "shape": shape, "steps": steps, "keys": keys, "follow": None}
    return [sys.executable, "-c", JOB, json.dumps(job | {"spill_dir": str(directory.parent / "spill")} | more)]


def run(*args, **more) -> dict:
    done = subprocess.run(command(*args, **more), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def run_within(memory: int, directory: Path, *args, **more) -> dict:
    """The job planned for `memory`, in a cgroup of just that."""
    for file in directory.glob("*.safetensors"):  # what is in the file cache already is charged to whoever put it there
        forget(file)
    done, peak = cgroup.run(command(directory, memory, *args, **more), memory)
    assert done.returncode == 0, f"{done.returncode} under {memory} bytes (peak {peak}): {done.stderr[-2000:]}"
    assert 0 < peak <= memory
    return json.loads(done.stdout) | {"kernel_peak": peak}


def forget(file: Path) -> None:
    """Empty the file cache of a file."""
    with open(file, "rb") as handle:
        os.fdatasync(handle.fileno())
        os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def least(directory: Path, *args, **more) -> int:
    """Bytes that the refusal of such a job names as enough."""
    done = subprocess.run(command(directory, 20_000_000, *args, **more), capture_output=True, text=True)
    assert done.returncode != 0
    # opening refuses what is too little for anything; then the job says what it needs
    memory = named(done.stderr)
    done = subprocess.run(command(directory, memory, *args, **more), capture_output=True, text=True)
    return named(done.stderr) if done.returncode else memory


def named(refusal: str) -> int:
    found = re.search(r"at least ([0-9.]+)GB", refusal)
    assert found, refusal[-2000:]
    return round(float(found[1]) * 1e9)


def write_random(directory: Path, config: dict) -> Path:
    """A bfloat16 Llama of random weights, one shard a block. Each array is a stretch of the same random numbers."""
    from mlx_lm.models import llama

    directory.mkdir(parents=True)
    shards: dict[str, dict] = {}
    for name, array in tree_flatten(llama.Model(llama.ModelArgs.from_dict(config)).parameters()):  # lazy: shapes only
        shards.setdefault(name.split(".")[2] if ".layers." in name else "rest", {})[name] = array.shape
    mx.random.seed(0)
    largest = max(int(np.prod(shape)) for shapes in shards.values() for shape in shapes.values())
    numbers = mx.random.uniform(-0.03, 0.03, (largest + 100_003,), mx.bfloat16)
    starts = np.random.default_rng(0)
    for block, shapes in shards.items():
        arrays = {}
        for name, shape in shapes.items():
            at, size = int(starts.integers(0, 100_003)), int(np.prod(shape))
            arrays[name] = mx.ones(shape, mx.bfloat16) if len(shape) == 1 else numbers[at : at + size].reshape(shape)
        mx.save_safetensors(str(directory / f"model-{block}.safetensors"), arrays, {"format": "mlx"})
        del arrays
    del numbers
    mx.clear_cache()
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    directory = tmp_path_factory.mktemp("budget")
    if platform.is_memory_filesystem(directory):
        must_run(f"{directory} is in memory, where spilling saves none. Use pytest --basetemp")
    yield directory
    shutil.rmtree(directory)


@pytest.fixture(scope="module")
def billion(disk) -> Path:
    if reason := cgroup.why_unavailable():
        must_run(reason)
    return write_random(disk / "billion", BILLION)


@pytest.fixture(scope="module")
def half(disk, billion) -> Path:
    """The same model's first blocks: the same files, not copied."""
    directory = disk / "half"
    directory.mkdir()
    for block in ("rest", *range(HALF["num_hidden_layers"])):
        os.link(billion / f"model-{block}.safetensors", directory / f"model-{block}.safetensors")
    (directory / "config.json").write_text(json.dumps(HALF))
    return directory
