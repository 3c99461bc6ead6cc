"""Files that are written whole or not at all, and what identifies them."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from shenhong.errors import RunError
from shenhong.runs.regular import open_own, open_regular, refuse_link


def atomic_write(path: Path, data: bytes | str) -> None:
    """Write ``data`` to ``path`` whole or not at all."""
    with atomic_file(path) as temporary, open(open_own(temporary, os.O_WRONLY), "wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)


@contextlib.contextmanager
def atomic_file(final: Path) -> Iterator[Path]:
    """Yield a name to write a file under; it is synced and becomes ``final`` if the block ends well, and vanishes if not."""
    final = Path(final)
    temporary = final.with_name(f".{final.name}.{os.getpid()}.tmp")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        refuse_link(final.parent)
        temporary.unlink(missing_ok=True)
        os.close(open_own(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        yield temporary
        sync(temporary)
        os.replace(temporary, final)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise RunError(
            f"cannot write {final}: {error.strerror}; free space or choose another --run or --out"
        ) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(final.parent)


def sync(path: Path) -> None:
    """Make a file's content, or a folder's entries, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_folder(final: Path) -> Iterator[Path]:
    """Yield an empty temporary folder that becomes ``final`` if the block ends well, and vanishes if not."""
    temporary = final.with_name(f".{final.name}.tmp")
    refuse_link(final)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for path in (*temporary.rglob("*"), temporary):  # contents, and the entries of the folders
            sync(path)
        # A folder cannot replace a full one, so the old one steps aside until the new one is in place.
        aside = final.with_name(f".{final.name}.old")
        shutil.rmtree(aside, ignore_errors=True)
        if final.exists():
            os.replace(final, aside)
        os.replace(temporary, final)
        shutil.rmtree(aside, ignore_errors=True)
    except (OSError, SafetensorError) as error:  # safetensors wraps "no space left" in its own
        shutil.rmtree(temporary, ignore_errors=True)
        reason = getattr(error, "strerror", None) or error
        raise RunError(
            f"cannot write {final}: {reason}; free space or choose another --run or --out"
        ) from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync(final.parent)


def beside(path: str | Path, folder: Path) -> str:
    """An absolute ``path`` as a run keeps it: relative to ``folder`` where both lie in one tree.

    So a run and its corpus can be moved together, and a run that is shown tells nothing of the machine.
    """
    base = folder.resolve()
    shared = os.path.commonpath([path, base])
    return str(path) if shared == base.anchor else os.path.relpath(path, base)


_POINTER = b"version https://git-lfs.github.com/spec/"


def pointer(path: Path) -> str | None:
    """What to say of a file of which only the name came: a clone without git-lfs has a few lines of text in its place."""
    with contextlib.suppress(OSError), open_regular(path) as file:
        if file.read(len(_POINTER)) == _POINTER:
            return f"{path} is a pointer of git-lfs, not the file itself; 'git lfs pull' in its folder fetches it"
    return None


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
