"""From a time budget to a number of steps, on the machine at hand.

Threads, dtype and kernels follow from the machine by rule (machine.py). Whole steps and one look at held-out text are
timed as they will be run, and the steps that fit are counted, but no more than the text is good for: read too often, it
is learnt by heart. The answer is frozen into the manifest, so that the run is deterministic from there, and its step
count repeats it anywhere.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

from shenhong import numerics
from shenhong.model import Decoder
from shenhong.model.counts import forward_flops, parameters
from shenhong.parallel import Mesh
from shenhong.runs.run import Run
from shenhong.train import machine
from shenhong.train.settings import TrainSettings
from shenhong.train.trainer import Trainer
from shenhong.train.validate import HeldOut, Validate

Make = Callable[[torch.dtype], Trainer]  # a fresh trainer that computes in this dtype
Write = Callable[[Decoder], Iterable[tuple[str, str]]]  # (prompt, answer) samples of a model

TRIALS = 0.05  # of the time may go into timing steps,
LOOKS = 0.1  # and into looks at held-out text
FEWEST_LOOKS, FEWEST_ROWS = 3, 4
# Checkpoints, events; and steps of whole runs took 1.04 to 1.1 times as long as the trial's.
OVERHEAD = 0.05
# How often a text is worth reading. Muennighoff et al. 2023: up to four times are nearly as good as new text. Here, on 0.2
# and 1 MB with the default shape, held-out text was best after 4.4 and 3.6 readings and clearly worse after six (LOG.md).
EPOCHS = 4.0


SecondsLeft = Callable[[float], float]
"""The time left for training, given how long the model takes for a token of a text that is there; the leader is asked."""


def apply(choice: dict[str, Any]) -> torch.dtype:
    """Set threads and kernels of this process as chosen; returns the dtype."""
    torch.set_num_threads(choice["threads"])
    numerics.use_kernels(choice["kernels"])
    return getattr(torch, choice["dtype"])


def count_steps(
    trainer: Trainer,
    mesh: Mesh,
    seconds: SecondsLeft,
    validate: Validate,
    write: Write,
    epoch_steps: float | None,
    more_looks: int = 0,
) -> dict[str, Any]:
    """How many steps of ``trainer`` fit into ``seconds`` and are worthwhile, and the times this rests on.

    The trainer is used up: its weights move. Make a fresh one to train. ``seconds`` is asked again when more is known of
    what has to follow. ``epoch_steps`` read the whole text once. ``more_looks`` are those before the first step.
    """
    settings = trainer.settings
    at_most = mesh.share(seconds(0.0) if mesh.leads else 0.0)

    def step_seconds(step: int, steps: int) -> float:
        """The median, without the first, of as many as there is time for."""
        times: list[float] = []
        started = time.perf_counter()
        while len(times) < 4:
            begin = time.perf_counter()
            trainer.step(step + len(times) % 2, steps)
            times.append(time.perf_counter() - begin)
            if mesh.share(time.perf_counter() - started > TRIALS / 2 * at_most):
                break
        return statistics.median(times[1:] or times)

    early = step_seconds(0, 1_000_000)
    share = late_share(trainer)
    late = step_seconds(999_990, 1_000_000) if 0 < share < 1 else early
    a_step = (1 - share) * early + share * late
    looks = round(1 / settings.valid_every)
    if isinstance(validate, HeldOut):
        # A forward pass is a third of a step. Where looking is dear, at less text, but never at next to none.
        a_row = early / 3 / settings.rows_a_step * mesh.size
        afford = int(LOOKS * at_most / FEWEST_LOOKS / a_row)
        validate.rows = mesh.share(min(validate.rows, max(FEWEST_ROWS, afford)))
    begin = time.perf_counter()
    validate(trainer.model)
    looked = time.perf_counter()
    list(write(trainer.model))
    validation_seconds, sample_seconds = looked - begin, time.perf_counter() - looked
    a_look = validation_seconds + sample_seconds
    looks = max(min(looks, FEWEST_LOOKS), min(looks, int(LOOKS * at_most / a_look)))
    rows = validate.rows if isinstance(validate, HeldOut) else None
    tokens = rows * settings.sequence_length if rows else settings.batch_tokens
    left = mesh.share(seconds(validation_seconds / tokens) if mesh.leads else 0.0)
    fit = max(1, int((left * (1 - OVERHEAD) - (looks + more_looks) * a_look) / a_step))
    steps = fit
    if epoch_steps:
        epochs = EPOCHS if settings.epochs == "auto" else settings.epochs
        steps = min(fit, max(1, math.ceil(epochs * epoch_steps)))
    return {
        "steps": steps,
        "looks": looks,
        **({"valid_rows": rows} if rows else {}),
        **({"steps_that_fit": fit} if steps < fit else {}),
        "seconds_planned": round(
            (steps * a_step + (looks + more_looks) * a_look) / (1 - OVERHEAD), 1
        ),
        "step_seconds": round(a_step, 4),
        "step_seconds_early": round(early, 4),
        "step_seconds_late": round(late, 4),
        "validation_seconds": round(validation_seconds, 3),
        "sample_seconds": round(sample_seconds, 3),
    }


def plan(
    run: Run | None,
    mesh: Mesh,
    settings: TrainSettings,
    make: Make,
    count: Callable[[Trainer], dict[str, Any]],
    epoch_steps: float | None = None,
    stage: str = "train",
) -> dict[str, Any]:
    """The frozen machine settings, and the step count of this stage; settled now if the run has none yet.

    ``run`` is None on processes that do not lead: they take part in the measuring and get its result. ``count`` is
    `count_steps` of a trial; it is asked where the settings do not give the number of steps.
    """
    kept = {k: run.manifest[k] for k in ("machine", stage) if k in run.manifest} if run else {}
    frozen: dict[str, Any] = mesh.share(kept)

    def freeze(key: str, value: dict[str, Any]) -> None:
        frozen[key] = mesh.share(value)
        if run:
            run.freeze(key, lambda: frozen[key])

    if "machine" not in frozen:
        choice = machine.choose(settings, mesh.local_size)
        apply(choice)
        here = {**machine.describe(), "processes": mesh.size}
        # What is wanted may not be available.
        freeze("machine", {**here, **choice, "kernels": numerics.kernels_in_use()})
    if stage not in frozen:
        trial = make(apply(frozen["machine"]))
        counted = count(trial) if settings.steps is None else {"steps": settings.steps}
        config, late = trial.config, late_share(trial)
        trunk, both = (
            forward_flops(config, trial.source.mean_context(), two) for two in (False, True)
        )
        size = parameters(config)
        freeze(
            stage,
            {
                **counted,
                **({"epochs": round(counted["steps"] / epoch_steps, 2)} if epoch_steps else {}),
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
