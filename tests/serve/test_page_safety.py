"""The page under hostile text, without its server, on a phone, for those who do not see it, and when a chat is long."""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.serve.browsing import (
    Proxy,
    Visitor,
    accessible,
    chromium,
    imported,
    proxy,
    say,
    visit,
    visiting,
    wait_done,
    with_axe,
)
from tests.serve.running import Running

__all__ = ["chromium", "proxy", "visit"]

ROOT = Path(__file__).parents[2]
BUILT = ROOT / "src" / "shenhong" / "serve" / "ui"
WEBUI = ROOT / "webui"

HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<svg onload=alert(1)><animate onbegin=alert(1) attributeName=x>",
    "<iframe srcdoc='<script>parent.alert(1)</script>'></iframe>",
    "<a href='javascript:alert(1)'>x</a> [x](javascript:alert(1)) [x](JaVaScRiPt&colon;alert(1))",
    "[x](data:text/html,<script>alert(1)</script>) <javascript:alert(1)> [x](vbscript:x)",
    "![x](https://example.com/track.png) ![x](//example.com/y.png) ![x](/api/chats)",
    '![x](x"onerror="alert(1)) [x](https://e.x/"onmouseover="alert(1))',
    "<style>*{background:url(https://example.com/z)}</style><link rel=stylesheet href=//example.com>",
    '<math><mtext><table><mglyph><style><!--</style><img title="--&gt;&lt;img src=1 onerror=alert(1)&gt;">',
    "<form action=https://example.com><button>send</button></form><meta http-equiv=refresh content=0;url=//e.x>",
    '```"><img src=x onerror=alert(1)>\n<script>alert(1)</script>\n```\n```html\n<b style=color:red onclick=alert(1)>\n```',
    "$\\href{javascript:alert(1)}{x}$ $$\\style{color:red}{x} \\class{y}{z} \\color{red} x$$ $\\includegraphics{//e.x/i}$",
    "$$\\def\\a{\\a\\a}\\a$$ \\(\\rule{9999em}{9999em}\\) $<img src=x onerror=alert(1)>$",
    "<p style='position:fixed;inset:0'>over</p> | a | b |\n|:-:|-:|\n| <u onclick=alert(1)>x</u> | y |",
    "&lt;script&gt;alert(1)&lt;/script&gt; \x00 \u202e \u2028 <!-- --!><img src=x onerror=alert(1)>",
]

# Every kind of piece, some wider than the page.
PROSE = f"""# Title

text `code` [link](https://e.x) $x^2$

```python
def f(x: int) -> str: return "a string" + str(0x1f) {"# a long comment " * 30}
```

> quote

| {"| ".join("a column" for _ in range(30))} |
|{"-|" * 30}
"""


def plain_model(page: Any) -> None:
    """Let answers be shown as Markdown, as of a model that is not of verse."""
    page.route(
        "**/api/bootstrap",
        lambda route: route.fulfill(
            json=json.loads(route.fetch().text().replace('"name":"verse"', '"name":"text"'))
        ),
    )


def test_hostile_text_does_nothing(served: Running, visit: Visitor) -> None:
    texts = [text for hostile in HOSTILE for text in (hostile, hostile)]
    chat = imported(served, texts, "<img src=x onerror=alert(1)>")
    page = visit.page()
    plain_model(page)
    page.goto(f"{served.url}/?again#/c/{chat}")
    page.locator(".prose").last.wait_for()
    while page.get_by_role("button", name="Show earlier").count():
        page.locator(".log").evaluate("log => log.scrollTo(0, 0)")
        page.wait_for_timeout(50)
    page.wait_for_timeout(300)
    assert page.locator(".prose").count() == len(HOSTILE)
    found = page.evaluate(
        """() => {
          const bad = [];
          for (const node of document.querySelectorAll(".log *")) {
            if (["SCRIPT","IFRAME","IMG","STYLE","LINK","FORM","META","OBJECT","EMBED"].includes(node.tagName)) bad.push(node.tagName);
            for (const { name, value } of node.attributes)
              if (name.startsWith("on") || name === "style" || (name === "href" && !/^(https?:|mailto:)/.test(value))) bad.push(`${name}=${value}`);
          }
          return bad;
        }"""
    )
    assert not found


def test_code_and_formulas_are_set(served: Running, visit: Visitor) -> None:
    text = (
        "Both $e^{i\\pi}$ and\n\n$$\\frac{a}{b}$$\n\n```python\ndef f(): return 1\n```\n\n"
        + "```python\n"
        + "x = 1\n" * 10_000
        + "```"
    )
    chat = imported(served, ["show", text])
    page = visit.page()
    plain_model(page)
    page.goto(f"{served.url}/?again#/c/{chat}")
    page.locator("mfrac").wait_for()
    page.locator(".hljs-keyword").first.wait_for()
    assert page.locator("math").count() == 2
    assert page.locator("pre code").nth(1).locator("span").count() == 0  # too long to be coloured


def test_hostile_markdown_costs_no_more_than_honest(served: Running, visit: Visitor) -> None:
    """By the processor time of the page's own thread: from many signs a parser would look to the end of the text."""

    def spent(piece: str) -> float:
        chat = imported(served, ["show", piece * (120_000 // len(piece)) + "\n\nthe end"])
        page = visit.page()
        session = page.context.new_cdp_session(page)
        session.send("Performance.enable", {"timeDomain": "threadTicks"})
        plain_model(page)
        page.goto(f"{served.url}/?again#/c/{chat}")
        page.get_by_text("the end").last.wait_for()
        metrics = session.send("Performance.getMetrics")["metrics"]
        page.close()
        return next(m["value"] for m in metrics if m["name"] == "ScriptDuration")

    honest = spent("Some *words* and `code`.\n\n")
    for piece in ("\\(", "\\[", "\\[\n\n", "_a_", "[", "> "):
        assert spent(piece) < 3 * honest, piece


def test_the_shell_opens_offline(chromium: Any, served: Running, proxy: Proxy) -> None:
    with visiting(chromium, proxy.url) as visitor:
        page = visitor.page()
        page.wait_for_selector(".welcome")
        page.evaluate("navigator.serviceWorker.ready.then(() => true)")
        page.wait_for_function("() => navigator.serviceWorker.controller !== null")
        proxy.down = True
        proxy.cut()
        page.reload()
        page.get_by_text("Server not reachable").wait_for()
        proxy.down = False
        page.wait_for_selector(".welcome")  # by itself


def test_phone(served: Running, visit: Visitor) -> None:
    page = visit.page(
        viewport={"width": 390, "height": 844},
        is_mobile=True,
        has_touch=True,
        device_scale_factor=2,
    )
    box = page.get_by_role("textbox", name="A title")
    box.fill("长城")
    box.press("Enter")
    assert box.input_value() == "长城\n"  # on touch, Enter is a new line
    page.get_by_role("button", name="Send").tap()
    wait_done(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.get_by_role("navigation").count() == 0
    page.get_by_role("button", name="Open chats").tap()
    page.get_by_role("navigation").wait_for()
    page.locator(".veil").tap(position={"x": 370, "y": 400})
    page.get_by_role("navigation").wait_for(state="hidden")
    for name in ("Send", "Settings"):
        size = page.get_by_role("button", name=name, exact=True).bounding_box()
        assert size["width"] >= 40 and size["height"] >= 40


@with_axe
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_fault_of_access(served: Running, visit: Visitor, scheme: str) -> None:
    chat = imported(served, ["show", PROSE])
    page = visit.page(color_scheme=scheme)
    page.wait_for_selector(".welcome")
    accessible(page, "welcome")
    page.get_by_role("button", name="Compare").click()
    say(page)
    wait_done(page, 2)
    accessible(page, "compare")
    page.get_by_role("button", name="Settings").click()
    accessible(page, "settings")
    page.keyboard.press("Escape")
    plain_model(page)
    page.goto(f"{served.url}/?again#/c/{chat}")
    page.locator(".prose .hljs-string").wait_for()
    accessible(page, "prose")
    page.get_by_role("button", name="Edit").click()
    accessible(page, "edit")
    page.get_by_role("button", name="Keyboard").click()
    accessible(page, "help")
    page.keyboard.press("Escape")
    page.get_by_role("button", name="More: imported").first.click()
    accessible(page, "menu")
    page.goto(f"{served.url}/#/runs")
    page.locator("svg[role=img] path").first.wait_for()
    accessible(page, "runs")


def main_tasks(trace: dict[str, Any]) -> list[float]:
    """Milliseconds of processor time of every task that held up a page; a busy machine does not change them."""
    names = [event for event in trace["traceEvents"] if event["name"] == "thread_name"]
    mains = {(e["pid"], e["tid"]) for e in names if e["args"]["name"] == "CrRendererMain"}
    tasks = [event for event in trace["traceEvents"] if event["name"] == "RunTask"]
    return [e["tdur"] / 1000 for e in tasks if "tdur" in e and (e["pid"], e["tid"]) in mains]


def test_three_hundred_messages_without_a_long_task(served: Running, visit: Visitor) -> None:
    answer = (
        "Some **text** with `code`.\n\n"
        + "\n".join(f"- point {n} of $x^{n}$" for n in range(8))
        + "\n\n```python\nx = [1, 2]\n```"
    )
    chat = imported(served, [answer if n % 2 else f"question {n}" for n in range(300)])
    page = visit.page()
    plain_model(page)
    page.wait_for_selector(".welcome")
    visit.browser.start_tracing(page=page, categories=["disabled-by-default-devtools.timeline"])
    page.evaluate("(id) => (location.hash = `#/c/${id}`)", chat)
    page.get_by_text("question 298").wait_for()
    for _ in range(30):
        page.locator(".log").evaluate("log => log.scrollTo(0, 0)")
        page.wait_for_timeout(60)
        if page.get_by_text("question 0", exact=True).count():
            break
    page.get_by_text("question 0", exact=True).wait_for()
    say(page)
    page.wait_for_timeout(500)
    tasks = main_tasks(json.loads(visit.browser.stop_tracing()))
    assert len(tasks) > 50 and max(tasks) < 200


def test_the_build_is_small_and_without_inline_parts() -> None:
    files = [path for path in BUILT.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 1.5 * 2**20
    index = (BUILT / "index.html").read_text(encoding="utf-8")
    assert "<style" not in index and "style=" not in index and "<script>" not in index
    first = [path for path in files if path.suffix in (".html", ".css", ".js")]
    first = [path for path in first if path.name.startswith("index")]
    assert sum(len(gzip.compress(path.read_bytes())) for path in first) <= 350 * 1024


@pytest.mark.skipif(
    shutil.which("npm") is None or not (WEBUI / "node_modules").exists(),
    reason="Node, or what npm ci installs, is not there",
)
def test_the_committed_build_is_a_fresh_one() -> None:
    done = subprocess.run([WEBUI / "check.sh"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_page_of_another_site_gets_no_answer_that_it_could_time(
    served: Running, chromium: Any, tmp_path: Path
) -> None:
    """Scripts may not read such answers, but chats must not even be looked for."""
    served.http.post("/api/chats", json={"title": "mine"})
    (tmp_path / "index.html").write_text("<!doctype html><p>elsewhere")
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        page = chromium.new_page()
        for host in ("127.0.0.1", "localhost"):  # the same site at another port, and another site
            page.goto(f"http://{host}:{other.server_address[1]}/")
            counted = served.hub.counts.copy()
            page.evaluate(
                "url => fetch(url, {mode: 'no-cors'}).catch(() => null)",
                f"{served.url}/api/chats?search=mine",
            )
            new = served.hub.counts - counted
            assert new == {("responses", "403"): 1}, host
        page.close()
        other.shutdown()
