"""An answer that is a regulated poem, as the page sets it: lines with tones and rhymes marked."""

from __future__ import annotations

from typing import Any

from shenhong.domains.verse.prosody import FORMS, UNKNOWN, analyse, form_of


def verse_part(text: str, asked: str) -> dict[str, Any] | None:
    """The verse part of an answer to `asked`, or None where the text has none of the known forms exactly."""
    poem = "".join(text.split())
    if form_of(poem) is None:
        return None
    verse = analyse(poem)
    group = verse.rhyme_group and verse.rhyme_group.name
    return {
        "type": "verse",
        "text": text.strip(),
        "form": verse.form,
        "title": _title(asked),
        "regulated": verse.regulated,
        "lines": [
            {
                "text": line,
                "stop": stop,
                "tones": tones.replace(UNKNOWN, "?"),
                "misses": list(misses),
                "rhyme": len(line) - 1 if rhymes else None,
                "group": group if rhymes else None,
            }
            for line, stop, tones, misses, rhymes in zip(
                verse.lines, verse.stops, verse.tones, verse.misses, verse.rhymes, strict=True
            )
        ],
    }


def _title(asked: str) -> str:
    """What was asked for, without the form before it."""
    words = asked.split()
    if words and words[0] in FORMS:
        words = words[1:]
    return " ".join(words)[:80]
