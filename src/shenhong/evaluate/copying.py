"""How much of some texts stands, character for character, in the training text.

The longest common runs are found with rolling fingerprints (Karp & Rabin 1987): the k-grams of both sides as
64-bit hashes for k = 1, 2, 3 … A position of the training text stays while its k-gram occurs in the texts,
so each round is shorter than the one before it. The first rounds are the long ones; they are left out for texts of
which a run of _AT_ONCE characters stands there anyway. The training text passes through in parts, so that memory is
bounded whatever its size.

Legend: T positions in the joined texts, P positions in the joined training text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from shenhong.evaluate.metrics import mean

LINE_CHARACTERS = 5  # a shorter line may be anyone's; it counts neither as copied nor as new
_LINE_ENDS = re.compile(r"[，。？！；：、,.?!;:\n\r]+")
_END, _END_OF_TRAINING = 0, 0x110000  # what the ends of texts hash as: no run crosses one
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_AT_ONCE = 8
_PART = 4_000_000  # characters of training text that are compared at a time


class Copies(NamedTuple):
    """What one text has in common with the training text."""

    lines: list[str]  # its lines of at least LINE_CHARACTERS characters
    copied: list[bool]  # whether each stands there as a line
    run: str  # its longest run of characters that stands inside one training text


def copies(texts: Sequence[str], training: Iterable[str]) -> list[Copies]:
    """Compares each text with the whole training text."""
    training = list(training)
    lines = [_lines(text) for text in texts]
    wanted = {line for text in lines for line in text}
    known = {line for text in training for line in _parts(text) if line in wanted}
    runs = _longest_runs(texts, training)
    return [
        Copies(text, [line in known for line in text], run)
        for text, run in zip(lines, runs, strict=True)
    ]


def summarise(items: Sequence[Copies]) -> dict:
    """Shares and lengths over texts, JSON-able."""
    longest = max((item.run for item in items), key=len, default="")
    flags = [flag for item in items for flag in item.copied]
    found = (line for item in items for line, flag in zip(*item[:2], strict=True) if flag)
    return {
        "lines_copied": mean(flags).to_json(),
        "longest_run": len(longest),
        "longest_run_text": longest,
        "mean_run": mean([len(item.run) for item in items]).to_json(),
        "examples": list(dict.fromkeys(found))[:5],
    }


def _parts(text: str) -> list[str]:
    return [part.strip() for part in _LINE_ENDS.split(text)]


def _lines(text: str) -> list[str]:
    return [part for part in _parts(text) if len(part) >= LINE_CHARACTERS]


def _longest_runs(texts: Sequence[str], training: Sequence[str]) -> list[str]:
    """For each text its longest substring that occurs in one training text (the first of them)."""
    runs = _runs_from(_AT_ONCE, texts, training)
    short = [i for i, run in enumerate(runs) if not run]
    if short:
        found = _runs_from(1, [texts[i] for i in short], training)
        for i, run in zip(short, found, strict=True):
            runs[i] = run
    return runs


def _runs_from(least: int, texts: Sequence[str], training: Sequence[str]) -> list[str]:
    """The longest runs of at least ``least`` characters; empty where there is none."""
    joined, point_T, owner_T = _join(texts)
    # One 64-bit number a character, from a fixed seed; equal hashes of unequal runs: about 1e-9 here.
    scramble = np.random.default_rng(0).integers(1, 2**63, _END_OF_TRAINING + 1, dtype=np.uint64)
    code_T = scramble[point_T]
    first_T = _windows(code_T, least)
    length = np.zeros(len(texts), dtype=np.int64)
    start = np.zeros(len(texts), dtype=np.int64)
    for part in _parts_of(training):
        _, point_P, _ = _join(part)
        code_P = scramble[point_P]
        code_P[point_P == _END] = scramble[_END_OF_TRAINING]
        (at_T, hash_T), (at_P, hash_P), k = first_T, _windows(code_P, least), least
        while len(at_T) and len(at_P):
            kept_P = _members(hash_P, hash_T)
            at_P, hash_P = at_P[kept_P], hash_P[kept_P]
            kept_T = np.isin(hash_T, hash_P)
            at_T, hash_T = at_T[kept_T], hash_T[kept_T]
            longer = length[owner_T[at_T]] < k
            start[owner_T[at_T[longer][::-1]]] = at_T[longer][::-1]
            length[owner_T[at_T[longer]]] = k
            at_T, hash_T = _grow(at_T, hash_T, code_T, k)
            at_P, hash_P = _grow(at_P, hash_P, code_P, k)
            k += 1
    return [joined[s : s + n] for s, n in zip(start.tolist(), length.tolist(), strict=True)]


def _parts_of(training: Sequence[str]) -> Iterator[list[str]]:
    part: list[str] = []
    size = 0
    for text in training:
        part.append(text)
        size += len(text)
        if size >= _PART:
            yield part
            part, size = [], 0
    if part:
        yield part


def _windows(codes: NDArray[np.uint64], k: int) -> tuple[NDArray[np.int32], NDArray[np.uint64]]:
    """All positions with the hashes of their k-grams."""
    value = np.zeros(max(0, len(codes) - k + 1), dtype=np.uint64)
    for i in range(k):
        value *= _MULTIPLIER
        value += codes[i : i + len(value)]
    return np.arange(len(value), dtype=np.int32), value


def _grow(
    at: NDArray[np.int32], value: NDArray[np.uint64], codes: NDArray[np.uint64], k: int
) -> tuple[NDArray[np.int32], NDArray[np.uint64]]:
    """From the hashes of the k-grams at some positions to those of the (k+1)-grams."""
    inside = at < len(codes) - k
    at, value = at[inside], value[inside]
    return at, value * _MULTIPLIER + codes[at + k]


def _members(values: NDArray[np.uint64], of: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """np.isin for many values and few members: a table of 20 bits of the hash sifts first."""
    members = np.unique(of)
    table = np.zeros(1 << 20, dtype=bool)
    table[members >> np.uint64(44)] = True
    keep = table[values >> np.uint64(44)]
    left = values[keep]
    rank = np.minimum(np.searchsorted(members, left), len(members) - 1)
    keep[keep] = members[rank] == left
    return keep


def _join(texts: Sequence[str]) -> tuple[str, NDArray[np.uint32], NDArray[np.int64]]:
    """The texts, each with a zero character after it; its code points; whose each is."""
    joined = "".join(text + "\0" for text in texts)
    points = np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    lengths = np.array([len(text) + 1 for text in texts], dtype=np.int64)
    return joined, points, np.repeat(np.arange(len(texts)), lengths)
