"""Conversations as a kind of text: what is asked of a finished model, and when an answer is right."""

from __future__ import annotations

import json

from shenhong import domains
from shenhong.evaluate.settings import EvaluateSettings

CHAT = domains.domain("chat")


def talk(*texts: str, roles: tuple[str, ...] = ("user", "assistant")) -> str:
    messages = [{"role": roles[i % 2], "content": t} for i, t in enumerate(texts)]
    return json.dumps({"messages": messages})


def test_a_conversation_is_asked_up_to_its_last_answer() -> None:
    talks = [talk("a", "b", "c", "d"), talk("early", roles=("assistant", "user"))]
    rows = {"id": ["1", "2"], "text": ["", ""], "conversation": talks}
    questions = CHAT.questions(rows, EvaluateSettings(titles=9), 1)
    # What begins with its answer asks nothing.
    assert [CHAT.asked(prompt) for prompt in questions.prompts] == [
        json.loads(talk("a", "b", "c"))["messages"]
    ]
    assert questions.references == ["d"]
    assert CHAT.learnt(rows) == ["bd", "early"]
    assert CHAT.samples(questions, ["x"], 5) == [{"prompt": "c", "text": "x", "reference": "d"}]


def test_an_answer_is_right_but_for_what_stands_around_it() -> None:
    rows = {"id": ["1"] * 3, "text": [""] * 3, "conversation": [talk("q", "Paris")] * 3}
    questions = CHAT.questions(rows, EvaluateSettings(titles=9), 1)
    found = CHAT.measure([" Paris.", "paris", "Paris, France"], questions)
    assert found == {"exact_match": 1 / 3, "answers": 3}
    tiles = CHAT.tiles({"chat": {"model": found, "before": {"exact_match": 0.0, "answers": 3}}})
    assert tiles == [("answers exactly right", "33.3%", "before: 0.0%")]
