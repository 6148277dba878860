"""The reader against raw reads of the same files, in alternating rounds: GB/s, their ratio, processor seconds per GB.

python benchmarks/io.py                       # a random file of 1 GB in a temporary directory
python benchmarks/io.py --model my-model      # a model's own files

Raw reads are those of `fio` (direct, sequential, 1 and 4 requests of 8 MB in flight, in ordinary and in huge pages)
where it is installed, else of `dd`. The reader reads blocks of 88 MB, as training does, at unaligned offsets.
"""

import slowft  # noqa: F401, I001  (before mlx: it loads OpenBLAS)

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from slowft.storage import reader as storage_reader
from slowft.storage.buffers import read_buffer, shift
from slowft.storage.reader import ByteRange, Reader

MB = 1 << 20
BLOCK_NBYTES = 88 * MB
HEADER_NBYTES = 4200  # where a file's tensors begin: on no page


def drop_from_cache(files: list[Path]) -> None:
    if hasattr(os, "posix_fadvise"):
        for file in files:
            with open(file, "rb") as f:
                os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def processor_s() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def by_reader(reads_in_flight: int, direct: bool) -> Callable[[list[Path]], int]:
    def read(files: list[Path]) -> int:
        reader = Reader(reads_in_flight)
        if not direct:
            reader._read_directly = lambda *_: False
        for file in files:
            size = file.stat().st_size
            for offset in range(HEADER_NBYTES, size, BLOCK_NBYTES):
                at = shift(offset)
                reader.read_now([ByteRange(str(file), offset, min(BLOCK_NBYTES, size - offset), at)], memory)
        reader.close()
        return reader.bytes_read

    memory = memoryview(read_buffer(BLOCK_NBYTES + 4096))
    memory[::4096] = bytes(-(-len(memory) // 4096))  # its pages are there, as in every step but the first
    return read


def by_fio(depth: int, huge: bool) -> Callable[[list[Path]], int]:
    engine = ["--ioengine=posixaio"] if platform.system() == "Darwin" else ["--ioengine=libaio"]

    def read(files: list[Path]) -> float:  # bytes per second: leaves out the start of fio itself
        command = ["fio", "--name=read", f"--filename={':'.join(map(str, files))}", "--rw=read", "--bs=8m"]
        command += ["--direct=1", "--invalidate=1", "--readonly", "--file_service_type=sequential"]
        command += [f"--iodepth={depth}", "--output-format=json", *engine]
        tunables = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"} if huge else {}
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | tunables)
        return json.loads(done.stdout)["jobs"][0]["read"]["bw_bytes"]

    return read


def by_dd(files: list[Path]) -> float:
    nbytes = seconds = 0.0
    for file in files:
        command = ["dd", f"if={file}", "of=/dev/null", "bs=8M", "iflag=direct"]
        told = subprocess.run(command, check=True, capture_output=True, text=True, env={"LC_ALL": "C"}).stderr
        found = re.search(r"(\d+) bytes.*, ([\d.e-]+) s", told)
        nbytes, seconds = nbytes + int(found[1]), seconds + float(found[2])
    return nbytes / seconds


def rate_of(read: Callable, files: list[Path], is_raw: bool) -> tuple[float, float]:
    """(bytes per second, processor seconds per GB) of one round."""
    drop_from_cache(files)
    processor, begin = processor_s(), time.perf_counter()
    result = read(files)
    took, processor = time.perf_counter() - begin, processor_s() - processor
    rate = result if is_raw else result / took
    return rate, processor / sum(f.stat().st_size for f in files) * 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="directory whose *.safetensors are read")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--sweep", action="store_true", help="also every depth and request size of the reader")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        if args.model:
            files = sorted(Path(args.model).glob("*.safetensors"))
        else:
            files = [Path(directory) / "random"]
            with open(files[0], "wb") as f:
                for _ in range(32):
                    f.write(os.urandom(32 * MB))
                os.fsync(f.fileno())
        if not files:
            sys.exit(f"no *.safetensors in {args.model}")
        ways = {f"reader, {n} in flight": (by_reader(n, True), False) for n in (1, 2, 4)}
        ways["reader, through the file cache"] = by_reader(1, False), False
        if shutil.which("fio"):
            for n in (1, 4):
                ways[f"fio, {n} in flight"] = by_fio(n, False), True
                if platform.system() == "Linux":
                    ways[f"fio, {n} in flight, huge pages"] = by_fio(n, True), True
        else:
            ways["dd"] = by_dd, True
        if args.sweep:
            ways |= sweep()
        rounds: dict[str, list] = {name: [] for name in ways}
        for i in range(args.rounds):
            names = list(ways)
            for name in names[i % len(names) :] + names[: i % len(names)]:
                rounds[name].append(rate_of(ways[name][0], files, ways[name][1]))
    median = {name: statistics.median(rate for rate, _ in of) for name, of in rounds.items()}
    raw = max(rate for name, rate in median.items() if ways[name][1])
    results = {
        name: {
            "gb_per_s": round(median[name] / 1e9, 3),
            "spread_gb_per_s": round((max(of)[0] - min(of)[0]) / 1e9, 3),
            "processor_s_per_gb": round(statistics.median(s for _, s in of), 3),
            "ratio_to_fastest_raw": round(median[name] / raw, 3),
        }
        for name, of in rounds.items()
    }
    print(json.dumps({"machine": f"{platform.machine()} {platform.system()}", "ways": results}, indent=2))


def sweep() -> dict[str, tuple]:
    def sized(nbytes: int, read: Callable) -> Callable:
        def with_size(files: list[Path]) -> int:
            before, storage_reader.DIRECT_REQUEST_NBYTES = storage_reader.DIRECT_REQUEST_NBYTES, nbytes
            try:
                return read(files)
            finally:
                storage_reader.DIRECT_REQUEST_NBYTES = before

        return with_size

    return {
        f"reader, {n} in flight, {size} MB": (sized(size * MB, by_reader(n, True)), False)
        for n in (1, 2, 4, 8)
        for size in (1, 2, 4, 8, 16)
    }


if __name__ == "__main__":
    main()
