"""What a shape costs: parameters, FLOPs and cache, counted from the configuration alone.

A product of [a, b] with a vector costs 2ab FLOPs. "Active" is what one token passes through: its K chosen experts
and the shared one, not all E. The MTP layer is counted separately, as it can be left off after training.
"""

from __future__ import annotations

from typing import NamedTuple

from shenhong.model.config import ModelConfig


class Parameters(NamedTuple):
    """Numbers of parameters; ``total`` and ``active`` are those of the trunk with embedding and head."""

    total: int
    active: int
    embeddings: int  # embedding, and head where it is not tied
    multitoken: int  # the MTP layer, all its experts included; not in total

    @property
    def total_without_embeddings(self) -> int:
        return self.total - self.embeddings

    @property
    def active_without_embeddings(self) -> int:
        return self.active - self.embeddings


class CacheNumbers(NamedTuple):
    """Numbers kept per token and layer: by the model's own attention, and if every head kept its keys and values."""

    kept: int
    mha: int


def attention_matrices(config: ModelConfig) -> int:
    """Entries of one layer's attention matrices."""
    D, H = config.hidden_size, config.num_attention_heads
    d, v = _head(config)
    if config.attention == "mha":
        return D * H * (2 * d + v) + H * v * D
    if config.attention == "gqa":
        return D * d * (2 * H + 2 * config.num_key_value_heads)
    R, rank = config.kv_lora_rank, config.q_lora_rank
    queries = D * H * d if rank is None else D * rank + rank * H * d
    latent = D * (R + config.qk_rope_head_dim) + R * H * (config.qk_nope_head_dim + v)
    return queries + latent + H * v * D


def block_matrices(config: ModelConfig, layer: int) -> tuple[int, int]:
    """(all, active) entries of a layer's matrices, the router among them."""
    D = config.hidden_size
    attention = attention_matrices(config)
    if not config.has_experts(layer):
        dense = attention + 3 * D * config.intermediate_size
        return dense, dense
    expert, router = 3 * D * config.moe_intermediate_size, D * config.n_routed_experts
    common = attention + router + config.n_shared_experts * expert
    return (
        common + config.n_routed_experts * expert,
        common + config.num_experts_per_tok * expert,
    )


def _head(config: ModelConfig) -> tuple[int, int]:
    """Widths of a query and of a value."""
    return config.qk_head_dim, config.head_dim if config.attention == "gqa" else config.v_head_dim


def _norms(config: ModelConfig) -> int:
    """Norm weights and biases of one layer."""
    inner = 0
    if config.attention == "mla":
        inner = config.kv_lora_rank + (config.q_lora_rank or 0)
    elif config.qkv_bias:
        inner = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    if config.qk_norm:
        inner += 2 * config.head_dim
    return 2 * config.hidden_size + inner


def parameters(config: ModelConfig) -> Parameters:
    """Counts every trained number; the selection biases are not parameters."""
    D, L = config.hidden_size, config.num_hidden_layers
    embeddings = config.vocab_size * D * (1 if config.tie_word_embeddings else 2)
    blocks = [block_matrices(config, layer) for layer in range(L)]
    other = embeddings + L * _norms(config) + D
    multitoken = 0
    if config.num_nextn_predict_layers:
        # enorm, hnorm and shared_head.norm beside the block's own
        multitoken = block_matrices(config, L)[0] + _norms(config) + 2 * D * D + 3 * D
    total, active = (sum(block[i] for block in blocks) + other for i in (0, 1))
    return Parameters(total, active, embeddings, multitoken)


def forward_flops(config: ModelConfig, mean_context: float, multitoken: bool = False) -> float:
    """Forward FLOPs of one token in training mode, head included; a training step costs three times as much.

    ``mean_context`` is the mean number of keys a query sees, itself included: (T + 1) / 2 for documents of T tokens.
    ``multitoken`` adds the MTP layer and its pass through the head.
    """
    D, H, L = config.hidden_size, config.num_attention_heads, config.num_hidden_layers
    attention = 2 * H * sum(_head(config)) * mean_context
    head = 2 * D * config.vocab_size
    trunk = sum(2 * block_matrices(config, layer)[1] + attention for layer in range(L)) + head
    if not multitoken:
        return trunk
    return trunk + 2 * block_matrices(config, L)[1] + attention + 4 * D * D + head


def cache_numbers(config: ModelConfig) -> CacheNumbers:
    every_head = config.num_attention_heads * sum(_head(config))
    if config.attention == "gqa":
        return CacheNumbers(2 * config.num_key_value_heads * config.head_dim, every_head)
    if config.attention == "mha":
        return CacheNumbers(every_head, every_head)
    return CacheNumbers(config.kv_lora_rank + config.qk_rope_head_dim, every_head)
