"""Multi-token prediction of depth one (DeepSeek-V3, section 2.2): what stands around the MTP layer's block.

    x_i = W [enorm(embedding of token i+1) ; hnorm(h_i)]

with h taken *after* the trunk's final norm and the embedding first: the order in which vLLM, SGLang and llama.cpp
read published checkpoints (the paper's eq. 21 writes it the other way round). Embedding and head are the trunk's.

Legend: N tokens, D hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shenhong.model.block import Layer
from shenhong.model.config import ModelConfig
from shenhong.model.layers import Matrix, Norm


class SharedHead(nn.Module):
    """The norm before the shared head; the head's matrix is the trunk's and only duplicated on disk."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = Norm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x_ND: Tensor) -> Tensor:
        return self.norm(x_ND)


class MultiTokenLayer(Layer):
    """An ordinary block with ``join`` before it and its own norm behind it."""

    def __init__(self, config: ModelConfig, number: int) -> None:
        super().__init__(config, number)
        D, eps = config.hidden_size, config.rms_norm_eps
        self.enorm = Norm(D, eps)
        self.hnorm = Norm(D, eps)
        self.eh_proj = Matrix(2 * D, D)
        self.shared_head = SharedHead(config)

    def join(self, next_ND: Tensor, states_ND: Tensor) -> Tensor:
        """[N, D] input of the block from the next tokens' embeddings and the trunk's states."""
        return self.eh_proj(torch.cat((self.enorm(next_ND), self.hnorm(states_ND)), dim=-1))
