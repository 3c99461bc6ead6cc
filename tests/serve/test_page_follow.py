"""The page follows the conversation to its end, and leaves a reader who went up where they are."""

from __future__ import annotations

from typing import Any

import pytest

from tests.serve.browsing import (
    Visitor,
    chromium,
    imported,
    only,
    say,
    slow,
    visit,
    wait_done,
)
from tests.serve.running import Running

__all__ = ["chromium", "visit"]

SCREENS = [(1280, 800), (390, 844)]
LEFT = "log => log.scrollHeight - log.scrollTop - log.clientHeight"  # below what is seen, in pixels


def left_now(page: Any) -> float:
    return page.locator(".log").evaluate(LEFT)


def left(page: Any) -> float:
    """How far the end is, once nothing has moved for some frames."""
    page.locator(".log").evaluate(
        """async (log) => {
          for (let still = 0, before = ""; still < 6; ) {
            await new Promise(requestAnimationFrame);
            const now = `${log.scrollHeight} ${log.scrollTop}`;
            still = now === before ? still + 1 : 0;
            before = now;
          }
        }"""
    )
    return left_now(page)


def longer(page: Any, pixels: int) -> None:
    """Wait until the list has grown by so much."""
    height = page.locator(".log").evaluate("log => log.scrollHeight")
    page.wait_for_function(
        "(h) => document.querySelector('.log').scrollHeight > h", arg=height + pixels
    )


@pytest.mark.parametrize("size", SCREENS)
def test_answers_that_come_at_once_are_followed(
    served: Running, visit: Visitor, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int]
) -> None:
    only(served, monkeypatch)
    page = visit.page(viewport={"width": size[0], "height": size[1]})
    for number in range(1, 5):
        say(page)
        wait_done(page, number)
        assert page.locator(".verse").count() == number
        assert left(page) < 2, number
    page.locator(".log").evaluate("log => log.scrollTo(0, 0)")
    page.get_by_role("button", name="To the newest").wait_for()
    assert left(page) > 500
    say(page)  # who sends from up there is brought to the end
    wait_done(page, 5)
    assert left(page) < 2
    assert page.get_by_role("button", name="To the newest").count() == 0
    page.get_by_role("button", name="Compare").click()
    for number in (7, 9):
        say(page)
        wait_done(page, number)
        assert left(page) < 2, number


@pytest.mark.parametrize("size", SCREENS)
def test_a_reader_who_goes_up_stays_there(
    served: Running, visit: Visitor, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int]
) -> None:
    page = visit.page(viewport={"width": size[0], "height": size[1]})
    with monkeypatch.context() as fast:
        only(served, fast)
        for number in (1, 2, 3):
            say(page)
            wait_done(page, number)
    only(served, monkeypatch, "山水明月\n" * 20)
    slow(served, monkeypatch, 0.015)
    say(page)
    longer(page, 100)
    assert left_now(page) < 60  # it follows while it grows
    page.locator(".log").hover()
    page.mouse.wheel(0, -30)  # a little, as fingers do
    page.get_by_role("button", name="To the newest").wait_for()
    at = page.locator(".log").evaluate("log => log.scrollTop")
    longer(page, 100)
    assert page.locator(".log").evaluate("log => log.scrollTop") == at
    page.get_by_role("button", name="To the newest").click()
    longer(page, 50)
    page.get_by_role("button", name="Stop").click()
    wait_done(page, 4)
    assert left(page) < 2


@pytest.mark.parametrize("size", SCREENS)
def test_what_is_switched_stays_under_the_hand(
    served: Running, visit: Visitor, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int]
) -> None:
    chat = imported(served, ["asked", "told"], thought="on and on\n" * 60)
    page = visit.page(address=f"#/c/{chat}", viewport={"width": size[0], "height": size[1]})
    thoughts = page.get_by_role("button", name="Thoughts")
    before = thoughts.bounding_box()["y"]
    thoughts.click()
    page.locator(".reasoning .text").wait_for()
    assert left(page) > 300 and abs(thoughts.bounding_box()["y"] - before) < 2
    thoughts.click()
    page.locator(".reasoning .text").wait_for(state="detached")
    assert left(page) < 2
    only(served, monkeypatch)
    for number in (2, 3):
        say(page)
        wait_done(page, number)
    assert left(page) < 2  # folded again, the end is followed again
    for _ in range(2):
        switch = page.get_by_role("button", name="Vertical").last
        before = switch.bounding_box()["y"]
        switch.click()
        left(page)
        assert abs(switch.bounding_box()["y"] - before) < 2
