"""Mistral: a list until 2024, a mark for each call since 2025."""

from __future__ import annotations

from dataclasses import replace

from shenhong.chat.tool_formats.base import ID, ToolFormat

LISTED = ToolFormat(  # Mistral until 2024
    "[TOOL_CALLS]",
    " [",
    '{"name": "%s", "arguments": ',
    ("}", f', "id": "{ID}"}}'),
    ", ",
    "]",
)
LISTED_CLOSELY = replace(LISTED, opened="[")  # its Tekken tokenizers have no space there
MARKED = ToolFormat("[TOOL_CALLS]", "", "%s[ARGS]", ("",), "[TOOL_CALLS]", "")  # Mistral since 2025

FORMATS = (
    LISTED,
    LISTED_CLOSELY,
    MARKED,
)
