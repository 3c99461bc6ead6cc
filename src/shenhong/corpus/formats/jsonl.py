"""JSON lines: one record a line."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from shenhong.corpus.formats.base import LONGEST, Row, Source

ENDINGS = (".jsonl", ".ndjson")
UNIT = "line"
TABULAR = True
PACKABLE = True

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # most are halves of whole pairs


def rows(source: Source, wanted: tuple[str, ...]) -> Iterator[Row]:
    for number, line in enumerate(_lines(source.stream), 1):
        if line.strip():
            yield _record(number, line)


def _lines(stream: BinaryIO) -> Iterator[bytes]:
    """The lines; of one that is too long for memory, its beginning."""
    first = True
    while line := stream.readline(LONGEST + 1):
        rest = line
        while len(rest) > LONGEST and not rest.endswith(b"\n"):
            rest = stream.readline(LONGEST + 1)
        yield line.removeprefix(codecs.BOM_UTF8) if first else line
        first = False


def _record(number: int, line: bytes) -> Row:
    if len(line) > LONGEST:
        return Row(number, {}, f"is longer than {LONGEST >> 20} MB")
    try:
        text = line.decode("utf-8")
        record = json.loads(text)
    except UnicodeDecodeError as error:
        return Row(number, {}, f"byte {error.start + 1} is not UTF-8; convert the file")
    except json.JSONDecodeError as error:
        return Row(number, {}, f"is not JSON ({error.msg})")
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, 1,000 brackets
        return Row(number, {}, f"is not JSON ({error})")
    return row_of(number, record, text)


def row_of(number: int, value: Any, source: str) -> Row:
    """The row of a JSON value that was written as ``source``."""
    if not isinstance(value, dict):
        return Row(number, {}, "is JSON, but no record with fields")
    if _SURROGATE.search(source):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            return Row(number, {}, "half of a surrogate pair is not text")
    return Row(number, value)
