"""The training loop: one for every objective, on one process or many.

It repeats trainer.step, and keeps the promises around it: what was chosen is frozen, a checkpoint is
never far, a stop by Ctrl-C or kill goes on bit for bit, and a NaN or a spike ends the run loudly with
the last good checkpoint in place.
"""

from __future__ import annotations

import math
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from shenhong import numerics
from shenhong.errors import CheckpointError, TrainingError
from shenhong.model import Decoder, ModelConfig
from shenhong.parallel import Mesh
from shenhong.runs.memory import give_back
from shenhong.runs.run import Run
from shenhong.train import best, budget, checkpoint, machine
from shenhong.train.data import PackedRows, Rows, Source
from shenhong.train.display import Display, clock
from shenhong.train.objectives import NextToken, Objective
from shenhong.train.settings import TrainSettings
from shenhong.train.trainer import StepResult, Trainer
from shenhong.train.validate import HeldOut, Validate

GUARD_AFTER = 20  # steps before the spike guard trusts its running mean
FEW_STEPS = 20  # with fewer a rate has hardly risen before it falls


class Stop:
    """Turns Ctrl-C and SIGTERM into a request that the loop honours after the step it is in."""

    def __enter__(self) -> Stop:
        self.wanted = False
        # Only the main thread may listen; another is stopped by whoever started it.
        main = threading.current_thread() is threading.main_thread()
        asked = (signal.SIGINT, signal.SIGTERM) if main else ()
        self.before = {s: signal.signal(s, self._note) for s in asked}
        return self

    def _note(self, *_: object) -> None:
        self.wanted = True

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


def train(
    run: Run | None,
    folder: Path,
    settings: TrainSettings,
    config: ModelConfig,
    seed: int,
    mesh: Mesh,
    seconds: budget.SecondsLeft,
    write: budget.Write = lambda model: (),
    first: Callable[[], dict[str, torch.Tensor] | None] | None = None,
    stage: str = "train",
    objective: Objective | None = None,
    source: Source | None = None,
    validate: Validate | None = None,
) -> Decoder:
    """Train, or go on from the newest checkpoint in ``folder/checkpoints``; returns the model after the last step.

    ``run``        the open run on the leading process, None elsewhere
    ``seconds(t)`` the time left for training, asked where the settings do not give the number of steps
    ``write``      (prompt, answer) samples of the model as it is, for those who watch; taken at every validation
    ``first()``    the weights to start from where there is no checkpoint yet; absent: random ones
    ``stage``      under which name the manifest keeps the number of steps; events of any other than "train" name it
    ``objective``  what is minimised; by default the next tokens' negative log-likelihood
    ``source``     where batches come from; by default the packed rows in ``folder/tokens``
    ``validate``   a look at the model for "valid" events; by default its loss on held-out rows in ``folder/tokens``

    An earlier model that held-out text clearly prefers is kept in ``folder/checkpoints/best`` (best.py). A training whose
    length was planned and not given stops where two looks in a row are clearly above it.

    Errors: TrainingError (NaN, spike), CheckpointError, DataError; KeyboardInterrupt after a stop.
    """
    device = machine.device()
    bos, pad = config.bos_token_id, config.pad_token_id
    assert bos is not None and pad is not None
    epoch_steps = None
    if source is None:
        rows = Rows(folder / "tokens" / "train.safetensors", bos, pad, settings.prompt_weight)
        source = PackedRows(rows, settings, seed)
        epoch_steps = len(rows) / settings.rows_a_step
    if objective is None:
        objective = NextToken(config, settings)
    if validate is None:
        validate = HeldOut(Rows(folder / "tokens" / "valid.safetensors", bos, pad), settings)

    def make(dtype: torch.dtype) -> Trainer:
        return Trainer(settings, config, objective, source, mesh, seed, dtype, device)

    def count(trial: Trainer) -> dict[str, Any]:
        before = int(bool(first))
        return budget.count_steps(trial, mesh, seconds, validate, write, epoch_steps, before)

    plan = budget.plan(run, mesh, settings, make, count, epoch_steps, stage)
    steps, looks = plan[stage]["steps"], plan[stage].get("looks")
    if isinstance(validate, HeldOut):
        validate.rows = plan[stage].get("valid_rows", validate.rows)
    named = {} if stage == "train" else {"stage": stage}  # in every event of this training
    choice = plan["machine"]
    trainer = make(budget.apply(choice))
    if mesh.leads:
        _say_what_differs(choice, mesh)
        print(_in_words(plan[stage], settings), file=sys.stderr, flush=True)
    torch.manual_seed(seed)  # measuring and making models have used random numbers
    root = folder / "checkpoints"
    progress = checkpoint.Progress()
    if found := checkpoint.load_newest(root):
        progress, weights, optimizer = found
        if not progress.tokens:  # a checkpoint of a version that did not count them
            progress.tokens = progress.step * settings.batch_tokens
        try:
            trainer.model.load_state_dict(weights)
            trainer.optimizer.load(optimizer)
        except (RuntimeError, KeyError):
            newest = checkpoint.saved(root)[-1]
            raise CheckpointError(
                f"{newest} is of another model than this run's recipe describes; remove it"
            ) from None
    elif first and (first_weights := first()):
        trainer.model.load_state_dict(first_weights)
    every = max(settings.valid_every, 1 / looks) if looks else settings.valid_every
    validations = {max(1, round(i * every * steps)) for i in range(1, int(1 / every) + 1)} | {steps}
    may_end_early = settings.steps is None
    kept = mesh.share(best.load(root) if mesh.leads else None)

    def save() -> None:
        weights = trainer.model.state_dict()
        if not all(bool(tensor.isfinite().all()) for tensor in weights.values()):
            raise _failure(f"step {progress.step}: a weight is no longer a finite number", root)
        if mesh.leads:
            checkpoint.save(root, progress, weights, dict(trainer.optimizer.state()))

    def look() -> None:
        """Look at held-out text and write samples; keep the best model, and count the looks that are clearly worse."""
        nonlocal kept
        measures, nats_P = validate(trainer.model)
        give_back()
        if nats_P is not None and bool(nats_P.isfinite().all()):
            if kept is None or float(nats_P.sum()) < float(kept.nats_P.sum()):
                kept = best.Best(progress.step, nats_P)
                if mesh.leads:
                    best.save(root, kept, trainer.model.state_dict())
            progress.worse = progress.worse + 1 if kept.above(nats_P) > best.CLEARLY else 0
        if run:
            seconds = round(progress.seconds, 3)
            run.event("valid", step=progress.step, seconds=seconds, **measures, **named)
            for prompt, text in write(trainer.model):
                run.event("sample", step=progress.step, prompt=prompt, text=text, **named)

    if first and not progress.step and kept is None:
        look()  # what everything after it is to be better than
    with Stop() as stop, Display(steps, progress.step, mesh.leads) as display:
        saved_at = started = time.monotonic()
        before = progress.seconds
        while progress.step < steps and not (may_end_early and _only_worse(progress, steps)):
            step_started = time.monotonic()
            result = trainer.step(progress.step, steps)
            _guard(progress, result, settings.spike, root)
            progress.step += 1
            progress.seconds = before + time.monotonic() - started
            progress.tokens += result.tokens
            pace = result.tokens / (time.monotonic() - step_started)
            display.show(progress.step, result.loss, pace)
            if run:
                _report(run, progress, steps, result, pace, named)
            if progress.step in validations:
                look()
            wanted = mesh.share(
                [stop.wanted, time.monotonic() - saved_at > settings.checkpoint_seconds]
            )
            over = progress.step == steps or (may_end_early and _only_worse(progress, steps))
            if any(wanted) or over:
                save()
                saved_at = time.monotonic()
            if over:
                break
            if wanted[0]:
                raise KeyboardInterrupt(f"at step {progress.step} of {steps}, checkpoint saved")
    return trainer.model


def _only_worse(progress: checkpoint.Progress, steps: int) -> bool:
    """Whether more would only be worse; the first half, in which the rate is high, says nothing yet."""
    return progress.worse >= 2 and progress.step > steps / 2


def _in_words(plan: dict[str, Any], settings: TrainSettings) -> str:
    """What is planned, why no more of it, and how it is repeated."""
    steps, fit = plan["steps"], plan.get("steps_that_fit")
    words = [f"plan: {steps:,} steps of {plan['tokens_per_step']:,} tokens"]
    if "seconds_planned" in plan:
        words.append(f"about {clock(plan['seconds_planned'])}")
    if "epochs" in plan:
        words.append(f"which read the text {plan['epochs']:.1f} times")
    text = ", ".join(words)
    if fit:
        text += (
            f"; {fit:,} would fit into the time, but reading a text of this size more often makes a model of this "
            "size worse (train.epochs says how often it may)"
        )
    if settings.steps is None:
        text += f"; --set train.steps={steps} repeats it"
    if steps < FEW_STEPS:
        text += (
            f"\nwarning: {steps} steps are too few to learn from; give more minutes, or a smaller train.batch_tokens"
            if settings.steps is None
            else ""
        )
    return text


def _say_what_differs(choice: dict[str, Any], mesh: Mesh) -> None:
    """A run goes on anywhere, but only equal machines and versions repeat it to the last bit."""
    here = {"processes": mesh.size, "kernels": numerics.kernels_in_use()}
    now = {**machine.describe(), **here}
    changed = [k for k in ("cpu", "torch", "device", *here) if now[k] != choice[k]]
    if changed:
        changes = ", ".join(f"{k} was {choice[k]}, is {now[k]}" for k in changed)
        print(
            f"note: this run began under other conditions ({changes}): the last bits will differ",
            file=sys.stderr,
        )


def _guard(progress: checkpoint.Progress, result: StepResult, spike: float, root: Path) -> None:
    """Stop on a NaN or a loss far above its running mean. Error: TrainingError."""
    loss, mean, step = result.loss, progress.loss_mean, progress.step + 1
    if not (math.isfinite(loss) and math.isfinite(result.grad_norm)):
        raise _failure(
            f"step {step}: the loss is {loss}, the gradient norm {result.grad_norm}", root
        )
    if mean is not None and step > GUARD_AFTER and loss > mean + spike:
        raise _failure(
            f"step {step}: the loss jumped to {loss:.2f} from a mean of {mean:.2f} nats per token",
            root,
        )
    progress.loss_mean = loss if mean is None else 0.95 * mean + 0.05 * loss


def _failure(what: str, root: Path) -> TrainingError:
    kept = checkpoint.saved(root)
    where = (
        f"the last good checkpoint, {kept[-1]}, is kept"
        if kept
        else "no checkpoint was written yet"
    )
    return TrainingError(f"{what}; {where}; lower train.lr or train.vector_lr in a new run")


def _report(
    run: Run,
    progress: checkpoint.Progress,
    steps: int,
    result: StepResult,
    pace: float,
    named: dict[str, str],
) -> None:
    fields: dict[str, Any] = {
        "step": progress.step,
        "steps": steps,
        **{name: round(loss, 5) for name, loss in result.losses.items()},
        "lr": result.lr,
        "grad_norm": round(result.grad_norm, 4),
        "tokens": progress.tokens,
        "seconds": round(progress.seconds, 3),
        "tokens_per_second": round(pace),
        "load_max": [round(max(layer) * len(layer), 3) for layer in result.load],
    }
    if progress.step % 20 == 0 or progress.step == steps:
        fields["load"] = [[round(share, 4) for share in layer] for layer in result.load]
    run.event("train", **fields, **named)
