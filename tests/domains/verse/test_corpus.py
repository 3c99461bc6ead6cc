import pytest
from hypothesis import given
from hypothesis import strategies as st

from shenhong.domains.verse import corpus as verse
from tests.growth import LINEAR, growth

ideographs = st.characters(min_codepoint=0x4E00, max_codepoint=0x9FA5)


@given(st.data(), st.sampled_from(list(verse.FORMS)))
def test_every_clean_poem_has_its_form(data, shape):
    characters, lines = shape
    line = st.text(ideographs, min_size=characters, max_size=characters)
    parts = [data.draw(line) + data.draw(st.sampled_from("，。？！；")) for _ in range(lines)]
    raw = "\n".join(a + b for a, b in zip(parts[::2], parts[1::2], strict=True))
    poem = verse.shape(raw, raw)
    assert isinstance(poem, verse.Poem) and poem.form == verse.FORMS[shape]
    assert len(poem.text) == (characters + 1) * lines and poem.original == poem.text
    for number, part in enumerate(parts):
        at = number * (characters + 1)
        assert poem.text[at : at + characters] == part[:-1]
        mark = poem.text[at + characters]
        assert mark == (part[-1] if part[-1] in "？！" else "，。"[number % 2])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty"),
        ("白日依山尽，黄河入海流。", "not of a regulated form"),
        ("白日依山尽，黄河入海流。欲穷千里目，更上一□楼。", "damaged or annotated"),
        ("白日依山尽，黄河入海流。欲穷千里目，更上一〇楼。", "damaged or annotated"),
        ("白日依山尽，黄河入海流。欲穷千里目，更上[一]层楼。", "damaged or annotated"),
        ("白日依山，尽黄河入海流。欲穷千里目，更上一层楼。", "not of a regulated form"),
    ],
)
def test_other_texts_say_why_not(text, reason):
    assert verse.shape(text, text) == reason


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("长城", "长城"),
        ("帝京篇十首 一", "帝京篇"),
        ("寄徐秋涧  其二", "寄徐秋涧"),
        ("杂感六首  其三", "杂感"),
        ("九日", "九日"),
        ("七夕", "七夕"),
        ("一百五日", "一百五日"),
        ("题壁（一作题寺）", "题壁"),
        ("《落花》", "落花"),
        ("□□", ""),
        ("游庐山山阳七咏 三峡石桥", "游庐山山阳七咏 三峡石桥"),
        ("某辛巳秋归自武林省先陇遂修亭宇浚溪流因思先人旧诗", "某辛巳秋归自武林省先陇遂修亭宇浚"),
        ("端午内中帖子词 太上皇后阁今日得晴风甚急", "端午内中帖子词"),
    ],
)
def test_titles(raw, clean):
    assert verse.title(raw, 16) == clean


@given(st.text(max_size=60))
def test_titles_are_short_and_stable(raw):
    clean = verse.title(raw, 16)
    assert len(clean) <= 16 and clean == clean.strip() and "\n" not in clean


POEM = verse.Poem(
    "五绝",
    "白日依山尽，黄河入海流。欲穷千里目，更上一层楼。",
    "白日依山盡，黃河入海流。欲窮千里目，更上一層樓。",
)


@pytest.mark.parametrize(
    ("title", "form", "rhyme", "prompt"),
    [
        ("登鹳雀楼", True, False, "五绝 登鹳雀楼"),
        ("登鹳雀楼", False, False, "登鹳雀楼"),
        ("", False, False, "五绝"),
        ("登鹳雀楼", True, True, "五绝 登鹳雀楼 押尤韵"),
        ("登鹳雀楼", False, True, "登鹳雀楼 押尤韵"),
    ],
)
def test_prompts(title, form, rhyme, prompt):
    assert verse.prompt(POEM, title, form, rhyme) == prompt


def test_a_poem_that_does_not_rhyme_is_asked_for_without():
    blank = POEM._replace(original=POEM.original.replace("樓", "山"))
    assert verse.prompt(blank, "登鹳雀楼", True, True) == "五绝 登鹳雀楼"


@pytest.mark.parametrize("piece", [" ", "一", "首", "一 ", "其", "（"])
def test_hostile_titles_take_time_as_their_length(piece):
    assert growth(lambda raw: verse.title(raw, 20), lambda n: "a" + piece * n + "b", 1500) < LINEAR
