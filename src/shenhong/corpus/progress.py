"""A sign of life while much is read: how far it is, how fast it goes, how long it will take."""

from __future__ import annotations

import time
from collections.abc import Callable

EVERY = 10.0  # seconds


class Progress:
    def __init__(self, say: Callable[[str], None], total: int) -> None:
        """``total``: bytes of all files, as they lie on the disk."""
        self.say, self.total = say, total
        self.started = self.said = time.monotonic()

    def at(self, done: float, records: int) -> None:
        """So many bytes and records were read; says so now and then."""
        now = time.monotonic()
        if now - self.said < EVERY:
            return
        self.said, passed = now, max(now - self.started, 1e-9)
        left = passed * (self.total - done) / max(done, 1)
        self.say(
            f"read {records:,} records, {done / 1e6:,.0f} of {self.total / 1e6:,.0f} MB "
            f"({records / passed:,.0f} records/s, about {max(left, 0):,.0f} s left)"
        )
