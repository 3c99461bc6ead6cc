"""The page of a model that goes on with text: one document, continued, written anew, branched, edited and kept."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Tiny
from tests.serve.browsing import (
    Visitor,
    accessible,
    answers,
    chromium,
    slow,
    visiting,
    whole,
    with_axe,
)
from tests.serve.running import Running, running

__all__ = ["chromium"]

BEGIN = "The climate is"
RECORD = """() => {
  window.states = [];
  new MutationObserver(() => window.states.push(document.querySelector("textarea").value))
    .observe(document.querySelector(".copy"), { childList: true, subtree: true, characterData: true });
}"""


@pytest.fixture
def visit(chromium: Any, writer: Running) -> Iterator[Visitor]:
    with visiting(chromium, writer.url) as visitor:
        yield visitor


def box(page: Any) -> Any:
    return page.get_by_role("textbox", name="Text")


def button(page: Any, name: str) -> Any:
    return page.get_by_role("button", name=name, exact=True)


def written(page: Any) -> list[str]:
    """What is marked as the model's."""
    return page.locator(".written").all_text_contents()


def goes_on(page: Any, pieces: int) -> None:
    """Until the document has so many pieces of the model's, all of them whole."""
    page.wait_for_function(
        "(n) => document.querySelectorAll('.written').length === n && document.querySelector('[aria-busy=false]')",
        arg=pieces,
    )


def texts(server: Running, page: Any) -> list[str]:
    """What the model wrote, with the one kind of line ends that a text area knows."""
    found = ("".join(p["text"] for p in m["parts"]) for m in answers(whole(server, page)))
    return [re.sub("\r\n?", "\n", text) for text in found]


def test_a_text_is_gone_on_with_as_it_is_written(
    writer: Running, visit: Visitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow(writer, monkeypatch)
    page = visit.page()
    page.locator(".welcome").wait_for()
    assert button(page, "Continue").is_disabled() and button(page, "Retry").is_disabled()
    page.keyboard.type(BEGIN)  # the text has the focus
    page.evaluate(RECORD)
    page.keyboard.press("Control+Enter")
    page.wait_for_function("() => window.states.length > 5")
    assert not box(page).is_editable()
    page.keyboard.press("Escape")
    goes_on(page, 1)
    (piece,) = texts(writer, page)
    states = page.evaluate("window.states")
    assert box(page).input_value() == BEGIN + piece and written(page) == [piece]
    assert [state for state in states if not (BEGIN + piece).startswith(state)] == []
    assert answers(whole(writer, page))[0]["state"] == "stopped"
    page.get_by_role("status").filter(has_text="Stopped").wait_for(state="attached")
    button(page, "Continue").click()
    button(page, "Stop").click()
    goes_on(page, 2)
    assert box(page).input_value() == BEGIN + "".join(texts(writer, page))
    page.reload()
    goes_on(page, 2)
    assert box(page).input_value() == BEGIN + "".join(texts(writer, page))
    page.get_by_role("link", name=BEGIN).first.wait_for()  # among the chats


def test_alternatives_are_kept_and_stepped_between(writer: Running, visit: Visitor) -> None:
    page = visit.page()
    box(page).fill(BEGIN)
    button(page, "Continue").click()
    goes_on(page, 1)
    button(page, "Retry").click()
    page.get_by_text("2/2").wait_for()
    goes_on(page, 1)
    page.keyboard.press("Escape")
    page.keyboard.press("r")
    page.get_by_text("3/3").wait_for()
    goes_on(page, 1)
    three = texts(writer, page)
    assert len(set(three)) == 3 and written(page) == three[2:]
    page.keyboard.press("[")
    page.get_by_text("2/3").wait_for()
    assert box(page).input_value() == BEGIN + three[1]
    page.keyboard.press("/")
    page.keyboard.press("Control+Enter")
    goes_on(page, 2)
    button(page, "Previous version").click()  # no piece but the first has others
    page.get_by_text("1/3").wait_for()
    assert box(page).input_value() == BEGIN + three[0]
    button(page, "Next version").click()
    goes_on(page, 2)
    assert box(page).input_value() == BEGIN + three[1] + texts(writer, page)[3]
    other = visit.page(
        address=page.url.rsplit("/", 1)[0].split("/", 3)[3] + "/" + page.url.rsplit("/", 1)[1]
    )
    goes_on(other, 2)
    assert box(other).input_value() == box(page).input_value()


def test_an_edit_leaves_what_was_there_as_another_version(writer: Running, visit: Visitor) -> None:
    from playwright.sync_api import expect

    page = visit.page()
    box(page).fill(BEGIN)
    button(page, "Continue").click()
    goes_on(page, 1)
    before = box(page).input_value()
    box(page).press("Control+End")
    page.keyboard.type(" So")
    assert button(page, "Retry").is_disabled() and written(page) == [before[len(BEGIN) :]]
    page.goto(f"{writer.url}/#/")
    page.go_back()
    button(page, "Save").wait_for()
    assert box(page).input_value() == before + " So"  # what was written is not lost
    box(page).press("Control+s")
    button(page, "Save").wait_for(state="detached")
    page.reload()
    goes_on(page, 1)
    assert box(page).input_value() == before + " So"
    box(page).fill(before)  # taken away again
    button(page, "Save").click()
    button(page, "Save").wait_for(state="detached")
    page.reload()
    goes_on(page, 1)
    assert box(page).input_value() == before
    changed = "Once, " + before
    box(page).fill(changed)
    assert written(page) == []
    box(page).press("Control+Enter")
    goes_on(page, 1)
    expect(box(page)).to_have_value(re.compile(f"^{re.escape(changed)}"))
    page.keyboard.press("Escape")
    page.keyboard.press("[")  # the first piece has two versions now
    page.get_by_text("1/2").wait_for()
    assert box(page).input_value().startswith(before)


def test_what_a_model_learnt_decides_how_it_is_shown(
    chromium: Any, prose: Path, tiny: Tiny, tmp_path: Path
) -> None:
    with running([prose, tiny.run], tmp_path) as server, visiting(chromium, server.url) as visitor:
        page = visitor.page()
        box(page).fill(BEGIN)
        box(page).press("Control+Enter")
        goes_on(page, 1)
        address = page.url
        page.get_by_role("link", name="New chat").first.click()
        page.get_by_role("combobox", name="Model").select_option("whole")
        page.get_by_role("textbox", name="A title").wait_for()
        page.goto(address)  # a document stays one, whoever goes on with it
        goes_on(page, 1)
        button(page, "Continue").click()
        goes_on(page, 2)
        assert [m["model"] for m in answers(whole(server, page))] == ["prose", "whole"]


def test_a_phone_has_room_for_it(writer: Running, visit: Visitor) -> None:
    page = visit.page(viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True)
    box(page).fill("A longer line of text that has to be broken.\n\n" * 30 + BEGIN + "\u00a0" * 80)
    button(page, "Continue").tap()
    goes_on(page, 1)
    button(page, "Retry").tap()
    page.get_by_text("2/2").wait_for()
    goes_on(page, 1)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    # The text area is as high as its text, which lies where its copy does.
    hidden = box(page).evaluate("area => area.scrollHeight - area.clientHeight")
    assert hidden == 0
    places = []
    for name in ("Continue", "Retry", "Previous version", "Settings"):
        size = button(page, name).bounding_box()
        assert size["width"] >= 40 and size["height"] >= 40
        places.append(size["y"] + size["height"] / 2)
    assert max(places) - min(places) < 2  # in one row


@with_axe
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_fault_of_access(writer: Running, visit: Visitor, scheme: str) -> None:
    page = visit.page(color_scheme=scheme)
    page.locator(".welcome").wait_for()
    accessible(page, "empty")
    box(page).fill(BEGIN)
    button(page, "Continue").click()
    goes_on(page, 1)
    button(page, "Retry").click()
    page.get_by_text("2/2").wait_for()
    goes_on(page, 1)
    accessible(page, "branched")
    box(page).press("Control+End")
    page.keyboard.type(" So")
    accessible(page, "edited")
