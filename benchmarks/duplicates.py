"""Measures how long removing duplicates from many rows takes, and what it finds, beside datasketch's MinHash.

python benchmarks/duplicates.py                        # 100,000 rows by `slowft data dedup`, in a process of its own
python benchmarks/duplicates.py --datasketch           # also by datasketch, which must be installed (and scipy)

Rows are questions and answers of words drawn by Zipf's law. A tenth of them repeats an earlier row in capital letters
and with other signs. A tenth repeats one with every 40th word changed, so that their runs of three words agree to about
0.86. A tenth has every 8th word changed and agrees to about 0.5, which is no duplicate.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent


def write(file: Path, n: int, n_words: int) -> None:
    random = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    vocabulary = ["".join(random.choice(letters, random.integers(2, 10))) for _ in range(20_000)]
    kept: list[list[str]] = []
    with open(file, "w") as out:
        for i in range(n):
            kind = i % 10 if i > 100 else 0
            if kind in (3, 6, 9):
                words = list(kept[int(random.integers(len(kept)))])
                every = {3: 0, 6: 40, 9: 8}[kind]
                for at in range(int(random.integers(every)), len(words), every) if every else ():
                    words[at] = vocabulary[int(random.zipf(1.3)) % len(vocabulary)]
                if kind == 3:
                    words = [word.upper() + "," for word in words]
            else:
                length = int(random.integers(n_words // 2, n_words * 3 // 2))
                words = [vocabulary[j] for j in random.zipf(1.3, length) % len(vocabulary)]
                kept.append(words)
            question, answer = " ".join(words[:12]), " ".join(words[12:])
            out.write(json.dumps({"id": i, "prompt": question, "completion": answer}) + "\n")


def by_datasketch(file: Path) -> None:
    """Keep each row unless it is like one that was kept before. Prints the ids of the others, and the seconds."""
    from datasketch import MinHash, MinHashLSH

    from slowft.synthesis.duplicates import padded
    from slowft.synthesis.shingles import normalised

    begin = time.perf_counter()
    index, n, left_out = MinHashLSH(threshold=0.8, num_perm=120), 0, []
    for line in open(file):
        row = json.loads(line)
        words = padded(normalised(row["prompt"] + "\n" + row["completion"]), 3).split(" ")
        minhash = MinHash(num_perm=120)
        runs = {" ".join(words[i : i + 3]) for i in range(max(1, len(words) - 2))}
        minhash.update_batch([run.encode() for run in runs])
        if any(index_likeness(minhash, index, key) for key in index.query(minhash)):
            left_out.append(row["id"])
        else:
            index.insert(row["id"], minhash)
            KEPT[row["id"]] = minhash
        n += 1
    seconds = time.perf_counter() - begin
    print(json.dumps({"rows": n, "left_out": left_out, "seconds": seconds}))


KEPT: dict = {}


def index_likeness(minhash, index, key) -> bool:
    return minhash.jaccard(KEPT[key]) >= 0.8


def measured(arguments: list[str]) -> tuple[str, float, float]:
    """(output, seconds, peak memory in MB) of a process."""
    begin = time.perf_counter()
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{arguments} failed: {printed}")
    scale = 1e6 if sys.platform == "darwin" else 1e3
    return printed, time.perf_counter() - begin, usage.ru_maxrss / scale


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--words", type=int, default=150, help="mean number of words in a row")
    parser.add_argument("--datasketch", action="store_true")
    parser.add_argument("--file", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.file:
        by_datasketch(Path(options.file))
        return
    with tempfile.TemporaryDirectory() as directory:
        file, out, left = (Path(directory) / name for name in ("rows.jsonl", "out.jsonl", "left.jsonl"))
        write(file, options.rows, options.words)
        print(f"{options.rows:,} rows, {file.stat().st_size / 1e6:.0f} MB")
        command = [sys.executable, "-m", "slowft", "data", "dedup", str(file), "--output", str(out), "--on", "both"]
        printed, seconds, peak = measured([*command, "--left-out", str(left), "--json"])
        print(f"slowft data dedup: {seconds:.1f} s, peak {peak:.0f} MB; {printed.strip().splitlines()[-1]}")
        ours = {json.loads(line)["id"] for line in open(left)}
        print({kind: sum(i % 10 == kind for i in ours if i > 100) for kind in (3, 6, 9)}, "of kinds; others:",
              sum(i % 10 not in (3, 6, 9) for i in ours))  # fmt: skip
        if options.datasketch:
            printed, seconds, peak = measured([sys.executable, __file__, "--file", str(file)])
            theirs = set(json.loads(printed)["left_out"])
            print(f"datasketch: {seconds:.1f} s, peak {peak:.0f} MB; {len(theirs)} left out, {len(ours - theirs)} of "
                  f"ours are not among them, {len(theirs - ours)} of them not among ours")  # fmt: skip


if __name__ == "__main__":
    main()
