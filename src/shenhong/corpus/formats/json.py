"""JSON: a list of records, one record, a record that holds the list, or JSON lines under this name.

It is read a value at a time, so that a large file needs no memory; a record that holds a list is held whole.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from shenhong.corpus.formats.base import LONGEST, Row, Source
from shenhong.corpus.formats.jsonl import row_of

ENDINGS = (".json",)
UNIT = "record"
TABULAR = True
PACKABLE = True

_BETWEEN = re.compile(r"[\s,]*")
_BLOCK = 1 << 16


def rows(source: Source, wanted: tuple[str, ...]) -> Iterator[Row]:
    number = 0
    for value, written in _values(source.stream):
        for record in _listed(value, wanted[0]) if isinstance(value, dict) else [value]:
            number += 1
            if isinstance(record, ValueError):
                yield Row(number, {}, f"is not JSON ({record})")
            else:
                yield row_of(number, record, written)


def _listed(record: dict[str, Any], field: str) -> list[Any]:
    """The records of {"data": [{...}, ...]}, where it has no text of its own."""
    tables = [v for v in record.values() if isinstance(v, list) and v and isinstance(v[0], dict)]
    return tables[0] if field not in record and len(tables) == 1 else [record]


def _values(stream: BinaryIO) -> Iterator[tuple[Any, str]]:
    """The values of the outermost list, or those that follow one another, as they are written.

    An error stands for a line that is none.
    """
    decoder, parser = codecs.getincrementaldecoder("utf-8-sig")(), json.JSONDecoder()
    text, at, more = decoder.decode(stream.read(_BLOCK)), 0, True
    listed, by_line = text.lstrip().startswith("["), False
    if listed:
        at = text.index("[") + 1
    while True:
        at = _BETWEEN.match(text, at).end()  # type: ignore[union-attr]  # it matches nothing too
        if listed and text.startswith("]", at):
            return
        if at == len(text) and not more and not listed:
            return
        try:
            value, end = parser.raw_decode(text, at)
        except json.JSONDecodeError as error:
            line_end = text.find("\n", at)
            if by_line and line_end >= 0:
                yield error, ""
                at = line_end
            elif more and len(text) - at <= LONGEST:
                block = stream.read(max(_BLOCK, len(text) - at))
                more = bool(block)
                text, at = text[at:] + decoder.decode(block, final=not block), 0
            elif at == len(text):
                raise ValueError("its list does not end") from None
            else:
                raise
            continue
        by_line = not listed and "\n" not in text[at:end]
        yield value, text[at:end]
        at = end
