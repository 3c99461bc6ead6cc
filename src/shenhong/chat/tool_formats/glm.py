"""GLM-4.5: tags for the key and the value of each argument."""

from __future__ import annotations

from shenhong.chat.tool_formats.base import ToolFormat

GLM = ToolFormat(  # GLM-4.5
    "<tool_call>",
    "",
    "%s\n",
    ("</tool_call>",),
    "\n<tool_call>",
    "",
    ("<arg_key>", "</arg_key>\n<arg_value>", "</arg_value>\n"),
)

FORMATS = (GLM,)
