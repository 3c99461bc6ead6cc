"""What serves a model on this machine and in which dtype: by rule, from the model's shape and the CPU's features."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

from shenhong.model.config import ModelConfig
from shenhong.numerics import why_off
from shenhong.numerics.cpu.features import multiplies_bfloat16

CPU = torch.device("cpu")


def no_kernel(
    config: ModelConfig, dtype: torch.dtype = torch.float32, device: torch.device = CPU
) -> str | None:
    """Why there is no kernel for this model here, or None where there is one; the first call may compile it."""
    if device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        return f"there is no kernel for {str(dtype).removeprefix('torch.')} on {device.type}"
    if config.hidden_act != "silu":
        return f"there is no kernel for hidden_act {config.hidden_act}, only for silu"
    return why_off()


class Serving(NamedTuple):
    """What serves a model, and why."""

    dtype: torch.dtype  # of weights and cache
    kernel: bool  # or PyTorch
    why: str

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{dtype}, by {'the kernel' if self.kernel else 'PyTorch'}: {self.why}"


def planned(config: ModelConfig, dtype: torch.dtype | Literal["auto"] = "auto") -> Serving:
    """What is to serve a model if its layers agree with PyTorch here. "auto" does not depend on what its file stores.

    bfloat16 is half the memory and twice the speed, and with the kernel a text does not depend on its batch in either
    dtype; in PyTorch only float32 comes near to that.
    """
    reason = no_kernel(config)
    if dtype != "auto":
        return Serving(dtype, reason is None, reason or "as asked for")
    if reason:
        return Serving(torch.float32, False, reason)
    if multiplies_bfloat16():
        return Serving(torch.bfloat16, True, "this CPU multiplies bfloat16")
    return Serving(torch.float32, True, "this CPU does not multiply bfloat16")
