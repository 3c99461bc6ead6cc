"""A conversation with a real pretrained model, in the page and by the API. Runs where its file is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.export.test_smollm2 import FILE
from tests.serve.browsing import answers, chromium, say, text_of, visiting, wait_done, whole
from tests.serve.running import running

__all__ = ["chromium"]
pytestmark = pytest.mark.skipif(
    not FILE.exists(), reason=f"{FILE} is not here; data/smollm2/fetch.py fetches it"
)


def test_smollm2_talks(chromium: Any, tmp_path: Path) -> None:
    with running(FILE, tmp_path) as server, visiting(chromium, server.url) as visitor:
        page = visitor.page()
        page.set_default_timeout(120_000)
        page.wait_for_selector(".welcome")
        page.get_by_role("button", name="Settings").click()
        page.get_by_label("Temperature").first.fill("0")
        page.keyboard.press("Escape")
        say(page, "What is the capital of France?")
        wait_done(page)
        say(page, "And of Italy?")
        wait_done(page, 2)
        first, second = (text_of(answer) for answer in answers(whole(server, page)))
        assert "Paris" in first and "Rome" in second
        assert page.locator(".bubble").all_inner_texts()[-1] == "And of Italy?"
        page.screenshot(path=str(tmp_path / "smollm2.png"))
        reply = server.chat("Say hello.", temperature=0, max_tokens=30).json()["choices"][0]
        assert reply["finish_reason"] == "stop" and "ello" in reply["message"]["content"]
        assert "<|im" not in reply["message"]["content"]
