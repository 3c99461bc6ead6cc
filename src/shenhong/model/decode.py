"""The decoder in the form that generates: weights prepared once, every token in absorbed form over a paged cache.

The latents are never expanded (DeepSeek-V2, section 2.1.2): with W_UK moved to the query and W_UV to the output, all
heads attend to one shared sequence of R + r numbers a token:

    q' = q_nope W_UK ;  s = (q' . c + q_pe . k_pe) * scale ;  o = (softmax(s) c) W_UV

Prompts run that way too. It costs a small model little, and a token's result then cannot depend on whether it came in
a prompt, in a piece of one, or as a step. Where the kernels serve, it does not depend on anything else either, to the
bit (``numerics/decode.cpp``); plain PyTorch gives the same up to rounding.

Legend: N tokens, S sequences, T tokens of one sequence, L keys, D hidden, V vocabulary, H heads, R latent rank,
n nope dims, r rope dims, v value dims, d = n + r, e = R + r, E experts, K chosen, I expert width.
"""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from shenhong.errors import ModelError
from shenhong.model.attention import LATENT_NORM_EPS, LatentAttention
from shenhong.model.block import Layer
from shenhong.model.cache import Pools
from shenhong.model.decoder import Decoder
from shenhong.model.experts import ExpertBlock, Router
from shenhong.model.layers import FeedForward
from shenhong.model.multitoken import MultiTokenLayer
from shenhong.model.rope import rotate
from shenhong.numerics import kernels_in_use, ops
from shenhong.numerics.fused_decode import Batch, FusedLayers, pack, pack_gated, project

log = logging.getLogger("shenhong.model")


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
    uk_HnR: Tensor
    uv_HRv: Tensor
    out: Tensor
    mlp_norm_D: Tensor
    dense: tuple[Tensor, Tensor] | None  # gate_up, down of the dense block or the shared expert
    experts: Experts | None


@dataclass(frozen=True)
class Join:
    """The front of the multi-token-prediction layer, and the norm behind it."""

    enorm_D: Tensor
    hnorm_D: Tensor
    matrix: Tensor
    norm_D: Tensor


class PreparedDecoder:
    """A copy of a decoder for generation; later changes of the decoder do not reach it.

    ``fused``: whether the kernels serve; they must agree with PyTorch on a small batch first.
    """

    @torch.no_grad()
    def __init__(self, decoder: Decoder, dtype: torch.dtype = torch.float32) -> None:
        config = decoder.config
        if config.attention != "mla":
            raise ModelError('only attention "mla" has a latent cache to generate from')
        self.config, self.dtype = config, dtype
        self.device = decoder.head_weight.device
        self.cos, self.sin = decoder.cos.contiguous(), decoder.sin.contiguous()
        self.embedding = decoder.model.embed_tokens.weight.to(dtype, copy=True)
        self.head = self.embedding
        if decoder.lm_head is not None:
            self.head = decoder.head_weight.to(dtype, copy=True)
        self.norm_D = decoder.model.norm.weight.clone()
        layers = [layer for layer in decoder.model.layers if isinstance(layer, Layer)]
        self.rows = [_attention(layer).cache_row for layer in layers]
        self.scale = _attention(layers[0]).scale
        self.layers = [self._prepare(layer) for layer in layers]
        self.trunk = config.num_hidden_layers
        self.join: Join | None = None
        if isinstance(last := layers[-1], MultiTokenLayer):
            self.join = Join(
                last.enorm.weight.clone(),
                last.hnorm.weight.clone(),
                last.eh_proj.weight.to(dtype, copy=True),
                last.shared_head.norm.weight.clone(),
            )
        self.fused: FusedLayers | None = None
        if self.device.type == "cpu" and dtype in (torch.float32, torch.bfloat16):
            self._fuse()

    def _prepare(self, layer: Layer) -> Weights:
        config, attention = self.config, _attention(layer)

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
            uk_HnR=uk.contiguous(),
            uv_HRv=uv.transpose(1, 2).contiguous(),
            out=cast(attention.o_proj.weight),
            mlp_norm_D=layer.post_attention_layernorm.weight.detach().clone(),
            dense=dense,
            experts=experts,
        )

    # ---------------------------------------------------------------- use

    def new_pools(self, pages: int, page: int) -> Pools:
        return Pools(self.rows, pages, page, self.dtype, self.device)

    @torch.no_grad()
    def forward(self, batch: Batch, pools: Pools) -> Tensor:
        """Appends the batch's tokens to their sequences; [N, D] states after the final norm."""
        return self._run(None, batch, pools, range(self.trunk), self.norm_D)

    @torch.no_grad()
    def draft(self, states_ND: Tensor, batch: Batch, pools: Pools) -> Tensor:
        """The multi-token-prediction layer's states [N, D], from which the head predicts the token after next.

        ``states_ND``: what ``forward`` (or this function, to look further) gave at the batch's positions; the
        batch's tokens are those that follow these positions.
        """
        assert self.join is not None, "this model has no multi-token-prediction layer"
        eps = self.config.rms_norm_eps
        following_ND = ops.rms_norm(self._embed(batch), self.join.enorm_D, eps)
        pair = torch.cat((following_ND, ops.rms_norm(states_ND, self.join.hnorm_D, eps)), dim=-1)
        if self.fused:
            x_ND = project(pair, self.packed_join, self.config.hidden_size)
        else:
            x_ND = F.linear(pair, self.join.matrix)
        return self._run(x_ND, batch, pools, range(self.trunk, self.trunk + 1), self.join.norm_D)

    @torch.no_grad()
    def logits(self, states_ND: Tensor) -> Tensor:
        """[N, V] fp32."""
        if self.fused:
            return project(states_ND, self.packed_head, self.config.vocab_size)
        return F.linear(states_ND, self.head).float()

    def _embed(self, batch: Batch) -> Tensor:
        tokens_N = torch.from_numpy(batch.tokens_N).to(self.device)
        x_ND = F.embedding(tokens_N, self.embedding)
        return x_ND.float() if self.fused else x_ND

    def _run(
        self, x_ND: Tensor | None, batch: Batch, pools: Pools, layers: range, norm_D: Tensor
    ) -> Tensor:
        """x, or the tokens' embeddings, through some layers and a norm."""
        if self.fused:
            return self.fused.run(x_ND, self.embedding, batch, pools.layers, layers, norm_D)
        x_ND = self._embed(batch) if x_ND is None else x_ND
        places = _Places(batch, pools.page, self.device)
        positions = places.positions_N
        cos, sin = self.cos[positions], self.sin[positions]
        for number in layers:
            weights, pool = self.layers[number], pools.layers[number].flatten(0, 1)
            q_NHd, row_Ne = self._project(weights, x_ND, cos, sin)
            pool[places.slots_N] = row_Ne
            x_ND = x_ND + self._attend(weights, q_NHd, pool, places)
            x_ND = self._feed_forward(weights, x_ND)
        return ops.rms_norm(x_ND, norm_D, self.config.rms_norm_eps)

    # ---------------------------------------------------------------- parts of a layer in PyTorch

    def _project(
        self, weights: Weights, x_ND: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(queries [N, H, e] absorbed, rotated and scaled; cache rows [N, e])."""
        config = self.config
        R, r, H = config.kv_lora_rank, config.qk_rope_head_dim, config.num_attention_heads
        u_ND = ops.rms_norm(x_ND, weights.norm_D, config.rms_norm_eps)
        down = F.linear(u_ND, weights.down)
        q, c_NR, k_rope_Nr = down.split([down.shape[1] - R - r, R, r], dim=-1)
        if weights.q_b is not None:
            assert weights.q_norm is not None
            q = F.linear(ops.rms_norm(q, weights.q_norm, LATENT_NORM_EPS), weights.q_b)
        c_NR = ops.rms_norm(c_NR, weights.kv_norm_R, LATENT_NORM_EPS)
        q_nope, q_pe = q.unflatten(-1, (H, -1)).split([config.qk_nope_head_dim, r], dim=-1)
        q_latent_NHR = torch.bmm(q_nope.transpose(0, 1), weights.uk_HnR).transpose(0, 1)
        q_pe = rotate(q_pe, cos[:, None], sin[:, None])
        query = torch.cat((q_latent_NHR, q_pe), dim=-1) * self.scale
        return query, torch.cat((c_NR, rotate(k_rope_Nr, cos, sin)), dim=-1)

    def _attend(self, weights: Weights, query_NHe: Tensor, pool: Tensor, places: _Places) -> Tensor:
        """Attention output [N, D]; groups of sequences with equally many new tokens run together."""
        N, H, R = *query_NHe.shape[:2], self.config.kv_lora_rank
        o_NHR = query_NHe.new_empty(N, H, R)
        for tokens_ST, slots_SL, mask_STL in places.groups:
            S, T = tokens_ST.shape
            past_SLe = pool[slots_SL]
            query = query_NHe[tokens_ST].flatten(1, 2)
            # The cache comes first: with it transposed, the library would copy all of it.
            scores = torch.bmm(past_SLe, query.mT).mT.reshape(S, T, H, -1) + mask_STL[:, :, None]
            share = scores.softmax(dim=-1).to(self.dtype).flatten(1, 2)
            o_NHR[tokens_ST] = torch.bmm(share, past_SLe[..., :R]).view(S, T, H, R)
        o_NHv = torch.bmm(o_NHR.transpose(0, 1), weights.uv_HRv).transpose(0, 1)
        return F.linear(o_NHv.reshape(N, -1), weights.out)

    def _feed_forward(self, weights: Weights, x_ND: Tensor) -> Tensor:
        u_ND = ops.rms_norm(x_ND, weights.mlp_norm_D, self.config.rms_norm_eps)
        if weights.experts is not None:
            x_ND = x_ND + route(weights.experts, u_ND)
        if weights.dense is not None:
            gate_up, down = weights.dense
            x_ND = x_ND + F.linear(ops.swiglu(F.linear(u_ND, gate_up)), down)
        return x_ND

    # ---------------------------------------------------------------- kernels

    def _fuse(self) -> None:
        """Hands the layers to the kernels if these agree with PyTorch here."""
        if not kernels_in_use():
            return
        batch = Batch(
            np.arange(5) % self.config.vocab_size,
            np.array([0, 1, 2, 0, 1], np.int32)[: 3 + min(2, self.config.max_position_embeddings)],
            np.array([0, 3, 5], np.int32),
            np.array([[2, 0], [1, 3]], np.int32),
        )
        if self.config.max_position_embeddings < 3:
            return
        expected = self.forward(batch, self.new_pools(4, 2))
        self.packed_head = pack(self.head)
        if self.join:
            self.packed_join = pack(self.join.matrix)
        config = self.config
        self.fused = FusedLayers(
            [self._packed(weights) for weights in self.layers],
            {
                "dtype": int(self.dtype == torch.bfloat16),
                "hidden": config.hidden_size,
                "heads": config.num_attention_heads,
                "rank": config.kv_lora_rank,
                "nope": config.qk_nope_head_dim,
                "rope": config.qk_rope_head_dim,
                "value": config.v_head_dim,
                "q_rank": config.q_lora_rank or 0,
                "experts": config.n_routed_experts,
                "chosen": config.num_experts_per_tok,
                "inner": config.moe_intermediate_size,
                "groups": config.n_group,
                "kept_groups": config.topk_group,
                "normalise": int(config.norm_topk_prob),
                "scaling": config.scaling_factor,
                "eps": config.rms_norm_eps,
                "latent_eps": LATENT_NORM_EPS,
                "scale": self.scale,
                "cosine": self.cos,
                "sine": self.sin,
            },
        )
        found = self.forward(batch, self.new_pools(4, 2))
        bound = 1e-3 if self.dtype == torch.float32 else 0.2
        # A near tie between two experts may fall either way, so most tokens must agree, not all.
        near = (found - expected.float()).abs().amax(1) <= bound * expected.abs().max().float()
        if near.sum() < 4:
            self.fused = None
            log.warning("the decoding kernel differs from PyTorch here, so PyTorch serves (slower)")
            return
        self.layers, self.head = [], self.embedding  # one copy of the weights is enough

    def _packed(self, weights: Weights) -> dict[str, Tensor | int | None]:
        experts, (gate_up, down) = weights.experts, weights.dense or (None, None)
        return {
            "norm": weights.norm_D,
            "down": pack(weights.down),
            "q_norm": weights.q_norm,
            "q_b": None if weights.q_b is None else pack(weights.q_b),
            "kv_norm": weights.kv_norm_R,
            "uk": pack(weights.uk_HnR.mT),
            "uv": pack(weights.uv_HRv.mT),
            "out": pack(weights.out),
            "mlp_norm": weights.mlp_norm_D,
            "dense_gate_up": None if gate_up is None else pack_gated(gate_up),
            "dense_down": None if down is None else pack(down),
            "dense_inner": 0 if down is None else down.shape[1],
            "router": pack(experts.router.weight.detach().float()) if experts else None,
            "bias": experts.router.e_score_correction_bias if experts else None,
            "gate_up": pack_gated(experts.gate_up_E2ID) if experts else None,
            "expert_down": pack(experts.down_EDI) if experts else None,
        }


def _attention(layer: Layer) -> LatentAttention:
    assert isinstance(layer.self_attn, LatentAttention)
    return layer.self_attn


class _Places:
    """Where a batch's tokens and keys lie, for PyTorch's indexing: one group per number of new tokens."""

    def __init__(self, batch: Batch, page: int, device: torch.device) -> None:
        _, positions, starts, tables = batch
        counts = np.diff(starts)
        sequence = np.repeat(np.arange(len(counts)), counts)
        slots = tables[sequence, positions // page].astype(np.int64) * page + positions % page
        self.positions_N = torch.from_numpy(positions.astype(np.int64)).to(device)
        self.slots_N = torch.from_numpy(slots).to(device)
        self.groups: list[tuple[Tensor, Tensor, Tensor]] = []
        for T in np.unique(counts):
            members = np.flatnonzero(counts == T)
            tokens = starts[members, None] + np.arange(T)
            seen = positions[tokens]
            keys = np.arange(seen.max() + 1)
            # A shorter sequence's table may end early: its keys past the end are masked.
            column = np.minimum(keys // page, tables.shape[1] - 1)
            past = np.maximum(tables[members][:, column], 0).astype(np.int64) * page + keys % page
            past = np.where(keys <= seen[:, -1:], past, past[:, :1])
            mask = np.where(keys <= seen[..., None], 0.0, -np.inf).astype(np.float32)
            group = (tokens.astype(np.int64), past, mask)
            self.groups.append(tuple(torch.from_numpy(a).to(device) for a in group))  # type: ignore[arg-type]


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
