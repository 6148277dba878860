"""One SQLite file of recorded requests: written while an application waits for its answers, read while it is written.

Comes in: a request's body when it begins, its response when that has ended. Goes out: `Recorded` rows. A row that has
begun is in the file at once, so that a crash loses none. No header ever comes in here, a path loses its query, keys
that stand in a body are left out, and what the user's patterns match is replaced before anything is written.

Tables: `requests` (narrow: what is filtered by), `bodies` (JSON), `tags`, `texts` (FTS5: which rows
have which runs of three characters), `writers` (processes, so that rows of one that is gone are known to be broken).
"""

import hashlib
import json
import os
import queue
import re
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import platform
from ..errors import ConfigError, DataError, printable, reason_of
from . import texts
from .filters import Filter, ids
from .prices import cost

APPLICATION, FORMAT = 0x736C6674, 1  # "slft", as SQLite's application_id; of the tables below, as its user_version
BUSY_S = 10.0  # that another program's writing is waited for
READERS = 4  # connections that are kept for the next reading
AT_ONCE = 200  # rows that are fetched together
REDACTED = "[redacted]"
SECRETS = {"api_key", "api-key", "apikey", "authorization", "cookie", "cookies", "headers", "extra_headers"}
# Services say in some errors which key they were given
KEYS = re.compile(r"(?i)\bbearer\s+[^\s\"\\]+|\b(?:sk|pk|rk|gsk|xai)-[\w*.-]{6,}")
NOT_ASKED = {"stream", "stream_options", "metadata", "store"}  # of a body: changes how an answer comes, not what it is
OLDEST_SQLITE = (3, 34, 0)  # has the trigram tokenizer

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

# What a `Recorded` is made of, in the order of its fields
OF_ROW = (
    "id, began, duration_s, source, path, model, status, status_code, error, finish_reason, prompt_tokens, "
    "completion_tokens, cost, kept, relabels, conversation"
)
SELECT = f"SELECT {OF_ROW}, request, response FROM requests JOIN bodies USING (id)"
INSERT = (
    "INSERT INTO requests (began, duration_s, source, path, model, status, status_code, error, finish_reason, "
    "prompt_tokens, completion_tokens, cost, kept, relabels, writer, hash, conversation) "
    f"VALUES ({', '.join('?' * 17)})"
)


@dataclass
class Recorded:
    """A request with its answer, as the file has them.

    Attributes:
        began: seconds since 1970. duration_s: to the end of the answer.
        source: "upstream", "local", "client", "import" or "relabel".
        status: "begun", "complete", "error" or "broken".
        cost: by the user's price list, in its currency.
        kept: True, False (discarded) or None, as a training sample.
        relabels: id of the request that this one answers anew.
        conversation: the same number for requests with the same first message of the user.
        request, response: bodies; a request that was no JSON is {"unparsed": text}.
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


class RequestStore:
    """The file of recorded requests. May be used from several threads, and by several processes at a time.

    Args:
        path: the file; it is made if it is not there, for the user alone (0600).
        redact: regular expressions; what they match in any text is written as "[redacted]".
        prices: of models, see `prices.load`.
        read_only: nothing is written, not even which rows are broken.
        busy_s: for so long another program's writing is waited for.

    Raises:
        DataError: no such file, not one of these, written by a newer slowft, locked, read-only, no room.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        redact: Sequence[str] = (),
        prices: Mapping[str, Any] | None = None,
        read_only: bool = False,
        busy_s: float = BUSY_S,
    ):
        self.path, self._prices, self._read_only = Path(path).expanduser(), prices, read_only
        self._busy_s = busy_s
        self._redact = [_pattern(pattern) for pattern in redact]
        self.is_closed = False
        self._begin_here()
        if sqlite3.sqlite_version_info < OLDEST_SQLITE:
            raise DataError(f"Python has SQLite {sqlite3.sqlite_version}; recorded requests need 3.34 or later")
        if read_only and not self.path.is_file():
            raise DataError(f"{self.path} is not there. Give --db the file that `slowft serve --record` writes")
        if not read_only:
            self._make_private()
        with self._telling():
            self._writing = self._connect()
            try:
                self._open()
            except BaseException:
                self._writing.close()
                raise

    def _begin_here(self) -> None:
        """State of this process."""
        self._process = os.getpid()
        self._writer = None  # its number in the file
        self._lock = threading.Lock()  # of the connection that writes
        self._readers: queue.SimpleQueue[sqlite3.Connection] = queue.SimpleQueue()
        self._started: dict[int, float] = {}  # by id, on the monotonic clock: the wall's may be set meanwhile

    # --- Recording --------------------------------------------------------------------------------------

    def begin(self, *, path: str, body: bytes | dict, source: str, tags: Mapping[str, str] | None = None) -> int:
        """Write a request down before it is answered. Returns its id; it is in the file when this returns."""
        body, path = _parsed(body), path.partition("?")[0]  # some services take their key there
        asked, was_redacted = self._clean(body)
        values = self._of_request(asked, path, source, None if was_redacted else digest(path, body))
        values |= {"began": time.time(), "status": "begun"}
        with self._transaction() as db:
            values["writer"] = self._register(db)
            id = _insert(db, values, asked, None)
            self._set_tags(db, id, tags or {})
        self._started[id] = time.monotonic()
        return id

    def finish(
        self,
        id: int,
        *,
        response: Any,
        status_code: int | None,
        error: str | None = None,
        completion_tokens: int | None = None,
        prompt_tokens: int | None = None,
        is_broken: bool = False,
    ) -> None:
        """Write down how a request was answered.

        Args:
            response: the whole body, of a stream its pieces put together; None if there is none.
            error: what went wrong, in words.
            completion_tokens, prompt_tokens: where the response does not say.
            is_broken: the answer was cut off, by either side.
        """
        began = self._started.pop(id, None)
        duration = None if began is None else time.monotonic() - began
        response, was_redacted = self._clean(_without_keys(response, status_code))
        with self._transaction() as db:
            sql = "SELECT model, status, request, response FROM requests JOIN bodies USING (id) WHERE id = ?"
            row = db.execute(sql, [id]).fetchone()
            if row is None:
                raise DataError(f"{self.path} has no request {id}")
            model, status, *before = row
            if status != "begun":  # such as one that another process took for broken
                _index(db, id, *before, is_there=True)
            values = self._of_response(model, response, status_code, error, completion_tokens, prompt_tokens, is_broken)
            values |= {"writer": None} | ({} if duration is None else {"duration_s": duration})
            values |= {"hash": None} if was_redacted else {}
            db.execute(
                f"UPDATE requests SET {', '.join(f'{name} = ?' for name in values)} WHERE id = ?",
                [*values.values(), id],
            )
            db.execute("UPDATE bodies SET response = ? WHERE id = ?", [_json(response), id])
            _index(db, id, before[0], _json(response))

    def add(self, rows: Iterable[Mapping[str, Any]]) -> int:
        """Write requests that are over, all of them or none. Returns how many.

        Args:
            rows: with "body", "response" and if it is known "path", "source", "tags", "status_code", "error", "began",
                "duration_s", "prompt_tokens", "completion_tokens", "is_broken", "kept", "relabels".
        """
        n = 0
        with self._transaction() as db:
            for row in rows:
                body = _parsed(row["body"])
                asked, was_redacted = self._clean(body)
                response, was_too = self._clean(_without_keys(row.get("response"), row.get("status_code")))
                path = str(row.get("path") or "/v1/chat/completions").partition("?")[0]
                key = None if was_redacted or was_too else digest(path, body)
                values = self._of_request(asked, path, row.get("source", "import"), key)
                how = ("status_code", "error", "completion_tokens", "prompt_tokens")
                values |= self._of_response(
                    values["model"], response, *(row.get(k) for k in how), bool(row.get("is_broken"))
                )
                values |= {"began": row.get("began") or time.time(), "duration_s": row.get("duration_s")}
                values |= {"kept": row.get("kept"), "relabels": row.get("relabels")}
                id = _insert(db, values, asked, response)
                _index(db, id, _json(asked), _json(response))
                self._set_tags(db, id, row.get("tags") or {})
                n += 1
        return n

    def tag(self, id: int, name: str, value: str | None) -> None:
        """Give a request a tag, in place of its value before; None takes it away."""
        with self._transaction() as db:
            self._must_be_there(db, id)
            self._set_tags(db, id, {name: value})

    def keep(self, id: int, kept: bool | None) -> None:
        """Keep (True) or discard (False) a request as a training sample; None: neither."""
        with self._transaction() as db:
            self._must_be_there(db, id)
            db.execute("UPDATE requests SET kept = ? WHERE id = ?", [kept, id])

    def mark(self, ids: Sequence[int], tags: Mapping[str, str | None], kept: bool | None = None) -> None:
        """Tag many requests, and keep or discard them, all or none; with `kept` None that stays as it is."""
        with self._transaction() as db:
            for id in ids:
                self._must_be_there(db, id)
                self._set_tags(db, id, tags)
                if kept is not None:
                    db.execute("UPDATE requests SET kept = ? WHERE id = ?", [kept, id])

    # --- Asking -----------------------------------------------------------------------------------------

    def cached(self, path: str, body: bytes | dict) -> Recorded | None:
        """The newest complete answer to an equal request: the same path, and the same JSON in any order and spacing.

        Whether it was streamed, and what `metadata` it had, makes no difference.
        """
        key = digest(path.partition("?")[0], _parsed(body))
        with self._reading() as db:
            sql = f"{SELECT} WHERE hash = ? AND status = 'complete' ORDER BY id DESC LIMIT 1"
            found = _recorded(db, db.execute(sql, [key]).fetchall())
        return found[0] if found else None

    def list(self, filters: Sequence[Filter] = (), before_id: int | None = None, limit: int = 50) -> Sequence[Recorded]:
        """The newest rows that all filters are true of; `before_id` goes on below the last row of a page."""
        sql, values = ids(filters, newest_first=True, beyond=before_id)
        with self._reading() as db:
            return _by_id(db, [id for (id,) in db.execute(f"{sql} LIMIT ?", [*values, limit])])

    def rows(self, filters: Sequence[Filter] = (), newest_first: bool = False) -> Iterator[Recorded]:
        """All of them, one after the other, as they are in the file now; few are in memory at a time."""
        sql, values = ids(filters, newest_first)
        with self._reading() as db:
            db.execute("BEGIN")
            try:
                found = db.execute(sql, values)
                while some := [id for (id,) in found.fetchmany(AT_ONCE)]:
                    yield from _by_id(db, some)
            finally:
                db.execute("ROLLBACK")

    def ids(self, filters: Sequence[Filter] = ()) -> Sequence[int]:
        """Ids of all rows that all filters are true of, the oldest first."""
        sql, values = ids(filters, newest_first=False)
        with self._reading() as db:
            return [id for (id,) in db.execute(sql, values)]

    def count(self, filters: Sequence[Filter] = ()) -> int:
        """How many rows all filters are true of."""
        sql, values = ids(filters, newest_first=False)
        with self._reading() as db:
            return db.execute(f"SELECT count(*) FROM ({sql})", values).fetchone()[0]

    def get(self, id: int) -> Recorded:
        """One request.

        Raises:
            DataError: there is none of that id.
        """
        with self._reading() as db:
            found = _by_id(db, [id])
        if not found:
            raise DataError(f"{self.path} has no request {id}. `slowft requests list` shows which there are")
        return found[0]

    def relabelled(self, id: int) -> Sequence[int]:
        """Ids of the rows that answer this one anew."""
        with self._reading() as db:
            return [one for (one,) in db.execute("SELECT id FROM requests WHERE relabels = ? ORDER BY id", [id])]

    def close(self) -> None:
        """Mark what was begun here and not finished as broken, and let go of the file."""
        if self._process != os.getpid():
            return
        with self._lock:
            if self.is_closed:
                return
            self.is_closed = True
            if self._writer is not None:
                with suppress(sqlite3.Error):  # the next opening marks them
                    self._mark_broken([self._writer])
            self._writing.close()
            while not self._readers.empty():
                self._readers.get_nowait().close()

    def remove(self) -> None:
        """Close the file and remove it: one that was made for what could not be written."""
        self.close()
        for suffix in ("", "-wal", "-shm"):
            Path(f"{self.path}{suffix}").unlink(missing_ok=True)

    def __enter__(self) -> "RequestStore":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    # --- The file ---------------------------------------------------------------------------------------

    def _make_private(self) -> None:
        """The file, and what SQLite keeps beside it (it takes the file's mode), are the user's alone."""
        try:
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600))
            for suffix in ("", "-wal", "-shm"):
                beside = Path(f"{self.path}{suffix}")
                if beside.exists() and beside.stat().st_mode & 0o077:
                    beside.chmod(0o600)
        except OSError as e:
            hint = "" if self.path.parent.is_dir() else ". Make its folder first"
            raise DataError(f"{self.path} cannot be opened for recording: {reason_of(e)}{hint}") from None

    def _connect(self) -> sqlite3.Connection:
        uri = f"{self.path.absolute().as_uri()}?mode={'ro' if self._read_only else 'rw'}"
        db = sqlite3.connect(uri, uri=True, timeout=self._busy_s, isolation_level=None, check_same_thread=False)
        db.execute("PRAGMA temp_store = FILE")  # the ids seen by an export are many
        # macOS's fsync stops at the drive's own cache. Any connection may be the one that copies the log into the file.
        db.execute("PRAGMA checkpoint_fullfsync = ON")
        return db

    def _open(self) -> None:
        db = self._writing
        db.execute("BEGIN")  # another process may be making it
        application, format = (db.execute(f"PRAGMA {of}").fetchone()[0] for of in ("application_id", "user_version"))
        is_empty = not db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        db.execute("COMMIT")
        if (application != APPLICATION and not is_empty) or (is_empty and self._read_only):
            raise DataError(f"{self.path} is no file of recorded requests. Give another --db")
        if format > FORMAT:
            raise DataError(
                f"{self.path} is of format {format}, written by a newer slowft; this one reads {FORMAT}. Upgrade slowft"
            )
        if self._read_only:
            return
        self._write_ahead(db)
        db.execute("PRAGMA synchronous = NORMAL")  # a killed process loses nothing; a power cut may lose the last rows
        if is_empty:
            with self._transaction():
                if not db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:  # nobody made it meanwhile
                    for statement in TABLES.split(";\n"):
                        db.execute(statement)
                    db.execute(f"PRAGMA application_id = {APPLICATION}")
                    db.execute(f"PRAGMA user_version = {FORMAT}")
        writers = db.execute("SELECT id, process FROM writers").fetchall()
        gone = [id for id, process in writers if not platform.is_running(process)]
        if gone:  # only then: who only reads must not wait for another program
            with self._transaction():
                self._mark_broken(gone)

    def _write_ahead(self, db: sqlite3.Connection) -> None:
        """Have readers and a writer not wait for each other. SQLite itself does not wait for this change."""
        until = time.monotonic() + self._busy_s
        while True:
            try:
                db.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError as e:
                if "locked" not in str(e) or time.monotonic() > until:
                    raise
                time.sleep(0.01)

    def _mark_broken(self, writers: Iterable[int]) -> None:
        for writer in writers:
            sql = "SELECT id, request FROM requests JOIN bodies USING (id) WHERE writer = ?"
            for id, asked in self._writing.execute(sql, [writer]).fetchall():
                self._writing.execute("UPDATE requests SET status = 'broken', writer = NULL WHERE id = ?", [id])
                _index(self._writing, id, asked, None)
            self._writing.execute("DELETE FROM writers WHERE id = ?", [writer])

    def _register(self, db: sqlite3.Connection) -> int:
        """The number of this process among those that write, from its first request on."""
        if self._writer is None:
            process = platform.identity_of_process(os.getpid())
            self._writer = db.execute("INSERT INTO writers (process) VALUES (?)", [process]).lastrowid
        return self._writer

    def _cross_fork(self) -> None:
        """A server may fork its workers: SQLite's connections must not be used by two, nor closed by the second."""
        if self._process == os.getpid():
            return
        self._of_parent = self._writing, self._readers
        self._begin_here()
        with self._telling():
            self._writing = self._connect()
            if not self._read_only:
                self._writing.execute("PRAGMA synchronous = NORMAL")

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        if self._read_only:
            raise DataError(f"{self.path} was opened for reading only")
        self._cross_fork()
        with self._telling(), self._lock:
            writer = self._writer
            self._writing.execute("BEGIN IMMEDIATE")
            try:
                yield self._writing
                self._writing.execute("COMMIT")
            except BaseException:
                self._writer = writer
                if self._writing.in_transaction:
                    self._writing.execute("ROLLBACK")
                raise

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        """A connection of its own: a long list must not keep an answer from being recorded."""
        self._cross_fork()
        with self._telling():
            try:
                db = self._readers.get_nowait()
            except queue.Empty:
                db = self._connect()
            try:
                yield db
            finally:
                if self.is_closed or self._readers.qsize() >= READERS:
                    db.close()
                else:
                    self._readers.put(db)

    @contextmanager
    def _telling(self) -> Iterator[None]:
        """SQLite's errors in one line that says what to do."""
        try:
            yield
        except sqlite3.Error as e:
            raise DataError(f"{self.path} {_what_to_do(e, self._busy_s)}") from None

    # --- What is written --------------------------------------------------------------------------------

    def _clean(self, value: Any) -> tuple[Any, bool]:
        """(the body without keys and with the user's patterns replaced, whether a pattern was found)."""
        if isinstance(value, dict):
            value = {key: v for key, v in value.items() if str(key).lower() not in SECRETS}
        if not self._redact:
            return value, False
        cleaned = self._redacted(value)
        return cleaned, cleaned != value

    def _redacted(self, value: Any) -> Any:
        if isinstance(value, str):
            for pattern in self._redact:
                value = pattern.sub(REDACTED, value)
            return value
        if isinstance(value, dict):
            return {self._redacted(key): self._redacted(v) for key, v in value.items()}
        if isinstance(value, list | tuple):
            return [self._redacted(v) for v in value]
        return value

    def _of_request(self, asked: Any, path: str, source: str, key: bytes | None) -> dict[str, Any]:
        model = asked.get("model") if isinstance(asked, dict) else None
        opening = hashlib.blake2b(_utf8(texts.opening(asked)), digest_size=6).digest()  # exact in JavaScript too
        return {
            "source": source,
            "path": _plain(self._redacted(path)),
            "model": _plain(model) if isinstance(model, str) else None,
            "hash": key,
            "conversation": int.from_bytes(opening, "little"),
        }

    def _of_response(self, model, response, status_code, error, completion_tokens, prompt_tokens, is_broken) -> dict:
        if is_broken:
            status = "broken"
        elif error is not None or (status_code or 200) >= 400 or not isinstance(response, dict):
            status = "error"
        else:
            status = "error" if response.get("error") else "complete"
        in_prompt, in_completion = texts.usage(response)
        in_prompt = prompt_tokens if in_prompt is None else in_prompt
        in_completion = completion_tokens if in_completion is None else in_completion
        return {
            "status": status,
            "status_code": status_code,
            "error": None if error is None else _plain(self._redacted(KEYS.sub(REDACTED, str(error)))),
            "finish_reason": texts.finish_reason(response),
            "prompt_tokens": in_prompt,
            "completion_tokens": in_completion,
            "cost": cost(self._prices, model, in_prompt, in_completion),
        }

    def _set_tags(self, db: sqlite3.Connection, id: int, tags: Mapping[str, str | None]) -> None:
        for name, value in tags.items():
            name = _plain(self._redacted(str(name)))
            if not name:  # of a header that was not well made: the request counts more
                continue
            db.execute("DELETE FROM tags WHERE request = ? AND name = ?", [id, name])
            if value is not None:
                db.execute("INSERT INTO tags VALUES (?, ?, ?)", [name, _plain(self._redacted(str(value))), id])

    def _must_be_there(self, db: sqlite3.Connection, id: int) -> None:
        if not db.execute("SELECT 1 FROM requests WHERE id = ?", [id]).fetchone():
            raise DataError(f"{self.path} has no request {id}. `slowft requests list` shows which there are")


def digest(path: str, body: Any) -> bytes:
    """The same for equal requests: of JSON with sorted names, without what does not change the answer."""
    if isinstance(body, dict):
        body = {key: v for key, v in body.items() if key not in NOT_ASKED and str(key).lower() not in SECRETS}
    canonical = json.dumps([path, body], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).digest()


def as_dict(row: Recorded) -> dict[str, Any]:
    """As `--json` and the playground show it."""
    return dict(vars(row))


def _pattern(pattern: str) -> re.Pattern:
    try:
        return re.compile(pattern)
    except re.error as e:
        raise ConfigError(f"--redact {pattern!r} is no regular expression: {e}") from None


def _parsed(body: bytes | str | dict) -> Any:
    if not isinstance(body, bytes | bytearray | str):
        return body
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return {"unparsed": body if isinstance(body, str) else bytes(body).decode("utf-8", "replace")}


def _without_keys(response: Any, status_code: int | None) -> Any:
    """An error's body without keys."""
    is_error = (status_code or 200) >= 400 or (isinstance(response, dict) and response.get("error"))
    return json.loads(KEYS.sub(REDACTED, json.dumps(response))) if is_error else response


def _insert(db: sqlite3.Connection, values: dict[str, Any], asked: Any, response: Any) -> int:
    id = db.execute(INSERT, [values.get(name) for name in NAMES]).lastrowid
    db.execute("INSERT INTO bodies VALUES (?, ?, ?)", [id, _json(asked) or "null", _json(response)])
    return id


NAMES = INSERT[INSERT.index("(") + 1 : INSERT.index(")")].split(", ")


def _index(db: sqlite3.Connection, id: int, request: str, response: str | None, is_there: bool = False) -> None:
    """Have what bodies, which are JSON, say found by text; `is_there`: no more."""
    both = texts.of_prompt(json.loads(request)), [] if response is None else texts.of_answer(json.loads(response))
    # the tokenizer would end at a zero character
    columns = [_plain("\n".join(said)).replace("\0", " ") for said in both]
    if is_there:
        db.execute("INSERT INTO texts (texts, rowid, prompt, answer) VALUES ('delete', ?, ?, ?)", [id, *columns])
    else:
        db.execute("INSERT INTO texts (rowid, prompt, answer) VALUES (?, ?, ?)", [id, *columns])


def _json(value: Any) -> str | None:
    if value is None:
        return None
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode()
        return text
    except UnicodeEncodeError:  # half a character, which SQLite does not take
        return json.dumps(value)


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "replace")


def _plain(text: str) -> str:
    return _utf8(text).decode()


def _by_id(db: sqlite3.Connection, found: Sequence[int]) -> list[Recorded]:
    """These rows, in this order."""
    marks = ", ".join("?" * len(found))
    rows = {row[0]: row for row in db.execute(f"{SELECT} WHERE id IN ({marks})", list(found))}
    return _recorded(db, [rows[id] for id in found if id in rows])


def _recorded(db: sqlite3.Connection, rows: Sequence[tuple]) -> list[Recorded]:
    found = []
    for *values, asked, response in rows:
        row = Recorded(*values, json.loads(asked), None if response is None else json.loads(response))
        row.kept = None if row.kept is None else bool(row.kept)
        found.append(row)
    marks = ", ".join("?" * len(found))
    by_id = {row.id: row for row in found}
    for name, value, id in db.execute(f"SELECT name, value, request FROM tags WHERE request IN ({marks})", list(by_id)):
        by_id[id].tags[name] = value
    return found


def _what_to_do(error: sqlite3.Error, busy_s: float) -> str:
    said = str(error)
    if "not a database" in said or "malformed" in said:
        return f"is no file of recorded requests that can be read ({said}). Give another --db"
    if "locked" in said or "busy" in said:
        return f"is being written by another program for {busy_s:g} s and more. Wait, or stop that program"
    if "full" in said:
        return "cannot be written: no space is left on the disk. Make room and try again"
    if "readonly" in said or "unable to open" in said:
        return f"cannot be opened ({said}). Make the file and its folder yours to write, or copy it to a folder that is"
    return f"cannot be used: {printable(said)}"
