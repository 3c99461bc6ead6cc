"""From recipe to report: the stages of a run, in the order of its plan, each skipped once it is done."""

from __future__ import annotations

import contextlib
import difflib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from shenhong import __version__
from shenhong.errors import RecipeError, RunError, ShenhongError, UsageError
from shenhong.parallel import Mesh, join, leave
from shenhong.recipe import Recipe, resolve
from shenhong.runs.files import atomic_write
from shenhong.runs.memory import give_back
from shenhong.runs.run import Run
from shenhong.stages import own_code
from shenhong.stages.base import Context, Stage
from shenhong.stages.corpus import Corpus
from shenhong.stages.plan import domain_of, plan


def run(
    recipe: Recipe,
    path: Path,
    until: str | None = None,
    started: float | None = None,
) -> bool:
    """Run every stage of ``recipe`` in the folder ``path`` that is not done; ``until`` is the last one.

    ``started`` is when the command started (time.monotonic): loading libraries takes of the minutes too.
    Returns whether this process leads: of several, it alone speaks of the result.
    """
    stages = plan(recipe)
    names = [stage.name for stage in stages]
    if until is not None and until not in names:
        near = difflib.get_close_matches(until, names, n=1, cutoff=0.0)[0]
        raise UsageError(
            f"--until {until} is no stage of this recipe (did you mean {near}?), choose from {', '.join(names)}"
        )
    mesh = join()
    opened = None
    try:
        with _together(mesh):
            opened = Run(path, create=True) if mesh.leads else None
            context = Context(recipe, Path(path), mesh, opened, started)
            if opened:
                for stage in stages:
                    if not stage.done(opened):
                        stage.check(recipe)
                _freeze(opened, recipe, names, context.say)
                _heed_sources(context, opened, stages)
        for number, stage in enumerate(stages, 1):
            done = mesh.share(stage.done(opened) if opened else None)
            with _together(mesh):
                if not done and (mesh.leads or stage.parallel):
                    context.say(f"[{number}/{len(stages)}] {stage.name}")
                    _perform(context, stage)
            if stage.name == until:
                break
    finally:
        if opened:
            opened.close()
        leave()
    return mesh.leads


def train_recipe(
    recipe: str | Path | dict[str, Any],
    run_folder: str | Path | None = None,
    changes: Sequence[str] = (),
    until: str | None = None,
    allow_code: str | Path | None = None,
) -> Path:
    """Train as `shenhong train` does, and return the run's folder, which `LLM` opens.

    ``recipe`` is a recipe file, a run folder to continue, or a recipe as a dictionary (its paths relative to where the
    program runs); ``run_folder`` is runs/NAME by default; ``changes`` are like ``["train.steps=200"]``; ``allow_code`` is
    what ``--allow-code`` is. What is done is not done again, and a stop goes on where it was. Errors: ShenhongError.
    """
    allow = Path(allow_code) if allow_code is not None else None
    if isinstance(recipe, dict):
        if changes:
            raise RecipeError("changes go with a recipe file; change the dictionary")
        named = resolve(recipe, Path.cwd(), "the recipe")
        path = Path(run_folder) if run_folder else Path("runs") / named.name
        take = own_code.for_run(path, allow, asked=True)
        resolved = resolve(recipe, Path.cwd(), "the recipe", take)
    elif Path(recipe).is_dir():
        if changes or run_folder:
            raise RecipeError(f"{recipe} is a run folder with its recipe frozen; give nothing else")
        path = Path(recipe)
        resolved = own_code.load_frozen(path, allow)
    else:
        folder = Path(run_folder) if run_folder else None
        resolved, path = own_code.load_recipe(found(Path(recipe)), list(changes), folder, allow)
    run(resolved, path, until)
    return path


@contextlib.contextmanager
def _together(mesh: Mesh) -> Iterator[None]:
    """All processes wait for each other at the end; an error of the leader ends them all, told once."""
    failure: ShenhongError | None = None
    try:
        yield
    except ShenhongError as error:
        failure = error
    failed = mesh.share(failure is not None)
    if failure is not None:
        raise failure
    if failed:
        raise SystemExit(2)


def _perform(context: Context, stage: Stage) -> None:
    if context.run is None:
        stage.run(context)
        return
    if context.started is not None:
        context.run.book("start", time.monotonic() - context.started)
        context.started = None
    with context.run.stage(stage.name) as outputs:
        outputs.update(stage.run(context))
        if not stage.made(context.run):
            raise RunError(
                f"the stage {stage.name} ended and there is no {context.run.path / stage.output}; its file in stages/ must make it"
            )
    give_back()


def _freeze(run: Run, recipe: Recipe, names: list[str], say: Callable[[str], None]) -> None:
    """The run keeps its own copy. Another recipe for the same folder is taken where nothing that was done says otherwise.

    Error: RunError naming what differs from what finished stages went by.
    """
    file = run.path / "recipe.toml"
    if not file.exists():
        _record(run, recipe, names)
        return
    frozen = own_code.load_frozen(run.path, run_code=False)
    theirs, ours = _flat(frozen.model_dump(mode="json")), _flat(recipe.model_dump(mode="json"))
    # Where both are None, one of them may not have the key.
    differing = [k for k in {**theirs, **ours} if theirs.get(k) != ours.get(k)]
    changes = [
        f"{key} is {_shown(theirs.get(key))} there, {_shown(ours.get(key))} here"
        for key in differing
    ]
    more = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
    begun = [stage for stage in plan(frozen) if stage.begun(run)]
    for number, key in enumerate(differing):
        for stage in begun:
            if _follows(stage, key):
                raise RunError(
                    f"{run.path} was begun with another recipe ({changes[number]}{more}), and its stage {stage.name} went by that; choose another --run folder, or continue it with 'shenhong train {run.path}'"
                )
    if differing:
        say(f"{run.path} goes on with the recipe as it is now ({changes[0]}{more})")
        for stage in plan(frozen):  # what was planned and not begun is planned anew
            if stage.trains and not stage.begun(run):
                run.manifest.pop(stage.name, None)
        if not any(stage.trains for stage in begun):
            run.manifest.pop("machine", None)
        _record(run, recipe, names)
        run.event("recipe", changes=changes)
    else:
        own_code.record(run, recipe)


def _record(run: Run, recipe: Recipe, names: list[str]) -> None:
    # The manifest first: it is what makes the folder a run, so a kill in between is mended when it goes on.
    # Recipes are used for many runs, each in a folder of its own.
    name = run.path.resolve().name
    run.manifest.update(name=name, seed=recipe.seed, shenhong=__version__, plan=names)
    run.manifest["domain"] = domain_of(recipe).name
    own_code.record(run, recipe)
    run.save()
    atomic_write(run.path / "recipe.toml", recipe.dump(run.path))


def _shown(value: Any) -> str:
    return "absent" if value is None else '""' if value == "" else str(value)


def _follows(stage: Stage, key: str) -> bool:
    return any(key == table or key.startswith(f"{table}.") for table in stage.follows)


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(
            _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return flat


def _heed_sources(context: Context, run: Run, stages: list[Stage]) -> None:
    """Another text is another run; before training it only means to refine again. Error: RunError."""
    from shenhong.corpus import sources

    records = run.manifest["stages"]
    for corpus in (stage for stage in stages if isinstance(stage, Corpus)):
        outputs = records.get(corpus.name, {}).get("outputs", {})
        what = sources.changed(outputs, corpus.settings, run.path)
        if not what:
            continue
        later = [corpus, *_readers(corpus, stages)]
        if any(stage.trains and stage.name in records for stage in later):
            raise RunError(
                f"{what} after {run.path} began to train on it; put it back as it was, or choose another --run folder"
            )
        context.say(f"{what} since it was refined: this is done again")
        for stage in later:
            if stage.name in records:
                records[stage.name]["state"] = "begun"
        run.save()


def _readers(first: Stage, stages: list[Stage]) -> list[Stage]:
    """The stages that read, directly or through others, what this one makes."""
    names, found = {first.name}, []
    for stage in stages:
        if names & set(stage.reads):
            names.add(stage.name)
            found.append(stage)
    return found


def found(recipe: Path) -> Path:
    """A recipe where it is said to be, or else the one of this name that travels with us."""
    try:
        return recipe if recipe.exists() else bundled(str(recipe))
    except RecipeError:
        return recipe


def bundled(name: str) -> Path:
    """A recipe that travels with the repository or the wheel. Error: RecipeError for none of this name."""
    here = Path(__file__).resolve()
    path = here.parents[2] / name  # of a checkout
    if not path.exists():
        path = here.parent / "bundled" / name  # of a wheel, which carries them
    if not path.exists():
        raise RecipeError(
            f"{name} does not travel with this installation; give a recipe file to 'shenhong train'"
        )
    return path
