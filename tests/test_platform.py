"""The one place that knows the operating system: BLAS, file cache, memory."""

import ctypes
import errno
import fcntl
import os
import platform as python_platform
import resource
import shutil
import signal
import ssl
import struct
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import certifi
import pytest

import macos
from conftest import must_run
from slowft import platform
from slowft.comparing.remote import AskingFailed
from slowft.comparing.remote import Upstream as UpstreamOfCompare
from slowft.serving.upstream import Upstream as UpstreamOfServe
from slowft.weights.tensorfile import sync_directory

MATMUL = """
import time
import mlx.core as mx
a, b = mx.random.normal((1024, 1024)), mx.random.normal((1024, 1024))
mx.eval(a, b, a @ b)
best = float("inf")
for _ in range(3):
    begin = time.perf_counter()
    mx.eval(a @ b)
    best = min(best, time.perf_counter() - begin)
print(best)
"""


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="only MLX's Linux wheel brings the reference BLAS")
def test_float32_matmul_is_ten_times_the_reference_librarys():
    reference, preloaded = float(run(MATMUL)), float(run("import slowft\n" + MATMUL))
    assert reference / preloaded >= 10, f"{reference:.3f} s against {preloaded:.3f} s: {platform.BLAS_FIX}"


@pytest.mark.skipif(sys.platform != "linux", reason="only MLX's Linux wheel brings the reference BLAS")
def test_reference_blas_is_warned_of_once_with_the_fix(llama):
    code = f"""
import ctypes, warnings
real = ctypes.CDLL
def without_blas(name, *args):
    if name is not None and "blas" in name:
        raise OSError
    return real(name, *args)
ctypes.CDLL = without_blas
import slowft
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter('always')
    slowft.open_model({str(llama)!r}); slowft.open_model({str(llama)!r})
print(len(caught), caught[0].message)
"""
    out = run(code)
    assert out.startswith("1 ") and platform.BLAS_FIX in out


@pytest.mark.skipif(sys.platform != "linux", reason="macOS has one BLAS, as old as the system")
def test_blas_description_tells_libraries_and_threads_apart():
    code = "from slowft import platform; print(platform.blas_description())"
    two = "import os; os.environ['OPENBLAS_NUM_THREADS'] = '2'\nimport slowft\n" + code
    openblas = run(two)
    assert "OpenBLAS" in openblas and openblas == run(two)
    if platform.cores() > 1:  # OpenBLAS uses no more threads than cores
        assert openblas != run(two.replace("'2'", "'1'"))
    assert "OpenBLAS" not in run("import ctypes; ctypes.CDLL = lambda *_, f=ctypes.CDLL: f(None)\n" + code)


def test_importing_slowft_imports_neither_mlx_nor_numpy():
    assert run("import sys, slowft; print('mlx.core' in sys.modules, 'numpy' in sys.modules)") == "False False\n"


def test_threads_end_with_the_process(llama):
    """MLX aborts a process whose threads end without destroying their streams; nothing need be closed by hand."""
    code = f"""
import slowft, mlx.core as mx
model = slowft.open_model({str(llama)!r}).add_lora(rank=4)
model.loss_and_grads([(mx.array([[1, 2, 3, 4]]), mx.array([[1, 3]]))] * 2)
print("done")
"""
    assert run(code) == "done\n"


def test_functions_compiled_on_a_thread_do_not_abort_the_process_at_its_end():
    """MLX drops them when the thread ends, and asks for Python's lock, which is not given any more at the end."""
    code = """
import mlx.core as mx
from slowft.weights.threads import Worker
def compiled():
    functions = [mx.compile(lambda x, i=i: mx.exp(x)) for i in range(2000)]  # one operation: none is built
    mx.eval([f(mx.array(1.0)) for f in functions])
    return functions
kept = Worker("test").run(compiled)
print("done")
"""
    assert run(code) == "done\n"


# --- Connections ------------------------------------------------------------------------------------


@pytest.fixture
def https(tmp_path, monkeypatch):
    """(URL of an https server of this machine, the certificate that it is checked with); this Python has no others."""
    if shutil.which("openssl") is None:
        must_run("there is no openssl to make a certificate with")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    make = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=DNS:localhost"
    subprocess.run([*make.split(), "-keyout", key, "-out", certificate], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Chat)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(ssl, "create_default_context", lambda: ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))
    monkeypatch.setattr(certifi, "where", lambda: str(certificate))
    empty = tmp_path / "certs"
    empty.mkdir()
    paths = ssl.get_default_verify_paths()._replace(cafile=None, capath=str(empty))
    monkeypatch.setattr(ssl, "get_default_verify_paths", lambda: paths)
    yield f"https://localhost:{server.server_address[1]}/v1", certificate
    server.shutdown()
    server.server_close()


class Chat(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        body = b'{"choices": [{"message": {"content": "by TLS"}}]}'
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_) -> None:
        pass


def by_serving(url: str) -> str:
    link = UpstreamOfServe(url).connect()
    link.request("POST", "/v1/chat/completions", b"{}")
    said = link.getresponse().read().decode()
    link.close()
    return said


def by_comparing(url: str) -> str:
    suite, who = SimpleNamespace(retries=0, timeout=10), SimpleNamespace(upstream=url, api_key_env=None)
    return UpstreamOfCompare(suite, who).ask({})["text"]


@pytest.mark.parametrize("ask", [by_serving, by_comparing])
def test_https_is_checked_with_certifis_certificates_where_python_finds_none(https, monkeypatch, ask):
    """As with python.org's Python on macOS. Whoever names certificates gets those alone."""
    url, _ = https
    assert "by TLS" in ask(url)
    monkeypatch.setenv("SSL_CERT_FILE", os.devnull)
    with pytest.raises((ssl.SSLCertVerificationError, AskingFailed), match="CERTIFICATE_VERIFY_FAILED"):
        ask(url)


def test_a_directory_of_certificates_is_a_store(https, monkeypatch):
    """OpenSSL reads them when they are needed, and counts none before."""
    _, certificate = https
    paths = ssl.get_default_verify_paths()._replace(capath=str(certificate.parent))
    monkeypatch.setattr(ssl, "get_default_verify_paths", lambda: paths)
    assert platform.tls_context().cert_store_stats()["x509_ca"] == 0


# --- Files ------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="macOS has no file system in memory by default")
@pytest.mark.parametrize("path", ["/dev/shm", "/dev", "/proc", "/", ".", "/tmp", "/run"])
def test_file_systems_in_memory_are_those_that_stat_calls_so(path):
    done = subprocess.run(["stat", "-f", "-c", "%T", path], capture_output=True, text=True)
    assert platform.is_memory_filesystem(Path(path)) == (done.stdout.strip() in ("tmpfs", "ramfs"))


def test_preallocated_bytes_are_on_the_disk(tmp_path):
    with open(tmp_path / "file", "wb") as file:
        platform.preallocate(file.fileno(), 3_000_001)
        status = os.fstat(file.fileno())
    assert status.st_size == 3_000_001 and status.st_blocks * 512 >= 3_000_001


@pytest.mark.parametrize(("is_mac", "usual"), [(False, ".cache"), (True, "Library/Caches")])
def test_cache_directory_is_where_the_user_or_the_system_wants_it(is_mac, usual, monkeypatch, tmp_path):
    monkeypatch.setattr(platform, "MACOS", is_mac)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert platform.cache_directory() == tmp_path / usual / "slowft"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    assert platform.cache_directory() == tmp_path / "elsewhere" / "slowft"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which the specification says to ignore
    assert platform.cache_directory() == tmp_path / usual / "slowft"


def test_syncing_makes_do_with_fsync_where_macos_knows_no_more(monkeypatch, tmp_path):
    """Network and FAT drives refuse F_FULLFSYNC, each with an error of its own."""
    synced = []

    def refuse(fd, command):
        synced.append(("F_FULLFSYNC", command))
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(platform, "MACOS", True)
    monkeypatch.setattr(fcntl, "fcntl", refuse)
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(("fsync", fd)))
    sync_directory(tmp_path)
    assert synced[0] == ("F_FULLFSYNC", 51) and [name for name, _ in synced] == ["F_FULLFSYNC", "fsync"]


@pytest.mark.parametrize(
    ("soft", "hard", "after"),
    [
        (256, resource.RLIM_INFINITY, 10240),  # as macOS's shells have it, and no more than it takes
        (1024, 4096, 4096),
        (20_000, 50_000, 20_000),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, resource.RLIM_INFINITY),
    ],
)
def test_more_files_may_be_open_and_never_fewer(soft, hard, after, monkeypatch):
    limits = [(soft, hard)]
    monkeypatch.setattr(resource, "getrlimit", lambda what: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda what, both: limits.append(both))
    platform.allow_open_files()
    assert limits[-1] == (after, hard)


def test_a_limit_of_open_files_that_the_system_refuses_stays_as_it_is(monkeypatch):
    def refuse(*_):
        raise ValueError("current limit exceeds maximum limit")

    monkeypatch.setattr(resource, "getrlimit", lambda what: (256, resource.RLIM_INFINITY))
    monkeypatch.setattr(resource, "setrlimit", refuse)
    platform.allow_open_files()


# --- macOS's calls ----------------------------------------------------------------------------------


@pytest.fixture
def mac(monkeypatch):
    return macos.simulate(monkeypatch, page_nbytes=16384)


def test_macos_numbers_are_those_of_its_headers():
    """XNU's bsd/sys/fcntl.h, mman.h and resource.h (xnu-11417), and Python's own where it runs there."""
    numbers = {
        "F_PREALLOCATE": 42,
        "F_NOCACHE": 48,
        "F_FULLFSYNC": 51,
        "F_ALLOCATEALL": 4,
        "F_PEOFPOSMODE": 3,
        "MS_INVALIDATE": 0x0002,
        "MS_SYNC": 0x0010,
        "RUSAGE_INFO_V4": 4,
    }
    assert {name: getattr(platform, name) for name in numbers} == numbers
    if platform.MACOS:
        assert (fcntl.F_NOCACHE, fcntl.F_FULLFSYNC) == (48, 51)
    assert ctypes.sizeof(platform._RusageInfoV4) == 296
    assert platform._RusageInfoV4.phys_footprint.offset == 72
    assert platform._RusageInfoV4.lifetime_max_phys_footprint.offset == 240
    assert platform._RusageInfoV4.interval_max_phys_footprint.offset == 280


def test_macos_memory_is_the_physical_footprint(mac):
    """Written where a compiler puts ri_phys_footprint and ri_interval_max_phys_footprint of that structure."""
    raw = bytearray(296)
    struct.pack_into("=Q", raw, 72, 123_456)
    struct.pack_into("=Q", raw, 280, 234_567)

    def fill(pid, flavour, info):
        ctypes.memmove(ctypes.addressof(info._obj), bytes(raw), len(raw))

    mac.libc["proc_pid_rusage"] = fill
    assert (platform.memory_in_use(), platform.peak_memory()) == (123_456, 234_567)
    platform.reset_peak_memory()
    assert [(name, args[:2]) for name, args in mac.calls if name == "proc_pid_rusage"] == [
        ("proc_pid_rusage", (os.getpid(), 4))
    ] * 2
    assert mac.calls[-1] == ("proc_reset_footprint_interval", (os.getpid(),))


def test_macos_tells_a_process_from_a_later_one_of_its_number(mac):
    """Written where a compiler puts pbi_start_tvsec and pbi_start_tvusec of struct proc_bsdinfo."""
    raw = bytearray(136)
    struct.pack_into("=QQ", raw, 120, 1_795_000_000, 42)

    def fill(pid, flavour, argument, info, nbytes):
        if pid != 7:
            return 0  # ESRCH
        ctypes.memmove(ctypes.addressof(info._obj), bytes(raw), nbytes)
        return nbytes

    mac.libc["proc_pidinfo"] = fill
    assert platform.identity_of_process(7) == "7 1795000000.000042" and platform.is_running("7 1795000000.000042")
    assert not platform.is_running("7 1794999999.000042") and platform.identity_of_process(8) is None
    assert [args[:3] + args[4:] for name, args in mac.calls if name == "proc_pidinfo"][0] == (7, 3, 0, 136)


@pytest.mark.parametrize("error", [errno.ENOTSUP, errno.ENOSPC])
def test_macos_does_without_where_a_file_system_cannot_and_not_where_it_is_full(error, mac, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(fcntl, "fcntl", fail)
    with open(tmp_path / "file", "wb") as file:
        if error == errno.ENOSPC:
            with pytest.raises(OSError, match="No space"):
                platform.preallocate(file.fileno(), 3_000_001)
        else:
            platform.preallocate(file.fileno(), 3_000_001)
    assert (tmp_path / "file").stat().st_size == (0 if error == errno.ENOSPC else 3_000_001)


def test_macos_preallocates_all_from_the_end_or_nothing(mac, tmp_path):
    with open(tmp_path / "file", "wb") as file:
        platform.preallocate(file.fileno(), 3_000_001)
        (name, (fd, command, store)), size = mac.calls[-1], os.fstat(file.fileno()).st_size
        assert (name, fd, command, size) == ("fcntl", file.fileno(), 42, 3_000_001)
    # struct fstore: unsigned int flags, int position mode, off_t offset, length, bytes allocated
    assert struct.unpack("@Iiqqq", store) == (4, 3, 0, 3_000_001, 0)


@pytest.mark.parametrize(
    "offset, nbytes, mapped",
    [(0, 0, (0, 100_000)), (0, 16384, (0, 16384)), (20_000, 30_000, (16384, 33_616)), (98_304, 9_999, (98_304, 1_696))],
)
def test_macos_drops_pages_by_invalidating_a_mapping_of_them(offset, nbytes, mapped, mac, tmp_path):
    """Whole pages, up to the end of the file; MS_SYNC | MS_INVALIDATE, and nothing stays mapped."""
    file = tmp_path / "file"
    file.write_bytes(bytes(100_000))
    platform.make_cold(str(file), offset, nbytes)
    (name, made), (_, dropped), (_, unmapped) = mac.calls
    assert name == "mmap" and made[0] is None and made[2:4] == (1, 1)  # PROT_READ, MAP_SHARED
    assert (made[5], made[1]) == mapped
    address = mac.mapped[-1]
    assert dropped == (address, mapped[1], 0x12) and unmapped == (address, mapped[1])


@pytest.mark.parametrize("offset", [100_000, 200_000])
def test_macos_drops_nothing_past_the_end_or_of_what_cannot_be_mapped(offset, mac, tmp_path):
    file = tmp_path / "file"
    file.write_bytes(bytes(98_304))
    platform.make_cold(str(file), offset)
    assert mac.calls == []
    mac.libc["mmap"] = lambda *_: ctypes.c_void_p(-1).value
    platform.make_cold(str(file))
    assert [name for name, _ in mac.calls] == ["mmap"]


def test_macos_maps_nothing_while_it_streams(mac, tmp_path):
    """F_NOCACHE, set once on each descriptor, keeps pages out."""
    file = tmp_path / "file"
    file.write_bytes(bytes(100_000))
    fd = platform.open_uncached(str(file))
    assert platform.open_direct(str(file), fd) == fd  # one descriptor, of the few that there are
    platform.drop_cached(fd, 0, 0)
    platform.write_back(fd, 0, 100_000)
    os.close(fd)
    platform.drop_cached_file(str(file))
    assert [(name, args[1:]) for name, args in mac.calls] == [("fcntl", (48, 1))] * 2


# --- Sleep ------------------------------------------------------------------------------------------


def is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


WAITING = """
import os, signal, sys
from slowft import platform
platform.MACOS, platform.CAFFEINATE = True, sys.argv[1]
spawn = os.posix_spawn
def noted(*args, **how):
    print(child := spawn(*args, **how), flush=True)
    return child
os.posix_spawn = noted
with platform.kept_awake():
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a program that waits for a process is made with Linux's tail")
def test_a_process_that_is_killed_leaves_no_other(tmp_path):
    (tmp_path / "caffeinate").write_text(
        '#!/bin/sh\n[ "$1 $2" = "-is -w" ] && exec tail -s 0.05 --pid=$3 -f /dev/null\n'
    )
    (tmp_path / "caffeinate").chmod(0o755)
    command = [sys.executable, "-c", WAITING, str(tmp_path / "caffeinate")]
    done = subprocess.run(command, capture_output=True, text=True)  # returns when nobody has its output open any more
    assert done.returncode == -signal.SIGKILL, done.stderr
    until = time.monotonic() + 10
    while is_there(int(done.stdout)):
        assert time.monotonic() < until
        time.sleep(0.05)


def test_where_nothing_keeps_a_machine_awake_it_works_nevertheless(monkeypatch):
    with platform.kept_awake():
        pass
    monkeypatch.setattr(platform, "MACOS", True)
    monkeypatch.setattr(platform, "CAFFEINATE", "/no/such/program")
    with platform.kept_awake():
        pass


# --- Memory and processor ---------------------------------------------------------------------------


def test_cores_are_those_that_this_process_may_use():
    if not hasattr(os, "sched_setaffinity"):
        must_run("only Linux holds a process to some of the cores")
    code = """
import os, subprocess
os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
from slowft import platform
from slowft.weights.sources import casting_streams
print(platform.cores(), len(casting_streams()), subprocess.run("nproc", capture_output=True, text=True).stdout)
"""
    assert run(code).split() == ["1", "1", "1"]


FREE = """
import ctypes, sys
from slowft import platform
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
fixed = len(sys.argv) > 1 and platform.fix_malloc_threshold()
def use(nbytes):
    block = libc.malloc(nbytes)
    ctypes.memset(block, 1, nbytes)
    libc.free(block)
use(1000)
base = platform.memory_in_use()
for _ in range(4):
    use(20 << 20)
    kept = platform.memory_in_use() - base
print(fixed, kept)
"""


def freed_but_kept(fix: bool, **environment) -> tuple[bool, int]:
    """Whether the threshold was set, and resident bytes that are left of blocks of 20 MB that were freed."""
    command = [sys.executable, "-c", FREE] + ["fix"] * fix
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    assert done.returncode == 0, done.stderr
    fixed, kept = done.stdout.split()
    return fixed == "True", int(kept)


@pytest.mark.skipif(python_platform.libc_ver()[0] != "glibc", reason="only glibc has a threshold that grows")
def test_freed_buffers_go_back_to_the_system():
    if "MALLOC_MMAP_THRESHOLD_" in os.environ:
        must_run("MALLOC_MMAP_THRESHOLD_ is set")
    assert freed_but_kept(fix=False)[1] > 15 << 20
    fixed, kept = freed_but_kept(fix=True)
    assert fixed and kept < 1 << 20


def test_malloc_threshold_of_the_user_stays():
    fixed, _ = freed_but_kept(fix=True, MALLOC_MMAP_THRESHOLD_="134217728")
    assert not fixed


@pytest.mark.skipif(python_platform.libc_ver()[0] != "glibc", reason="only glibc keeps what is free between blocks")
def test_what_is_free_between_small_blocks_goes_back_when_it_is_asked_for():
    code = """
import ctypes
from slowft import platform
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
ctypes.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
base = platform.memory_in_use()
blocks = [libc.malloc(10_000) for _ in range(4000)]
for block in blocks:
    ctypes.memset(block, 1, 10_000)
for block in blocks[:-1]:
    libc.free(block)
kept = platform.memory_in_use() - base
platform.release_freed_memory()
print(kept, platform.memory_in_use() - base)
"""
    kept, left = map(int, run(code).split())
    assert kept > 30e6 and left < 5e6
