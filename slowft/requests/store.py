"""The store of recorded requests: what an application asks and is answered, written while it waits, and found again.

Comes in: a request's body when it begins, and its response when that has ended. Goes out: `Recorded` rows. A request is
in the file as soon as it begins, so that a crash loses none. Headers never come in here, and a path loses its query.
Keys in a body, and what the user's patterns match, are replaced before anything is written (`redaction`).
"""

import hashlib
import json
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import DataError
from . import texts
from .database import Database
from .filters import Filter, ids
from .prices import cost
from .redaction import Redaction, without_secrets
from .tables import SELECT, Recorded, index_texts, insert, recorded, to_json, valid, with_ids

BUSY_S = 10.0  # seconds to wait while another program writes
AT_ONCE = 200  # rows that are fetched together
NOT_ASKED = {"stream", "stream_options", "metadata", "store"}  # they change how an answer comes, not what it says


class RequestStore:
    """The recorded requests of one file. It may be used by several threads and several processes at a time.

    Args:
        path: the file. It is created if it does not exist, and only the user may read it (0600).
        redact: regular expressions. What they match in any text is written as "[redacted]".
        prices: the models' prices, see `prices.load`.
        read_only: nothing is written, not even which rows are broken.
        busy_s: how many seconds to wait while another program writes.

    Raises:
        ConfigError: `redact` has something that is no regular expression.
        DataError: the file does not exist, is another kind of file, is locked or read-only, a newer slowft wrote it,
            or the disk is full. The methods raise it too.
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
        self.path, self._prices = Path(path).expanduser(), prices
        self._redaction = Redaction(redact)
        self._started: dict[int, float] = {}  # by id, on the monotonic clock, because the wall clock may be set
        self._database = Database(self.path, read_only, busy_s)

    @property
    def is_closed(self) -> bool:
        return self._database.is_closed

    # --- Recording --------------------------------------------------------------------------------------

    def begin(self, *, path: str, body: bytes | dict, source: str, tags: Mapping[str, str] | None = None) -> int:
        """Write down a request before it is answered. It is in the file when this returns its id."""
        body, path = _parsed(body), path.partition("?")[0]  # some services take their key in the query
        request, was_redacted = self._redaction.body(body)
        values = self._request_columns(request, path, source, None if was_redacted else digest(path, body))
        values |= {"began": time.time(), "status": "begun"}
        with self._database.transaction() as db:
            values["writer"] = self._database.writer(db)
            id = insert(db, values, request, None)
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
            response: the whole body; for a stream, its pieces put together; None if there is no response.
            error: what went wrong, in words.
            completion_tokens, prompt_tokens: their numbers, used where the response does not say them.
            is_broken: whether the answer was cut off, by either side.
        """
        began = self._started.pop(id, None)
        duration = None if began is None else time.monotonic() - began
        response, was_redacted = self._redaction.response(response, status_code)
        with self._database.transaction() as db:
            sql = "SELECT model, status, request, response FROM requests JOIN bodies USING (id) WHERE id = ?"
            row = db.execute(sql, [id]).fetchone()
            if row is None:
                raise DataError(f"{self.path} has no request {id}")
            model, status, request, earlier = row
            if status != "begun":  # such as one that another process has marked as broken
                index_texts(db, id, request, earlier, remove=True)
            values = self._response_columns(
                model, response, status_code, error, completion_tokens, prompt_tokens, is_broken
            )
            values |= {"writer": None} | ({} if duration is None else {"duration_s": duration})
            values |= {"hash": None} if was_redacted else {}
            db.execute(
                f"UPDATE requests SET {', '.join(f'{name} = ?' for name in values)} WHERE id = ?",
                [*values.values(), id],
            )
            db.execute("UPDATE bodies SET response = ? WHERE id = ?", [to_json(response), id])
            index_texts(db, id, request, to_json(response))

    def add(self, rows: Iterable[Mapping[str, Any]]) -> int:
        """Write requests that were answered already, all of them or none. Returns how many.

        Args:
            rows: each has "body" and "response", and may have "path", "source", "tags", "status_code", "error",
                "began", "duration_s", "prompt_tokens", "completion_tokens", "is_broken", "kept", "relabels".
        """
        n = 0
        with self._database.transaction() as db:
            for row in rows:
                body = _parsed(row["body"])
                request, was_redacted = self._redaction.body(body)
                response, was_too = self._redaction.response(row.get("response"), row.get("status_code"))
                path = str(row.get("path") or "/v1/chat/completions").partition("?")[0]
                key = None if was_redacted or was_too else digest(path, body)
                values = self._request_columns(request, path, row.get("source", "import"), key)
                arguments = (row.get(k) for k in ("status_code", "error", "completion_tokens", "prompt_tokens"))
                is_broken = bool(row.get("is_broken"))
                values |= self._response_columns(values["model"], response, *arguments, is_broken)
                values |= {"began": row.get("began") or time.time(), "duration_s": row.get("duration_s")}
                values |= {"kept": row.get("kept"), "relabels": row.get("relabels")}
                id = insert(db, values, request, response)
                index_texts(db, id, to_json(request), to_json(response))
                self._set_tags(db, id, row.get("tags") or {})
                n += 1
        return n

    def tag(self, id: int, name: str, value: str | None) -> None:
        """Set a tag of a request. None as the value removes it."""
        self.mark([id], {name: value})

    def keep(self, id: int, kept: bool | None) -> None:
        """Keep (True) or discard (False) a request as a training sample. None undoes either."""
        with self._database.transaction() as db:
            self._must_be_there(db, id)
            db.execute("UPDATE requests SET kept = ? WHERE id = ?", [kept, id])

    def mark(self, ids: Sequence[int], tags: Mapping[str, str | None], kept: bool | None = None) -> None:
        """Tag many requests and keep or discard them, all or none. If `kept` is None, that stays as it is."""
        with self._database.transaction() as db:
            for id in ids:
                self._must_be_there(db, id)
                self._set_tags(db, id, tags)
                if kept is not None:
                    db.execute("UPDATE requests SET kept = ? WHERE id = ?", [kept, id])

    # --- Asking -----------------------------------------------------------------------------------------

    def cached(self, path: str, body: bytes | dict) -> Recorded | None:
        """The newest complete answer to an equal request: see `digest`."""
        key = digest(path.partition("?")[0], _parsed(body))
        with self._database.reading() as db:
            sql = f"{SELECT} WHERE hash = ? AND status = 'complete' ORDER BY id DESC LIMIT 1"
            rows = recorded(db, db.execute(sql, [key]).fetchall())
        return rows[0] if rows else None

    def list(self, filters: Sequence[Filter] = (), before_id: int | None = None, limit: int = 50) -> Sequence[Recorded]:
        """The newest rows that match all filters. With `before_id`, those older than that row: the next page."""
        sql, values = ids(filters, newest_first=True, beyond=before_id)
        with self._database.reading() as db:
            return with_ids(db, [id for (id,) in db.execute(f"{sql} LIMIT ?", [*values, limit])])

    def rows(self, filters: Sequence[Filter] = (), newest_first: bool = False) -> Iterator[Recorded]:
        """All rows that match all filters, as they are in the file now. Only some are in memory at a time."""
        sql, values = ids(filters, newest_first)
        with self._database.reading() as db:
            db.execute("BEGIN")
            try:
                cursor = db.execute(sql, values)
                while batch := [id for (id,) in cursor.fetchmany(AT_ONCE)]:
                    yield from with_ids(db, batch)
            finally:
                db.execute("ROLLBACK")

    def ids(self, filters: Sequence[Filter] = ()) -> Sequence[int]:
        """The ids of all rows that match all filters, the oldest first."""
        sql, values = ids(filters, newest_first=False)
        with self._database.reading() as db:
            return [id for (id,) in db.execute(sql, values)]

    def count(self, filters: Sequence[Filter] = ()) -> int:
        """How many rows match all filters."""
        sql, values = ids(filters, newest_first=False)
        with self._database.reading() as db:
            return db.execute(f"SELECT count(*) FROM ({sql})", values).fetchone()[0]

    def get(self, id: int) -> Recorded:
        """One request. Raises DataError if none has that id."""
        with self._database.reading() as db:
            rows = with_ids(db, [id])
        if not rows:
            raise self._no_request(id)
        return rows[0]

    def relabelled(self, id: int) -> Sequence[int]:
        """The ids of the rows that answer this one again."""
        with self._database.reading() as db:
            return [newer for (newer,) in db.execute("SELECT id FROM requests WHERE relabels = ? ORDER BY id", [id])]

    def close(self) -> None:
        """Mark what was begun here and not finished as broken, and close the file."""
        self._database.close()

    def remove(self) -> None:
        """Close the file and remove it. This is for a file that was created for data that could not be written."""
        self.close()
        for file in self._database.files():
            file.unlink(missing_ok=True)

    def __enter__(self) -> "RequestStore":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    # --- What is written --------------------------------------------------------------------------------

    def _request_columns(self, request: Any, path: str, source: str, key: bytes | None) -> dict[str, Any]:
        model = request.get("model") if isinstance(request, dict) else None
        opening = valid(texts.opening(request)).encode()
        conversation = hashlib.blake2b(opening, digest_size=6).digest()  # 6 bytes: JavaScript has such integers exactly
        return {
            "source": source,
            "path": valid(self._redaction.value(path)),
            "model": valid(model) if isinstance(model, str) else None,
            "hash": key,
            "conversation": int.from_bytes(conversation, "little"),
        }

    def _response_columns(
        self, model, response, status_code, error, completion_tokens, prompt_tokens, is_broken
    ) -> dict[str, Any]:
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
            "error": None if error is None else valid(self._redaction.error(error)),
            "finish_reason": texts.finish_reason(response),
            "prompt_tokens": in_prompt,
            "completion_tokens": in_completion,
            "cost": cost(self._prices, model, in_prompt, in_completion),
        }

    def _set_tags(self, db: sqlite3.Connection, id: int, tags: Mapping[str, str | None]) -> None:
        for name, value in tags.items():
            name = valid(self._redaction.value(str(name)))
            if not name:  # a badly written header; the request is recorded all the same
                continue
            db.execute("DELETE FROM tags WHERE request = ? AND name = ?", [id, name])
            if value is not None:
                db.execute("INSERT INTO tags VALUES (?, ?, ?)", [name, valid(self._redaction.value(str(value))), id])

    def _must_be_there(self, db: sqlite3.Connection, id: int) -> None:
        if not db.execute("SELECT 1 FROM requests WHERE id = ?", [id]).fetchone():
            raise self._no_request(id)

    def _no_request(self, id: int) -> DataError:
        return DataError(f"{self.path} has no request {id}. `slowft requests list` shows which there are")


def digest(path: str, body: Any) -> bytes:
    """A hash that equal requests share: those with the same path and the same JSON values.

    The order and the spacing of the JSON, whether it is streamed, and its `metadata` make no difference.
    """
    if isinstance(body, dict):
        body = {key: value for key, value in without_secrets(body).items() if key not in NOT_ASKED}
    canonical = json.dumps([path, body], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).digest()


def _parsed(body: bytes | str | dict) -> Any:
    if not isinstance(body, bytes | bytearray | str):
        return body
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return {"unparsed": body if isinstance(body, str) else bytes(body).decode("utf-8", "replace")}
