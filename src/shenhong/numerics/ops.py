"""The differentiable operations a training step is made of, whatever carries them out.

On a CPU where the kernels passed their self-check they run there; elsewhere the PyTorch reference of the same name
runs. Inputs are float32 or bfloat16; matrices already have x's dtype, norm weights are float32.

Shapes: N flattened tokens, D hidden, H heads, n key dims without rotation, r rotary dims, v value dims, E experts,
K chosen experts, I expert width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shenhong.numerics import reference
from shenhong.numerics.cpu import experts as fused_experts
from shenhong.numerics.cpu.attention import HeadAttention, LatentAttention
from shenhong.numerics.cpu.experts import Experts
from shenhong.numerics.cpu.loss import CrossEntropy
from shenhong.numerics.cpu.native import fast, library
from shenhong.numerics.cpu.norm import RmsNorm, SwiGlu
from shenhong.numerics.reference import Documents, Plan, boundaries, documents

__all__ = [
    "Documents",
    "Plan",
    "attention",
    "boundaries",
    "cross_entropy",
    "documents",
    "gated",
    "latent_attention",
    "moe_experts",
    "moe_plan",
    "rms_norm",
    "select_experts",
    "swiglu",
]


def rms_norm(x_ND: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension: fp32 inside, x's dtype outside. Any leading shape."""
    if fast(x_ND) and weight_D.dtype == torch.float32:
        return RmsNorm.apply(x_ND, weight_D, eps)
    return reference.rms_norm(x_ND, weight_D, eps)


def swiglu(gate_up_N2I: Tensor) -> Tensor:
    """silu(first half) * second half of the last dimension."""
    if fast(gate_up_N2I):
        return SwiGlu.apply(gate_up_N2I)
    return reference.swiglu(gate_up_N2I)


def gated(gate_up_N2I: Tensor, act: str = "silu") -> Tensor:
    """activation(first half) * second half of the last dimension; ``act`` is one of numerics.activations."""
    return swiglu(gate_up_N2I) if act == "silu" else reference.gated(gate_up_N2I, act)


def attention(
    q_NHd: Tensor,
    k_NHd: Tensor,
    v_NHv: Tensor,
    docs: Documents,
    cos_Tr: Tensor,
    sin_Tr: Tensor,
    rope_dims: int,
    scale: float,
) -> Tensor:
    """Causal multi-head attention inside each document, [N, H, v]. The last `rope_dims` of q and k are rotated here.

    cos_Tr, sin_Tr: fp32 [T_max, rope_dims / 2] by position; interleaved pairs (2i, 2i+1).
    """
    if fast(q_NHd, k_NHd, v_NHv):
        return HeadAttention.apply(q_NHd, k_NHd, v_NHv, docs, cos_Tr, sin_Tr, rope_dims, scale)
    return reference.attention(q_NHd, k_NHd, v_NHv, docs, cos_Tr, sin_Tr, rope_dims, scale)


def latent_attention(
    q_NHd: Tensor,
    kv_NHe: Tensor,
    k_rope_Nr: Tensor,
    docs: Documents,
    cos_Tr: Tensor,
    sin_Tr: Tensor,
    scale: float,
) -> Tensor:
    """Multi-head mode of latent attention (DeepSeek-V2, eq. 12-19), [N, H, v]: causal inside each document.

    q: [N, H, n + r], its last r dims not yet rotated. kv: [N, H, n + v], keys without rotation, then values.
    k_rope: [N, r], not yet rotated, shared by all heads. cos, sin: fp32 [T_max, r / 2]. Softmax in fp32.
    """
    if fast(q_NHd, kv_NHe, k_rope_Nr):
        return LatentAttention.apply(q_NHd, kv_NHe, k_rope_Nr, docs, cos_Tr, sin_Tr, scale)
    heads, rope_dims = q_NHd.shape[1], k_rope_Nr.shape[1]
    plain = q_NHd.shape[2] - rope_dims
    shared_NHr = k_rope_Nr[:, None, :].expand(-1, heads, -1)
    k_NHd = torch.cat([kv_NHe[..., :plain], shared_NHr], -1)
    return reference.attention(
        q_NHd, k_NHd, kv_NHe[..., plain:], docs, cos_Tr, sin_Tr, rope_dims, scale
    )


def moe_plan(chosen_NK: Tensor, experts: int) -> Plan:
    """Sort the N*K assignments by expert (by token within one), each segment padded to 64 rows. Deterministic."""
    if chosen_NK.device.type == "cpu" and library() is not None:
        return fused_experts.plan(chosen_NK, experts)
    return reference.moe_plan(chosen_NK, experts)


def moe_experts(
    x_ND: Tensor,
    gates_NK: Tensor,
    plan: Plan,
    w_gate_up_E2ID: Tensor,
    w_down_EDI: Tensor,
    act: str = "silu",
) -> Tensor:
    """y = sum_k gate_k * down_k(gated(gate_up_k(x))) over the experts of `plan`; gates are fp32. [N, D]."""
    if act == "silu" and fast(x_ND, w_gate_up_E2ID, w_down_EDI):
        return Experts.apply(x_ND, gates_NK.float(), plan, w_gate_up_E2ID, w_down_EDI)
    return reference.moe_experts(x_ND, gates_NK, plan, w_gate_up_E2ID, w_down_EDI, act)


def cross_entropy(
    h_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, weights_N: Tensor
) -> tuple[Tensor, Tensor]:
    """Output head and loss in one: (sum_n weights_n * -log p(target_n), log p(target_n) detached), both fp32.

    Tokens whose weight is 0 cost nothing and have log-probability 0.
    """
    if h_ND.dtype == torch.float64:
        return reference.cross_entropy(h_ND, weight_VD, targets_N, weights_N)
    grad = torch.is_grad_enabled() and (h_ND.requires_grad or weight_VD.requires_grad)
    return CrossEntropy.apply(h_ND, weight_VD, targets_N, weights_N, grad)


def select_experts(
    scores_NE: Tensor,
    bias_E: Tensor,
    k: int,
    n_group: int = 1,
    topk_group: int = 1,
    by_best: bool = False,
) -> Tensor:
    """Indices [N, k] of the experts of highest score + bias, ties to the lower index.

    Group limits are DeepSeek-V3's, or DeepSeek-V2's where ``by_best`` (a group counts by its best expert alone).
    """
    if fast(scores_NE, bias_E) and scores_NE.dtype == torch.float32:
        return fused_experts.select(scores_NE, bias_E, k, n_group, topk_group, by_best)
    return reference.select_experts(scores_NE, bias_E, k, n_group, topk_group, by_best)
