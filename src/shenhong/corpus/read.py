"""Reads corpora as a stream of batches: parquet, JSON lines and plain text.

Nothing is repaired or skipped here: a file that is missing, empty, damaged or not UTF-8, and a record
without text, raise DataError that names the file and the line (parquet: the row; text: the byte too).
Memory holds one batch, whatever the size of the files.
"""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Iterator
from pathlib import Path

from shenhong.corpus.settings import CorpusSettings
from shenhong.errors import DataError

Columns = dict[str, list[str]]
"""A batch: equally long lists of strings under the names id, text and those asked for as extra."""

BATCH, _CHARACTERS = 8192, 4_000_000  # a batch holds at most so many records and so many characters
_KINDS = {
    ".parquet": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
}
# A plain text file is cut at blank lines into documents of at least this many characters, and at any
# line end from four times as many, so that a book becomes many documents and can be split.
_DOCUMENT = 2_000


def find(settings: CorpusSettings, base: Path) -> list[Path]:
    """The files that the recipe's paths name, each once, sorted. Errors: DataError."""
    found: set[Path] = set()
    for pattern in settings.paths:
        path = Path(pattern) if Path(pattern).is_absolute() else base / pattern
        if path.is_dir():
            here = [p for p in path.rglob("*") if p.suffix.lower() in _KINDS and p.is_file()]
        elif path.is_file():
            here = [path]
        else:
            relative = path.relative_to(path.anchor) if path.is_absolute() else path
            root = Path(path.anchor) if path.is_absolute() else Path()
            wild = any(c in pattern for c in "*?[")
            here = [p for p in root.glob(str(relative)) if p.is_file()] if wild else []
        if not here:
            raise DataError(f"no corpus file at {path}; correct corpus.paths in the recipe")
        found.update(p.resolve() for p in here)
    for path in found:
        if path.suffix.lower() not in _KINDS:
            raise DataError(f"cannot read {path}: use one of {', '.join(_KINDS)}")
        if not os.access(path, os.R_OK):
            raise DataError(f"may not read {path}; change its permissions (chmod +r)")
        if path.stat().st_size == 0:
            raise DataError(f"{path} is empty; remove it from corpus.paths or fetch it again")
    return sorted(found)


def read(settings: CorpusSettings, base: Path, extra: tuple[str, ...] = ()) -> Iterator[Columns]:
    """Batches of the records of all files. `extra` fields default to "". Errors: DataError."""
    for path in find(settings, base):
        kind = _KINDS[path.suffix.lower()]
        if kind == "parquet":
            yield from _parquet(path, settings, extra)
            continue
        rows = _jsonl(path, settings, extra) if kind == "jsonl" else _text(path, extra)
        names = ("id", "text", *extra)
        batch: Columns = {name: [] for name in names}
        some, size = False, 0
        for row in rows:
            some = True
            for name, value in zip(names, row, strict=True):
                batch[name].append(value)
            size += len(row[1])
            if len(batch["id"]) == BATCH or size > _CHARACTERS:
                yield batch
                batch, size = {name: [] for name in names}, 0
        if not some:
            raise DataError(f"{path} holds no text; remove it from corpus.paths or fetch it again")
        if batch["id"]:
            yield batch


def _parquet(path: Path, settings: CorpusSettings, extra: tuple[str, ...]) -> Iterator[Columns]:
    from shenhong.corpus.frames import daft  # half a second: only where it is used

    try:
        frame = daft.read_parquet(str(path))
        present = set(frame.column_names)
        if settings.field not in present:
            raise DataError(
                f"{path} has no field {settings.field!r} (it has {', '.join(sorted(present))}); "
                "set corpus.text_field"
            )
        wanted = [
            c for c in dict.fromkeys((settings.id_field, settings.field, *extra)) if c in present
        ]
        start = 0
        for arrow in frame.select(*wanted).to_arrow_iter():
            for offset in range(0, arrow.num_rows, BATCH):
                part = arrow.slice(offset, BATCH)
                columns = {name: part.column(name).to_pylist() for name in wanted}
                yield from _cut(_checked(path, columns, start, settings, extra))
                start += part.num_rows
    except DataError:
        raise
    except Exception as error:  # Daft's errors share no base class of their own
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(f"{path} is damaged ({reason[:160]}); fetch or build it again") from error
    if not start:
        raise DataError(f"{path} holds no records; remove it from corpus.paths or build it again")


def _checked(
    path: Path,
    columns: dict[str, list],
    start: int,
    settings: CorpusSettings,
    extra: tuple[str, ...],
) -> Columns:
    """A parquet batch whose text and id were found to be strings."""
    text = columns[settings.field]
    for row, value in enumerate(text):
        if not isinstance(value, str):
            raise DataError(
                f"{path}, row {start + row + 1}: field {settings.field!r} holds no text; "
                "mend the record or remove it"
            )
    rows = range(start + 1, start + 1 + len(text))
    names = columns.get(settings.id_field) or [None] * len(text)
    batch = {
        "id": [
            f"{path.name}:{row}" if name is None else str(name)
            for row, name in zip(rows, names, strict=True)
        ],
        "text": text,
    }
    for field in extra:
        batch[field] = [
            str(v) if v is not None else "" for v in columns.get(field, [None] * len(text))
        ]
    return batch


def _cut(batch: Columns) -> Iterator[Columns]:
    """The batch in parts of at most so many characters (a longer record is a part of its own)."""
    start = size = 0
    for row, text in enumerate(batch["text"]):
        if size and size + len(text) > _CHARACTERS:
            yield {name: column[start:row] for name, column in batch.items()}
            start, size = row, 0
        size += len(text)
    yield {name: column[start:] for name, column in batch.items()}


def _jsonl(
    path: Path, settings: CorpusSettings, extra: tuple[str, ...]
) -> Iterator[tuple[str, ...]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}, line {number}"
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{where}: byte {error.start + 1} is not UTF-8; convert the file to UTF-8"
                ) from None
            except json.JSONDecodeError as error:
                raise DataError(f"{where} is not JSON ({error.msg}); mend or remove it") from None
            text = record.get(settings.field) if isinstance(record, dict) else None
            if isinstance(text, list) and all(isinstance(part, str) for part in text):
                text = "\n".join(text)
            if not isinstance(text, str):
                raise DataError(
                    f"{where}: field {settings.field!r} holds no text; mend the record, "
                    "remove it, or set corpus.text_field"
                )
            if any("\ud800" <= c <= "\udfff" for c in text):
                raise DataError(f"{where}: half of a surrogate pair is not text; mend the record")
            name = record.get(settings.id_field)
            others = (record.get(field) for field in extra)
            yield (
                f"{path.name}:{number}" if name is None else str(name),
                text,
                *("" if value is None else str(value) for value in others),
            )


def _text(path: Path, extra: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    gathered: list[str] = []
    size, first = 0, 1
    for number, line in enumerate(_lines(path), 1):
        if not gathered:
            first = number
        gathered.append(line)
        size += len(line)
        if size >= (4 * _DOCUMENT if line.strip() else _DOCUMENT):
            yield (f"{path.name}:{first}", "".join(gathered), *("" for _ in extra))
            gathered, size = [], 0
    if any(line.strip() for line in gathered):
        yield (f"{path.name}:{first}", "".join(gathered), *("" for _ in extra))


def _lines(path: Path) -> Iterator[str]:
    """Lines of a UTF-8 file with their ends; a line longer than 64 Ki characters comes in pieces."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    rest, position, number = "", 0, 1
    with open(path, "rb") as file:
        while True:
            block = file.read(1 << 16)
            pending = len(decoder.getstate()[0])
            try:
                rest += decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                at = position - pending + error.start
                line = number + error.object[: error.start].count(b"\n") + rest.count("\n")
                raise DataError(
                    f"{path}, line {line}: byte {at + 1} of the file is not UTF-8; convert it to UTF-8"
                ) from None
            position += len(block)
            *whole, rest = rest.splitlines(keepends=True) or [""]
            if rest.endswith("\n") or not block or len(rest) > 1 << 16:
                whole, rest = [*whole, rest] if rest else whole, ""
            number += sum(line.endswith("\n") for line in whole)
            yield from whole
            if not block:
                return
