"""Everything that differs between operating systems. Each function has a macOS and a Linux form.

Comes in: file descriptors and paths, nothing else. Goes out: bytes, seconds, library names. This file imports neither
MLX nor the rest of slowft: `preload_blas` has to run before MLX is imported anywhere.
"""

import ctypes
import ctypes.util
import errno
import mmap
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import ssl

MACOS = sys.platform == "darwin"

# macOS's constants, from XNU's <sys/fcntl.h>, <sys/mman.h> and <sys/resource.h>. Python has only some of them, and
# those only on macOS.
F_PREALLOCATE, F_NOCACHE, F_FULLFSYNC = 42, 48, 51
F_ALLOCATEALL, F_PEOFPOSMODE = 4, 3
MS_INVALIDATE, MS_SYNC = 0x0002, 0x0010
RUSAGE_INFO_V4 = 4

CAFFEINATE = "/usr/bin/caffeinate"
BLAS_FIX = "sudo apt-get install libopenblas0-pthread"


# --- BLAS -----------------------------------------------------------------------------------------


def preload_blas() -> None:
    """Make OpenBLAS the library MLX multiplies with, on Linux. It must run before `import mlx.core`.

    MLX's Linux CPU wheel bundles the reference BLAS: 1.7 GFLOP/s in float32 on two cores, against
    about 150 with OpenBLAS. If OpenBLAS is loaded first, with global visibility, MLX's own look-up of the
    `cblas_` functions finds it. The function does nothing on macOS (Accelerate and Metal), or when a BLAS was
    preloaded already (`LD_PRELOAD`).

    OpenBLAS's threads spin while they wait for the next product, 2^26 cycles by default, on a core that MLX's
    other streams could use. A step of four blocks took 5.4 s, and 4.9 s with the shortest wait (2^4).
    """
    if MACOS or blas_library() is not None:
        return
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")
    for name in ("libopenblas.so.0", "libopenblas.so"):
        try:
            ctypes.CDLL(name, ctypes.RTLD_GLOBAL)
            return
        except OSError:
            continue


class _DlInfo(ctypes.Structure):
    _fields_ = [
        ("dli_fname", ctypes.c_char_p),
        ("dli_fbase", ctypes.c_void_p),
        ("dli_sname", ctypes.c_char_p),
        ("dli_saddr", ctypes.c_void_p),
    ]


def blas_library() -> str | None:
    """Path of the library whose `cblas_sgemm` every later library finds first; None if there is none."""
    everything = ctypes.CDLL(None)
    try:
        address = ctypes.cast(everything.cblas_sgemm, ctypes.c_void_p)
    except AttributeError:
        return None
    info = _DlInfo()
    everything.dladdr.argtypes = [ctypes.c_void_p, ctypes.POINTER(_DlInfo)]
    return info.dli_fname.decode() if everything.dladdr(address, ctypes.byref(info)) else None


def blas_description() -> str:
    """What decides the last bits of a matrix product on this machine: the library, its kernels and its threads."""
    if MACOS:
        import platform

        return f"Accelerate of macOS {platform.mac_ver()[0]} {platform.machine()}"
    library = ctypes.CDLL(None)
    if not hasattr(library, "openblas_get_config"):
        return f"{blas_library()} {os.uname().machine}"
    library.openblas_get_config.restype = library.openblas_get_corename.restype = ctypes.c_char_p
    config, core = library.openblas_get_config(), library.openblas_get_corename()
    return f"{config.decode()} {core.decode()} {library.openblas_get_num_threads()} threads"


def slow_blas_warning(mlx_was_imported_first: bool) -> str | None:
    """One line to show once when MLX multiplies with the reference BLAS on Linux, else None."""
    if MACOS:
        return None
    if blas_library() is None:
        return f"MLX is on the reference BLAS, about 80 times slower than OpenBLAS. To fix it: {BLAS_FIX}"
    if mlx_was_imported_first:
        return (
            "mlx was imported before slowft, so it may be on the reference BLAS, about 80 times slower "
            "than OpenBLAS. To fix it: import slowft before mlx"
        )
    return None


# --- Files ----------------------------------------------------------------------------------------


def open_uncached(path: str) -> int:
    """Open a weight file for reading so that it does not fill the file cache. Returns the descriptor."""
    fd = os.open(path, os.O_RDONLY)
    if MACOS:  # on Linux, reading ahead doubles the throughput (reader.py)
        skip_file_cache(fd)
    return fd


MOST_FILES = 10240  # <sys/syslimits.h>'s OPEN_MAX: macOS refuses a soft limit above it


def allow_open_files() -> None:
    """Let this process open as many files as it may: shells give 256 on macOS, 1024 on Linux. Never lowers the limit.

    A model of 120 shards takes as many descriptors, on Linux twice as many; `slowft serve` one more for each client.
    """
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(ValueError, OSError):  # the system's own limit (kern.maxfilesperproc) may be lower
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


# In a read past the file cache, file offset, memory address and length are multiples of this: a page (16384 on Apple
# Silicon), which holds whole sectors of any drive. macOS reads other requests through the cache, a stretch at a time:
# XNU's `cluster_read_direct` wants memory aligned by its `mnt_alignmentmask`, a page unless a drive says otherwise.
# Linux refuses other requests.
DIRECT_ALIGNMENT = mmap.PAGESIZE


def open_direct(path: str, uncached_fd: int) -> int | None:
    """Open a file for reads straight from the drive into memory (O_DIRECT, F_NOCACHE). Returns the descriptor.

    Args:
        uncached_fd: the file's descriptor from `open_uncached`. On macOS it serves for both, and is returned.
    Returns:
        None on some file systems of Linux, which have no such reads.
    """
    if MACOS:
        return uncached_fd
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError as e:
        if e.errno in (errno.EINVAL, errno.EOPNOTSUPP):
            return None
        raise


def use_huge_pages(address: int, nbytes: int) -> None:
    """Put memory on pages as large as the processor has them, from its next use on. The content is lost. (Linux only.)

    A drive takes a limited number of pieces in one request (virtio: 254), and 1 MB on pages of 4 KB is so many already.
    """
    if MACOS:
        return
    begin = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (address + nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    libc = ctypes.CDLL(None)
    for advice in (mmap.MADV_DONTNEED, mmap.MADV_HUGEPAGE):  # a kernel without huge pages refuses, which does no harm
        libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(max(end - begin, 0)), advice)


def drop_cached(fd: int, offset: int, nbytes: int) -> None:
    """Drop a range just read or written from the file cache (Linux; on macOS F_NOCACHE keeps it out).

    `nbytes` 0 is the rest of the file. Pages that are still being read or not yet written stay.
    """
    if not MACOS:
        os.posix_fadvise(fd, offset, nbytes, os.POSIX_FADV_DONTNEED)


def drop_cached_file(path: str, offset: int = 0, nbytes: int = 0) -> None:
    """The same as `drop_cached`, for a file that is not open."""
    fd = open_uncached(path)
    try:
        drop_cached(fd, offset, nbytes)
    finally:
        os.close(fd)


def make_cold(path: str, offset: int = 0, nbytes: int = 0) -> None:
    """Make the next read of a range come from the drive, whoever brought it into the file cache: before measuring.

    `nbytes` 0 is the rest of the file. On macOS a read with F_NOCACHE uses pages that are cached, such as those of a
    model just downloaded, and dropping them costs too much to do it for every read. If the file system cannot map
    files, pages stay.
    """
    if not MACOS:
        drop_cached_file(path, offset, nbytes)
        return
    fd = os.open(path, os.O_RDONLY)
    try:
        _invalidate(fd, offset, nbytes)
    finally:
        os.close(fd)


def _invalidate(fd: int, offset: int, nbytes: int) -> None:
    """Write back the dirty pages of a range, and drop all of its pages from macOS's file cache."""
    begin, size = offset - offset % mmap.PAGESIZE, os.fstat(fd).st_size
    length = (min(offset + nbytes, size) if nbytes else size) - begin
    if length <= 0:
        return
    libc = ctypes.CDLL(None)  # `mmap.mmap` flushes the drive's own cache first, and has no `msync` with these flags
    libc.mmap.restype = ctypes.c_void_p
    extent = ctypes.c_size_t(length)
    address = libc.mmap(None, extent, mmap.PROT_READ, mmap.MAP_SHARED, fd, ctypes.c_int64(begin))
    if address != ctypes.c_void_p(-1).value:  # MAP_FAILED
        libc.msync(ctypes.c_void_p(address), extent, MS_SYNC | MS_INVALIDATE)
        libc.munmap(ctypes.c_void_p(address), extent)


def skip_file_cache(fd: int) -> None:
    """Let reads and writes go past the file cache (macOS), or let the kernel read nothing ahead (Linux).

    Linux still needs `write_back` and `drop_cached` after each request.
    """
    if MACOS:
        import fcntl

        fcntl.fcntl(fd, F_NOCACHE, 1)
    else:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)


def write_back(fd: int, offset: int, nbytes: int) -> None:
    """Return when a range just written is handed to the drive, so that `drop_cached` can drop it (Linux).

    Raises:
        OSError: it could not be written.
    """
    if MACOS:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    # Unlike fdatasync, this leaves the drive's own cache alone. It is no slower: 2.3 against 2.2 GB/s in requests of
    # 4 MB.
    flags = 1 | 2 | 4  # wait before, write, wait after
    if libc.sync_file_range(fd, ctypes.c_int64(offset), ctypes.c_int64(nbytes), flags):
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


def preallocate(fd: int, nbytes: int) -> None:
    """Give an empty file its `nbytes` on the disk now, so that writing there cannot run out of room.

    Where a file system of macOS has no such thing (XNU's `err_allocate`), the file only gets its length.

    Raises:
        OSError: ENOSPC if the disk has less.
    """
    if nbytes == 0:
        return
    if not MACOS:
        os.posix_fallocate(fd, 0, nbytes)
        return
    import fcntl
    import struct

    try:
        fcntl.fcntl(fd, F_PREALLOCATE, struct.pack("=Iiqqq", F_ALLOCATEALL, F_PEOFPOSMODE, 0, nbytes, 0))  # fstore_t
    except OSError as e:
        if e.errno not in (errno.ENOTSUP, errno.EINVAL, errno.ENOTTY):
            raise
    os.ftruncate(fd, nbytes)


def is_memory_filesystem(path: Path) -> bool:
    """Whether files under `path`, which exists, are in memory (Linux: tmpfs, as /tmp often is)."""
    if MACOS:
        return False
    device = os.stat(path).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return False
    # proc(5): mount id, parent id, device, root, mount point, options, ... - filesystem type, source, options
    return any(
        mount.split()[2] == number and mount.partition(" - ")[2].split()[0] in ("tmpfs", "ramfs", "devtmpfs")
        for mount in mounts
    )


def cache_directory() -> Path:
    """Where this user's programs keep files that can be made again; ours in there. May not exist yet.

    `XDG_CACHE_HOME` says so on macOS too, where only its default is another.
    """
    usual = Path.home() / ("Library/Caches" if MACOS else ".cache")
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else usual) / "slowft"


@contextmanager
def alone_in(directory: Path) -> Iterator[bool]:
    """Whether no other process is in this context for the same directory; nothing is left behind by one that dies."""
    import fcntl

    try:
        fd = os.open(directory, os.O_RDONLY)
    except OSError:
        yield True
        return
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_alone = True
        except BlockingIOError:
            is_alone = False
        except OSError:  # a network's file system that has no locks
            is_alone = True
        yield is_alone
    finally:
        os.close(fd)


def sync_file(fd: int) -> None:
    """Make written data, or a directory's names, survive a power cut.

    On macOS `fsync` alone stops at the drive's own cache. Network drives offer no more than that.
    """
    if MACOS:
        import fcntl

        try:
            fcntl.fcntl(fd, F_FULLFSYNC)
            return
        except OSError:  # ENOTSUP on SMB, EINVAL on WebDAV, ENOTTY elsewhere; for any other reason `fsync` fails too
            pass
    os.fsync(fd)


# --- Memory and processor -------------------------------------------------------------------------


def be_gentle() -> None:
    """Let this process give way to others, in computing and in reading.

    macOS: it becomes a background process (`PRIO_DARWIN_BG`), whose reads are held back too. Linux: nice 19, and idle
    priority for reads where the drive's scheduler knows priorities (`ioprio_set`).
    """
    if MACOS:
        PRIO_DARWIN_PROCESS, PRIO_DARWIN_BG = 4, 0x1000
        ctypes.CDLL(None).setpriority(PRIO_DARWIN_PROCESS, 0, PRIO_DARWIN_BG)
        return
    os.nice(19)
    IOPRIO_WHO_PROCESS, IOPRIO_IDLE = 1, 3 << 13
    number = {"x86_64": 251, "aarch64": 30}.get(os.uname().machine)
    if number is not None:
        ctypes.CDLL(None).syscall(number, IOPRIO_WHO_PROCESS, 0, IOPRIO_IDLE)


@contextmanager
def kept_awake() -> Iterator[None]:
    """While this is entered, a Mac does not fall asleep because nobody uses it. Its display may, and a lid is obeyed.

    Apple's `caffeinate` sees to that: -i on battery and -s on mains. It ends with this process however that ends (-w),
    and Ctrl-C, which goes to a terminal's process group, is not for it.
    """
    child = None
    if MACOS:
        nowhere = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in range(3)]
        command = [CAFFEINATE, "-is", "-w", str(os.getpid())]
        with suppress(OSError):  # the machine may sleep then
            child = os.posix_spawn(CAFFEINATE, command, os.environ, file_actions=nowhere, setpgroup=0)
    try:
        yield
    finally:
        if child is not None:
            with suppress(OSError):
                os.kill(child, signal.SIGTERM)
                os.waitpid(child, 0)


def seconds_by_the_clock() -> float:
    """Since some moment, those in which the machine slept included, which `time.monotonic` leaves out."""
    return time.clock_gettime(time.CLOCK_MONOTONIC if MACOS else time.CLOCK_BOOTTIME)


def identity_of_process(pid: int) -> str | None:
    """The number of a running process and when it began, as numbers are used again; None if no such process runs."""
    if MACOS:
        PROC_PIDTBSDINFO, info = 3, _ProcBsdInfo()
        nbytes = ctypes.CDLL(None).proc_pidinfo(
            pid, PROC_PIDTBSDINFO, ctypes.c_uint64(0), ctypes.byref(info), ctypes.sizeof(info)
        )
        return f"{pid} {info.pbi_start_tvsec}.{info.pbi_start_tvusec:06}" if nbytes == ctypes.sizeof(info) else None
    try:
        with open("/proc/sys/kernel/random/boot_id") as boot, open(f"/proc/{pid}/stat") as stat:
            fields = stat.read().rpartition(")")[2].split()  # the process's name before ")" may contain anything
            state, began = fields[0], fields[19]
            return None if state in "ZX" else f"{pid} {boot.read().strip()} {began}"
    except (FileNotFoundError, ProcessLookupError):
        return None


def is_running(identity: str) -> bool:
    """Whether the process that `identity_of_process` returned this for still runs on this machine."""
    return identity_of_process(int(identity.split()[0])) == identity


class _ProcBsdInfo(ctypes.Structure):
    """`struct proc_bsdinfo` of XNU's <sys/proc_info.h>."""

    _fields_ = [
        *(
            (name, ctypes.c_uint32)
            for name in "flags status xstatus pid ppid uid gid ruid rgid svuid svgid rfu".split()
        ),
        ("pbi_comm", ctypes.c_char * 16),
        ("pbi_name", ctypes.c_char * 32),
        ("pbi_of_session", ctypes.c_uint32 * 6),
        ("pbi_start_tvsec", ctypes.c_uint64),
        ("pbi_start_tvusec", ctypes.c_uint64),
    ]


def keep_alive(connection: socket.socket) -> None:
    """Let the system check whether the other side is still there. After 30 s of silence there is an error."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    idle = socket.TCP_KEEPALIVE if MACOS else socket.TCP_KEEPIDLE
    for name, value in ((idle, 10), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 4)):
        connection.setsockopt(socket.IPPROTO_TCP, name, value)


def tls_context() -> "ssl.SSLContext":
    """What https connections are checked with: the system's certificates, or certifi's where there are none.

    OpenSSL finds none with python.org's Python on macOS, until one runs its "Install Certificates.command".
    """
    import ssl

    context, paths = ssl.create_default_context(), ssl.get_default_verify_paths()
    if {paths.openssl_cafile_env, paths.openssl_capath_env} & os.environ.keys():
        return context  # SSL_CERT_FILE, SSL_CERT_DIR: someone said what to trust
    # those of a directory are read when they are needed, so the store does not count them
    in_directory = paths.capath is not None and os.listdir(paths.capath)
    if not context.cert_store_stats()["x509_ca"] and not in_directory:
        import certifi

        context.load_verify_locations(certifi.where())
    return context


def read_nothing_ahead(fd: int) -> None:
    """Let the kernel read nothing ahead in this file, whose reads are small and in no order."""
    if MACOS:
        import fcntl

        F_RDAHEAD = 45
        fcntl.fcntl(fd, F_RDAHEAD, 0)
    else:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)


def fix_malloc_threshold(nbytes: int = 1 << 20) -> bool:
    """Let freed buffers of `nbytes` and more go back to the system at once, so that resident memory is what is in use.

    Otherwise glibc raises its threshold to the largest block ever freed (32 MB at most) and keeps what is freed
    below it. Measured on the backward pass of a 2048/5632 Llama block at 512 tokens: the resident peak was 130 MB
    instead of 240 to 300 MB, and the pass 10-20% slower than with the growing threshold, unless MLX's own buffer cache
    hands buffers on. A threshold of 512 kB keeps less, but steps of a small model (576 hidden) took 30-40% longer.

    Smaller buffers come from one arena for all threads. With one arena per thread, up to 80 MB lay free between buffers
    in use after ten steps of changing shape, and a job planned within 390 MB took 425.

    Returns:
        Whether it was set: only with glibc, and not where the user set `MALLOC_MMAP_THRESHOLD_`.
    """
    if MACOS or "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):  # musl's `mallopt` has no effect
        return False
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
    if "MALLOC_ARENA_MAX" not in os.environ:
        libc.mallopt(M_ARENA_MAX, 1)
    return libc.mallopt(M_MMAP_THRESHOLD, nbytes) == 1 and libc.mallopt(M_TRIM_THRESHOLD, nbytes) == 1


def release_freed_memory() -> None:
    """Give memory that is free between small blocks back to the system. By itself glibc gives back only its heap's end.

    Measured after a tokenizer of 32,000 pieces was loaded: 146 MB resident, then 109 MB, in 3 ms. Buffers below a
    megabyte leave 60 to 70 MB free between them where rows have many lengths, and glibc puts larger ones there too.
    """
    libc = ctypes.CDLL(None)
    if not MACOS and hasattr(libc, "malloc_trim"):  # musl has none
        libc.malloc_trim(0)


class _RusageInfoV4(ctypes.Structure):
    """`struct rusage_info_v4` of XNU's <sys/resource.h>: a uuid, then 64-bit counters."""

    _fields_ = [("ri_uuid", ctypes.c_uint8 * 16)] + [
        (name, ctypes.c_uint64)
        for name in (
            "user_time system_time pkg_idle_wkups interrupt_wkups pageins wired_size resident_size phys_footprint "
            "proc_start_abstime proc_exit_abstime child_user_time child_system_time child_pkg_idle_wkups "
            "child_interrupt_wkups child_pageins child_elapsed_abstime diskio_bytesread diskio_byteswritten "
            "cpu_time_qos_default cpu_time_qos_maintenance cpu_time_qos_background cpu_time_qos_utility "
            "cpu_time_qos_legacy cpu_time_qos_user_initiated cpu_time_qos_user_interactive billed_system_time "
            "serviced_system_time logical_writes lifetime_max_phys_footprint instructions cycles billed_energy "
            "serviced_energy interval_max_phys_footprint runnable_time"
        ).split()
    ]


def _macos_usage() -> _RusageInfoV4:
    info = _RusageInfoV4()
    ctypes.CDLL(None).proc_pid_rusage(os.getpid(), RUSAGE_INFO_V4, ctypes.byref(info))
    return info


def _linux_status(field: str) -> int:
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    return 0


def memory_in_use() -> int:
    """Bytes of memory that the operating system charges to this process: physical footprint or resident set."""
    return _macos_usage().phys_footprint if MACOS else _linux_status("VmRSS")


def peak_memory() -> int:
    """The most bytes this process held since `reset_peak_memory`."""
    return _macos_usage().interval_max_phys_footprint if MACOS else _linux_status("VmHWM")


def reset_peak_memory() -> None:
    """Start measuring `peak_memory` anew."""
    try:
        if MACOS:
            ctypes.CDLL(None).proc_reset_footprint_interval(os.getpid())
        else:
            with open("/proc/self/clear_refs", "w") as clear:
                clear.write("5")
    except (OSError, AttributeError):  # some sandboxes forbid it: the peak is then that of the whole run
        pass


def cores() -> int:
    """Processor cores that this process may use: `taskset` and containers may leave it fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name() -> str:
    """The processor's name, such as "Apple M3" or "AMD EPYC"; its architecture if it has no name."""
    if MACOS:
        name, nbytes = ctypes.create_string_buffer(256), ctypes.c_size_t(256)
        if ctypes.CDLL(None).sysctlbyname(b"machdep.cpu.brand_string", name, ctypes.byref(nbytes), None, 0) == 0:
            return name.value.decode()
    else:
        with open("/proc/cpuinfo") as info:
            for line in info:
                if line.startswith("model name"):  # arm64 has no such line
                    return line.partition(":")[2].strip()
    return os.uname().machine


def is_translated() -> bool:
    """Whether this process runs under Rosetta: a Python for Intel on Apple Silicon, for which there is no MLX."""
    if not MACOS:
        return False
    value, nbytes = ctypes.c_int(0), ctypes.c_size_t(ctypes.sizeof(ctypes.c_int))
    ctypes.CDLL(None).sysctlbyname(b"sysctl.proc_translated", ctypes.byref(value), ctypes.byref(nbytes), None, 0)
    return value.value == 1  # Macs with Intel processors do not know the name, and leave the value 0


def physical_memory() -> int:
    """Bytes of memory in this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def memory_limit() -> int:
    """Bytes this process may use: physical memory, or the least limit of its control group and those above (Linux)."""
    limits = [physical_memory()]
    try:
        with open("/proc/self/mountinfo") as mounts, open("/proc/self/cgroup") as groups:
            # "0::/path" is version 2, "7:memory:/path" version 1
            paths = {controllers: path for _, controllers, path in (line.rstrip().split(":", 2) for line in groups)}
            mounts = [line.split() for line in mounts]
    except OSError:  # not Linux
        return limits[0]
    for _, _, _, root, mounted_at, *rest in mounts:
        kind, _, options = rest[rest.index("-") + 1 :][:3]
        if kind == "cgroup2":
            path, file = paths.get(""), "memory.max"
        elif kind == "cgroup" and "memory" in options.split(","):
            path = next((path for names, path in paths.items() if "memory" in names.split(",")), None)
            file = "memory.limit_in_bytes"
        else:
            continue
        group = os.path.relpath(path or "/", root)  # a container sees only what is below its own group
        while not group.startswith(".."):
            try:
                with open(os.path.join(mounted_at, group, file)) as limit:
                    limits.append(int(limit.read()))
            except (OSError, ValueError):  # the root has no such file; "max" is no limit
                pass
            if group in (".", ""):
                break
            group = os.path.dirname(group) or "."
    return min(limits)
