"""How the work of a function grows with its input: by the processor time of this thread, so that a busy machine changes nothing."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

TIMES = 8  # larger is the second input: a linear function takes 8 times as long, a quadratic one 64 times
LINEAR = 3 * TIMES
LEAST = 0.002  # seconds; less is noise


def growth(work: Callable[[Any], object], make: Callable[[int], Any], size: int) -> float:
    """How many times as long an input of 8 times the size takes."""
    small, large = (make(n) for n in (size, TIMES * size))
    before = min(_seconds(work, small) for _ in range(3))
    return _seconds(work, large) / max(before, LEAST)


def _seconds(work: Callable[[Any], object], given: Any) -> float:
    begun = time.thread_time()
    work(given)
    return time.thread_time() - begun
