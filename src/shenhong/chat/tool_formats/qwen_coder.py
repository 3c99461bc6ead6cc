"""Qwen3-Coder: a tag for each argument."""

from __future__ import annotations

from shenhong.chat.tool_formats.base import ToolFormat

CODER = ToolFormat(  # Qwen3-Coder
    "<tool_call>",
    "\n",
    "<function=%s>\n",
    ("</function>",),
    "\n</tool_call>\n<tool_call>\n",
    "\n</tool_call>",
    ("<parameter=", ">\n", "\n</parameter>\n"),
)

FORMATS = (CODER,)
