"""What a kind of file offers, and what its reader is given and gives.

A reader turns an open file into rows and repairs nothing: a row that cannot be read carries its fault, and a file that
is damaged as a whole raises. What of a row is the text, and how many faults are too many, corpus/read.py decides.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

LONGEST = 64 << 20
"""Bytes of one line or one JSON value; a longer one is a fault, for it would have to be held in memory."""


class Row(NamedTuple):
    """One record of a file."""

    place: int | str  # in the file, counted from 1
    fields: dict[str, Any]
    fault: str = ""  # why it cannot be read; then it has no fields


class Source:
    """An open file, unpacked, that knows how far it was read."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._file, self._size = file, max(path.stat().st_size, 1)
        self._share: float | None = None
        unpack = PACKED.get(path.suffix.lower())
        self.stream: BinaryIO = unpack(file) if unpack else file

    @property
    def share(self) -> float:
        """How much of it was read, from 0 to 1: of its bytes, unless the reader says better."""
        return self._file.tell() / self._size if self._share is None else self._share

    @share.setter
    def share(self, share: float) -> None:
        self._share = share


class Format(Protocol):
    """A module of this folder."""

    ENDINGS: tuple[str, ...]  # of the names of such files, in lower case
    UNIT: str  # what a place is: a line, a row
    TABULAR: bool  # fields of records, so that a README beside such a file is about the corpus, not of it
    PACKABLE: bool  # read from front to end, so that it can be unpacked on the way

    def rows(self, source: Source, wanted: tuple[str, ...]) -> Iterator[Row]:
        """The file's records with at least the ``wanted`` fields; all fields where the first of them is not there."""
        ...


def _unpack_zstd(file: BinaryIO) -> io.BufferedReader:
    import pyarrow as pa

    return io.BufferedReader(pa.CompressedInputStream(file, "zstd"))


PACKED: dict[str, Callable[[BinaryIO], Any]] = {
    ".gz": lambda file: gzip.GzipFile(fileobj=file),
    ".zst": _unpack_zstd,
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
}
