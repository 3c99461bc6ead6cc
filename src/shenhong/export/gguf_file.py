"""Reads GGUF, the file format of llama.cpp, from anyone: nothing in a file is believed before it is checked.

    magic "GGUF", version 2 or 3, number of tensors, number of metadata pairs
    metadata:  key, type, value            (a value is a number, a string, or an array of either)
    tensors:   name, dimensions (innermost first), storage kind, offset in the data
    padding to general.alignment, then the data of the tensors

All little-endian, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Each count and length is held against
the bytes that are left before anything is allocated for it, and tensors must lie in the file side by side. So what a
file can cost is bounded by its own size, and a damaged one is one ``ModelError``.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import BinaryIO, NamedTuple

import gguf
import numpy as np
import torch
from torch import Tensor

from shenhong.errors import ModelError
from shenhong.runs.files import pointer
from shenhong.runs.regular import open_regular

Scalar = int | float | bool | str
Metadata = dict[str, Scalar | list[Scalar]]

MAGIC = b"GGUF"

# What is read: the plain kinds, the blocks of 32 and the K-quants; all by gguf's own arithmetic.
_READ = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]
_READ += ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
KINDS = {  # number in a file -> name, elements and bytes of a block
    int(kind): (kind.name, *gguf.GGML_QUANT_SIZES[kind])
    for kind in map(gguf.GGMLQuantizationType.__getitem__, _READ)
}
_NUMBERS = dict(enumerate(("<u1", "<i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?")))
_NUMBERS |= {10: "<u8", 11: "<i8", 12: "<f8"}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_LENGTH = 8  # bytes of a string's length, so the least a string takes
# Far above any file known, and small enough that a Python list of so many is nothing to worry about.
_MOST_PAIRS, _MOST_TENSORS, _MOST_ITEMS, _LONGEST = 1 << 16, 1 << 20, 1 << 24, 1 << 24
_LONGEST_NAME, _MOST_DIMENSIONS, _LARGEST_ALIGNMENT = 256, 4, 1 << 20


class TensorInfo(NamedTuple):
    """One tensor of a file. ``shape`` is as torch sees it, the row last; ``nbytes`` as it is stored."""

    name: str
    shape: tuple[int, ...]
    kind: str
    nbytes: int
    start: int  # of its bytes, from the beginning of the file


class GgufFile(NamedTuple):
    """A checked header; the tensors are read one by one with `read`."""

    path: Path
    size: int
    metadata: Metadata
    tensors: dict[str, TensorInfo]

    def read(self, name: str) -> Tensor:
        """The tensor, dequantised to float32. Error: ModelError when it is not there or the file changed."""
        info = self.tensors.get(name)
        if info is None:
            raise ModelError(f"{self.path}: tensor {name} missing; download the file again")
        try:
            with open_regular(self.path) as file:
                file.seek(info.start)
                raw = file.read(info.nbytes)
                whole = len(raw) == info.nbytes and os.fstat(file.fileno()).st_size == self.size
        except OSError as error:
            raise ModelError(f"{self.path}: cannot be read ({error.strerror})") from None
        if not whole:
            raise ModelError(f"{self.path} was changed while it was read; open it again")
        rows = np.frombuffer(raw, np.uint8).reshape(*info.shape[:-1], -1)
        with np.errstate(all="ignore"):  # a scale may be infinite: that is for the reader to judge
            values = gguf.dequantize(rows, gguf.GGMLQuantizationType[info.kind])
        return torch.from_numpy(np.array(values, np.float32).reshape(info.shape))


def begins_as_gguf(path: Path) -> bool:
    """Whether there is a file that calls itself GGUF, whole or not."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def open_gguf(path: str | Path) -> GgufFile:
    """The header of a GGUF file, checked. Error: ModelError for whatever is not a whole one."""
    path = Path(path)
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            metadata, tensors = _Header(file, size).read()
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror or error})") from None
    except _Damaged as damage:
        raise ModelError(pointer(path) or f"{path}: {damage}; download the file again") from None
    return GgufFile(path, size, metadata, tensors)


class _Damaged(Exception):
    """What is wrong with a file, without its name."""


class _Header:
    """The fields of a header in their order; ``left`` bytes of the file are not read yet."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size, self.left = file, size, size

    def read(self) -> tuple[Metadata, dict[str, TensorInfo]]:
        if self.size < 24 or self.take(len(MAGIC)) != MAGIC:
            raise _Damaged("not a GGUF file")
        version = self.whole(4)
        if version not in (2, 3):
            raise _Damaged(f"GGUF version {version}; only 2 and 3, little-endian, are read")
        tensors = self.count("tensors", _MOST_TENSORS, _LENGTH + 4 + 8 + 4 + 8)
        pairs = self.count("metadata pairs", _MOST_PAIRS, _LENGTH + 4 + 1)
        metadata: Metadata = {}
        for _ in range(pairs):
            key = self.name()
            if key in metadata:
                raise _Damaged(f"metadata {key!r} stands there twice")
            metadata[key] = self.value(key)
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not (
            0 < alignment <= _LARGEST_ALIGNMENT and alignment.bit_count() == 1
        ):
            raise _Damaged(f"general.alignment is {alignment!r:.40}; expected a power of two")
        infos = [self.tensor(alignment) for _ in range(tensors)]
        return metadata, self.placed(infos, alignment)

    def take(self, length: int) -> bytes:
        """The next bytes; none are allocated that the file does not have."""
        if length > self.left:
            raise _Damaged(f"the file ends inside its header ({self.size} bytes)")
        self.left -= length
        data = self.file.read(length)
        if len(data) != length:
            raise _Damaged("the file shrank while it was read")
        return data

    def whole(self, width: int = 8) -> int:
        return int.from_bytes(self.take(width), "little")

    def count(self, what: str, most: int, least_bytes: int) -> int:
        """A number of things of which each takes at least so many bytes."""
        number = self.whole()
        if number > min(most, self.left // least_bytes):
            raise _Damaged(f"{number} {what} cannot be in a file of {self.size} bytes")
        return number

    def string(self, longest: int = _LONGEST) -> str:
        raw = self.take(self.count("characters", longest, 1))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise _Damaged(f"{raw[:40]!r} is not UTF-8") from None

    def name(self) -> str:
        """A key or a tensor's name, fit to stand in a message of one line."""
        name = self.string(_LONGEST_NAME)
        if not name.isprintable():
            raise _Damaged(f"{name!r:.80} is no name")
        return name

    def value(self, key: str) -> Scalar | list[Scalar]:
        kind = self.whole(4)
        if kind == _STRING:
            return self.string()
        if kind in _NUMBERS:
            (value,) = self.numbers(key, kind, 1)
            return value
        if kind != _ARRAY:
            raise _Damaged(f"metadata {key!r} has the unknown type {kind}")
        kind = self.whole(4)
        if kind == _STRING:
            return [self.string() for _ in range(self.count("strings", _MOST_ITEMS, _LENGTH))]
        if kind not in _NUMBERS:
            raise _Damaged(f"metadata {key!r} is an array of the unknown type {kind}")
        width = np.dtype(_NUMBERS[kind]).itemsize
        return self.numbers(key, kind, self.count("numbers", _MOST_ITEMS, width))

    def numbers(self, key: str, kind: int, count: int) -> list[Scalar]:
        raw = self.take(count * np.dtype(_NUMBERS[kind]).itemsize)
        if kind == _BOOL and raw.strip(b"\0\1"):
            raise _Damaged(f"metadata {key!r} is neither true nor false")
        values: list[Scalar] = np.frombuffer(raw, _NUMBERS[kind]).tolist()
        return values

    def tensor(self, alignment: int) -> TensorInfo:
        """One entry of the table; ``start`` still counts from the beginning of the data."""
        name = self.name()
        dimensions = self.whole(4)
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            raise _Damaged(f"tensor {name!r} has {dimensions} dimensions")
        shape = tuple(self.whole() for _ in range(dimensions))[::-1]
        kind, offset = self.whole(4), self.whole()
        if kind not in KINDS:
            known = gguf.GGMLQuantizationType.__members__.values()
            called = next((k.name for k in known if k == kind), str(kind))
            raise _Damaged(
                f"tensor {name!r} is stored as {called}; of {', '.join(_READ)} no other is read"
            )
        called, block, width = KINDS[kind]
        elements = math.prod(shape)
        nbytes = elements // block * width
        if not elements or nbytes > self.size or shape[-1] % block:
            raise _Damaged(f"tensor {name!r} of {called} cannot have the shape {list(shape)}")
        if offset % alignment:
            raise _Damaged(f"tensor {name!r} is not aligned to {alignment} bytes")
        return TensorInfo(name, shape, called, nbytes, offset)

    def placed(self, infos: list[TensorInfo], alignment: int) -> dict[str, TensorInfo]:
        """The tensors where they lie in the file: each inside it, none over another."""
        data = -(-(self.size - self.left) // alignment) * alignment
        end, tensors = data, {}
        for info in sorted(infos, key=lambda info: info.start):
            start = data + info.start
            if start < end:
                raise _Damaged(f"tensor {info.name!r} lies over another")
            end = start + info.nbytes
            if end > self.size:
                raise _Damaged(f"tensor {info.name!r} ends at byte {end} of {self.size}")
            if info.name in tensors:
                raise _Damaged(f"tensor {info.name!r} stands there twice")
            tensors[info.name] = info._replace(start=start)
        return {info.name: tensors[info.name] for info in infos}
