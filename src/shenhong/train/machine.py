"""What this machine can do, and what training takes of it: frozen into the manifest when it begins."""

from __future__ import annotations

import os
import platform
from typing import Any

import torch

from shenhong.numerics.cpu.features import multiplies_bfloat16
from shenhong.train.settings import TrainSettings


def cores() -> int:
    """Cores this process may use (an affinity mask or container limit counts)."""
    return len(os.sched_getaffinity(0))


def device() -> torch.device:
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def fast_bfloat16() -> bool:
    """Whether matrix products in bfloat16 run on units made for them."""
    return device().type != "cpu" or multiplies_bfloat16()


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


def choose(settings: TrainSettings, processes: int = 1) -> dict[str, Any]:
    """Threads of each process, dtype of matrix products, and whether fused kernels are wanted.

    By rule and never by a timing, which would choose otherwise on a busy machine and train another model: all cores, in
    bfloat16 where the CPU multiplies it, with the kernels. What the settings name is taken instead.
    """
    dtype = settings.dtype
    if dtype == "auto":
        dtype = "bfloat16" if fast_bfloat16() else "float32"
    return {
        "threads": max(1, cores() // processes) if settings.threads == "auto" else settings.threads,
        "dtype": dtype,
        "kernels": settings.kernels in ("auto", True),
    }
