"""Finding a domain: those of this folder by their file's name, a person's own by the file that a recipe names.

A person's own file is code, so it is loaded only when `load` is called on purpose, by those who train or measure, and
never from inside of a run or a model folder: such a folder may come from anywhere. Whoever only opens a model sees
plain text in its place.
"""

from __future__ import annotations

import hashlib
import importlib
import pkgutil
import sys
import tomllib
import traceback
from pathlib import Path
from types import ModuleType

from pydantic import ConfigDict

from shenhong.corpus.settings import CorpusSettings
from shenhong.domains.base import Domain
from shenhong.errors import RecipeError

_OTHERS = ("base", "registry")  # files of this folder that are no domain
_PREFIX = "shenhong_own_"  # of the names of modules made from such files
_loaded: dict[Path, Domain] = {}


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


def of_run(run: Path) -> Domain:
    """The domain of a run's model by its recipe: that of the last step with data of its own, else the run's.

    Plain text where there is no recipe, or none of our kinds in it. Runs no foreign code.
    """
    try:
        recipe = tomllib.loads((Path(run) / "recipe.toml").read_text(encoding="utf-8"))
        corpora = [
            recipe["corpus"],
            *(s["corpus"] for s in recipe.get("steps", ()) if "corpus" in s),
        ]
        kind = corpora[-1]["kind"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        kind = "text"
    return domain(kind if isinstance(kind, str) and kind in names() else "text")


# ------------------------------------------------------------------------ a person's own


def is_file(kind: str) -> bool:
    """Whether a kind is the name of a Python file."""
    return kind.endswith(".py")


def digest(path: Path) -> str:
    """SHA-256 of the file as it is now. Error: RecipeError."""
    return hashlib.sha256(_read(path)).hexdigest()


def load(path: Path) -> Domain:
    """Run a person's own file and take the domain it offers. Errors: RecipeError for a file that may not be run, or fails."""
    path = Path(path).resolve()
    for folder in path.parents:
        if _is_run(folder) or _is_model(folder):
            raise RecipeError(
                f"{path} lies inside of {folder}, a run or a model folder: no code is run from there; copy it elsewhere"
            )
    code = _read(path)
    name = f"{_PREFIX}{hashlib.sha256(code).hexdigest()[:16]}"
    module = ModuleType(name)
    module.__file__ = str(path)
    sys.modules[name] = module  # pydantic looks types up there
    try:
        exec(compile(code, str(path), "exec"), module.__dict__)
        _loaded[path] = _offered(module, str(path))
    except RecipeError:
        raise
    except Exception as error:
        raise RecipeError(f"{path} fails: {type(error).__name__}: {error}") from error
    return _loaded[path]


def _is_run(folder: Path) -> bool:
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


def _read(path: Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise RecipeError(
            f"{path} cannot be read ({error.strerror}); corpus.kind names a domain or a Python file of your own"
        ) from None


def _offered(module: ModuleType, where: str) -> Domain:
    found = getattr(module, "DOMAIN", None)
    if not isinstance(found, Domain):
        raise RecipeError(
            f"{where} offers no domain: set DOMAIN to an instance of its Domain class"
        )
    return found
