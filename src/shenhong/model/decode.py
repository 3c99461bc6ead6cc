"""The decoder in the form that generates: weights prepared once, every token over a paged cache.

What attention computes there, and what a row of its cache holds, says ``decode_latent.py`` (the absorbed form, which
never expands the latents) or ``decode_grouped.py``.

Prompts run as steps do. It costs a small model little, and a token's result then cannot depend on whether it came in
a prompt, in a piece of one, or as a step. Where the kernels serve, it does not depend on anything else either, to the
bit (``numerics/decode.cpp``); plain PyTorch gives the same up to rounding.

Legend: N tokens, D hidden, V vocabulary, E experts, K chosen, A assignments, I expert width.
"""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shenhong.errors import ModelError
from shenhong.model.attention import LATENT_NORM_EPS, GroupedQueryAttention, LatentAttention
from shenhong.model.block import Layer
from shenhong.model.cache import Pools, SlotMapping
from shenhong.model.decode_check import disagreement
from shenhong.model.decode_grouped import GroupedWeights
from shenhong.model.decode_latent import LatentWeights
from shenhong.model.decoder import Decoder
from shenhong.model.experts import ExpertBlock, Router
from shenhong.model.layers import FeedForward
from shenhong.model.multitoken import MultiTokenLayer
from shenhong.model.serving import no_kernel
from shenhong.numerics import kernels_in_use, ops
from shenhong.numerics.cpu.decode import Batch, FusedLayers, Writing, pack, pack_gated, project

log = logging.getLogger("shenhong.model")

COST = "about half as fast, and a text may depend on what shares its batch where two tokens are nearly as likely"


@dataclass(frozen=True)
class Experts:
    router: Router
    gate_up_E2ID: Tensor
    down_EDI: Tensor


@dataclass(frozen=True)
class Weights:
    """One layer's."""

    norm_D: Tensor
    attention: LatentWeights | GroupedWeights
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

    ``take``: the decoder gives its weights up layer by layer and is of no use afterwards, so that there are never two
    whole copies. ``fused``: the kernel, where it serves; each layer must agree with PyTorch first. ``unfused``: why it
    does not.
    """

    @torch.no_grad()
    def __init__(
        self, decoder: Decoder, dtype: torch.dtype = torch.float32, take: bool = False
    ) -> None:
        config = decoder.config
        if config.attention == "mha":
            raise ModelError('attention "mha" is for training only; choose "mla" or "gqa"')
        self.config, self.dtype = config, dtype
        self.device = decoder.head_weight.device
        self.cos, self.sin = decoder.cos.contiguous(), decoder.sin.contiguous()
        self.embedding = decoder.model.embed_tokens.weight.to(dtype, copy=True)
        self.head = self.embedding
        if decoder.lm_head is not None:
            self.head = decoder.head_weight.to(dtype, copy=True)
        self.norm_D = decoder.model.norm.weight.clone()
        layers = [layer for layer in decoder.model.layers if isinstance(layer, Layer)]
        self.rows = [_attention_of(layer).cache_row for layer in layers]
        self.trunk = config.num_hidden_layers
        self.join: Join | None = None
        if isinstance(last := layers[-1], MultiTokenLayer):
            self.join = Join(
                last.enorm.weight.clone(),
                last.hnorm.weight.clone(),
                last.eh_proj.weight.to(dtype, copy=True),
                last.shared_head.norm.weight.clone(),
            )
        self.layers: list[Weights] = []
        for layer in layers:
            self.layers.append(self._prepare(layer))
            if take:
                _empty(layer)
        if take:
            _empty(decoder)
        self.fused: FusedLayers | None = None
        self.unfused = self._fuse()
        if self.unfused and self.device.type == "cpu" and kernels_in_use():  # else it was said
            name = str(dtype).removeprefix("torch.")
            log.warning("%s: in %s PyTorch serves this model, %s", self.unfused, name, COST)

    def _prepare(self, layer: Layer) -> Weights:
        def cast(*matrices: Tensor) -> Tensor:
            return torch.cat([m.detach().to(self.dtype) for m in matrices])

        def feed_forward(block: FeedForward) -> tuple[Tensor, Tensor]:
            return cast(block.gate_proj.weight, block.up_proj.weight), cast(block.down_proj.weight)

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
            attention=_weights(_attention_of(layer), self.dtype),
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
    def write(self, batch: Batch, pools: Pools, writing: Writing) -> list[list[int]]:
        """Goes on behind the batch, token by token, in one call of the kernel: only where ``fused``.

        What each sequence writes: up to its room, a token that ends it included, or -1 in place of a token where
        the model's numbers are not finite.
        """
        assert self.fused is not None
        return self.fused.write(
            self.embedding,
            batch,
            pools.layers,
            range(self.trunk),
            self.norm_D,
            self.packed_head,
            writing,
        )

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
        slots = SlotMapping(batch, pools.page, self.device)
        for number in layers:
            weights = self.layers[number]
            x_ND = self.attend(weights, x_ND, pools.layers[number], slots)
            x_ND = self.feed_forward(weights, x_ND)
        return ops.rms_norm(x_ND, norm_D, self.config.rms_norm_eps)

    def attend(self, weights: Weights, x_ND: Tensor, pool: Tensor, slots: SlotMapping) -> Tensor:
        """x + attention in PyTorch; the tokens' rows go into the layer's pool."""
        cos, sin = self.cos[slots.positions_N], self.sin[slots.positions_N]
        pool = pool.flatten(0, 1)
        u_ND = ops.rms_norm(x_ND, weights.norm_D, self.config.rms_norm_eps)
        query, row = weights.attention.project(u_ND, cos, sin)
        pool[slots.slots_N] = row
        return x_ND + weights.attention.attend(query, pool, slots)

    def feed_forward(self, weights: Weights, x_ND: Tensor) -> Tensor:
        """x + the dense block and the experts, in PyTorch."""
        u_ND = ops.rms_norm(x_ND, weights.mlp_norm_D, self.config.rms_norm_eps)
        if weights.experts is not None:
            x_ND = x_ND + route(weights.experts, u_ND, self.config.hidden_act)
        if weights.dense is not None:
            gate_up, down = weights.dense
            x_ND = x_ND + F.linear(ops.gated(F.linear(u_ND, gate_up), self.config.hidden_act), down)
        return x_ND

    # ---------------------------------------------------------------- kernels

    def _fuse(self) -> str | None:
        """Hands the layers to the kernels. What stands against it, in words; then PyTorch goes on serving."""
        if reason := no_kernel(self.config, self.dtype, self.device):
            return reason
        config = self.config
        layers = [self._packed(weights) for weights in self.layers]
        numbers = {
            "dtype": int(self.dtype == torch.bfloat16),
            "hidden": config.hidden_size,
            "heads": config.num_attention_heads,
            "rank": config.kv_lora_rank,
            "nope": config.qk_nope_head_dim,
            "rope": config.rotary_dim,
            "value": config.v_head_dim or config.head_dim,
            "q_rank": config.q_lora_rank or 0,
            "key_heads": config.num_key_value_heads,
            "experts": config.n_routed_experts,
            "chosen": config.num_experts_per_tok,
            "inner": config.moe_intermediate_size,
            "groups": config.n_group,
            "kept_groups": config.topk_group,
            "normalise": int(config.norm_topk_prob),
            "softmax": int(config.scoring_func == "softmax"),
            "scaling": config.scaling_factor,
            "eps": config.rms_norm_eps,
            "latent_eps": LATENT_NORM_EPS,
            "scale": self.layers[0].attention.scale,
            "cosine": self.cos,
            "sine": self.sin,
        }
        if differs := disagreement(self, layers, numbers):
            return f"its kernel differs from PyTorch on this machine: {differs}"
        self.fused = FusedLayers(layers, numbers)
        self.packed_head = pack(self.head)
        if self.join:
            self.packed_join = pack(self.join.matrix)
        self.layers, self.head = [], self.embedding  # one copy of the weights is enough
        return None

    def _packed(self, weights: Weights) -> dict[str, Tensor | int | None]:
        experts, (gate_up, down) = weights.experts, weights.dense or (None, None)
        return {
            **weights.attention.packed(),
            "norm": weights.norm_D,
            "mlp_norm": weights.mlp_norm_D,
            "dense_gate_up": None if gate_up is None else pack_gated(gate_up),
            "dense_down": None if down is None else pack(down),
            "dense_inner": 0 if down is None else down.shape[1],
            "router": pack(experts.router.weight.detach().float()) if experts else None,
            "bias": experts.router.e_score_correction_bias if experts else None,
            "gate_up": pack_gated(experts.gate_up_E2ID) if experts else None,
            "expert_down": pack(experts.down_EDI) if experts else None,
        }


def _empty(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.data = parameter.data.new_empty(0)


def _attention_of(layer: Layer) -> LatentAttention | GroupedQueryAttention:
    assert isinstance(layer.self_attn, LatentAttention | GroupedQueryAttention)
    return layer.self_attn


def _weights(
    attention: LatentAttention | GroupedQueryAttention, dtype: torch.dtype
) -> LatentWeights | GroupedWeights:
    if isinstance(attention, GroupedQueryAttention):
        return GroupedWeights.of(attention, dtype)
    return LatentWeights.of(attention, dtype)


def route(experts: Experts, u_ND: Tensor, act: str) -> Tensor:
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
            gate_up, down = (
                m[expert].to(u_ND.dtype) for m in (experts.gate_up_E2ID, experts.down_EDI)
            )
            inner = ops.gated(F.linear(sorted_AD[rows], gate_up), act)
            torch.mm(inner, down.T, out=out_AD[rows])
            begin += count
    y_NKD = torch.empty_like(out_AD).index_copy_(0, order, out_AD).view(N, K, -1)
    return torch.bmm(gates_NK.to(u_ND.dtype)[:, None], y_NKD).squeeze(1)
