"""Everything can be done from the keyboard, as the help says."""

from __future__ import annotations

from typing import Any

import pytest

from tests.serve.browsing import Visitor, chromium, imported, only, say, slow, visit, wait_done
from tests.serve.running import Running

__all__ = ["chromium", "visit"]

ACTIVE = """() => {
  const { activeElement: it } = document;
  return it.getAttribute("aria-label") ?? (it.matches("a, button") ? it.textContent.trim() : it.tagName);
}"""


def active(page: Any) -> str:
    """What has the focus, by its name."""
    return page.evaluate(ACTIVE)


def press(page: Any, *keys: str) -> None:
    for key in keys:
        page.keyboard.press(key)


def test_escape_leaves_the_box_and_single_keys_work(
    served: Running, visit: Visitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(served, monkeypatch)
    page = visit.page()
    box = page.get_by_role("textbox", name="A title")
    page.locator(".welcome").wait_for()
    press(page, "Escape", "?")  # also where there is no message yet
    page.get_by_role("dialog").get_by_text("Leave the message box").wait_for()
    press(page, "Escape", "/")
    say(page)
    wait_done(page)
    assert active(page) == "A title, such as 长城"
    press(page, "Escape")
    assert active(page) == "Answer"
    press(page, "r")
    page.get_by_text("2/2").wait_for()
    wait_done(page)
    assert box.input_value() == "" and active(page) == "Answer"  # no jump back
    press(page, "[")
    page.get_by_text("1/2").wait_for()
    press(page, "]")
    page.get_by_text("2/2").wait_for()
    marked = page.locator(".verse.marks")
    press(page, "m")
    marked.wait_for(state="detached")
    press(page, "m")
    marked.wait_for()
    press(page, "e")
    assert active(page) == "Edit"
    press(page, "Escape")
    assert active(page) == "You"
    press(page, "c", "s")
    page.get_by_role("dialog").get_by_role("radio", name="Right").wait_for()
    press(page, "Escape", "c")
    press(page, "/")
    assert active(page) == "A title, such as 长城"
    press(page, "ArrowUp")
    assert active(page) == "Edit"
    press(page, "Escape", "Control+k")
    assert active(page) == "Search chats"
    press(page, "x", "Escape")
    assert active(page) == "Search chats" and page.get_by_role("searchbox").input_value() == ""
    press(page, "Escape")
    assert active(page) == "Answer"
    press(page, "Control+b")
    page.get_by_role("navigation").wait_for(state="hidden")
    press(page, "Control+b", "Control+,")
    page.get_by_role("dialog", name="Settings").wait_for()
    press(page, "Escape", "Control+Shift+o")
    page.locator(".welcome").wait_for()
    page.go_back()
    page.locator(".verse").wait_for()
    press(page, "Escape", "n")
    page.locator(".welcome").wait_for()


def test_the_tools_of_an_answer_are_near(
    served: Running, visit: Visitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(served, monkeypatch)
    page = visit.page()
    say(page)
    wait_done(page)
    press(page, "Escape")
    seen = []
    for _ in range(4):
        press(page, "Tab")
        seen.append(active(page))
    assert seen[-2:] == ["Copy", "Answer again"], seen  # after the two of the verse
    press(page, "Enter")
    page.get_by_text("2/2").wait_for()
    wait_done(page)
    # Where the button was gone for a moment, its focus went to the answer.
    assert active(page) in ("Answer", "Answer again")
    press(page, "/", "Shift+Tab")  # the forms are one stop, and arrows choose
    assert active(page) == "七绝"
    press(page, "ArrowRight", "ArrowRight", "ArrowRight", "ArrowRight")
    assert page.get_by_role("radio", checked=True).inner_text() == "五绝"
    press(page, "Shift+Tab")
    assert active(page) == "Previous version"


def test_escape_stops_before_it_leaves(
    served: Running, visit: Visitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow(served, monkeypatch, 0.05)
    page = visit.page()
    say(page)
    page.locator(".assistant .plain").wait_for()
    press(page, "Escape")
    wait_done(page)
    assert active(page) == "A title, such as 长城"
    press(page, "Escape", "r")
    page.get_by_text("2/2").wait_for()
    press(page, "Escape")
    wait_done(page)
    assert active(page) == "Answer"


def test_the_menu_of_a_chat(served: Running, visit: Visitor) -> None:
    chat = imported(served, ["asked", "told"], "quills")
    page = visit.page(address=f"#/c/{chat}")
    opener = page.get_by_role("button", name="More: quills")
    opener.focus()
    press(page, "Enter", "Tab")
    assert active(page) == "Rename"
    press(page, "Escape")
    assert page.locator(".menu").count() == 0
    assert active(page) == "quills"
    press(page, "Tab", "Enter", "Tab", "Enter")
    assert active(page) == "Rename"
    page.keyboard.type("pens")
    press(page, "Enter")
    page.get_by_role("button", name="More: pens").wait_for()
    assert active(page) == "pens"
    served.http.delete(f"/api/chats/{chat}")
