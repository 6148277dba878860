"""A model without the blocks in its middle, which it misses least: a student to try things with.

python scripts/halve.py MODEL TO
"""

import slowft  # noqa: F401, I001  (before mlx: it loads OpenBLAS)

import sys
from pathlib import Path

from emulate_table import halve

if __name__ == "__main__":
    halve(Path(sys.argv[1]), Path(sys.argv[2]))
