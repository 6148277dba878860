"""Measures how long queries on a file of a million recorded requests take, and how much memory.

python benchmarks/recorded.py --make requests.db --rows 1000000      # writes such a file
python benchmarks/recorded.py requests.db                            # filters by the API, then commands

Every row has one of 20 models (by Zipf's law), the same system prompt, a question and an answer of words by Zipf's law
(about 900 characters together), and two tags: `app`, one of 5, and `user`, one of 50,000. One row in 100 is an error.
It prints for each filter the seconds to the first 50 rows, and for each command those to the first line and to the
end and the peak of memory.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from slowft.requests.filters import parse
from slowft.requests.store import RequestStore

BEGAN = 1_700_000_000.0
SYSTEM = " ".join(
    ["You are the assistant of a shop. Answer in one short paragraph, politely, and in the language of the question."]
    * 3
)
AT_ONCE = 20_000  # rows in a transaction
FEW = "time<1700005000"

# what makes a query hard -> its filters
FILTERS = {
    "nothing": [],
    "a common model": ["model=model-0"],
    "a rare model": ["model=model-19"],
    "a model that is not there": ["model=gpt-9"],
    "not a model": ["model!=model-0"],
    "model contains": ["model~el-1"],
    "model contains what is not there": ["model~gpt"],
    "errors": ["status=error"],
    "broken, of which there are none": ["status=broken"],
    "a common tag": ["tag.app=shop-1"],
    "a rare tag": ["tag.user=user-49999"],
    "a tag that is not there": ["tag.user=nobody"],
    "not a tag": ["tag.app!=shop-1"],
    "tag contains": ["tag.user~er-4999"],
    "tag contains what is not there": ["tag.user~nobody"],
    "only the oldest, by time": ["time<1700000100"],
    "after everything, by time": ["time>=2100-01-01"],
    "a common text": ["text~assistant"],
    "a text of the oldest row alone": ["text~heisenbug"],
    "a text that is not there": ["text~mandelbug"],
    "not there, all of its runs in each row": ["text~one shop"],
    "answer contains": ["answer~heisenbug"],
    "text lacks": ["text!~assistant"],
    "common and common": ["model=model-0", "tag.app=shop-1", "status=complete"],
    "common and never together": ["model=model-0", "tag.of=others"],
    "common text, rare model": ["text~assistant", "model=model-19"],
    "common text, a tag that excludes it": ["text~assistant", "model=model-0", "tag.of=others"],
    "rare text, common model": ["text~heisenbug", "model=model-0"],
    "all kinds": ["model!=model-1", "status=complete", "tag.app!=shop-2", "time>=2023-11-15", "text~assistant"],
}


def rows(n: int):
    random = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlucmfwypvbgk"))
    vocabulary = ["".join(random.choice(letters, random.integers(2, 9))) for _ in range(20_000)]
    for begin in range(0, n, AT_ONCE):
        m = min(AT_ONCE, n - begin)
        words = [vocabulary[j] for j in random.zipf(1.2, 110 * m) % len(vocabulary)]
        models = random.zipf(1.6, m) % 20
        apps, users = random.integers(0, 5, m), random.integers(0, 50_000, m)
        yield [
            {
                "body": {
                    "model": f"model-{models[i]}",
                    "messages": [
                        {"role": "system", "content": SYSTEM},
                        {"role": "user", "content": " ".join(words[110 * i : 110 * i + 60])},
                    ],
                },
                "response": {
                    "choices": [{"message": {"role": "assistant", "content": answer(words, i, begin)}}],
                    "usage": {"prompt_tokens": 160, "completion_tokens": 60},
                },
                "status_code": 500 if i % 100 == 99 else 200,
                "began": BEGAN + begin + i,
                # no row of model-0 has the tag `of`, and nearly all others do
                "tags": {"app": f"shop-{apps[i]}", "user": f"user-{users[i]}"}
                | ({"of": "others"} if models[i] else {}),
            }
            for i in range(m)
        ]


def answer(words: list[str], i: int, begin: int) -> str:
    text = " ".join(words[110 * i + 60 : 110 * i + 110])
    return text if begin + i != 3 else f"A heisenbug. {text}"


def make(file: Path, n: int) -> None:
    start = time.perf_counter()
    with RequestStore(file) as store:
        for done, some in enumerate(rows(n), 1):
            store.add(some)
            if done % 5 == 0:
                print(f"{done * AT_ONCE:,} rows, {time.perf_counter() - start:.0f} s", flush=True)
    seconds = time.perf_counter() - start
    print(f"{n:,} rows, {file.stat().st_size / 1e9:.2f} GB, {seconds:.0f} s ({n / seconds:,.0f} rows a second)")


def by_filter(file: Path) -> None:
    print(f"{'filter':45} {'rows':>5} {'s':>7} {'s of a core':>12}")
    with RequestStore(file, read_only=True) as store:
        for name, filters in FILTERS.items():
            begin, used = time.perf_counter(), time.process_time()
            listed = store.list([parse(text) for text in filters])
            seconds = f"{time.perf_counter() - begin:7.3f} {time.process_time() - used:12.3f}"
            print(f"{name:45} {len(listed):5} {seconds}", flush=True)


def by_command(file: Path) -> None:
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        commands = {
            "list": ["list", "--where", "model=model-0", "--where", "text~assistant"],
            "export of few": ["export", "--output", f"{folder}/few", "--where", "model=model-1", "--where", FEW],
            "export, all, in splits": ["export", "--output", f"{folder}/all", "--valid", "0.05", "--test", "0.05"],
        }
        for name, words in commands.items():
            print(f"{name:30} {measured(file, words, Path(folder))}", flush=True)


def measured(file: Path, words: list[str], folder: Path) -> str:
    """The seconds to the first row (on standard output or in a file) and to the end, and the peak of memory."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    before = before.ru_utime + before.ru_stime
    begin, first = time.perf_counter(), None
    command = [sys.executable, "-m", "slowft", "requests", *words, "--db", str(file)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    output = Path(words[words.index("--output") + 1]) if "--output" in words else None
    os.set_blocking(process.stdout.fileno(), False)
    while process.poll() is None:
        has_row = process.stdout.read() if output is None else any(f.stat().st_size for f in output.rglob(".*.tmp"))
        if first is None and has_row:
            first = time.perf_counter() - begin
        time.sleep(0.005)
    seconds = time.perf_counter() - begin
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    cores = used.ru_utime + used.ru_stime - before
    first = seconds if first is None else first
    return f"first row {first:.2f} s, end {seconds:.1f} s ({cores:.1f} of a core), peak {used.ru_maxrss / 1024:.0f} MB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", type=Path)
    parser.add_argument("--make", type=Path)
    parser.add_argument("--rows", type=int, default=1_000_000)
    given = parser.parse_args()
    if given.make:
        make(given.make, given.rows)
    if given.file:
        by_filter(given.file)
        by_command(given.file)


if __name__ == "__main__":
    main()
