"""Training runs as they go, read from their folders: nothing here writes or locks one.

A folder may be anybody's. Only regular files are read, no link is followed inside of a run, and what one run can cost is
bounded: the bytes that are read of it, those that are kept, and the threads that read. One that is no whole run is shown
as damaged, and the others as ever.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response

from shenhong.runs.events import LINE, end_of_lines, parse, step_of, stream
from shenhong.runs.regular import open_regular, read_regular
from shenhong.runs.run import plan_of
from shenhong.serve.http import sse
from shenhong.serve.hub import hub_of
from shenhong.serve.page.chats import no_such
from shenhong.serve.page.streams import event_stream, resumed_after

router = APIRouter(prefix="/api/runs")

POINTS = 2000  # of a series; longer ones are thinned
KEPT_BYTES = 8 << 20  # of all series of a run together; then all are thinned
KINDS = 64  # of events
LOOK_SECONDS = 0.5
TAIL_BYTES = 65_536
POINT_BYTES = 1 << 16  # of an event that is a point of a series
MANIFEST_BYTES = 8 << 20  # it names every file of the corpus
LONGEST_NAME, DEEPEST = 200, 32
MOST_RUNS, MOST_PRESENT = 200, 10_000

_readers = ThreadPoolExecutor(
    2, "runs"
)  # apart, so that a folder that is slow to read holds up nothing else


Result = TypeVar("Result")


async def _read(work: Callable[..., Result], *arguments: Any) -> Result:
    return await asyncio.get_running_loop().run_in_executor(_readers, work, *arguments)


def _id(path: Path) -> str:
    return hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:16]


def _folders(root: Path | None) -> dict[str, Path]:
    if root is None:
        return {}
    try:
        inside = sorted(path for path in islice(root.iterdir(), MOST_PRESENT) if path.is_dir())
    except OSError:
        return {}
    runs = [path for path in [root, *inside] if (path / "manifest.json").is_file()]
    return {_id(path): path for path in runs[:MOST_RUNS]}


async def _find(request: Request, run: str) -> Path:
    found = (await _read(_folders, hub_of(request).settings.runs)).get(run)
    if found is None:
        raise no_such("run")
    return found


def _manifest(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(read_regular(path / "manifest.json", MANIFEST_BYTES, follow=False))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


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
        return [event for event, _ in stream(path, TAIL_BYTES)]
    except OSError:
        return []


def summary(path: Path) -> dict[str, Any]:
    """{id, name, state: running|done|stopped|damaged, stage, progress: 0 to 1}."""
    manifest = _manifest(path)
    stages = manifest.get("stages")
    whole = isinstance(stages, dict)
    stages = stages if isinstance(stages, dict) else {}
    plan = plan_of(manifest)
    done = [name for name in plan if _state(stages, name) == "done"]
    now = next((name for name in plan if _state(stages, name) == "begun"), None)
    trains = [event for event in _tail(path) if event["kind"] == "train"]
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
        progress = max(0.0, min(steps, step) / steps)
    state = "running" if _in_use(path) else "done" if len(done) == len(plan) else "stopped"
    name, created = manifest.get("name"), manifest.get("created")
    stage = now or (done[-1] if done else None)
    known = {
        "id": _id(path),
        "name": (name if isinstance(name, str) and name else path.resolve().name)[:LONGEST_NAME],
        "folder": path.name,
        "state": state if whole else "damaged",
        "stage": stage and stage[:LONGEST_NAME],
        "progress": round(progress, 4),
        "created": created if isinstance(created, int | float) else None,
    }
    return _sendable(known)


def _state(stages: dict[str, Any], name: str) -> str | None:
    stage = stages.get(name)
    return stage.get("state") if isinstance(stage, dict) else None


class _Series:
    """Events of one kind, evenly spread over all there were, and the last; steps that were run twice have the newest."""

    def __init__(self) -> None:
        self.kept: dict[tuple[Any, ...], tuple[dict[str, Any], int]] = {}
        self.last: dict[str, Any] = {}
        self.stride, self.count = 1, 0

    def add(self, event: dict[str, Any], size: int) -> None:
        key = step_of(event) if "step" in event else (self.count,)
        self.kept.pop(key, None)
        if self.count % self.stride == 0:
            self.kept[key] = event, size
        self.last = event
        self.count += 1
        if len(self.kept) > 2 * POINTS:
            self.thin()

    def thin(self) -> None:
        self.kept = dict(islice(self.kept.items(), 0, None, 2))
        self.stride *= 2

    @property
    def size(self) -> int:
        return sum(size for _, size in self.kept.values())

    def points(self) -> list[dict[str, Any]]:
        events = [event for event, _ in self.kept.values()]
        found = events[:: -(-len(events) // POINTS) or 1]
        return found if found and found[-1] is self.last else [*found, self.last]


def series(path: Path) -> dict[str, Any]:
    """Events by kind, thinned to `POINTS` each, and the byte at which following them goes on."""
    offset = _size(path)
    by_kind: dict[str, _Series] = {}
    unmeasured = 0
    for event, size in stream(path):
        kind = event["kind"]
        if size > POINT_BYTES or (kind not in by_kind and len(by_kind) == KINDS):
            continue
        by_kind.setdefault(kind, _Series()).add(event, size)
        unmeasured += size
        if unmeasured > KEPT_BYTES:
            while sum(one.size for one in by_kind.values()) > KEPT_BYTES:
                for one in by_kind.values():
                    one.thin()
            unmeasured = KEPT_BYTES // 2
    return {"series": {kind: one.points() for kind, one in by_kind.items()}, "offset": offset}


def _size(path: Path) -> int:
    """Where the last whole line ends."""
    try:
        with open_regular(path / "events.jsonl", follow=False) as file:
            return end_of_lines(file, LINE)
    except OSError:
        return 0


@router.get("")
async def list_runs(request: Request) -> Any:
    root = hub_of(request).settings.runs
    return {"runs": await _read(lambda: [summary(path) for path in _folders(root).values()])}


@router.get("/{run}")
async def get_run(request: Request, run: str) -> Response:
    path = await _find(request, run)

    def read() -> str:
        manifest = _manifest(path)
        shown = {k: v for k, v in manifest.items() if k not in ("format",)}
        whole = summary(path) | {"manifest": shown} | series(path)
        return json.dumps(_sendable(whole), ensure_ascii=False)

    return Response(await _read(read), media_type="application/json")


def _sendable(value: Any, depth: int = 0) -> Any:
    """What JSON in browsers has: no NaN, no number beyond the greatest float, no half of a surrogate pair, no abyss."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, dict | list) and depth == DEEPEST:
        return None
    if isinstance(value, dict):
        return {_sendable(k): _sendable(v, depth + 1) for k, v in value.items()}
    if isinstance(value, list):
        return [_sendable(v, depth + 1) for v in value]
    if isinstance(value, int | float) and not -1e308 < value < 1e308:
        return None
    return value


@router.get("/{run}/events")
async def run_events(
    request: Request, run: str, after: Annotated[int | None, Query(ge=0, le=2**62)] = None
) -> Response:
    path, start = await _find(request, run), resumed_after(request, after) or 0
    return event_stream(request, _follow(hub_of(request).stopped, path, start))


async def _follow(stopped: asyncio.Event, path: Path, offset: int) -> AsyncGenerator[bytes, None]:
    """Every whole line from byte `offset` on, each with the byte after it as its number."""
    while not stopped.is_set():
        events, end = await _read(_events, path, offset)
        for event in events:
            yield event
        if end == offset:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stopped.wait(), LOOK_SECONDS)
        offset = end


def _events(path: Path, offset: int) -> tuple[list[bytes], int]:
    """The events that follow, ready to be sent, and the byte after them: 0 where the run was started anew under this name."""
    try:
        with open_regular(path / "events.jsonl", follow=False) as file:
            if file.seek(0, os.SEEK_END) < offset:
                return [], 0
            file.seek(offset)
            data = file.read(LINE)
    except OSError:
        return [], offset
    if len(data) == LINE and b"\n" not in data:  # too long to be an event
        return [], offset + LINE
    found = []
    for line in data[: data.rfind(b"\n") + 1].splitlines(keepends=True):
        offset += len(line)
        if (event := parse(line)) is not None:
            found.append(sse.event(_sendable(event), number=offset))
    return found, offset
