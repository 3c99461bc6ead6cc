"""DeepSeek-V3.1, and DeepSeek-V3 and R1 with their fences."""

from __future__ import annotations

from dataclasses import replace

from shenhong.chat.tool_formats.base import ToolFormat

DEEPSEEK = ToolFormat(  # DeepSeek-V3.1
    "<｜tool▁calls▁begin｜>",
    "",
    "<｜tool▁call▁begin｜>%s<｜tool▁sep｜>",
    ("<｜tool▁call▁end｜>",),
    "",
    "<｜tool▁calls▁end｜>",
)
FENCED = replace(  # DeepSeek-V3 and R1
    DEEPSEEK,
    head="<｜tool▁call▁begin｜>function<｜tool▁sep｜>%s\n```json\n",
    tails=("\n```<｜tool▁call▁end｜>",),
    more="\n",
)

FORMATS = (
    DEEPSEEK,
    FENCED,
)
