"""`slowft doctor` passes here, and what it is there to find, it finds."""

import contextlib
import functools
import importlib.metadata
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from slowft import doctor, platform
from slowft.cli.main import slowft as command

NAMES = [
    "machine",
    "Python",
    "versions",
    "BLAS",
    "dequantizing",
    "temporary directory",
    "cache directory",
    "device",
    "matrix products",
    "reading",
    "memory ceiling",
]
# what a process of a trial does first: breaks `loss_and_grads` by one value of the smallest difference, and by memory
BREAK = """
import slowft  # before mlx: it loads OpenBLAS
import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten
from slowft.engine.model import StreamedModel
right = StreamedModel.loss_and_grads
def broken(self, *batch):
    result, gradients = right(self, *batch)
    if self.nbytes_on_disk > 100e6:
        bytearray(b'x') * 300_000_000
    (name, first), *others = tree_flatten(gradients)
    at_largest = mx.arange(first.size).reshape(first.shape) == mx.abs(first).argmax()
    return result, tree_unflatten([(name, mx.where(at_largest, first * (1 + 2**-23), first)), *others])
StreamedModel.loss_and_grads = broken
"""


@pytest.fixture
def scratch(tmp_path, monkeypatch) -> Path:
    """The temporary directory, which counts as a disk, of this process and of those that it starts."""
    directory = tmp_path / "scratch"
    directory.mkdir()
    monkeypatch.setenv("TMPDIR", str(directory))
    monkeypatch.setattr(tempfile, "tempdir", str(directory))
    monkeypatch.setattr(platform, "is_memory_filesystem", lambda path: False)
    return directory


@pytest.fixture
def in_trials(tmp_path, monkeypatch):
    """Has every trial's process run this first."""

    def run_first(code: str) -> None:
        (tmp_path / "sitecustomize.py").write_text(code)
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))

    return run_first


def run(monkeypatch, *options, layers: int = 8, models=doctor.MODELS):
    """`slowft doctor` with a smaller model, 200 MB, within the ceiling."""
    monkeypatch.setattr(doctor, "MODELS", models)
    monkeypatch.setattr(doctor, "examine", functools.partial(doctor.examine, layers=layers))
    return CliRunner().invoke(command, ["doctor", *options])


def gradients(*models: str) -> list[str]:
    return [f"gradients, {model}, {setting}" for model in models for setting in doctor.SETTINGS]


def test_all_is_well_here_and_nothing_stays(scratch, monkeypatch):
    done = run(monkeypatch, "--json")
    report = json.loads(done.stdout)
    checks = {check["name"]: check for check in report["checks"]}
    assert list(checks) == NAMES + gradients(*doctor.MODELS)
    assert [check for check in checks.values() if check["verdict"] == "failed"] == []
    assert done.exit_code == 0 and report["ok"] and done.stderr == ""
    assert list(scratch.iterdir()) == []
    assert str(Path.home()) not in done.stdout

    for name in gradients(*doctor.MODELS):
        assert checks[name]["result"] == "identical to mlx-lm in memory"
    for model in doctor.MODELS:  # settings in which steps go differently
        read = [checks[name]["figures"]["read_nbytes"] for name in gradients(model)]
        assert read[0] > 10 * read[2] and read[1] > 10 * read[2]
    ceiling = checks["memory ceiling"]["figures"]
    assert ceiling["before_nbytes"] < ceiling["peak_nbytes"] <= ceiling["memory_nbytes"]
    assert ceiling["memory_nbytes"] - ceiling["before_nbytes"] < 0.85 * ceiling["model_nbytes"]


def test_broken_gradients_and_a_broken_ceiling_fail(scratch, in_trials, monkeypatch):
    in_trials(BREAK)
    done = run(monkeypatch, models=("llama",))
    assert done.exit_code == 1
    lines = done.stdout.splitlines()
    failed = [line for line in lines if line.startswith("failed")]
    assert [line[8:50].strip() for line in failed] == ["memory ceiling", *gradients("llama")]
    assert " MB over: " in failed[0]
    for line in failed[1:]:
        difference = float(line.split("in memory: ")[1].split(",")[0])
        assert 0 < difference < 3e-7
    to_do = [line for line in lines if " failed. To do: " in line]
    assert len(to_do) == 4 and to_do == lines[-4:] and all(doctor.REPORT in line for line in to_do)
    assert list(scratch.iterdir()) == []


def test_a_crash_fails_what_it_prevented_and_nothing_else(in_trials, scratch):
    in_trials("import os, mlx.core as mx\nmx.eval = lambda *arrays: (os.write(2, b'no Metal\\n'), os.abort())")
    with contextlib.closing(doctor.examine()) as checks:
        first, second = itertools.islice(checks, NAMES.index("device"), NAMES.index("reading"))
    assert (first.name, first.verdict) == ("device", "ok")
    assert (second.name, second.verdict) == ("matrix products", "failed")
    assert second.result == "the process ended with SIGABRT: no Metal"


def test_an_exception_fails_its_check_in_one_line_without_the_users_name(monkeypatch):
    def check(name):
        raise ValueError(f"{Path.home()}/model: first line\nsecond line")

    monkeypatch.setenv("HOME", "/home/ada")
    (failed,) = doctor.caught("some check", check)
    assert (failed.name, failed.verdict, failed.result) == ("some check", "failed", "ValueError: ~/model: first line")
    assert "Traceback" in failed.traceback and "ada" not in failed.traceback


def test_interrupting_removes_all_files(scratch):
    process = subprocess.Popen([sys.executable, "-m", "slowft", "doctor"], stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not list(scratch.glob("slowft-doctor-*/large/*")):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) != 0
    finally:
        process.kill()
        process.wait()
    assert list(scratch.iterdir()) == []


def named(name: str) -> doctor.Check:
    """This one; those after it are not made."""
    return next(check for check in doctor.examine() if check.name == name)


def test_slow_blas_fails_and_names_the_package(monkeypatch):
    monkeypatch.setattr(platform, "MACOS", False)
    monkeypatch.setattr(platform, "blas_library", lambda: None)
    check = named("BLAS")
    assert check.verdict == "failed" and "80 times slower" in check.result
    assert check.todo == "sudo apt-get install libopenblas0-pthread"


def test_old_and_missing_packages_fail(monkeypatch):
    versions = {"mlx": "0.20.0", "mlx-lm": None}

    def version(package):
        if (found := versions.get(package, "9999.0")) is None:
            raise importlib.metadata.PackageNotFoundError
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)
    check = named("versions")
    assert check.verdict == "failed"
    assert check.result.startswith("mlx 0.20.0 is too old, mlx-lm is missing (slowft ")
    assert check.todo == 'pip install --upgrade "mlx>=0.32.0" "mlx-lm>=0.32.0"'


def test_rosetta_fails(monkeypatch):
    monkeypatch.setattr(platform, "is_translated", lambda: True)
    check = named("Python")
    assert check.verdict == "failed" and "Rosetta" in check.result and "arm64" in check.todo


def test_no_room_on_a_disk_is_a_note(scratch, monkeypatch):
    monkeypatch.setattr(platform, "is_memory_filesystem", lambda path: True)
    monkeypatch.setattr(doctor, "MODELS", ())
    checks = {check.name: check for check in doctor.examine()}
    for name in ("temporary directory", "cache directory", "reading", "memory ceiling"):
        assert checks[name].verdict == "note" and checks[name].todo
    assert "TMPDIR" in checks["temporary directory"].todo


def test_table_shows_text_as_it_is(capsys, monkeypatch):
    found = doctor.Check("a check", "batch [B, T]", "failed", "do [bold]this[/bold]")
    monkeypatch.setattr(doctor, "examine", lambda told: (check for check in [found]))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    with pytest.raises(SystemExit):
        command.main(["doctor"], standalone_mode=False)
    shown = capsys.readouterr().out
    assert "batch [B, T]" in shown and "do [bold]this[/bold]" in shown
