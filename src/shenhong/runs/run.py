"""The run folder: what was done, with what, and what is left to do.

    recipe.toml      the resolved recipe, frozen when the run began
    manifest.json    each stage's state, time and outputs; what was measured or chosen on this machine
    events.jsonl     append-only: one JSON object a line, read by the report and by live views
    corpus/ tokenizer/ tokens/ checkpoints/ model/ evaluation.json report.html report.md

A stage builds its output under a temporary name and renames it when it is whole; only then does the
manifest call it done. So a kill at any byte leaves either the old state or the new one, and running
again goes on at the first stage that is not done. One process at a time may write: ``.lock`` is held
with flock, which the kernel releases even on SIGKILL.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from shenhong import __version__
from shenhong.errors import RunError
from shenhong.runs.events import end_of_lines
from shenhong.runs.files import atomic_write
from shenhong.runs.memory import peak_bytes
from shenhong.runs.regular import open_own, read_regular, refuse_links

FORMAT = 1  # of the manifest; another number is another layout, and is refused
# The stages of runs that were begun before their manifests named them.
_FIRST_PLAN = ("corpus", "tokenizer", "tokens", "train", "model", "evaluate", "report")
_OURS = re.compile(r"\.lock|\.manifest\.json\.\d+\.tmp")  # all there is before a manifest


def plan_of(manifest: dict[str, Any]) -> list[str]:
    """Names of a run's stages, in order, as they were frozen when it began."""
    plan = manifest.get("plan")
    if isinstance(plan, list) and plan and all(isinstance(name, str) for name in plan):
        return plan
    return list(_FIRST_PLAN)


class Run:
    """An open run folder. Use as a context manager; closing releases the lock.

    Errors: RunError when the folder is in use, is not a run, or is of another version.
    """

    def __init__(self, path: Path, *, create: bool = False, write: bool = True) -> None:
        self.path = Path(path)
        manifest = self.path / "manifest.json"
        if not manifest.exists():
            if not create:
                raise RunError(
                    f"{self.path} is not a run folder: it has no manifest.json; start one with 'shenhong train RECIPE'"
                )
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                present = [p.name for p in self.path.iterdir() if not _OURS.fullmatch(p.name)]
            except OSError as error:
                raise RunError(
                    f"cannot make {self.path}: {error.strerror}; choose another --run folder"
                ) from error
            # Anything else under this name belongs to someone: never write into it.
            if present:
                raise RunError(
                    f"{self.path} exists and is not a run folder; choose another --run folder"
                )
        self._lock = self._acquire() if write else None
        self.manifest: dict[str, Any] = {
            "format": FORMAT,
            "shenhong": __version__,
            "created": time.time(),
            "stages": {},
        }
        try:
            if write:
                refuse_links(self.path)
            if manifest.exists():
                self.manifest = self._read(manifest)
            if write:
                self._sweep()
                self._mend_events()
        except BaseException:
            self.close()
            raise

    def _acquire(self) -> int:
        name = self.path / ".lock"
        try:
            lock = open_own(name, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise RunError(
                f"cannot write {name}: {error.strerror}; choose another --run folder"
            ) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The name may lead to another file by now, which another process may lock.
            if not os.path.samestat(os.fstat(lock), os.stat(name, follow_symlinks=False)):
                raise OSError
        except OSError:
            owner = os.pread(lock, 32, 0).decode(errors="replace").strip()
            os.close(lock)
            raise RunError(
                f"{self.path} is in use by process {owner or 'unknown'}; wait for it or choose another --run folder"
            ) from None
        with contextlib.suppress(OSError):  # a full disk: the lock holds, only unsigned
            os.ftruncate(lock, 0)
            os.pwrite(lock, str(os.getpid()).encode(), 0)
        return lock

    def _read(self, manifest: Path) -> dict[str, Any]:
        try:
            content = json.loads(read_regular(manifest))
            found = content["format"]
            for stage in content["stages"].values():
                stage["state"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise RunError(
                f"{manifest} is damaged ({type(error).__name__}); restore it or choose another --run folder"
            ) from error
        if found != FORMAT:
            raise RunError(
                f"{self.path} was written in run format {found}, this version reads {FORMAT}; use the version that wrote it ({content.get('shenhong', 'unknown')}) or another --run folder"
            )
        return content

    def _sweep(self) -> None:
        """Clear what a killed writer left: remove the half-written, put back what had stepped aside."""
        steps = [path for path in (self.path / "steps").glob("*") if path.is_dir()]
        for folder in (
            base / name for base in (self.path, *steps) for name in (".", "checkpoints")
        ):
            for left in folder.glob(".*.tmp"):
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            for aside in folder.glob(".*.old"):
                final = folder / aside.name[1 : -len(".old")]
                shutil.rmtree(aside) if final.exists() else os.replace(aside, final)

    def _mend_events(self) -> None:
        """A kill inside an append leaves half a line; cut it, so that every line parses."""
        path = self.path / "events.jsonl"
        if not path.exists():
            return
        with os.fdopen(open_own(path, os.O_RDWR), "r+b") as file:
            file.truncate(end_of_lines(file))

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def save(self) -> None:
        atomic_write(
            self.path / "manifest.json", json.dumps(self.manifest, ensure_ascii=False, indent=1)
        )

    def freeze(self, key: str, measure: Callable[[], Any]) -> Any:
        """What was measured or chosen here stays: return the frozen value, or measure, freeze and return it."""
        if key not in self.manifest:
            self.manifest[key] = measure()
            self.save()
        return self.manifest[key]

    def event(self, kind: str, **fields: Any) -> None:
        line = json.dumps(
            {"time": round(time.time(), 3), "kind": kind, **fields}, ensure_ascii=False
        )
        try:
            to = open_own(self.path / "events.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            with os.fdopen(to, "a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            raise RunError(
                f"cannot write {self.path / 'events.jsonl'}: {error.strerror}; free space and run again"
            ) from error

    def book(self, name: str, seconds: float) -> None:
        """Count time that passed outside the stages, beside theirs."""
        spent = self.manifest["stages"].setdefault(name, {"state": "done", "seconds": 0.0})
        spent["seconds"] = round(spent["seconds"] + seconds, 3)
        self.save()

    def done(self, stage: str) -> bool:
        return self.manifest["stages"].get(stage, {}).get("state") == "done"

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[dict[str, Any]]:
        """Time a stage and mark it done; the block fills the yielded dictionary with outputs to record."""
        stages = self.manifest["stages"]
        before = stages.get(name, {}).get("seconds", 0.0)
        stages[name] = {"state": "begun", "seconds": before}
        self.save()
        self.event("stage", stage=name, state="begin")
        outputs: dict[str, Any] = {}
        start = time.monotonic()
        try:
            yield outputs
        except BaseException:
            # A stage stopped by Ctrl-C still tells what it cost; a killed one cannot.
            stages[name]["seconds"] = round(before + time.monotonic() - start, 3)
            with contextlib.suppress(RunError):  # the disk may be full; what stopped us says so
                self.save()
            raise
        seconds = before + time.monotonic() - start
        stages[name] = {
            "state": "done",
            "seconds": round(seconds, 3),
            "peak_bytes": peak_bytes(),
            "outputs": outputs,
        }
        self.save()
        self.event("stage", stage=name, state="end", seconds=round(seconds, 3))
