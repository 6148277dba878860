"""A disk that is full, fails or gives too little, at every call: one line that says what, and nothing is lost.

`SLOWFT_FAULTS=1` takes every kind of call on every file, first, last and between (some hundred, minutes); without it a
part of them, drawn from a seed.
"""

import slowft  # noqa: F401, I001  (before mlx: it loads OpenBLAS)

import errno
import json
import os
import random
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest

import faults
import test_gguf
from conftest import must_run
from faults import Faulty, Rule, pattern_of
from slowft import platform
from slowft.training import checkpoint

EVERYTHING = os.environ.get("SLOWFT_FAULTS") == "1"
pytestmark = [pytest.mark.timeout(3600)] * EVERYTHING
OF_READING = {"open": [errno.EIO, errno.EMFILE], "read": [errno.EIO], "map": [errno.EIO]}
OF_WRITING = {"create": [errno.ENOSPC, errno.EMFILE], "write": [errno.ENOSPC, errno.EIO], "sync": [errno.EIO]} | {
    call: [errno.ENOSPC] for call in ("allocate", "rename", "mkdir")
}
# What a run does without, as "call path": what only saves time, its own account of itself, a file that few models have,
# directories that are there already, and unnamed files where the file system has none.
DISPENSABLE = "|".join(
    [
        r"\w+ run/cache/.*|\w+ run/adapters/\.?status\.json.*|\w+ xdg/slowft/rates\.json.*",
        r"open model/adapter_config\.json|(open|read) xdg/slowft/tokens/.*",
        r"mkdir .*|create (run/adapters|run/spill|run/cache)",
    ]
)
UNDER_WAY = (".out.partial", "out")  # where a GGUF file is converted to until all of it is there: either may be named
# With block inputs spilled and samples stored, as if there were little memory and much data.
SMALL = """
from dataclasses import replace
from slowft.data import datasets, store
from slowft.engine.engine import Engine

datasets.STORED_NBYTES = store.IN_MEMORY_NBYTES = 0
follow = Engine.follow
spilling = {"spilled": 5, "in_memory": False, "keep_head": False}
Engine.follow = lambda self, schedule, *more: follow(self, replace(schedule, **spilling), *more)
"""


@pytest.fixture(scope="module")
def disk(tmp_path_factory, llama_with_tokenizer) -> Path:
    """A directory with a model and data, in which everything is read and written."""
    directory = tmp_path_factory.mktemp("disk")
    if platform.MACOS or shutil.which("cc") is None:
        must_run("a library that stands before the system's calls takes Linux and a C compiler")
    if platform.is_memory_filesystem(directory):
        must_run(f"{directory} is in memory, where spilling saves none. Use pytest --basetemp")
    shutil.copytree(llama_with_tokenizer, directory / "model")
    (directory / "data").mkdir()
    for split in ("train", "valid"):
        lines = [json.dumps({"text": f"Sample {i} of plain text, long enough."}) for i in range(2)]
        (directory / "data" / f"{split}.jsonl").write_text("\n".join(lines))
    return directory


@pytest.fixture(scope="module")
def library(disk) -> Path:
    return faults.build(disk)


@pytest.fixture(scope="module")
def faulty(disk, library):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(disk / "xdg"))
        with Faulty(disk, library, SMALL) as process:
            yield process


def begin(disk: Path) -> None:
    """Nothing is left of earlier runs."""
    for name in ("run", "out", "xdg"):
        shutil.rmtree(disk / name, ignore_errors=True)


def finetune(disk: Path, *more) -> list:
    run = disk / "run"
    files = ["--adapter-path", run / "adapters", "--activation-cache", run / "cache", "--spill-dir", run / "spill"]
    job = ["--iters", 4, "--batch-size", 1, "--num-layers", 3, "--learning-rate", 1e-3, "--memory", "3GB"]
    every = ["--steps-per-eval", 4, "--save-every", 2, "--steps-per-report", 2, "--val-batches", 1]
    return ["finetune", "--model", disk / "model", "--data", disk / "data", *files, *job, *every, *more]


def adapter_of(disk: Path) -> bytes:
    return (disk / "run" / "adapters" / "adapters.safetensors").read_bytes()


def points(calls: list[str], n: int, seed: int = 0) -> list[Rule]:
    """Where faults go: `n` of all, of each call on each file the first, the last and one between; all, if asked for."""
    counts = Counter((call.split(" ", 1)[0], pattern_of(call.split(" ", 1)[1])) for call in calls)
    rng, found = random.Random(seed), []
    for (call, pattern), times in counts.items():
        for first in sorted({1, rng.randint(1, times), times}):
            found += [Rule(call, pattern, first, error=e) for e in (OF_READING | OF_WRITING).get(call, [])]
    return found if EVERYTHING else rng.sample(found, n)


def check(outcome, rule: Rule, disk: Path) -> bool:
    """Whether the command ended by the fault, in one line with path and reason; nothing is left half-done."""
    assert outcome.handles == [], (rule, outcome)
    unfinished = [f for f in disk.rglob("*") if re.search(r"\.tmp|\.partial", f.name)]
    # a directory that cannot be opened cannot be removed; the next run does
    assert unfinished == [] or (rule.call, rule.pattern) == ("open", UNDER_WAY[0]), (rule, outcome.err)
    if outcome.status == 0:
        assert outcome.err == "" and re.fullmatch(DISPENSABLE, f"{rule.call} {rule.pattern}"), (rule, outcome)
        return False
    assert outcome.hits > 0, (rule, outcome)
    assert outcome.status == 1, (rule, outcome)
    assert outcome.err.startswith("Error: ") and outcome.err.count("\n") == 1, (rule, outcome.err)
    path = disk / re.sub(r"/[^/]*\*.*", "", rule.pattern).replace(*UNDER_WAY)
    said = outcome.err.replace(*UNDER_WAY)
    assert str(path) in said or str(path.parent) in said, (rule, outcome.err)
    if rule.error == errno.ENOSPC:
        assert re.search(r"No space left|free", outcome.err), (rule, outcome.err)
        assert rule.call == "mkdir" or re.search(r"\d+ bytes|\d [MG]B|byte \d+ of \d+", outcome.err), (
            rule,
            outcome.err,
        )
    else:
        assert os.strerror(rule.error) in outcome.err or "Unable to read" in outcome.err, (rule, outcome.err)
    return True


@pytest.fixture(scope="module")
def undisturbed(disk, faulty) -> tuple[list[str], dict[str, bytes]]:
    """(the calls of a run, the adapters that it wrote)"""
    faulty(finetune(disk))  # what Python reads once in a process
    begin(disk)
    outcome = faulty(finetune(disk))
    assert outcome.status == 0 and not outcome.err, outcome
    kinds = {pattern_of(call) for call in outcome.calls}
    for call in (
        "write run/spill/#",
        "read run/spill/#",
        "read run/cache/",
        "write run/cache/",
        "write xdg/slowft/tokens",
    ):
        assert any(kind.startswith(call) for kind in kinds), (call, kinds)
    return outcome.calls, {file.name: file.read_bytes() for file in (disk / "run/adapters").glob("*.safetensors")}


def test_training_loses_nothing_whatever_call_fails(disk, faulty, undisturbed):
    calls, adapters = undisturbed
    rules = points(calls, 8)
    rules += [Rule("write", "*", n, error=errno.ENOSPC) for n in (3, 40)]  # from there on, of every file
    n_failed = 0
    for rule in rules:
        begin(disk)
        n_failed += check(faulty(finetune(disk), rule), rule, disk)
        for file in (disk / "run/adapters").glob("*.safetensors"):
            assert file.name == "adapters.safetensors" or file.read_bytes() == adapters[file.name], rule
        checkpoints = list((disk / "run/adapters/checkpoints").glob("*.safetensors"))
        for file in checkpoints:
            checkpoint.read(file)
        again = faulty(finetune(disk, *["--resume"] * bool(checkpoints)))
        assert again.status == 0, (rule, again.err)
        assert adapter_of(disk) == adapters["adapters.safetensors"], rule
    assert n_failed > len(rules) / 3


@pytest.mark.parametrize("call", ["read", "write"])
def test_short_reads_and_writes_are_continued(call, disk, faulty, undisturbed):
    begin(disk)
    outcome = faulty(finetune(disk), Rule(call, at_most=4096 + 100))  # a direct read stops on a block of the drive
    assert outcome.status == 0 and not outcome.err and outcome.hits > 20
    assert adapter_of(disk) == undisturbed[1]["adapters.safetensors"]


def test_out_of_file_handles_is_one_line(disk, faulty, undisturbed):
    """The process's own limit, which counts every file: so many more than it has may be open."""
    for handles in range(20) if EVERYTHING else (0, 3, 7, 9):
        begin(disk)
        outcome = faulty(finetune(disk), handles=handles)
        if outcome.status == 0:
            assert handles > 3 and adapter_of(disk) == undisturbed[1]["adapters.safetensors"]
            continue
        assert outcome.err.startswith("Error: ") and outcome.err.count("\n") == 1, (handles, outcome.err)
        assert "Too many open files" in outcome.err, (handles, outcome.err)
        assert outcome.handles == [], (handles, outcome)


def prepare(disk: Path, kind: str) -> list:
    if kind == "directory":
        return ["prepare", disk / "model", "--output", disk / "out", "--quantize", "--group-size", 32]
    if test_gguf.gguf is None:
        must_run("pip install gguf")
    if not (file := disk / "small.gguf").exists():
        config = test_gguf.BASE | {"model_type": "llama"}
        test_gguf.write(file, "llama", config, test_gguf.random_model(config)[1])
    return ["prepare", file, "--output", disk / "out"]


def files_of(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


@pytest.mark.parametrize("kind, n", [("directory", 4), ("gguf", 3)])
def test_prepare_loses_nothing_whatever_call_fails(kind, n, disk, faulty):
    command = prepare(disk, kind)
    begin(disk)
    outcome = faulty(command)
    assert outcome.status == 0, outcome.err
    expected, n_failed = files_of(disk / "out"), 0
    for rule in points(outcome.calls, n):
        begin(disk)
        n_failed += check(faulty(command, rule), rule, disk)
        again = faulty(command)
        assert again.status == 0 or "holds a finished model already" in again.err, (rule, again.err)
        assert files_of(disk / "out") == expected, rule
    assert n_failed > 1


def test_a_token_store_on_a_full_disk_is_one_line(disk, faulty):
    """`slowft data` says all that it found, and stores nothing that is not whole."""
    command = ["data", disk / "data", "--model", disk / "model"]
    begin(disk)
    whole = faulty(command)
    assert whole.status == 0, whole.err
    for rule in points([call for call in whole.calls if "xdg/slowft/tokens" in call], 4):
        begin(disk)
        check(faulty(command, rule), rule, disk)
        assert faulty(command).out == whole.out
