"""From a time budget to a number of steps, on the machine at hand.

Threads, dtype and kernels are chosen by timing a short piece of training; then whole steps and one
validation are timed as they will be run, and the steps that fit are counted. The answer is frozen into
the manifest, so that the run is deterministic from there and its step count repeats it anywhere.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from shenhong import numerics
from shenhong.model.counts import forward_flops, parameters
from shenhong.parallel import Mesh
from shenhong.runs.run import Run
from shenhong.train import machine
from shenhong.train.trainer import Trainer

Make = Callable[[torch.dtype], Trainer]  # a fresh trainer that computes in this dtype


def apply(choice: dict[str, Any]) -> torch.dtype:
    """Set threads and kernels of this process as chosen; returns the dtype."""
    torch.set_num_threads(choice["threads"])
    numerics.use_kernels(choice["kernels"])
    return getattr(torch, choice["dtype"])


def choose_machine(make: Make, mesh: Mesh) -> dict[str, Any]:
    """Threads, dtype and kernels for this machine, from trial steps on a part of the data of one."""
    trainers: dict[torch.dtype, Trainer] = {}

    def timed(threads: int, dtype: torch.dtype, kernels: bool) -> float:
        apply({"threads": threads, "kernels": kernels, "dtype": str(dtype).removeprefix("torch.")})
        if dtype not in trainers:
            trainers[dtype] = make(dtype)
        trainer = trainers[dtype]
        # A quarter of a step shows the ratios; the first pass warms caches and compiled primitives up.
        times = []
        for _ in range(3):
            begin = time.perf_counter()
            trainer.step(0, 1, part=4)
            times.append(time.perf_counter() - begin)
        return mesh.share(min(times[1:]))  # all processes must choose alike

    first = make(torch.float32)
    trainers[torch.float32] = first
    choice = machine.choose(first.settings, timed, mesh.local_size)
    apply(choice)
    return {**choice, "kernels": numerics.kernels_in_use()}  # wanted is not yet available


def count_steps(
    trainer: Trainer, mesh: Mesh, seconds: float, validate: Callable[[], object]
) -> dict[str, Any]:
    """How many steps of ``trainer`` fit into ``seconds``, and the times this rests on.

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

    early = step_seconds(0, 1_000_000)
    share = late_share(trainer)
    late = step_seconds(999_990, 1_000_000) if 0 < share < 1 else early
    begin = time.perf_counter()
    validate()
    validation_seconds = time.perf_counter() - begin
    validations = 1 / settings.valid_every + 1
    a_step = (1 - share) * early + share * late
    # Checkpoints, events, samples; and steps of whole runs took 1.04 to 1.1 times as long as the trial's.
    overhead = 0.05
    steps = int((seconds * (1 - overhead) - validations * validation_seconds) / a_step)
    return {
        "steps": max(1, steps),
        "seconds_planned": round(seconds, 1),
        "step_seconds": round(a_step, 4),
        "step_seconds_early": round(early, 4),
        "step_seconds_late": round(late, 4),
        "validation_seconds": round(validation_seconds, 3),
    }


def plan(
    run: Run | None,
    mesh: Mesh,
    make: Make,
    validate: Callable[[Trainer], object],
    seconds: Callable[[], float],
    stage: str = "train",
) -> dict[str, Any]:
    """The frozen choice of machine settings, and the step count of this stage; measured now if the run has none yet.

    ``run`` is None on processes that do not lead: they take part in the measuring and get its result.
    """
    kept = {k: run.manifest[k] for k in ("machine", stage) if k in run.manifest} if run else {}
    frozen: dict[str, Any] = mesh.share(kept)

    def freeze(key: str, value: dict[str, Any]) -> None:
        frozen[key] = mesh.share(value)
        if run:
            run.freeze(key, lambda: frozen[key])

    if "machine" not in frozen:
        here = {**machine.describe(), "processes": mesh.size}
        freeze("machine", {**here, **choose_machine(make, mesh)})
    if stage not in frozen:
        trial = make(apply(frozen["machine"]))
        settings, config = trial.settings, trial.config
        if settings.steps is None:
            counted = count_steps(trial, mesh, mesh.share(seconds()), lambda: validate(trial))
        else:
            counted = {"steps": settings.steps}
        late = late_share(trial)
        trunk, both = (
            forward_flops(config, trial.source.mean_context(), two) for two in (False, True)
        )
        size = parameters(config)
        freeze(
            stage,
            {
                **counted,
                "tokens_per_step": settings.batch_tokens,
                # Backward costs twice the forward pass; the draft layer counts while it trains.
                "flops_per_token": round(3 * ((1 - late) * trunk + late * both)),
                "parameters": size.total,
                "active_parameters": size.active,
                "multitoken_parameters": size.multitoken,
            },
        )
    return frozen


def late_share(trainer: Trainer) -> float:
    """Share of the steps that do more and cost more: those in which multi-token prediction trains."""
    return 1 - trainer.objective.late_start
