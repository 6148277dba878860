"""Divides rows into train, valid and test by group, such as a document or a topic. A group is never in two of them.

Groups are ordered by a hash of their names, so that the order of rows does not matter. Test and valid are filled with
those that fit. Rows of train that still share runs of words with valid or test are left out (see `contamination`).
"""

import hashlib
from collections.abc import Iterable, Mapping

from ..errors import ConfigError, DataError
from .rows import Row, prompt_of
from .shingles import normalised

SPLITS = ("train", "valid", "test")
KEYS = ("group", "document", "topic")  # fields of a row that may name its group


def group_of(row: Row, key: str | None = None) -> str:
    """A row's group: the value of `key`, or of the first of `KEYS` that it has. Otherwise its question is the group.

    Raises:
        DataError: the row does not have the key.
    """
    if key is not None and key not in row:
        raise DataError(f"row {row['id']} has no {key!r} to split by. It has {', '.join(row)}")
    for name in (key,) if key else KEYS:
        if row.get(name) is not None:
            return str(row[name])
    asked = normalised(prompt_of(row) or row.get("text", ""))
    return hashlib.blake2b(asked.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def counted(groups: Iterable[str]) -> dict[str, int]:
    """How many rows each group has."""
    counts: dict[str, int] = {}
    for group in groups:
        counts[group] = counts.get(group, 0) + 1
    return counts


def assign(counts: Mapping[str, int], valid: float, test: float, seed: int = 0) -> dict[str, str]:
    """The split of each group.

    Args:
        counts: rows of each group. valid, test: shares of all rows.
    Raises:
        DataError: there are fewer groups than splits.
    """
    check_shares(valid, test)
    shares = {name: share for name, share in (("test", test), ("valid", valid)) if share}
    if len(counts) <= len(shares):
        raise DataError(
            f"{sum(counts.values())} rows of {len(counts)} group{'s' * (len(counts) != 1)} cannot be split into train "
            f"and {' and '.join(shares)}: a group is never split. Make rows of more documents or topics"
        )
    remaining = sorted(counts, key=lambda group: (_number(group, seed), group))
    total, splits = sum(counts.values()), {}
    for split, share in shares.items():
        room, chosen = share * total, []
        for group in remaining:
            if counts[group] <= room and len(remaining) - len(chosen) > len(shares):
                chosen.append(group)
                room -= counts[group]
        chosen = chosen or [min(remaining, key=lambda group: counts[group])]  # every group is larger than the share
        splits |= dict.fromkeys(chosen, split)
        remaining = [group for group in remaining if group not in splits]
    return splits | dict.fromkeys(remaining, "train")


def drawn(group: str, valid: float, test: float, seed: int = 0) -> str:
    """The split of a group by its name alone, for data with too many groups to count. Shares are approximate."""
    position = _number(group, seed) / 2**64
    return "test" if position < test else "valid" if position < test + valid else "train"


def check_shares(valid: float, test: float) -> None:
    """Raises ConfigError unless the shares of all rows are possible."""
    for name, share in (("valid", valid), ("test", test)):
        if not 0 <= share < 1:
            raise ConfigError(f"{name} must be a share from 0 to below 1, got {share:g}")
    if valid + test >= 1:
        raise ConfigError(f"valid and test are {valid:g} and {test:g}: nothing is left to train on")


def _number(group: str, seed: int) -> int:
    digest = hashlib.blake2b(f"{seed}\0{group}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")
