"""Hermes and Qwen: JSON between tags."""

from __future__ import annotations

from shenhong.chat.tool_formats.base import ToolFormat

TAGGED = ToolFormat(  # Hermes, Qwen
    "<tool_call>",
    "\n",
    '{"name": "%s", "arguments": ',
    ("}",),
    "\n</tool_call>\n<tool_call>\n",
    "\n</tool_call>",
)

FORMATS = (TAGGED,)
