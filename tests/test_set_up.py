"""./run sets up an environment; pip itself is played by a script that keeps the pins it was given."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FAKE = f"""#!/usr/bin/env bash
# python -m pip install ... --constraint FILE ...
if [ "$2" = pip ]; then
    while [ "$1" != --constraint ]; do shift; done
    cp "$2" "$SEEN"
elif [[ "$2" = *shenhong* ]]; then :
else exec {sys.executable} -S "$@"; fi
"""


@pytest.mark.parametrize(
    ("torch", "pinned"),
    [(None, True), ("2.10.1+cpu", True), ("2.11.0", False), ("2.14.0a0+git12ab", False)],
)
def test_an_installed_torch_is_kept_where_it_is_new_enough(torch, pinned, tmp_path):
    for name in ("run", "constraints.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    for file, text in ((python, FAKE), (python.with_name("shenhong"), "#!/bin/sh\necho $@\n")):
        file.write_text(text)
        file.chmod(0o755)
    modules = tmp_path / "modules"
    modules.mkdir()
    if torch:
        (modules / "torch.py").write_text(f"__version__ = {torch!r}\n")
    seen = tmp_path / "seen.txt"
    done = subprocess.run(
        [str(tmp_path / "run"), "info", "x"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHON": str(python), "PYTHONPATH": str(modules), "SEEN": str(seen)},
    )
    assert (done.returncode, done.stdout) == (0, "info x\n"), done.stderr
    pins, all_pins = (p.read_text().splitlines() for p in (seen, ROOT / "constraints.txt"))
    left_out = [line for line in all_pins if line not in pins]
    assert left_out == ([] if pinned else [p for p in all_pins if p.startswith("torch==")])
    assert any(p.startswith("torch==") for p in all_pins)
