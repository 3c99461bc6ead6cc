"""Conversations in the shapes that people keep them in, and what is wrong with those that are none."""

from __future__ import annotations

import json

import pytest

from shenhong.corpus.conversations import conversation

WANTED = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]


@pytest.mark.parametrize(
    "record",
    [
        {"messages": WANTED},
        {"conversations": [{"from": "human", "value": "1+1?"}, {"from": "gpt", "value": "2"}]},
        {"prompt": "1+1?", "completion": "2"},
        {"question": "1+1?", "answer": "2"},
        {"instruction": "1+1?", "input": "", "output": "2"},
        {"talk": WANTED},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "1+1?"}]}, WANTED[1]]},
    ],
)
def test_every_shape_is_the_same_conversation(record: dict) -> None:
    found = json.loads(conversation(record, "talk" if "talk" in record else "messages"))
    assert found == {"messages": WANTED}


def test_tools_calls_and_thinking_are_kept() -> None:
    call = {"type": "function", "function": {"name": "sum", "arguments": "{}"}}
    messages = [
        {"role": "developer", "content": "Use tools."},
        WANTED[0],
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "2", "tool_call_id": "a"},
        {"role": "assistant", "content": "2", "reasoning_content": "One and one."},
    ]
    found = json.loads(conversation({"messages": messages, "tools": '[{"a": 1}]'}, "messages"))
    assert found["tools"] == [{"a": 1}]
    assert [m["role"] for m in found["messages"]] == [
        "system",
        "user",
        "assistant",
        "tool",
        "assistant",
    ]
    assert found["messages"][2] == {"role": "assistant", "content": "", "tool_calls": [call]}
    assert found["messages"][4]["reasoning_content"] == "One and one."


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"text": "x"}, "there is no conversation (fields here: text)"),
        ({"messages": []}, "its messages is no list of messages"),
        ({"messages": [WANTED[0]]}, "nobody answers in it"),
        ({"messages": [{"content": "a"}]}, "message 1 has no role"),
        ({"messages": [{"role": "boss", "content": "a"}]}, "the role 'boss', which is none of"),
        (
            {"messages": [WANTED[0], {"role": "assistant", "content": " "}]},
            "message 2: the assistant's answer is empty",
        ),
        ({"messages": [WANTED[0], {"role": "assistant", "content": 7}]}, "message 2 has no text"),
        ({"messages": ["hello"]}, "message 1 is no object"),
        ({"messages": WANTED, "tools": "{"}, "its tools are not JSON"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "parts that are no text",
        ),
    ],
)
def test_what_is_wrong_is_said(record: dict, says: str) -> None:
    with pytest.raises(ValueError) as error:
        conversation(record, "messages")
    assert says in str(error.value)
