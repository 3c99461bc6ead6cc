"""How many steps fit: what is counted, and what bounds it, with clocks that tests wind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shenhong.parallel import Mesh
from shenhong.train import budget, machine
from shenhong.train.settings import TrainSettings
from shenhong.train.validate import HeldOut, Look
from tests.train.test_trainer import make


class Clock:
    """Time that passes only where something says that it took some."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(budget.time, "perf_counter", lambda: self.now)


def counted(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    seconds: float,
    step: float,
    look: float,
    rows: int = 40,
    epoch_steps: float | None = None,
    **settings: Any,
) -> tuple[dict[str, Any], int]:
    """The plan, and how many trial steps it took, where a step and a look at all rows take so long."""
    clock, steps = Clock(monkeypatch), 0
    trainer = make(folder, **settings)
    trainer.settings = trainer.settings.model_copy(update={"steps": None})

    def one(*_: object) -> None:
        nonlocal steps
        steps += 1
        clock.now += step

    monkeypatch.setattr(trainer, "step", one)
    held_out = HeldOut.__new__(HeldOut)
    held_out.rows = rows

    def looked(self: HeldOut, model: object) -> Look:
        clock.now += look * self.rows / rows
        return Look({})

    monkeypatch.setattr(HeldOut, "__call__", looked)
    plan = budget.count_steps(
        trainer, Mesh(), lambda a_token: seconds, held_out, lambda model: (), epoch_steps
    )
    return plan, steps


def test_what_fits_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, trials = counted(tmp_path, monkeypatch, seconds=600, step=0.1, look=1.0)
    assert plan["looks"] == 10 and plan["valid_rows"] == 40 and trials == 4
    assert plan["steps"] == int((600 * 0.95 - 10) / 0.1)
    assert plan["seconds_planned"] == pytest.approx(600, abs=0.2)


def test_trials_and_looks_take_a_share_of_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A large model and three minutes: 8 seconds a step of two rows, a third of that for a look at as many.
    plan, trials = counted(tmp_path, monkeypatch, seconds=180, step=8, look=40 * 8 / 6)
    assert trials == 1 and plan["looks"] == 3 and plan["valid_rows"] == 4
    assert plan["steps"] == int((180 * 0.95 - 3 * 4 * 8 / 6) / 8)


def test_a_text_is_read_as_often_as_it_is_worth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, _ = counted(tmp_path, monkeypatch, 600, 0.1, 1.0, epoch_steps=12.5, epochs=4)
    assert plan["steps"] == 50 and plan["steps_that_fit"] == 5600
    assert plan["seconds_planned"] < 20
    plan, _ = counted(tmp_path, monkeypatch, 600, 0.1, 1.0, epoch_steps=1e6)
    assert plan["steps"] == 5600 and "steps_that_fit" not in plan


@pytest.mark.parametrize("load", [0.0, 50.0])
def test_a_busy_machine_chooses_as_an_idle_one(
    load: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine.os, "getloadavg", lambda: (load, load, load))
    monkeypatch.setattr(machine, "cores", lambda: 8)
    for fast, dtype in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(machine, "fast_bfloat16", lambda fast=fast: fast)
        found = machine.choose(TrainSettings(steps=1), processes=2)
        assert found == {"threads": 4, "dtype": dtype, "kernels": True}
    given = TrainSettings(steps=1, threads=3, dtype="float32", kernels=False)
    assert machine.choose(given) == {"threads": 3, "dtype": "float32", "kernels": False}
