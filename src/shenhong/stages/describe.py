"""What a run is and how far it has come, for the verbs that show it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from shenhong import domains
from shenhong.domains.base import Domain
from shenhong.errors import RecipeError, RunError, ShenhongError
from shenhong.parallel import Mesh
from shenhong.runs.events import read_events
from shenhong.runs.run import Run, plan_of
from shenhong.stages.base import Context
from shenhong.stages.evaluate import measure
from shenhong.stages.own_code import load_frozen, record
from shenhong.stages.plan import domain_of, plan, steps
from shenhong.stages.report import Report


def evaluate_again(path: Path, allow_code: Path | None = None) -> dict[str, Any]:
    """Measure a finished run anew and rewrite its report; returns the measures."""
    with Run(path) as run:
        recipe = load_frozen(run.path, allow_code)
        last = steps(recipe)[-1]
        if not run.done(last.made_by):
            raise RunError(
                f"{path} has no finished model yet; 'shenhong train {path}' goes on with it"
            )
        record(run, recipe)
        measure(recipe, last, run, lambda line: print(line, file=sys.stderr))
        Report(last).run(Context(recipe, run.path, Mesh(), run))
    return json.loads((Path(path) / "evaluation.json").read_text())


def describe(path: Path) -> dict[str, Any]:
    """What a model is and costs; of a run without a model yet, how far it has come. Error: ShenhongError."""
    from shenhong import models

    path = Path(path)
    if not (path / "manifest.json").is_file():
        return models.facts(path)
    finished = (path / "model" / "config.json").is_file()
    try:
        run = Run(path, write=False)
        states = _stages(run)
    except ShenhongError:  # what became of the run does not matter to a model that is there
        if finished:
            return models.facts(path)
        raise
    if not finished:
        return _so_far(run)
    unfinished = any(state != "done" for state in states.values())
    rest = {**states, "to go on": f"shenhong train {run.path}"} if unfinished else {}
    return models.facts(path) | rest


def _so_far(run: Run) -> dict[str, Any]:
    """Recipe, stages, step and held-out loss of an unfinished run, also of one that runs now."""
    known: dict[str, Any] = {"folder": str(run.path)}
    if (run.path / "recipe.toml").exists():
        recipe = load_frozen(run.path, run_code=False)
        known |= {"recipe": recipe.name, "kind": recipe.corpus.kind, "seed": recipe.seed}
        if recipe.minutes:
            known["minutes"] = recipe.minutes
    known |= _stages(run)
    events = read_events(run.path)
    trained = [e for e in events if e["kind"] == "train" and {"step", "steps", "loss"} <= e.keys()]
    validations = [
        e for e in events if e["kind"] == "valid" and isinstance(e.get("nats_per_token"), float)
    ]
    frozen = [run.manifest.get(name) for name in plan_of(run.manifest)]
    for train in frozen:
        if isinstance(train, dict) and "parameters" in train:
            known |= {k.replace("_", " "): train[k] for k in ("parameters", "active_parameters")}
    if trained:
        known |= {key: trained[-1][key] for key in ("step", "steps")}
        known["training nats per token"] = trained[-1]["loss"]
    if validations:
        known["held-out nats per token"] = round(validations[-1]["nats_per_token"], 4)
    return known | {"to go on": f"shenhong train {run.path}"}


def _stages(run: Run) -> dict[str, str]:
    """Each stage of the run: done, unfinished or to do."""
    names = [(name, False) for name in plan_of(run.manifest)]
    if (run.path / "recipe.toml").exists():
        recipe = load_frozen(run.path, run_code=False)
        names = [(stage.name, stage.done(run)) for stage in plan(recipe)]
    begun = run.manifest["stages"]
    return {
        f"stage {name}": "done" if done else "unfinished" if name in begun else "to do"
        for name, done in names
    }


def summary(path: Path) -> str:
    """The headline measures of a run and where its report is, in a few lines."""
    path = Path(path)
    if not (path / "report.html").exists():
        opened = Run(path, write=False)
        recipe = load_frozen(path, run_code=False)
        done = [stage.name for stage in plan(recipe) if stage.done(opened)]
        return (
            f"{path}: done so far: {', '.join(done) or 'nothing'}; 'shenhong train {path}' goes on"
        )
    from shenhong.evaluate.report import headline

    ways = f"try it: 'shenhong generate {path} \"...\"', or 'shenhong serve {path}' for the page"
    return "\n".join([*headline(path, _domain(path)), ways, f"report: {path / 'report.html'}"])


def _domain(run: Path) -> Domain:
    """What the run is measured as: its own code's domain where that was run just now, else one of ours."""
    try:
        return domain_of(load_frozen(run, run_code=False))
    except RecipeError:
        return domains.of_run(run)
