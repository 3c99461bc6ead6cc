"""Arithmetic: the ops of a training step, their PyTorch references and their CPU kernels."""

from shenhong.numerics.cpu.native import kernels_in_use, use_kernels
from shenhong.numerics.ops import (
    Documents,
    Plan,
    attention,
    cross_entropy,
    documents,
    latent_attention,
    moe_experts,
    moe_plan,
    rms_norm,
    select_experts,
    swiglu,
)

__all__ = [
    "Documents",
    "Plan",
    "attention",
    "cross_entropy",
    "documents",
    "kernels_in_use",
    "latent_attention",
    "moe_experts",
    "moe_plan",
    "rms_norm",
    "select_experts",
    "swiglu",
    "use_kernels",
]
