"""Everything that differs between operating systems, each call with its macOS and Linux form.

Comes in: file descriptors and paths, nothing else. Goes out: bytes, seconds, library names. Imports neither MLX
nor the rest of slowft: `preload_blas` has to run before MLX is imported anywhere.
"""

import ctypes
import ctypes.util
import errno
import mmap
import os
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MACOS = sys.platform == "darwin"

# macOS's numbers, from XNU's <sys/fcntl.h>, <sys/mman.h> and <sys/resource.h>: Python names only some of them, and
# those only on macOS.
F_PREALLOCATE, F_NOCACHE, F_FULLFSYNC = 42, 48, 51
F_ALLOCATEALL, F_PEOFPOSMODE = 4, 3
MS_INVALIDATE, MS_SYNC = 0x0002, 0x0010
RUSAGE_INFO_V4 = 4

BLAS_FIX = "sudo apt-get install libopenblas0-pthread"


# --- BLAS -----------------------------------------------------------------------------------------


def preload_blas() -> None:
    """Make OpenBLAS the library MLX multiplies with, on Linux. Must run before `import mlx.core`.

    MLX's Linux CPU wheel bundles the reference BLAS: 1.7 GFLOP/s in float32 on two cores, against
    about 150 with OpenBLAS. Loading OpenBLAS with global visibility first makes MLX's own look-up
    of the `cblas_` functions find it. Does nothing on macOS (Accelerate and Metal) or when a BLAS
    was preloaded already (`LD_PRELOAD`).

    OpenBLAS's threads wait for the next product by spinning, 2^26 cycles unless told otherwise, on a core that
    MLX's other streams could use: a step of four blocks took 5.4 s, and 4.9 s with the shortest wait (2^4).
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
    """What decides the last bits of a matrix product on this machine: the library, its kernels, its threads."""
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
    """Open a weight file for reading without letting it fill the file cache. Returns the descriptor."""
    fd = os.open(path, os.O_RDONLY)
    if MACOS:  # on Linux, reading ahead doubles the throughput (reader.py)
        skip_file_cache(fd)
    return fd


# Of file offset, memory and length in a read past the file cache: a page, which holds whole sectors of any drive.
# macOS (16384 on Apple Silicon) reads what lies otherwise through the cache, a stretch at a time: XNU's
# `cluster_read_direct` wants memory by its `mnt_alignmentmask`, a page unless a drive says otherwise. Linux refuses it.
DIRECT_ALIGNMENT = mmap.PAGESIZE


def open_direct(path: str) -> int | None:
    """Open a file for reads straight from the drive into memory (O_DIRECT, F_NOCACHE). Returns the descriptor.

    None where there is no such thing: some file systems of Linux.
    """
    if MACOS:
        return open_uncached(path)
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError as e:
        if e.errno in (errno.EINVAL, errno.EOPNOTSUPP):
            return None
        raise


def use_huge_pages(address: int, nbytes: int) -> None:
    """Have memory on pages as large as the processor has them, from its next use on; what is in it is lost.

    Linux only. A drive takes so many pieces at a time (virtio: 254), which pages of 4 KB make of 1 MB.
    """
    if MACOS:
        return
    begin = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (address + nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    libc = ctypes.CDLL(None)
    for advice in (mmap.MADV_DONTNEED, mmap.MADV_HUGEPAGE):  # a kernel without huge pages refuses: no harm
        libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(max(end - begin, 0)), advice)


def drop_cached(fd: int, offset: int, nbytes: int) -> None:
    """Forget what the file cache kept of a range just read or written (Linux; F_NOCACHE keeps it out on macOS).

    `nbytes` 0 is the rest of the file. Pages still being read or not yet written stay.
    """
    if not MACOS:
        os.posix_fadvise(fd, offset, nbytes, os.POSIX_FADV_DONTNEED)


def drop_cached_file(path: str, offset: int = 0, nbytes: int = 0) -> None:
    """The same of a file that is not open."""
    fd = open_uncached(path)
    try:
        drop_cached(fd, offset, nbytes)
    finally:
        os.close(fd)


def make_cold(path: str, offset: int = 0, nbytes: int = 0) -> None:
    """Have the next read of a range come from the drive, whoever brought it into the file cache: before measuring.

    `nbytes` 0 is the rest of the file. On macOS a read with F_NOCACHE takes what pages there are, such as those of a
    model just downloaded, and dropping them costs too much to do it for every read. A file system may not map files:
    pages stay.
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
    """Write back what is dirty of a range, and drop its pages from macOS's file cache."""
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
    """Let reads and writes go past the file cache (macOS), or read nothing ahead of what is asked (Linux).

    Linux still needs `write_back` and `drop_cached` after each request.
    """
    if MACOS:
        import fcntl

        fcntl.fcntl(fd, F_NOCACHE, 1)
    else:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)


def write_back(fd: int, offset: int, nbytes: int) -> None:
    """Return when a range just written is on its way out of memory, so that `drop_cached` can forget it (Linux).

    Raises:
        OSError: it could not be written.
    """
    if MACOS:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    # wait before, write, wait after. Unlike fdatasync it leaves the drive's own cache alone, and is no slower:
    # 2.3 for 2.2 GB/s in requests of 4 MB
    whole = 1 | 2 | 4
    if libc.sync_file_range(fd, ctypes.c_int64(offset), ctypes.c_int64(nbytes), whole):
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


def preallocate(fd: int, nbytes: int) -> None:
    """Give an empty file its `nbytes` on the disk now, so that writing there cannot run out of room.

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

    fcntl.fcntl(fd, F_PREALLOCATE, struct.pack("=Iiqqq", F_ALLOCATEALL, F_PEOFPOSMODE, 0, nbytes, 0))  # fstore_t
    os.ftruncate(fd, nbytes)


def is_memory_filesystem(path: Path) -> bool:
    """Whether files under `path`, which exists, are kept in memory (Linux: tmpfs, as /tmp often is)."""
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
    """Where this user's programs keep files that can be made again; ours in there. May not exist yet."""
    if MACOS:
        return Path.home() / "Library" / "Caches" / "slowft"
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "slowft"


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

    On macOS `fsync` alone stops at the drive's own cache; network drives have no more than that.
    """
    if MACOS:
        import fcntl

        try:
            fcntl.fcntl(fd, F_FULLFSYNC)
            return
        except OSError:  # ENOTSUP on SMB, EINVAL on WebDAV, ENOTTY elsewhere: `fsync` fails too if it is anything else
            pass
    os.fsync(fd)


# --- Memory and processor -------------------------------------------------------------------------


def be_gentle() -> None:
    """Let this process give way to others: the lowest priority for computing that still gets some, and for reads.

    macOS: background (`PRIO_DARWIN_BG`), which holds its reads back too. Linux: nice 19, and idle for the drive where
    its scheduler knows priorities (`ioprio_set`).
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


def identity_of_process(pid: int) -> str | None:
    """Of a process that runs: its number and when it began, as numbers are used again; None if there is none."""
    if MACOS:
        PROC_PIDTBSDINFO, info = 3, _ProcBsdInfo()
        nbytes = ctypes.CDLL(None).proc_pidinfo(
            pid, PROC_PIDTBSDINFO, ctypes.c_uint64(0), ctypes.byref(info), ctypes.sizeof(info)
        )
        return f"{pid} {info.pbi_start_tvsec}.{info.pbi_start_tvusec:06}" if nbytes == ctypes.sizeof(info) else None
    try:
        with open("/proc/sys/kernel/random/boot_id") as boot, open(f"/proc/{pid}/stat") as stat:
            fields = stat.read().rpartition(")")[2].split()  # a name may hold anything
            state, began = fields[0], fields[19]
            return None if state in "ZX" else f"{pid} {boot.read().strip()} {began}"
    except (FileNotFoundError, ProcessLookupError):
        return None


def is_running(identity: str) -> bool:
    """Whether the process of which `identity_of_process` said this still runs on this machine."""
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
    """Have the system ask now and then whether the other side is still there: an error comes after 30 s of silence."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    idle = socket.TCP_KEEPALIVE if MACOS else socket.TCP_KEEPIDLE
    for name, value in ((idle, 10), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 4)):
        connection.setsockopt(socket.IPPROTO_TCP, name, value)


def read_nothing_ahead(fd: int) -> None:
    """Reads of this file are small and in no order: what lies beside them is not to be brought along."""
    if MACOS:
        import fcntl

        F_RDAHEAD = 45
        fcntl.fcntl(fd, F_RDAHEAD, 0)
    else:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)


def fix_malloc_threshold(nbytes: int = 1 << 20) -> bool:
    """Let freed buffers of `nbytes` and more go back to the system at once, so that resident memory is what is live.

    glibc otherwise raises its threshold to the largest block ever freed (32 MB at most) and keeps what is freed
    below it. Measured: backward of a 2048/5632 Llama block at 512 tokens: resident peak 130 MB instead of 240 to
    300 MB, and 10-20% slower than with the growing threshold, unless MLX's own buffer cache hands buffers on.
    A threshold of 512 kB keeps less, but steps of a small model (576 hidden) took 30-40% longer.

    Smaller ones come from one arena for all threads: of one arena each, up to 80 MB lay free between what was in use
    after ten steps of changing shape, and a job planned within 390 MB took 425.

    Returns:
        Whether it was set: only with glibc, and not where the user set `MALLOC_MMAP_THRESHOLD_`.
    """
    if MACOS or "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):  # musl has a `mallopt` of no effect
        return False
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
    if "MALLOC_ARENA_MAX" not in os.environ:
        libc.mallopt(M_ARENA_MAX, 1)
    return libc.mallopt(M_MMAP_THRESHOLD, nbytes) == 1 and libc.mallopt(M_TRIM_THRESHOLD, nbytes) == 1


def release_freed_memory() -> None:
    """Give what is free between small blocks back to the system; by itself, glibc does so at the end of its heap only.

    Measured after a tokenizer of 32,000 pieces was loaded: 146 MB resident, then 109 MB, in 3 ms. Buffers below a
    megabyte leave 60 to 70 MB free between them where rows have many lengths, and glibc puts larger ones there too.
    """
    libc = ctypes.CDLL(None)
    if not MACOS and hasattr(libc, "malloc_trim"):  # musl has none
        libc.malloc_trim(0)


@contextmanager
def releasing_freed_memory(every_s: float) -> Iterator[None]:
    """While this is entered, `release_freed_memory` every so often, on a thread of its own; nothing on macOS."""
    if MACOS:
        yield
        return
    done = threading.Event()

    def release() -> None:
        while not done.wait(every_s):
            release_freed_memory()

    thread = threading.Thread(target=release, name="slowft-release", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


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
    """Bytes of memory the operating system charges this process: physical footprint or resident set."""
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
    except (OSError, AttributeError):  # some sandboxes forbid it: the peak is then the whole run's
        pass


def cores() -> int:
    """Processor cores that this process may use: `taskset` and containers may leave it fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name() -> str:
    """The processor's name, such as "Apple M3" or "AMD EPYC"; of one that has none, its architecture."""
    if MACOS:
        name, nbytes = ctypes.create_string_buffer(256), ctypes.c_size_t(256)
        if ctypes.CDLL(None).sysctlbyname(b"machdep.cpu.brand_string", name, ctypes.byref(nbytes), None, 0) == 0:
            return name.value.decode()
    else:
        with open("/proc/cpuinfo") as info:
            for line in info:
                if line.startswith("model name"):  # (not on arm64)
                    return line.partition(":")[2].strip()
    return os.uname().machine


def is_translated() -> bool:
    """Whether this process runs by Rosetta: a Python for Intel on Apple Silicon, for which there is no MLX."""
    if not MACOS:
        return False
    value, nbytes = ctypes.c_int(0), ctypes.c_size_t(ctypes.sizeof(ctypes.c_int))
    ctypes.CDLL(None).sysctlbyname(b"sysctl.proc_translated", ctypes.byref(value), ctypes.byref(nbytes), None, 0)
    return value.value == 1  # Macs with Intel's processors do not know the name, and leave it 0


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
