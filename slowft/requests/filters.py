"""Filters of recorded requests: fields, comparisons, and the SQL that finds the rows.

For every filter an index gives a list of ids in order, and SQLite merges the lists (INTERSECT, EXCEPT) as they are
read. So the first rows come at once however filters are combined, and a search that finds nothing walks through each
index once.
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
SHORTEST = 3  # characters of a text to look for, because the index has runs of three
KEPT = {"yes": 1, "no": 0, "": None}
RELABELLED = "relabelled"  # whether a request was answered again: "yes" or "no"

EXAMPLES = "model=gpt-4o, status!=complete, tag.app~shop, text~refund, time>=2026-11-01"


@dataclass(frozen=True)
class Filter:
    """One condition that rows must meet.

    Attributes:
        field: one of `COLUMNS` or `TEXTS`, "time", "relabelled", or "tag.NAME".
        op: "equal", "not", "contains" or "lacks"; for time "after" (from then on) or "before"; for texts only
            "contains" or "lacks". Rows that have no such value at all match "not" and "lacks".
        value: a text; for time, seconds since 1970 or a date in ISO 8601.
    """

    field: str
    op: str
    value: Any

    def __post_init__(self):
        field, op = self.field, self.op
        if op not in SIGNS.values():
            raise ConfigError(f"no comparison {op!r}. Known are {', '.join(SIGNS.values())}")
        if field == "time":
            ops = ("after", "before")
            object.__setattr__(self, "value", seconds(self.value))
        elif field in TEXTS:
            ops = ("contains", "lacks")
        elif field == RELABELLED:
            ops = ("equal",)
        elif field in COLUMNS or (field.startswith("tag.") and len(field) > len("tag.")):
            ops = ("equal", "not", "contains", "lacks")
        else:
            fields = ", ".join((*COLUMNS, RELABELLED, *TEXTS))
            raise ConfigError(f"no field {field!r}. Known are {fields}, time, tag.NAME")
        if op not in ops:
            raise ConfigError(f"{field} has no {op!r}, only {', '.join(ops)}: such as {EXAMPLES}")
        if field in TEXTS and len(str(self.value)) < SHORTEST:
            raise ConfigError(f"{field}: {self.value!r} is too short to look for. Give {SHORTEST} characters or more")
        if field == "status" and op in ("equal", "not") and self.value not in STATUSES:
            raise ConfigError(f"no status {self.value!r}. Known are {', '.join(STATUSES)}")
        if field == "kept" and (op not in ("equal", "not") or self.value not in KEPT):
            raise ConfigError(f"kept is yes, no, or nothing (kept=), not {self.value!r}")
        if field == RELABELLED and self.value not in ("yes", "no"):
            raise ConfigError(f"{field} is yes or no, not {self.value!r}")
        if field in NUMBERS and op in ("equal", "not"):
            try:
                object.__setattr__(self, "value", int(self.value))
            except (TypeError, ValueError):
                raise ConfigError(f"{field} is a number, not {self.value!r}") from None


def parse(text: str) -> Filter:
    """Parse a filter, such as FIELD=VALUE, with one of `SIGNS`. Raises ConfigError if the text is no filter."""
    # the first sign in the text, and the longest of those that begin there
    at, _, sign = min(((text.find(s), i, s) for i, s in enumerate(SIGNS) if s in text), default=(0, 0, ""))
    if not sign or not at:
        raise ConfigError(f"{text!r} is no filter. Write such as {EXAMPLES}")
    return Filter(text[:at].strip(), SIGNS[sign], text[at + len(sign) :].strip())


def seconds(value: Any) -> float:
    """Seconds since 1970 of a date or time. It is local time unless it names a time zone."""
    try:
        return float(value)
    except (TypeError, ValueError):
        pass
    try:
        return datetime.fromisoformat(str(value)).timestamp()
    except (ValueError, OverflowError):
        raise ConfigError(f"{value!r} is no time. Write such as 2026-11-28 or 2026-11-28T13:30") from None


def ids(filters: Sequence[Filter], newest_first: bool, beyond: int | None = None) -> tuple[str, list[Any]]:
    """The SQL that selects, in order, the ids of rows that match all filters, and its parameters.

    Args:
        beyond: the ids begin after this one.
    """
    order, limit = ("DESC", "<") if newest_first else ("ASC", ">")
    included: list[tuple[str, str, list[Any]]] = []  # (the id's column, SQL, parameters)
    excluded: list[tuple[str, str, list[Any]]] = []
    conditions, condition_values = [], []  # on columns without an index: one walk for all of them
    for f in filters:
        if f.field.startswith("tag."):
            (excluded if f.op in ("not", "lacks") else included).append(_of_tag(f))
        elif f.field in TEXTS:
            sql = "SELECT rowid AS id FROM texts WHERE texts MATCH ?"
            (included if f.op == "contains" else excluded).append(("rowid", sql, [_match(f)]))
        elif f.field == RELABELLED:
            sql = "SELECT relabels AS id FROM requests INDEXED BY requests_relabels WHERE relabels IS NOT NULL"
            (included if f.value == "yes" else excluded).append(("relabels", sql, []))
        elif f.field == "kept" and f.op == "equal" and f.value:
            sql = "SELECT id FROM requests INDEXED BY requests_kept WHERE kept = ?"
            included.append(("id", sql, [KEPT[f.value]]))
        elif f.field in INDEXED and f.op == "equal":
            sql = f"SELECT id FROM requests INDEXED BY requests_{f.field} WHERE {f.field} = ?"
            included.append(("id", sql, [f.value]))
        else:
            condition, values = _of_column(f)
            conditions.append(condition)
            condition_values += values
    # `relabels` has repetitions, which INTERSECT with another list removes
    if conditions or all(name == "relabels" for name, *_ in included):
        sql = f"SELECT id FROM requests NOT INDEXED WHERE {' AND '.join(conditions or ['1'])}"
        included.insert(0, ("id", sql, condition_values))
    statements, values = [], []
    lists = [("INTERSECT", *parts) for parts in included] + [("EXCEPT", *parts) for parts in excluded]
    for word, name, sql, parameters in lists:
        statements.append(f"{word} {sql}" + (f" AND {name} {limit} ?" if beyond is not None else ""))
        values += parameters + ([beyond] if beyond is not None else [])
    return f"{' '.join(statements).removeprefix('INTERSECT ')} ORDER BY 1 {order}", values


def _of_tag(f: Filter) -> tuple[str, str, list[Any]]:
    name = f.field.removeprefix("tag.")
    if f.op in ("equal", "not"):
        return "request", "SELECT request AS id FROM tags WHERE name = ? AND value = ?", [name, str(f.value)]
    # This index is in the order of requests. In the order of values they would have to be sorted.
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
    """FTS5's expression for a text. A phrase of runs of three characters is the text itself."""
    columns = "" if f.field == "text" else f"{f.field} : "
    quoted = str(f.value).replace("\0", " ").replace('"', '""')
    return f'{columns}"{quoted}"'
