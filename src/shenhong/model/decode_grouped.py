"""Grouped-query attention in the form that generates: a cache row holds every group's key and value.

Legend: N tokens, S sequences, T new tokens of one sequence, L keys, D hidden, H heads, G groups, J heads of a group,
d width of a head; a cache row is [G, 2d], key before value.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from shenhong.model.attention import GroupedQueryAttention
from shenhong.model.cache import SlotMapping
from shenhong.model.rope import rotate
from shenhong.numerics import ops
from shenhong.numerics.cpu.decode import pack


@dataclass(frozen=True)
class GroupedWeights:
    """One layer's. ``qkv``: queries, keys and values read the layer's input together."""

    heads: int
    groups: int
    scale: float
    eps: float
    qkv: Tensor
    bias: Tensor | None
    q_norm_d: Tensor | None
    k_norm_d: Tensor | None
    out: Tensor

    @classmethod
    def of(cls, attention: GroupedQueryAttention, dtype: torch.dtype) -> GroupedWeights:
        parts = (attention.q_proj, attention.k_proj, attention.v_proj)
        biases = [part.bias.detach() for part in parts if part.bias is not None]
        normed = attention.qk_norm
        return cls(
            heads=attention.heads,
            groups=attention.groups,
            scale=attention.scale,
            eps=attention.q_norm.eps if normed else 0.0,
            qkv=torch.cat([part.weight.detach().to(dtype) for part in parts]),
            bias=torch.cat(biases) if biases else None,
            q_norm_d=attention.q_norm.weight.detach().clone() if normed else None,
            k_norm_d=attention.k_norm.weight.detach().clone() if normed else None,
            out=attention.o_proj.weight.detach().to(dtype, copy=True),
        )

    def project(self, u_ND: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """(queries [N, H, d] rotated and scaled; cache rows [N, G 2d])."""
        H, G = self.heads, self.groups
        bias = None if self.bias is None else self.bias.to(u_ND.dtype)
        qkv = F.linear(u_ND, self.qkv, bias).unflatten(-1, (H + 2 * G, -1))
        q_NHd, k_NGd, v_NGd = qkv.split([H, G, G], dim=1)
        if self.q_norm_d is not None and self.k_norm_d is not None:
            q_NHd = ops.rms_norm(q_NHd, self.q_norm_d, self.eps)
            k_NGd = ops.rms_norm(k_NGd, self.k_norm_d, self.eps)
        cos, sin = cos[:, None], sin[:, None]
        row = torch.cat((rotate(k_NGd, cos, sin), v_NGd), dim=-1)
        return rotate(q_NHd, cos, sin) * self.scale, row.flatten(1)

    def attend(self, query_NHd: Tensor, pool: Tensor, slots: SlotMapping) -> Tensor:
        """Attention output [N, D]; groups of sequences with equally many new tokens run together."""
        o_NHd = torch.empty_like(query_NHd)
        for tokens_ST, slots_SL, mask_STL in slots.groups:
            T = tokens_ST.shape[1]
            past_SGLe = pool[slots_SL].unflatten(-1, (self.groups, -1)).transpose(1, 2)
            k_SGLd, v_SGLd = past_SGLe.chunk(2, dim=-1)
            q_STGJd = query_NHd[tokens_ST].unflatten(2, (self.groups, -1))
            q_SGTJd = q_STGJd.transpose(1, 2)
            scores = q_SGTJd.flatten(2, 3) @ k_SGLd.mT
            scores = scores.unflatten(2, (T, -1)) + mask_STL[:, None, :, None]
            share = scores.softmax(dim=-1).to(query_NHd.dtype).flatten(2, 3)
            o_SGTJd = (share @ v_SGLd).view_as(q_SGTJd)
            o_NHd[tokens_ST] = o_SGTJd.transpose(1, 2).flatten(2, 3)
        return F.linear(o_NHd.flatten(1), self.out)

    def packed(self) -> dict[str, Tensor | int | None]:
        """These fields of the kernel's DecodeLayer."""
        return {
            "down": pack(self.qkv),
            "q_norm": self.q_norm_d,
            "k_norm": self.k_norm_d,
            "qkv_bias": self.bias,
            "out": pack(self.out),
        }
