"""Opens files that others may have put there: regular ones only, and where we write, never through a link.

A FIFO or a device under a file's name would hang its reader or never end, and a link inside a run folder would turn
what the run writes, cuts or removes into somebody else's file. What was opened is looked at, not its name, which may
stand for another file a moment later.
"""

from __future__ import annotations

import errno
import os
import stat
from io import BufferedReader
from pathlib import Path

from shenhong.errors import RunError

TEXT = 64 << 20
"""Bytes of a file of text that is read whole: a tokenizer, a manifest, a configuration."""


class UnreadableError(OSError):
    """What is wrong with a file that is there, as its text, without the name."""

    def __str__(self) -> str:
        return str(self.strerror)


def open_regular(path: Path, most: int | None = None, *, follow: bool = True) -> BufferedReader:
    """A file to read. Errors: OSError, UnreadableError where it is no regular one or holds more than ``most`` bytes."""
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(path, flags if follow else flags | os.O_NOFOLLOW)
    file = os.fdopen(descriptor, "rb") if _is_regular(descriptor) else None
    if file is None:
        os.close(descriptor)
        raise UnreadableError(errno.EINVAL, "it is no regular file", str(path))
    if most is not None and (size := os.fstat(descriptor).st_size) > most:
        file.close()
        raise UnreadableError(
            errno.EFBIG, f"it holds {size:,} bytes, more than {most:,}", str(path)
        )
    return file


def read_regular(path: Path, most: int = TEXT, *, follow: bool = True) -> bytes:
    """All of a file. Errors: as of `open_regular`, also where it grows beyond ``most`` meanwhile."""
    with open_regular(path, most, follow=follow) as file:
        return _whole(file, path, most)


def read_inside(path: Path, folder: Path | None = None, most: int = TEXT) -> bytes:
    """All of a file of a model folder, by default the one it lies in. Errors: as of `open_inside`."""
    with open_inside(path, folder, most) as file:
        return _whole(file, path, most)


def open_inside(path: Path, folder: Path | None = None, most: int | None = None) -> BufferedReader:
    """A file of a model folder, to read. Errors: as of `open_regular`.

    What a folder from elsewhere holds is copied, shown and sent on, so a link in it must not lead to a file of the
    reader's: only to one inside the folder, or to the blobs that the hub's cache keeps beside its snapshots.
    """
    file = open_regular(path, most)
    real, home = path.resolve(), (folder or path.parent).resolve()
    homes = [home, *(p.parent / "blobs" for p in home.parents if p.name == "snapshots")]
    # The file is looked at as it was opened, for the name may lead elsewhere by now.
    if any(map(real.is_relative_to, homes)) and _is_same(file, real):
        return file
    file.close()
    raise UnreadableError(errno.EXDEV, "it is a link that leads out of its folder", str(path))


def _is_same(file: BufferedReader, path: Path) -> bool:
    return os.path.samestat(os.fstat(file.fileno()), os.stat(path, follow_symlinks=False))


def _whole(file: BufferedReader, path: Path, most: int) -> bytes:
    data = file.read(most + 1)
    if len(data) > most:
        raise UnreadableError(errno.EFBIG, f"it holds more than {most:,} bytes", str(path))
    return data


def open_own(path: Path, flags: int, mode: int = 0o666) -> int:
    """The descriptor of a file to write in place. Errors: RunError for a link or what is no regular file; OSError."""
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, mode)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise RunError(_LINK.format(path)) from None
        raise
    # A second name (a hard link) would be another file of somebody's, changed with ours.
    if not _is_regular(descriptor) or os.fstat(descriptor).st_nlink > 1:
        os.close(descriptor)
        raise RunError(
            f"{path} is no regular file, or has a second name elsewhere, and is not written to; put a copy in its place"
        )
    return descriptor


def refuse_links(folder: Path) -> None:
    """Error: RunError that names a link, or a pipe or a device, anywhere in a folder all of which a run writes and removes."""
    for where, folders, names in os.walk(folder):  # which follows none
        for name in (*folders, *names):
            path = Path(where) / name
            mode = path.lstat().st_mode
            if stat.S_ISLNK(mode):
                raise RunError(_LINK.format(path))
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise RunError(f"{path} is no regular file; remove it")


def refuse_link(path: Path) -> None:
    """Error: RunError where ``path``, or what leads to it from the run folder that it lies in, is a link."""
    run = next((p for p in path.parents if all((p / name).exists() for name in _OF_A_RUN)), None)
    for part in (path, *path.parents):
        if part == run:
            return
        if part.is_symlink():
            raise RunError(_LINK.format(part))
        if run is None:  # the rest of the path is the user's own
            return


def _is_regular(descriptor: int) -> bool:
    return stat.S_ISREG(os.fstat(descriptor).st_mode)


_OF_A_RUN = (".lock", "manifest.json")
_LINK = "{} is a link, and what a run writes or removes lies in its own folder; put what it leads to in its place"
