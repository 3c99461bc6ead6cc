"""The server and its sockets: callers that break, dawdle or leave, and engines that fail."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from shenhong.serve.http.faults import Fault
from shenhong.serve.http.sse import EventStream
from shenhong.tokenizer.tokenizer import CHAT_TEMPLATE
from tests.conftest import Tiny
from tests.serve.running import FREE, Running, running, slowly, with_template

# ------------------------------------------------------------------------ broken callers


def raw(server: Running, **more: Any) -> socket.socket:
    """A connection that has asked for a long stream and read its first bytes."""
    body = {
        "model": server.model,
        "messages": [{"role": "user", "content": "长城"}],
        "stream": True,
    }
    data = json.dumps(body | {"max_tokens": 100, "logit_bias": {"1": -100}} | more).encode()
    one = socket.create_connection(("127.0.0.1", server.port))
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    one.sendall(head.encode() + data)
    return one


@pytest.mark.parametrize(
    "manner", ["close", "reset", "before the answer", "half a body", "not whole"]
)
def test_callers_that_leave_cost_nothing(
    served: Running, manner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    slowly(monkeypatch, served, 0.1)  # to its end an answer takes ten seconds
    wrote = served.hub.models[served.model].thread.stats.generated_tokens
    for _ in range(4):
        one = raw(served, stream=manner != "not whole", n=16)
        if manner in ("close", "reset"):
            assert one.recv(100)
        if manner == "reset":
            one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if manner == "not whole":
            while not served.hub.answering():
                time.sleep(0.001)
        one.close()
    if manner == "half a body":
        half = socket.create_connection(("127.0.0.1", served.port))
        half.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n{"
        )
        half.close()
    assert served.idle(), "what nobody reads must end and give its pages back"
    wrote = served.hub.models[served.model].thread.stats.generated_tokens - wrote
    assert wrote < 4 * 16 * 100, "it was written to the end for nobody"
    assert served.chat().status_code == 200


def test_nonsense_on_the_socket_harms_nobody(served: Running) -> None:
    for data in (b"\x00\xff" * 500, b"GET / HTTP/9.9\r\n\r\n", b"GET /" + b"a" * 200_000, b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n", b"GET /health HTTP/1.1\r\n\r\n"):  # fmt: skip
        with socket.create_connection(("127.0.0.1", served.port)) as one:
            one.settimeout(5)
            try:
                one.sendall(data)
                assert b" 200 " not in one.recv(200)
            except ConnectionError:
                pass
    assert served.chat().status_code == 200


def test_a_reader_that_takes_nothing_is_let_go(
    tiny: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    limits = replace(FREE, slow_reader_seconds=0.3)
    with running(tiny.run, tmp_path, limits=limits) as server:
        monkeypatch.setattr(logging.getLogger("uvicorn.error"), "level", logging.ERROR)
        monkeypatch.setattr(logging.getLogger("uvicorn.error"), "handlers", [caplog.handler])
        with socket.socket() as one:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            one.connect(("127.0.0.1", server.port))
            many = [{"role": "user", "content": "长城"}]
            body = {
                "model": server.model,
                "messages": many,
                "stream": True,
                "n": 16,
                "logprobs": True,
            }
            data = json.dumps(
                body | {"max_tokens": 110, "top_logprobs": 20, "logit_bias": {"1": -100}}
            )
            one.sendall(f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n{data}".encode())  # fmt: skip
            assert server.chat().status_code == 200  # others go on meanwhile
            until = time.monotonic() + 60
            mine = one.getsockname()
            while any(c.client == mine for c in server.server.server_state.connections):
                assert time.monotonic() < until, "its connection stays"
                time.sleep(0.02)
            assert server.idle()
        assert server.chat().status_code == 200
    assert not caplog.records


def test_a_slow_reader_that_reads_gets_all(tiny: Tiny, tmp_path: Path) -> None:
    """More is sent than fits between the two, and taken in far more time than one may take nothing."""
    limits = replace(FREE, slow_reader_seconds=1.0)
    with running(tiny.run, tmp_path, limits=limits) as server, socket.socket() as one:
        message = {"id": "1", "parent": None, "role": "user", "parts": [{"type": "text", "text": "x" * 4_000_000}]}  # fmt: skip
        chat = server.http.post("/api/chats/import", json={"messages": [message]}).json()["id"]
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
        one.connect(("127.0.0.1", server.port))
        one.sendall(f"GET /api/chats/{chat} HTTP/1.0\r\nHost: localhost\r\n\r\n".encode())
        begun, got = time.monotonic(), 0
        while piece := one.recv(1 << 20):
            got += len(piece)
            time.sleep(0.001 if time.monotonic() - begun > 3 else len(piece) / 1e6)
    assert got > 4_000_000 and time.monotonic() - begun > 2


def drip(port: int, head: bytes, every: float, stop: threading.Event) -> float:
    """Sends a byte of `b"a"` now and then behind `head`; seconds until the server closes the connection."""
    begun = time.monotonic()  # before the server can begin to count
    with socket.create_connection(("127.0.0.1", port)) as one:
        one.settimeout(every)
        one.sendall(head)
        while not stop.is_set():
            try:
                one.sendall(b"a")
                if one.recv(65536) == b"":
                    break
            except TimeoutError:
                continue
            except ConnectionError:
                break
        return time.monotonic() - begun


HEAD = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
DRIPS = {
    "nothing": b"",
    "a head": HEAD + b"X-Slow: ",
    "a second head": HEAD + b"\r\n" + HEAD + b"X-Slow: ",
    "a body nobody reads": HEAD + b"Content-Length: 9999\r\n\r\n",
    "a body": b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999\r\n\r\n",
}


def test_who_sends_by_drops_is_let_go_and_others_are_not(tiny: Tiny, tmp_path: Path) -> None:
    limits = replace(FREE, slow_head_seconds=0.6, slow_reader_seconds=0.6)
    with running(tiny.run, tmp_path, limits=limits) as server, ThreadPoolExecutor(64) as pool:
        stop = threading.Event()
        slow = {
            name: [pool.submit(drip, server.port, head, 0.05, stop) for _ in range(12)]
            for name, head in DRIPS.items()
        }
        # A long answer outlives the time a head has, and so does a quiet connection between two requests.
        patient = server.http
        for _ in range(3):
            assert server.chat(stream=True, max_tokens=100).status_code == 200
            assert patient.get("/health").status_code == 200
            time.sleep(0.5)
        timer = threading.Timer(90, stop.set)  # for those that are never let go
        timer.start()
        for name, ends in slow.items():
            for end in ends:
                assert 0.4 < end.result() < 80, name
        timer.cancel()
        assert server.chat().status_code == 200 and server.idle()


def test_a_long_answer_outlives_the_time_of_a_head(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = replace(FREE, slow_head_seconds=0.2)
    with running(tiny.run, tmp_path, limits=limits) as server:
        slowly(monkeypatch, server, 0.02)
        begun = time.monotonic()
        reply = server.chat(max_tokens=40, stream=True, logit_bias={"1": -100})
        assert time.monotonic() - begun > 0.6
        assert reply.status_code == 200 and reply.text.endswith("data: [DONE]\n\n")


def test_an_engine_that_fails_tells_and_goes_on(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(tiny.run, tmp_path) as server:
        engine = server.hub.models[server.model].llm.engine
        step, broken = engine.step, threading.Event()

        def sometimes() -> Any:
            if engine.busy and not broken.is_set():
                broken.set()
                raise RuntimeError("a step broke")
            return step()

        monkeypatch.setattr(engine, "step", sometimes)
        reply = server.chat()
        assert reply.status_code == 500 and reply.json()["error"]["code"] == "engine_error"
        assert server.chat().status_code == 200 and server.idle()
        assert "engine_failures_total" in server.http.get("/metrics").text


SLOW = {"structured_outputs": {"regex": "(a{1000}){1000}"}}  # about a second to compile


def test_a_constraint_that_compiles_long_stops_nobody(
    served: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = slowly(monkeypatch, served)
    model = served.hub.models[served.model]
    engine, loop = model.llm.engine, model.thread._loop
    compiled, during = engine.compiled, 0

    def counted(constraint: Any) -> Any:
        nonlocal during
        before = len(steps)
        asyncio.run_coroutine_threadsafe(asyncio.sleep(0), loop).result(10)  # it waits for nothing
        matcher = compiled(constraint)
        during = len(steps) - before
        return matcher

    monkeypatch.setattr(engine, "compiled", counted)
    with raw(served, max_tokens=110) as one:
        assert one.recv(100)
        with raw(served, max_tokens=1, stream=False, **SLOW) as other:
            assert other.recv(100)
    assert during > 3, "the other text stood still, or the constraint is no longer slow"
    assert served.idle()


def test_a_constraint_has_so_long_and_no_longer(
    served: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = served.hub.models[served.model].llm.engine
    compiled, go_on = engine.compiled, threading.Event()

    def held(constraint: Any) -> Any:
        assert go_on.wait(120)
        return compiled(constraint)

    some = {"structured_outputs": {"regex": "a+"}}
    try:
        with monkeypatch.context() as patch:
            patch.setattr(engine, "compiled", held)
            patch.setattr("shenhong.serve.engine_thread.COMPILE_SECONDS", 0.1)
            error = served.chat(**some).json()["error"]
            assert error["param"] == "structured_outputs" and "within 0.1 s" in error["message"]
        assert served.chat(structured_outputs={"choice": ["春"]}).status_code == 200
        with monkeypatch.context() as patch:
            patch.setattr(engine, "compiled", held)
            patch.setattr("shenhong.serve.engine_thread.COMPILE_SECONDS", 600)
            with raw(served, stream=False, **some):  # leaves while it compiles
                while not served.hub.answering():
                    time.sleep(0.001)
            until = time.monotonic() + 60
            while served.hub.answering():
                assert time.monotonic() < until, "it goes on for nobody"
                time.sleep(0.01)
    finally:
        go_on.set()


@pytest.mark.parametrize("manner", ["cancelling", "stepping"])
def test_an_engine_that_fails_for_good_says_so(
    manner: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(tiny.run, tmp_path) as server:
        thread = server.hub.models[server.model].thread

        def broken(*_: Any) -> Any:
            raise RuntimeError("it broke")

        assert server.http.get("/health").status_code == 200
        slowly(monkeypatch, server)
        with raw(server) as one:
            assert one.recv(100)
            if manner == "stepping":
                monkeypatch.setattr(thread.engine, "step", broken)
            monkeypatch.setattr(thread.engine, "cancel", broken)
        for _ in range(2):
            reply = server.chat()  # while it breaks, and afterwards
            assert reply.status_code == 503, reply.text
            assert reply.json()["error"]["code"] == "engine_failed"
        health = server.http.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "failed")
        failures = thread.failures
        time.sleep(0.1)
        assert thread.failures == failures <= 2, "it tries again and again"
        assert not thread.live


def test_a_stream_whose_head_cannot_be_sent_ends_its_answer() -> None:
    ended = []

    async def source() -> Any:
        yield b"x"

    async def send(message: Any) -> None:
        raise asyncio.CancelledError

    stream = EventStream(source(), lambda: ended.append(True))
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(stream({}, None, send))  # type: ignore[arg-type]
    assert ended


def test_a_looping_template_stops_only_its_caller(tiny: Tiny, tmp_path: Path) -> None:
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    source = "{% if messages[0]['content'] == 'boom' %}" + loop + "{% endif %}" + CHAT_TEMPLATE
    folder = with_template(tiny.run / "model", tmp_path / "model", source)
    with running(folder, tmp_path, limits=replace(FREE, template_seconds=3)) as server:
        found: list[httpx.Response] = []
        thread = threading.Thread(target=lambda: found.append(server.chat("boom")))
        thread.start()
        assert server.chat().status_code == 200 and not found
        thread.join(60)
    assert found[0].status_code == 400 and found[0].json()["error"]["code"] == "template"


def test_metrics_are_prometheus_text(served: Running) -> None:
    served.chat()
    text = served.http.get("/metrics").text
    seen: set[str] = set()
    for line in text.splitlines():
        if line.startswith("#"):
            kind, name = line.split()[1:3]
            assert (kind, name) not in seen
            seen.add(f"{kind} {name}")
        else:
            name = line.split("{")[0].split()[0]
            float(line.rsplit(" ", 1)[1])
            assert f"TYPE {name}" in seen
    assert f'shenhong_generated_tokens_total{{model="{served.model}"}}' in text


def test_faults_have_openai_s_shape() -> None:
    body = Fault(429, "x", retry_after=0.2)
    assert set(body.body()["error"]) == {"message", "type", "param", "code"}
    assert body.response().headers["retry-after"] == "1"
