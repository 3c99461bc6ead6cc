"""A sign of life while much text passes: how far it is, how fast it goes, how long it will take."""

from __future__ import annotations

import time
from collections.abc import Callable

EVERY = 10.0  # seconds


class Progress:
    def __init__(self, say: Callable[[str], None], what: str) -> None:
        self.say, self.what = say, what
        self.started = self.said = time.monotonic()

    def at(self, share: float, records: int) -> None:
        """This share of all, so many records, is done; says so now and then."""
        now = time.monotonic()
        if now - self.said < EVERY:
            return
        self.said, passed = now, max(now - self.started, 1e-9)
        left = passed * (1 / min(max(share, 1e-9), 1) - 1)
        self.say(
            f"{self.what}: {records:,} records, {share:.0%} "
            f"({records / passed:,.0f} records/s, about {left:,.0f} s left)"
        )
