"""Exact and near duplicates.

Near duplicates are found by MinHash with locality-sensitive hashing (Broder 1997; Leskovec et al.,
Mining of Massive Datasets, 3.4): 63 minima in 21 bands of 3, so that a pair of Jaccard similarity 0.6
meets in a band with probability 0.99. Every candidate is then verified by the exact Jaccard similarity
of the two shingle sets, so that a hash never decides alone.

The minima are rensa's (Rust), from one flat array of shingle hashes: 63 minima of 230,000 poems take
0.2 s, and 1 s with the copy through Python lists, its only way out. Its own LSH index gives flags
without pairs, which could not be verified; sorting the bands in numpy gives the pairs.

Which of two records stays does not depend on the order of reading: the one whose id comes first.

Legend: N records, M candidate pairs.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import rensa

from shenhong.corpus import shingles

BANDS, ROWS = 21, 3
_NEIGHBOURS = 16
_SEED = 20  # of the hash family; part of the method, not of the recipe


def band_keys(hashes: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """One 64-bit key [N, 21] a band from the shingles of N records (see shingles.shingles)."""
    count = len(offsets) - 1
    if not count:
        return np.empty((0, BANDS), np.uint64)
    matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(
        hashes, offsets.astype(np.uint64), BANDS * ROWS, _SEED
    )
    minima = np.array(matrix.to_rows(), np.uint64).reshape(count, BANDS, ROWS)
    keys = np.zeros((count, BANDS), np.uint64)
    for row in range(ROWS):
        keys = shingles.mix(keys + minima[:, :, row] + np.uint64(row + 1))
    return keys


def exact(digests: np.ndarray, rank: np.ndarray) -> np.ndarray:
    """For each record [N] the record it repeats, or -1. `rank` [N] is its place in the order of ids."""
    order = np.lexsort((rank, digests))
    ordered = digests[order]
    first = np.maximum.accumulate(
        np.where(np.r_[True, ordered[1:] != ordered[:-1]], np.arange(len(order)), 0)
    )
    result = np.full(len(digests), -1)
    repeats = first != np.arange(len(order))
    result[order[repeats]] = order[first[repeats]]
    return result


def candidates(keys: np.ndarray, rank: np.ndarray, live: np.ndarray) -> np.ndarray:
    """Pairs [M, 2] of records that meet in a band, the earlier id first; `live` [N] marks who takes part.

    Inside a band's group each record is paired with the group's first and with its 16 neighbours, so
    that a group of any size costs linear time.
    """
    members = np.flatnonzero(live)
    members = members[np.argsort(rank[members], kind="stable")]
    found = []
    for band in range(keys.shape[1]):
        order = members[np.argsort(keys[members, band], kind="stable")]
        key = keys[order, band]
        place = np.arange(len(order))
        first = np.maximum.accumulate(np.where(np.r_[True, key[1:] != key[:-1]], place, 0))
        later = first < place
        found.append(np.stack([order[first[later]], order[later]], 1))
        for distance in range(1, _NEIGHBOURS):
            same = np.flatnonzero(key[distance:] == key[:-distance])
            if not len(same):
                break
            found.append(np.stack([order[same], order[same + distance]], 1))
    pairs = np.concatenate(found) if found else np.empty((0, 2), np.int64)
    return np.unique(pairs, axis=0) if len(pairs) else pairs


def near(
    keys: np.ndarray,
    rank: np.ndarray,
    live: np.ndarray,
    threshold: float,
    texts_of: Callable[[np.ndarray], list[str]],
) -> tuple[np.ndarray, int]:
    """For each record [N] the kept record it nearly repeats, or -1; and the number of pairs verified.

    `texts_of(records)` returns the texts of ascending record numbers. Memory: the shingles of those
    records that have a candidate.
    """
    result = np.full(len(keys), -1)
    pairs = candidates(keys, rank, live)
    if not len(pairs):
        return result, 0
    records = np.unique(pairs)
    flat, offsets = shingles.shingles(texts_of(records))
    sets = shingles.sets(flat, offsets, np.arange(len(records)))
    left, right = np.searchsorted(records, pairs[:, 0]), np.searchsorted(records, pairs[:, 1])
    common = shingles.shared(sets, left, right, len(records))
    size = shingles.sizes(sets, len(records))
    similar = common >= threshold * (size[left] + size[right] - common)
    kept = pairs[similar]
    # In the order of ids, a record goes when it resembles one that stays: what goes is always
    # verified against what stays, and chains of small steps do not eat the corpus.
    for earlier, later in kept[np.lexsort((rank[kept[:, 0]], rank[kept[:, 1]]))].tolist():
        if result[later] < 0 and result[earlier] < 0:
            result[later] = earlier
    return result, len(pairs)
