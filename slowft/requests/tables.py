"""The tables of recorded requests in SQLite, and their rows as Python values.

`requests` is narrow and has what is filtered by, `bodies` has the JSON, and `tags` the tags. `texts` is FTS5's index of
runs of three characters. `writers` names the processes that write, so that the unfinished rows of one that is gone can
be marked as broken.
"""

import json
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from . import texts

TABLES = """
CREATE TABLE writers (id INTEGER PRIMARY KEY, process TEXT NOT NULL);
CREATE TABLE requests (
  id INTEGER PRIMARY KEY AUTOINCREMENT,
  began REAL NOT NULL,            -- seconds since 1970
  duration_s REAL,
  source TEXT NOT NULL,           -- upstream, local, client, import, relabel
  path TEXT NOT NULL,
  model TEXT,
  status TEXT NOT NULL,           -- begun, complete, error, broken
  status_code INTEGER,
  error TEXT,
  finish_reason TEXT,
  prompt_tokens INTEGER,
  completion_tokens INTEGER,
  cost REAL,
  kept INTEGER,                   -- 1 keep, 0 discard as a training sample
  relabels INTEGER,               -- the request that this one answers anew
  writer INTEGER,                 -- while it is begun
  hash BLOB,                      -- of path and body, for equal requests; null where something was redacted
  conversation INTEGER NOT NULL   -- a hash of the user's first message
);
CREATE INDEX requests_model ON requests (model);
CREATE INDEX requests_status ON requests (status);
CREATE INDEX requests_hash ON requests (hash) WHERE hash IS NOT NULL;
CREATE INDEX requests_kept ON requests (kept) WHERE kept IS NOT NULL;
CREATE INDEX requests_relabels ON requests (relabels) WHERE relabels IS NOT NULL;
CREATE INDEX requests_writer ON requests (writer) WHERE writer IS NOT NULL;
CREATE TABLE bodies (id INTEGER PRIMARY KEY, request TEXT NOT NULL, response TEXT);
CREATE TABLE tags (
  name TEXT NOT NULL, value TEXT NOT NULL, request INTEGER NOT NULL, PRIMARY KEY (name, value, request)
) WITHOUT ROWID;
CREATE INDEX tags_of_request ON tags (request, name, value);
CREATE VIRTUAL TABLE texts USING fts5(prompt, answer, content='', columnsize=0, tokenize='trigram');
"""

COMMON = (
    "began, duration_s, source, path, model, status, status_code, error, finish_reason, prompt_tokens, "
    "completion_tokens, cost, kept, relabels"
)
READ = f"id, {COMMON}, conversation"  # the columns of a `Recorded`, in the order of its fields
WRITTEN = f"{COMMON}, writer, hash, conversation"  # the columns that `insert` writes
SELECT = f"SELECT {READ}, request, response FROM requests JOIN bodies USING (id)"
INSERT = f"INSERT INTO requests ({WRITTEN}) VALUES ({', '.join('?' for _ in WRITTEN.split(', '))})"


@dataclass
class Recorded:
    """A request with its answer, as the file has them.

    Attributes:
        began: when it began, in seconds since 1970. duration_s: seconds to the end of the answer.
        source: "upstream", "local", "client", "import" or "relabel".
        status: "begun", "complete", "error" or "broken".
        cost: what it cost by the user's price list, in that list's currency.
        kept: whether it is kept (True) or discarded (False) as a training sample; None if nobody decided.
        relabels: the id of the request that this one answers again.
        conversation: a number that all requests with the same first message of the user have.
        request, response: the bodies. A request that was not JSON is {"unparsed": text}.
    """

    id: int
    began: float
    duration_s: float | None
    source: str
    path: str
    model: str | None
    status: str
    status_code: int | None
    error: str | None
    finish_reason: str | None
    prompt_tokens: int | None
    completion_tokens: int | None
    cost: float | None
    kept: bool | None
    relabels: int | None
    conversation: int
    request: Any
    response: Any
    tags: dict[str, str] = field(default_factory=dict)


def insert(db: sqlite3.Connection, values: dict[str, Any], request: Any, response: Any) -> int:
    """Write a row of `requests`, whose columns are `values`, and its bodies. Returns its id."""
    id = db.execute(INSERT, [values.get(column) for column in WRITTEN.split(", ")]).lastrowid
    db.execute("INSERT INTO bodies VALUES (?, ?, ?)", [id, to_json(request) or "null", to_json(response)])
    return id


def index_texts(db: sqlite3.Connection, id: int, request: str, response: str | None, remove: bool = False) -> None:
    """Add what two bodies, as JSON, say to the index `texts`, or remove it from there."""
    said = texts.of_prompt(json.loads(request)), [] if response is None else texts.of_answer(json.loads(response))
    # A zero character would end the text for the tokenizer.
    columns = [valid("\n".join(parts)).replace("\0", " ") for parts in said]
    if remove:
        db.execute("INSERT INTO texts (texts, rowid, prompt, answer) VALUES ('delete', ?, ?, ?)", [id, *columns])
    else:
        db.execute("INSERT INTO texts (rowid, prompt, answer) VALUES (?, ?, ?)", [id, *columns])


def with_ids(db: sqlite3.Connection, ids: Sequence[int]) -> list[Recorded]:
    """The rows that have these ids, in this order."""
    marks = ", ".join("?" * len(ids))
    rows = {row[0]: row for row in db.execute(f"{SELECT} WHERE id IN ({marks})", list(ids))}
    return recorded(db, [rows[id] for id in ids if id in rows])


def recorded(db: sqlite3.Connection, rows: Sequence[tuple]) -> list[Recorded]:
    """Rows of `SELECT` as values, with their tags."""
    by_id: dict[int, Recorded] = {}
    for *values, request, response in rows:
        row = Recorded(*values, json.loads(request), None if response is None else json.loads(response))
        row.kept = None if row.kept is None else bool(row.kept)
        by_id[row.id] = row
    marks = ", ".join("?" * len(by_id))
    for name, value, id in db.execute(f"SELECT name, value, request FROM tags WHERE request IN ({marks})", list(by_id)):
        by_id[id].tags[name] = value
    return list(by_id.values())


def to_json(value: Any) -> str | None:
    """JSON that SQLite takes; None of None."""
    if value is None:
        return None
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode()
        return text
    except UnicodeEncodeError:  # SQLite does not take half a character
        return json.dumps(value)


def valid(text: str) -> str:
    """The text with a question mark for each half of a character, which UTF-8 does not have."""
    return text.encode("utf-8", "replace").decode()
