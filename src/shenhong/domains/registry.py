"""Finding a domain: those of this folder by their file's name, a person's own by the file that a recipe names.

A person's own file is code, so it is run only when `run` is called on purpose, by those who train or measure, and
never from inside of a run or a model folder: such a folder may come from anywhere. Whoever only opens a model sees
plain text in its place.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import pkgutil
import re
import sys
import tomllib
import traceback
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from pydantic import ConfigDict

from shenhong.corpus.settings import CorpusSettings
from shenhong.domains.base import Domain
from shenhong.errors import RecipeError
from shenhong.runs.regular import read_regular

_OTHERS = ("base", "registry")  # files of this folder that are no domain
_PREFIX = "shenhong_own_"  # of the names of modules made from such files
_loaded: dict[Path, Domain] = {}
_ran: dict[Path, str] = {}  # SHA-256 of what was run


def names() -> list[str]:
    """The domains that are here."""
    here = sys.modules[__package__].__path__
    return sorted(m.name for m in pkgutil.iter_modules(here) if m.name not in _OTHERS)


def domain(kind: str) -> Domain:
    """The domain that a recipe's corpus.kind names. Error: RecipeError for none of ours and no file that was loaded."""
    if is_file(kind):
        if found := _loaded.get(Path(kind).resolve()):
            return found
        raise RecipeError(f"{kind} is code of your own, and is run only to train and to measure")
    if kind not in names():
        raise RecipeError(
            f'corpus.kind "{kind}" is not known; there are {", ".join(names())}, or name a Python file of your own'
        )
    return _offered(importlib.import_module(f"{__package__}.{kind}"), kind)


def settings_of(kind: str) -> type[CorpusSettings]:
    """What a [corpus] table of this kind may say; anything for a file that was not loaded. Error: RecipeError."""
    if is_file(kind) and Path(kind).resolve() not in _loaded:
        return _Unchecked
    return domain(kind).Settings


class _Unchecked(CorpusSettings):
    model_config = ConfigDict(extra="allow")


def kind_of(run: Path) -> str | None:
    """The name of the domain that a run's model is measured as, ours or not; None where no run says so.

    The manifest names it; in runs begun before manifests did, the recipe's one corpus does.
    """
    try:
        named = json.loads(read_regular(Path(run) / "manifest.json")).get("domain")
        if named is None:
            recipe = tomllib.loads(read_regular(Path(run) / "recipe.toml").decode("utf-8"))
            named = recipe["corpus"]["kind"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        named = None
    return named if isinstance(named, str) else None


def of_run(run: Path) -> Domain:
    """That domain; plain text where it is none of ours. Runs no foreign code."""
    named = kind_of(run)
    return domain(named if named in names() else "text")


# ------------------------------------------------------------------------ a person's own


def is_file(kind: str) -> bool:
    """Whether a kind is the name of a Python file."""
    return kind.endswith(".py") and "\0" not in kind


class Code(NamedTuple):
    """A person's own file as it was read, once: what is checked is what is run and what is recorded."""

    path: Path  # resolved
    content: bytes

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()


def read(path: Path) -> Code:
    """Errors: RecipeError for a file that cannot be read, or that lies where no code is run from."""
    path = Path(path).resolve()
    for folder in path.parents:
        if is_run(folder) or _is_model(folder):
            raise RecipeError(
                f"{path} lies inside of {folder}, a run or a model folder: no code is run from there; copy it elsewhere"
            )
    try:
        return Code(path, read_regular(path))
    except OSError as error:
        raise RecipeError(
            f"{path} cannot be read ({error.strerror}); corpus.kind names a domain or a Python file of your own"
        ) from None


def run(code: Code) -> Domain:
    """Run the code and take the domain it offers. Error: RecipeError where it fails or offers none."""
    name = f"{_PREFIX}{code.sha256[:16]}"
    module = ModuleType(name)
    module.__file__ = str(code.path)
    sys.modules[name] = module  # pydantic looks types up there
    try:
        exec(compile(code.content, str(code.path), "exec"), module.__dict__)
    except RecipeError:
        raise
    except (Exception, SystemExit) as error:
        raise RecipeError(f"{code.path} fails: {type(error).__name__}: {error}") from error
    offered = _offered(module, str(code.path))
    if offered.name in names():
        raise RecipeError(
            f"{code.path}: a domain of ours is called {offered.name}; choose another name"
        )
    _loaded[code.path], _ran[code.path] = offered, code.sha256
    return offered


def ran(path: Path) -> str | None:
    """SHA-256 of what was run of this file, if it was."""
    return _ran.get(Path(path).resolve())


def is_run(folder: Path) -> bool:
    """Whether a folder is a run, which may come from anywhere."""
    return (folder / "manifest.json").exists() and (folder / "recipe.toml").exists()


def _is_model(folder: Path) -> bool:
    return (folder / "config.json").exists() and (
        (folder / "tokenizer.json").exists() or any(folder.glob("*.safetensors"))
    )


def fault_of(error: BaseException) -> str | None:
    """Where a person's own file failed and how, in one line; None where the error is not of such a file."""
    frames = list(traceback.walk_tb(error.__traceback__))
    own = {name for name in sys.modules if name.startswith(_PREFIX)}
    for frame, line in reversed(frames):
        if frame.f_globals.get("__name__") in own:
            place = frame.f_globals.get("__file__")
            return f"{place}, line {line} fails: {type(error).__name__}: {error}"
    return None


def _offered(module: ModuleType, where: str) -> Domain:
    """Error: RecipeError naming what is missing or of a wrong kind."""
    found = getattr(module, "DOMAIN", None)
    if not isinstance(found, Domain):
        raise RecipeError(
            f"{where} offers no domain: set DOMAIN to an instance of its Domain class"
        )
    name = getattr(found, "name", None)
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z][\w-]{0,63}", name):
        raise RecipeError(
            f"{where}: a domain has a name of letters, digits and -, not {name!r:.80}"
        )
    if not (isinstance(found.Settings, type) and issubclass(found.Settings, CorpusSettings)):
        raise RecipeError(f"{where}: Settings must be a subclass of CorpusSettings")
    for what in ("fields", "columns"):
        listed = getattr(found, what)
        if not isinstance(listed, tuple) or not all(isinstance(part, str) for part in listed):
            raise RecipeError(f"{where}: {what} must be a tuple of names, not {listed!r:.80}")
    return found
