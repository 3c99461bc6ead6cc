"""A wheel is all that is needed: installed in an empty environment, started in an empty folder, it trains."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from what a clone has: what git tracks, and nothing beside it."""
    source = tmp_path_factory.mktemp("source")
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    for name in filter(None, names.stdout.decode().split("\0")):
        if (ROOT / name).is_file() and not name.startswith(("tests/", "webui/", "docs/")):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            os.link(ROOT / name, source / name)
    out = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet"]
    done = subprocess.run(
        [*build, "--wheel-dir", str(out), str(source)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (found,) = out.glob("shenhong-*.whl")
    return found


def test_it_holds_all_that_is_needed_and_nothing_of_the_machine(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
        metadata = file.read(next(n for n in names if n.endswith(".dist-info/METADATA"))).decode()
    for wanted in (
        "shenhong/py.typed",
        "shenhong/bundled/recipes/poet.toml",
        "shenhong/bundled/data/poetry/poems.parquet",
        "shenhong/bundled/data/poetry/README.md",
        "shenhong/bundled/data/english/factbook.parquet",
        "shenhong/bundled/data/assistant/facts.jsonl.gz",
        "shenhong/domains/verse/pingshui.json",
        "shenhong/numerics/cpu/csrc/attention.cpp",
        "shenhong/serve/ui/index.html",
    ):
        assert wanted in names, wanted
    assert (
        "License-Expression: Apache-2.0" in metadata and "Classifier: Typing :: Typed" in metadata
    )
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if name.startswith("tests") or "__pycache__" in name]
    assert wheel.stat().st_size < 60e6


def test_installed_in_an_empty_environment_it_trains(wheel: Path, tmp_path: Path) -> None:
    environment = tmp_path / "environment"
    venv.create(environment)
    python = environment / "bin" / "python"
    (site,) = environment.glob("lib/python*/site-packages")
    # Packages it depends on are borrowed; a .pth that they came with (ours, editable) is not read from there.
    borrowed = [path for path in sys.path if path.endswith("site-packages")]
    (site / "borrowed.pth").write_text("\n".join(borrowed))
    install = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(python),
        "install",
        "--no-deps",
        "--quiet",
    ]
    subprocess.run([*install, str(wheel)], check=True, capture_output=True)
    folder = tmp_path / "empty"
    folder.mkdir()

    def run(*words: str) -> Any:
        kept = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        command = [str(environment / "bin" / "shenhong"), *words]
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=folder, env=kept, timeout=500
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = subprocess.run(
        [str(python), "-c", "import shenhong; print(shenhong.__file__)"],
        capture_output=True, text=True, cwd=folder, env=os.environ | {"PYTHONPATH": ""},
    )  # fmt: skip
    assert where.stdout.startswith(str(environment)), where.stderr
    assert "quickstart" in run("--help")
    out = run("quickstart", "--minutes", "0.05", "--no-serve")
    assert "七绝 长城" in out and "report: runs/poet/report.html" in out
    manifest = json.loads((folder / "runs" / "poet" / "manifest.json").read_text())
    assert manifest["stages"]["report"]["state"] == "done"
    assert str(ROOT) not in (folder / "runs" / "poet" / "manifest.json").read_text()
    changes = ["--set", "train.steps=1", "--until", "tokens"]
    assert "done so far" in run("train", "recipes/text.toml", *changes)
