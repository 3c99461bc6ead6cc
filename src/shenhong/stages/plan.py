"""From a recipe to the stages of its run, in order.

corpus      refine raw text into held-out and training text        corpus/
tokenizer   learn the vocabulary                                   tokenizer/
(the steps, each with its stages; without a list one pretraining:)
tokens      render, encode and pack documents into rows            tokens/
train       optimise                                               checkpoints/
model       the finished Hugging Face folder                       model/
evaluate    measure                                                evaluation.json
report      show                                                   report.html, report.md
"""

from __future__ import annotations

from pathlib import Path

from shenhong.domains.base import Domain
from shenhong.recipe import Recipe
from shenhong.stages.base import Stage, Step
from shenhong.stages.corpus import Corpus
from shenhong.stages.evaluate import Evaluate
from shenhong.stages.pretrain import Pretrain
from shenhong.stages.registry import step_of
from shenhong.stages.report import Report
from shenhong.stages.tokenizer import Tokenizer


def steps(recipe: Recipe) -> list[Step]:
    """The steps of a recipe in their places."""
    if not recipe.steps:
        only = Pretrain.Settings(kind="pretrain")
        return [Pretrain(only, Path("."), Path("model"), None, recipe)]
    made: list[Step] = []
    for settings in recipe.steps:
        before = next((s for s in made if s.name == settings.input), made[-1] if made else None)
        folder = Path("steps") / (settings.name or settings.kind)
        last = settings is recipe.steps[-1]
        model = Path("model") if last else folder / "model"
        made.append(step_of(settings.kind)(settings, folder, model, before, recipe))
    return made


def domain_of(recipe: Recipe) -> Domain:
    """What the run's finished model is measured as."""
    return steps(recipe)[-1].measured_on.domain


def plan(recipe: Recipe) -> list[Stage]:
    """All stages of a run of this recipe."""
    made = steps(recipe)
    return [
        Corpus("corpus", Path("corpus"), recipe.corpus),
        Tokenizer(),
        *(stage for step in made for stage in step.stages()),
        Evaluate(made[-1]),
        Report(made[-1]),
    ]
