"""Latent attention in the form that generates: absorbed, over a cache of one row a token for all heads.

The latents are never expanded (DeepSeek-V2, section 2.1.2): with W_UK moved to the query and W_UV to the output, all
heads attend to one shared sequence of R + r numbers a token:

    q' = q_nope W_UK ;  s = (q' . c + q_pe . k_pe) * scale ;  o = (softmax(s) c) W_UV

Legend: N tokens, S sequences, T new tokens of one sequence, L keys, D hidden, H heads, R latent rank, n nope dims,
r rope dims, v value dims, e = R + r.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from shenhong.model.attention import LATENT_NORM_EPS, LatentAttention
from shenhong.model.cache import SlotMapping
from shenhong.model.rope import rotate
from shenhong.numerics import ops
from shenhong.numerics.cpu.decode import pack


@dataclass(frozen=True)
class LatentWeights:
    """One layer's. ``down``: what reads the layer's input (queries or their latent | kv latent | rotated key)."""

    heads: int
    rank: int
    rope: int
    scale: float
    down: Tensor
    q_norm: Tensor | None
    q_b: Tensor | None
    kv_norm_R: Tensor
    uk_HnR: Tensor
    uv_HRv: Tensor
    out: Tensor

    @classmethod
    def of(cls, attention: LatentAttention, dtype: torch.dtype) -> LatentWeights:
        def cast(*matrices: Tensor) -> Tensor:
            return torch.cat([m.detach().to(dtype) for m in matrices])

        low_rank = attention.q_lora_rank is not None
        queries = attention.q_a_proj if low_rank else attention.q_proj
        values = attention.o_proj.weight.shape[1] // attention.heads
        kv_b_HeR = cast(attention.kv_b_proj.weight).unflatten(0, (attention.heads, -1))
        return cls(
            heads=attention.heads,
            rank=attention.rank,
            rope=attention.rope,
            scale=attention.scale,
            down=cast(queries.weight, attention.kv_a_proj_with_mqa.weight),
            q_norm=attention.q_a_layernorm.weight.detach().clone() if low_rank else None,
            q_b=cast(attention.q_b_proj.weight) if low_rank else None,
            kv_norm_R=attention.kv_a_layernorm.weight.detach().clone(),
            uk_HnR=kv_b_HeR[:, :-values].contiguous(),
            uv_HRv=kv_b_HeR[:, -values:].transpose(1, 2).contiguous(),
            out=cast(attention.o_proj.weight),
        )

    def project(self, u_ND: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """(queries [N, H, e] absorbed, rotated and scaled; cache rows [N, e])."""
        R, r = self.rank, self.rope
        down = F.linear(u_ND, self.down)
        q, c_NR, k_rope_Nr = down.split([down.shape[1] - R - r, R, r], dim=-1)
        if self.q_b is not None:
            assert self.q_norm is not None
            q = F.linear(ops.rms_norm(q, self.q_norm, LATENT_NORM_EPS), self.q_b)
        c_NR = ops.rms_norm(c_NR, self.kv_norm_R, LATENT_NORM_EPS)
        q_NHd = q.unflatten(-1, (self.heads, -1))
        q_nope, q_pe = q_NHd[..., :-r], q_NHd[..., -r:]
        q_latent_NHR = torch.bmm(q_nope.transpose(0, 1), self.uk_HnR).transpose(0, 1)
        q_pe = rotate(q_pe, cos[:, None], sin[:, None])
        query = torch.cat((q_latent_NHR, q_pe), dim=-1) * self.scale
        return query, torch.cat((c_NR, rotate(k_rope_Nr, cos, sin)), dim=-1)

    def attend(self, query_NHe: Tensor, pool: Tensor, slots: SlotMapping) -> Tensor:
        """Attention output [N, D]; groups of sequences with equally many new tokens run together."""
        N, H, R = *query_NHe.shape[:2], self.rank
        o_NHR = query_NHe.new_empty(N, H, R)
        for tokens_ST, slots_SL, mask_STL in slots.groups:
            S, T = tokens_ST.shape
            past_SLe = pool[slots_SL]
            query = query_NHe[tokens_ST].flatten(1, 2)
            # The cache comes first: with it transposed, the library would copy all of it.
            scores = torch.bmm(past_SLe, query.mT).mT.reshape(S, T, H, -1) + mask_STL[:, :, None]
            share = scores.softmax(dim=-1).to(query.dtype).flatten(1, 2)
            o_NHR[tokens_ST] = torch.bmm(share, past_SLe[..., :R]).view(S, T, H, R)
        o_NHv = torch.bmm(o_NHR.transpose(0, 1), self.uv_HRv).transpose(0, 1)
        return F.linear(o_NHv.reshape(N, -1), self.out)

    def packed(self) -> dict[str, Tensor | int | None]:
        """These fields of the kernel's DecodeLayer."""
        return {
            "down": pack(self.down),
            "q_norm": self.q_norm,
            "q_b": None if self.q_b is None else pack(self.q_b),
            "kv_norm": self.kv_norm_R,
            "uk": pack(self.uk_HnR.mT),
            "uv": pack(self.uv_HRv.mT),
            "out": pack(self.out),
        }
