"""Rooms: who may import whom, read from the source."""

from __future__ import annotations

import ast
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "shenhong"


def imports(file: Path) -> set[str]:
    """Names of the modules of ours that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.startswith("shenhong.")}


def test_the_tokenizer_does_not_know_the_corpus():
    rooms: dict[str, set[str]] = {}
    for file in SOURCE.rglob("*.py"):
        room = file.relative_to(SOURCE).parts[0].removesuffix(".py")
        rooms.setdefault(room, set()).update(name.split(".")[1] for name in imports(file))
    assert "tokenizer" in rooms["corpus"] and "corpus" not in rooms["tokenizer"]
    assert rooms["tokenizer"] <= {"tokenizer", "errors"}
