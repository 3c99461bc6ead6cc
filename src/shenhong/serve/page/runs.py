"""Training runs as they go, read from their folders: nothing here writes or locks one."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response

from shenhong.runs.events import read_events
from shenhong.runs.run import plan_of
from shenhong.serve.http import sse
from shenhong.serve.hub import hub_of
from shenhong.serve.page.chats import no_such

router = APIRouter(prefix="/api/runs")

POINTS = 2000  # of a series; longer ones are thinned
LOOK_SECONDS = 0.5
TAIL_BYTES = 65_536
MOST_RUNS = 200


def _id(path: Path) -> str:
    return hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]


def _folders(root: Path | None) -> dict[str, Path]:
    if root is None:
        return {}
    try:
        inside = sorted(path for path in root.iterdir() if path.is_dir())
    except OSError:
        return {}
    runs = [path for path in [root, *inside] if (path / "manifest.json").is_file()]
    return {_id(path): path for path in runs[:MOST_RUNS]}


def _find(request: Request, run: str) -> Path:
    found = _folders(hub_of(request).settings.runs).get(run)
    if found is None:
        raise no_such("run")
    return found


def _manifest(path: Path) -> dict[str, Any]:
    try:
        found = json.loads((path / "manifest.json").read_bytes())
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError):
        return {}


def _in_use(path: Path) -> bool:
    """Whether a process holds the run's lock. The kernel's list is read: trying the lock would disturb its owner."""
    try:
        inode = os.stat(path / ".lock").st_ino
        locks = Path("/proc/locks").read_text()
    except OSError:
        return False
    return any("FLOCK" in line and f":{inode} " in line for line in locks.splitlines())


def _tail(path: Path) -> list[dict[str, Any]]:
    """The last events."""
    try:
        with open(path / "events.jsonl", "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL_BYTES))
            lines = file.read().split(b"\n")
    except OSError:
        return []
    found = []
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            event = json.loads(line)
            if isinstance(event, dict):
                found.append(event)
    return found


def summary(path: Path) -> dict[str, Any]:
    """{id, name, state: running|done|stopped|damaged, stage, progress: 0 to 1}."""
    manifest = _manifest(path)
    stages = manifest.get("stages")
    stages = stages if isinstance(stages, dict) else {}
    plan = plan_of(manifest)
    done = [name for name in plan if _state(stages, name) == "done"]
    now = next((name for name in plan if _state(stages, name) == "begun"), None)
    trains = [event for event in _tail(path) if event.get("kind") == "train"]
    train: dict[str, Any] = trains[-1] if trains else {}
    progress = len(done) / len(plan)
    step, steps = train.get("step"), train.get("steps")
    if (
        now
        and (now == "train" or now.endswith("/train"))
        and isinstance(step, int)
        and isinstance(steps, int)
        and steps > 0
    ):
        progress = min(1.0, step / steps)
    state = "running" if _in_use(path) else "done" if len(done) == len(plan) else "stopped"
    name = manifest.get("name") or path.resolve().name
    return {
        "id": _id(path),
        "name": str(name),
        "folder": path.name,
        "state": state if manifest else "damaged",
        "stage": now or (done[-1] if done else None),
        "progress": round(progress, 4),
        "created": manifest.get("created"),
    }


def _state(stages: dict[str, Any], name: str) -> str | None:
    stage = stages.get(name)
    return stage.get("state") if isinstance(stage, dict) else None


def series(path: Path) -> dict[str, Any]:
    """Events by kind, thinned to `POINTS` each, and the byte at which following them goes on."""
    offset = _size(path)
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for event in read_events(path):
        if isinstance(event, dict):
            by_kind.setdefault(str(event.get("kind")), []).append(event)
    thinned = {}
    for kind, events in by_kind.items():
        stride = -(-len(events) // POINTS)
        kept = events[::stride]
        thinned[kind] = kept if kept[-1] is events[-1] else [*kept, events[-1]]
    return {"series": thinned, "offset": offset}


def _size(path: Path) -> int:
    """Where the last whole line ends."""
    try:
        data = (path / "events.jsonl").read_bytes()
    except OSError:
        return 0
    return data.rfind(b"\n") + 1


@router.get("")
async def list_runs(request: Request) -> Any:
    root = hub_of(request).settings.runs
    return {"runs": await asyncio.to_thread(lambda: [summary(p) for p in _folders(root).values()])}


@router.get("/{run}")
async def get_run(request: Request, run: str) -> Response:
    path = _find(request, run)

    def read() -> str:
        manifest = _manifest(path)
        shown = {k: v for k, v in manifest.items() if k not in ("format",)}
        whole = summary(path) | {"manifest": shown} | series(path)
        return json.dumps(_finite(whole), ensure_ascii=False)

    return Response(await asyncio.to_thread(read), media_type="application/json")


def _finite(value: Any) -> Any:
    """NaN and infinities, which JSON in browsers has not, become null."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    if isinstance(value, float) and not -1e308 < value < 1e308:
        return None
    return value


@router.get("/{run}/events")
async def run_events(
    request: Request, run: str, after: Annotated[int | None, Query(ge=0, le=2**62)] = None
) -> Response:
    last = request.headers.get("last-event-id", "")
    start = int(last) if last.isascii() and last.isdigit() and len(last) < 19 else after or 0
    return sse.EventStream(_follow(hub_of(request).stopped, _find(request, run), start))


async def _follow(stopped: asyncio.Event, path: Path, offset: int) -> AsyncGenerator[bytes, None]:
    """Every whole line from byte `offset` on, each with the byte after it as its number."""
    while not stopped.is_set():
        lines = await asyncio.to_thread(_lines, path, offset)
        if lines is None:  # the run was started anew under this name
            offset = 0
            continue
        for line in lines:
            offset += len(line)
            with contextlib.suppress(ValueError, RecursionError):
                yield sse.event(_finite(json.loads(line)), number=offset)
        if not lines:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stopped.wait(), LOOK_SECONDS)


def _lines(path: Path, offset: int) -> list[bytes] | None:
    try:
        with open(path / "events.jsonl", "rb") as file:
            if file.seek(0, os.SEEK_END) < offset:
                return None
            file.seek(offset)
            data = file.read(2**20)
            if b"\n" not in data:
                data += file.readline()  # one that is longer still
    except OSError:
        return []
    return data[: data.rfind(b"\n") + 1].splitlines(keepends=True)
