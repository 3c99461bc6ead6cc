"""How much one caller may ask for: how deep a body may nest, and requests and tokens a minute for each key."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from decimal import Decimal
from typing import Any, cast

from shenhong.serve.http.faults import Fault
from shenhong.serve.settings import Limits

MOST_MULTIPLE = 20_000
LOGIN_BYTES, NAMES_BYTES = 4096, 16_384  # of bodies that hold a key, or names and titles
# It ends at the end of the body at the latest: what failed would be looked through again from every later quote.
_STRINGS = re.compile(rb'"(?:[^"\\]|\\.)*+(?:"|\\?\Z)', re.DOTALL)
_BRACKETS = re.compile(rb"[\[{]+|[\]}]+")


def body_limit(path: str, limits: Limits) -> int:
    """Bytes of a body that this address takes; only texts are long."""
    if path == "/api/chats/import":
        return limits.max_import_bytes
    if path.startswith("/api/") and not path.endswith(("/turns", "/texts")):
        return min(LOGIN_BYTES if path == "/api/login" else NAMES_BYTES, limits.max_body_bytes)
    return limits.max_body_bytes


def depth_of(body: bytes) -> int:
    """How deep brackets nest outside strings, in linear time and without parsing (a parser would recurse)."""
    deepest = depth = 0
    for run in _BRACKETS.findall(_STRINGS.sub(b"", body)):
        depth += len(run) if run[:1] in b"[{" else -len(run)
        deepest = max(deepest, depth)
    return deepest


def depth_of_value(value: Any) -> int:
    """The same of a parsed value."""
    depth, level = 0, [value]
    while level:
        depth += any(isinstance(item, dict | list) for item in level)
        level = [
            child
            for item in level
            if isinstance(item, dict | list)
            for child in (item.values() if isinstance(item, dict) else item)
        ]
    return depth


def multiples_fit(schema: Any) -> bool:
    """Whether the multipleOf of a schema, which may come to hold together, are small enough to compile in a moment.

    Compiling takes a state for every remainder: a tenth of a second for 20 000, half a minute for 10 000 000.
    """
    steps: set[Decimal] = set()
    level = [schema]
    while level:
        item = level.pop()
        if isinstance(item, dict):
            step = item.get("multipleOf")
            if isinstance(step, int | float) and not isinstance(step, bool) and step > 0:
                steps.add(Decimal(str(step)))
            level += item.values()
        elif isinstance(item, list):
            level += item
    unit = min((cast(int, step.as_tuple().exponent) for step in steps), default=0)
    if any(step.adjusted() - unit > 20 for step in steps):
        return False  # too long to be written out
    whole = [int(step.scaleb(-unit)) for step in steps]
    least = 1  # of what stays of the multiple without its tens; it only grows, so many steps are not multiplied out
    for step in whole:
        least = math.lcm(least, _without(2, _without(5, step)))
        if least > MOST_MULTIPLE:
            return False
    common = math.lcm(*whole)
    while common % 10 == 0:  # a zero at the end costs one state
        common //= 10
    return common <= MOST_MULTIPLE


def _without(prime: int, number: int) -> int:
    while number % prime == 0:
        number //= prime
    return number


class Bucket:
    """A budget that refills evenly, `per_minute` a minute, and holds at most one minute's worth."""

    def __init__(self, per_minute: float, now: float) -> None:
        self.per_minute, self.level, self.seen = per_minute, per_minute, now

    def wait(self, now: float, cost: float) -> float:
        """Seconds until `cost` can be paid; 0: now. A cost beyond the whole budget needs a full bucket."""
        refilled = self.level + (now - self.seen) * self.per_minute / 60
        self.level, self.seen = min(self.per_minute, refilled), now
        missing = min(cost, self.per_minute) - self.level
        return max(0.0, missing * 60 / self.per_minute)

    def take(self, cost: float) -> None:
        """May leave a debt: what is written is only known afterwards."""
        self.level -= cost


class Meter:
    """Requests and tokens of each key. `on`: without keys there is one local user, who is only bounded by the queue."""

    def __init__(
        self, limits: Limits, on: bool = True, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.limits, self.on, self.clock = limits, on, clock
        self._requests: dict[str, Bucket] = {}
        self._tokens: dict[str, Bucket] = {}

    def _bucket(self, buckets: dict[str, Bucket], owner: str, per_minute: float) -> Bucket:
        if owner not in buckets:
            buckets[owner] = Bucket(per_minute, self.clock())
        return buckets[owner]

    def request(self, owner: str) -> None:
        """Count one request. Fault: 429 with Retry-After."""
        if not self.on:
            return
        limit = self.limits.requests_per_minute
        bucket = self._bucket(self._requests, owner, limit)
        if wait := bucket.wait(self.clock(), 1):
            raise _too_much(f"{limit} requests a minute are allowed", wait)
        bucket.take(1)

    def prompt(self, owner: str, tokens: int) -> None:
        """Pay for what is read before it is read. Fault: 429 with Retry-After."""
        if not self.on:
            return
        limit = self.limits.tokens_per_minute
        bucket = self._bucket(self._tokens, owner, limit)
        if wait := bucket.wait(self.clock(), tokens):
            raise _too_much(f"{limit} tokens a minute are allowed", wait)
        bucket.take(tokens)

    def written(self, owner: str, tokens: int) -> None:
        """Pay for what was written."""
        bucket = self._bucket(self._tokens, owner, self.limits.tokens_per_minute)
        bucket.take(tokens)


def _too_much(what: str, wait: float) -> Fault:
    return Fault(
        429,
        f"{what} with one key; try again in {math.ceil(wait)} s",
        code="rate_limit_exceeded",
        retry_after=wait,
    )
