"""Which tokens run in the next step: prompts and answers together, in the order they came, within the cache's room.

A step has a budget of tokens. Answers under way come first (they need one token, or a few drafted ones), prompts
share the rest and are cut where it ends, so a long prompt never stops the others. When no page is left, the request
that came last gives up its pages and waits; what it wrote is kept and computed again later, to the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from shenhong.engine.cache import Pages, chain


@dataclass(eq=False)
class Sequence:
    """A text being continued: ``tokens`` is prompt and answer, the first ``computed`` of them are in the cache."""

    id: int
    tokens: list[int]
    priority: int = 0
    shareable: bool = True
    root: bytes = b""  # what stands before the first page's name: the owner
    computed: int = 0
    cached: int = 0  # of the prompt, found in the cache when it first ran
    table: list[int] = field(default_factory=list)
    names: list[bytes] = field(default_factory=list)  # of its full pages
    drafts: list[int] = field(default_factory=list)  # guesses behind ``tokens``
    followed: int = 0  # tokens the drafting layer has seen
    started: bool = False

    @property
    def pending(self) -> int:
        return len(self.tokens) - self.computed

    @property
    def rank(self) -> tuple[int, int]:
        return (-self.priority, self.id)


class Part(NamedTuple):
    """The next ``length`` tokens of a sequence; ``drafts`` of them are guesses."""

    sequence: Sequence
    length: int
    drafts: int

    @property
    def laid(self) -> tuple[list[int], int, list[int]]:
        """What the model's batch wants to know of it."""
        s = self.sequence
        return (s.tokens[s.computed :] + s.drafts)[: self.length], s.computed, s.table

    @property
    def whole(self) -> bool:
        """Whether it reaches its sequence's end, so that the next token can be drawn."""
        return self.length - self.drafts == self.sequence.pending


class Scheduler:
    def __init__(self, pages: Pages, page: int, step_tokens: int, most_running: int) -> None:
        self.pages, self.page = pages, page
        self.step_tokens, self.most_running = step_tokens, most_running
        self.running: list[Sequence] = []  # both by rank
        self.waiting: list[Sequence] = []
        self.preemptions = self.prefix_hits = 0

    def __iter__(self) -> Iterator[Sequence]:
        yield from self.running
        yield from self.waiting

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)
        self.waiting.sort(key=lambda s: s.rank)

    def remove(self, sequence: Sequence) -> None:
        """Ends a sequence; its pages are free at once."""
        (self.running if sequence in self.running else self.waiting).remove(sequence)
        self.release(sequence)

    def release(self, sequence: Sequence) -> None:
        """Gives its pages back; what it held has to be computed again."""
        for page in reversed(sequence.table):
            self.pages.release(page)
        sequence.table, sequence.names, sequence.drafts = [], [], []
        sequence.computed = sequence.followed = 0

    # ---------------------------------------------------------------- a step

    def plan(self) -> list[Part]:
        """The next step, with room for all of it."""
        budget = self.step_tokens
        parts: dict[int, Part] = {}
        preempted = False
        # One token to come: an answer. More: a prompt, or an answer that lost its pages.
        for sequence in sorted(self.running, key=lambda s: (s.pending > 1, s.rank)):
            if sequence not in self.running or budget <= 0:
                continue
            drafts = len(sequence.drafts) if sequence.pending == 1 else 0
            count = min(sequence.pending + drafts, budget)
            drafts = max(0, count - sequence.pending)
            while not self.allocate(sequence, count):
                victim = max(self.running, key=lambda s: s.rank)
                self._preempt(victim)
                preempted = True
                if lost := parts.pop(victim.id, None):
                    budget += lost.length
                if victim is sequence:
                    break
            else:
                parts[sequence.id] = Part(sequence, count, drafts)
                budget -= count
        while self.waiting and budget > 0 and not preempted:
            sequence = self.waiting[0]
            if len(self.running) >= self.most_running:
                break
            self._share(sequence)
            count = min(sequence.pending, budget)
            # A page for each that runs: who is let in shall not have to leave at once.
            if not self.allocate(sequence, count) or self.pages.free < len(self.running):
                self.release(sequence)
                break
            self._start(sequence)
            parts[sequence.id] = Part(sequence, count, 0)
            budget -= count
        return list(parts.values())

    def done(self, sequence: Sequence, computed: int) -> None:
        """``computed`` more tokens are in the cache."""
        sequence.computed += computed
        if not sequence.shareable:
            return
        while (len(sequence.names) + 1) * self.page <= sequence.computed:
            number = len(sequence.names)
            self._name(sequence, number)
            self.pages.name(sequence.table[number], sequence.names[number])

    def _name(self, sequence: Sequence, number: int) -> None:
        before = sequence.names[-1] if sequence.names else sequence.root
        tokens = sequence.tokens[number * self.page : (number + 1) * self.page]
        sequence.names.append(chain(before, tokens))

    def _start(self, sequence: Sequence) -> None:
        self.waiting.remove(sequence)
        self.running.append(sequence)
        self.running.sort(key=lambda s: s.rank)
        if not sequence.started:
            sequence.started, sequence.cached = True, sequence.computed
            self.prefix_hits += sequence.computed

    def _share(self, sequence: Sequence) -> None:
        """Takes over pages that hold the beginning of its text; at least one token is left to compute."""
        if not sequence.shareable:
            return
        for number in range((len(sequence.tokens) - 1) // self.page):
            self._name(sequence, number)
            page = self.pages.find(sequence.names[number])
            if page is None:
                sequence.names.pop()
                break
            self.pages.hold(page)
            sequence.table.append(page)
            sequence.computed += self.page
        sequence.followed = sequence.computed

    def allocate(self, sequence: Sequence, count: int) -> bool:
        """Gives the sequence pages for ``count`` more tokens, all or none."""
        wanted = -(-(sequence.computed + count) // self.page) - len(sequence.table)
        if wanted > self.pages.free:
            return False
        for _ in range(wanted):
            sequence.table.append(self.pages.take())
        return True

    def extend(self, parts: list[Part], counts: list[int]) -> bool:
        """Room for so many tokens behind each part but the last of them, which the next step computes; all or none."""
        more = [
            (part.sequence, part.length + count - 1)
            for part, count in zip(parts, counts, strict=True)
        ]
        wanted = sum(
            max(0, -(-(s.computed + count) // self.page) - len(s.table)) for s, count in more
        )
        return wanted <= self.pages.free and all(self.allocate(s, count) for s, count in more)

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.release(sequence)
        self.add(sequence)
        self.preemptions += 1
