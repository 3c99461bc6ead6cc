"""Rules that a document must pass (kind "text"); a rule names its reason for dropping."""

from __future__ import annotations

import re

from shenhong.corpus.settings import CorpusSettings

# Letters of every script, digits and spaces; and the marks Chinese and English prose is full of.
_SYMBOL = re.compile(r"[^\w\s.,;:!?'\"()\-，。！？；：、“”‘’（）《》…—]|_")


def fault(text: str, settings: CorpusSettings) -> str | None:
    """Why the document is dropped, or None. The text is normalised."""
    if not text:
        return "empty"
    if len(text) < settings.min_characters:
        return "shorter than min_characters"
    if len(text) > settings.max_characters:
        return "longer than max_characters"
    if "\ufffd" in text:
        return "damaged characters (U+FFFD)"
    if len(_SYMBOL.findall(text)) > settings.max_symbol_share * len(text):
        return "mostly symbols"
    seen: set[str] = set()
    repeated = 0
    for line in text.splitlines():
        line = line.strip()
        if line in seen:
            repeated += len(line)
        seen.add(line)
    if repeated > settings.max_repeated_share * len(text):
        return "mostly repeated lines"
    return None
