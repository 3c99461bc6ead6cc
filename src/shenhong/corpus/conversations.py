"""Conversations as people keep them, in the shapes of the field, as one: OpenAI's messages.

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}], "tools": [...]}
    {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}         ShareGPT
    {"prompt": "...", "completion": "..."}            also {"instruction", "input", "output"}        Alpaca

What a model is to learn of a conversation is what the assistant says in it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

ROLES = ("system", "user", "assistant", "tool")
FIELDS = ("messages", "conversations", "conversation", "dialog")
_SHAREGPT = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "model": "assistant",
    "function_response": "tool",
    "observation": "tool",
}
_PAIRS = (("prompt", "completion"), ("prompt", "response"), ("question", "answer"))


def conversation(record: Mapping[str, Any], field: str) -> str:
    """The conversation of a record as JSON, {"messages": [...]} and "tools" where it has some.

    Error: ValueError that says what is wrong with it.
    """
    found = {"messages": _messages(record, field)}
    tools = record.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError:
            raise ValueError("its tools are not JSON") from None
    if tools:
        if not isinstance(tools, list):
            raise ValueError("its tools are no list")
        found["tools"] = tools
    return json.dumps(found, ensure_ascii=False)


def _messages(record: Mapping[str, Any], field: str) -> list[dict[str, Any]]:
    name = next((name for name in (field, *FIELDS) if name in record), None)
    if name is not None:
        turns = record[name]
    elif {"instruction", "output"} <= record.keys():
        more = record.get("input")
        asked = f"{record['instruction']}\n\n{more}" if more else record["instruction"]
        turns = _pair(asked, record["output"])
    else:
        pair = next((pair for pair in _PAIRS if set(pair) <= record.keys()), None)
        if pair is None:
            there = ", ".join(map(str, record)) or "none"
            raise ValueError(
                f"there is no conversation (fields here: {there:.200}); set corpus.text_field to the field that holds its messages"
            )
        turns = _pair(record[pair[0]], record[pair[1]])
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"its {name or 'conversation'} is no list of messages")
    messages = [_message(turn, number) for number, turn in enumerate(turns, 1)]
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("nobody answers in it: it has no message of the assistant")
    return messages


def _pair(asked: Any, answer: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]


def _message(turn: Any, number: int) -> dict[str, Any]:
    """One message, its role and text checked; what else it holds (tool calls, thinking) is kept."""
    if not isinstance(turn, Mapping):
        raise ValueError(f"message {number} is no object with role and content")
    message = dict(turn)
    if "role" not in message and "from" in message:
        said = str(message.pop("from"))
        message["role"] = _SHAREGPT.get(said, said)
        message["content"] = message.pop("value", None)
    role, content = message.get("role"), message.get("content")
    if role is None:
        raise ValueError(f"message {number} has no role")
    if role == "developer":
        role = message["role"] = "system"
    if role not in ROLES:
        raise ValueError(
            f"message {number} has the role {role!r:.40}, which is none of {', '.join(ROLES)}"
        )
    if isinstance(content, list):
        content = message["content"] = _joined(content, number)
    if content is None and message.get("tool_calls"):
        content = message["content"] = ""
    if not isinstance(content, str):
        raise ValueError(f"message {number} has no text as its content")
    if role == "assistant" and not content.strip() and not message.get("tool_calls"):
        raise ValueError(f"message {number}: the assistant's answer is empty")
    return message


def _joined(parts: Sequence[Any], number: int) -> str:
    found = [part.get("text") for part in parts if isinstance(part, Mapping)]
    texts = [text for text in found if isinstance(text, str)]
    if len(texts) != len(parts):
        raise ValueError(f"message {number} has parts that are no text")
    return "\n".join(texts)
