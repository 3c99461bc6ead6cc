"""Reads a corpus as a stream of batches, whatever kinds of files it lies in (formats/ has one module a kind).

A record that cannot be read is skipped and counted; more of them than `max_unreadable` are an error that names the
first three and says how many there are, so that one look at the corpus mends all. Files that are damaged as a whole are
an error as well, all of them at once. Memory holds one batch, whatever the size of the files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from shenhong.corpus import conversations
from shenhong.corpus.find import File, find, reasons
from shenhong.corpus.formats.base import Row, Source
from shenhong.corpus.progress import Progress
from shenhong.corpus.settings import CorpusSettings
from shenhong.errors import DataError

Columns = dict[str, list[str]]
"""A batch: equally long lists of strings under the names id, text and those asked for as extra."""

BATCH, _CHARACTERS = 8192, 4_000_000  # a batch holds at most so many records and so many characters
_TRIED = 100  # records of a file of which none can be read: it is not read further
_NAMED, _LISTED = 3, 100  # faults that a message names, files that the report lists
_ABSENT = object()


class Reading:
    """The records of all files that the settings name, to go through once."""

    def __init__(
        self,
        settings: CorpusSettings,
        base: Path,
        extra: tuple[str, ...] = (),
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        """``extra`` fields default to "". Errors: DataError, also where records are asked for."""
        self.settings, self.extra, self.say = settings, extra, say
        self.found = find(settings, base)
        self.wanted = (settings.field, settings.id_field, *extra)
        self.records = self.characters = self.unreadable = 0
        self.faults: list[str] = []  # the first three
        self.damaged: list[str] = []  # files, and how
        self.broken: list[str] = []  # those that nobody named by themselves: read up to the damage
        self.passed: list[tuple[str, str]] = []  # files that turned out to hold nothing, and why
        self.lone: list[str] = []  # the faults of some of those

    def __iter__(self) -> Iterator[Columns]:
        self.say(self.found.summary())
        progress = Progress(self.say, "reading")
        total = max(self.found.size, 1)
        gathered: list[tuple[str, ...]] = []
        size = done = 0
        for file in self.found.files:
            length = file.path.stat().st_size
            with open(file.path, "rb") as opened:
                source = Source(file.path, opened)
                for record in self._records(file, source):
                    gathered.append(record)
                    size += len(record[1])
                    if len(gathered) >= BATCH or size >= _CHARACTERS:
                        yield self._batch(gathered, size)
                        progress.at((done + source.share * length) / total, self.records)
                        gathered, size = [], 0
            done += length
        if gathered:
            yield self._batch(gathered, size)
        self._judge()

    def summary(self) -> dict[str, Any]:
        """What was read and what was not, for the report."""
        return {
            "files": len(self.found.files),
            "passed_over": [list(pair) for pair in [*self.found.passed, *self.passed][:_LISTED]],
            "records": self.records,
            "characters": self.characters,
            "unreadable": self.unreadable,
            "damaged": self.broken[:_LISTED],
            "faults": self.faults,
        }

    def _batch(self, records: list[tuple[str, ...]], size: int) -> Columns:
        self.records += len(records)
        self.characters += size
        names = ("id", "text", *self.extra)
        return {
            name: list(column)
            for name, column in zip(names, zip(*records, strict=True), strict=True)
        }

    def _records(self, file: File, source: Source) -> Iterator[tuple[str, ...]]:
        """(id, text, extra fields) of what can be read of a file."""
        good = bad = 0
        faults: list[str] = []
        try:
            for row in file.kind.rows(source, self.wanted):
                try:
                    record = self._record(file, row)
                except _UnreadableError as fault:
                    bad += 1
                    if len(faults) < _NAMED:
                        faults.append(f"{file.path}, {file.kind.UNIT} {row.place}: {fault}")
                    if not good and bad == _TRIED:
                        break
                    continue
                good += 1
                yield record
        except Exception as error:  # gzip, lzma, Arrow and json share no class of their own
            reason = " ".join(str(error).split())[:160] or type(error).__name__
            what = f"{file.path} is damaged ({reason}); fetch or build it again"
            (self.damaged if file.named else self.broken).append(what)
            self._count(bad, faults)
            return
        # A lone record without text is settings, or what tells of a data set.
        aside = not file.named and (not bad or (bad == 1 and file.kind.TABULAR))
        if not good and aside:
            self.passed.append((file.name, f"without a text in {self.settings.field!r}"))
            self.lone += faults[: _NAMED - len(self.lone)]
        elif not good and not bad:
            self.damaged.append(f"{file.path} holds no text; remove it or fetch it again")
        elif not good and bad == _TRIED:
            self.damaged.append(f"none of the first {_TRIED} records can be read: {faults[0]}")
        else:
            self._count(bad, faults)

    def _count(self, bad: int, faults: list[str]) -> None:
        self.unreadable += bad
        self.faults += faults[: _NAMED - len(self.faults)]

    def _record(self, file: File, row: Row) -> tuple[str, ...]:
        if row.fault:
            raise _UnreadableError(row.fault)
        text = self._text(row.fields)
        name = row.fields.get(self.settings.id_field)
        others = (_field(row.fields, field) for field in self.extra)
        return (
            f"{file.name}:{row.place}" if name is None else str(name),
            text,
            *("" if value is None or value is _ABSENT else str(value) for value in others),
        )

    def _text(self, fields: dict[str, Any]) -> str:
        if not self.settings.conversations:
            return _text(fields, self.settings.field)
        try:
            return conversations.conversation(fields, self.settings.field)
        except ValueError as error:
            raise _UnreadableError(str(error)) from None

    def _judge(self) -> None:
        """Say what was skipped. Error: DataError where that is too much."""
        if self.passed:
            self.say(f"passed over besides: {reasons(self.passed)}")
        total = self.records + self.unreadable
        skipped = f"{self.unreadable:,} of {total:,} records"
        damaged, files = self.damaged, len(self.found.files)
        if len(self.broken) > self.settings.max_unreadable * files:
            damaged = [*damaged, *self.broken]
        bad = list(damaged[:_NAMED])
        if len(damaged) > _NAMED:
            bad.append(f"and {len(damaged) - _NAMED} more files")
        if self.unreadable > self.settings.max_unreadable * total:
            bad.append(
                f"{skipped} cannot be read, more than corpus.max_unreadable {self.settings.max_unreadable:g} of them: "
                f"{'; '.join(self.faults)}; mend or remove them, or set corpus.max_unreadable"
            )
        if not total and not bad:
            bad = self.lone or [f"no text in {', '.join(self.settings.paths)}"]
        if bad:
            raise DataError("; ".join(bad))
        if self.broken:
            self.say(
                f"WARNING: {len(self.broken)} of {files:,} files are read up to where they are damaged only: {'; '.join(self.broken[:_NAMED])}"
            )
        if self.unreadable:
            self.say(f"WARNING: skipped {skipped}, which cannot be read: {'; '.join(self.faults)}")


class _UnreadableError(Exception):
    """Why a record cannot be read."""


def _field(fields: dict[str, Any], name: str) -> Any:
    """The field of this name; a dot leads into a field that has fields of its own."""
    if name in fields:
        return fields[name]
    head, dot, rest = name.partition(".")
    inner = fields.get(head) if dot else None
    return _field(inner, rest) if isinstance(inner, dict) else _ABSENT


def _text(fields: dict[str, Any], name: str) -> str:
    """The text of a record; none is an empty one. Error: _UnreadableError."""
    value = _field(fields, name)
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if value is _ABSENT:
        talk = next((field for field, part in fields.items() if _is_conversation(part)), None)
        if talk is not None:
            raise _UnreadableError(_CONVERSATION.format(talk, name))
        there = ", ".join(map(str, fields)) or "none"
        raise _UnreadableError(
            f"there is no field {name!r} (fields here: {there:.200}); set corpus.text_field"
        )
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            raise _UnreadableError(f"field {name!r} holds bytes that are not UTF-8") from None
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        return "\n".join(value)
    if _is_conversation(value):
        raise _UnreadableError(_CONVERSATION.format(name, "text"))
    if isinstance(value, dict):
        inner = ", ".join(f"{name}.{part}" for part in value)
        raise _UnreadableError(
            f"field {name!r} has fields of its own; set corpus.text_field to one of {inner:.200}"
        )
    what = "a list" if isinstance(value, list) else f"{value!r:.40}"
    raise _UnreadableError(f"field {name!r} holds {what}, which is no text")


_CONVERSATION = (
    "field {!r} holds a conversation, and this corpus is made of texts; "
    'set corpus.kind = "chat" to learn how to answer, or write what shall be learnt of it into a field {!r}'
)


def _is_conversation(value: Any) -> bool:
    """[{"role": ..., "content": ...}, ...], or with "from" and "value"."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(turn, dict)
            and (turn.keys() >= {"role", "content"} or turn.keys() >= {"from", "value"})
            for turn in value
        )
    )
