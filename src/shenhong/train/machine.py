"""What this machine can do, measured once and frozen into the manifest.

Threads, the dtype of matrix products and the fused kernels are chosen by timing a piece of the real
training step; so a core that someone else keeps busy shows up here, and costs a thread instead of a
spinning barrier at every operation.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from typing import Any

import torch

from shenhong.train.settings import TrainSettings

CLEARLY = 0.9  # a setting must be this much faster to displace the usual one: trials are noisy


def cores() -> int:
    """Cores this process may use (an affinity mask or container limit counts)."""
    return len(os.sched_getaffinity(0))


def device() -> torch.device:
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def fast_bfloat16() -> bool:
    """Whether matrix products in bfloat16 run on units made for them."""
    if device().type != "cpu":
        return True
    has = torch.cpu.get_capabilities()
    return bool(has.get("amx_bf16") or has.get("avx512_bf16"))


def describe() -> dict[str, Any]:
    """The machine in words, for the manifest and the report."""
    has = torch.cpu.get_capabilities()
    units = [unit for unit in ("amx_bf16", "avx512_bf16", "avx512_f", "avx2") if has.get(unit)]
    return {
        "cpu": str(has.get("cpu_name", platform.processor())),
        "units": units,
        "cores": cores(),
        "load": round(os.getloadavg()[0], 2),
        "device": str(device()),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def choose(
    settings: TrainSettings, timed: Callable[[int, torch.dtype, bool], float], processes: int = 1
) -> dict[str, Any]:
    """Pick threads, dtype and kernels: ``timed(threads, dtype, kernels)`` gives seconds of a trial step.

    Greedy, one setting after another, starting from what is usually best; a setting the recipe fixes is
    not measured. Returns the choice and every measurement it rests on.
    """
    wanted = settings.dtype
    dtypes = [torch.bfloat16, torch.float32] if fast_bfloat16() else [torch.float32]
    if wanted != "auto":
        dtypes = [getattr(torch, wanted)]
    most = max(1, cores() // processes)
    threads = [most, *(n for n in (1, 2, 4, 8, 16, 32) if n < most)]
    if settings.threads != "auto":
        threads = [settings.threads]
    kernels = [True, False] if settings.kernels == "auto" else [settings.kernels]
    trials: dict[tuple[int, torch.dtype, bool], float] = {}

    def seconds(*key: Any) -> float:
        if key not in trials:
            trials[key] = timed(*key)
        return trials[key]

    best = (threads[0], dtypes[0], kernels[0])
    choices: tuple[list[Any], ...] = (threads, dtypes, kernels)
    for place, values in enumerate(choices):
        for value in values[1:]:
            other = (*best[:place], value, *best[place + 1 :])
            if seconds(*other) < CLEARLY * seconds(*best):
                best = other
    return {
        "threads": best[0],
        "dtype": str(best[1]).removeprefix("torch."),
        "kernels": best[2],
        "trials": [
            {
                "threads": t,
                "dtype": str(d).removeprefix("torch."),
                "kernels": k,
                "seconds": round(s, 4),
            }
            for (t, d, k), s in trials.items()
        ],
    }
