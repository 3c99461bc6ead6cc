"""Giving freed memory back to the system, so that peaks of different work do not add up."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys


def give_back() -> None:
    """Collect, then let the allocators return what is free. glibc keeps it otherwise: tensors whose sizes
    change from step to step leave holes, and a long run grows."""
    gc.collect()
    if arrow := sys.modules.get("pyarrow"):
        arrow.default_memory_pool().release_unused()
    with contextlib.suppress(OSError, AttributeError):  # glibc only
        ctypes.CDLL(None).malloc_trim(0)
