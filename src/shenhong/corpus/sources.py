"""Whether the files that a corpus was refined from are still what they were.

A run records each file's size, time of change and SHA-256. Where size and time are the recorded ones the
file is believed to be the same; otherwise its hash decides, so that a touched or copied file still is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shenhong.corpus import formats
from shenhong.corpus.find import find
from shenhong.corpus.settings import CorpusSettings
from shenhong.runs.files import beside, digest

# What was read before runs said so.
_ENDINGS_OF_0_1 = (".parquet", ".jsonl", ".ndjson", ".txt", ".text", ".md")


def record(settings: CorpusSettings, run: Path) -> dict[str, Any]:
    """What a run keeps of its sources: the endings that were read, and of each source, by its path as ``run`` keeps
    it, size, time of change (ns) and SHA-256. Errors: DataError."""
    found = {
        beside(file.path, run): {**_look(file.path), "sha256": digest(file.path)}
        for file in find(settings, Path(".")).files
    }
    return {"sources": found, "endings": [*formats.endings(), *formats.PACKED]}


def changed(recorded: dict[str, Any], settings: CorpusSettings, run: Path) -> str | None:
    """What is no longer as recorded, in words; None where nothing is. Errors: DataError.

    A run that was moved away from all of its sources lacks nothing: it has what they became. A file of a kind that was
    not read then is no new one.
    """
    sources = recorded.get("sources") or {}
    paths = {name: (run / name).resolve() for name in sources}
    if not any(path.exists() for path in paths.values()):
        return None
    for name, path in paths.items():
        if not path.exists():
            return f"{path} was removed"
        was = sources[name]
        touched = any(was[what] != now for what, now in _look(path).items())
        if touched and digest(path) != was["sha256"]:
            return f"{path} was changed"
    endings = set(recorded.get("endings") or _ENDINGS_OF_0_1)
    new = {
        file.path.resolve()
        for file in find(settings, Path(".")).files
        if endings.issuperset(formats.ending(file.path.name))
    } - set(paths.values())
    return f"{min(new)} was added" if new else None


def _look(path: Path) -> dict[str, int]:
    seen = path.stat()
    return {"bytes": seen.st_size, "modified_ns": seen.st_mtime_ns}
