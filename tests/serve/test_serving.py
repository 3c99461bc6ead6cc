"""What serves a model is said: by the page's first answer, and by the line of `serve` (both as they came to be)."""

from __future__ import annotations

from pathlib import Path

import pytest

from shenhong.model import serving
from shenhong.numerics import kernels_in_use
from tests.conftest import Tiny
from tests.serve.running import running


def test_the_page_is_told_what_serves_and_how_much_room_there_is(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kernels_in_use():
        pytest.skip("no compiler here")
    for has, dtype in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(serving, "multiplies_bfloat16", lambda has=has: has)
        with running([tiny.run, tiny.run], tmp_path / dtype) as server:
            models = server.http.get("/api/bootstrap").json()["models"]
            for model in models:
                said = model["facts"]["served here in"]
                assert said.startswith(f"{dtype}, by the kernel: this CPU ")
                engine = server.hub.models[model["id"]].llm.engine
                room = engine.pages.count * engine.settings.page
                assert model["facts"]["cache"].startswith(f"{room:,} tokens")
                assert engine.settings.cache_share == 0.125  # two models share the memory
