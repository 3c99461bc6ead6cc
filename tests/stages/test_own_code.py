"""A person's own domain: one Python file that a recipe names, run only when they mean it."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from shenhong.cli.main import main
from shenhong.domains import of_run, registry
from tests.conftest import RECIPE, Tiny, state
from tests.test_extending import example

# What docs/extending.md shows, and a mark that tells when it is run.
HAIKU = (
    example("haiku.py")
    + """
from pathlib import Path

Path(__file__).with_name("was-run").write_text("yes")
"""
)


@pytest.fixture
def own(tiny: Tiny, tmp_path: Path) -> Path:
    """A recipe whose corpus is of a kind of its own, with the code beside it."""
    shutil.copy(tiny.recipe.parent / "poems.jsonl", tmp_path)
    (tmp_path / "haiku.py").write_text(HAIKU)
    recipe = RECIPE.replace(
        'kind = "verse"', 'kind = "haiku.py"\ntext_field = "paragraphs"\nleast = 24'
    )
    (tmp_path / "own.toml").write_text(recipe)
    return tmp_path / "own.toml"


def trained(own: Path) -> Path:
    assert main(["train", str(own), "--run", str(own.parent / "run")]) == 0
    return own.parent / "run"


def test_a_domain_is_one_file(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained(own)
    rows = pq.read_table(run / "corpus" / "train.parquet").to_pylist()
    assert all(len(row["text"]) >= 24 and row["prompt"] == row["title"][:8] for row in rows)
    found = json.loads((run / "evaluation.json").read_text())
    assert found["kind"] == "haiku" and "stops" in found["haiku"]["model"]["all"]
    assert "answers with a stop: " in capsys.readouterr().out
    (run / "report.html").unlink()
    assert main(["train", str(run)]) == 0 and main(["evaluate", str(run)]) == 0


def test_an_unknown_setting_of_it_is_named(own: Path, refused: Callable[..., str]) -> None:
    own.write_text(own.read_text().replace("least", "laest"))
    refused("train", own, says=("unknown key corpus.laest; did you mean least?",))


def test_only_training_and_measuring_run_it(own: Path) -> None:
    run, mark = trained(own), own.parent / "was-run"
    mark.unlink()
    assert main(["info", str(run)]) == 0
    assert main(["generate", str(run), "长城"]) == 0
    assert main(["export", str(run), "--to", "hf", "--out", str(own.parent / "hf")]) == 0
    assert of_run(run).name == "text"
    (run / "report.html").unlink()
    assert main(["info", str(run)]) == 0
    assert main(["recipe", str(own), "--explain"]) == 0
    assert main(["recipe", str(run / "recipe.toml")]) == 0
    assert not mark.exists()
    assert main(["evaluate", str(run)]) == 0 and mark.exists()


def test_other_code_takes_a_word(own: Path, refused: Callable[..., str]) -> None:
    run, mark, code = trained(own), own.parent / "was-run", own.parent / "haiku.py"
    mark.unlink()
    code.write_text(HAIKU.replace("too short", "much too short"))
    before = state(run)
    for call in (("train", run), ("evaluate", run), ("train", own, "--run", run)):
        if call[1] == run:
            refused(*call, says=(code, "is not the file it was begun with", "--allow-code"))
            assert not mark.exists() and state(run) == before
        else:
            refused(*call, says=(code, "is not the file it was begun with", "--allow-code"))
    refused("evaluate", run, "--allow-code", own.parent / "other.py", says=("the recipe names",))
    (run / "report.html").unlink()
    assert main(["train", str(run), "--allow-code", str(code)]) == 0
    assert main(["train", str(run)]) == 0  # from now on it is what the run knows


def test_the_same_code_at_another_place_takes_a_word(
    own: Path, refused: Callable[..., str]
) -> None:
    run = trained(own)
    moved = own.parent.parent / f"{own.parent.name}-moved"
    shutil.copytree(own.parent, moved)
    (moved / "was-run").unlink()
    refused("evaluate", moved / "run", says=("no word was given", "--allow-code"))
    assert not (moved / "was-run").exists()
    assert str(own.parent) not in (run / "manifest.json").read_text()


def test_a_run_made_by_somebody_else_runs_nothing_whatever_it_says_of_itself(
    own: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """All that lies in the folder may be forged; the word is kept elsewhere."""
    run, mark = trained(own), own.parent / "was-run"
    mark.unlink()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another person"))
    for call in (
        ("train", run),
        ("evaluate", run),
        ("train", run / "recipe.toml", "--run", run),
        ("train", run / "recipe.toml", "--run", own.parent / "new"),
        ("train", own, "--run", run),
    ):
        refused(*call, says=("no word was given", "--allow-code"))
        assert not mark.exists(), call
    assert main(["train", str(own), "--run", str(own.parent / "new"), "--until", "corpus"]) == 0


def test_what_is_checked_is_what_is_run(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is read once: what it becomes a moment later is neither run nor recorded."""
    run, code = trained(own), own.parent / "haiku.py"
    content, honest = code.read_bytes(), registry.read

    def swapped(path: Path) -> registry.Code:
        found = honest(path)
        code.write_text("raise SystemExit(3)")
        return found

    monkeypatch.setattr(registry, "read", swapped)
    assert main(["evaluate", str(run)]) == 0
    manifest = json.loads((run / "manifest.json").read_text())
    assert list(manifest["code"].values()) == [hashlib.sha256(content).hexdigest()]


def test_a_link_to_it_is_as_good(own: Path) -> None:
    (own.parent / "real").mkdir()
    shutil.move(own.parent / "haiku.py", own.parent / "real" / "haiku.py")
    (own.parent / "haiku.py").symlink_to("real/haiku.py")
    run = trained(own)
    (run / "report.html").unlink()
    assert main(["train", str(run)]) == 0


def test_a_word_for_nothing_is_said_and_a_refused_recipe_records_nothing(
    own: Path, refused: Callable[..., str], tmp_path: Path, tiny: Tiny
) -> None:
    run = trained(own)
    before = (run / "manifest.json").read_bytes()
    refused("train", run, "--allow-code", tmp_path / "x.py", says=("the recipe names", "haiku.py"))
    refused("train", tiny.recipe, "--allow-code", tmp_path / "x.py", says=("names no Python file",))
    other = own.parent / "other.py"
    other.write_text(HAIKU)
    own.write_text(own.read_text().replace("haiku.py", "other.py"))
    said = ("begun with another recipe",)
    refused("train", own, "--run", run, "--allow-code", other, says=said)
    assert (run / "manifest.json").read_bytes() == before
    assert main(["train", str(run)]) == 0


def test_a_word_for_measuring_is_kept(own: Path) -> None:
    run, code = trained(own), own.parent / "haiku.py"
    code.write_text(HAIKU.replace("too short", "much too short"))
    assert main(["evaluate", str(run), "--allow-code", str(code)]) == 0
    assert main(["evaluate", str(run)]) == 0


def test_measuring_again_says_the_headline_of_its_own(
    own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained(own)
    capsys.readouterr()
    assert main(["evaluate", str(run)]) == 0
    assert "answers with a stop: " in capsys.readouterr().out


@pytest.mark.parametrize("mark", ["run", "model"])
def test_no_code_of_a_run_or_a_model_folder_is_run(
    mark: str, own: Path, tiny: Tiny, refused: Callable[..., str]
) -> None:
    inside = own.parent / "taken"
    shutil.copytree(tiny.run if mark == "run" else tiny.run / "model", inside)
    (inside / "sub").mkdir()
    shutil.move(own.parent / "haiku.py", inside / "sub" / "haiku.py")
    own.write_text(own.read_text().replace('"haiku.py"', '"taken/sub/haiku.py"'))
    refused("train", own, says=("no code is run from there",))
    assert not (inside / "sub" / "was-run").exists()


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("x = 1\n", "offers no domain"),
        ("DOMAIN = 3\n", "offers no domain"),
        ("def f(:\n", "fails: SyntaxError"),
        ("1 / 0\n", "fails: ZeroDivisionError"),
        (None, "cannot be read"),
        (HAIKU.replace('{"title": title}', '{"titel": title}'), "gave"),
        (HAIKU.replace("return Kept(", "return float("), "fails"),
        ("raise SystemExit(0)\n", "fails: SystemExit"),
        (HAIKU.replace('    name = "haiku"\n', ""), "has a name of letters"),
        (HAIKU.replace('name = "haiku"', 'name = "../x"'), "has a name of letters"),
        (HAIKU.replace('name = "haiku"', 'name = "verse"'), "a domain of ours is called verse"),
        (
            HAIKU.replace("Settings = HaikuSettings", "Settings = dict"),
            "subclass of CorpusSettings",
        ),
        (HAIKU.replace('fields = ("title",)', 'fields = "title"'), "fields must be a tuple"),
        (HAIKU.replace('columns={"title": title}', 'columns={"title": 3}'), "is not text"),
    ],
)
def test_code_that_does_not_work_is_one_line(
    code: str | None, says: str, own: Path, refused: Callable[..., str]
) -> None:
    if code is None:
        (own.parent / "haiku.py").unlink()
    else:
        (own.parent / "haiku.py").write_text(code)
    refused("train", own, "--run", own.parent / "run", says=(says,))
