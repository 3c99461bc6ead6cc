"""What a run is made of: stages that each make one thing, and steps of a recipe that each make one model.

A *stage* reads what earlier ones made, makes one file or folder, and is skipped once that is done. A *step* is an entry
of a recipe's [[steps]]: it takes the model of the step before (or of one it names) and makes the next. Most steps are
one stage, their own `run`; one that trains is several (its data packed, the training, the finished folder).

A new kind of step is one file in this folder that offers a subclass of `Step` as ``STEP``; the file's name is the kind.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from shenhong.corpus.settings import CorpusSettings

if TYPE_CHECKING:
    from shenhong.domains.base import Domain
    from shenhong.parallel import Mesh
    from shenhong.recipe import Recipe
    from shenhong.runs.run import Run


@dataclass
class Context:
    """What every stage is given. ``run`` is None on processes that do not lead."""

    recipe: Recipe
    path: Path
    mesh: Mesh
    run: Run | None
    started: float | None = None  # when the command started (monotonic), until that is booked

    def say(self, text: str) -> None:
        if self.mesh.leads:
            print(text, file=sys.stderr, flush=True)


class Stage:
    """One unit of a run's work.

    name      in the manifest, in events and on the screen
    output    what it makes, relative to the run; the stage counts as done only while that exists
    reads     names of the stages whose outputs it reads
    follows   keys and tables of the recipe that it goes by: once it has something to show, they stay as they are
    """

    follows: ClassVar[tuple[str, ...]] = ("steps",)

    parallel: ClassVar[bool] = False  # whether every process takes part, or the leader alone
    trains: ClassVar[bool] = False  # whether what it reads must stay as it was once it has started

    def __init__(self, name: str, output: Path, reads: tuple[str, ...] = ()) -> None:
        self.name, self.output, self.reads = name, output, reads

    def check(self, recipe: Recipe) -> None:
        """Asked before the first stage begins: an error that can be known by then costs nobody any time."""

    def run(self, context: Context) -> dict[str, Any]:
        """Do the work; what is returned (JSON-able) is recorded in the manifest as the stage's outputs."""
        raise NotImplementedError

    def done(self, run: Run) -> bool:
        """Whether it is finished and what it made is still there."""
        return run.done(self.name) and self.present(run)

    def begun(self, run: Run) -> bool:
        """Whether there is something of it, so that a recipe that says otherwise is of another run."""
        return run.done(self.name)

    def made(self, run: Run) -> bool:
        """Whether its output is there."""
        return (run.path / self.output).exists()

    def present(self, run: Run) -> bool:
        """Whether what a finished stage made is still there: messages advise to remove what is damaged."""
        return self.made(run)


class StepSettings(BaseModel):
    """The table of a step in a recipe's [[steps]]; a kind of step adds its own settings."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    kind: str = Field(description="what the step does: the name of a file in stages/")
    name: str = Field(
        "",
        max_length=64,
        pattern=r"^$|^[A-Za-z0-9][\w.-]*$",
        description="of its folder steps/NAME; empty: its kind",
    )
    input: str = Field("", description="the step whose model it takes; empty: the one before it")
    corpus: CorpusSettings | None = Field(
        None, description="data of its own, where it does not use the run's"
    )


class Step:
    """An entry of a recipe's list, in its place.

    settings   of the class `Settings`
    folder     of what it keeps, relative to the run: steps/NAME
    model      the folder of the model it makes, relative to the run: model for the last step, else in its folder
    before     the step whose model it takes; None for the first
    """

    Settings: ClassVar[type[StepSettings]] = StepSettings
    takes_model: ClassVar[bool] = True  # whether it needs a step before it
    trains: ClassVar[bool] = (
        False  # whether it begins with a model's weights: also with the recipe's ``init``
    )
    # Where its training differs from [train]'s defaults; None: it is what [train] is about.
    train_defaults: ClassVar[Mapping[str, Any] | None] = None

    def __init__(
        self,
        settings: Any,
        folder: Path,
        model: Path,
        before: Step | None,
        recipe: Recipe,
    ) -> None:
        self.settings, self.folder, self.model, self.before = settings, folder, model, before
        self.recipe = recipe

    @property
    def name(self) -> str:
        return self.settings.name or self.settings.kind

    @property
    def corpus(self) -> CorpusSettings:
        return self.settings.corpus or self.recipe.corpus

    @property
    def domain(self) -> Domain:
        from shenhong import domains

        return domains.domain(self.corpus.kind)

    @property
    def measured_on(self) -> Step:
        """The step whose held-out data its model is measured on: the last one that had data."""
        assert self.before is not None, "the first step of a run has data"
        return self.before.measured_on

    def stages(self) -> list[Stage]:
        """What it comes to, in order; the last one makes its model."""
        return [_OnlyStage(self)]

    @property
    def made_by(self) -> str:
        """Name of the stage that makes its model."""
        return self.stages()[-1].name

    def run(self, context: Context, input: Path) -> dict[str, Any]:
        """Make the folder ``context.path / self.model`` out of the finished model folder ``input``.

        Write it under `atomic_folder`, whole or not at all. What is returned is recorded in the manifest.
        """
        raise NotImplementedError


class _OnlyStage(Stage):
    """A step that is one stage."""

    def __init__(self, step: Step) -> None:
        before = (step.before.made_by,) if step.before else ()
        super().__init__(step.name, step.model, before)
        self.step = step

    def run(self, context: Context) -> dict[str, Any]:
        assert self.step.before is not None
        return self.step.run(context, context.path / self.step.before.model)
