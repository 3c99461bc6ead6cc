"""The safetensors files of a model folder: what their headers promise, and the tensors a piece at a time.

Headers come first, for every file, so that a folder is accepted or refused before anything is allocated. The library
checks a header's numbers against the file's length. A file is mapped, and what was read of it stays in memory until it
is closed: so it is closed and opened again every PIECE bytes.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from shenhong.errors import ModelError
from shenhong.runs.files import pointer
from shenhong.runs.regular import open_inside, read_inside

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MULTITOKEN = "mtp.safetensors"  # the multi-token layer beside either, where we wrote the folder
PIECE = 64_000_000


class Stored(NamedTuple):
    """One tensor as its file's header describes it; ``kind`` in the format's own words (F32, BF16, F8_E4M3, ...)."""

    path: Path
    shape: tuple[int, ...]
    kind: str


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        open_inside(path).close()
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ModelError(
            pointer(path) or f"{path} is damaged ({error}); copy the model folder again"
        ) from None


def headers(folder: Path) -> dict[str, Stored]:
    """Every tensor of the folder by name, in the files' order. Error: ModelError."""
    stored: dict[str, Stored] = {}
    for path in tensor_files(folder):
        with _opened(path) as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                if name in stored:
                    raise ModelError(f"{path}: tensor {name} is also in {stored[name].path.name}")
                part = file.get_slice(name)
                stored[name] = Stored(path, tuple(part.get_shape()), part.get_dtype())
    return stored


def read(stored: dict[str, Stored], names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of some tensors, in their order; a tensor's memory is given back with its piece of the file."""
    left = list(names)
    while left:
        path, taken = stored[left[0]].path, 0
        with _opened(path) as file:
            while left and stored[left[0]].path == path and taken < PIECE:
                name = left.pop(0)
                tensor = file.get_tensor(name)
                taken += tensor.nbytes
                yield name, tensor
                del tensor


def tensor_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: the one or those its index names, and our multi-token layer. Error: ModelError."""
    trunk = _trunk(folder)
    apart = folder / MULTITOKEN
    return [*trunk, apart] if apart.exists() and apart not in trunk else trunk


def _trunk(folder: Path) -> list[Path]:
    if (folder / SINGLE).exists():
        return [folder / SINGLE]
    if not (folder / INDEX).exists():
        pickles = [
            p.name for kind in ("bin", "pt", "pth", "ckpt") for p in folder.glob(f"*.{kind}")
        ]
        if pickles:
            raise ModelError(
                f"{folder / pickles[0]} is a pickle, which can run code and is never opened; "
                "convert it to safetensors"
            )
        raise ModelError(f"{folder} has no {SINGLE}; give a finished model folder")
    try:
        index = json.loads(read_inside(folder / INDEX))
        names = sorted(set(index["weight_map"].values()))
        safe = all(Path(name).name == name for name in names)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(
            pointer(folder / INDEX)
            or f"{folder / INDEX} is damaged ({error}); copy the folder again"
        ) from None
    if not safe:
        raise ModelError(f"{folder / INDEX} names files outside its folder")
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise ModelError(f"{folder / missing[0]} is missing; copy the model folder again")
    return [folder / name for name in names]
