"""Domains are found by their file's name, and the rest of the house lives without any one of them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

import shenhong
from shenhong.domains import domain, names, of_run
from shenhong.errors import RecipeError
from tests.conftest import RECIPE, Tiny


def test_the_ones_that_are_here() -> None:
    assert names() == ["chat", "text", "verse"]
    assert [domain(name).name for name in names()] == names()
    for name in names():
        json.dumps(domain(name).hints())


@pytest.mark.parametrize("kind", ["prose", "base", "registry", "../text", ""])
def test_an_unknown_kind_is_said_with_those_there_are(kind: str) -> None:
    with pytest.raises(RecipeError, match="there are chat, text, verse, or name a Python file"):
        domain(kind)


def test_of_a_run(tiny: Tiny, tmp_path: Path) -> None:
    assert of_run(tiny.run).name == "verse"
    assert of_run(tmp_path).name == "text"
    for text in (
        "",
        "[corpus]",
        "corpus = 3",
        '[corpus]\nkind = "x.py"',
        "[corpus]\nkind = 3",
        "\xff",
    ):
        (tmp_path / "recipe.toml").write_text(text)
        assert of_run(tmp_path).name == "text"


def test_text_has_no_reward() -> None:
    with pytest.raises(RecipeError, match="have no reward"):
        domain("text").reward("a", "b")


def test_without_verse_a_text_recipe_trains_reports_and_serves(tmp_path: Path) -> None:
    """In a copy of the package without the room of verse."""
    copy = tmp_path / "src" / "shenhong"
    shutil.copytree(Path(shenhong.__file__).parent, copy, ignore=shutil.ignore_patterns("ui"))
    shutil.rmtree(copy / "domains" / "verse")
    lines = (
        f"Sentence number {n} says something of its own about {n * n}.\n\n" for n in range(600)
    )
    (tmp_path / "english.txt").write_text("".join(lines))
    recipe = RECIPE.replace('kind = "verse"', 'kind = "text"\nmin_characters = 20')
    recipe = recipe.replace("poems.jsonl", "english.txt").replace(
        "vocab_size = 1024", "vocab_size = 384"
    )
    (tmp_path / "text.toml").write_text(recipe.replace("isolate_ideographs = true", ""))

    environment = os.environ | {"PYTHONPATH": str(tmp_path / "src")}

    def shenhong_(*words: str) -> str:
        command = [sys.executable, "-m", "shenhong.cli", *words]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=300, env=environment, cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "report:" in shenhong_("train", "text.toml", "--run", "run")
    assert (tmp_path / "run" / "report.html").exists()
    assert shenhong_("generate", "run", "Sentence", "--max-tokens", "5")
    assert "--rhyme" not in shenhong_("generate", "--help")
    assert "layers" in shenhong_("info", "run")
    command = [
        sys.executable,
        "-m",
        "shenhong.cli",
        "serve",
        "run",
        "--port",
        "0",
        "--data",
        "data",
    ]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=environment, cwd=tmp_path
    ) as server:
        try:
            assert server.stdout is not None
            address = server.stdout.readline().split()[2]
            body = {"messages": [{"role": "user", "content": "Sentence"}], "max_tokens": 4}
            reply = httpx.post(f"{address}/v1/chat/completions", json={"model": "run", **body})
            assert reply.status_code == 200, reply.text
            boot = httpx.get(f"{address}/api/bootstrap").json()
            assert boot["models"][0]["domain"] == {"name": "text", "options": []}
        finally:
            server.terminate()
