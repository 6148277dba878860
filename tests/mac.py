"""A double of a Mac: as far as Python can tell, slowft runs on macOS with Metal, while MLX computes on a processor.

What it stands for was read in XNU's headers, in MLX's source and in its macOS wheel; nothing of it ran on a Mac. It
cannot show Metal's own kernels, the order in which they run, or what they take. It does show that slowft

- takes its macOS branches, with the constants and structures of the headers, and calls nothing that only Linux has;
- computes in the model's own dtype with packed weights, as on any GPU;
- exports no graph of what runs on the GPU (the fused primitives there cannot be exported);
- takes a forward pass the way training takes it: attention outside of a gradient trace is another function, and so is
  a compiled function of arrays that are not traced;
- does not rely on MLX's limits to act as the CPU backend's do.
"""

import ctypes
import errno
import fcntl
import os
import struct
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import pytest

from slowft import memory, platform
from slowft.weights import reader

# <sys/fcntl.h> of macOS
F_PREALLOCATE, F_RDADVISE, F_RDAHEAD, F_NOCACHE, F_FULLFSYNC = 42, 44, 45, 48, 51
F_ALLOCATECONTIG, F_ALLOCATEALL, F_PEOFPOSMODE = 2, 4, 3
# <sys/resource.h>: bytes of `struct rusage_info_v4`, and where in it these lie
RUSAGE_INFO_V4, RUSAGE_NBYTES, FOOTPRINT_AT, LIFETIME_MAX_AT, INTERVAL_MAX_AT = 4, 296, 72, 240, 280
# struct proc_bsdinfo of <sys/proc_info.h>: 12 numbers of 32 bits, two names (16 and 32), 6 numbers, then the start
BSDINFO_NBYTES, STARTED_AT = 136, 120

ONLY_LINUX = {
    "os": {"posix_fadvise", "posix_fallocate", "sched_getaffinity", "O_DIRECT", "POSIX_FADV_DONTNEED", "memfd_create"},
    "mmap": {"MADV_HUGEPAGE"},
    "libc": {"malloc_trim", "mallopt", "sync_file_range", "posix_fadvise", "fallocate", "openblas_get_config"},
}
FACTOR = 1 + 2**-8  # of what attention puts out when no gradient is traced, and compiled functions


class Mac:
    """What was asked of the Mac.

    Attributes:
        calls: (name, arguments) of system calls that only macOS has.
        children: processes that stand for programs that only macOS has.
        wired: the limits that were set, in order.
        memory_limit, cache_limit: MLX's, as they are now.
        attention: how often it was computed (inside, outside) of a gradient trace.
    """

    def __init__(self, memory_nbytes: int = 16 << 30):
        self.calls: list[tuple] = []
        self.children: list[int] = []
        self.wired: list[int] = []
        self.memory_nbytes = memory_nbytes
        self.recommended_nbytes = memory_nbytes * 2 // 3
        self.memory_limit = min(3 * self.recommended_nbytes // 2, int(0.95 * memory_nbytes))
        self.cache_limit = self.memory_limit
        self.attention = [0, 0]

    def called(self, name: str) -> list[tuple]:
        """The arguments of each call of that name."""
        return [arguments for n, *arguments in self.calls if n == name]


@pytest.fixture
def mac(monkeypatch, tmp_path):
    """While it is in use, this machine passes for a Mac; gives a `Mac`."""
    double = Mac()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(platform, "MACOS", True)
    monkeypatch.setattr(reader, "MAX_REQUEST_NBYTES", 1 << 30)
    _replace_system(monkeypatch, double)
    real_cache_limit = mx.set_cache_limit(1 << 60)
    mx.set_cache_limit(real_cache_limit)
    set_real_cache_limit = mx.set_cache_limit
    try:
        _replace_devices(monkeypatch, double)
        _replace_limits(monkeypatch, double)
        _replace_functions(monkeypatch, double)
        yield double
        memory.limits().restore()
    finally:
        set_real_cache_limit(real_cache_limit)


# --- The system -------------------------------------------------------------------------------------


class _Hiding:
    """A module without some of its names, and with others."""

    def __init__(self, module, hidden=(), **others):
        self._module, self._hidden = module, hidden
        vars(self).update(others)

    def __getattr__(self, name):
        if name in self._hidden:
            raise AttributeError(f"macOS has no {self._module.__name__}.{name}")
        return getattr(self._module, name)


def _replace_system(monkeypatch, double: Mac) -> None:
    libc = _Libc(double)

    def posix_spawn(path, command, environment, **how):
        """`caffeinate -is -w PID` does nothing but wait for the process; coreutils' tail can do that."""
        double.calls.append(("posix_spawn", path, command))
        assert path == command[0] == "/usr/bin/caffeinate" and command[1:-1] == ["-is", "-w"]
        tail = ["tail", "-s", "0.1", f"--pid={command[-1]}", "-f", os.devnull]
        double.children.append(os.posix_spawnp("tail", tail, environment, **how))
        return double.children[-1]

    monkeypatch.setattr(platform, "os", _Hiding(os, ONLY_LINUX["os"], posix_spawn=posix_spawn))
    monkeypatch.setattr(platform, "ctypes", _Hiding(ctypes, CDLL=lambda *_, **__: libc))
    import mmap

    monkeypatch.setattr(platform, "mmap", _Hiding(mmap, ONLY_LINUX["mmap"]))

    def open_file(path, *args, **kwargs):
        if str(path).startswith(("/proc/", "/sys/")):
            raise FileNotFoundError(errno.ENOENT, "macOS has no such file", str(path))
        return open(path, *args, **kwargs)

    monkeypatch.setattr(platform, "open", open_file, raising=False)
    for name in ("F_PREALLOCATE", "F_RDADVISE", "F_RDAHEAD", "F_NOCACHE", "F_FULLFSYNC"):
        monkeypatch.setattr(fcntl, name, globals()[name], raising=False)
    on_linux = fcntl.fcntl

    def control(fd, command, argument=0):
        if command < F_PREALLOCATE or command > 1000:  # the numbers that Linux has
            return on_linux(fd, command, argument)
        number = fd if isinstance(fd, int) else fd.fileno()
        os.fstat(number)  # OSError for one that is not open
        double.calls.append(("fcntl", command, argument))
        if command == F_FULLFSYNC:
            os.fsync(number)
            return 0
        if command == F_PREALLOCATE:
            flags, mode, offset, length, allocated = struct.unpack("=Iiqqq", argument)  # fstore_t, 32 bytes
            assert flags in (F_ALLOCATEALL, F_ALLOCATEALL | F_ALLOCATECONTIG) and mode == F_PEOFPOSMODE
            assert offset == allocated == 0 and length > 0
            return struct.pack("=Iiqqq", flags, mode, offset, length, length)
        assert command in (F_NOCACHE, F_RDAHEAD, F_RDADVISE), f"fcntl command {command} is not known here"
        return 0

    monkeypatch.setattr(fcntl, "fcntl", control)


class _Libc:
    """The C library: what both systems have, and a few functions of macOS."""

    def __init__(self, double: Mac):
        self._double, self._real = double, ctypes.CDLL(None, use_errno=True)

    def __getattr__(self, name):
        if name in ONLY_LINUX["libc"]:
            raise AttributeError(f"dlsym(RTLD_DEFAULT, {name}): symbol not found")
        return getattr(self._real, name)

    def proc_pid_rusage(self, pid: int, flavour: int, info) -> int:
        self._double.calls.append(("proc_pid_rusage", pid, flavour))
        assert pid == os.getpid() and flavour == RUSAGE_INFO_V4
        target = info._obj
        assert ctypes.sizeof(target) == RUSAGE_NBYTES
        values = (ctypes.c_uint8 * RUSAGE_NBYTES).from_buffer(target)
        for at, field in ((FOOTPRINT_AT, "VmRSS"), (LIFETIME_MAX_AT, "VmHWM"), (INTERVAL_MAX_AT, "VmHWM")):
            struct.pack_into("=Q", values, at, _status(field))
        return 0

    def proc_pidinfo(self, pid: int, flavour: int, argument, info, nbytes: int) -> int:
        self._double.calls.append(("proc_pidinfo", pid, flavour))
        target = info._obj
        assert flavour == 3 and argument.value == 0 and nbytes == ctypes.sizeof(target) == BSDINFO_NBYTES
        try:
            with open(f"/proc/{pid}/stat") as stat:
                began = int(stat.read().rpartition(")")[2].split()[19])
        except OSError:
            return 0
        struct.pack_into("=QQ", (ctypes.c_uint8 * nbytes).from_buffer(target), STARTED_AT, began // 100, began % 100)
        return nbytes

    def proc_reset_footprint_interval(self, pid: int) -> int:
        self._double.calls.append(("proc_reset_footprint_interval", pid))
        with open("/proc/self/clear_refs", "w") as clear:
            clear.write("5")
        return 0

    def sysctlbyname(self, name: bytes, old, length, new, new_length) -> int:
        self._double.calls.append(("sysctlbyname", name))
        assert new is None and new_length == 0
        answers = {
            b"machdep.cpu.brand_string": b"Apple M2\0",
            b"hw.memsize": struct.pack("=Q", self._double.memory_nbytes),
        }
        if name not in answers:
            return -1
        size = length._obj
        assert len(answers[name]) <= size.value
        ctypes.memmove(getattr(old, "_obj", old), answers[name], len(answers[name]))
        size.value = len(answers[name])
        return 0


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


# --- MLX ----------------------------------------------------------------------------------------------


def _is_gpu(device) -> bool:
    return device is not None and not isinstance(device, mx.Stream) and device == mx.Device(mx.gpu)


def _asked_by(package: str) -> bool:
    """Whether the function that called the caller of this is in that package."""
    return sys._getframe(2).f_globals.get("__name__", "").startswith(package)


_local = threading.local()


def _depth(name: str) -> int:
    return getattr(_local, name, 0)


@contextmanager
def _deeper(name: str):
    setattr(_local, name, _depth(name) + 1)
    try:
        yield
    finally:
        setattr(_local, name, _depth(name) - 1)


def _replace_devices(monkeypatch, double: Mac) -> None:
    gpu, stream = mx.Device(mx.gpu), mx.stream

    def default_device():
        # mlx-lm makes streams on it and, for some architectures, Metal kernels
        return mx.Device(mx.cpu) if _depth("on_cpu") or _asked_by("mlx_lm") else gpu

    @contextmanager
    def on_stream(where):
        if _is_gpu(where):
            where = mx.Device(mx.cpu)
        elif not isinstance(where, mx.Stream):
            with _deeper("on_cpu"), stream(where):
                yield
            return
        with stream(where):
            yield

    def of_device(function):
        return lambda device=gpu: function(mx.Device(mx.cpu) if _is_gpu(device) else device)

    monkeypatch.setattr(mx, "default_device", default_device)
    monkeypatch.setattr(mx, "stream", on_stream)
    monkeypatch.setattr(mx, "default_stream", of_device(mx.default_stream))
    monkeypatch.setattr(mx, "new_stream", of_device(mx.new_stream))
    info = {
        "device_name": "Apple M2",
        "architecture": "applegpu_g14g",
        "memory_size": double.memory_nbytes,
        "max_recommended_working_set_size": double.recommended_nbytes,
        "max_buffer_length": double.memory_nbytes // 2,
        "resource_limit": 499000,
    }
    monkeypatch.setattr(mx, "device_info", lambda *_: dict(info))
    monkeypatch.setattr(mx, "metal", SimpleNamespace(is_available=lambda: not _asked_by("mlx_lm.models")))


def _replace_limits(monkeypatch, double: Mac) -> None:
    """As in mlx/backend/metal/allocator.cpp; an allocation is seen when something is evaluated."""
    set_cache_limit, evaluate, evaluate_ahead = mx.set_cache_limit, mx.eval, mx.async_eval

    def let_free() -> None:
        """What is freed is kept below the limit; what is kept already stays."""
        set_cache_limit(max(double.cache_limit, mx.get_cache_memory()))

    def allocate() -> None:
        collect_at = min(double.memory_limit, int(0.95 * double.recommended_nbytes))
        kept = max(0, min(double.cache_limit, collect_at - mx.get_active_memory()))
        if mx.get_cache_memory() > kept:
            set_cache_limit(kept)
        set_cache_limit(double.cache_limit)

    def set_memory(limit: int) -> int:
        double.memory_limit, before = limit, double.memory_limit
        return before

    def set_cache(limit: int) -> int:
        double.cache_limit, before = limit, double.cache_limit
        let_free()
        return before

    def set_wired(limit: int) -> int:
        if limit > double.recommended_nbytes:
            raise ValueError("[metal::set_wired_limit] Setting a wired limit larger than the maximum working set size")
        double.wired.append(limit)
        return ([0] + double.wired)[-2]

    def allocating(function):
        def call(*args):
            allocate()
            return function(*args)

        return call

    monkeypatch.setattr(mx, "set_memory_limit", set_memory)
    monkeypatch.setattr(mx, "set_cache_limit", set_cache)
    monkeypatch.setattr(mx, "set_wired_limit", set_wired)
    monkeypatch.setattr(mx, "eval", allocating(evaluate))
    monkeypatch.setattr(mx, "async_eval", allocating(evaluate_ahead))


def _slightly_other(array: mx.array) -> mx.array:
    return (array.astype(mx.float32) * FACTOR).astype(array.dtype)


def _replace_compiled(monkeypatch) -> None:
    """MLX fuses what is compiled, unless it is called with traced arrays (mlx/compile.cpp); bits may differ."""
    calls = []

    @mx.compile
    def probe(*arrays):
        calls.append(arrays)
        return arrays[0] + 1

    def runs_compiled(arrays) -> bool:
        probe(*[mx.zeros(a.shape, a.dtype) for a in arrays])  # now it is compiled for such arrays, if anything is
        before = len(calls)
        probe(*arrays)
        return len(calls) == before

    def fused(function):
        def call(*args):
            output = function(*args)
            return _slightly_other(output) if runs_compiled(args) and not _depth("on_cpu") else output

        return call

    compiled, places = type(nn.silu), {}
    for module in [m for name, m in list(sys.modules.items()) if name.startswith(("mlx_lm.models.", "mlx.nn"))]:
        for name, value in list(vars(module).items()):
            if type(value) is compiled and name in ("swiglu", "silu"):
                monkeypatch.setattr(module, name, places.setdefault(id(value), fused(value)))


def _replace_functions(monkeypatch, double: Mac) -> None:
    def traced(function):
        def call(*args, **kwargs):
            with _deeper("gradients"):  # mlx/transforms.cpp: all of vjp, what the chain rule calls included
                return function(*args, **kwargs)

        return call

    for name in ("grad", "value_and_grad"):
        transform = getattr(mx, name)
        monkeypatch.setattr(mx, name, lambda *args, t=transform, **kwargs: traced(t(*args, **kwargs)))
    for name in ("vjp", "jvp"):
        monkeypatch.setattr(mx, name, traced(getattr(mx, name)))

    attention = mx.fast.scaled_dot_product_attention

    def attend(*args, **kwargs):
        output, is_traced = attention(*args, **kwargs), bool(_depth("gradients"))
        double.attention[not is_traced] += 1
        if is_traced or _depth("on_cpu"):
            return output
        return _slightly_other(output)

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", attend)
    _replace_compiled(monkeypatch)

    export = mx.export_function

    def export_function(*args, **kwargs):
        if not _depth("on_cpu"):
            raise ValueError("[export_function] Unable to serialize primitive CrossEntropy")
        return export(*args, **kwargs)

    monkeypatch.setattr(mx, "export_function", export_function)
