"""Checks whether slowft works on this machine: what the machine is, then small trials whose results are known.

Comes in: nothing but the machine. Goes out: one `Check` after the other, plain data. MLX never runs in this process.
`trials.py` has the trials, and each runs in a process of its own, so that a crash in MLX is just another result.
Nothing stays on the disk, and no result holds the user's name or a path of the home directory.
"""

import importlib.metadata
import importlib.util
import json
import os
import platform as python_platform
import re
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import __version__, platform
from .errors import SlowftError
from .weights.transfers import free_nbytes, nearest_existing

REPORT = "please report it, with the output of slowft doctor --json"
PACKAGES = ("mlx", "mlx-metal", "mlx-lm", "numpy", "safetensors", "transformers")
TRIAL_LIMIT_S = 240  # a trial takes 2 to 10 s, so one that takes this long hangs
LITTLE_DISK_NBYTES = 5_000_000_000

MODELS = ("llama", "qwen3_moe", "gemma3 4-bit")
SETTINGS = ("no ceiling", "small ceiling", "everything fits")
LAYERS = 16  # number of blocks of the model that is read, and trained within a ceiling
LAYER_NBYTES = 26_000_000


@dataclass(frozen=True)
class Check:
    """One row of the report.

    Attributes:
        result: what was found, in a few words.
        verdict: "ok", "note" (it works, but not as well as it could, or was not checked) or "failed".
        todo: what to do about it; empty if there is nothing to do.
        figures: the result for programs, with sizes in bytes and rates per second.
        traceback: the traceback of the exception that ended the check, if one did.
    """

    name: str
    result: str
    verdict: str = "ok"
    todo: str = ""
    figures: dict[str, Any] = field(default_factory=dict)
    traceback: str | None = None


def examine(progress: Callable[[str], None] = lambda doing: None, layers: int = LAYERS) -> Iterator[Check]:
    """Check everything, and yield each result when it is there. Closing the generator ends it and removes all files.

    Args:
        progress: is called with words for what is about to be checked.
        layers: number of blocks of the model that is trained within a ceiling; with 16 it has 400 MB.
    """
    progress("the machine")
    yield from caught("machine", _machine)
    yield from caught("Python", _python)
    yield from caught("versions", _versions)
    yield from caught("BLAS", _blas)
    yield from caught("dequantizing", _dequantizing)
    yield from caught("temporary directory", lambda name: _directory(name, Path(tempfile.gettempdir()), "TMPDIR"))
    yield from caught("cache directory", lambda name: _directory(name, platform.cache_directory(), "XDG_CACHE_HOME"))
    with _scratch(2 * layers * LAYER_NBYTES) as (scratch, has_room):
        progress("how fast MLX computes")
        yield from _trial("compute", ["device", "matrix products"], scratch)
        if has_room:
            progress("how fast the drive is read")
            yield from _trial("read", ["reading"], scratch, layers=layers)
            progress("that memory stays below a ceiling")
            yield from _trial("train_within_ceiling", ["memory ceiling"], scratch)
        else:
            todo = f"free {2 * layers * LAYER_NBYTES / 1e9:.1f} GB in the temporary or the cache directory"
            for name in ("reading", "memory ceiling"):
                yield Check(name, "not checked: no room on a disk for a model", "note", todo)
        for model in MODELS:
            progress(f"that gradients of {model} are mlx-lm's own")
            names = [f"gradients, {model}, {setting}" for setting in SETTINGS]
            yield from _trial("compare_gradients", names, scratch, model=model)


def caught(name: str, check: Callable[[str], Check]) -> Iterator[Check]:
    """The check's result, or a failed `Check` if it raised an exception."""
    try:
        yield check(name)
    except Exception as e:
        message = (str(e).strip().splitlines() or ["no message"])[0]
        message = message if isinstance(e, SlowftError) else f"{type(e).__name__}: {message}"
        yield Check(name, _scrubbed(message), "failed", REPORT, traceback=_scrubbed(traceback.format_exc()))


def _scrubbed(text: str) -> str:
    """The text without paths of home directories, which contain users' names."""
    home = str(Path.home())
    if len(home) > 1:
        text = text.replace(home, "~")
    return re.sub(r"/(Users|home)/[^/\s\"']+", "~", text)


# --- The machine -----------------------------------------------------------------------------------


def _machine(name: str) -> Check:
    mac = python_platform.mac_ver()[0]
    system = f"macOS {mac}" if mac else f"{python_platform.system()} {python_platform.release()}"
    memory, limit = platform.physical_memory(), platform.memory_limit()
    allowed = f" ({limit / 1e9:.0f} GB allowed)" if limit < memory else ""
    words = (
        f"{platform.cpu_name()}, {platform.cores()} cores, {memory / 1e9:.0f} GB of memory{allowed}, "
        f"{system} {python_platform.machine()}"
    )
    figures = {"cpu": platform.cpu_name(), "cores": platform.cores(), "memory_nbytes": memory}
    figures |= {"memory_limit_nbytes": limit, "system": system, "architecture": python_platform.machine()}
    return Check(name, words, figures=figures)


def _python(name: str) -> Check:
    is_translated = platform.is_translated()
    words = f"{python_platform.python_version()} {python_platform.machine()}"
    figures = {"version": python_platform.python_version(), "is_translated": is_translated}
    if is_translated:
        todo = "install a Python for arm64 (python.org, or Homebrew in /opt/homebrew) and make the environment with it"
        return Check(name, f"{words}, run by Rosetta: MLX needs a Python for arm64", "failed", todo, figures)
    return Check(name, words, figures=figures)


def _versions(name: str) -> Check:
    """The versions of slowft and of the packages that it requires."""
    from packaging.requirements import Requirement

    versions = {"slowft": __version__} | {package: _version(package) for package in PACKAGES}
    shown = ", ".join(f"{package} {version}" for package, version in versions.items() if version is not None)
    try:
        requirements = [Requirement(line) for line in importlib.metadata.requires("slowft") or []]
    except importlib.metadata.PackageNotFoundError:
        return Check(name, shown, "note", "install slowft with pip: what it needs can then be checked", versions)
    problems, fixes = [], []
    for required in requirements:
        if required.marker is not None and not required.marker.evaluate({"extra": ""}):
            continue
        version = _version(required.name)
        if version is None or not required.specifier.contains(version, prereleases=True):
            problems.append(f"{required.name} {'is missing' if version is None else f'{version} is too old'}")
            fixes.append(f'"{required.name}{required.specifier}"')
    if problems:
        todo = f"pip install --upgrade {' '.join(fixes)}"
        return Check(name, f"{', '.join(problems)} ({shown})", "failed", todo, versions)
    return Check(name, shown, figures=versions)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _blas(name: str) -> Check:
    if platform.MACOS:
        return Check(name, "Accelerate")
    library = os.path.basename(platform.blas_library() or "")
    if platform.slow_blas_warning(mlx_was_imported_first=False) is not None:
        words = "none found: MLX uses its reference BLAS, about 80 times slower than OpenBLAS"
        return Check(name, words, "failed", platform.BLAS_FIX, {"library": None})
    return Check(name, library, figures={"library": library})


def _dequantizing(name: str) -> Check:
    if platform.MACOS:
        return Check(name, "by MLX, on the GPU")
    if importlib.util.find_spec("slowft.weights._quantized") is None:
        words = "by MLX, 5 to 30 times slower than slowft's C code, which was not compiled"
        todo = "install a C compiler (sudo apt-get install gcc libc6-dev), then slowft once more"
        return Check(name, words, "note", todo, {"is_compiled": False})
    return Check(name, "by slowft's C code", figures={"is_compiled": True})


def _directory(name: str, directory: Path, variable: str) -> Check:
    directory = nearest_existing(directory)
    free, in_memory = free_nbytes(directory), platform.is_memory_filesystem(directory)
    words, figures = f"{free / 1e9:.0f} GB free", {"free_nbytes": free, "in_memory": in_memory}
    if in_memory:
        todo = f"set {variable} to a directory on a disk: files take up memory where it is now"
        return Check(name, f"in memory, {words}", "note", todo, figures)
    if free < LITTLE_DISK_NBYTES:
        return Check(name, words, "note", f"make room there, or set {variable} to another disk", figures)
    return Check(name, words, figures=figures)


@contextmanager
def _scratch(nbytes: int) -> Iterator[tuple[str, bool]]:
    """A temporary directory. Yields (its path, whether it is on a disk with `nbytes` free)."""
    temporary, cache = Path(tempfile.gettempdir()), platform.cache_directory()
    disks = [
        directory
        for directory in (temporary, cache)
        if not platform.is_memory_filesystem(nearest_existing(directory)) and free_nbytes(directory) >= nbytes
    ]
    parent = disks[0] if disks else temporary
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="slowft-doctor-", dir=parent, ignore_cleanup_errors=True) as scratch:
        yield scratch, bool(disks)


# --- Trials ----------------------------------------------------------------------------------------


def _trial(trial: str, names: list[str], scratch: str, **options: Any) -> Iterator[Check]:
    """The checks `names`, made by a function of `trials.py` in its own process. If that ends early, the rest failed."""
    missing, is_late = names.copy(), threading.Event()
    command = [sys.executable, "-m", "slowft.trials", trial, json.dumps({"names": names, "scratch": scratch} | options)]
    environment = os.environ | {"TMPDIR": scratch}  # MLX leaves files in the temporary directory too
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)

        def stop() -> None:
            is_late.set()
            process.kill()

        timer = threading.Timer(TRIAL_LIMIT_S, stop)
        timer.start()
        try:
            for line in process.stdout:
                check = Check(**json.loads(line))
                missing.remove(check.name)
                yield check
            status = process.wait()
        finally:
            timer.cancel()
            process.kill()
            process.wait()
            process.stdout.close()
        errors.seek(0)
        printed = _scrubbed(errors.read().strip())
    reason = f"took more than {TRIAL_LIMIT_S} s" if is_late.is_set() else _ending(status, printed)
    if status and not missing:
        missing.append(f"end of {trial}")
    for name in missing:
        yield Check(name, reason, "failed", REPORT, traceback=printed[-8000:])


def _ending(status: int, printed: str) -> str:
    how = f"exit status {status}" if status >= 0 else signal.Signals(-status).name
    return f"the process ended with {how}: {(printed.splitlines() or ['it said nothing'])[-1]}"
