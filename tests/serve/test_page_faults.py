"""What goes wrong is said plainly, in the language of the page, and leaves nothing broken behind."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shenhong.serve.http import guesses
from tests.conftest import Tiny
from tests.serve.browsing import (
    Visitor,
    answers,
    chromium,
    imported,
    say,
    visit,
    visiting,
    wait_done,
    whole,
)
from tests.serve.running import FREE, Running, running

__all__ = ["chromium", "visit"]

KEY = "sesame-of-this-test"
LONG = "月" * 90


@pytest.fixture(scope="module")
def narrow(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server of this module's own that reads short prompts only."""
    limits = replace(FREE, max_prompt_tokens=40)
    with running(tiny.run, tmp_path_factory.mktemp("narrow"), limits=limits) as server:
        yield server


def fault(page: Any) -> Any:
    return page.locator(".strip[role=alert]")


def test_a_refused_first_message_leaves_no_chat(chromium: Any, narrow: Running) -> None:
    with visiting(chromium, narrow.url) as visitor:
        page = visitor.page()
        say(page, LONG)
        fault(page).get_by_text("reads at most 40").wait_for()
        box = page.get_by_role("textbox", name="A title")
        held = "(text) => document.querySelector('.composer textarea').value === text"
        page.wait_for_function(held, arg=LONG)  # nothing written is lost
        page.wait_for_function(
            "() => fetch('/api/chats').then((r) => r.json()).then((r) => !r.chats.length)"
        )
        assert page.locator("nav li").count() == 0
        assert page.locator(".welcome").count() == 1 and not page.url.endswith("#/c/")
        say(page, "春")
        wait_done(page)
        box.fill(LONG)
        page.keyboard.press("Enter")
        fault(page).get_by_text("reads at most 40").wait_for()
        assert len(answers(whole(narrow, page))) == 1  # a later one leaves the chat as it was
        narrow.http.delete(f"/api/chats/{page.url.rsplit('/', 1)[1]}")


def test_the_chinese_page_refuses_in_chinese(chromium: Any, narrow: Running) -> None:
    with visiting(chromium, narrow.url) as visitor:
        page = visitor.page(locale="zh-CN")
        page.get_by_role("textbox", name="题目").fill(LONG)
        page.keyboard.press("Enter")
        fault(page).get_by_text("内容太长").wait_for()
        page.route(
            "**/turns",
            lambda route: route.fulfill(
                status=500, json={"error": {"message": "the server failed", "code": None}}
            ),
        )
        page.keyboard.press("Enter")
        fault(page).get_by_text("服务器出错了").wait_for()


def test_every_chat_can_be_reached(chromium: Any, narrow: Running) -> None:
    for number in range(230):
        narrow.http.post("/api/chats", json={"title": f"chat {number}"})
    with visiting(chromium, narrow.url) as visitor:
        page = visitor.page()
        titles = page.locator("nav li .title")
        page.get_by_text("chat 229", exact=True).wait_for()
        assert titles.count() < 230

        def to_the_oldest() -> None:
            for _ in range(5):
                page.locator("nav li").last.scroll_into_view_if_needed()
                if page.get_by_text("chat 0", exact=True).count():
                    break
                page.wait_for_timeout(150)
            assert titles.all_inner_texts()[-230:] == [f"chat {n}" for n in range(229, -1, -1)]

        to_the_oldest()
        narrow.http.post("/api/chats", json={"title": "newest"})
        page.get_by_text("newest", exact=True).wait_for()
        assert titles.count() == 231  # what was read on stays
        chats = narrow.http.get("/api/chats", params={"search": "chat 0"}).json()["chats"]
        narrow.http.patch(f"/api/chats/{chats[0]['id']}", json={"title": "renamed elsewhere"})
        page.wait_for_function("() => document.querySelectorAll('nav li').length < 231")
        page.locator("nav li").last.scroll_into_view_if_needed()
        page.get_by_text("renamed elsewhere").wait_for(state="attached")
        page.get_by_role("searchbox").fill("chat")
        page.wait_for_function("() => document.querySelectorAll('nav li').length === 100")
        page.locator("nav li").last.scroll_into_view_if_needed()
        page.wait_for_function("() => document.querySelectorAll('nav li').length > 100")


DAMAGED: list[Any] = [
    {"type": "verse"},
    {"type": "verse", "lines": [{}]},
    {"type": "verse", "lines": 5},
    {"type": "verse", "lines": [{"text": "山", "tones": None}], "form": "", "title": ""},
    {"type": "text"},
    {"type": "text", "text": 5},
    {"type": "reasoning"},
    {"type": "error", "message": {"a": 1}},
    {"type": "other"},
]


@pytest.mark.parametrize("verse", [True, False])
def test_damaged_parts_are_told_and_the_rest_is_shown(
    served: Running, visit: Visitor, verse: bool
) -> None:
    chat = imported(served, ["asked", "sound", "more", "sound too"])

    def damage(route: Any) -> None:
        body = route.fetch().json()
        for message in body["messages"][:3]:
            message["model"] = served.model if verse else None
            message["parts"] = [*DAMAGED, {"type": "text", "text": "what is sound"}]
        route.fulfill(json=body)

    context = visit.context()
    context.route(f"**/api/chats/{chat}", damage)
    page = visit.page(context, f"#/c/{chat}")
    page.get_by_text("sound too").wait_for()
    assert page.get_by_text("what is sound").count() == 3
    assert page.get_by_text("damaged and cannot be shown").count() >= 4
    page.get_by_role("button", name="Edit").first.click()
    assert "what is sound" in page.get_by_role("textbox", name="Edit").input_value()


@pytest.mark.parametrize(
    "kept",
    [
        '{"settings":null,"models":5}',
        '{"settings":[{"temperature":"hot"},{}],"theme":7}',
        "[1]",
        "{",
        "null",
    ],
)
def test_damaged_preferences_begin_anew(served: Running, visit: Visitor, kept: str) -> None:
    context = visit.context()
    context.add_init_script(f"localStorage.setItem('shenhong', {json.dumps(kept)})")
    page = visit.page(context)
    page.locator(".welcome").wait_for()
    page.get_by_role("button", name="Settings").click()
    assert page.get_by_label("Temperature").first.input_value() not in ("", "hot")


def test_sound_preferences_are_kept(served: Running, visit: Visitor) -> None:
    kept = {"settings": [{"temperature": 0.3, "stop": ["x"]}, {}], "vertical": True, "theme": 7}
    context = visit.context()
    context.add_init_script(f"localStorage.setItem('shenhong', {json.dumps(json.dumps(kept))})")
    page = visit.page(context)
    page.get_by_role("button", name="Settings").click()
    assert page.get_by_label("Temperature").first.input_value() == "0.3"
    assert page.get_by_label("Stop at").input_value() == "x"


def test_a_file_that_is_no_chat(served: Running, visit: Visitor, tmp_path: Path) -> None:
    page = visit.page()
    for name, content in (
        ("list.json", "[1]"),
        ("none.json", "null"),
        ("run.json", '{"a": 1}'),
        ("torn.json", '{"mess'),
    ):
        (tmp_path / name).write_text(content)
        with page.expect_file_chooser() as chooser:
            page.get_by_role("button", name="Import a chat").click()
        chooser.value.set_files(tmp_path / name)
        fault(page).get_by_text(f"{name}: not a chat that was exported here").wait_for()
        fault(page).get_by_role("button", name="Close").click()
    (tmp_path / "half.json").write_text('{"messages": [{}]}')
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Import a chat").click()
    chooser.value.set_files(tmp_path / "half.json")
    fault(page).get_by_text("half.json: messages.0").wait_for()  # the server's own words


def test_too_many_keys_are_told_from_a_wrong_one(
    chromium: Any, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the right one opens, when its turn has come."""
    turn = threading.Event()

    async def wait(_: float) -> None:
        assert await asyncio.to_thread(turn.wait, 60)

    with (
        running(tiny.run, tmp_path, keys=(KEY,)) as server,
        visiting(chromium, server.url) as visitor,
    ):
        page = visitor.page()
        field = page.get_by_label("Key", exact=True)
        field.fill("not that one")
        page.keyboard.press("Enter")
        page.get_by_text("That key is not right").wait_for()
        server.hub.keys.guesses = guesses.Guesses(lambda: 0.0, wait)
        for _ in range(guesses.PER_MINUTE):
            server.http.post("/api/login", json={"key": "nor this"})
        monkeypatch.setattr(guesses, "LONGEST_WAIT", 0.0)
        field.fill(KEY)
        page.keyboard.press("Enter")
        page.get_by_text("Too many tries; wait a minute").wait_for()
        assert page.get_by_text("That key is not right").count() == 0
        monkeypatch.setattr(guesses, "LONGEST_WAIT", 30.0)
        with page.expect_request("**/api/login"):
            page.keyboard.press("Enter")
        turn.set()
        field.wait_for(state="detached")


def test_a_key_that_no_longer_opens_leaves_nothing_on_the_screen(
    chromium: Any, tiny: Tiny, tmp_path: Path
) -> None:
    from playwright.sync_api import expect

    with (
        running(tiny.run, tmp_path, keys=(KEY,)) as server,
        visiting(chromium, server.url) as visitor,
    ):
        context = visitor.context()
        page = visitor.page(context)
        field = page.get_by_label("Key", exact=True)
        field.wait_for()
        page.keyboard.type(KEY)  # the focus is there
        page.keyboard.press("Enter")
        say(page, "长城")
        wait_done(page)
        context.clear_cookies()
        say(page, "登高")
        field.wait_for()
        assert page.locator("nav li").count() == 0
        assert "长城" not in page.locator("body").inner_text()
        field.fill(KEY)
        page.keyboard.press("Enter")
        page.locator(".bubble", has_text="长城").wait_for()
        assert page.locator("nav li").count() == 1
        box = page.get_by_role("textbox", name="A title")
        expect(box).to_have_value("登高")  # what was written is not lost
        page.get_by_role("link", name="New chat").first.click()
        page.goto(f"{server.url}/#/runs")
        page.goto(f"{server.url}/#/")
        assert box.input_value() == "登高"


def test_odd_addresses(served: Running, visit: Visitor) -> None:
    page = visit.page(address="#/c/%E0%A4%A")
    page.locator(".welcome").wait_for()
    page.goto(f"{served.url}/#/runs/%E0%A4%A")
    page.get_by_text("This training run is not here").wait_for()
    page.goto(f"{served.url}/#/c/nowhere")
    page.get_by_text("This chat is gone").wait_for()
    say(page)  # goes on in a new one
    wait_done(page)
    assert len(answers(whole(served, page))) == 1


def test_a_run_is_read_again_after_a_fault_and_only_then(served: Running, visit: Visitor) -> None:
    context = visit.context()
    context.add_init_script(
        """for (const name of ["setInterval", "setTimeout"]) {
          const slow = window[name];
          window[name] = (work, ms) => slow(work, ms / 25);
        }"""
    )
    read: list[Any] = []

    def fail_once(route: Any) -> None:
        read.append(route)
        if len(read) == 1:
            route.abort()
        else:
            route.continue_()

    context.route(re.compile("/api/runs/[^/]+$"), fail_once)
    page = visit.page(context, "#/runs")
    page.locator("svg[role=img] path").first.wait_for()
    page.wait_for_timeout(600)  # the list of runs is read again and again meanwhile
    assert len(read) == 2


def test_the_stages_of_a_run_stand_in_their_order(served: Running, visit: Visitor) -> None:
    page = visit.page(address="#/runs", viewport={"width": 390, "height": 844})
    page.locator("svg[role=img] path").first.wait_for()
    places = page.locator(".stages li").evaluate_all(
        "all => all.map((li) => li.getBoundingClientRect()).map(({ top, left }) => [Math.round(top), left])"
    )
    assert len(places) == 7 and places == sorted(places)
    assert (
        page.get_by_text("Training, mean of 20").count() == 1
    )  # the curve's key tells the last one
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
