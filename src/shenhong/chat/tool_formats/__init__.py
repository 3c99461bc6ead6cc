"""How models write calls of tools: one file a family of formats, found by listing this folder."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from shenhong.chat.tool_formats.base import ToolFormat

__all__ = ["ToolFormat", "tool_formats"]


@cache
def tool_formats() -> tuple[ToolFormat, ...]:
    """In the order of probing: by the names of their files, and within a file as it lists them."""
    names = sorted(
        module.name for module in pkgutil.iter_modules(__path__) if module.name != "base"
    )
    found = [importlib.import_module(f"{__name__}.{name}").FORMATS for name in names]
    return tuple(tool_format for formats in found for tool_format in formats)
