"""Wrong keys are limited by the address they come from, without locking the right one out.

Past so many wrong keys a minute, every key from that address that has not been right there before is looked at in its
turn, one every few seconds, and answered no sooner: whether it is right or wrong cannot be told by the time it takes.
"""

from __future__ import annotations

import asyncio
import ipaddress
import math
import time
from collections.abc import Awaitable, Callable
from typing import Any

from shenhong.serve.http.faults import Fault
from shenhong.serve.http.limits import Bucket

PER_MINUTE = 20
LONGEST_WAIT = 30.0  # seconds; who would wait longer is refused
PROVEN_SECONDS = 3600.0  # since a key was last right from an address
MOST_PLACES = 4096  # remembered at once


class Guesses:
    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.clock, self.sleep = clock, sleep
        self._left: dict[str, Bucket] = {}  # wrong keys, by place
        self._proven: dict[tuple[str, str], float] = {}  # when last, by owner and place

    async def count(self, owner: str | None, address: str) -> None:
        """One look at a key: the owner's, or a wrong one (None). It may take a while. Fault: 429."""
        place, now = _place(address), self.clock()
        if owner is not None and self._proven.get((owner, place), -math.inf) > now - PROVEN_SECONDS:
            _remember(self._proven, (owner, place), now)
            return
        bucket = self._left.get(place) or Bucket(PER_MINUTE, now)
        wait = bucket.wait(now, 1)
        if wait > LONGEST_WAIT:
            raise Fault(
                429,
                "too many wrong keys from this address; wait a minute",
                code="too_many_logins",
                retry_after=wait - LONGEST_WAIT,
            )
        if wait or owner is None:
            bucket.take(1)
            _remember(self._left, place, bucket)
        if wait:
            await self.sleep(wait)
        if owner is not None:
            _remember(self._proven, (owner, place), self.clock())


def _place(address: str) -> str:
    """Whoever has one IPv6 address has its whole /64."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(found, ipaddress.IPv4Address):
        return str(found)
    return str(found.ipv4_mapped or ipaddress.ip_network((int(found), 64), strict=False))


def _remember(table: dict[Any, Any], key: Any, value: Any) -> None:
    """As the newest; the oldest makes room."""
    table.pop(key, None)
    table[key] = value
    if len(table) > MOST_PLACES:
        del table[next(iter(table))]
