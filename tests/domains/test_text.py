import pytest

from shenhong.domains.text import TextSettings, fault

SETTINGS = TextSettings(paths=["x"], min_characters=20, max_characters=500)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty"),
        ("too short", "shorter than min_characters"),
        ("long " * 200, "longer than max_characters"),
        ("a damaged \ufffd text of some length", "damaged characters (U+FFFD)"),
        ("=*=*=*=*=*=*=*=*=*= a *=*=*=*=", "mostly symbols"),
        ("the same line again\n" * 10, "mostly repeated lines"),
        ("An ordinary sentence, with marks; and more.", None),
        ("白日依山尽，黄河入海流。欲穷千里目，更上一层楼。", None),
    ],
)
def test_each_rule_names_its_reason(text, reason):
    assert fault(text, SETTINGS) == reason
