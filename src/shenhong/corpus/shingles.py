"""Texts as sets of shingles: runs of 3 characters for Chinese, of 5 words otherwise.

Daft's and most others' MinHash split on white space, so two Chinese texts one character apart would
share nothing. Punctuation and spaces are left out and letters are lower case, so that an edition's punctuation
makes no difference. All of it is arithmetic on one flat array of code points, not a loop over texts.

Legend: N texts, U units (characters or words) of all texts, S shingles of all texts.
"""

from __future__ import annotations

import functools
import unicodedata

import numpy as np

CHARACTERS, WORDS = 3, 5
_GROUP = 2_000_000  # characters whose shingles are computed at a time
_CHINESE_SHARE = 0.3  # of a text's letters: from here on it is compared by characters

_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_SET_BITS = np.uint64(
    40
)  # of a hash, kept in sets of shingles beside the 24 bits of the text's number


def mix(x: np.ndarray) -> np.ndarray:
    """splitmix64: every output bit depends on every input bit."""
    x = x.astype(np.uint64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@functools.cache
def _letters() -> np.ndarray:
    """For every code point: whether it is a letter, a mark on one, a digit or an ideograph.

    Vowels of Indic scripts, of Thai and of pointed Hebrew and Arabic are such marks: without them words would be cut.
    """
    written = (chr(c).isalnum() or unicodedata.category(chr(c))[0] == "M" for c in range(0x110000))
    return np.fromiter(written, bool, 0x110000)


def _codes(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Code points [U] of all texts in lower case, and the number [U] of the text of each."""
    lowered = [text.lower() for text in texts]
    codes = np.frombuffer("".join(lowered).encode("utf-32-le"), np.uint32)
    text_of = np.repeat(np.arange(len(texts)), [len(text) for text in lowered])
    return codes, text_of


def _windows(units_U: np.ndarray, text_U: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of all runs of `size` units within one text, and the text of each.

    A text of fewer units has one run: all of it.
    """
    if not len(units_U):
        return np.empty(0, np.uint64), np.empty(0, np.int64)
    first = np.flatnonzero(np.r_[True, text_U[1:] != text_U[:-1]])
    counts = np.diff(np.r_[first, len(text_U)])
    # Past the end of its text a run holds zeros, so one code serves short texts too.
    position = np.arange(len(units_U)) - np.repeat(first, counts)
    left = np.repeat(counts, counts) - position
    hashes = np.zeros(len(units_U), np.uint64)
    for offset in range(size):
        shifted = np.zeros(len(units_U), np.uint64)
        shifted[: max(0, len(units_U) - offset)] = units_U[offset:]
        shifted[left <= offset] = 0
        hashes = hashes * _MULTIPLIER + shifted
    keep = (left >= size) | (position == 0)
    return mix(hashes[keep]), text_U[keep]


def _words(
    codes_U: np.ndarray, text_U: np.ndarray, letter_U: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """A hash for each run of letters, and the text of each."""
    starts = letter_U & np.r_[True, ~letter_U[:-1] | (text_U[1:] != text_U[:-1])]
    codes, texts, starts = codes_U[letter_U], text_U[letter_U], starts[letter_U]
    first = np.flatnonzero(starts)
    if not len(first):
        return np.empty(0, np.uint64), np.empty(0, np.int64)
    return _polynomial(mix(codes), first), texts[first]


def _polynomial(values: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Order-sensitive hash of each segment that starts at `first`: sum of values times powers."""
    counts = np.diff(np.r_[first, len(values)])
    powers = np.cumprod(np.full(max(int(counts.max()), 1), _MULTIPLIER, np.uint64))
    position = np.arange(len(values)) - np.repeat(first, counts)
    return np.add.reduceat(values * powers[position], first)


def shingles(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Shingle hashes [S] of all texts in order, and offsets [N+1]: text n has [offsets[n], offsets[n+1])."""
    groups: list[list[str]] = [[]]
    size = 0
    for text in texts:  # the arrays of one group are some 100 bytes a character
        if size > _GROUP:
            groups.append([])
            size = 0
        groups[-1].append(text)
        size += len(text)
    parts = [_shingles(group) for group in groups]
    counts = np.concatenate([np.diff(offsets) for _, offsets in parts])
    return np.concatenate([hashes for hashes, _ in parts]), np.concatenate([[0], np.cumsum(counts)])


def _shingles(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    codes, text_of = _codes(texts)
    letter = _letters()[codes]
    chinese = letter & (((codes >= 0x3400) & (codes <= 0x9FFF)) | (codes >= 0x20000))
    count = len(texts)
    letters_N = np.bincount(text_of[letter], minlength=count)
    chinese_N = np.bincount(text_of[chinese], minlength=count)
    by_character = (chinese_N >= _CHINESE_SHARE * letters_N)[text_of]
    pick = letter & by_character
    characters = _windows(mix(codes[pick]), text_of[pick], CHARACTERS)
    rest = ~by_character
    word_hashes, word_text = _words(codes[rest], text_of[rest], letter[rest])
    words = _windows(word_hashes, word_text, WORDS)
    hashes = np.concatenate([characters[0], words[0]])
    owner = np.concatenate([characters[1], words[1]])
    order = np.argsort(owner, kind="stable")
    offsets = np.concatenate([[0], np.cumsum(np.bincount(owner, minlength=count))])
    return hashes[order], offsets


def digests(texts: list[str]) -> np.ndarray:
    """64-bit hash [N] of each text's letters; equal for texts that differ in punctuation and spaces only."""
    codes, text_of = _codes(texts)
    letter = _letters()[codes]
    codes, text_of = codes[letter], text_of[letter]
    result = np.zeros(len(texts), np.uint64)
    first = np.flatnonzero(np.r_[True, text_of[1:] != text_of[:-1]]) if len(codes) else codes
    if len(first):
        result[text_of[first]] = mix(_polynomial(mix(codes), first))
    return result


def sets(hashes: np.ndarray, offsets: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Sorted keys (number << 40 | 40 bits of the hash), each once: the texts' shingle sets in one array.

    `numbers` [N] names each text, below 2^24, in ascending order.
    """
    owner = np.repeat(numbers.astype(np.uint64), np.diff(offsets))
    return np.unique((owner << _SET_BITS) | (hashes >> np.uint64(24)))


def sizes(keys: np.ndarray, count: int) -> np.ndarray:
    """Number of shingles [count] in each of the sets numbered 0..count-1."""
    bounds = np.arange(count + 1, dtype=np.uint64) << _SET_BITS
    return np.diff(np.searchsorted(keys, bounds))


def shared(keys: np.ndarray, left: np.ndarray, right: np.ndarray, count: int) -> np.ndarray:
    """Number of shingles common to the sets left[i] and right[i], for each i; sets 0..count-1."""
    bounds = np.searchsorted(keys, np.arange(count + 1, dtype=np.uint64) << _SET_BITS)
    result = np.zeros(len(left), np.int64)
    step = 1 << 15  # pairs at a time, to bound memory
    for start in range(0, len(left), step):
        a, b = left[start : start + step], right[start : start + step]
        lengths = bounds[a + 1] - bounds[a]
        pair = np.repeat(np.arange(len(a)), lengths)
        within = np.arange(len(pair)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        hashes = keys[bounds[a][pair] + within] & ((np.uint64(1) << _SET_BITS) - np.uint64(1))
        wanted = (b[pair].astype(np.uint64) << _SET_BITS) | hashes
        at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        result[start : start + step] = np.bincount(pair[keys[at] == wanted], minlength=len(a))
    return result
