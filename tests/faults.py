"""A process in which `slowft` commands run one after the other, on a disk that fails as it is told to.

`faults.c`, loaded before everything else, stands between that process and the files below one directory. Starting
Python and importing MLX once for hundreds of runs makes a run a fraction of a second.

    with Faulty(tmp_path, build(tmp_path)) as faulty:
        outcome = faulty(["finetune", ...], Rule("write", "adapters/*", error=errno.ENOSPC))
"""

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

SOURCE = Path(__file__).with_name("faults.c")
ALWAYS = 1 << 40  # calls: to the end


@dataclass(frozen=True)
class Rule:
    """Of the calls of one kind on paths of a pattern (both as of fnmatch), those from `first` to `last` are meant."""

    call: str = ""
    pattern: str = "*"
    first: int = 1
    last: int = ALWAYS
    error: int = 0
    at_most: int = 0
    ns_per_byte: float = 0.0

    def __str__(self) -> str:
        what = os.strerror(self.error) if self.error else f"{self.at_most or 'all'} bytes, {self.ns_per_byte} ns each"
        return f"{self.call} {self.first} to {self.last} of {self.pattern}: {what}"


@dataclass(frozen=True)
class Outcome:
    """`hits`: calls that the rule was for; `calls`: all of them, "call path"; `handles`: left open by the command."""

    status: int
    out: str
    err: str
    hits: int
    calls: list[str]
    handles: list[str]


def build(directory: Path) -> Path:
    """The library, compiled.

    Raises:
        OSError, subprocess.CalledProcessError: there is no C compiler, or not for Linux.
    """
    library = directory / "faults.so"
    flags = ["-shared", "-fPIC", "-O1", "-Wall", "-Werror"]
    subprocess.run(
        ["cc", *flags, "-o", str(library), str(SOURCE), "-ldl", "-lpthread"], check=True, capture_output=True
    )
    return library


def environment(library: Path, directory: Path | None = None, rule: Rule | None = None) -> dict[str, str]:
    """Variables of a process that begins with this rule."""
    found = os.environ | {"LD_PRELOAD": str(library)}
    if directory is not None:
        found["FAULTS_DIRECTORY"] = str(directory)
    if rule is not None:
        found["FAULTS_RULE"] = " ".join(map(str, asdict(rule).values()))
    return found


def pattern_of(path: str) -> str:
    """A path with what differs from run to run (process ids, random names, unnamed files) replaced by `*`."""
    path = re.sub(r"#\d+ \(deleted\)", "#* (deleted)", path)
    path = re.sub(r"(?<=\.)\d+(?=\.(tmp|index))", "*", path)
    path = re.sub(r"(tmp|slowft-spill-|\.tokens-)[a-z0-9_]{8}", r"\1*", path)
    return re.sub(r"[0-9a-f]{16}[a-z0-9_]{8}\.activation\.tmp", "*.activation.tmp", path).replace("[", "?")


class Faulty:
    """The process. `directory`: below which calls are watched; `before`: code that it runs first."""

    def __init__(self, directory: Path, library: Path, before: str = ""):
        script = [sys.executable, "-c", WORKER, str(library), str(directory), before]
        self._process = subprocess.Popen(
            script, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(library)
        )

    def __call__(self, argv: list, rule: Rule | None = None, handles: int | None = None) -> Outcome:
        """Run a command. `handles`: so many more files than are open may be."""
        request = {"argv": [str(word) for word in argv], "rule": asdict(rule or Rule()), "handles": handles}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, f"{rule}: the process ended with status {self._process.wait()}"
        return Outcome(**json.loads(answer))

    def __enter__(self) -> "Faulty":
        return self

    def __exit__(self, *exception) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


WORKER = """
import sys

library, directory, before = sys.argv[1:]
answers, sys.stdout = sys.stdout, sys.stderr
import slowft  # before mlx: it loads OpenBLAS
import contextlib, ctypes, gc, io, json, os, resource, traceback
from slowft.cli.main import main
from slowft import platform
from slowft.weights import transfers

transfers.RETRY_AFTER_S = (0, 0, 0)
platform.MOST_FILES = 0  # the limit of open files stays as a test sets it
exec(before)
faults = ctypes.CDLL(library)
faults.faults_calls.restype = ctypes.c_char_p
numbers = [ctypes.c_long] * 2 + [ctypes.c_int, ctypes.c_long, ctypes.c_double]
faults.faults_rule.argtypes = [ctypes.c_char_p] * 2 + numbers


def handles():
    found = {}
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found[fd] = os.readlink(f"/proc/self/fd/{fd}")
    return found


for line in sys.stdin:
    request = json.loads(line)
    rule = [v.encode() if isinstance(v, str) else v for v in request["rule"].values()]
    out, err, status = io.StringIO(), io.StringIO(), 0
    open_before, limits = handles(), resource.getrlimit(resource.RLIMIT_NOFILE)
    sys.argv = ["slowft", *request["argv"]]
    faults.faults_rule(*rule)
    faults.faults_watch(directory.encode())
    if request["handles"] is not None:
        most = max(map(int, open_before)) + 1 + request["handles"]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, limits[1]))
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as e:
        status = e.code if isinstance(e.code, int) else 1
    except BaseException:
        status = 1
        err.write(traceback.format_exc())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    hits, calls = faults.faults_hits(), faults.faults_calls().decode().splitlines()
    faults.faults_watch(None)
    gc.collect()
    left = sorted(set(handles().items()) - set(open_before.items()))
    answer = {"status": status, "out": out.getvalue(), "err": err.getvalue(), "hits": hits, "calls": calls}
    answer["handles"] = [file for _, file in left if file.startswith(directory)]
    print(json.dumps(answer), file=answers, flush=True)
"""
