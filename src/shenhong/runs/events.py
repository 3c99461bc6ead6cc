"""What happened in a run, as its events.jsonl tells: one JSON object a line, appended and never rewritten."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_events(path: Path) -> list[dict[str, Any]]:
    """All whole events of a run, oldest first. Steps that were run twice after a kill keep the newest event."""
    events: list[dict[str, Any]] = []
    newest: dict[tuple[Any, ...], int] = {}
    file = Path(path) / "events.jsonl"
    if not file.exists():
        return events
    for line in file.read_bytes().split(b"\n"):
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            continue  # the half line of a running or killed writer
        if not (isinstance(event, dict) and isinstance(event.get("kind"), str)):
            continue  # nothing of ours
        if not isinstance(event.get("step", 0), int):
            continue
        if "step" in event:
            newest[_step(event)] = len(events)
        events.append(event)
    return [e for i, e in enumerate(events) if "step" not in e or newest[_step(e)] == i]


def _step(event: dict[str, Any]) -> tuple[Any, ...]:
    """What a newer event of the same step has in common with it."""
    return event["kind"], str(event.get("stage")), event["step"]
