"""Finding the kinds of steps: each is the file of its name in this folder that offers a ``STEP``."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
import sys
from functools import cache

from shenhong.errors import RecipeError
from shenhong.stages.base import Step


def kinds() -> list[str]:
    """All kinds of steps."""
    here = sys.modules[__package__].__path__
    names = sorted(module.name for module in pkgutil.iter_modules(here))
    return [name for name in names if _offered(name) is not None]


def step_of(kind: str) -> type[Step]:
    """The class of a kind of step. Error: RecipeError, with the nearest there is."""
    found = _offered(kind) if kind.isidentifier() else None
    if found is None:
        near = difflib.get_close_matches(kind, kinds(), n=1, cutoff=0.0)
        raise RecipeError(f'there is no step of kind "{kind}"; did you mean {near[0]}?')
    return found


@cache
def _offered(name: str) -> type[Step] | None:
    try:
        module = importlib.import_module(f"{__package__}.{name}")
    except ModuleNotFoundError as error:
        if error.name == f"{__package__}.{name}":
            return None
        raise
    return getattr(module, "STEP", None)
