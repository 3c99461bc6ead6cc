"""A poem as the page sets it."""

from __future__ import annotations

from shenhong.domains.verse.page import text_of, verse_part


def test_verse_is_set_with_tones_and_rhymes() -> None:
    poem = "白日依山尽，黄河入海流。\n欲穷千里目，更上一层楼。"
    part = verse_part(poem, "登鹳雀楼")
    assert part is not None and (part["form"], part["title"]) == ("五绝", "登鹳雀楼")
    assert [line["text"] for line in part["lines"]] == [
        "白日依山尽",
        "黄河入海流",
        "欲穷千里目",
        "更上一层楼",
    ]
    assert [line["rhyme"] for line in part["lines"]] == [None, 4, None, 4]
    assert part["lines"][1]["group"] == part["lines"][3]["group"] == "十一尤"
    assert part["lines"][0]["tones"] == "仄仄平平仄" and all(
        len(x["tones"]) == 5 for x in part["lines"]
    )
    assert verse_part("长城 is long", "x") is None and verse_part("", "x") is None


def test_older_chats_keep_the_poem_in_its_lines_alone() -> None:
    lines = [{"text": "白日依山尽", "stop": "，"}, {"text": "黄河入海流"}]
    assert text_of({"type": "verse", "lines": lines}) == "白日依山尽，黄河入海流"
