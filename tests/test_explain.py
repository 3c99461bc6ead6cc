"""The reference of a recipe is read from the settings themselves, so it holds all of them and is never old."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shenhong import explain
from shenhong.cli.main import main
from shenhong.recipe import load, parse
from tests.conftest import Tiny

ROOT = Path(__file__).parents[1]


def test_every_setting_says_what_it_means() -> None:
    silent = [
        f"{s.title} {x.key}" for s in explain.reference() for x in s.settings if not x.meaning
    ]
    assert not silent


def test_the_document_is_what_the_settings_say() -> None:
    document = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")
    assert document == explain.document(), "run: python -m shenhong.explain > docs/recipe.md"


def test_defaults_are_those_that_hold() -> None:
    recipe = parse({"name": "a", "minutes": 1, "corpus": {"paths": ["x"]}}, "here")
    ours = {(s.title, x.key): x.value for s in explain.reference(recipe) for x in s.settings}
    shown = {(s.title, x.key): x.value for s in explain.reference() for x in s.settings}
    given = {("", "name"), ("", "minutes"), ("[corpus]", "paths")}
    assert all(shown[key] == value for key, value in ours.items() if key not in given)
    assert ours["", "minutes"] == "1.0" and ours["[corpus]", "paths"] == '["x"]'


@pytest.mark.parametrize("how", [[], ["--explain"], ["--json"]])
def test_of_one_recipe(how: list[str], tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", str(tiny.recipe), *how]) == 0
    out = capsys.readouterr().out
    assert "hidden_size" in out and "32" in out and "formless" in out
    assert "min_characters" not in out
    if not how:
        again = tiny.recipe.with_name("again.toml")
        again.write_text(out)
        assert load(again) == load(tiny.recipe)
    if how == ["--json"]:
        assert {s["title"] for s in json.loads(out)} >= {"", "[corpus]", "[train]"}


def test_of_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "--explain"]) == 0
    out = capsys.readouterr().out
    for part in ("[corpus]", "[[steps]]", "share", "title_characters", "must be given"):
        assert part in out
