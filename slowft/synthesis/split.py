"""Shares rows out to train, valid and test by group, such as a document or a topic: never a group to two of them.

Groups go by a hash of their names, so that the order of rows does not matter, and test and valid are filled with
those that fit. What train then still shares with valid or test (runs of words, see `contamination`) leaves train.
"""

import hashlib
from collections.abc import Iterable, Mapping

from ..errors import ConfigError, DataError
from .rows import Row, prompt_of
from .shingles import normalised

SPLITS = ("train", "valid", "test")
KEYS = ("group", "document", "topic")  # of a row that says what it belongs to


def group_of(row: Row, key: str | None = None) -> str:
    """What a row belongs to: the value of `key`, or of the first of `KEYS`; else what it asks is a group.

    Raises:
        DataError: a key that the row has not.
    """
    if key is not None and key not in row:
        raise DataError(f"row {row['id']} has no {key!r} to split by. It has {', '.join(row)}")
    for name in (key,) if key else KEYS:
        if row.get(name) is not None:
            return str(row[name])
    asked = normalised(prompt_of(row) or row.get("text", ""))
    return hashlib.blake2b(asked.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def counted(groups: Iterable[str]) -> dict[str, int]:
    """Rows of each group."""
    counts: dict[str, int] = {}
    for group in groups:
        counts[group] = counts.get(group, 0) + 1
    return counts


def assign(counts: Mapping[str, int], valid: float, test: float, seed: int = 0) -> dict[str, str]:
    """The split of each group.

    Args:
        counts: rows of each group. valid, test: shares of all rows.
    Raises:
        DataError: there are fewer groups than splits that are asked for.
    """
    check_shares(valid, test)
    wanted = {name: share for name, share in (("test", test), ("valid", valid)) if share}
    if len(counts) <= len(wanted):
        raise DataError(
            f"{sum(counts.values())} rows of {len(counts)} group{'s' * (len(counts) != 1)} cannot be split into train "
            f"and {' and '.join(wanted)}: a group is never split. Make rows of more documents or topics"
        )
    left = sorted(counts, key=lambda group: (_number(group, seed), group))
    total, splits = sum(counts.values()), {}
    for split, share in wanted.items():
        room, chosen = share * total, []
        for group in left:
            if counts[group] <= room and len(left) - len(chosen) > len(wanted):
                chosen.append(group)
                room -= counts[group]
        chosen = chosen or [min(left, key=lambda group: counts[group])]  # all are larger than the share
        splits |= dict.fromkeys(chosen, split)
        left = [group for group in left if group not in splits]
    return splits | dict.fromkeys(left, "train")


def drawn(group: str, valid: float, test: float, seed: int = 0) -> str:
    """The split of a group by its name alone, where there are too many to count: shares are met about."""
    at = _number(group, seed) / 2**64
    return "test" if at < test else "valid" if at < test + valid else "train"


def check_shares(valid: float, test: float) -> None:
    """Raises ConfigError for shares of all rows that cannot be."""
    for name, share in (("valid", valid), ("test", test)):
        if not 0 <= share < 1:
            raise ConfigError(f"{name} must be a share from 0 to below 1, got {share:g}")
    if valid + test >= 1:
        raise ConfigError(f"valid and test are {valid:g} and {test:g}: nothing is left to train on")


def _number(group: str, seed: int) -> int:
    digest = hashlib.blake2b(f"{seed}\0{group}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")
