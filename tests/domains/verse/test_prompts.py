"""One writer of how a poem is asked for, and one parser that reads back what it wrote."""

from __future__ import annotations

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shenhong.domains.verse import DOMAIN
from shenhong.domains.verse.prompts import Prompt, compose, parse
from shenhong.domains.verse.prosody import FORMS, pingshui
from shenhong.errors import RequestError
from tests.conftest import Tiny

RHYMES = sorted({group.name[-1] for group in pingshui().groups})
forms = st.none() | st.sampled_from(list(FORMS))
rhymes = st.none() | st.sampled_from(RHYMES)


@given(
    forms, st.text(st.characters(min_codepoint=0x4E00, max_codepoint=0x9FA5), min_size=1), rhymes
)
def test_what_is_written_is_read_back(form, title, rhyme):
    if title[:2] not in FORMS:
        assert parse(str(Prompt(form, title, rhyme))) == Prompt(form, title, rhyme)


def test_every_prompt_of_the_corpus_is_read_back(tiny: Tiny):
    rows = pq.read_table(tiny.run / "corpus" / "train.parquet").to_pylist()
    asked = [parse(row["prompt"]) for row in rows]
    assert [p.title for p in asked] == [row["title"] for row in rows]
    assert [str(p) for p in asked] == [row["prompt"] for row in rows]
    assert {p.form for p in asked} > {None} and any(p.rhyme for p in asked)
    assert all(p.form in (None, row["form"]) for p, row in zip(asked, rows, strict=True))


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("五绝 登鹳雀楼 押尤韵", ("五绝", "登鹳雀楼", "尤")),
        ("五绝登鹳雀楼", ("五绝", "登鹳雀楼", None)),
        ("五绝", ("五绝", "", None)),
        ("游庐山 三峡石桥", (None, "游庐山 三峡石桥", None)),
        ("押尤韵", (None, "", "尤")),
        ("", (None, "", None)),
    ],
)
def test_what_people_type(text, parts):
    assert parse(text) == Prompt(*parts)


def test_the_page_titles_an_answer_without_form_and_rhyme():
    poem = "白日依山尽，黄河入海流。欲穷千里目，更上一层楼。"
    part = DOMAIN.part(poem, "五绝 登鹳雀楼 押尤韵")
    assert part is not None and part["title"] == "登鹳雀楼"
    assert DOMAIN.Part is not None and DOMAIN.Part.model_validate(part)
    assert DOMAIN.part_text(part) == poem
    assert DOMAIN.part("no poem at all", "五绝 登鹳雀楼") is None


@pytest.mark.parametrize(
    ("form", "rhyme", "asked"),
    [
        (None, None, "长城"),
        ("五绝", None, "五绝 长城"),
        (None, "阳", "长城 押阳韵"),
        ("七律", "七阳", "七律 长城 押阳韵"),
    ],
)
def test_the_poet_is_asked_as_it_was_taught(form: str, rhyme: str, asked: str) -> None:
    assert compose("长城", form, rhyme) == asked


def test_what_the_words_say_already_stays():
    assert compose("七绝 长城", "五绝", None) == "七绝 长城"
    assert compose("长城 押阳韵", "五绝", "尤") == "五绝 长城 押阳韵"


@pytest.mark.parametrize("rhyme", ["阴", "", "七", "七阳阳"])
def test_no_such_rhyme(rhyme: str) -> None:
    with pytest.raises(RequestError, match=f"--rhyme {rhyme}: no rhyme .* the level ones are 东冬"):
        compose("长城", None, rhyme)


def test_the_reward_is_for_the_outcome_alone():
    poem = "白日依山尽，黄河入海流。欲穷千里目，更上一层楼。"
    assert DOMAIN.reward("五绝 登鹳雀楼", poem) == 1.0
    assert DOMAIN.reward("五绝 登鹳雀楼 押尤韵", poem) == 1.0
    assert DOMAIN.reward("五绝 登鹳雀楼 押阳韵", poem) == pytest.approx(2 / 3)
    assert DOMAIN.reward("七绝 登鹳雀楼", poem) == 0.0
    assert DOMAIN.reward("五绝", poem.replace("流", "山")) < 1.0
