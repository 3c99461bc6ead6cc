"""The page talks: streams, stops, resumes, branches, compares, and shares its chats with other tabs and starts."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Tiny
from tests.serve.browsing import (
    Proxy,
    Visitor,
    answers,
    bare,
    chat_id,
    chromium,
    imported,
    proxy,
    say,
    slow,
    text_of,
    visit,
    visiting,
    wait_done,
    whole,
)
from tests.serve.running import Running, begin_with, running

__all__ = ["chromium", "proxy", "visit"]

# Every state the growing answer was in, to be compared with what the server wrote.
RECORD = """() => {
  window.states = [];
  new MutationObserver(() => {
    const shown = document.querySelector(".assistant .plain");
    if (shown) window.states.push(shown.textContent.replace(/\\s/g, ""));
  }).observe(document.body, { childList: true, subtree: true, characterData: true });
}"""


def test_an_answer_streams(
    served: Running, visit: Visitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow(served, monkeypatch)
    page = visit.page()
    page.wait_for_selector(".welcome")
    page.evaluate(RECORD)
    say(page)
    wait_done(page)
    (answer,) = answers(whole(served, page))
    states = page.evaluate("window.states")
    assert len(set(states)) > 5
    assert [s for s in states if not text_of(answer).startswith(s)] == []
    assert page.locator(".bubble").inner_text() == "七绝 长城"
    page.get_by_role("status").filter(has_text="Answer complete").wait_for(state="attached")
    assert page.evaluate("document.activeElement.tagName") == "TEXTAREA"


def test_stop_keeps_what_was_written(
    served: Running, visit: Visitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow(served, monkeypatch, 0.05)
    page = visit.page()
    say(page)
    page.wait_for_function(
        "() => document.querySelector('.assistant .plain')?.textContent.length > 5"
    )
    page.keyboard.press("Escape")
    wait_done(page)
    (answer,) = answers(whole(served, page))
    assert answer["state"] == "stopped"
    shown = bare(page.locator(".assistant .plain").text_content())
    assert shown and shown == text_of(answer)


def test_a_killed_socket_resumes_with_nothing_lost_or_doubled(
    chromium: Any, served: Running, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow(served, monkeypatch, 0.03)
    with visiting(chromium, proxy.url) as visitor:
        page = visitor.page()
        page.wait_for_selector(".welcome")
        page.evaluate(RECORD)
        again: list[Any] = []
        page.on(
            "request", lambda request: again.append(request) if "/jobs/" in request.url else None
        )
        say(page)
        for length in (10, 30):
            page.wait_for_function(
                "(n) => document.querySelector('.assistant .plain')?.textContent.length > n",
                arg=length,
            )
            proxy.cut()
        wait_done(page)
        numbers = [int(request.all_headers().get("last-event-id", 0)) for request in again]
        assert (
            len(numbers) >= 3 and numbers[0] == 0 and numbers[1] > 0 and numbers == sorted(numbers)
        )
        (answer,) = answers(whole(served, page))
        states = page.evaluate("window.states")
        assert [s for s in states if not text_of(answer).startswith(s)] == []
        assert bare(page.locator(".assistant .plain, .verse .lines").text_content()) == text_of(
            answer
        )


def test_reload_in_the_middle_goes_on(
    served: Running, visit: Visitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow(served, monkeypatch, 0.03)
    page = visit.page()
    say(page)
    page.wait_for_function(
        "() => document.querySelector('.assistant .plain')?.textContent.length > 8"
    )
    page.reload()
    wait_done(page)
    (answer,) = answers(whole(served, page))
    assert bare(page.locator(".assistant .plain").text_content()) == text_of(answer)


def test_regenerate_edit_and_branches(served: Running, visit: Visitor) -> None:
    page = visit.page()
    say(page)
    wait_done(page)
    page.get_by_role("button", name="Answer again").click()
    page.get_by_text("2/2").wait_for()
    wait_done(page)
    page.get_by_role("button", name="Previous version").click()
    page.get_by_text("1/2").wait_for()
    page.locator("h1, .title").first.click()
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("]")
    page.get_by_text("2/2").wait_for()
    page.keyboard.press("e")
    page.get_by_role("textbox", name="Edit").fill("五绝 秋思")
    page.keyboard.press("Enter")
    page.locator(".bubble", has_text="秋思").wait_for()
    wait_done(page)
    chat = whole(served, page)
    assert [message["role"] for message in chat["messages"]].count("user") == 2
    assert len(answers(chat)) == 3
    page.reload()  # the branch chosen is the server's to keep
    page.locator(".bubble", has_text="秋思").wait_for()


def test_settings_say_what_serves_the_model(served: Running, visit: Visitor) -> None:
    page = visit.page()
    page.get_by_role("button", name="Settings").click()
    said = page.get_by_test_id("served-here").inner_text()
    facts = served.hub.models[served.model].facts
    assert facts["served here in"] in said and facts["cache"] in said
    assert str(served.hub.models[served.model].llm.serving) in said


def test_compare_two_settings(served: Running, visit: Visitor) -> None:
    page = visit.page()
    page.get_by_role("button", name="Compare").click()
    page.get_by_role("button", name="Settings").click()
    page.get_by_role("radio", name="Right").click()
    page.get_by_label("Temperature").first.fill("0.1")
    page.keyboard.press("Escape")
    say(page)
    wait_done(page, 2)
    assert page.locator(".together .side").count() == 2
    left, right = answers(whole(served, page))
    assert left["parent"] == right["parent"]
    assert (left["settings"]["temperature"], right["settings"]["temperature"]) == (0.8, 0.1)
    with page.expect_response(lambda response: response.request.method == "PATCH"):
        page.get_by_role("button", name="Go on with this one").click()
    page.wait_for_function(
        "() => document.querySelectorAll('.together .side')[1].classList.contains('chosen')"
    )
    page.reload()
    page.wait_for_function(
        "() => document.querySelectorAll('.together .side')[1]?.classList.contains('chosen')"
    )


def test_two_tabs_see_one_chat(
    served: Running, visit: Visitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow(served, monkeypatch)
    context = visit.context()
    one = visit.page(context)
    say(one, "登高")
    chat = chat_id(one)
    two = visit.page(context, f"#/c/{chat}")
    wait_done(two)
    wait_done(one)
    assert one.locator(".assistant").inner_text() == two.locator(".assistant").inner_text()
    say(two, "听雨")
    one.locator(".bubble", has_text="听雨").wait_for()
    wait_done(one, 2)
    served.http.request("DELETE", f"/api/chats/{chat}")
    one.get_by_text("This chat is gone").wait_for()


def test_search_rename_export_and_delete(served: Running, visit: Visitor) -> None:
    imported(served, ["a question of zebras", "an *answer* of quaggas"], "stripes")
    page = visit.page()
    page.keyboard.press("Control+k")
    page.keyboard.type("quagga")
    page.locator(".snippet", has_text="quaggas").wait_for()
    page.locator("nav li a").click()
    page.locator(".assistant, .plain").first.wait_for()
    page.get_by_role("button", name="More: stripes").click()
    with page.expect_download() as download:
        page.get_by_text("Export as Markdown").click()
    assert "quaggas" in Path(download.value.path()).read_text(encoding="utf-8")
    page.get_by_role("button", name="More: stripes").click()
    page.get_by_role("button", name="Rename").click()
    page.get_by_role("textbox", name="Rename").fill("horses")
    page.keyboard.press("Enter")
    page.get_by_role("button", name="More: horses").click()
    page.get_by_role("button", name="Delete").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    page.get_by_text("Nothing found").wait_for()
    assert not served.http.get("/api/chats", params={"search": "quagga"}).json()["chats"]


def test_an_export_is_imported(served: Running, visit: Visitor, tmp_path: Path) -> None:
    texts = ["a question of yaks", "an **answer**", "another", "and <b>this</b> & 深红"]
    original = imported(served, texts, "yaks")
    page = visit.page(address=f"#/c/{original}")
    page.get_by_role("button", name="More: yaks").click()
    with page.expect_download() as download:
        page.get_by_text("Export as JSON").click()
    file = tmp_path / "yaks.json"
    download.value.save_as(file)
    served.http.request("DELETE", f"/api/chats/{original}")
    page.get_by_text("This chat is gone").wait_for()

    def choose(path: Path) -> None:
        with page.expect_file_chooser() as chooser:
            page.get_by_role("button", name="Import a chat").click()
        chooser.value.set_files(path)

    choose(file)
    page.wait_for_url(lambda url: "/c/" in url and original not in url)
    page.locator(".bubble", has_text="another").wait_for()
    assert page.locator(".bubble").all_inner_texts() == texts[::2]
    again = whole(served, page)
    assert again["title"] == "yaks"
    assert [text_of(message) for message in again["messages"]] == [bare(text) for text in texts]
    say(page)  # it goes on like any other
    wait_done(page)
    for name, content in (("torn.json", file.read_text()[:99]), ("other.json", "[1]")):
        (tmp_path / name).write_text(content)
        choose(tmp_path / name)
        page.locator(".strip[role=alert]").wait_for()
        page.locator(".strip").get_by_role("button", name="Close").click()
    assert page.locator(".bubble", has_text="yaks").count() == 1


def test_thinking_unfolds_while_it_comes_and_folds_after(
    chromium: Any, thinking: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin_with(monkeypatch, thinking, "山水明月千里" * 3 + "</think>")
    slow(thinking, monkeypatch, 0.05)
    with visiting(chromium, thinking.url) as visitor:
        page = visitor.page()
        page.wait_for_selector(".welcome")
        page.evaluate(
            """() => {
              window.seen = [];
              new MutationObserver(() => {
                const fold = document.querySelector(".reasoning button");
                if (!fold) return;
                const thought = document.querySelector(".reasoning .text")?.textContent;
                window.seen.push([fold.getAttribute("aria-expanded"), thought ?? null, !!document.querySelector(".assistant .prose")]);
              }).observe(document.body, { childList: true, subtree: true, characterData: true, attributes: true });
            }"""
        )
        say(page)
        page.get_by_role("button", name="Thinking").wait_for()
        wait_done(page)
        (answer,) = answers(whole(thinking, page))
        thought, text = answer["parts"]
        assert thought == {"type": "reasoning", "text": "山水明月千里" * 3}
        seen = page.evaluate("window.seen")
        coming = [words for expanded, words, said in seen if not said]
        assert len(set(coming)) > 5 and all(thought["text"].startswith(w) for w in coming)
        assert {(expanded, words) for expanded, words, said in seen if said} == {("false", None)}
        fold = page.get_by_role("button", name="Thoughts")
        assert fold.get_attribute("aria-expanded") == "false"
        fold.click()
        assert page.locator(".reasoning .text").inner_text() == thought["text"]
        assert text["type"] == "text" and page.locator(".assistant .prose").count() == 1
        page.reload()
        fold.wait_for()
        assert page.locator(".reasoning .text").count() == 0


def test_a_phone_enters_with_the_key_and_is_told_of_no_shell(
    chromium: Any, tiny: Tiny, tmp_path: Path
) -> None:
    key = "a key of this test"[2:].replace(" ", "-")
    with (
        running(tiny.run, tmp_path, keys=(key,), allow_hosts=("home.test",)) as server,
        contextlib.closing(Proxy(server.port)) as proxy,
    ):
        with visiting(chromium, proxy.url.replace("127.0.0.1", "home.test")) as visitor:
            context = visitor.context()
            page = visitor.page(context)
            field = page.get_by_label("Key", exact=True)
            field.fill("not the key at all")
            proxy.down = True
            proxy.cut()
            page.get_by_role("button", name="Enter").click()
            page.get_by_text("The server cannot be reached; the key was not checked").wait_for()
            proxy.down = False
            page.get_by_role("button", name="Enter").click()
            page.get_by_text("That key is not right").wait_for()
            assert page.get_by_text("cannot be reached").count() == 0
            assert server.http.get("/api/chats").json() == {"chats": []}
            field.fill(key)
            field.press("Enter")
            note = page.get_by_text("cannot open while the server is away")
            note.wait_for()
            assert page.evaluate("[isSecureContext, 'serviceWorker' in navigator]") == [
                False,
                False,
            ]
            assert key not in page.evaluate(
                "JSON.stringify([document.cookie, { ...localStorage }])"
            )
            page.get_by_role("button", name="Settings").click()
            page.get_by_role("radio", name="中文").click()
            page.keyboard.press("Escape")
            page.get_by_text("服务器不在时此页打不开").wait_for()
            page.get_by_role("textbox").last.fill("长城")
            page.keyboard.press("Enter")
            wait_done(page)
            page.reload()  # the cookie lasts
            page.locator(".assistant").wait_for()
            context.clear_cookies()
            page.reload()
            page.get_by_text("此服务器需要密钥").wait_for()
            assert page.locator(".assistant").count() == 0
        with visiting(chromium, server.url) as visitor:  # from this machine itself
            page = visitor.page()
            page.get_by_label("Key", exact=True).fill(key)
            page.keyboard.press("Enter")
            page.locator(".welcome").wait_for()
            assert page.locator(".welcome .small").count() == 0


def test_chats_survive_a_restart_and_the_page_waits(
    chromium: Any, tiny: Tiny, tmp_path: Path
) -> None:
    with contextlib.ExitStack() as life:
        between = Proxy(life.enter_context(running(tiny.run, tmp_path)).port)
        try:
            with visiting(chromium, between.url) as visitor:
                page = visitor.page()
                say(page)
                wait_done(page)
                shown = page.locator(".assistant").inner_text()
                between.down = True
                between.cut()
                page.get_by_text("Connection lost").wait_for()
                life.close()
                between.target = life.enter_context(running(tiny.run, tmp_path)).port
                between.down = False
                page.get_by_text("Connection lost").wait_for(state="detached")
                assert page.locator(".assistant").inner_text() == shown
                page.reload()
                page.locator(".assistant").wait_for()
                assert page.locator(".assistant").inner_text() == shown
        finally:
            between.close()


def test_a_training_run_is_drawn(served: Running, visit: Visitor) -> None:
    page = visit.page(address="#/runs")
    page.locator("svg[role=img] path").first.wait_for()
    assert page.get_by_role("img", name="Loss").get_attribute("aria-label").count("Held out") == 1
    page.get_by_text("16 / 16").wait_for()
