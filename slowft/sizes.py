"""Numbers of bytes as users write and read them. Comes in: "8GB". Goes out: 8000000000; and the other way."""

import re

from .errors import ConfigError


def parse_nbytes(size: str | int, what: str = "an amount of memory to work in") -> int:
    """Bytes of a size such as "8GB", "700 MB" (powers of ten, as mlx-lm has them), "8GiB", or a number of bytes.

    Raises:
        ConfigError: not such a size, or one so small that the unit must be missing.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", str(size), re.IGNORECASE)
    nbytes = match and float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper() or " ")
    if not nbytes or nbytes < 1e6:
        raise ConfigError(f"{size!r} is not {what}. Write it like 8GB or 700MB")
    return round(nbytes)


def size_in_words(nbytes: int) -> str:
    """As a person reads it: "312 bytes", "4.1 MB", "25.30 GB"."""
    if nbytes < 1e5:
        return f"{nbytes} bytes"
    return f"{nbytes / 1e6:,.1f} MB" if nbytes < 1e10 else f"{nbytes / 1e9:,.2f} GB"
