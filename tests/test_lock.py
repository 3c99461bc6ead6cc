"""The locked file names what constraints.txt names, and pip takes no other file than those it was made from."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / ".ci" / "lock.py"
if not SCRIPT.exists():
    pytest.skip("only in the repository", allow_module_level=True)


def script() -> Any:
    spec = importlib.util.spec_from_file_location("lock", SCRIPT)
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def test_every_pin_is_locked_and_nothing_else() -> None:
    text = (ROOT / "constraints-hashed.txt").read_text(encoding="utf-8").replace("\\\n", "")
    lines = [line.split() for line in text.splitlines() if line[:1] != "#"]
    pins = script().pinned((ROOT / "constraints.txt").read_text(encoding="utf-8"))
    assert [pin for pin, *_ in lines] == pins and len(pins) > 50
    for pin, *hashes in lines:
        assert hashes, pin
        assert all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", one) for one in hashes), pin


def wheel(folder: Path, text: str) -> None:
    with zipfile.ZipFile(folder / "tiny_part-1.0-py3-none-any.whl", "w") as file:
        file.writestr("tiny_part.py", text)
        info = "tiny_part-1.0.dist-info"
        file.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: Tiny_Part\nVersion: 1.0\n")
        file.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        file.writestr(f"{info}/RECORD", "")


def test_pip_takes_the_file_that_was_locked_and_no_other(tmp_path: Path) -> None:
    wheel(tmp_path, "x = 1\n")
    index = ["--no-index", "--find-links", str(tmp_path)]
    file = tmp_path / "locked.txt"
    file.write_text(script().locked(["tiny.part==1.0"], index, ("3.12",)), encoding="utf-8")
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--require-hashes", *index]
    for text, code in (("x = 1\n", 0), ("x = 2\n", 1)):
        wheel(tmp_path, text)
        into = ["--target", str(tmp_path / f"into{code}"), "-r", str(file)]
        done = subprocess.run([*install, *into], capture_output=True, text=True)
        assert done.returncode == code, done.stderr
    assert "DO NOT MATCH THE HASHES" in done.stderr
