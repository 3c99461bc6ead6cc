"""Llama: the whole answer is one JSON object."""

from __future__ import annotations

from shenhong.chat.tool_formats.base import ToolFormat

BARE = ToolFormat("", "", '{"name": "%s", "parameters": ', ("}",), None, "")  # Llama

FORMATS = (BARE,)
