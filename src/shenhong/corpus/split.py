"""Which records are held out, and which training records know them too well.

A record's part is a hash of its id, so it stays the same when the corpus grows. What is held out must
not be learnt by heart: a training record that shares `leak_overlap` of the shingles of the shorter of
the two with any held-out record is removed. That is exact (an inverted index of the held-out shingles),
and stricter than the near-duplicate step: it also finds the quatrain inside an eight-line poem.
"""

from __future__ import annotations

import numpy as np

from shenhong.corpus import shingles
from shenhong.corpus.records import chance

TRAIN, VALID, TEST = 0, 1, 2
NAMES = ("train", "valid", "test")
# A shingle found in more held-out records than this is a formula of the genre, not a quotation.
_COMMON = 64


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
