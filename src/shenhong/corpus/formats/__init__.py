"""Kinds of files that a corpus is read from: one file a kind, found by listing this folder.

A new kind is one module here (base.py says what it offers); its endings are then read, listed and explained.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
from functools import cache
from typing import cast

from shenhong.corpus.formats.base import PACKED, Format

__all__ = ["PACKED", "Format", "ending", "endings", "format_of", "listed"]


@cache
def _by_ending() -> dict[str, Format]:
    names = (module.name for module in pkgutil.iter_modules(__path__) if module.name != "base")
    kinds = [cast(Format, importlib.import_module(f"{__name__}.{name}")) for name in sorted(names)]
    return {ending: kind for kind in kinds for ending in kind.ENDINGS}


def format_of(name: str) -> Format | None:
    """The kind that a file's name says it is; None for one that is not read."""
    last, *packed = ending(name)
    kind = _by_ending().get(last)
    return kind if kind and (kind.PACKABLE or not packed) else None


def ending(name: str) -> list[str]:
    """What a name ends in, and how it is packed if it is: [".txt"], [".txt", ".gz"]."""
    stem, last = os.path.splitext(name.lower())
    return [*ending(stem)[:1], last] if last in PACKED else [last]


def endings() -> list[str]:
    """Of all kinds."""
    return list(_by_ending())


def listed() -> str:
    """The endings of all kinds, for a message."""
    whole = [last for last, kind in _by_ending().items() if not kind.PACKABLE]
    return f"{', '.join(endings())}; all but {', '.join(whole)} also as {', '.join(PACKED)}"
