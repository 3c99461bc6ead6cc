"""Which files a recipe's paths mean, and which of those below them are passed over, and why.

What exists by its name is meant literally, brackets and all; the rest of a path is a pattern. A file is of the kind its
name says where it was found, so that a link to a file without an ending will do.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from shenhong.corpus.formats import Format, ending, format_of, listed
from shenhong.corpus.settings import CorpusSettings
from shenhong.errors import DataError

_OTHER = "of another kind"
_ABOUT = ("readme", "license", "licence", "copying", "notice", "changelog", "contributing")


class File(NamedTuple):
    path: Path
    name: str  # below what the recipe names; its records are named by it
    kind: Format
    named: bool  # by the recipe itself, not found in a folder or by a pattern


class Found(NamedTuple):
    files: list[File]
    passed: list[tuple[str, str]]  # name and reason of what is not read

    @property
    def size(self) -> int:
        """In bytes, as they lie on the disk."""
        return sum(file.path.stat().st_size for file in self.files)

    def summary(self) -> str:
        """What is read, and what is not, in a line."""
        kinds = Counter("".join(ending(file.path.name)) for file in self.files)
        said = f"files: {_listed(kinds)} ({self.size / 1e6:,.1f} MB)"
        return said + (f"; passed over: {reasons(self.passed)}" if self.passed else "")


def find(settings: CorpusSettings, base: Path) -> Found:
    """The files that the recipe's paths name, each once, sorted. Errors: DataError."""
    files: dict[Path, tuple[Path, File]] = {}  # by what they are behind all links, with their root
    passed: list[tuple[str, str]] = []
    for pattern in settings.paths:
        try:
            root, paths, named = _meant(base / pattern)
            found, others = _sorted_out(root, paths, named)
        except OSError as error:
            raise DataError(f"may not read {error.filename} ({error.strerror})") from None
        if not found:
            there = f": there are {reasons(others)}" if others else ""
            raise DataError(
                f"no corpus file at {base / pattern}{there}; correct corpus.paths in the recipe"
            )
        passed += others
        for file in found:
            files.setdefault(file.path.resolve(), (root, file))
    closed = [str(file.path) for _, file in files.values() if not os.access(file.path, os.R_OK)]
    if closed:
        more = f" and {len(closed) - 3} more" if len(closed) > 3 else ""
        raise DataError(
            f"may not read {', '.join(sorted(closed)[:3])}{more}; change the permissions (chmod +r)"
        )
    return Found(sorted(_told_apart(list(files.values()))), passed)


def _told_apart(files: list[tuple[Path, File]]) -> list[File]:
    """Where two roots hold files of one name, all are named from the folder that holds the roots."""
    if len({file.name for _, file in files}) == len(files):
        return [file for _, file in files]
    shared = os.path.commonpath([root.absolute() for root, _ in files])
    return [
        file._replace(name=_text(os.path.relpath(file.path.absolute(), shared)))
        for _, file in files
    ]


def _meant(path: Path) -> tuple[Path, list[Path], bool]:
    """A folder, the files below it that are meant, and whether the recipe names just one. Errors: DataError, OSError."""
    if path.is_dir():
        return path, list(_walk(path)), False
    if path.is_file():
        return path.parent, [path], True
    root, rest = _literal(path)
    if not any(mark in rest for mark in "*?["):
        raise DataError(f"no corpus file at {path}; correct corpus.paths in the recipe")
    try:
        found = sorted(root.glob(rest + "/*" if rest.endswith("**") else rest))
    except ValueError as error:
        raise DataError(f"{path} is no pattern ({error}); correct corpus.paths") from None
    return root, [file for file in found if not file.is_dir()], False


def _literal(path: Path) -> tuple[Path, str]:
    """The longest part of a path that exists by its name, and the rest."""
    known = Path(path.anchor)
    parts = path.parts[1:] if path.anchor else path.parts
    for number, part in enumerate(parts):
        if not (known / part).exists():
            return known, os.path.join(*parts[number:])
        known /= part
    return known, ""


def _walk(folder: Path) -> Iterator[Path]:
    """All files below, in the order of their names; links to folders are followed, each folder once."""
    seen: set[Path] = set()

    def fail(error: OSError) -> None:
        raise error

    for where, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        here = Path(where)
        if here.resolve() in seen:
            folders.clear()
            continue
        seen.add(here.resolve())
        hidden = [name for name in folders if name.startswith(".")]
        folders[:] = sorted(set(folders) - set(hidden))
        yield from (here / name for name in sorted([*names, *hidden]))


def _sorted_out(
    root: Path, paths: list[Path], named: bool
) -> tuple[list[File], list[tuple[str, str]]]:
    """Those to read, and the names of the others with the reason. Errors: DataError for one that is named."""
    tabular = any(kind.TABULAR for path in paths if (kind := format_of(path.name)))
    found, others = [], []
    for path in paths:
        kind, name = format_of(path.name), _text(str(path.relative_to(root)))
        why = _fault(path, name, kind, tabular)
        if named and not kind:
            raise DataError(f"cannot read {path}: kinds that are read are {listed()}")
        if named and not path.stat().st_size:
            raise DataError(f"{path} is empty; remove it from corpus.paths or fetch it again")
        if kind and (named or not why):
            found.append(File(path, name, kind, named))
        else:
            others.append((name, why))
    return found, others


def _fault(path: Path, name: str, kind: Format | None, tabular: bool) -> str:
    """Why a file that was come across is not read, if it is not."""
    if any(part.startswith(".") for part in name.split("/")):
        return "hidden"
    if not path.exists():
        return "that are links to nothing"
    if not path.is_file():
        return "that are no files"
    if not kind:
        return _OTHER
    if not path.stat().st_size:
        return "that are empty"
    if _text(str(path)) != str(path):
        return "whose names are not UTF-8"
    about = path.name.lower().startswith(_ABOUT)
    return "about the data beside them" if tabular and about and not kind.TABULAR else ""


def reasons(passed: list[tuple[str, str]]) -> str:
    """How many files of which endings are passed over, by reason."""
    by_reason: dict[str, Counter[str]] = {}
    for name, why in passed:
        by_reason.setdefault(why, Counter())["".join(ending(name)) or "without ending"] += 1
    said = "; ".join(f"{_listed(counts)} {why}" for why, counts in by_reason.items())
    return f"{said} (kinds that are read: {listed()})" if _OTHER in by_reason else said


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{count:,} {what}" for what, count in counts.most_common())


def _text(path: str) -> str:
    """A path as text, also where its bytes are none."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")
