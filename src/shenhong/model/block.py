"""One decoder layer. Legend: N tokens, D hidden."""

from __future__ import annotations

from torch import Tensor, nn

from shenhong.model.attention import attention_for
from shenhong.model.balance import RouterStats
from shenhong.model.config import ModelConfig
from shenhong.model.experts import ExpertBlock, Observe
from shenhong.model.layers import FeedForward, Norm
from shenhong.numerics import ops


class Layer(nn.Module):
    """Pre-norm block: x + attention(norm x), then + feed-forward or experts of (norm x)."""

    def __init__(self, config: ModelConfig, number: int) -> None:
        super().__init__()
        D, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = Norm(D, eps)
        self.self_attn = attention_for(config)
        self.post_attention_layernorm = Norm(D, eps)
        self.mlp: nn.Module = (
            ExpertBlock(config)
            if config.has_experts(number)
            else FeedForward(D, config.intermediate_size, config.hidden_act)
        )

    def forward(
        self, x_ND: Tensor, docs: ops.Documents, cos: Tensor, sin: Tensor, observe: Observe
    ) -> tuple[Tensor, list[RouterStats]]:
        x_ND = x_ND + self.self_attn(self.input_layernorm(x_ND), docs, cos, sin)
        u_ND = self.post_attention_layernorm(x_ND)
        if isinstance(self.mlp, ExpertBlock):
            y_ND, stats = self.mlp(u_ND, docs, observe)
            return x_ND + y_ND, [stats]
        return x_ND + self.mlp(u_ND), []
