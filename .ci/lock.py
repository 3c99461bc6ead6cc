"""Writes constraints-hashed.txt: every pin of constraints.txt with the hashes of the files that pip may take for it.

pip itself is asked, for each Python that the package runs on, and installs nothing. torch is left out: which build of it
fits is the machine's matter, and it comes first, from its own index. Run it after a change of constraints.txt:

    python .ci/lock.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PINS, LOCKED = ROOT / "constraints.txt", ROOT / "constraints-hashed.txt"
INDEX = "https://pypi.org/simple"
PYTHONS = ("3.11", "3.12", "3.13")
PLATFORMS = [
    *(f"manylinux_2_{minor}_x86_64" for minor in range(40, 4, -1)),
    *(f"manylinux{year}_x86_64" for year in ("2014", "2010", "1")),
]
HEAD = f"""\
# Made by .ci/lock.py from constraints.txt, for CPython {", ".join(PYTHONS)} on x86-64 Linux; not to be changed by hand.
# A release is set up with it behind torch, which comes from its own index:
#   pip install --no-deps --require-hashes -r constraints-hashed.txt
"""


def pinned(text: str) -> list[str]:
    """NAME==VERSION of every line that is one, but not torch."""
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    return [line for line in lines if line and not line.startswith("torch==")]


def chosen(pins: Path, python: str, index: list[str]) -> dict[str, str]:
    """The SHA-256 of the file that pip takes for each pin."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        platforms = [word for name in PLATFORMS for word in ("--platform", name)]
        asked = [
            "--dry-run",
            "--no-deps",
            "--ignore-installed",
            "--quiet",
            "--only-binary",
            ":all:",
        ]
        where = ["--target", folder, "--python-version", python, *platforms, *index]
        # Settings of this machine may name other places to look in.
        clean = {k: v for k, v in os.environ.items() if not k.startswith("PIP_") or k == "PIP_CERT"}
        subprocess.run(
            [
                sys.executable,
                "-m",
                "pip",
                "install",
                *asked,
                *where,
                "--report",
                report,
                "-r",
                pins,
            ],
            check=True,
            env=clean | {"PIP_CONFIG_FILE": os.devnull, "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
        )
        found = json.loads(report.read_bytes())["install"]
    return {
        _plain(one["metadata"]["name"]): one["download_info"]["archive_info"]["hashes"]["sha256"]
        for one in found
    }


def _plain(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


def locked(pins: list[str], index: list[str], pythons: tuple[str, ...] = PYTHONS) -> str:
    """The text of the locked file."""
    with tempfile.TemporaryDirectory() as folder:
        wanted = Path(folder) / "pins.txt"
        wanted.write_text("\n".join(pins) + "\n", encoding="utf-8")
        found = [chosen(wanted, python, index) for python in pythons]
    lines = []
    for pin in pins:
        name = _plain(pin.partition("==")[0])
        hashes = sorted({files[name] for files in found})
        lines.append(" \\\n    ".join([pin, *(f"--hash=sha256:{hash}" for hash in hashes)]))
    return HEAD + "\n".join(lines) + "\n"


if __name__ == "__main__":
    LOCKED.write_text(locked(pinned(PINS.read_text()), ["--index-url", INDEX]), encoding="utf-8")
    print(f"{LOCKED.name}: {LOCKED.read_text().count('--hash=')} files")
