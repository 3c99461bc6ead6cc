"""The arithmetic of every op in plain PyTorch: any device, any dtype, differentiated by autograd.

These functions define what the kernels must equal; they also run wherever the kernels cannot (another device, no
compiler, a self-check that failed). They are written for clarity, and vectorised only where a loop would be unusable.

Shapes: N flattened tokens, D hidden, H heads, n key dims without rotation, r rotary dims, v value dims, E experts,
K chosen experts, I expert width, V vocabulary, A padded expert rows (assignments sorted by expert), S documents,
L longest document of a group.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from shenhong.numerics.activations import activation

SEGMENT = (
    64  # rows: expert segments are multiples of this, so a GEMM library sees few distinct shapes
)


class Documents(NamedTuple):
    """Where documents begin in the flattened batch; attention never crosses these boundaries."""

    starts: Tensor  # [S+1] int32, cumulative; starts[0] = 0, starts[S] = N
    positions: Tensor  # [N] int32, position of each token inside its document


class Plan(NamedTuple):
    """A counting sort of the N*K assignments by expert; every expert's segment is padded to SEGMENT rows."""

    assignment_A: Tensor  # int32: n*K + k of each padded row, -1 where the row is padding
    slot_NK: Tensor  # int32: the padded row of assignment (n, k)
    counts_E: Tensor  # int64: assignments an expert got, padding not counted
    bounds: tuple[int, ...]  # E+1 row bounds of the padded segments


def documents(tokens_BT: Tensor, bos_id: int) -> Documents:
    """Boundaries of the flattened batch: a document starts at every `bos_id` and at every row start."""
    starts_BT = tokens_BT == bos_id
    starts_BT[:, 0] = True
    return boundaries(starts_BT.flatten())


def boundaries(starts_N: Tensor) -> Documents:
    """Boundaries of a flattened batch from where documents start; the first token always starts one."""
    start_S = starts_N.nonzero().flatten()
    total = len(starts_N)
    bounds = torch.cat([start_S, start_S.new_tensor([total])])
    lengths_S = bounds.diff()
    positions_N = torch.arange(total, device=starts_N.device) - start_S.repeat_interleave(lengths_S)
    return Documents(bounds.int(), positions_N.int())


def rms_norm(x_ND: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight, computed in fp32 at least, returned in x's dtype."""
    wide = torch.promote_types(x_ND.dtype, torch.float32)
    x = x_ND.to(wide)
    rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return (x * rstd * weight_D.to(wide)).to(x_ND.dtype)


def swiglu(gate_up_N2I: Tensor) -> Tensor:
    """silu(first half) * second half of the last dimension."""
    gate, up = gate_up_N2I.chunk(2, dim=-1)
    return F.silu(gate) * up


def rotate(x_NHr: Tensor, cos_Nr: Tensor, sin_Nr: Tensor) -> Tensor:
    """Interleaved RoPE: pairs (2i, 2i+1) rotated by the angle of the token's position. cos/sin: [N, r/2]."""
    even, odd = x_NHr[..., 0::2], x_NHr[..., 1::2]
    cos, sin = cos_Nr.unsqueeze(1), sin_Nr.unsqueeze(1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


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
    """Causal attention inside each document; RoPE on the last `rope_dims` of q and k; softmax in fp32 at least.

    Documents are padded to the longest of their group, grouped by powers of two, so no N x N matrix appears.
    """
    wide = torch.promote_types(q_NHd.dtype, torch.float32)
    q, k, v = q_NHd.to(wide), k_NHd.to(wide), v_NHv.to(wide)
    if rope_dims:
        positions = docs.positions.long()
        cos, sin = cos_Tr[positions].to(wide), sin_Tr[positions].to(wide)
        q = torch.cat([q[..., :-rope_dims], rotate(q[..., -rope_dims:], cos, sin)], -1)
        k = torch.cat([k[..., :-rope_dims], rotate(k[..., -rope_dims:], cos, sin)], -1)
    starts = docs.starts[:-1].long()
    lengths = docs.starts.diff().long()
    group_S = torch.ceil(torch.log2(lengths.double())).long()
    out = torch.zeros_like(v)
    for group in group_S.unique().tolist():
        member = group_S == group
        length_S = lengths[member]
        span = torch.arange(int(length_S.max()), device=q.device)
        inside_SL = span < length_S[:, None]
        index_SL = starts[member][:, None] + torch.where(inside_SL, span, 0)
        qs, ks, vs = (t[index_SL].transpose(1, 2) for t in (q, k, v))  # [S, H, L, dims]
        scores = (qs @ ks.transpose(-1, -2)) * scale
        scores = scores.masked_fill(span > span[:, None], float("-inf"))
        o_SLHv = (scores.softmax(-1) @ vs).transpose(1, 2)
        out = out.index_put((index_SL[inside_SL],), o_SLHv[inside_SL])
    return out.to(q_NHd.dtype)


def gated(gate_up_N2I: Tensor, act: str = "silu") -> Tensor:
    """activation(first half) * second half of the last dimension, computed in fp32 at least."""
    if act == "silu":
        return swiglu(gate_up_N2I)
    wide = torch.promote_types(gate_up_N2I.dtype, torch.float32)
    gate, up = gate_up_N2I.to(wide).chunk(2, dim=-1)
    return (activation(act)(gate) * up).to(gate_up_N2I.dtype)


def moe_plan(chosen_NK: Tensor, experts: int) -> Plan:
    """Sort assignments by expert, by token within an expert. Expert indices outside 0..experts-1 are a bug."""
    flat = chosen_NK.reshape(-1).long()
    counts = torch.bincount(flat, minlength=experts)
    padded = (counts + SEGMENT - 1) // SEGMENT * SEGMENT
    bounds = F.pad(padded.cumsum(0), (1, 0))
    order = torch.argsort(flat, stable=True)
    sorted_experts = flat[order]
    first = F.pad(counts.cumsum(0), (1, 0))
    rank = torch.arange(flat.numel(), device=flat.device) - first[sorted_experts]
    row = (bounds[sorted_experts] + rank).int()
    total = int(bounds[-1])
    assignment = torch.full((total,), -1, dtype=torch.int32, device=flat.device)
    assignment[row.long()] = order.int()
    slot = torch.empty(flat.numel(), dtype=torch.int32, device=flat.device)
    slot[order] = row
    return Plan(assignment, slot.view(chosen_NK.shape), counts, tuple(bounds.tolist()))


def moe_experts(
    x_ND: Tensor,
    gates_NK: Tensor,
    plan: Plan,
    w_gate_up_E2ID: Tensor,
    w_down_EDI: Tensor,
    act: str = "silu",
) -> Tensor:
    """y = sum over the chosen experts of gate * down(gated(gate_up(x))). The sum is taken in fp32 at least."""
    wide = torch.promote_types(x_ND.dtype, torch.float32)
    chosen = gates_NK.shape[1]
    y = torch.zeros(x_ND.shape, dtype=wide, device=x_ND.device)
    for expert in range(w_down_EDI.shape[0]):
        rows = plan.assignment_A[plan.bounds[expert] : plan.bounds[expert + 1]].long()
        rows = rows[rows >= 0]
        token = rows // chosen
        hidden = gated(x_ND[token] @ w_gate_up_E2ID[expert].T, act).to(wide)
        hidden = hidden * gates_NK.reshape(-1)[rows, None].to(wide)
        y = y.index_add(0, token, (hidden.to(x_ND.dtype) @ w_down_EDI[expert].T).to(wide))
    return y.to(x_ND.dtype)


def cross_entropy(
    h_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, weights_N: Tensor
) -> tuple[Tensor, Tensor]:
    """Sum of weights_n * -log p(target_n), and log p(target_n) where weights_n is not 0 (0 elsewhere)."""
    wide = torch.promote_types(h_ND.dtype, torch.float32)
    logprob = (h_ND @ weight_VD.T).to(wide).log_softmax(-1)
    logprob = logprob.gather(1, targets_N.long()[:, None])[:, 0]
    logprob = torch.where(weights_N != 0, logprob, 0.0)
    return -(weights_N * logprob).sum(), logprob.detach()


def select_experts(
    scores_NE: Tensor,
    bias_E: Tensor,
    k: int,
    n_group: int = 1,
    topk_group: int = 1,
    by_best: bool = False,
) -> Tensor:
    """The k experts of highest score + bias, best first, ties to the lower index (DeepSeek-V3, eq. 16 and 2.1.2).

    With groups, only the `topk_group` groups whose two best sums of score + bias are highest stay eligible; with
    `by_best` those whose one best is (DeepSeek-V2, section 2.2.2).
    """
    total_NE = scores_NE + bias_E
    if n_group > 1:
        grouped = total_NE.unflatten(1, (n_group, -1))
        ranked = grouped.sort(dim=-1, descending=True, stable=True).values
        best = ranked[..., : 1 if by_best else 2].sum(-1)
        kept = best.sort(dim=-1, descending=True, stable=True).indices[:, :topk_group]
        eligible = torch.zeros_like(best, dtype=torch.bool).scatter_(1, kept, True)
        total_NE = grouped.masked_fill(~eligible[..., None], float("-inf")).flatten(1)
    return total_NE.sort(dim=-1, descending=True, stable=True).indices[:, :k]
