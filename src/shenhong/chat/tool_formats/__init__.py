"""How models write calls of tools: one file a form, found by listing this folder."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from shenhong.chat.tool_formats.base import ToolFormat

__all__ = ["ToolFormat", "tool_formats"]


@cache
def tool_formats() -> tuple[ToolFormat, ...]:
    """All that are here, by the names of their files."""
    names = sorted(
        module.name for module in pkgutil.iter_modules(__path__) if module.name != "base"
    )
    found = [importlib.import_module(f"{__name__}.{name}").FORMATS for name in names]
    return tuple(form for forms in found for form in forms)
