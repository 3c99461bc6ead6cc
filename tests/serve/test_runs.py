"""Run folders of anybody: a bad one is shown as damaged and costs little, the others live."""

from __future__ import annotations

import asyncio
import json
import os
import tracemalloc
from pathlib import Path

import pytest

from shenhong.serve.page import runs
from tests.conftest import Tiny
from tests.serve.running import running

STAGES = {"corpus": {"state": "done"}, "train": {"state": "begun"}}
GOOD = {"format": 1, "name": "good", "stages": STAGES}


def made(root: Path, name: str, manifest: str | bytes | None = None, events: str = "") -> Path:
    path = root / name
    path.mkdir(parents=True)
    text = json.dumps(GOOD) if manifest is None else manifest
    (path / "manifest.json").write_bytes(text.encode() if isinstance(text, str) else text)
    (path / "events.jsonl").write_text(events)
    return path


def hole(path: Path) -> None:
    """Three GiB that take no room."""
    with open(path, "wb") as file:
        file.truncate(3 << 30)


def test_a_hostile_run_is_shown_and_the_others_live(tiny: Tiny, tmp_path: Path) -> None:
    root, secret = tmp_path / "runs", tmp_path / "secret"
    secret.write_text(json.dumps(GOOD | {"name": "secret"}))
    long = "9" * 400
    train = (
        f'{{"kind": "train", "step": {long}, "steps": {long}, "loss": {long}, "text": "\\ud800"}}\n'
    )
    made(root, "good", events='{"kind": "train", "step": 1, "steps": 4}\n')
    damaged = {"deep", "list", "digits", "hole", "link", "stages"}
    made(root, "deep", '{"stages": ' + "[" * 100_000)
    made(root, "list", "[]")
    made(root, "digits", '{"stages": {}, "a": ' + "9" * 5000 + "}")
    hole(made(root, "hole") / "manifest.json")
    (made(root, "link") / "manifest.json").unlink()
    (root / "link" / "manifest.json").symlink_to(secret)
    made(root, "stages", '{"stages": "x"}')
    made(root, "half", json.dumps(GOOD | {"name": "\ud800"}))
    made(root, "numbers", '{"stages": {}, "created": ' + long + "}", train)
    made(root, "nested", '{"stages": {}, "a": ' + "[" * 900 + "]" * 900 + "}")
    (made(root, "pipe") / "events.jsonl").unlink()
    os.mkfifo(root / "pipe" / "events.jsonl")
    hole(made(root, "sparse") / "events.jsonl")
    os.mkdir(os.fsencode(root) + b"/\xff")
    (root / os.fsdecode(b"\xff") / "manifest.json").write_text(json.dumps(GOOD))
    with running(tiny.run, tmp_path / "data", runs=root) as server:
        found = {run["folder"]: run for run in server.http.get("/api/runs").json()["runs"]}
        assert set(found) == {path.name for path in root.iterdir() if path.name.isascii()} | {"?"}
        assert {name for name, run in found.items() if run["state"] == "damaged"} == damaged
        assert (found["good"]["stage"], found["good"]["progress"]) == ("train", 0.25)
        for name, run in found.items():
            answer = server.http.get(f"/api/runs/{run['id']}")
            assert answer.status_code == 200 and "secret" not in answer.text, name
        (point,) = server.http.get(f"/api/runs/{found['numbers']['id']}").json()["series"]["train"]
        assert (point["loss"], point["text"]) == (None, "?")


def test_what_is_kept_of_a_run_is_bounded(tmp_path: Path) -> None:
    """Many events, many kinds, large ones: thinned, and never more in memory than a part of the file."""
    path = made(tmp_path, "run")
    fill = "x" * 20_000
    with open(path / "events.jsonl", "w") as file:
        for step in range(9_000):
            file.write(f'{{"kind": "train", "step": {step}}}\n')
        for number in range(1_500):
            file.write(f'{{"kind": "k{number % 100}", "text": "{fill}"}}\n')
        file.write(json.dumps({"kind": "huge", "text": "x" * 3_000_000}) + "\n")
    tracemalloc.start()
    found = runs.series(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    train = [event["step"] for event in found["series"]["train"]]
    assert len(found["series"]) == runs.KINDS and len(train) <= runs.POINTS + 1
    assert (train[0], train[-1]) == (0, 8_999) and train == sorted(train)
    assert found["offset"] == (path / "events.jsonl").stat().st_size
    assert peak < 3 * runs.KEPT_BYTES


def test_the_newest_of_a_step_that_was_run_twice(tmp_path: Path) -> None:
    lines = [{"kind": "train", "step": step, "loss": n} for n, step in enumerate([1, 2, 3, 2, 3])]
    path = made(tmp_path, "run", events="".join(json.dumps(line) + "\n" for line in lines))
    assert [event["loss"] for event in runs.series(path)["series"]["train"]] == [0, 3, 4]


@pytest.mark.parametrize("length", [100, 5_000_000])
def test_following_goes_past_a_line_that_never_ends(tmp_path: Path, length: int) -> None:
    good = '{"kind": "train", "step": 1}\n'
    path = made(tmp_path, "run", events="x" * length + "\n" + good)

    async def first() -> bytes:
        follow = runs._follow(asyncio.Event(), path, 0)
        return await asyncio.wait_for(anext(follow), 60)

    assert b'"step": 1' in asyncio.run(first())
