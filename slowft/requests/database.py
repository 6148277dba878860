"""Opens the SQLite file of recorded requests, and hands out its connections: one that writes, some that read.

Readers and a writer do not wait for each other (write-ahead log). When the file is opened, unfinished rows of processes
that are gone are marked as broken. SQLite's errors become one line that says what to do.
"""

import os
import queue
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .. import platform
from ..errors import DataError, printable, reason_of
from .tables import TABLES, index_texts

APPLICATION, FORMAT = 0x736C6674, 1  # SQLite's application_id ("slft") and user_version (the format of the tables)
READERS = 4  # how many connections are kept for later reading
OLDEST_SQLITE = (3, 34, 0)  # the first that has the trigram tokenizer


class Database:
    """The file. Arguments and errors are those of `store.RequestStore`."""

    def __init__(self, path: Path, read_only: bool, busy_s: float):
        self.path, self._read_only, self._busy_s = path, read_only, busy_s
        self.is_closed = False
        self._reset()
        if sqlite3.sqlite_version_info < OLDEST_SQLITE:
            raise DataError(f"Python has SQLite {sqlite3.sqlite_version}; recorded requests need 3.34 or later")
        if read_only and not path.is_file():
            raise DataError(f"{path} is not there. Give --db the file that `slowft serve --record` writes")
        if not read_only:
            self._make_private()
        with self._explaining():
            self.writing = self._connect()
            try:
                self._open()
            except BaseException:
                self.writing.close()
                raise

    def _reset(self) -> None:
        """Set what belongs to this process alone."""
        self._process = os.getpid()
        self._writer = None  # this process's number in the table of writers
        self._lock = threading.Lock()  # held while the connection that writes is used
        self._readers: queue.SimpleQueue[sqlite3.Connection] = queue.SimpleQueue()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """The connection that writes. What is written in the block is in the file after it, or not at all."""
        if self._read_only:
            raise DataError(f"{self.path} was opened for reading only")
        self._reconnect_after_fork()
        with self._explaining(), self._lock:
            writer = self._writer
            self.writing.execute("BEGIN IMMEDIATE")
            try:
                yield self.writing
                self.writing.execute("COMMIT")
            except BaseException:
                self._writer = writer
                if self.writing.in_transaction:
                    self.writing.execute("ROLLBACK")
                raise

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """A connection of its own, so that no answer waits to be recorded while a long list is read."""
        self._reconnect_after_fork()
        with self._explaining():
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

    def writer(self, db: sqlite3.Connection) -> int:
        """The number of this process in the table of writers. Its first request enters it there."""
        if self._writer is None:
            process = platform.identity_of_process(os.getpid())
            self._writer = db.execute("INSERT INTO writers (process) VALUES (?)", [process]).lastrowid
        return self._writer

    def close(self) -> None:
        """Mark the unfinished rows of this process as broken, and close the file."""
        if self._process != os.getpid():
            return
        with self._lock:
            if self.is_closed:
                return
            self.is_closed = True
            if self._writer is not None:
                with suppress(sqlite3.Error):  # whoever opens the file next marks them
                    self._mark_broken([self._writer])
            self.writing.close()
            while not self._readers.empty():
                self._readers.get_nowait().close()

    def files(self) -> list[Path]:
        """The file, and the two that SQLite keeps next to it."""
        return [Path(f"{self.path}{suffix}") for suffix in ("", "-wal", "-shm")]

    def _make_private(self) -> None:
        """Let nobody but the user read the files. (SQLite gives the others the mode of the first.)"""
        try:
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600))
            for file in self.files():
                if file.exists() and file.stat().st_mode & 0o077:
                    file.chmod(0o600)
        except OSError as e:
            hint = "" if self.path.parent.is_dir() else ". Make its folder first"
            raise DataError(f"{self.path} cannot be opened for recording: {reason_of(e)}{hint}") from None

    def _connect(self) -> sqlite3.Connection:
        uri = f"{self.path.absolute().as_uri()}?mode={'ro' if self._read_only else 'rw'}"
        db = sqlite3.connect(uri, uri=True, timeout=self._busy_s, isolation_level=None, check_same_thread=False)
        db.execute("PRAGMA temp_store = FILE")  # an export sees many ids
        # macOS's fsync stops at the drive's own cache. Any connection may be the one that copies the log into the file.
        db.execute("PRAGMA checkpoint_fullfsync = ON")
        return db

    def _open(self) -> None:
        """Check what the file is, create the tables of a new one, and mark the rows of processes that are gone."""
        db = self.writing
        db.execute("BEGIN")  # another process may be creating the tables
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
        self._use_write_ahead_log()
        db.execute("PRAGMA synchronous = NORMAL")  # a killed process loses nothing; a power cut may lose the last rows
        if is_empty:
            with self.transaction():
                if not db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:  # no other process was faster
                    for statement in TABLES.split(";\n"):
                        db.execute(statement)
                    db.execute(f"PRAGMA application_id = {APPLICATION}")
                    db.execute(f"PRAGMA user_version = {FORMAT}")
        writers = db.execute("SELECT id, process FROM writers").fetchall()
        gone = [id for id, process in writers if not platform.is_running(process)]
        if gone:  # only then, so that a program that only reads does not wait for another one
            with self.transaction():
                self._mark_broken(gone)

    def _use_write_ahead_log(self) -> None:
        """Switch the log on. SQLite itself does not wait for another program here."""
        until = time.monotonic() + self._busy_s
        while True:
            try:
                self.writing.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError as e:
                if "locked" not in str(e) or time.monotonic() > until:
                    raise
                time.sleep(0.01)

    def _mark_broken(self, writers: Iterable[int]) -> None:
        for writer in writers:
            sql = "SELECT id, request FROM requests JOIN bodies USING (id) WHERE writer = ?"
            for id, request in self.writing.execute(sql, [writer]).fetchall():
                self.writing.execute("UPDATE requests SET status = 'broken', writer = NULL WHERE id = ?", [id])
                index_texts(self.writing, id, request, None)
            self.writing.execute("DELETE FROM writers WHERE id = ?", [writer])

    def _reconnect_after_fork(self) -> None:
        """A server may fork its workers. A child must neither use nor close SQLite's connections of its parent."""
        if self._process == os.getpid():
            return
        self._of_parent = self.writing, self._readers  # a reference to them, so that they are not closed
        self._reset()
        with self._explaining():
            self.writing = self._connect()
            if not self._read_only:
                self.writing.execute("PRAGMA synchronous = NORMAL")

    @contextmanager
    def _explaining(self) -> Iterator[None]:
        """Raise SQLite's errors as one line that says what to do."""
        try:
            yield
        except sqlite3.Error as e:
            raise DataError(f"{self.path} {_what_to_do(e, self._busy_s)}") from None


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
