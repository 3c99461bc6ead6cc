"""An answer that is a regulated poem, as the page sets it: lines with tones and rhymes marked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, FailFast, Field

from shenhong.domains.verse.prosody import UNKNOWN, analyse, form_of

_TITLE = 80  # characters of it that are shown

Place = Annotated[int, Field(strict=True, ge=0, le=1000)]


class VerseLine(BaseModel):
    model_config = ConfigDict(extra="forbid")

    text: str
    tones: str
    rhyme: Place | None
    group: str | None
    misses: Annotated[list[Place], FailFast()] = []
    stop: str = ""


class VersePart(BaseModel):
    """As a chat keeps it, so that an imported one is known to be drawable."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["verse"]
    text: str = ""
    form: str
    title: str
    regulated: bool = False
    lines: Annotated[list[VerseLine], Field(min_length=1, max_length=100), FailFast()]


def verse_part(text: str, title: str) -> dict[str, Any] | None:
    """The verse part of an answer under this title, or None where the text has none of the known forms exactly."""
    poem = "".join(text.split())
    if form_of(poem) is None:
        return None
    verse = analyse(poem)
    group = verse.rhyme_group and verse.rhyme_group.name
    return {
        "type": "verse",
        "text": text.strip(),
        "form": verse.form,
        "title": title[:_TITLE],
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


def text_of(part: Mapping[str, Any]) -> str:
    """The poem on one line; older chats keep it in the lines alone."""
    lines = part.get("lines") or []
    return "".join(f"{line.get('text', '')}{line.get('stop', '')}" for line in lines)
