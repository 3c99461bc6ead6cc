"""The report's part for verse: poems set with their tones and rhymes, and the measures of verse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shenhong.evaluate.page import Block, Grid, Heading, Note, Table, escape, escape_markdown, share

_MEASURES = (
    ("form_exact", "exact form"),
    ("rhyme", "rhyme"),
    ("level_rhyme", "… of a level tone"),
    ("tone_score", "tone score per line"),
    ("regulated", "fully regulated"),
)
_CLASSES = {"平": "ping", "仄": "ze"}
LEGEND = (
    "Under (in Markdown: after) the characters stand their tones: 平 level, 仄 oblique, 中 either, ？ not in the rhyme table. A marked "
    "tone breaks the pattern of its line; red (in Markdown: bold) characters rhyme. Poems are the first ones asked for, in the "
    "order of the draw: nobody picked them."
)


@dataclass(frozen=True)
class Poem:
    """One answer: {"title", "form", "text", "verse": Verse.to_json(), "human"?: {...}}, leniently read."""

    sample: Mapping[str, Any]

    def html(self) -> str:
        sample = self.sample
        human = sample.get("human") or {}
        beside = ""
        if human.get("text"):
            author = human.get("author") or "the human poet"
            beside = (
                f"<details><summary>{escape(author)}, under this title</summary>"
                f"{_lines_html(human)}</details>"
            )
        return (
            f"<article class='card poem' lang=zh><h3>{escape(sample.get('title', ''))}</h3>"
            f"<div class=facts>{escape(sample.get('form', ''))}</div>"
            f"{_lines_html(sample)}{_tags_html(sample.get('verse') or {})}{beside}</article>"
        )

    def markdown(self) -> str:
        sample, verse = self.sample, self.sample.get("verse") or {}
        head = f"### {escape_markdown(sample.get('title', ''))} {escape_markdown(sample.get('form', ''))}"
        facts = " · ".join(words for words, _ in _tags(verse))
        body = "  \n".join(_lines_markdown(sample))
        return f"{head}\n\n{body}\n\n{escape_markdown(facts)}"


def blocks(evaluation: Mapping[str, Any]) -> list[Block]:
    """The sections of verse, from evaluation.json."""
    out: list[Block] = []
    samples = [s for s in evaluation.get("samples") or [] if isinstance(s, Mapping)]
    if samples:
        out += [Heading("Poems"), Note(LEGEND), Grid([Poem(sample) for sample in samples])]
    verse = evaluation.get("verse") or {}
    if verse:
        out += [Heading("Form, rhyme and tones"), _by_form(verse)]
        out.append(
            Note(
                "A poem out of form scores 0 in everything. Rhyme: all even lines end in one group of the 平水韵. "
                "Tone score: the share of lines whose positions 2, 4, 6 and end all fit the better of the two "
                "regulated patterns. Human: the held-out poems; shuffled: the same poems with their characters "
                "in random order. The same code reads all three, in simplified script. ± is one standard error."
            )
        )
    return out


def tiles(evaluation: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    verse = evaluation.get("verse") or {}
    model, human, shuffled = (
        (verse.get(who) or {}).get("all") or {} for who in ("model", "human", "shuffled")
    )
    return [
        (
            name,
            share(model.get(key), error=False),
            f"human {share(human.get(key), error=False)}, "
            f"shuffled {share(shuffled.get(key), error=False)}",
        )
        for key, name in _MEASURES
        if model.get(key) and key in ("form_exact", "rhyme", "tone_score")
    ]


def headline(evaluation: Mapping[str, Any]) -> list[list[str]]:
    """Rows (measure, model, human, shuffled) over all forms."""
    verse = evaluation.get("verse") or {}
    columns = [(verse.get(who) or {}).get("all") or {} for who in ("model", "human", "shuffled")]
    return [
        [name, *(share(column.get(key)) for column in columns)]
        for key, name in _MEASURES
        if any(column.get(key) for column in columns)
    ]


def _by_form(verse: Mapping[str, Any]) -> Table:
    rows = []
    forms = list(dict.fromkeys(form for who in verse.values() for form in who))
    for form in (*(f for f in forms if f != "all"), *(f for f in forms if f == "all")):
        for who in ("model", "human", "shuffled"):
            part = (verse.get(who) or {}).get(form)
            if part:
                cells = [share(part.get(key)) for key, _ in _MEASURES]
                rows.append([form, who, str(part.get("poems", "–")), *cells])
    return Table(["form", "text", "poems", *(name for _, name in _MEASURES)], rows, words=2)


def _tags(verse: Mapping[str, Any]) -> list[tuple[str, bool]]:
    if not verse.get("form_exact"):
        return [("not in form", False)]
    rhymed = f"rhyme {verse['rhyme_group']}" if verse.get("rhyme_group") else "rhyme"
    score = verse.get("tone_score", 0.0)
    tones = f"tones {100 * score:.0f} %" if isinstance(score, int | float) else "tones –"
    return [
        ("in form", True),
        (rhymed, True) if verse.get("rhyme") else ("no rhyme", False),
        (tones, bool(verse.get("regulated"))),
    ]


def _tags_html(verse: Mapping[str, Any]) -> str:
    return "".join(
        f"<span class='tag {'good' if good else 'bad'}'>{escape(words)}</span>"
        for words, good in _tags(verse)
    )


def _lines(sample: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    return (sample.get("verse") or {}).get("lines") or []


def _lines_html(sample: Mapping[str, Any]) -> str:
    """The poem as analysed; text that has no verse in it as it is."""
    out = ""
    for line in _lines(sample):
        text, tones = str(line.get("text", "")), str(line.get("tones", ""))
        for i, character in enumerate(text):
            tone = tones[i] if i < len(tones) else "？"
            kinds = [_CLASSES.get(tone, "either")]
            if i in (line.get("misses") or ()):
                kinds.append("miss")
            if line.get("rhymes") and i == len(text) - 1:
                kinds.append("rhyme")
            out += (
                f"<ruby class='{' '.join(kinds)}'>{escape(character)}<rt>{escape(tone)}</rt></ruby>"
            )
        out += f"{escape(line.get('stop', ''))}\n"
        out += "</div><div>"
    if not out:
        return f"<div class=lines><div>{escape(sample.get('text', ''))}</div></div>"
    return f"<div class=lines><div>{out.removesuffix('</div><div>')}</div></div>"


def _lines_markdown(sample: Mapping[str, Any]) -> list[str]:
    out = []
    for line in _lines(sample):
        text, tones = str(line.get("text", "")), str(line.get("tones", ""))
        if line.get("rhymes") and text:
            shown = f"{escape_markdown(text[:-1])}**{escape_markdown(text[-1])}**"
        else:
            shown = escape_markdown(text)
        misses = line.get("misses") or ()
        marks = "".join(
            f"**{escape_markdown(tone)}**" if i in misses else escape_markdown(tone)
            for i, tone in enumerate(tones)
        )
        out.append(f"{shown}{escape_markdown(line.get('stop', ''))} {marks}")
    return out or [escape_markdown(sample.get("text", ""))]
