"""Thinking is cut out of an answer while it comes."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from shenhong.chat.thinking import Thinking


@given(
    st.lists(
        st.sampled_from(["<think>", "</think>", "a", "<", "<th", "ink>", "/", " b"]), max_size=12
    ),
    st.data(),
)
def test_thinking_is_cut_the_same_however_it_comes(pieces: list[str], data: st.DataObject) -> None:
    text = "".join(pieces)

    def cut(parts: list[str]) -> dict[str, str]:
        thinking, said = Thinking(True, False), {"text": "", "reasoning": ""}
        for number, part in enumerate(parts):
            for kind, words in thinking.feed(part, last=number == len(parts) - 1):
                said[kind] += words
        return said

    places = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=5)))
    bounds = [0, *places, len(text)]
    parts = [text[a:b] for a, b in itertools.pairwise(bounds)]
    whole = cut([text])
    assert cut(parts) == whole
    assert not any(
        tag in words for words in whole.values() for tag in ("<think>",) if tag not in text
    )
