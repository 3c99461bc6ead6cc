"""A person's own Python file in a recipe: when it may be run.

Whoever gives `train` a recipe file that names one means it to be run. Its hash, and a fingerprint of the place it lies
at, go into the manifest; a run folder goes on only with that very file at that very place, because a folder may come
from anywhere. Another file, or another place, takes a word from the person: ``--allow-code FILE``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shenhong.domains import registry
from shenhong.errors import RecipeError
from shenhong.recipe import Recipe, load
from shenhong.runs.files import beside
from shenhong.runs.run import Run


def load_recipe(path: Path, changes: list[str] | None = None) -> Recipe:
    """A recipe file, with the code it names. Error: RecipeError."""
    return load(path, changes, registry.load)


def load_frozen(run: Path, allow: Path | None = None, *, run_code: bool = True) -> Recipe:
    """The recipe a run was begun with, with its code where that is what it was, or is allowed now. Error: RecipeError."""
    return load(Path(run) / "recipe.toml", None, _careful(Path(run), allow) if run_code else None)


def record(run: Run, recipe: Recipe) -> None:
    """Into the manifest (which is not saved here): each file's hash, and a fingerprint of its place."""
    if files := _files(recipe):
        run.manifest["code"] = {beside(str(file), run.path): _fingerprint(file) for file in files}


def heed(run: Run, recipe: Recipe, allow: Path | None) -> None:
    """Where a run that began earlier goes on with other code: only if that was allowed. Error: RecipeError."""
    before = run.manifest.get("code")
    for file in _files(recipe):
        _check(file, run.path, allow)
    record(run, recipe)
    if run.manifest.get("code") != before:
        run.event("code", files=run.manifest.get("code"))
        run.save()


def _files(recipe: Recipe) -> list[Path]:
    corpora = [recipe.corpus, *(step.corpus for step in recipe.steps if step.corpus)]
    return [Path(corpus.kind) for corpus in corpora if registry.is_file(corpus.kind)]


def _fingerprint(file: Path) -> dict[str, str]:
    """The place is hashed too: a run that is shown to others tells nothing of the machine."""
    place = hashlib.sha256(str(file.resolve()).encode()).hexdigest()
    return {"sha256": registry.digest(file), "place": place}


def _careful(run: Path, allow: Path | None) -> Callable[[Path], object]:
    """Loads a file if it is the one the run knows, at its place, or the one that is allowed."""

    def take(file: Path) -> object:
        _check(file, run, allow)
        return registry.load(file)

    return take


def _check(file: Path, run: Path, allow: Path | None) -> None:
    """Error: RecipeError where the file is not the one the run was begun with, and not the one that is allowed."""
    if allow is not None and allow.resolve() == file.resolve():
        return
    found, now = _known(run).get(beside(str(file.resolve()), run)), _fingerprint(file)
    if found != now:
        moved = isinstance(found, dict) and found.get("sha256") == now["sha256"]
        what = "lies at another place than" if moved else "is not the file"
        raise RecipeError(
            f"{run} names {file}, which {what} it was begun with; read it, and add --allow-code {file} if it is to be run"
        )


def _known(run: Path) -> dict[str, Any]:
    try:
        found = json.loads((run / "manifest.json").read_bytes()).get("code")
    except (OSError, ValueError, AttributeError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
