"""A person's own Python file in a recipe: when it may be run.

Whoever gives `train` a recipe file that names one means it to be run, as it is now, where it is. That word is kept on
their machine, outside of any run: a run folder may come from anywhere, and what it says of itself proves nothing. A run
goes on only with the very file it was begun with (its hash is in the manifest) and only where that word was given for
this file at this place. Anything else takes another word: ``--allow-code FILE``. Each file is read once: what is checked
is what is run and recorded. What a file imports is not checked.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shenhong.domains import registry
from shenhong.domains.registry import Code
from shenhong.errors import RecipeError
from shenhong.recipe import Recipe, load, read, resolve
from shenhong.runs.files import beside
from shenhong.runs.regular import read_regular
from shenhong.runs.run import Run

Take = Callable[[Path], object]  # runs a file, or refuses to


def for_run(run: Path, allow: Path | None = None, asked: bool = False) -> Take:
    """What runs the code of a recipe for this run, which need not exist yet.

    ``asked``: the recipe is a file that a person gave, so that naming code is their word for it, unless a run that is
    there already was begun with other code. ``allow``: a file they gave their word for besides.
    """
    begun = registry.is_run(run)

    def take(file: Path) -> object:
        code = registry.read(file)
        if (allow is not None and allow.resolve() == code.path) or (asked and not begun):
            _give_word(code)
        else:
            _check(code, file, run)
        return registry.run(code)

    return take


def load_recipe(
    path: Path,
    changes: list[str] | None = None,
    run_folder: Path | None = None,
    allow: Path | None = None,
) -> tuple[Recipe, Path]:
    """A recipe file with the code it names, and the run it is for. Error: RecipeError, before anything is run."""
    tables, base = read(path, changes), path.resolve().parent
    named = resolve(tables, base, str(path))
    run = run_folder or Path("runs") / named.name
    _check_allowed(named, allow)
    # The frozen recipe of a run is that folder's word and not a person's.
    guard = run if registry.is_run(run) or not registry.is_run(base) else base
    return resolve(tables, base, str(path), for_run(guard, allow, asked=True)), run


def load_frozen(run: Path, allow: Path | None = None, *, run_code: bool = True) -> Recipe:
    """The recipe a run was begun with, with its code where that is what it was, or is allowed now. Error: RecipeError."""
    path = Path(run) / "recipe.toml"
    if not run_code:
        return load(path)
    _check_allowed(load(path), allow)
    return load(path, None, for_run(Path(run), allow))


def record(run: Run, recipe: Recipe) -> None:
    """Into the manifest, where it changes: the hash of each file, as it was run."""
    files = {_key(file, run.path): registry.ran(file) for file in _files(recipe)}
    if files and run.manifest.get("code") != files:
        run.event("code", files=files, before=run.manifest.get("code"))
        run.manifest["code"] = files
        run.save()


def _files(recipe: Recipe) -> list[Path]:
    corpora = [recipe.corpus, *(step.corpus for step in recipe.steps if step.corpus)]
    return [Path(corpus.kind) for corpus in corpora if registry.is_file(corpus.kind)]


def _key(file: Path, run: Path) -> str:
    return beside(str(file.resolve()), run)


def _check_allowed(recipe: Recipe, allow: Path | None) -> None:
    """Error: RecipeError for a word that is for nothing."""
    files = [file.resolve() for file in _files(recipe)]
    if allow is not None and allow.resolve() not in files:
        named = ", ".join(map(str, files)) or "no Python file"
        raise RecipeError(f"--allow-code {allow}: the recipe names {named}")


def _check(code: Code, file: Path, run: Path) -> None:
    """Error: RecipeError where the file is not the one the run was begun with, or nobody here gave their word for it."""
    known = _manifest(run).get(_key(file, run))
    if known != code.sha256:
        why = "which is not the file it was begun with"
    elif not _has_word(code):
        why = "for which no word was given on this machine, at this place"
    else:
        return
    raise RecipeError(
        f"{run} names {code.path}, {why}; read it, and add --allow-code {code.path} if it is to be run"
    )


def _manifest(run: Path) -> dict[str, Any]:
    try:
        found = json.loads(read_regular(run / "manifest.json")).get("code")
    except (OSError, ValueError, AttributeError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


# ------------------------------------------------------------------------ the words that were given


def _words() -> Path:
    """$XDG_STATE_HOME/shenhong/code.json, by default in ~/.local/state."""
    home = os.environ.get("XDG_STATE_HOME", "")
    base = Path(home) if os.path.isabs(home) else Path.home() / ".local" / "state"
    return base / "shenhong" / "code.json"


def _given() -> dict[str, Any]:
    try:
        found = json.loads(_words().read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _has_word(code: Code) -> bool:
    return _given().get(str(code.path)) == code.sha256


def _give_word(code: Code) -> None:
    """For this content at this place, in place of any other. A disk that takes no word makes them be asked again."""
    if _has_word(code):
        return
    path = _words()
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps(_given() | {str(code.path): code.sha256}, indent=1))
        temporary.chmod(0o600)
        os.replace(temporary, path)
