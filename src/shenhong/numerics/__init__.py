"""Arithmetic: the ops of a training step and of generation.

ops         what the model calls             reference   the same in PyTorch, which serves where no kernel does
cpu         the kernels for CPUs             verify      kernels against their references, on this machine
formats     numbers of few bits              muon, ...   what optimizers compute
rounding    how far a kernel may be off
"""

from shenhong.numerics.cpu.native import kernels_in_use, use_kernels, verify_with, why_off
from shenhong.numerics.ops import (
    Documents,
    Plan,
    attention,
    boundaries,
    cross_entropy,
    documents,
    gated,
    latent_attention,
    moe_experts,
    moe_plan,
    rms_norm,
    select_experts,
    swiglu,
)
from shenhong.numerics.verify import check

verify_with(check)

__all__ = [
    "Documents",
    "Plan",
    "attention",
    "boundaries",
    "cross_entropy",
    "documents",
    "gated",
    "kernels_in_use",
    "latent_attention",
    "moe_experts",
    "moe_plan",
    "rms_norm",
    "select_experts",
    "swiglu",
    "use_kernels",
    "why_off",
]
