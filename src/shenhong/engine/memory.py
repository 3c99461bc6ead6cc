"""How large the cache of an engine may be: from the model and the machine, where nobody says."""

from __future__ import annotations

import os
from pathlib import Path

from shenhong.model import ModelConfig
from shenhong.model.counts import parameters

LIMITS = ("memory.max", "memory/memory.limit_in_bytes")  # of a container: cgroup v2 and v1


def machine_bytes(groups: Path = Path("/sys/fs/cgroup")) -> int:
    """The memory of the machine, or what a container may use of it; free or not, so that a busy moment changes nothing."""
    most = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name in LIMITS:
        try:
            most = min(most, int((groups / name).read_text()))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return most


def cache_bytes(config: ModelConfig, width: int, share: float) -> int:
    """A share of what the weights, of ``width`` bytes a number, leave of the memory."""
    return int(share * max(0, machine_bytes() - parameters(config).total * width))
