"""Kinds of files that a corpus is read from: one file a kind, found by listing this folder.

A new kind is one module here (base.py says what it offers); its endings are then read, listed and explained.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from typing import cast

from shenhong.corpus.formats.base import PACKED, Format

__all__ = ["PACKED", "Format", "endings", "format_of"]


@cache
def _by_ending() -> dict[str, Format]:
    names = (module.name for module in pkgutil.iter_modules(__path__) if module.name != "base")
    kinds = [cast(Format, importlib.import_module(f"{__name__}.{name}")) for name in sorted(names)]
    return {ending: kind for kind in kinds for ending in kind.ENDINGS}


def format_of(name: str) -> Format | None:
    """The kind that a file's name says it is; None for one that is not read."""
    stem, dot, last = name.lower().rpartition(".")
    if f".{last}" in PACKED:
        kind = format_of(stem)
        return kind if kind and kind.PACKABLE else None
    return _by_ending().get(dot + last)


def endings() -> str:
    """The endings of all kinds, for a message."""
    return f"{', '.join(_by_ending())}, and {', '.join(PACKED)} of those that are text"
