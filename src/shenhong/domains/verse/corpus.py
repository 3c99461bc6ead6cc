"""Everything the corpus knows of regulated verse: its four forms and its titles.

A poem of 5 or 7 characters a line and 4 or 8 lines is 五绝, 七绝, 五律 or 七律. A clean one is nothing but
ideographs, each line closed by one mark. The text is put on one line with one spelling of its marks: ，
after odd lines and 。 after even ones, except where the edition has ？ or ！.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from shenhong.domains.verse import prosody
from shenhong.domains.verse.prompts import Prompt
from shenhong.tokenizer.normalise import IDEOGRAPH

FORMS = {shape: form for form, shape in prosody.FORMS.items()}
"""(characters a line, lines) -> form."""

_SHAPES = {
    (characters + 1) * lines: (
        form,
        characters + 1,
        re.compile(f"(?:[{IDEOGRAPH}]{{{characters}}}[，。？！；：、]){{{lines}}}"),
    )
    for (characters, lines), form in FORMS.items()
}
_DAMAGE = re.compile(r"[□囗○〇▢●�\[\]{}()（）〔〕【】<>〈〉｛｝/A-Za-z0-9\ue000-\uf8ff⿰-⿻]")

# What editors add around a title: notes in brackets, 其一, 三首, and a number after a space.
_NOTE = re.compile(r"[（(\[{〖〔【][^）)\]}〗〕】]*(?:[）)\]}〗〕】]|$)")
# Each looks at a run of blanks or numerals once, from its first, for from the others it would find the same end.
_NUMERAL = "一二三四五六七八九十百千廿卅○〇零"
_ORDINAL = re.compile(rf"(?:(?<!\s)\s++|\b)(?:其?[{_NUMERAL}]++|又|并序|并引|并叙|有序)$")
# A count is not all there is of its line.
_FIRST = rf"(?:(?<=[^{_NUMERAL}\n])|(?<=\A[{_NUMERAL}])|(?<=\n[{_NUMERAL}]))"
_COUNT = re.compile(rf"{_FIRST}[{_NUMERAL}]++[首绝章篇咏韵]++$")
_JUNK = re.compile(rf"[^{IDEOGRAPH}A-Za-z0-9·\s]+")


class Poem(NamedTuple):
    """A poem of regulated shape: both texts are equally long and hold the same marks."""

    form: str
    text: str
    original: str


def shape(text: str, original: str) -> Poem | str:
    """The poem, or why it is none. `original` is the traditional text, aligned with `text`."""
    text = text.replace("\n", "")
    if not text:
        return "empty"
    found = _SHAPES.get(len(text))
    match = found and found[2].fullmatch(text)
    if not found or not match:
        return "damaged or annotated" if _DAMAGE.search(text) else "not of a regulated form"
    form, step, _ = found
    marks = [
        mark if mark in "？！" else "，。"[line % 2]
        for line, mark in enumerate(text[step - 1 :: step])
    ]
    original = original.replace("\n", "")
    if "〇" in text:  # a common sign for a lost character, although it is a character too
        return "damaged or annotated"
    return Poem(form, _closed(text, step, marks), _closed(original, step, marks))


def _closed(text: str, step: int, marks: list[str]) -> str:
    return "".join(text[i * step : (i + 1) * step - 1] + mark for i, mark in enumerate(marks))


def title(raw: str, longest: int) -> str:
    """What the poem is about: the simplified title without notes, ordinals and counts, cut to length.

    An over-long title (an occasion told in a sentence) is cut at its last space within the limit, or
    at the limit.
    """
    text = _JUNK.sub(" ", _NOTE.sub("", raw)).strip()
    for _ in range(3):  # 帝京篇十首 其一 -> 帝京篇十首 -> 帝京篇
        shorter = _COUNT.sub("", _ORDINAL.sub("", text)).strip()
        if shorter == text:
            break
        text = shorter or text
    text = re.sub(r"\s+", " ", text)
    if len(text) > longest:
        head = text[: longest + 1]
        text = head[: head.rindex(" ")] if " " in head.strip() else text[:longest]
    return text.strip()


def prompt(poem: Poem, title: str, with_form: bool, with_rhyme: bool) -> str:
    """What is asked for, as in "七绝 长城 押阳韵"; without a title the form is always named.

    Told now and then which characters end the lines, a model soon learns which ones rhyme, and then to look for
    those of its own lines.
    """
    form = poem.form if with_form or not title else None
    rhyme = prosody.rhyme_of(poem.original, "traditional") if with_rhyme else None
    return str(Prompt(form, title, rhyme))
