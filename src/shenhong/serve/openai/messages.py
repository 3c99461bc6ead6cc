"""Messages as callers send them, turned into what a chat template reads."""

from __future__ import annotations

import json
from typing import Any

from shenhong.chat.template import OURS
from shenhong.serve.http.faults import bad
from shenhong.serve.hub import Served
from shenhong.serve.openai.schemas import ChatMessage, TextPart, ToolCall
from shenhong.serve.openai.tools import tool_format_of


def text_of_content(content: str | list[TextPart] | None) -> str:
    return content if isinstance(content, str) else "".join(p.text for p in content or [])


def template_messages(model: Served, messages: list[ChatMessage]) -> list[dict[str, Any]]:
    """As the template reads them. Fault: 400 for what it cannot express."""
    made = []
    called: dict[str, str] = {}  # names of functions by the ids of their calls
    for number, message in enumerate(messages):
        where = f"messages.{number}"
        plain: dict[str, Any] = {
            "role": "system" if message.role == "developer" else message.role,
            "content": text_of_content(message.content),
        }
        if message.name is not None:
            plain["name"] = message.name
        if message.reasoning_content is not None:
            plain["reasoning_content"] = thought_before(model, message.reasoning_content, where)
        if message.role == "tool" or message.tool_calls or message.tool_call_id:
            tool_format_of(model, where)
        if message.tool_calls:
            if message.role != "assistant":
                raise bad("only the assistant calls tools", f"{where}.tool_calls")
            plain["tool_calls"] = [
                _earlier_call(model, call, f"{where}.tool_calls.{n}")
                for n, call in enumerate(message.tool_calls)
            ]
            called |= {call.id: call.function.name for call in message.tool_calls}
        if message.role == "tool":
            if message.tool_call_id not in called:
                raise bad("it answers no call made before it", f"{where}.tool_call_id")
            name = message.name or called[message.tool_call_id]
            plain |= {"tool_call_id": message.tool_call_id, "name": name}
        elif message.tool_call_id:
            raise bad("only tools answer calls", f"{where}.tool_call_id")
        made.append(plain)
    return made


def thought_before(model: Served, thought: str, where: str) -> str:
    """Earlier thinking. Fault: 400 where the template has none."""
    if not model.template.thinking:
        raise bad(f"the template of {model.id} has no thinking", f"{where}.reasoning_content")
    return thought


def _earlier_call(model: Served, call: ToolCall, where: str) -> dict[str, Any]:
    """As the template wants it: most take arguments as an object, some as text. Fault: 400."""
    text = call.function.arguments or "{}"
    try:
        arguments = json.loads(text)
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise bad("arguments are a JSON object as text", f"{where}.function.arguments")
    wanted = text if model.template.calls_in_text else arguments
    return call.model_dump() | {"function": {"name": call.function.name, "arguments": wanted}}


def template_variables(model: Served, given: dict[str, Any] | None) -> dict[str, Any]:
    """chat_template_kwargs: only variables that the template itself reads. Fault: 400."""
    allowed = model.template.variables - OURS - {"raise_exception", "strftime_now"}
    for name in given or {}:
        if name not in allowed:
            raise bad(
                f"the chat template of {model.id} knows no {name}",
                "chat_template_kwargs",
                "unknown_field",
            )
    return given or {}
