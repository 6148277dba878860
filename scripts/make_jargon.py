"""Make slowft/data/jargon/jargon.jsonl from Debian's dict-jargon package (the Jargon File 4.4.7, public domain).

sudo apt-get install dict-jargon && python scripts/make_jargon.py
"""

import gzip
import json
import re
import sys
from pathlib import Path

SOURCE = Path("/usr/share/dictd")
TARGET = Path(__file__).parent.parent / "slowft/data/jargon/jargon.jsonl"
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
LENGTHS = range(120, 480)  # characters of a definition: long enough to say something, short enough for a demo


def number(digits: str) -> int:
    """dictd writes offsets and lengths as big-endian base-64 numbers."""
    value = 0
    for digit in digits:
        value = value * 64 + ALPHABET.index(digit)
    return value


def entries():
    """(term, definition) of the dictionary, its markup and line breaks undone."""
    text = gzip.open(SOURCE / "jargon.dict.dz").read()
    for line in (SOURCE / "jargon.index").read_text("utf-8").splitlines():
        _, offset, nbytes = line.split("\t")
        begin = number(offset)
        entry = text[begin : begin + number(nbytes)].decode("utf-8")
        head, _, body = entry.partition("\n\n")
        term = head.splitlines()[0].strip()
        body = re.sub(r"\{\s*([^}]*?)\s*\}", r"\1", body)
        body = re.sub(r"\s+", " ", body).strip()
        body = re.sub(r"\s+([.,;:])", r"\1", body)
        yield term, body


if __name__ == "__main__":
    if not (SOURCE / "jargon.dict.dz").exists():
        sys.exit(f"{SOURCE}/jargon.dict.dz is not there. Run sudo apt-get install dict-jargon, on Debian or Ubuntu")
    seen = {}
    for term, definition in entries():
        if len(definition) in LENGTHS and not term.startswith("00-"):
            seen.setdefault(term, definition)
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    with open(TARGET, "w", encoding="utf-8") as file:
        for term in sorted(seen, key=str.lower):
            sample = {"prompt": f"What do hackers mean by “{term}”?", "completion": seen[term]}
            file.write(json.dumps(sample, ensure_ascii=False) + "\n")
    print(f"{TARGET}: {len(seen)} entries")
