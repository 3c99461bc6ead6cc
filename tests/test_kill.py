"""A run that is killed again and again ends with the very bytes of the run that nothing stopped."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from shenhong.cli.main import main
from shenhong.runs.events import read_events
from tests.conftest import STAGES, Tiny, shenhong

KILLS, INSIDE_CHECKPOINT = 20, 5
LOOK = 0.0003  # seconds between looks at the victim's files


class Process:
    """A real ``shenhong train`` whose files are watched."""

    def __init__(self, recipe: Path, run: Path) -> None:
        self.run, self.said = run, run.with_suffix(".stderr")
        self.skip = _size(run / "events.jsonl")
        with open(self.said, "wb") as said:
            self.child = subprocess.Popen(
                shenhong("train", recipe, "--run", run), stdout=subprocess.DEVNULL, stderr=said
            )

    def events(self) -> list[dict[str, Any]]:
        """The whole lines that this process appended. It first cuts off a half line left by a kill."""
        file = self.run / "events.jsonl"
        if _size(file) <= self.skip:
            return []
        lines = file.read_bytes()[self.skip :].split(b"\n")[:-1]
        return [json.loads(line) for line in lines if line.startswith(b"{")]

    def wait(self, wanted: Callable[[], object]) -> bool:
        """Look until ``wanted`` holds; False where the process ended first."""
        deadline = time.monotonic() + 60
        while self.child.poll() is None:
            if wanted():
                return True
            assert time.monotonic() < deadline, self.said.read_text()
            time.sleep(LOOK)
        return False

    def begun(self, stage: str) -> bool:
        return self.wait(
            lambda: any(e.get("stage") == stage and e["state"] == "begin" for e in self.events())
        )

    def trained(self, steps: int) -> bool:
        """Wait for so many steps of this process."""
        return self.wait(lambda: sum(e["kind"] == "train" for e in self.events()) >= steps)

    def writing(self) -> bool:
        """Wait for a checkpoint to be half-written; what an earlier kill left is gone by then."""
        return self.begun("train") and self.wait(lambda: half_written(self.run))

    def end(self, how: signal.Signals) -> tuple[int, str]:
        """Send a signal. Returns the exit code and what was said."""
        self.child.send_signal(how)
        code = self.child.wait(60)
        return code, self.said.read_text()


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def half_written(run: Path) -> list[Path]:
    return list((run / "checkpoints").glob(".step-*.tmp"))


def stage_in(run: Path) -> str:
    """The stage that was begun last."""
    return [e["stage"] for e in read_events(run) if e["kind"] == "stage"][-1]


def done(run: Path, stage: str) -> bool:
    stages = json.loads((run / "manifest.json").read_text())["stages"]
    return stages.get(stage, {}).get("state") == "done"


def timeless(value: Any) -> Any:
    """JSON without what a clock said, nor the hash over it."""
    if isinstance(value, dict):
        unequal = ("seconds", "time", "sha256")
        return {k: timeless(v) for k, v in value.items() if k not in unequal}
    return [timeless(v) for v in value] if isinstance(value, list) else value


def contents(run: Path) -> dict[str, Any]:
    """Every file whose bytes must not depend on interruptions: JSON without times, all else whole."""
    kept: dict[str, Any] = {}
    for name in ("corpus", "tokenizer", "tokens", "checkpoints", "model", "evaluation.json"):
        for file in sorted([run / name, *(run / name).rglob("*")]):
            if file.is_file():
                data = file.read_bytes()
                key = str(file.relative_to(run))
                kept[key] = timeless(json.loads(data)) if file.suffix == ".json" else data
    return kept


def assert_equal(run: Path, whole: Path) -> None:
    """Name the file that differs, not its megabytes."""
    ours, theirs = contents(run), contents(whole)
    assert list(ours) == list(theirs)
    assert [name for name in ours if ours[name] != theirs[name]] == []


def assert_tidy(run: Path) -> None:
    assert [p for p in run.rglob(".*") if p.name.endswith((".tmp", ".old"))] == []


def losses(run: Path) -> list[tuple[int, float]]:
    return [(e["step"], e["loss"]) for e in read_events(run) if e["kind"] == "train"]


def plans(seconds: dict[str, float]) -> Iterator[tuple[str, Callable[[Process], bool]]]:
    """For each stage what to wait for before each kill: at its start, then somewhere inside."""
    chance = random.Random(20240601)

    def after(stage: str, share: float) -> Callable[[Process], bool]:
        def wait(process: Process) -> bool:
            reached = process.begun(stage)
            time.sleep(share * seconds[stage])
            return reached

        return wait

    def steps(count: int, share: float) -> Callable[[Process], bool]:
        def wait(process: Process) -> bool:
            reached = process.trained(count)
            time.sleep(share * seconds["train"] / 16)
            return reached

        return wait

    for stage in STAGES:
        if stage == "train":
            for _ in range(7):
                yield stage, steps(chance.randint(0, 2), chance.random())
            continue
        yield stage, after(stage, 0.0)
        yield stage, after(stage, 0.7 * chance.random())


def test_killed_at_any_point_and_run_again_a_run_ends_equal(tiny: Tiny, tmp_path: Path) -> None:
    run = tmp_path / "run"
    chance = random.Random(7)
    stages = json.loads((tiny.run / "manifest.json").read_text())["stages"]
    killed: Counter[str] = Counter()
    inside = 0

    def kill(process: Process) -> None:
        code, said = process.end(signal.SIGKILL)
        if code == -signal.SIGKILL:
            killed[stage_in(run)] += 1
        else:
            assert code == 0, said

    for stage, wait in plans({name: facts["seconds"] for name, facts in stages.items()}):
        if stage == "train" and not inside:
            while inside < INSIDE_CHECKPOINT and not done(run, "train"):
                process = Process(tiny.recipe, run)
                process.writing()
                time.sleep(0.004 * chance.random())
                kill(process)
                inside += bool(half_written(run))
        if (run / "manifest.json").exists() and done(run, stage):
            continue  # the kill before came late
        process = Process(tiny.recipe, run)
        wait(process)
        kill(process)
    assert main(["train", str(tiny.recipe), "--run", str(run)]) == 0

    print(f"kills: {dict(killed)}, {inside} inside a checkpoint")
    assert set(killed) == set(STAGES)
    assert killed.total() >= KILLS
    assert inside >= INSIDE_CHECKPOINT
    assert_equal(run, tiny.run)
    assert losses(run) == losses(tiny.run)
    assert_tidy(run)


@pytest.fixture
def prepared(tiny: Tiny, tmp_path: Path) -> Path:
    """A run whose next stage is the training."""
    assert (
        main(["train", str(tiny.recipe), "--run", str(tmp_path / "run"), "--until", "tokens"]) == 0
    )
    return tmp_path / "run"


def test_ctrl_c_and_sigterm_save_say_one_line_and_go_on_equal(tiny: Tiny, prepared: Path) -> None:
    for how in (signal.SIGINT, signal.SIGTERM):
        process = Process(tiny.recipe, prepared)
        assert process.trained(2)
        code, said = process.end(how)
        assert code == 130, said
        last = losses(prepared)[-1][0]
        line = f"shenhong: stopped at step {last} of 16, checkpoint saved; the same command goes on from here"
        assert [
            s for s in said.splitlines() if s and not s.startswith(("[", "plan: ", "training "))
        ] == [line]
        assert (prepared / "checkpoints" / f"step-{last:06}").is_dir()
        stages = json.loads((prepared / "manifest.json").read_text())["stages"]
        assert stages["train"]["seconds"] > 0  # what the stopped part cost is not forgotten
    process = Process(tiny.recipe, prepared)
    assert process.begun("evaluate")
    code, said = process.end(signal.SIGTERM)
    # Python ends by SIGINT itself where the stop met an exec, as dataclasses run one when imported.
    assert code in (130, -signal.SIGINT) and "Traceback" not in said, said  # a shell reads 130
    assert said.splitlines()[-1].startswith("shenhong: stopped; the same command goes on")
    assert main(["train", str(prepared)]) == 0
    assert_equal(prepared, tiny.run)
    assert_tidy(prepared)


def test_a_timed_run_is_repeated_by_its_step_count(tiny: Tiny, tmp_path: Path) -> None:
    recipe = tiny.recipe.with_name("timed.toml")
    text = tiny.recipe.read_text().replace("steps = 16\n", "").replace("1e-6", "0.1")
    recipe.write_text("minutes = 0.2\nreserve_seconds = 0\n" + text)
    timed, again = tmp_path / "timed", tmp_path / "again"
    process = Process(recipe, timed)
    assert process.trained(5)
    process.end(signal.SIGKILL)
    assert main(["train", str(timed), "--until", "model"]) == 0
    steps = json.loads((timed / "manifest.json").read_text())["train"]["steps"]
    assert steps > 5
    change = ["--set", f"train.steps={steps}"]
    assert main(["train", str(recipe), "--run", str(again), "--until", "model", *change]) == 0
    assert losses(again) == losses(timed)
    for run in (timed, again):  # how many older checkpoints there are is a matter of time
        for older in sorted((run / "checkpoints").iterdir())[:-1]:
            os.rename(older, run / f".{older.name}")
    assert_equal(timed, again)
