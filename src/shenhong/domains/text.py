"""Plain documents in any language: the domain of whoever brings their own text."""

from __future__ import annotations

import functools
import unicodedata
from collections import Counter

from pydantic import Field

from shenhong.domains.base import CorpusSettings, Domain, Kept, Record

_PROSE = ".,;:!?'\"()-"  # of the marks of ASCII; those beyond it all belong to some script


@functools.cache
def _is_symbol(character: str) -> bool:
    """Whether a character is no part of writing: of letters, the marks on them, digits, spaces, punctuation."""
    if character.isascii():
        return not (character.isalnum() or character.isspace() or character in _PROSE)
    kind = unicodedata.category(character)
    # Joiners (Cf) are spelt with in Persian and in Indic scripts.
    return kind[0] not in "LMNZP" and kind != "Cf"


class TextSettings(CorpusSettings):
    """What a document must be like to be learnt from."""

    min_characters: int = Field(40, ge=1, description="shorter documents are dropped")
    max_characters: int = Field(2_000_000, ge=1, description="longer documents are dropped")
    max_symbol_share: float = Field(
        0.4,
        ge=0,
        le=1,
        description="documents with a larger share of characters that are neither letters (with their marks), digits, "
        "spaces nor punctuation are dropped",
    )
    max_repeated_share: float = Field(
        0.5,
        ge=0,
        le=1,
        description="documents with a larger share of characters in repeated lines are dropped",
    )


class Text(Domain):
    name = "text"
    Settings = TextSettings
    divisible = True
    step = ("rules", "length, damage, symbols, repeated lines")

    def keep(self, record: Record, settings: TextSettings) -> Kept | str:
        return fault(record.text, settings) or Kept(record.text)


def fault(text: str, settings: TextSettings) -> str | None:
    """Why the document is dropped, or None. The text is normalised."""
    if not text:
        return "empty"
    if len(text) < settings.min_characters:
        return "shorter than min_characters"
    if len(text) > settings.max_characters:
        return "longer than max_characters"
    if "\ufffd" in text:
        return "damaged characters (U+FFFD)"
    symbols = sum(count for character, count in Counter(text).items() if _is_symbol(character))
    if symbols > settings.max_symbol_share * len(text):
        return "mostly symbols (max_symbol_share)"
    seen: set[str] = set()
    repeated = 0
    for line in text.splitlines():
        line = line.strip()
        if line in seen:
            repeated += len(line)
        seen.add(line)
    if repeated > settings.max_repeated_share * len(text):
        return "mostly repeated lines (max_repeated_share)"
    return None


DOMAIN = Text()
