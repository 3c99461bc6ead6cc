"""Interpolated modified Kneser-Ney n-grams over characters: the yardstick beside the model.

Chen & Goodman, "An empirical study of smoothing techniques for language modeling" (1998), with the
handling of text starts that KenLM uses (Heafield et al. 2013). For an n-gram h·w with context h:

    P_n(w | h) = (a(hw) - D_n(a(hw))) / A(h)  +  g(h) * P_{n-1}(w | h without its first character)
    A(h)       = sum_w a(hw)
    g(h)       = (D1 N1(h) + D2 N2(h) + D3 N3(h)) / A(h)      N_k(h): followers w with a(hw) = k (3: >= 3)

where a() is the count for the highest order and for n-grams that begin with the start symbol, and
the number of different left neighbours otherwise. P_0 is uniform over the vocabulary: the
characters of the training text, the end symbol and one unknown symbol, so the probabilities of the
vocabulary sum to 1 after any context. An unknown character costs only what the one unknown symbol
costs, which favours the n-gram. D1, D2, D3 follow from the counts of counts n1 … n4:

    Y = n1 / (n1 + 2 n2),  Dk = k - (k + 1) Y n_{k+1} / n_k

A text is `start c1 … cT end`; no n-gram crosses texts, so early characters have short contexts.

Each order's n-grams are the sorted 64-bit numbers `id of the first n-1 characters * V + last
character`, and an n-gram's id is its rank. So building an order is one sort, and looking up is one
binary search; ten million characters take a few seconds.

Legend: P positions in the joined texts, G n-grams of an order (H: of the next), C contexts of an
order (the n-grams of the order below), V vocabulary, n order.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Ids = NDArray[np.int32]
Floats = NDArray[np.float64]

START, END, UNKNOWN, FIRST_CHARACTER = 0, 1, 2, 3
NONE = -1
_CODE_POINTS = 0x110000


@dataclass(frozen=True)
class _Order:
    """All n-grams of one order; contexts are n-grams of the order below (order 1: one context)."""

    keys_G: NDArray[np.uint64]  # sorted
    share_G: NDArray[np.float32]  # (a - D(a)) / A(context)
    backoff_C: NDArray[np.float32]  # g(context), by the context's id


class NGram:
    """A modified Kneser-Ney n-gram model of the characters of some texts.

    texts: at least one; order >= 1. With order 1 it is the smoothed unigram model.
    """

    def __init__(self, texts: Iterable[str], order: int = 5) -> None:
        if order < 1:
            raise ValueError(f"order must be at least 1, got {order}")
        texts = list(texts)
        if not texts:
            raise ValueError("an n-gram model needs at least one text")
        self.order = order
        seen = np.zeros(_CODE_POINTS, dtype=bool)
        seen[_code_points(texts)] = True
        characters = np.flatnonzero(seen)
        self.vocabulary = FIRST_CHARACTER + len(characters)
        self.characters = [chr(c) for c in characters]
        self._ids = np.full(_CODE_POINTS, UNKNOWN, dtype=np.int32)
        self._ids[characters] = np.arange(FIRST_CHARACTER, self.vocabulary, dtype=np.int32)
        self._orders = self._count(*self._encode(texts))

    @property
    def outcomes(self) -> int:
        """Size of the vocabulary that probabilities sum over (everything but the start)."""
        return self.vocabulary - 1

    def unknown_share(self, texts: Iterable[str]) -> float:
        """Share of the texts' characters that the training text does not have."""
        points = _code_points(list(texts))
        return float((self._ids[points] == UNKNOWN).mean()) if len(points) else 0.0

    def _encode(self, texts: list[str]) -> tuple[Ids, Ids]:
        """ids_P of `start text end` for all texts, and place_P, the position inside each."""
        lengths = np.fromiter(map(len, texts), dtype=np.int64, count=len(texts))
        stops = np.cumsum(lengths + 2)
        total = int(stops[-1])
        ids_P = np.empty(total, dtype=np.int32)
        inside = np.ones(total, dtype=bool)
        starts = stops - lengths - 2
        inside[starts] = inside[stops - 1] = False
        ids_P[inside] = self._ids[_code_points(texts)]
        ids_P[starts], ids_P[stops - 1] = START, END
        place_P = np.arange(total, dtype=np.int32)
        place_P -= np.repeat(starts, lengths + 2).astype(np.int32)
        return ids_P, place_P

    def _count(self, ids_P: Ids, place_P: Ids) -> list[_Order]:
        """Builds all orders, lowest first; the adjusted counts of one need the order above it."""
        # Order 1 needs no sort: ids are the keys. The start symbol is context, never an outcome.
        gram_P = ids_P  # id of the n-gram that ends at P
        keys_G = np.arange(self.vocabulary, dtype=np.uint64)
        context_G = np.zeros(self.vocabulary, dtype=np.int32)
        counts_G = np.bincount(ids_P, minlength=self.vocabulary).astype(np.int32)
        counts_G[START] = 0
        begins_G = keys_G == START
        contexts = 1
        orders = []
        for n in range(2, self.order + 1):
            above_P, keys_H, ends_H, counts_H = self._extend(ids_P, gram_P, place_P < n - 1)
            # Without its first character an n-gram is the (n-1)-gram that ends where it ends.
            neighbours_G = np.bincount(gram_P[ends_H], minlength=len(keys_G)).astype(np.int32)
            adjusted_G = np.where(begins_G, counts_G, neighbours_G)
            orders.append(_Order(keys_G, *_discounted(adjusted_G, context_G, contexts)))
            contexts = len(keys_G)
            context_G = gram_P[ends_H - 1]
            begins_G = place_P[ends_H] == n - 1
            gram_P, keys_G, counts_G = above_P, keys_H, counts_H
        orders.append(_Order(keys_G, *_discounted(counts_G, context_G, contexts)))
        return orders

    def _extend(
        self, ids_P: Ids, gram_P: Ids, short_P: NDArray[np.bool_]
    ) -> tuple[Ids, NDArray[np.uint64], Ids, Ids]:
        """From the (n-1)-gram that ends at each position to the n-grams.

        short_P: the positions too near their text's start. Returns: above_P, the id of the n-gram
        that ends at P (of no meaning where short); the sorted keys; of each n-gram one position
        where it ends; and its count.
        """
        key_P = np.zeros(len(ids_P), dtype=np.uint64)
        key_P[1:] = gram_P[:-1]
        key_P *= np.uint64(self.vocabulary)
        key_P += ids_P.astype(np.uint64)
        # Positions with no n-gram sort to the end, where they are cut off.
        bound = max(len(ids_P), self.vocabulary) * self.vocabulary
        key_P[short_P] = np.uint64(bound)
        kept = len(key_P) - int(np.count_nonzero(short_P))
        key_P, order_P = _sort(key_P, bound)
        new = np.empty(len(key_P), dtype=bool)
        new[0] = True
        np.not_equal(key_P[1:], key_P[:-1], out=new[1:])
        first = np.flatnonzero(new[:kept]).astype(np.int32)
        keys_G = key_P[first]
        del key_P
        rank = np.cumsum(new, dtype=np.int32)
        rank -= 1
        above_P = np.empty(len(ids_P), dtype=np.int32)
        above_P[order_P] = rank
        counts = np.empty_like(first)
        np.subtract(first[1:], first[:-1], out=counts[:-1])
        counts[-1:] = kept - first[-1:]
        return above_P, keys_G, order_P[first], counts

    def log2_probabilities(self, texts: Iterable[str]) -> tuple[Floats, Ints]:
        """log2 P of every character and end symbol of the texts, joined, and each text's count.

        Returns: log2_P, and lengths (characters + 1 for the end) so that np.split can take it apart.
        """
        texts = list(texts)
        if not texts:
            return np.zeros(0), np.zeros(0, dtype=np.int64)
        ids_P, place_P = self._encode(texts)
        probability_P = np.full(len(ids_P), 1.0 / self.outcomes)
        gram_P = np.zeros(len(ids_P), dtype=np.int64)  # the (n-1)-gram that ends at P, or NONE
        for n, order in enumerate(self._orders, 1):
            context_P = np.empty_like(gram_P)
            context_P[0] = NONE
            context_P[1:] = gram_P[:-1]
            if n == 1:
                context_P[:] = 0
            else:
                context_P[place_P < n - 1] = NONE
            gram_P = np.full(len(ids_P), NONE, dtype=np.int64)
            at = np.flatnonzero(context_P != NONE)
            context = context_P[at]
            gram = _find(
                order.keys_G,
                context.astype(np.uint64) * np.uint64(self.vocabulary)
                + ids_P[at].astype(np.uint64),
            )
            gram_P[at] = gram
            share = np.where(gram == NONE, 0.0, order.share_G[gram])
            probability_P[at] = share + order.backoff_C[context] * probability_P[at]
        outcome = place_P > 0
        lengths = np.fromiter((len(t) + 1 for t in texts), dtype=np.int64, count=len(texts))
        return np.log2(probability_P[outcome]), lengths

    def bits(self, texts: Iterable[str]) -> Floats:
        """Bits of each text, its end included."""
        log2, lengths = self.log2_probabilities(texts)
        return -np.add.reduceat(log2, np.cumsum(lengths) - lengths) if len(lengths) else log2

    def distribution(self, context: str) -> tuple[list[str], Floats]:
        """P(next | start context) for the whole vocabulary: characters, then "" (the end), then the
        unknown symbol, named U+FFFF (which is no character)."""
        outcomes = [*self.characters, "", "\uffff"]
        log2, lengths = self.log2_probabilities([context + c for c in outcomes])
        last = np.cumsum(lengths) - 1
        # After a character comes the end symbol; the character asked for stands before it.
        return outcomes, np.exp2(log2[last - np.array([bool(c) for c in outcomes])])

    def bits_per_character(self, texts: Iterable[str]) -> float:
        """Bits of the texts, ends included, over their characters, ends not counted."""
        texts = list(texts)
        return float(self.bits(texts).sum() / max(1, sum(map(len, texts))))


def _discounted(
    adjusted_G: Ids, context_G: Ids, contexts: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Shares and back-off weights of one order from its (adjusted) counts."""
    discount = np.array([0.0, *discounts(adjusted_G)], dtype=np.float32)
    held_G = discount[np.minimum(adjusted_G, 3)]
    total_C = np.bincount(context_G, weights=adjusted_G, minlength=contexts)
    held_C = np.bincount(context_G, weights=held_G, minlength=contexts)
    # A context that nothing follows leaves everything to the order below.
    followed_C = total_C > 0
    total_C[~followed_C] = 1.0
    backoff_C = np.where(followed_C, held_C / total_C, 1.0).astype(np.float32)
    share_G = (adjusted_G - held_G) / total_C.astype(np.float32)[context_G]
    return share_G.astype(np.float32), backoff_C


def discounts(counts: NDArray[np.integer]) -> tuple[float, float, float]:
    """D1, D2, D3+ (Chen & Goodman 1998, eq. 26) of one order's counts.

    Texts too small or too regular to have counts of counts get 1/2, 1, 3/2, as KenLM's fallback.
    """
    n1, n2, n3, n4 = (int((counts == k).sum()) for k in (1, 2, 3, 4))
    if min(n1, n2, n3, n4) == 0:
        return 0.5, 1.0, 1.5
    y = n1 / (n1 + 2 * n2)
    d1, d2, d3 = 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3
    if not (0 < d1 <= 1 and 0 < d2 <= 2 and 0 < d3 <= 3):
        return 0.5, 1.0, 1.5
    return d1, d2, d3


def _sort(key_P: NDArray[np.uint64], bound: int) -> tuple[NDArray[np.uint64], Ids]:
    """The keys (at most `bound`) in order, and the positions they come from."""
    shift = len(key_P).bit_length()
    if bound.bit_length() + shift > 64:
        wide_P = np.argsort(key_P)
        return key_P[wide_P], wide_P.astype(np.int32)
    # Position and key fit one number: plain sorting is several times faster than argsort.
    key_P <<= np.uint64(shift)
    key_P |= np.arange(len(key_P), dtype=np.uint64)
    key_P.sort()
    order_P = (key_P & np.uint64((1 << shift) - 1)).astype(np.int32)
    key_P >>= np.uint64(shift)
    return key_P, order_P


def _find(keys_G: NDArray[np.uint64], wanted: NDArray[np.uint64]) -> Ints:
    """Ranks of the wanted keys, NONE where absent."""
    at = np.searchsorted(keys_G, wanted)
    at = np.minimum(at, len(keys_G) - 1)
    return np.where(keys_G[at] == wanted, at, NONE)


def _code_points(texts: list[str]) -> NDArray[np.uint32]:
    return np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
