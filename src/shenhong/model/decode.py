"""The decoder in the form that generates: weights prepared once, prompts in multi-head mode, then absorbed steps.

Preparation casts the matrices to the chosen dtype, joins those that read the same input, and cuts W_UK and W_UV
per head. A prompt runs as in training and leaves its latents in the cache. A step never expands the latents
(DeepSeek-V2, section 2.1.2): with W_UK moved to the query and W_UV to the output, all heads attend to one shared
sequence of R + r numbers a token:

    q' = q_nope W_UK ;  s = (q' . c + q_pe . k_pe) * scale ;  o = (softmax(s) c) W_UV

Legend: N tokens, B rows, T new tokens a row, S cached slots, D hidden, H heads, R latent rank, n nope dims, r rope
dims, v value dims, d = n + r, E experts, K chosen, I expert width.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from shenhong.errors import ModelError
from shenhong.model.attention import LATENT_NORM_EPS, LatentAttention
from shenhong.model.block import Layer
from shenhong.model.cache import LatentCache
from shenhong.model.decoder import Decoder
from shenhong.model.experts import ExpertBlock, Router
from shenhong.model.layers import FeedForward
from shenhong.model.rope import rotate
from shenhong.numerics import ops


@dataclass(frozen=True)
class Experts:
    router: Router
    gate_up_E2ID: Tensor
    down_EDI: Tensor


@dataclass(frozen=True)
class Weights:
    """One layer's. ``down``: what reads the layer's input (queries or their latent | kv latent | rotated key)."""

    norm_D: Tensor
    down: Tensor
    q_norm: Tensor | None
    q_b: Tensor | None
    kv_norm_R: Tensor
    kv_b: Tensor
    uk_HnR: Tensor
    uv_HRv: Tensor
    out: Tensor
    mlp_norm_D: Tensor
    dense: tuple[Tensor, Tensor] | None  # gate_up, down of the dense block or the shared expert
    experts: Experts | None


class PreparedDecoder:
    """A copy of a decoder's trunk and head for generation; later changes of the decoder do not reach it."""

    @torch.no_grad()
    def __init__(self, decoder: Decoder, dtype: torch.dtype = torch.float32) -> None:
        config = decoder.config
        if config.attention != "mla":
            raise ModelError('only attention "mla" has a latent cache to generate from')
        self.config, self.dtype = config, dtype
        self.device = decoder.head_weight.device
        self.cos, self.sin = decoder.cos, decoder.sin
        self.embedding = decoder.model.embed_tokens.weight.to(dtype, copy=True)
        self.head = self.embedding
        if decoder.lm_head is not None:
            self.head = decoder.head_weight.to(dtype, copy=True)
        self.norm_D = decoder.model.norm.weight.clone()
        trunk = decoder.model.layers[: config.num_hidden_layers]
        self.layers = [self._prepare(layer) for layer in trunk if isinstance(layer, Layer)]
        self.scale = self._attention(trunk[0]).scale

    def _attention(self, layer: torch.nn.Module) -> LatentAttention:
        assert isinstance(layer, Layer) and isinstance(layer.self_attn, LatentAttention)
        return layer.self_attn

    def _prepare(self, layer: Layer) -> Weights:
        config, attention = self.config, self._attention(layer)

        def cast(*matrices: Tensor) -> Tensor:
            return torch.cat([m.detach() for m in matrices]).to(self.dtype)

        def feed_forward(block: FeedForward) -> tuple[Tensor, Tensor]:
            return cast(block.gate_proj.weight, block.up_proj.weight), cast(block.down_proj.weight)

        low_rank = config.q_lora_rank is not None
        queries = attention.q_a_proj if low_rank else attention.q_proj
        kv_b = cast(attention.kv_b_proj.weight)
        uk, uv = kv_b.view(config.num_attention_heads, -1, config.kv_lora_rank).split(
            [config.qk_nope_head_dim, config.v_head_dim], dim=1
        )
        dense, experts = None, None
        if isinstance(layer.mlp, ExpertBlock):
            stacked = layer.mlp.experts
            router = copy.deepcopy(layer.mlp.gate)
            experts = Experts(router, cast(stacked.gate_up_proj), cast(stacked.down_proj))
            if layer.mlp.shared_experts is not None:
                dense = feed_forward(layer.mlp.shared_experts)
        else:
            assert isinstance(layer.mlp, FeedForward)
            dense = feed_forward(layer.mlp)
        return Weights(
            norm_D=layer.input_layernorm.weight.detach().clone(),
            down=cast(queries.weight, attention.kv_a_proj_with_mqa.weight),
            q_norm=attention.q_a_layernorm.weight.detach().clone() if low_rank else None,
            q_b=cast(attention.q_b_proj.weight) if low_rank else None,
            kv_norm_R=attention.kv_a_layernorm.weight.detach().clone(),
            kv_b=kv_b,
            uk_HnR=uk.contiguous(),
            uv_HRv=uv.transpose(1, 2).contiguous(),
            out=cast(attention.o_proj.weight),
            mlp_norm_D=layer.post_attention_layernorm.weight.detach().clone(),
            dense=dense,
            experts=experts,
        )

    # ---------------------------------------------------------------- use

    def new_cache(self, rows: int) -> LatentCache:
        width = self.config.kv_lora_rank + self.config.qk_rope_head_dim
        return LatentCache(len(self.layers), rows, width, self.dtype, self.device)

    @torch.no_grad()
    def prefill(self, tokens_N: Tensor, docs: ops.Documents, cache: LatentCache) -> Tensor:
        """Runs one prompt (document) per row of an empty cache; [N, D] states after the final norm."""
        assert cache.longest == 0 and cache.rows == len(docs.starts) - 1
        lengths_B = docs.starts.diff().long()
        row_N = torch.arange(cache.rows, device=self.device).repeat_interleave(lengths_B)
        slot_N = docs.positions.long()
        cos, sin = self.cos[slot_N], self.sin[slot_N]
        cache.reserve(int(lengths_B.max()))
        x_ND = F.embedding(tokens_N, self.embedding)
        for weights, slots in zip(self.layers, cache.slots, strict=True):
            q_NHd, c_NR, k_rope_Nr = self._project(weights, x_ND)
            slots[row_N, slot_N] = torch.cat((c_NR, rotate(k_rope_Nr, cos, sin)), dim=-1)
            kv_NHe = F.linear(c_NR, weights.kv_b).unflatten(-1, (q_NHd.shape[1], -1))
            o_NHv = ops.latent_attention(
                q_NHd, kv_NHe, k_rope_Nr, docs, self.cos, self.sin, self.scale
            )
            x_ND = x_ND + F.linear(o_NHv.flatten(1), weights.out)
            x_ND = self._feed_forward(weights, x_ND)
        cache.advance(lengths_B)
        return ops.rms_norm(x_ND, self.norm_D, self.config.rms_norm_eps)

    @torch.no_grad()
    def step(self, tokens_BT: Tensor, cache: LatentCache) -> Tensor:
        """Appends T tokens to every row; [B, T, D] states after the final norm."""
        rows, new = tokens_BT.shape
        cache.reserve(new)
        S = cache.longest + new
        position_BT = cache.lengths_B[:, None] + torch.arange(new, device=self.device)
        row_BT = torch.arange(rows, device=self.device)[:, None].expand(rows, new)
        cos, sin = self.cos[position_BT.flatten()], self.sin[position_BT.flatten()]
        # Added to the scores: a query sees the slots up to its own.
        later_BTS = torch.arange(S, device=self.device) > position_BT[..., None]
        mask_BTS = torch.zeros(later_BTS.shape, device=self.device)
        mask_BTS.masked_fill_(later_BTS, float("-inf"))
        x_ND = F.embedding(tokens_BT.flatten(), self.embedding)
        for weights, slots in zip(self.layers, cache.slots, strict=True):
            q_NHd, c_NR, k_rope_Nr = self._project(weights, x_ND)
            slots[row_BT, position_BT] = torch.cat(
                (c_NR, rotate(k_rope_Nr, cos, sin)), dim=-1
            ).view(rows, new, -1)
            x_ND = x_ND + self._absorbed(weights, q_NHd, slots[:, :S], mask_BTS, cos, sin)
            x_ND = self._feed_forward(weights, x_ND)
        cache.advance(new)
        states = ops.rms_norm(x_ND, self.norm_D, self.config.rms_norm_eps)
        return states.view(rows, new, -1)

    @torch.no_grad()
    def logits(self, states_ND: Tensor) -> Tensor:
        """[N, V] fp32."""
        return F.linear(states_ND, self.head).float()

    # ---------------------------------------------------------------- parts of a layer

    def _project(self, weights: Weights, x_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(queries [N, H, d] not rotated, normed latents [N, R], keys [N, r] not rotated)."""
        R, r, H = (
            self.config.kv_lora_rank,
            self.config.qk_rope_head_dim,
            self.config.num_attention_heads,
        )
        u_ND = ops.rms_norm(x_ND, weights.norm_D, self.config.rms_norm_eps)
        down = F.linear(u_ND, weights.down)
        q, c_NR, k_rope_Nr = down.split([down.shape[1] - R - r, R, r], dim=-1)
        if weights.q_b is not None:
            assert weights.q_norm is not None
            q = F.linear(ops.rms_norm(q, weights.q_norm, LATENT_NORM_EPS), weights.q_b)
        c_NR = ops.rms_norm(c_NR, weights.kv_norm_R, LATENT_NORM_EPS)
        return q.unflatten(-1, (H, -1)), c_NR, k_rope_Nr

    def _absorbed(
        self,
        weights: Weights,
        q_NHd: Tensor,
        past_BSe: Tensor,
        mask_BTS: Tensor,
        cos: Tensor,
        sin: Tensor,
    ) -> Tensor:
        """Attention output [N, D] of the absorbed form; past holds (latent | rotated key)."""
        B, T, S = mask_BTS.shape
        H, R, n = q_NHd.shape[1], self.config.kv_lora_rank, self.config.qk_nope_head_dim
        q_nope, q_pe = q_NHd.split([n, q_NHd.shape[2] - n], dim=-1)
        q_latent_NHR = torch.bmm(q_nope.transpose(0, 1), weights.uk_HnR).transpose(0, 1)
        q_pe = rotate(q_pe, cos[:, None], sin[:, None])
        query = torch.cat((q_latent_NHR, q_pe), dim=-1).view(B, T * H, -1)
        # The cache comes first: with it transposed, the library would copy all of it.
        scores_BTHS = torch.bmm(past_BSe, query.mT).mT.reshape(B, T, H, S)
        scores_BTHS = scores_BTHS * self.scale + mask_BTS[:, :, None]
        share = scores_BTHS.softmax(dim=-1).to(self.dtype).view(B, T * H, S)
        o_NHR = torch.bmm(share, past_BSe[..., :R]).view(B * T, H, R)
        o_NHv = torch.bmm(o_NHR.transpose(0, 1), weights.uv_HRv).transpose(0, 1)
        return F.linear(o_NHv.reshape(B * T, -1), weights.out)

    def _feed_forward(self, weights: Weights, x_ND: Tensor) -> Tensor:
        u_ND = ops.rms_norm(x_ND, weights.mlp_norm_D, self.config.rms_norm_eps)
        if weights.experts is not None:
            x_ND = x_ND + route(weights.experts, u_ND)
        if weights.dense is not None:
            gate_up, down = weights.dense
            x_ND = x_ND + F.linear(ops.swiglu(F.linear(u_ND, gate_up)), down)
        return x_ND


def route(experts: Experts, u_ND: Tensor) -> Tensor:
    """The routed experts' output [N, D]. Tokens are sorted by expert and each expert runs once; with few tokens only
    the chosen experts' weights are touched."""
    _, chosen_NK, gates_NK = experts.router(u_ND)
    N, K = chosen_NK.shape
    order = chosen_NK.flatten().argsort(stable=True)
    counts = torch.bincount(chosen_NK.flatten(), minlength=len(experts.down_EDI)).tolist()
    sorted_AD = u_ND[order // K]
    out_AD = torch.empty_like(sorted_AD)
    begin = 0
    for expert, count in enumerate(counts):
        if count:
            rows = slice(begin, begin + count)
            inner = ops.swiglu(F.linear(sorted_AD[rows], experts.gate_up_E2ID[expert]))
            torch.mm(inner, experts.down_EDI[expert].T, out=out_AD[rows])
            begin += count
    y_NKD = torch.empty_like(out_AD).index_copy_(0, order, out_AD).view(N, K, -1)
    return torch.bmm(gates_NK.to(u_ND.dtype)[:, None], y_NKD).squeeze(1)
