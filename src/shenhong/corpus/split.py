"""Which records are held out, and which training records know them too well.

A record's part is a hash of its id, so it stays the same when the corpus grows. Where the recipe does not say how many,
one in a hundred is held out for each of the two purposes; of a small corpus more, as far as a twentieth, so that what is
measured on it means something. Where that would be a handful of documents, which say nothing of the others, pieces of
documents are held out instead: each document is cut at ends of lines, and what lies between two held-out pieces stays
one text.

What is held out must
not be learnt by heart: a training record that shares `leak_overlap` of the shingles of the shorter of
the two with any held-out record is removed. That is exact (an inverted index of the held-out shingles),
and stricter than the near-duplicate step: it also finds the quatrain inside an eight-line poem.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from shenhong.corpus import shingles
from shenhong.corpus.records import chance

TRAIN, VALID, TEST = 0, 1, 2
NAMES = ("train", "valid", "test")
# A shingle found in more held-out records than this is a formula of the genre, not a quotation.
_COMMON = 64


USUAL, LARGEST = 0.01, 0.05  # share of records for each purpose
ENOUGH = 80_000  # characters to measure on: about 20,000 tokens of English
SMALL = int(ENOUGH / USUAL)  # characters of a corpus of which the usual share is less
MOST = 2_000_000  # bytes to measure on; more takes time and tells nothing new
_FEW, _PIECES = 30, 20  # held-out documents that are too few, pieces that are then wanted
_SHORTEST, _LONGEST = 1000, 4000  # characters of a piece
TINY = 200_000  # characters of a corpus of which chance alone may hold out nothing
# So many pieces a tiny corpus has, and none of them is shorter than so many characters.
_TINY_PIECES, _TINY_PIECE = 24, 200
_LEAST, _TINIEST = 2, 0.33  # held out for each purpose, and the largest share for it


class Share(NamedTuple):
    """How much is held out for each purpose: of the records, or of their pieces of so many characters."""

    of_all: float
    piece: int | None = None


def share_of(characters: int, records: int, size: int, cut: bool) -> Share:
    """What to hold out of a corpus of so many characters and records (SMALL or more: not counted) in ``size`` bytes.

    ``cut``: whether its documents may be held out in pieces.
    """
    if characters >= SMALL:
        return Share(min(USUAL, MOST / max(1, size)))
    share = min(LARGEST, max(USUAL, ENOUGH / max(1, characters)))
    if not cut or records * share >= _FEW:
        return Share(share)
    shortest = min(_SHORTEST, max(_TINY_PIECE, characters // _TINY_PIECES))
    return Share(share, min(_LONGEST, max(shortest, int(characters * share / _PIECES))))


def enough(share: Share, names: list[str], seed: int) -> Share:
    """The share of a tiny corpus, raised until some of these records or pieces are held out for either purpose."""
    of_all = share.of_all
    while of_all < _TINIEST:
        counts = np.bincount(parts(names, seed, of_all), minlength=3)
        if min(counts[VALID], counts[TEST]) >= _LEAST:
            break
        of_all = min(_TINIEST, 1.1 * of_all)
    return share._replace(of_all=of_all)


def names_of_pieces(name: str, text: str, share: Share) -> list[str]:
    """What the pieces of a text are called; of one that stays whole its own name."""
    if share.piece is None:
        return [name]
    return _numbered(name, list(pieces(text, share.piece)))


def _numbered(name: str, cut: list[str]) -> list[str]:
    return [f"{name}#{number}" for number in range(len(cut))]


def pieces(text: str, size: int) -> Iterator[str]:
    """A text cut at ends of lines, or where a line is very long at spaces, into pieces of about ``size`` characters."""
    start = 0
    while len(text) - start > 1.5 * size:
        last = min(start + 2 * size, len(text) - size // 2)  # what is left is a piece too
        end = text.find("\n", start + size, last)
        if end < 0:
            end = text.find(" ", start + size, last)
        end = end + 1 if end >= 0 else start + size
        yield text[start:end]
        start = end
    yield text[start:]


def in_pieces(
    names: list[str], texts: list[str], seed: int, share: Share
) -> tuple[list[str], list[str], list[int]]:
    """Each text in runs of pieces of one part: names NAME#FIRST, texts, and the row each comes from."""
    assert share.piece is not None
    kept_names: list[str] = []
    kept_texts: list[str] = []
    rows: list[int] = []
    for row, (name, text) in enumerate(zip(names, texts, strict=True)):
        cut = list(pieces(text, share.piece))
        ids = _numbered(name, cut)
        part = parts(ids, seed, share.of_all)
        for number, piece in enumerate(cut):
            if number and part[number] == part[number - 1]:
                kept_texts[-1] += piece
                continue
            kept_names.append(ids[number])
            kept_texts.append(piece)
            rows.append(row)
    return kept_names, kept_texts, rows


def parts(ids: list[str], seed: int, held_out: float) -> np.ndarray:
    """TRAIN, VALID or TEST for each id."""
    drawn = np.array([chance(name, seed, "split") for name in ids], np.float64)
    return np.where(drawn < held_out, VALID, np.where(drawn < 2 * held_out, TEST, TRAIN))


class HeldOut:
    """The shingles of all held-out records, to ask for the records that overlap with them."""

    def __init__(self, texts: list[str]) -> None:
        flat, offsets = shingles.shingles(texts)
        keys = shingles.sets(flat, offsets, np.arange(len(texts)))
        self.sizes = shingles.sizes(keys, len(texts))
        hashes = keys & np.uint64((1 << 40) - 1)
        order = np.argsort(hashes, kind="stable")
        self.hashes = hashes[order]
        self.owners = (keys >> np.uint64(40))[order].astype(np.int64)

    def overlaps(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """For each text: its largest overlap with a held-out record, and that record's number (-1: none).

        The overlap is |A and B| / min(|A|, |B|) of the shingle sets.
        """
        best, whose = np.zeros(len(texts)), np.full(len(texts), -1)
        flat, offsets = shingles.shingles(texts)
        keys = shingles.sets(flat, offsets, np.arange(len(texts)))
        size = shingles.sizes(keys, len(texts))
        hashes = keys & np.uint64((1 << 40) - 1)
        low = np.searchsorted(self.hashes, hashes, "left")
        high = np.searchsorted(self.hashes, hashes, "right")
        count = np.where(high - low <= _COMMON, high - low, 0)
        hits = np.flatnonzero(count)
        if not len(hits):
            return best, whose
        number = count[hits]
        within = np.arange(number.sum()) - np.repeat(np.cumsum(number) - number, number)
        owner = self.owners[np.repeat(low[hits], number) + within]
        text = np.repeat((keys[hits] >> np.uint64(40)).astype(np.int64), number)
        pair, common = np.unique(text * len(self.sizes) + owner, return_counts=True)
        text, owner = np.divmod(pair, len(self.sizes))
        overlap = common / np.minimum(size[text], self.sizes[owner])
        order = np.argsort(overlap, kind="stable")  # the largest is written last
        best[text[order]], whose[text[order]] = overlap[order], owner[order]
        return best, whose
