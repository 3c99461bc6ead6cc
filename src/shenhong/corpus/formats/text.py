"""Plain text: one file is cut into many documents, so that a book can be learnt from and held out from.

A document ends at the first blank line after 2,000 characters, else at the first line end after 8,000, else (a text
without line ends) at the last end of a sentence or space shortly before 16,000. Nothing is lost between two documents, and
memory holds one, whatever the length of the lines.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator

from shenhong.corpus.formats.base import Row, Source

ENDINGS = (".txt", ".text", ".md", ".markdown", ".rst")
UNIT = "line"
TABULAR = False
PACKABLE = True

_DOCUMENT, _LINES, _LONGEST = 2_000, 8_000, 16_000
_BLANK = re.compile(r"(?:\r\n?|\n)[^\S\r\n]*(?:\r\n?|\n)")
_LINE = re.compile(r"\r\n?|\n")
# Group 1: no end after all, taken whole so that it is not looked at again from its second sign on.
_SENTENCE = re.compile(r"[.!?…]++[\"'”’)]*+(?:\s+|())|[。！？]+[”’」』）]*|[।॥။።؟۔]+\s*")
_SPACE = re.compile(r"\s+")
_INVALID = re.compile("[\udc80-\udcff]")  # bytes that are not UTF-8, as they are decoded here


def rows(source: Source, wanted: tuple[str, ...]) -> Iterator[Row]:
    line, column = 1, 0  # of the document's first character
    for text in _documents(source):
        if bad := _INVALID.search(text):
            at = line + text.count("\n", 0, bad.start())
            yield Row(at, {}, f"byte 0x{ord(bad[0]) - 0xDC00:02x} is not UTF-8; convert the file")
        else:
            yield Row(f"{line}+{column}" if column else line, {wanted[0]: text})
        line += text.count("\n")
        end = text.rfind("\n")
        column = column + len(text) if end < 0 else len(text) - end - 1


def _documents(source: Source) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
    text, block = "", b" "
    while block:
        block = source.stream.read(1 << 16)
        text += decoder.decode(block, final=not block)
        if not block and not text.strip():
            return
        start = 0
        while len(text) - start > (_LONGEST if block else 0):
            end = _end(text, start)
            # What follows the last document is nothing but white space: it goes with it.
            end = len(text) if not block and not text[end:].strip() else end
            yield text[start:end]
            start = end
        text = text[start:]


def _end(text: str, start: int) -> int:
    """Where the document that begins at ``start`` ends."""
    longest = min(len(text), start + _LONGEST)
    for pattern, least in ((_BLANK, _DOCUMENT), (_LINE, _LINES)):
        for match in pattern.finditer(text, start, longest):
            if match.end() - start >= least:
                return match.end()
    if longest - start < _LONGEST:
        return longest
    for pattern in (_SENTENCE, _SPACE):
        found = pattern.finditer(text, longest - _DOCUMENT, longest)
        ends = [match.end() for match in found if match.lastindex is None]
        if ends:
            return ends[-1]
    return longest
