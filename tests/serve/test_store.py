"""The database of chats: damaged, from the future, unwritable, or cut short by a kill."""

from __future__ import annotations

import os
import random
import sqlite3
import stat
from pathlib import Path
from typing import Any

import pytest

from shenhong.errors import ServeError
from shenhong.serve.page.search import search
from shenhong.serve.page.store import Store, new_id


def message(
    chat: str, role: str = "user", parent: str | None = None, **more: Any
) -> dict[str, Any]:
    parts = [{"type": "text", "text": "床前明月光 100% a_b"}]
    plain = {
        "id": new_id(),
        "chat": chat,
        "parent": parent,
        "role": role,
        "parts": parts,
        "created": 1.0,
    }
    return plain | {"state": "done"} | more


def filled(path: Path, chats: int = 30) -> Store:
    store = Store(path)
    for number in range(chats):
        chat = store.create_chat("me", f"chat {number}")["id"]
        asked = message(chat)
        store.add_turn(
            "me", chat, None, asked, [message(chat, "assistant", asked["id"], job=new_id())]
        )
    return store


def test_any_damage_is_set_aside_with_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "whole" / "chats.db"
    filled(path).close()
    whole = path.read_bytes()
    pick, aside = random.Random(5), 0
    for trial in range(60):
        data = bytearray(whole)
        if trial % 5 == 0:
            data = data[: pick.randrange(1, len(data))]
        elif trial % 5 == 1:
            start = pick.randrange(len(data))
            data[start : start + 3000] = pick.randbytes(3000)
        elif trial % 5 == 2:
            data = bytearray(pick.randbytes(5000))
        elif trial % 5 == 3:  # a page where another belongs
            to, of = (4096 * pick.randrange(len(data) // 4096) for _ in range(2))
            data[to : to + 4096] = data[of : of + 4096]
        else:
            for _ in range(200):
                data[pick.randrange(100, len(data))] = pick.randrange(256)
        folder = tmp_path / str(trial)
        folder.mkdir()
        (folder / "chats.db").write_bytes(data)
        store = Store(folder / "chats.db")
        store.recover()
        made = store.create_chat("me", "new")
        assert (
            store.whole_chat("me", made["id"])
            and search(store.path, "me", "光", 200, None) is not None
        )
        assert store.changes("me", 0)
        store.close()
        said = capfd.readouterr().err
        kept = [p for p in folder.iterdir() if ".damaged-" in p.name]
        if kept:
            aside += 1
            assert said.count("\n") == 1 and kept[0].name.split("-wal")[0][:18] in said
        else:
            assert not said
    assert aside > 20


def test_a_foreign_database_is_set_aside_too(tmp_path: Path) -> None:
    path = tmp_path / "chats.db"
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE chat (something TEXT)")
    store = Store(path)
    assert store.chats("me", 10, None) == []
    store.close()
    assert any("damaged" in p.name for p in tmp_path.iterdir())


def test_a_newer_database_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "chats.db"
    store = filled(path, 1)
    store.db.execute("PRAGMA user_version = 99")
    store.close()
    with pytest.raises(ServeError, match="newer version"):
        Store(path)
    assert not any("damaged" in p.name for p in tmp_path.iterdir())


def test_an_unusable_place_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file" / "chats.db", tmp_path):
        with pytest.raises(ServeError, match="--data"):
            Store(path)


def test_chats_are_their_owner_s_alone_in_any_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    path = tmp_path / "chats.db"
    old = os.umask(0o022)
    try:
        with sqlite3.connect(path) as before:  # as it may lie there since long
            before.execute("PRAGMA journal_mode = WAL")
            before.execute("CREATE TABLE kept (x)")
            store = Store(path)
            assert len(list(tmp_path.iterdir())) >= 4
            for file in tmp_path.iterdir():
                assert stat.S_IMODE(file.stat().st_mode) == 0o600, file
            store.close()
    finally:
        os.umask(old)
    path = tmp_path / "pipe.db"
    os.mkfifo(path)
    with pytest.raises(ServeError, match="no regular file"):
        Store(path)


def test_one_server_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "chats.db"
    first = Store(path)
    with pytest.raises(ServeError, match="in use"):
        Store(path)
    first.close()
    Store(path).close()


def test_jobs_cut_short_keep_what_was_told(tmp_path: Path) -> None:
    path = tmp_path / "chats.db"
    store = Store(path)
    chat = store.create_chat("me", "x")["id"]
    asked = message(chat)
    answer = message(chat, "assistant", asked["id"], parts=[], state="running", job="j")
    store.add_turn("me", chat, "title", asked, [answer])
    said = [(1, "delta", '{"part": "reasoning", "text": "hm"}'), (2, "delta", '{"part": "text", "text": "月"}'), (3, "delta", '{"part": "text", "text": "光"}')]  # fmt: skip
    assert store.add_job_events("j", said)
    store.close()
    store = Store(path)
    store.recover()
    found = store.message(answer["id"])
    assert found is not None and found["state"] == "stopped"
    assert found["parts"] == [{"type": "reasoning", "text": "hm"}, {"type": "text", "text": "月光"}]
    assert [number for number, _, _ in store.job_events("j", 1)] == [2, 3, 4]
    assert store.job_events("j", 3)[0][1] == "done"
    assert store.delete_chat("me", chat) and store.job("me", "j") is None
    assert not store.add_job_events("j", [(5, "delta", "{}")])


def test_search_takes_its_text_literally_and_keeps_owners_apart(tmp_path: Path) -> None:
    store = filled(tmp_path / "chats.db", 3)
    assert len(search(store.path, "me", "明月", 10, None)) == 3
    assert search(store.path, "me", "明月", 10, None)[0]["snippet"].startswith("床前明月")
    assert len(search(store.path, "me", "100%", 10, None)) == 3
    for nothing in ("100_", "%光%", "a%b", "'; DROP TABLE chat; --"):
        assert search(store.path, "me", nothing, 10, None) == []
    assert store.chats("you", 10, None) == []
    first, *_ = store.chats("me", 10, None)
    assert store.whole_chat("you", first["id"]) is None and not store.delete_chat(
        "you", first["id"]
    )
    older = store.chats("me", 10, first["updated"])
    assert len(older) == 2
