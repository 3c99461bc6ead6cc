"""Calls read out of what models write, in every form, however it comes."""

from __future__ import annotations

import importlib
import itertools
import json
import pkgutil
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import shenhong.chat.tool_formats as tool_formats_package
from shenhong.chat.tool_calls import PROBE_TEXT, Call, Calls, Offer, format_of, joined, squeezed
from shenhong.chat.tool_formats import tool_formats
from shenhong.chat.tool_formats.deepseek import FENCED
from shenhong.chat.tool_formats.glm import GLM
from shenhong.chat.tool_formats.hermes import TAGGED
from shenhong.chat.tool_formats.qwen_coder import CODER
from shenhong.serve.openai.schemas import Function
from tests.test_extending import example

F, G = Function(name="f"), Function(name="f-2")
ARGUMENTS = '{"a": [1, "}</tool_call>\\\\\\"[", {}], "b": "<｜tool▁call▁end｜>"}'


def read(form: Any, parts: list[str]) -> tuple[str, list[tuple[str, str]]]:
    calls, said, made = Calls(Offer(form, [F, G])), "", list[Call]()
    for number, part in enumerate(parts):
        text, new = calls.feed(part, last=number == len(parts) - 1)
        said, made = said + text, joined(made, new)
    return said, [(call.name, call.arguments) for call in made]


@pytest.mark.parametrize("form", tool_formats())
def test_calls_are_read_as_they_are_written(form: Any) -> None:
    assert json.loads(ARGUMENTS)
    for tail in range(len(form.tails)):
        call = form.call("f", ARGUMENTS, tail)
        assert read(form, [call]) == ("", [("f", ARGUMENTS)])
        assert read(form, list(call)) == ("", [("f", ARGUMENTS)])
        if form.mark:
            assert read(form, [f"so \n{call}"]) == ("so", [("f", ARGUMENTS)])
    if form.more is not None:
        first, more = form.call("f", "{}"), form.call("f-2", ARGUMENTS)
        both = (
            first.removesuffix(form.closed) + form.more + more.removeprefix(form.mark + form.opened)
        )
        assert read(form, list(both)) == ("", [("f", "{}"), ("f-2", ARGUMENTS)])
    unknown = form.call("f-3", "{}")
    assert read(form, list(unknown)) == (unknown, [])


@pytest.mark.parametrize("form", tool_formats())
def test_a_name_is_told_when_it_is_certain(form: Any) -> None:
    """Neither before its arguments begin, nor later; then each sign of the arguments as it comes."""
    opening = form.pair[0] if form.pair else "{"
    calls, begin = Calls(Offer(form, [F, G])), form.mark + form.opened + form.head % "f"
    for char in begin + opening[:-1]:
        assert calls.feed(char) == ("", [])
    said, (begun, *first) = calls.feed(opening[-1])
    assert (said, begun.name, begun.arguments) == ("", "f", "")
    if not form.pair:
        assert [call.arguments for call in first] == ["{"]
        for char in ARGUMENTS[1:]:
            assert [call.arguments for call in calls.feed(char)[1]] == [char]


def test_a_call_that_breaks_keeps_what_was_written() -> None:
    broken = '<tool_call>\n{"name": "f", "arguments": {"a": 1</tool_call> on'
    assert read(TAGGED, [broken]) == ("</tool_call> on", [("f", '{"a": 1')])
    more = '<tool_call>\n{"name": "f", "arguments": {}, "x": 1}</tool_call>'
    assert read(TAGGED, [more]) == (', "x": 1}</tool_call>', [("f", "{}")])
    cut = FENCED.call("f", "{}")[:-9]
    assert read(FENCED, [cut]) == ("", [("f", "{}")])


def test_values_outside_of_json_are_what_their_schemas_say() -> None:
    kinds = {
        "s": {"type": "string"},
        "e": {"enum": ["1", 2]},
        "n": {"type": "integer"},
        "y": {"enum": 5},
    }
    f = Function(name="f", parameters={"type": "object", "properties": kinds})
    values = {"s": "1\n", "e": "1", "n": "12", "x": '[1,\n "二"]', "y": "a </b>", "z": "NaN"}
    pairs = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
    calls = Calls(Offer(CODER, [f]))
    text = f"<tool_call>\n<function=f>\n{pairs}</function>\n</tool_call>"
    news = [new for char in text for new in calls.feed(char)[1]]
    (call,) = joined([], news)
    wanted = {"s": "1\n", "e": "1", "n": 12, "x": [1, "二"], "y": "a </b>", "z": "NaN"}
    assert json.loads(call.arguments) == wanted and len(news) == 2 + len(values)


def test_arguments_outside_of_json_break_openly() -> None:
    begun = "<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n"
    assert read(GLM, [begun]) == ("", [("f", '{"a": 1')])
    cut = begun + "<arg_key>b</arg_key><arg_v"
    assert read(GLM, [cut]) == ("<arg_key>b</arg_key><arg_v", [("f", '{"a": 1')])
    assert read(GLM, [begun + "or so</tool_call>"]) == ("or so</tool_call>", [("f", '{"a": 1')])


PIECES = [
    "<tool_call>", "</tool_call>", '{"name": "f", "arguments": {"a": [1]}}', "<tool", "\n", " hi",
    '{"name": "f", "arguments": {"a": "</tool_call>\\\\", "b": "<tool_call>\\""}}', '{"',
    '{"name": "g", "arguments": {}}', '{"name": ["f"], "arguments": {}}', "{", "[[", '{"name": "f", "parameters": {}}',
    *(FENCED.call("f", "{}") + FENCED.call("f-2", '{"a": "b"}')).replace("｜><｜", "｜>\0<｜").split("\0"),
    CODER.call("f", '{"a": 1}')[:-12], "<parameter=b>", "</parameter>\n", "</function>", GLM.call("f", '{"a": "b"}'), "<arg_key>c",
    "</arg_key><arg_value>", "[TOOL_CALLS]", " [", 'f[ARGS]{"a": 1}', ', "id": "a', '1b"}', "]",
]  # fmt: skip


@given(st.sampled_from(tool_formats()), st.lists(st.sampled_from(PIECES), max_size=9), st.data())
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


def test_a_form_of_calls_is_one_file(tmp_path, monkeypatch):
    (tmp_path / "bracketed.py").write_text(example("chat/tool_formats/bracketed.py"))
    monkeypatch.setattr(
        tool_formats_package, "__path__", [*tool_formats_package.__path__, str(tmp_path)]
    )
    tool_formats.cache_clear()
    try:
        (new,) = (form for form in tool_formats() if form.mark == "[[call]]")
        worded, called = "in words", new.call("f", '{"x": "y"}')
        assert format_of(worded, called) is new
        calls = Calls(Offer(new, [F]))
        text, found = calls.feed('Gladly. [[call]] f {"a": 1} [[end]]', last=True)
        assert text == "Gladly." and joined([], found)[0][1:] == ("f", '{"a": 1}')
    finally:
        tool_formats.cache_clear()
        sys.modules.pop("shenhong.chat.tool_formats.bracketed", None)


def test_no_two_files_write_a_call_alike() -> None:
    """So the order of the files decides nothing: only formats of one file may differ in white space alone."""
    files: dict[str, set[str]] = {}
    for name in sorted(m.name for m in pkgutil.iter_modules(tool_formats_package.__path__)):
        module = importlib.import_module(f"{tool_formats_package.__name__}.{name}")
        for one in getattr(module, "FORMATS", ()):
            for tail in range(len(one.tails)):
                files.setdefault(squeezed(one.call("f", PROBE_TEXT, tail)), set()).add(name)
    assert files and all(len(names) == 1 for names in files.values())
