"""Who holds which page of the latent cache, and which pages hold a text that can be used again.

A page that is full gets a name: the hash of its tokens and of the name of the page before it, or of whose text it is
before the first, so equal names mean equal text of one owner from the very beginning. A request whose prompt begins
with known names takes those pages over instead of computing them. A named page that nobody holds stays until its room
is needed, the longest unused first.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np

from shenhong.numerics.cpu.decode import Batch


def chain(before: bytes, tokens: Sequence[int]) -> bytes:
    """The name of a full page."""
    return hashlib.blake2b(before + np.asarray(tokens, np.int32).tobytes(), digest_size=16).digest()


class Pages:
    """``count`` pages, each held by any number of sequences."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.holders = [0] * count
        self.blank = list(range(count))[::-1]  # a stack: pages whose memory was touched come first
        self.idle: OrderedDict[int, None] = OrderedDict()  # named, held by nobody; oldest first
        self.name_of: dict[int, bytes] = {}
        self.page_of: dict[bytes, int] = {}

    @property
    def free(self) -> int:
        """Pages that can be taken, idle ones among them."""
        return len(self.blank) + len(self.idle)

    def take(self) -> int:
        """A page for writing."""
        if self.blank:
            page = self.blank.pop()
        else:
            page, _ = self.idle.popitem(last=False)
            del self.page_of[self.name_of.pop(page)]
        self.holders[page] = 1
        return page

    def find(self, name: bytes) -> int | None:
        return self.page_of.get(name)

    def hold(self, page: int) -> None:
        """One more sequence reads this named page."""
        self.idle.pop(page, None)
        self.holders[page] += 1

    def name(self, page: int, name: bytes) -> None:
        """Says what a full page holds. Of two pages with one text the first stays the one that is found."""
        if name not in self.page_of and page not in self.name_of:
            self.page_of[name], self.name_of[page] = page, name

    def forget(self) -> None:
        """No page holds a text that can be used again: what computed them has changed."""
        self.blank += self.idle
        self.idle.clear()
        self.name_of.clear()
        self.page_of.clear()

    def release(self, page: int) -> None:
        self.holders[page] -= 1
        assert self.holders[page] >= 0
        if not self.holders[page]:
            if page in self.name_of:
                self.idle[page] = None
            else:
                self.blank.append(page)


def lay_out(parts: Iterable[tuple[list[int], int, list[int]]]) -> Batch:
    """The model's batch of (tokens, position of the first, pages of the sequence) parts."""
    tokens: list[int] = []
    positions: list[int] = []
    starts = [0]
    tables: list[list[int]] = []
    for part, first, pages in parts:
        tokens += part
        positions += range(first, first + len(part))
        starts.append(len(tokens))
        tables.append(pages)
    width = max(map(len, tables))
    return Batch(
        np.array(tokens, np.int64),
        np.array(positions, np.int32),
        np.array(starts, np.int32),
        np.array([pages + [0] * (width - len(pages)) for pages in tables], np.int32),
    )
