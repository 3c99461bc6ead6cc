"""Calls read out of what models write, in every form, however it comes."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shenhong.serve.calls import FENCED, FORMS, TAGGED, Call, Calls, Offer, joined
from shenhong.serve.schemas import Function

F, G = Function(name="f"), Function(name="f-2")
ARGUMENTS = '{"a": [1, "}</tool_call>\\\\\\"[", {}], "b": "<｜tool▁call▁end｜>"}'


def read(form: Any, parts: list[str]) -> tuple[str, list[tuple[str, str]]]:
    calls, said, made = Calls(Offer(form, [F, G])), "", list[Call]()
    for number, part in enumerate(parts):
        text, new = calls.feed(part, last=number == len(parts) - 1)
        said, made = said + text, joined(made, new)
    return said, [(call.name, call.arguments) for call in made]


@pytest.mark.parametrize("form", FORMS)
def test_calls_are_read_as_they_are_written(form: Any) -> None:
    assert json.loads(ARGUMENTS)
    for tail in range(len(form.tails)):
        call = form.call("f", ARGUMENTS, tail)
        assert read(form, [call]) == ("", [("f", ARGUMENTS)])
        assert read(form, list(call)) == ("", [("f", ARGUMENTS)])
        if form.mark:
            assert read(form, [f"so \n{call}"]) == ("so", [("f", ARGUMENTS)])
    if form.more is not None:
        more = form.call("f", "{}" + form.tails[0] + form.more + form.head % "f-2" + ARGUMENTS)
        assert read(form, list(more)) == ("", [("f", "{}"), ("f-2", ARGUMENTS)])
    unknown = form.call("f-3", "{}")
    assert read(form, list(unknown)) == (unknown, [])


@pytest.mark.parametrize("form", FORMS)
def test_a_name_is_told_when_it_is_certain(form: Any) -> None:
    """Neither before its arguments begin, nor later; then each sign of the arguments as it comes."""
    calls, begin = Calls(Offer(form, [F, G])), form.mark + form.opened + form.head % "f"
    for char in begin:
        assert calls.feed(char) == ("", [])
    (said, (begun, first)) = calls.feed("{")
    assert (said, begun.name, begun.arguments, first.arguments) == ("", "f", "", "{")
    for char in ARGUMENTS[1:]:
        assert [call.arguments for call in calls.feed(char)[1]] == [char]


def test_a_call_that_breaks_keeps_what_was_written() -> None:
    broken = '<tool_call>\n{"name": "f", "arguments": {"a": 1</tool_call> on'
    assert read(TAGGED, [broken]) == ("</tool_call> on", [("f", '{"a": 1')])
    more = '<tool_call>\n{"name": "f", "arguments": {}, "x": 1}</tool_call>'
    assert read(TAGGED, [more]) == (', "x": 1}</tool_call>', [("f", "{}")])
    cut = FENCED.call("f", "{}")[:-9]
    assert read(FENCED, [cut]) == ("", [("f", "{}")])


PIECES = [
    "<tool_call>", "</tool_call>", '{"name": "f", "arguments": {"a": [1]}}', "<tool", "\n", " hi",
    '{"name": "f", "arguments": {"a": "</tool_call>\\\\", "b": "<tool_call>\\""}}', '{"',
    '{"name": "g", "arguments": {}}', '{"name": ["f"], "arguments": {}}', "{", "[[", '{"name": "f", "parameters": {}}',
    *(FENCED.call("f", "{}") + FENCED.call("f-2", '{"a": "b"}')).replace("｜><｜", "｜>\0<｜").split("\0"),
    "[TOOL_CALLS]", " [", 'f[ARGS]{"a": 1}', ', "id": "a', '1b"}', "]",
]  # fmt: skip


@given(st.sampled_from(FORMS), st.lists(st.sampled_from(PIECES), max_size=9), st.data())
def test_calls_are_the_same_however_they_come(
    form: Any, pieces: list[str], data: st.DataObject
) -> None:
    text = "".join(pieces)
    places = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=5)))
    parts = [text[a:b] for a, b in itertools.pairwise([0, *places, len(text)])]
    said, made = read(form, [text])
    assert read(form, parts) == (said, made)
    if not made:
        assert said == text.lstrip()  # nothing is lost
    assert all(name in ("f", "f-2") for name, _ in made)
