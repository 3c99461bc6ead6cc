"""How much one caller may have under way at the same time, so that slow readers cannot gather what others need."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from shenhong.serve.http.faults import Fault


class AtOnce:
    """`most` of something for each owner. One alone is let in whatever it costs."""

    def __init__(self, most: int, what: str) -> None:
        self.most, self.what = most, what
        self._used: dict[str, int] = {}

    @contextlib.contextmanager
    def place(self, owner: str, cost: int = 1) -> Iterator[None]:
        """Held while the block runs. Fault: 429."""
        used = self._used.get(owner, 0)
        if used and used + cost > self.most:
            raise Fault(
                429,
                f"too many {self.what} at once with one key; ask again when one has ended",
                code="too_many_at_once",
                retry_after=1,
            )
        self._used[owner] = used + cost
        try:
            yield
        finally:
            self._used[owner] -= cost
            if not self._used[owner]:
                del self._used[owner]
