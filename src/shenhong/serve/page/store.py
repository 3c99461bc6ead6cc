"""Chats, messages, jobs and their events in one SQLite file (WAL), used from one thread.

Everything belongs to an owner, and every look-up names one: the id of a chat alone opens nothing. An event of a job
is in the file before it is sent to anyone, so what a reader has seen is never lost by a restart.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import sqlite3
import stat
import sys
import time
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from shenhong import domains
from shenhong.errors import RequestError, ServeError
from shenhong.serve.settings import Limits

FORMAT = 1
CHANGES_KEPT = 10_000
EVENTS_KEPT_SECONDS = 24 * 3600  # of ended jobs; the message itself stays
SCHEMA = """
CREATE TABLE chat (id TEXT PRIMARY KEY, owner TEXT NOT NULL, title TEXT NOT NULL, created REAL NOT NULL,
  updated REAL NOT NULL, leaf TEXT);
CREATE INDEX chat_of ON chat (owner, updated);
CREATE TABLE message (id TEXT PRIMARY KEY, chat TEXT NOT NULL REFERENCES chat ON DELETE CASCADE, parent TEXT,
  role TEXT NOT NULL, parts TEXT NOT NULL, text TEXT NOT NULL, model TEXT, settings TEXT, job TEXT,
  state TEXT NOT NULL, created REAL NOT NULL, usage TEXT, timing TEXT);
CREATE INDEX message_of ON message (chat);
CREATE TABLE job (id TEXT PRIMARY KEY, owner TEXT NOT NULL, chat TEXT NOT NULL REFERENCES chat ON DELETE CASCADE,
  message TEXT NOT NULL, state TEXT NOT NULL, ended REAL);
CREATE TABLE job_event (job TEXT NOT NULL REFERENCES job ON DELETE CASCADE, number INTEGER NOT NULL,
  kind TEXT NOT NULL, data TEXT NOT NULL, PRIMARY KEY (job, number)) WITHOUT ROWID;
CREATE TABLE change (id INTEGER PRIMARY KEY AUTOINCREMENT, owner TEXT NOT NULL, data TEXT NOT NULL);
"""
_JSON = ("parts", "settings", "usage", "timing")
_MESSAGE = "id, chat, parent, role, parts, model, settings, job, state, created, usage, timing"
_COLUMNS = {
    "chat": "id, owner, title, created, updated, leaf",
    "message": f"text, {_MESSAGE}",
    "job": "id, owner, chat, message, state, ended",
    "job_event": "job, number, kind, data",
    "change": "id, owner, data",
}


MESSAGE_BYTES = 512  # of a message beside its parts
SIZES = f"""SELECT chat.owner, chat.id,
  total(length(CAST(message.parts AS BLOB)) + {MESSAGE_BYTES}) FROM chat LEFT JOIN message ON message.chat = chat.id
  GROUP BY chat.id"""


def size_of(messages: Iterable[dict[str, Any]]) -> int:
    """Bytes of messages, more or less."""
    return sum(
        len(json.dumps(message["parts"], ensure_ascii=False).encode("utf-8", "replace"))
        + MESSAGE_BYTES
        for message in messages
    )


def new_id() -> str:
    return uuid.uuid4().hex


def text_of(parts: Iterable[dict[str, Any]]) -> str:
    """What a message says, for searching and for the model's next turn; thinking and errors are not part of it."""
    return "\n".join(
        _text_of(part) for part in parts if part.get("type") not in ("reasoning", "error")
    )


def _text_of(part: dict[str, Any]) -> str:
    """A part that a domain made is read by that domain."""
    kind = part.get("type")
    if kind != "text" and isinstance(kind, str) and kind in domains.names():
        return domains.domain(kind).part_text(part)
    return str(part.get("text", ""))


class Store:
    """Open it in the thread that uses it. Errors: ServeError where the file cannot be used."""

    def __init__(self, path: Path, limits: Limits | None = None) -> None:
        self.path, self.limits = path, limits or Limits()
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock = _private(path.with_name(f".{path.name}.lock"))
        except OSError as error:
            raise self._unusable(error) from None
        try:
            # Two servers would end each other's jobs; the kernel releases this even after a kill.
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.db = self._open()
        except BlockingIOError:
            os.close(self._lock)
            raise ServeError(
                f"{path} is in use by another server; stop that one, or choose another folder with --data"
            ) from None
        except (sqlite3.DatabaseError, ValueError) as error:  # names in it may be no text at all
            if isinstance(error, sqlite3.OperationalError) and not _damaged(error):
                raise ServeError(
                    f"cannot open {path} ({error}); check the folder or choose another with --data"
                ) from None
            self._set_aside(" ".join(str(error).split())[:100])
            self.db = self._open()

    def _unusable(self, error: OSError) -> ServeError:
        return ServeError(
            f"cannot write in {self.path.parent}: {error.strerror}; choose another folder with --data"
        )

    def _open(self) -> sqlite3.Connection:
        try:  # SQLite gives the files beside it the rights of the file itself
            for part in _parts(self.path):
                if part == self.path or part.exists():
                    os.close(_private(part))
        except OSError as error:
            raise self._unusable(error) from None
        db = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
        try:
            db.row_factory = sqlite3.Row
            db.text_factory = lambda raw: raw.decode("utf-8", "replace")
            db.execute("PRAGMA busy_timeout = 5000")
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = NORMAL")
            db.execute("PRAGMA foreign_keys = ON")
            found = db.execute("PRAGMA integrity_check(1)").fetchone()[0]
            if found != "ok":
                raise sqlite3.DatabaseError(found)
            if db.execute("PRAGMA foreign_key_check").fetchone():
                raise sqlite3.DatabaseError("rows of one table do not fit those of another")
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if version > FORMAT:
                raise ServeError(
                    f"{self.path} was written by a newer version; use that one, or another folder with --data"
                )
            if version < FORMAT:
                db.executescript(f"BEGIN; {SCHEMA} PRAGMA user_version = {FORMAT}; COMMIT;")
            for table, names in _COLUMNS.items():
                db.execute(f"SELECT {names} FROM {table} LIMIT 1").fetchone()
            self._sizes = dict[str, dict[str, int]]()  # of chats, by owner
            for owner, chat, size in db.execute(SIZES):
                self._grew(owner, chat, int(size))
        except BaseException:
            db.close()
            raise
        return db

    def _set_aside(self, error: str) -> None:
        stamp = time.strftime("%Y%m%d-%H%M%S")
        aside = self.path.with_name(f"{self.path.name}.damaged-{stamp}-{new_id()[:6]}")
        try:
            for part, kept in zip(_parts(self.path), _parts(aside), strict=True):
                if part.exists():
                    part.rename(kept)
        except OSError as reason:
            raise ServeError(
                f"{self.path} is damaged ({error}) and cannot be moved: {reason.strerror}"
            ) from None
        print(
            f"shenhong: {self.path} is damaged ({error}); it is now {aside.name} and an empty one is begun",
            file=sys.stderr,
            flush=True,
        )

    def close(self) -> None:
        self.db.close()
        os.close(self._lock)

    # ---------------------------------------------------------------- chats

    def chats(self, owner: str, limit: int, before: float | None) -> list[dict[str, Any]]:
        """Newest first."""
        rows = self.db.execute(
            """SELECT id, title, created, updated FROM chat WHERE owner = ? AND updated < ?
               ORDER BY updated DESC LIMIT ?""",
            (owner, before if before is not None else 1e18, limit),
        )
        return [dict(row) for row in rows]

    def size(self, owner: str, chat: str) -> int | None:
        """Bytes of a chat, more or less; None where there is no such chat. Any thread may ask."""
        return self._sizes.get(owner, {}).get(chat)

    def _grow(self, owner: str, chat: str | None, by: int) -> None:
        """Error: RequestError where a chat, or a new one, may not grow by so much."""
        sizes, limits = self._sizes.get(owner, {}), self.limits
        for full, what in (
            (chat is None and len(sizes) >= limits.max_chats, f"{limits.max_chats} chats"),
            (sum(sizes.values()) + by > limits.max_kept_bytes, f"{limits.max_kept_bytes} bytes"),
        ):
            if full:
                raise RequestError(
                    f"{what} are kept for one key; delete a chat first", code="quota"
                )
        if sizes.get(chat or "", 0) + by > limits.max_chat_bytes:
            raise RequestError(
                f"a chat may hold {limits.max_chat_bytes} bytes; begin another", code="quota"
            )

    def _grew(self, owner: str, chat: str, by: int) -> None:
        sizes = self._sizes.setdefault(owner, {})
        sizes[chat] = sizes.get(chat, 0) + by

    def chat(self, owner: str, chat: str) -> dict[str, Any] | None:
        row = self.db.execute(
            "SELECT id, title, created, updated, leaf FROM chat WHERE id = ? AND owner = ?",
            (chat, owner),
        ).fetchone()
        return dict(row) if row else None

    def whole_chat(self, owner: str, chat: str) -> dict[str, Any] | None:
        found = self.chat(owner, chat)
        return None if found is None else found | {"messages": self.messages(chat)}

    def messages(self, chat: str) -> list[dict[str, Any]]:
        rows = self.db.execute(
            f"SELECT {_MESSAGE} FROM message WHERE chat = ? ORDER BY created, rowid", (chat,)
        )
        return [_message(row) for row in rows]

    def message(self, message: str) -> dict[str, Any] | None:
        row = self.db.execute(f"SELECT {_MESSAGE} FROM message WHERE id = ?", (message,)).fetchone()
        return _message(row) if row else None

    def create_chat(
        self,
        owner: str,
        title: str,
        messages: list[dict[str, Any]] | None = None,
        leaf: str | None = None,
    ) -> dict[str, Any]:
        by = size_of(messages or [])
        self._grow(owner, None, by)
        now = time.time()
        id = new_id()
        chat = {"id": id, "title": title, "created": now, "updated": now, "leaf": leaf}
        with self._writing():
            self.db.execute(
                "INSERT INTO chat (id, title, created, updated, leaf, owner) VALUES (?, ?, ?, ?, ?, ?)",
                (*chat.values(), owner),
            )
            for message in messages or []:
                self._insert(message | {"chat": id})
            self._change(owner, {"kind": "chat", "chat": id})
        self._grew(owner, id, by)
        return chat | {"messages": self.messages(id)}

    def change_chat(self, owner: str, chat: str, changes: dict[str, Any]) -> dict[str, Any] | None:
        with self._writing():
            for name in ("title", "leaf"):
                if name in changes:
                    self.db.execute(
                        f"UPDATE chat SET {name} = ? WHERE id = ? AND owner = ?",
                        (changes[name], chat, owner),
                    )
            self._change(owner, {"kind": "chat", "chat": chat})
        return self.chat(owner, chat)

    def delete_chat(self, owner: str, chat: str) -> bool:
        with self._writing():
            count = self.db.execute(
                "DELETE FROM chat WHERE id = ? AND owner = ?", (chat, owner)
            ).rowcount
            if count:
                self._change(owner, {"kind": "deleted", "chat": chat})
        if count:
            self._sizes.get(owner, {}).pop(chat, None)
        return bool(count)

    # ---------------------------------------------------------------- turns and jobs

    def add_turn(
        self, owner: str, chat: str, title: str | None, user: dict | None, answers: list[dict]
    ) -> None:
        """A user message, the answers that were started to it, each with its job, or both; all or nothing."""
        messages = [*([user] if user else []), *answers]
        by = size_of(messages)
        self._grow(owner, chat, by)
        with self._writing():
            for message in messages:
                self._insert(message)
                self._change(owner, {"kind": "message", "chat": chat, "message": message["id"]})
            self.db.executemany(
                "INSERT INTO job (id, owner, chat, message, state) VALUES (?, ?, ?, ?, 'running')",
                [(answer["job"], owner, chat, answer["id"]) for answer in answers],
            )
            self.db.execute(
                "UPDATE chat SET leaf = ?, updated = ?, title = coalesce(?, title) WHERE id = ?",
                ((answers or messages)[0]["id"], time.time(), title, chat),
            )
            self._change(owner, {"kind": "chat", "chat": chat})
        self._grew(owner, chat, by)

    def job(self, owner: str, job: str) -> dict[str, Any] | None:
        row = self.db.execute(
            "SELECT id, chat, message, state FROM job WHERE id = ? AND owner = ?", (job, owner)
        ).fetchone()
        return dict(row) if row else None

    def job_events(self, job: str, after: int) -> list[tuple[int, str, str]]:
        """(number, kind, data as JSON) of the events after number `after`."""
        rows = self.db.execute(
            "SELECT number, kind, data FROM job_event WHERE job = ? AND number > ? ORDER BY number",
            (job, after),
        )
        return [tuple(row) for row in rows]

    def add_job_events(self, job: str, events: list[tuple[int, str, str]]) -> bool:
        """False where the job is gone with its chat."""
        try:
            with self._writing():
                self.db.executemany(
                    "INSERT INTO job_event (job, number, kind, data) VALUES (?, ?, ?, ?)",
                    [(job, *event) for event in events],
                )
        except sqlite3.IntegrityError:
            return False
        return True

    def end_job(self, owner: str, job: str, number: int, message: dict[str, Any]) -> bool:
        """The finished message and the event that ends its job. False where the chat is gone."""
        try:
            with self._writing():
                self._end(owner, job, number, message)
        except sqlite3.IntegrityError:
            return False
        self._grew(owner, message["chat"], size_of([message]) - MESSAGE_BYTES)
        return True

    def _end(self, owner: str, job: str, number: int, message: dict[str, Any]) -> None:
        self.db.execute(
            "UPDATE message SET parts = ?, text = ?, state = ?, usage = ?, timing = ? WHERE id = ?",
            (
                json.dumps(message["parts"], ensure_ascii=False),
                text_of(message["parts"]),
                message["state"],
                json.dumps(message.get("usage")),
                json.dumps(message.get("timing")),
                message["id"],
            ),
        )
        failed = message["state"] == "error"
        data = {"message": message["parts"][-1].get("message", "")} if failed else {}
        self.db.execute(
            "INSERT INTO job_event (job, number, kind, data) VALUES (?, ?, ?, ?)",
            (job, number, "failed" if failed else "done", json.dumps(data, ensure_ascii=False)),
        )
        self.db.execute(
            "UPDATE job SET state = 'ended', ended = ? WHERE id = ?", (time.time(), job)
        )
        self._change(owner, {"kind": "message", "chat": message["chat"], "message": message["id"]})

    def recover(self) -> None:
        """At the start: jobs that a kill cut short keep what they had written; old events are cleared."""
        rows = self.db.execute(
            "SELECT id, owner, message FROM job WHERE state = 'running'"
        ).fetchall()
        for row in rows:
            message = self.message(row["message"])
            events = self.job_events(row["id"], 0)
            with self._writing():
                if message is None:
                    self.db.execute("UPDATE job SET state = 'ended' WHERE id = ?", (row["id"],))
                    continue
                texts: dict[str, str] = {}
                for _, _, data in events:
                    with contextlib.suppress(ValueError, KeyError, TypeError):  # damaged
                        delta = json.loads(data)
                        texts[delta["part"]] = texts.get(delta["part"], "") + delta["text"]
                parts = [{"type": kind, "text": text} for kind, text in sorted(texts.items())]
                last = events[-1][0] if events else 0
                self._end(
                    row["owner"],
                    row["id"],
                    last + 1,
                    message | {"parts": parts, "state": "stopped"},
                )
        with self._writing():
            self.db.execute(
                """DELETE FROM job_event WHERE kind = 'delta' AND job IN
                     (SELECT id FROM job WHERE state = 'ended' AND ended < ?)""",
                (time.time() - EVENTS_KEPT_SECONDS,),
            )

    # ---------------------------------------------------------------- changes for other tabs

    def changes(self, owner: str, after: int) -> list[tuple[int, dict[str, Any] | None]]:
        """The next few (number, {kind: "chat" | "message" | "deleted", chat, message?: as it is now}); None: damaged."""
        rows = self.db.execute(
            "SELECT id, data FROM change WHERE owner = ? AND id > ? ORDER BY id LIMIT 20",
            (owner, after),
        ).fetchall()
        found: list[tuple[int, dict[str, Any] | None]] = []
        for number, data in rows:
            try:
                change = json.loads(data)
                if "message" in change:
                    change["message"] = self.message(change["message"])
            except (ValueError, TypeError):
                change = None  # the tabs read the chats anew when they are opened
            found.append((number, change))
        return found

    def last_change(self) -> int:
        return self.db.execute("SELECT coalesce(max(id), 0) FROM change").fetchone()[0]

    def _change(self, owner: str, data: dict[str, Any]) -> None:
        number = self.db.execute(
            "INSERT INTO change (owner, data) VALUES (?, ?)", (owner, json.dumps(data))
        ).lastrowid
        assert number is not None
        if number % 1000 == 0:
            self.db.execute("DELETE FROM change WHERE id <= ?", (number - CHANGES_KEPT,))

    # ---------------------------------------------------------------- below

    def _insert(self, message: dict[str, Any]) -> None:
        values = {
            name: json.dumps(message.get(name), ensure_ascii=False)
            if name in _JSON
            else message.get(name)
            for name in _MESSAGE.split(", ")
        }
        values["text"] = text_of(message["parts"])
        names = ", ".join(values)
        marks = ", ".join("?" * len(values))
        self.db.execute(f"INSERT INTO message ({names}) VALUES ({marks})", tuple(values.values()))

    def _writing(self) -> _Transaction:
        return _Transaction(self.db)


def _parts(path: Path) -> list[Path]:
    """The files of a database."""
    return [path.with_name(path.name + end) for end in ("", "-wal", "-shm")]


def _private(path: Path) -> int:
    """A file, made if it is not there, that from now on its owner alone may read. Error: OSError."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)
    try:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise OSError(errno.EINVAL, f"{path.name} is no regular file")
        os.fchmod(file, 0o600)
    except OSError:
        os.close(file)
        raise
    return file


class _Transaction:
    """BEGIN IMMEDIATE … COMMIT, or ROLLBACK where the block raised."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self.db = db

    def __enter__(self) -> None:
        self.db.execute("BEGIN IMMEDIATE")

    def __exit__(self, kind: object, *_: object) -> None:
        if self.db.in_transaction:
            self.db.execute("COMMIT" if kind is None else "ROLLBACK")


def _damaged(error: sqlite3.Error) -> bool:
    words = str(error).lower()
    return any(word in words for word in ("no such", "malformed", "corrupt", "already exists"))


def _message(row: sqlite3.Row) -> dict[str, Any]:
    """Damage that left the file sound shows in its own message and nowhere else."""
    message = dict(row)
    for name in _JSON:
        try:
            message[name] = json.loads(row[name] or "null")
        except ValueError:
            message[name] = None
    parts = message["parts"]
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        message["parts"] = [{"type": "error", "message": "this message is damaged in the database"}]
    return message
