"""Attention in training mode: latent attention, and the other two kinds a config may choose.

Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1): keys and values come from one
narrow latent c = norm(W_DKV x), so that a cache holds c and one rotated key k_pe for all heads. The decoding
form, which never expands the latent, is in ``decode.py``.

Legend: N tokens of all documents, D hidden, H heads, G groups of heads, R latent rank, n nope dims, r rope dims,
v value dims, d = n + r (with grouped queries the width of every head).
"""

from __future__ import annotations

from torch import Tensor, nn

from shenhong.model.config import ModelConfig
from shenhong.model.layers import Matrix, Norm
from shenhong.model.rope import softmax_scale
from shenhong.numerics import ops

# transformers builds the two latent norms without the configured epsilon.
LATENT_NORM_EPS = 1e-6


class LatentAttention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.rank = config.kv_lora_rank
        self.rope = config.qk_rope_head_dim
        self.scale = softmax_scale(config)
        D, q_width = config.hidden_size, self.heads * config.qk_head_dim
        self.q_lora_rank = config.q_lora_rank
        if config.q_lora_rank is None:
            self.q_proj = Matrix(D, q_width)
        else:
            self.q_a_proj = Matrix(D, config.q_lora_rank)
            self.q_a_layernorm = Norm(config.q_lora_rank, LATENT_NORM_EPS)
            self.q_b_proj = Matrix(config.q_lora_rank, q_width)
        self.kv_a_proj_with_mqa = Matrix(D, self.rank + self.rope)
        self.kv_a_layernorm = Norm(self.rank, LATENT_NORM_EPS)
        kv_width = self.heads * (config.qk_nope_head_dim + config.v_head_dim)
        self.kv_b_proj = Matrix(self.rank, kv_width)
        self.o_proj = Matrix(self.heads * config.v_head_dim, D)

    @property
    def cache_row(self) -> int:
        """Numbers kept per token: the latent and the one rotated key, nothing else."""
        return self.rank + self.rope

    def forward(self, x_ND: Tensor, docs: ops.Documents, cos: Tensor, sin: Tensor) -> Tensor:
        if self.q_lora_rank is None:
            q_NHd = self.q_proj(x_ND)
        else:
            q_NHd = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_ND)))
        c_NR, k_rope_Nr = self.kv_a_proj_with_mqa(x_ND).split([self.rank, self.rope], dim=-1)
        kv_NHe = self.kv_b_proj(self.kv_a_layernorm(c_NR)).unflatten(-1, (self.heads, -1))
        q_NHd = q_NHd.unflatten(-1, (self.heads, -1))
        o_NHv = ops.latent_attention(q_NHd, kv_NHe, k_rope_Nr, docs, cos, sin, self.scale)
        return self.o_proj(o_NHv.flatten(1))


class MultiHeadAttention(nn.Module):
    """The ablation's full multi-head attention: same heads and dims, RoPE on the last r dims of each."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.rope = config.qk_rope_head_dim
        self.scale = softmax_scale(config)
        D, H = config.hidden_size, self.heads
        self.q_proj = Matrix(D, H * config.qk_head_dim)
        self.k_proj = Matrix(D, H * config.qk_head_dim)
        self.v_proj = Matrix(D, H * config.v_head_dim)
        self.o_proj = Matrix(H * config.v_head_dim, D)

    def forward(self, x_ND: Tensor, docs: ops.Documents, cos: Tensor, sin: Tensor) -> Tensor:
        heads = (self.heads, -1)
        q_NHd = self.q_proj(x_ND).unflatten(-1, heads)
        k_NHd = self.k_proj(x_ND).unflatten(-1, heads)
        v_NHv = self.v_proj(x_ND).unflatten(-1, heads)
        o_NHv = ops.attention(q_NHd, k_NHd, v_NHv, docs, cos, sin, self.rope, self.scale)
        return self.o_proj(o_NHv.flatten(1))


class GroupedQueryAttention(nn.Module):
    """Llama's and Qwen's attention: H / G query heads share each of G key and value heads (arXiv 2305.13245).

    RoPE rotates all d dims of a head in interleaved pairs; folders with half-split rows are reordered when they are
    loaded (``export/huggingface.py``). Qwen2 adds a bias to queries, keys and values, Qwen3 a norm to each head's queries
    and keys.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.groups = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        self.scale = softmax_scale(config)
        D, d, bias = config.hidden_size, self.head_dim, config.qkv_bias
        self.q_proj = Matrix(D, self.heads * d, bias)
        self.k_proj = Matrix(D, self.groups * d, bias)
        self.v_proj = Matrix(D, self.groups * d, bias)
        self.o_proj = Matrix(self.heads * d, D)
        self.qk_norm = config.qk_norm
        if self.qk_norm:
            self.q_norm = Norm(d, config.rms_norm_eps)
            self.k_norm = Norm(d, config.rms_norm_eps)

    @property
    def cache_row(self) -> int:
        """Numbers kept per token: every group's key and value."""
        return 2 * self.groups * self.head_dim

    def forward(self, x_ND: Tensor, docs: ops.Documents, cos: Tensor, sin: Tensor) -> Tensor:
        q_NHd = self.q_proj(x_ND).unflatten(-1, (self.heads, -1))
        k_NGd = self.k_proj(x_ND).unflatten(-1, (self.groups, -1))
        v_NGd = self.v_proj(x_ND).unflatten(-1, (self.groups, -1))
        if self.qk_norm:
            q_NHd, k_NGd = self.q_norm(q_NHd), self.k_norm(k_NGd)
        shared = self.heads // self.groups
        k_NHd, v_NHd = (t.repeat_interleave(shared, 1) for t in (k_NGd, v_NGd))
        o_NHd = ops.attention(q_NHd, k_NHd, v_NHd, docs, cos, sin, self.head_dim, self.scale)
        return self.o_proj(o_NHd.flatten(1))


ATTENTION = {"mla": LatentAttention, "mha": MultiHeadAttention, "gqa": GroupedQueryAttention}


def attention_for(config: ModelConfig) -> nn.Module:
    return ATTENTION[config.attention](config)
