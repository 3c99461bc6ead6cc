"""How much memory a process held, and giving freed memory back, so that peaks of different work do not add up."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import resource
import sys
from pathlib import Path


def give_back() -> None:
    """Collect, then let the allocators return what is free. glibc keeps it otherwise: tensors whose sizes
    change from step to step leave holes, and a long run grows."""
    gc.collect()
    if arrow := sys.modules.get("pyarrow"):
        arrow.default_memory_pool().release_unused()
    with contextlib.suppress(OSError, AttributeError):  # glibc only
        ctypes.CDLL(None).malloc_trim(0)


def peak_bytes() -> int:
    """Largest resident memory of this process so far, in bytes (both sources count in KiB)."""
    # Linux's getrusage also counts what the parent held before this program began.
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
