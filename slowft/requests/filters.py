"""What recorded requests can be asked for: fields, comparisons, and the SQL that finds the rows.

Every filter is one list of ids in order, out of an index, and SQLite merges the lists (INTERSECT, EXCEPT) as they are
read. So however filters are combined, the first rows come at once, and what matches nothing takes one walk of each
index.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from ..errors import ConfigError

SIGNS = {"!=": "not", "!~": "lacks", ">=": "after", "<": "before", "=": "equal", "~": "contains"}  # longer ones first
COLUMNS = ("model", "status", "source", "path", "status_code", "finish_reason", "kept", "relabels")
TEXTS = ("text", "prompt", "answer")
INDEXED = ("model", "status")
NUMBERS = ("status_code", "relabels")
STATUSES = ("begun", "complete", "error", "broken")
SHORTEST = 3  # characters of a text to look for: the index has runs of three
KEPT = {"yes": 1, "no": 0, "": None}
ANEW = "relabelled"  # whether a request was answered anew, "yes" or "no"

EXAMPLES = "model=gpt-4o, status!=complete, tag.app~shop, text~refund, time>=2026-11-01"


@dataclass(frozen=True)
class Filter:
    """One thing that rows must be.

    Attributes:
        field: one of `COLUMNS` or `TEXTS`, "time", "relabelled", or "tag.NAME".
        op: "equal", "not", "contains", "lacks"; of time "after" (from then on) and "before"; of texts "contains" and
            "lacks" only. "not" and "lacks" are true of rows that have no such value at all.
        value: text; of time, seconds since 1970 or a date in ISO 8601.
    """

    field: str
    op: str
    value: Any

    def __post_init__(self):
        field, op = self.field, self.op
        if op not in SIGNS.values():
            raise ConfigError(f"no comparison {op!r}. Known are {', '.join(SIGNS.values())}")
        if field == "time":
            known = ("after", "before")
            object.__setattr__(self, "value", seconds(self.value))
        elif field in TEXTS:
            known = ("contains", "lacks")
        elif field == ANEW:
            known = ("equal",)
        elif field in COLUMNS or (field.startswith("tag.") and len(field) > len("tag.")):
            known = ("equal", "not", "contains", "lacks")
        else:
            raise ConfigError(f"no field {field!r}. Known are {', '.join((*COLUMNS, ANEW, *TEXTS))}, time, tag.NAME")
        if op not in known:
            raise ConfigError(f"{field} has no {op!r}, only {', '.join(known)}: such as {EXAMPLES}")
        if field in TEXTS and len(str(self.value)) < SHORTEST:
            raise ConfigError(f"{field}: {self.value!r} is too short to look for. Give {SHORTEST} characters or more")
        if field == "status" and op in ("equal", "not") and self.value not in STATUSES:
            raise ConfigError(f"no status {self.value!r}. Known are {', '.join(STATUSES)}")
        if field == "kept" and (op not in ("equal", "not") or self.value not in KEPT):
            raise ConfigError(f"kept is yes, no, or nothing (kept=), not {self.value!r}")
        if field == ANEW and self.value not in ("yes", "no"):
            raise ConfigError(f"{field} is yes or no, not {self.value!r}")
        if field in NUMBERS and op in ("equal", "not"):
            try:
                object.__setattr__(self, "value", int(self.value))
            except (TypeError, ValueError):
                raise ConfigError(f"{field} is a number, not {self.value!r}") from None


def parse(text: str) -> Filter:
    """A filter as it is written: FIELD=VALUE, != is not, ~ contains, !~ lacks; of time >= and <.

    Raises:
        ConfigError: it is none.
    """
    at, sign = min(((text.find(sign), i, sign) for i, sign in enumerate(SIGNS) if sign in text), default=(0, 0, ""))[
        ::2
    ]
    if not sign or not at:
        raise ConfigError(f"{text!r} is no filter. Write such as {EXAMPLES}")
    return Filter(text[:at].strip(), SIGNS[sign], text[at + len(sign) :].strip())


def seconds(value: Any) -> float:
    """Seconds since 1970 of a date or time, which is local unless it says otherwise."""
    try:
        return float(value)
    except (TypeError, ValueError):
        pass
    try:
        return datetime.fromisoformat(str(value)).timestamp()
    except (ValueError, OverflowError):
        raise ConfigError(f"{value!r} is no time. Write such as 2026-11-28 or 2026-11-28T13:30") from None


def ids(filters: Sequence[Filter], newest_first: bool, beyond: int | None = None) -> tuple[str, list[Any]]:
    """(SQL, parameters) of the ids of rows, in order, that all filters are true of.

    Args:
        beyond: begin after this id.
    """
    order, limit = ("DESC", "<") if newest_first else ("ASC", ">")
    wanted: list[tuple[str, str, list[Any]]] = []  # (what the id is called there, SQL, parameters)
    unwanted: list[tuple[str, str, list[Any]]] = []
    scanned: tuple[list[str], list[Any]] = ([], [])  # conditions on columns that no index has: one walk for all
    for f in filters:
        if f.field.startswith("tag."):
            (unwanted if f.op in ("not", "lacks") else wanted).append(_of_tag(f))
        elif f.field in TEXTS:
            sql = "SELECT rowid AS id FROM texts WHERE texts MATCH ?"
            (wanted if f.op == "contains" else unwanted).append(("rowid", sql, [_match(f)]))
        elif f.field == ANEW:
            sql = "SELECT relabels AS id FROM requests INDEXED BY requests_relabels WHERE relabels IS NOT NULL"
            (wanted if f.value == "yes" else unwanted).append(("relabels", sql, []))
        elif f.field == "kept" and f.op == "equal" and f.value:
            sql = "SELECT id FROM requests INDEXED BY requests_kept WHERE kept = ?"
            wanted.append(("id", sql, [KEPT[f.value]]))
        elif f.field in INDEXED and f.op == "equal":
            sql = f"SELECT id FROM requests INDEXED BY requests_{f.field} WHERE {f.field} = ?"
            wanted.append(("id", sql, [f.value]))
        else:
            condition, values = _of_column(f)
            scanned[0].append(condition)
            scanned[1].extend(values)
    if scanned[0] or not wanted or len(wanted) == sum(name == "relabels" for name, *_ in wanted):  # has repetitions
        conditions = " AND ".join(scanned[0] or ["1"])
        wanted.insert(0, ("id", f"SELECT id FROM requests NOT INDEXED WHERE {conditions}", scanned[1]))
    parts, values = [], []
    for word, (name, sql, given) in [("INTERSECT", one) for one in wanted] + [("EXCEPT", one) for one in unwanted]:
        parts.append(f"{word} {sql}" + (f" AND {name} {limit} ?" if beyond is not None else ""))
        values += given + ([beyond] if beyond is not None else [])
    return f"{' '.join(parts).removeprefix('INTERSECT ')} ORDER BY 1 {order}", values


def _of_tag(f: Filter) -> tuple[str, str, list[Any]]:
    name = f.field.removeprefix("tag.")
    if f.op in ("equal", "not"):
        return "request", "SELECT request AS id FROM tags WHERE name = ? AND value = ?", [name, str(f.value)]
    # by the index in order of requests: by value they would have to be sorted
    sql = "SELECT request AS id FROM tags INDEXED BY tags_of_request WHERE name = ? AND value LIKE ? ESCAPE '\\'"
    return "request", sql, [name, _like(f.value)]


def _of_column(f: Filter) -> tuple[str, list[Any]]:
    if f.field == "time":
        return ("began >= ?" if f.op == "after" else "began < ?"), [f.value]
    if f.field == "kept":
        return ("kept IS ?" if f.op == "equal" else "kept IS NOT ?"), [KEPT[f.value]]
    if f.op in ("equal", "not"):
        return f"{f.field} IS {'NOT ' * (f.op == 'not')}?", [f.value]
    condition = f"{f.field} LIKE ? ESCAPE '\\'"
    return (condition if f.op == "contains" else f"({condition}) IS NOT 1"), [_like(f.value)]


def _like(text: Any) -> str:
    escaped = "".join(f"\\{c}" if c in "\\%_" else c for c in str(text))
    return f"%{escaped}%"


def _match(f: Filter) -> str:
    """FTS5's expression: runs of three characters, one after the other, are the text as it stands."""
    columns = "" if f.field == "text" else f"{f.field} : "
    quoted = str(f.value).replace("\0", " ").replace('"', '""')
    return f'{columns}"{quoted}"'
