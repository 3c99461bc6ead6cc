"""The rules of regulated verse (近體詩) as measures: form, rhyme, tones.

A regulated poem has four (绝) or eight (律) lines of five or seven characters. Every character is
level (平) or oblique (仄: 上, 去 or 入); characters with readings of both kinds fit either. With
lines counted from 1 and `s` the tone of the second character of line 1:

    inside a line   positions 2, 4 (and 6) alternate: t, not t, t           (二四六分明)
    in a couplet    lines 2k-1 and 2k have opposite t                       (对)
    between two     lines 2k and 2k+1 have the same t                       (粘)
    line ends       even lines end level; odd lines end oblique, line 1 ends as it likes
    rhyme           even lines end in one group of the 平水韵; line 1 may join them

So `s` fixes the whole pattern, and there are two patterns. A line *fits* when all its checked
positions (2, 4, 6 and the end) do; the tone score of a line is 1 or 0, the tone score of a poem the
share of its lines that fit, under whichever of the two patterns fits more lines; a poem is
*regulated* when all do. A character that the table does not know fits any tone but rhymes with
nothing. A poem not exactly in its form neither rhymes nor fits.

The table (pingshui.json) is traditional. Simplified text is read with the union of the readings of
all traditional characters that simplify to the same character: 征 is 征 and 徵.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from typing import Literal, NamedTuple

Script = Literal["simplified", "traditional"]

FORMS: dict[str, tuple[int, int]] = {  # name: (characters a line, lines)
    "五绝": (5, 4),
    "七绝": (7, 4),
    "五律": (5, 8),
    "七律": (7, 8),
}

LEVEL, OBLIQUE, EITHER, UNKNOWN = "平", "仄", "中", "？"

# Unified ideographs (with extensions A to H), compatibility ideographs and 〇; not the gap sign □.
HAN = "\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
_LINE = re.compile(f"([{HAN}]+)([^{HAN}]*)")
_ODD_STOPS, _EVEN_STOPS, _LAST_STOPS = "，；？！", "。；？！", "。？！"


class RhymeGroup(NamedTuple):
    name: str  # 一东 …
    tone: str  # 平 上 去 入


class Pingshui:
    """The 平水韵: groups of characters that rhyme, each group of one tone.

    table: {"groups": [{"name", "tone", "chars"}], "variants": {variant: character of the table}}.
    """

    def __init__(self, table: dict) -> None:
        import opencc  # its dictionaries take a moment

        self.groups = [RhymeGroup(g["name"], g["tone"]) for g in table["groups"]]
        readings: dict[str, frozenset[int]] = {}
        for number, group in enumerate(table["groups"]):
            for character in group["chars"]:
                readings[character] = readings.get(character, frozenset()) | {number}
        for variant, character in table.get("variants", {}).items():
            if character in readings:
                readings[variant] = readings.get(variant, frozenset()) | readings[character]
        self._traditional = readings

        characters = list(readings)
        # One a line, so that no phrase rule of the converter sees two of them together.
        simplified = opencc.OpenCC("t2s").convert("\n".join(characters)).split("\n")
        union: dict[str, frozenset[int]] = dict(readings)
        for character, simple in zip(characters, simplified, strict=True):
            union[simple] = union.get(simple, frozenset()) | readings[character]
        self._simplified = union

    def readings(self, character: str, script: Script = "simplified") -> frozenset[int]:
        """Numbers of the rhyme groups of a character; empty when it is not known.

        Traditional text falls back to the union too: printed texts mix in simplified forms.
        """
        if script == "traditional" and character in self._traditional:
            return self._traditional[character]
        return self._simplified.get(character, frozenset())

    def tone(self, character: str, script: Script = "simplified") -> str:
        """平 level, 仄 oblique, 中 either, ？ not in the table."""
        level = {self.groups[n].tone == "平" for n in self.readings(character, script)}
        if not level:
            return UNKNOWN
        return EITHER if len(level) == 2 else LEVEL if True in level else OBLIQUE


@functools.cache
def pingshui() -> Pingshui:
    """The table that travels with the package."""
    text = resources.files(__package__).joinpath("pingshui.json").read_text(encoding="utf-8")
    return Pingshui(json.loads(text))


@dataclass(frozen=True)
class Verse:
    """What `analyse` found; all per-line fields are as long as `lines`.

    form          the form that was asked for, or None
    form_exact    right number of lines and characters, right punctuation, nothing else
    lines         the runs of Chinese characters in the text, in order
    stops         the punctuation after each line
    tones         one mark per character and line: 平 仄 中 ？
    misses        positions (0-based) of each line that break the pattern
    line_scores   1.0 where all checked positions of the line fit, else 0.0
    rhymes        whether the line takes part in the rhyme
    rhyme_ok      all even lines end in one rhyme group, of any tone
    rhyme_group   that group, a level one where there is a choice; else None
    tone_score    mean of line_scores (0.0 when the form is not exact)
    regulated     all lines fit
    """

    form: str | None
    form_exact: bool
    lines: tuple[str, ...]
    stops: tuple[str, ...]
    tones: tuple[str, ...]
    misses: tuple[tuple[int, ...], ...]
    line_scores: tuple[float, ...]
    rhymes: tuple[bool, ...]
    rhyme_ok: bool
    rhyme_group: RhymeGroup | None
    tone_score: float
    regulated: bool

    @property
    def level_rhyme(self) -> bool:
        return self.rhyme_group is not None and self.rhyme_group.tone == "平"

    def to_json(self) -> dict:
        """What the report needs to set the poem."""
        return {
            "form_exact": self.form_exact,
            "rhyme": self.rhyme_ok,
            "rhyme_group": self.rhyme_group and f"{self.rhyme_group.tone}·{self.rhyme_group.name}",
            "tone_score": self.tone_score,
            "regulated": self.regulated,
            "lines": [
                {"text": text, "stop": stop, "tones": tones, "misses": list(misses), "rhymes": end}
                for text, stop, tones, misses, end in zip(
                    self.lines, self.stops, self.tones, self.misses, self.rhymes, strict=True
                )
            ],
        }


def split_lines(text: str) -> tuple[tuple[str, ...], tuple[str, ...], bool]:
    """Lines, the punctuation after each, and whether nothing stands before the first line."""
    found = _LINE.findall(text)
    return (
        tuple(line for line, _ in found),
        tuple(stop for _, stop in found),
        bool(found) and text.startswith(found[0][0]),
    )


def form_of(text: str) -> str | None:
    """The form that the text has exactly, or None."""
    lines, stops, clean = split_lines(text)
    if not clean:
        return None
    shape = (len(lines[0]), len(lines))
    form = next((name for name, s in FORMS.items() if s == shape), None)
    if form is None or any(len(line) != shape[0] for line in lines):
        return None
    for number, stop in enumerate(stops, 1):
        allowed = _LAST_STOPS if number == shape[1] else (_ODD_STOPS, _EVEN_STOPS)[number % 2 == 0]
        if len(stop) != 1 or stop not in allowed:
            return None
    return form


def rhyme_of(text: str, script: Script = "simplified") -> str | None:
    """The group, as in 七阳, that all even lines of a poem end in; a level one where there is a choice."""
    table = pingshui()
    found = _best(
        _shared_groups((line[-1] for line in split_lines(text)[0][1::2]), table, script), table
    )
    return None if found is None else table.groups[found].name


def analyse(
    text: str,
    form: str | None = None,
    script: Script = "simplified",
    table: Pingshui | None = None,
) -> Verse:
    """Measures one poem against a form (None: against whichever form it has).

    text: the poem on one line, as in "白日依山尽，黄河入海流。欲穷千里目，更上一层楼。"
    """
    table = table or pingshui()
    lines, stops, _ = split_lines(text)
    found = form_of(text)
    exact = found is not None and form in (None, found)
    tones = tuple("".join(table.tone(c, script) for c in line) for line in lines)
    if not exact:
        none: tuple[int, ...] = ()
        return Verse(
            form, False, lines, stops, tones, (none,) * len(lines), (0.0,) * len(lines),
            (False,) * len(lines), False, None, 0.0, False,
        )  # fmt: skip
    misses = _misses(tones)
    scores = tuple(0.0 if miss else 1.0 for miss in misses)
    shared = _shared_groups((line[-1] for line in lines[1::2]), table, script)
    best = _best(shared, table)
    first = bool(shared & table.readings(lines[0][-1], script))
    return Verse(
        form=found,
        form_exact=True,
        lines=lines,
        stops=stops,
        tones=tones,
        misses=misses,
        line_scores=scores,
        rhymes=tuple(
            bool(shared) and (n % 2 == 1 or (n == 0 and first)) for n in range(len(lines))
        ),
        rhyme_ok=bool(shared),
        rhyme_group=None if best is None else table.groups[best],
        tone_score=sum(scores) / len(scores),
        regulated=all(scores),
    )


def _shared_groups(ends: Iterable[str], table: Pingshui, script: Script) -> frozenset[int]:
    """The rhyme groups that all the line ends have."""
    return frozenset.intersection(*(table.readings(end, script) for end in ends))


def _best(shared: frozenset[int], table: Pingshui) -> int | None:
    return min(shared, key=lambda n: (table.groups[n].tone != LEVEL, n)) if shared else None


def _misses(tones: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
    """Positions that break the pattern, under the better of the two patterns."""
    candidates = [
        tuple(
            tuple(
                position
                for position, wanted in _pattern(number, len(line), start)
                if line[position] not in (wanted, EITHER, UNKNOWN)
            )
            for number, line in enumerate(tones)
        )
        for start in (LEVEL, OBLIQUE)
    ]
    # Most lines that fit; then fewest broken positions; then the level start.
    return min(candidates, key=lambda misses: (sum(map(bool, misses)), sum(map(len, misses))))


@functools.cache
def _pattern(number: int, length: int, start: str) -> tuple[tuple[int, str], ...]:
    """(position, tone) of each checked position of line `number` (0-based), see the page above."""
    other = {LEVEL: OBLIQUE, OBLIQUE: LEVEL}
    tone = other[start] if (number + 1) // 2 % 2 else start
    wanted = []
    for position in range(1, length - 1, 2):
        wanted.append((position, tone))
        tone = other[tone]
    if number % 2 == 1:
        wanted.append((length - 1, LEVEL))
    elif number > 0:
        wanted.append((length - 1, OBLIQUE))
    return tuple(wanted)
