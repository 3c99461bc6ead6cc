"""From a time budget to a number of steps, on the machine at hand.

Threads, dtype and kernels are chosen by timing a short piece of training; then whole steps, one look at
held-out text and one checkpoint are timed as they will be run, and the steps that fit are counted. The
answer is frozen into the manifest, so that the run is deterministic from there and its step count
repeats it anywhere.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from shenhong import numerics
from shenhong.train import machine
from shenhong.train.trainer import Trainer

Make = Callable[[torch.dtype], Trainer]  # a fresh trainer that computes in this dtype


def apply(choice: dict[str, Any]) -> torch.dtype:
    """Set threads and kernels of this process as chosen; returns the dtype."""
    torch.set_num_threads(choice["threads"])
    numerics.use_kernels(choice["kernels"])
    return getattr(torch, choice["dtype"])


def choose_machine(make: Make, settings: Any) -> dict[str, Any]:
    """Threads, dtype and kernels for this machine, from trial steps on a few rows."""
    trainers: dict[torch.dtype, Trainer] = {}

    def timed(threads: int, dtype: torch.dtype, kernels: bool) -> float:
        apply({"threads": threads, "kernels": kernels, "dtype": str(dtype).removeprefix("torch.")})
        trainer = trainers.setdefault(dtype, make(dtype))
        # A quarter of a step shows the ratios; the first pass warms caches and compiled primitives up.
        rows = max(1, trainer.rows_a_step // (4 * trainer.mesh.size))
        trainer.rows_a_step = rows * trainer.mesh.size
        times = []
        for _ in range(3):
            begin = time.perf_counter()
            trainer.step(0, 1)
            times.append(time.perf_counter() - begin)
        return min(times[1:])

    return machine.choose(settings, timed)


def count_steps(trainer: Trainer, seconds: float, look: Callable[[], object]) -> dict[str, Any]:
    """How many steps of ``trainer`` fit into ``seconds``, and the times that says so.

    The trainer is used up: its weights move. Make a fresh one to train.
    """
    settings = trainer.settings

    def step_seconds(step: int, steps: int) -> float:
        times = []
        for i in range(4):
            begin = time.perf_counter()
            trainer.step(step + i % 2, steps)
            times.append(time.perf_counter() - begin)
        return statistics.median(times[1:])

    # Step 0 of many is before multi-token prediction starts (if it starts late); a late one is after.
    early = step_seconds(0, 1_000_000)
    late_share = 1 - settings.mtp_start if trainer.config.num_nextn_predict_layers else 0.0
    late = step_seconds(999_990, 1_000_000) if 0 < late_share < 1 else early
    begin = time.perf_counter()
    look()
    look_seconds = time.perf_counter() - begin
    looks = 1 / settings.valid_every + 1
    a_step = (1 - late_share) * early + late_share * late
    overhead = 0.02  # checkpoints, events, the rest
    steps = int((seconds * (1 - overhead) - looks * look_seconds) / a_step)
    return {
        "steps": max(1, steps),
        "seconds_planned": round(seconds, 1),
        "step_seconds": round(a_step, 4),
        "step_seconds_early": round(early, 4),
        "step_seconds_late": round(late, 4),
        "look_seconds": round(look_seconds, 3),
    }
