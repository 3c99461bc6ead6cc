"""What happened in a run, as its events.jsonl tells: one JSON object a line, appended and never rewritten."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from shenhong.runs.regular import open_regular

LINE = 2 << 20  # bytes of an event; what is longer is none of ours
MOST = 64 << 20  # bytes that are read of a file, its last ones
_BLOCK = 1 << 16


def read_events(path: Path) -> list[dict[str, Any]]:
    """All whole events of a run, oldest first. Steps that were run twice after a kill keep the newest event."""
    events: list[dict[str, Any]] = []
    newest: dict[tuple[Any, ...], int] = {}
    for event, _ in stream(path):
        if "step" in event:
            newest[step_of(event)] = len(events)
        events.append(event)
    return [e for i, e in enumerate(events) if "step" not in e or newest[step_of(e)] == i]


def stream(path: Path, most: int = MOST) -> Iterator[tuple[dict[str, Any], int]]:
    """The whole events of a run one after the other, and the bytes of each; of a larger file those in its last bytes."""
    try:
        file = open_regular(Path(path) / "events.jsonl", follow=False)
    except OSError:
        return
    with file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - most))
        left = min(size, most)  # a writer may be faster than its reader
        while left > 0 and (line := file.readline(min(LINE, left))):
            left -= len(line)
            if (event := parse(line)) is not None:
                yield event, len(line)


def parse(line: bytes) -> dict[str, Any] | None:
    """The event that a line is; None for the half line of a running or killed writer, and for what is nothing of ours."""
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    ours = isinstance(event, dict) and isinstance(event.get("kind"), str)
    return event if ours and isinstance(event.get("step", 0), int) else None


def step_of(event: dict[str, Any]) -> tuple[Any, ...]:
    """What a newer event of the same step has in common with it."""
    stage = event.get("stage")
    return event["kind"], stage if isinstance(stage, str) else None, event["step"]


def end_of_lines(file: BinaryIO, most: int | None = None) -> int:
    """The byte at which the last whole line ends; the file's end where none does in its last ``most`` bytes."""
    end = size = file.seek(0, os.SEEK_END)
    while end:
        if most is not None and size - end >= most:
            return size
        start = max(0, end - _BLOCK)
        file.seek(start)
        if (found := file.read(end - start).rfind(b"\n")) >= 0:
            return start + found + 1
        end = start
    return 0
