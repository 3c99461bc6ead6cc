"""Chromium before a real server, through a proxy that can slow, cut and refuse connections.

Every page visited is watched: a breach of the policy, an error of a script or a request to another host fails the test.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from shenhong.engine import Constraint, multi_step
from tests.serve.running import Running

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
if CHROMIUM is None:
    pytest.skip("chromium is not installed", allow_module_level=True)

# As a phone sees the server: under another name than localhost, over plain HTTP.
ELSEWHERE = "--host-resolver-rules=MAP home.test 127.0.0.1"
WATCH = """
window.breaches = [];
document.addEventListener("securitypolicyviolation", (e) => window.breaches.push(`${e.violatedDirective} ${e.blockedURI} ${e.sample}`));
"""


class Proxy:
    """A port of its own before a server. `cut()` resets what is open; while `down`, nobody is let in."""

    def __init__(self, port: int) -> None:
        self.target = port
        self.down = False
        self.pairs: set[tuple[socket.socket, socket.socket]] = set()
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self.listener.accept()
            except OSError:
                return
            try:
                if self.down:
                    raise OSError
                far = socket.create_connection(("127.0.0.1", self.target), timeout=5)
                far.settimeout(None)
            except OSError:
                near.close()
                continue
            pair = (near, far)
            self.pairs.add(pair)
            for one, other in (pair, pair[::-1]):
                threading.Thread(target=self._pump, args=(one, other, pair), daemon=True).start()

    def _pump(self, one: socket.socket, other: socket.socket, pair: Any) -> None:
        with contextlib.suppress(OSError):
            while data := one.recv(65536):
                other.sendall(data)
        self._close(pair)

    def _close(self, pair: Any) -> None:
        self.pairs.discard(pair)
        for side in pair:
            with contextlib.suppress(OSError):
                side.shutdown(socket.SHUT_RDWR)
            side.close()

    def cut(self) -> None:
        for pair in list(self.pairs):
            self._close(pair)

    def close(self) -> None:
        self.listener.close()
        self.cut()


def slow(server: Running, patch: pytest.MonkeyPatch, seconds: float = 0.02) -> None:
    """Every token takes so long, and no answer ends by itself before its limit."""
    patch.setattr(multi_step, "STEPS", 1)
    for model in server.hub.models.values():
        engine = model.llm.engine
        step, submit = engine.step, engine.submit

        def slow_step(step: Any = step, engine: Any = engine) -> Any:
            if engine.busy:
                time.sleep(seconds)
            return step()

        def long_submit(request: Any, *rest: Any, submit: Any = submit, **more: Any) -> Any:
            return submit(dataclasses.replace(request, stop_tokens=()), *rest, **more)

        patch.setattr(engine, "step", slow_step)
        patch.setattr(engine, "submit", long_submit)


AXE = Path(__file__).parents[2] / "webui" / "node_modules" / "axe-core" / "axe.min.js"
with_axe = pytest.mark.skipif(not AXE.exists(), reason="axe-core is not installed")


def accessible(page: Any, where: str) -> None:
    """axe finds nothing grave on the page as it is."""
    page.wait_for_timeout(300)  # colours move for a moment
    page.evaluate(AXE.read_text(encoding="utf-8"))
    result = page.evaluate("axe.run(document, { resultTypes: ['violations'] })")
    grave = [
        (where, fault["id"], fault["nodes"][0]["html"], fault["nodes"][0]["failureSummary"])
        for fault in result["violations"]
        if fault["impact"] != "minor"
    ]
    assert not grave, grave


POEM = "秦时明月汉时关，万里长征人未还。但使龙城飞将在，不教胡马度阴山。"


def only(server: Running, patch: pytest.MonkeyPatch, text: str = POEM) -> None:
    """Every answer is this text and nothing else."""
    said = Constraint("choice", json.dumps([text]))
    for model in server.hub.models.values():
        engine = model.llm.engine

        def submit(request: Any, *rest: Any, submit: Any = engine.submit, **more: Any) -> Any:
            return submit(dataclasses.replace(request, constraint=said), *rest, **more)

        patch.setattr(engine, "submit", submit)


@dataclass
class Visitor:
    """Opens pages of one browser, and knows what went wrong on any of them."""

    browser: Any
    home: str
    faults: list[str] = field(default_factory=list)
    contexts: list[Any] = field(default_factory=list)

    def context(self, **how: Any) -> Any:
        context = self.browser.new_context(**({"locale": "en-US"} | how))
        context.add_init_script(WATCH)
        context.set_default_timeout(15_000)
        context.on("request", self._asked)
        self.contexts.append(context)
        return context

    def _asked(self, request: Any) -> None:
        if not request.url.startswith((self.home, "data:", "blob:")):
            self.faults.append(f"asked {request.url}")

    def page(self, context: Any = None, address: str = "", **how: Any) -> Any:
        page = (context or self.context(**how)).new_page()
        page.on("pageerror", lambda error: self.faults.append(f"script: {error}"))
        page.on("dialog", lambda dialog: (self.faults.append("a dialog"), dialog.dismiss()))
        page.goto(f"{self.home}/{address}")
        return page

    def check(self) -> None:
        for context in self.contexts:
            for page in context.pages:
                self.faults += page.evaluate("window.breaches")
        assert not self.faults, self.faults


@contextlib.contextmanager
def visiting(browser: Any, home: str) -> Iterator[Visitor]:
    visitor = Visitor(browser, home)
    try:
        yield visitor
        visitor.check()
    finally:
        for context in visitor.contexts:
            context.close()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", ELSEWHERE]
        )
        yield browser
        browser.close()


@pytest.fixture
def proxy(served: Running) -> Iterator[Proxy]:
    between = Proxy(served.port)
    yield between
    between.close()


@pytest.fixture
def visit(chromium: Any, served: Running) -> Iterator[Visitor]:
    with visiting(chromium, served.url) as visitor:
        yield visitor


def say(page: Any, text: str = "长城") -> None:
    page.get_by_role("textbox", name=re.compile("A title|Write a")).fill(text)
    page.keyboard.press("Enter")


def wait_done(page: Any, answers: int = 1) -> None:
    page.wait_for_function(
        "(n) => document.querySelectorAll('.facts').length >= n && !document.querySelector('.waiting')",
        arg=answers,
    )


def chat_id(page: Any) -> str:
    page.wait_for_url("**/#/c/*")
    return page.url.rsplit("/", 1)[1]


def whole(server: Running, page: Any) -> dict[str, Any]:
    return server.http.get(f"/api/chats/{chat_id(page)}").json()


def answers(chat: dict[str, Any]) -> list[dict[str, Any]]:
    return [message for message in chat["messages"] if message["role"] == "assistant"]


def bare(text: str) -> str:
    """Without what JavaScript calls white space, which is not all that Python does."""
    return re.sub(r"[^\S\x1c-\x1f\x85]|\ufeff", "", text)


def text_of(message: dict[str, Any]) -> str:
    return bare("".join(part.get("text", "") for part in message["parts"]))


def imported(server: Running, texts: list[str], title: str = "imported", thought: str = "") -> str:
    """A chat of these texts, by turns the user's and answers, each after this thought; its id."""
    messages = [
        {
            "id": str(number),
            "parent": str(number - 1) if number else None,
            "role": "assistant" if number % 2 else "user",
            "parts": [{"type": "reasoning", "text": thought}] * bool(thought and number % 2)
            + [{"type": "text", "text": text}],
            "state": "done",
            "created": 1_700_000_000 + number,
        }
        for number, text in enumerate(texts)
    ]
    body = {"title": title, "leaf": str(len(texts) - 1), "messages": messages}
    response = server.http.post("/api/chats/import", json=body)
    assert response.status_code == 200, response.text
    return response.json()["id"]
