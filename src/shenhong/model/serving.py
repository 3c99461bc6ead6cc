"""What serves a model on this machine and in which dtype: by rule, from the model's shape and the CPU's features."""

from __future__ import annotations

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


def best_dtype(config: ModelConfig) -> tuple[torch.dtype, str]:
    """What "auto" means for weights and cache, whatever a file stores, and why.

    bfloat16 is half the memory and twice the speed, and with the kernel a text does not depend on its batch in either
    dtype; in PyTorch only float32 comes near to that.
    """
    if reason := no_kernel(config):
        return torch.float32, reason
    if multiplies_bfloat16():
        return torch.bfloat16, "this CPU multiplies bfloat16"
    return torch.float32, "this CPU does not multiply bfloat16"
