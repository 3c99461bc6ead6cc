"""What one key may keep, and have under way at once: nobody else waits for it, and memory stays bounded."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from shenhong.errors import RequestError
from shenhong.serve import hub as hub_module
from shenhong.serve.http.faults import Fault
from shenhong.serve.http.large import PIECE, LargeResponse
from shenhong.serve.page import search as search_module
from shenhong.serve.page.search import search
from shenhong.serve.page.store import MESSAGE_BYTES, Store
from shenhong.serve.settings import Limits
from tests.conftest import Tiny
from tests.serve.running import FREE, Running, running
from tests.serve.test_store import message

KEYS = ("k" * 20, "l" * 20)


@pytest.fixture(scope="module")
def shared(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server of two keys. What each may read at once is less than a large chat."""
    limits = replace(FREE, max_reading_bytes=100_000, max_streams=2)
    data, runs = tmp_path_factory.mktemp("shared"), tiny.run.parent
    with running(tiny.run, data, limits=limits, keys=KEYS, runs=runs) as server:
        yield server


@pytest.fixture(scope="module")
def other(shared: Running) -> Iterator[httpx.Client]:
    key = {"Authorization": f"Bearer {KEYS[1]}"}
    with httpx.Client(base_url=shared.url, headers=key, timeout=60) as client:
        yield client


def in_the_end(asked: Callable[[], httpx.Response], status: int) -> bool:
    until = time.monotonic() + 60
    while time.monotonic() < until:
        if asked().status_code == status:
            return True
        time.sleep(0.02)
    return False


def imported(client: httpx.Client, text: str) -> str:
    said = {"id": "m", "parent": None, "role": "user", "parts": [{"type": "text", "text": text}]}
    reply = client.post("/api/chats/import", json={"title": "large", "messages": [said]})
    assert reply.status_code == 200, reply.text
    assert reply.json()["messages"][0]["parts"] == said["parts"]
    return reply.json()["id"]


@contextlib.contextmanager
def unread(server: Running, path: str) -> Iterator[None]:
    """Someone asks for this and reads nothing of it."""
    with socket.create_connection(("127.0.0.1", server.port)) as reader:
        head = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEYS[0]}\r\n\r\n"
        reader.sendall(head.encode())
        assert reader.recv(12, socket.MSG_PEEK)
        yield


@pytest.mark.parametrize("end", ["", "/export", "/export?format=markdown"])
def test_slow_readers_of_one_key_take_so_much_and_no_more(
    shared: Running, other: httpx.Client, end: str
) -> None:
    path = f"/api/chats/{imported(shared.http, '月' * 2_000_000)}{end}"
    theirs = f"/api/chats/{imported(other, '月' * 100_000)}"
    with unread(shared, path):
        for again in (path, f"/api/chats/{imported_small(shared)}"):
            reply = shared.http.get(again)
            assert reply.status_code == 429 and reply.json()["error"]["code"] == "too_many_at_once"
            assert reply.headers["retry-after"]
        assert other.get(theirs).status_code == 200
        assert shared.http.get("/api/chats").status_code == 200
    assert in_the_end(lambda: shared.http.get(path), 200)
    assert "月" * 2_000_000 in shared.http.get(path).text
    until = time.monotonic() + 60
    while shared.hub.reading._used and time.monotonic() < until:
        time.sleep(0.02)  # the reader has all of it a moment before the server counts it as read
    assert not shared.hub.reading._used


def imported_small(server: Running) -> str:
    return server.http.post("/api/chats", json={"title": "small"}).json()["id"]


def test_a_large_answer_waits_in_pieces() -> None:
    sent, closed = list[Any](), list[bool]()

    async def send(said: Any) -> None:
        sent.append(said)
        if len(sent) == 4:
            raise OSError("the reader left")

    response = LargeResponse(b"x" * (5 * PIECE + 7))
    response.closing = lambda: closed.append(True)
    for size in (4, 8):
        with contextlib.suppress(OSError):
            asyncio.run(response({"type": "http"}, None, send))  # type: ignore[arg-type]
        assert closed.pop() and len(sent) >= size
    assert max(len(said.get("body", b"")) for said in sent) == PIECE
    assert b"".join(said.get("body", b"") for said in sent[4:]) == response.body


def test_event_streams_of_one_key_are_so_many(shared: Running, other: httpx.Client) -> None:
    of_a_run = f"/api/runs/{shared.http.get('/api/runs').json()['runs'][0]['id']}/events"
    with unread(shared, "/api/events"), unread(shared, of_a_run):
        for path in ("/api/events", of_a_run):
            reply = shared.http.get(path)
            assert reply.status_code == 429 and reply.json()["error"]["code"] == "too_many_at_once"
        with other.stream("GET", "/api/events") as stream:
            assert stream.status_code == 200
    assert in_the_end(lambda: httpx.Response(200 - len(shared.hub.streams._used)), 200)


def test_a_search_holds_up_nobody_and_one_key_has_few(
    shared: Running, other: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    imported(other, "春眠不觉晓")
    begun, ends = threading.Semaphore(0), threading.Event()

    def slow(*args: Any) -> Any:
        if args[2] == "slow":
            begun.release()
            assert ends.wait(60)
        return search(*args)

    monkeypatch.setattr(hub_module, "search", slow)
    asked = {"url": "/api/chats", "params": {"search": "slow"}}
    threads = [
        threading.Thread(target=lambda: shared.http.get(**asked))
        for _ in range(hub_module.SEARCHES)
    ]
    try:
        for thread in threads:
            thread.start()
            assert begun.acquire(timeout=60)
        assert shared.http.get(**asked).status_code == 429
        assert shared.http.get("/api/chats").status_code == 200
        (found,) = other.get("/api/chats", params={"search": "不觉"}).json()["chats"]
        assert found["snippet"] == "春眠不觉晓"
    finally:
        ends.set()
        for thread in threads:
            thread.join()
    assert shared.http.get(**asked).status_code == 200


def test_a_search_ends_in_time_with_what_it_found(tmp_path: Path) -> None:
    store = Store(tmp_path / "chats.db")
    for number in range(300):
        texts = [{"type": "text", "text": "a" * 2000}]
        store.create_chat("me", f"{number}", [message("", parts=texts)])
    now = [0.0]

    def clock() -> float:
        now[0] += search_module.SECONDS / 50  # every look at it takes so long
        return now[0]

    assert search(store.path, "me", "a" * 199 + "b", 50, None, clock) == []
    assert now[0] < 2 * search_module.SECONDS
    now[0] = 0.0
    found = search(store.path, "me", "A" * 199, 200, None, clock)
    assert 0 < len(found) < 100 and found[0]["title"] == "299"
    assert len(found[0]["snippet"]) < 300  # and not all that was said
    assert len(search(store.path, "me", "A" * 199, 200, None)) == 200
    store.close()


def test_one_key_keeps_so_much(tmp_path: Path) -> None:
    large = [{"type": "text", "text": "x" * 5000}]
    limits = Limits(max_chats=3, max_chat_bytes=12_000, max_kept_bytes=20_000)
    path = tmp_path / "chats.db"
    store = Store(path, limits)
    chat = store.create_chat("me", "x")["id"]
    for _ in range(2):
        store.add_turn("me", chat, None, message(chat, parts=large), [])
    with pytest.raises(RequestError, match="begin another"):
        store.add_turn("me", chat, None, message(chat, parts=large), [])
    assert len(store.messages(chat)) == 2
    store.create_chat("me", "y", [message("", parts=large)])
    for again in (store, Store(tmp_path / "none.db", limits)):
        if again is not store:  # what is kept is counted anew at the start
            again.close()
            store.close()
            again = store = Store(path, limits)
        with pytest.raises(RequestError, match="20000 bytes are kept") as full:
            again.create_chat("me", "z", [message("", parts=large)])
        assert full.value.code == "quota"
        assert again.size("me", chat) == 2 * (len(json.dumps(large)) + MESSAGE_BYTES)
        assert again.size("you", chat) is None
    store.create_chat("me", "z")
    with pytest.raises(RequestError, match="3 chats are kept"):
        store.create_chat("me", "one more")
    assert store.create_chat("you", "z") and store.delete_chat("me", chat)
    assert store.create_chat("me", "now", [message("", parts=large)])
    store.close()


def test_a_quota_is_told_like_any_fault(tiny: Tiny, tmp_path: Path) -> None:
    with running(tiny.run, tmp_path, limits=replace(FREE, max_chats=1)) as server:
        assert server.http.post("/api/chats", json={}).status_code == 200
        reply = server.http.post("/api/chats", json={})
        assert reply.status_code == 400 and reply.json()["error"]["code"] == "quota"


def test_what_is_held_is_let_go_when_a_block_fails() -> None:
    places = hub_module.AtOnce(10, "things")
    with contextlib.suppress(ZeroDivisionError), places.place("me", 100):
        with pytest.raises(Fault), places.place("me"):
            pass
        with places.place("you", 4), places.place("you", 6):
            raise ZeroDivisionError
    assert not places._used
