"""The decoder: embedding, layers, final norm, head, and the multi-token-prediction layer behind them.

A batch is a flat run of tokens with document boundaries; attention never crosses one, and positions start anew
with each. Parameters carry Hugging Face's names (experts stacked), fp32; ``compute_dtype`` is what the products
run in.

Legend: N tokens, D hidden, V vocabulary, L trunk layers.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shenhong.model.balance import RouterStats, Rule, next_bias
from shenhong.model.block import Layer
from shenhong.model.config import ModelConfig
from shenhong.model.experts import LOAD_ONLY, ExpertBlock, Observe, Router
from shenhong.model.layers import Matrix, Norm
from shenhong.model.multitoken import MultiTokenLayer
from shenhong.model.rope import rope_tables
from shenhong.numerics import ops


class Hidden(NamedTuple):
    """States after the norm that precedes the head, and what each expert layer observed."""

    states_ND: Tensor
    routing: list[RouterStats]


class Trunk(nn.Module):
    """What Hugging Face calls ``model``; its layer number L, where there is one, is the MTP layer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        # Given a tensor, torch does not sample numbers that would be overwritten.
        blank_VD = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding.from_pretrained(blank_VD, freeze=False)
        layers: list[nn.Module] = [Layer(config, i) for i in range(config.num_hidden_layers)]
        if config.num_nextn_predict_layers:
            layers.append(MultiTokenLayer(config, config.num_hidden_layers))
        self.layers = nn.ModuleList(layers)
        self.norm = Norm(config.hidden_size, config.rms_norm_eps)


class Decoder(nn.Module):
    """A DeepSeek-V3 language model for training; ``decode.py`` prepares one for generation."""

    cos: Tensor
    sin: Tensor

    def __init__(
        self, config: ModelConfig, seed: int | None = 0, compute_dtype: torch.dtype = torch.float32
    ) -> None:
        """``seed`` None leaves matrices as memory was: for a loader that fills them all."""
        super().__init__()
        self.config = config
        self.compute_dtype = compute_dtype
        self.model = Trunk(config)
        self.lm_head: Matrix | None = None
        if not config.tie_word_embeddings:
            self.lm_head = Matrix(config.hidden_size, config.vocab_size)
        cos, sin = rope_tables(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        if seed is not None:
            self.initialise(seed)

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Matrices and embeddings normal(0, initializer_range), norms one, biases zero.

        Every tensor has a stream named by the seed and its own name, so two models that differ in one part
        begin equal in all the others.
        """
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(0.0 if name.endswith(".bias") else 1.0)
                continue
            digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
            stream = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
            parameter.normal_(0.0, self.config.initializer_range, generator=stream)
        for router in self.routers:
            router.e_score_correction_bias.zero_()

    @property
    def head_weight(self) -> Tensor:
        """[V, D] fp32: the embedding itself where it is tied."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    @property
    def routers(self) -> list[Router]:
        """Routers of the trunk's expert layers in order, then that of the MTP layer."""
        blocks = [layer.mlp for layer in self.model.layers]
        return [block.gate for block in blocks if isinstance(block, ExpertBlock)]

    def embed(self, tokens_N: Tensor) -> Tensor:
        return F.embedding(tokens_N, self.model.embed_tokens.weight).to(self.compute_dtype)

    def forward(
        self, tokens_N: Tensor, docs: ops.Documents, observe: Observe = LOAD_ONLY
    ) -> Hidden:
        """States [N, D] after the final norm, in the compute dtype, and one RouterStats per expert layer."""
        x_ND = self.embed(tokens_N)
        routing: list[RouterStats] = []
        for layer in self.model.layers[: self.config.num_hidden_layers]:
            x_ND, stats = layer(x_ND, docs, self.cos, self.sin, observe)
            routing += stats
        return Hidden(self.model.norm(x_ND), routing)

    def draft(
        self,
        states_ND: Tensor,
        tokens_N: Tensor,
        docs: ops.Documents,
        observe: Observe = LOAD_ONLY,
        detached: bool = False,
    ) -> Hidden:
        """The MTP layer's states at token i, from which the head predicts token i+2.

        ``states_ND`` are those of ``forward``. At a document's last token the embedding that is joined belongs to
        the next document (the last token of all sees the first); the caller gives these positions no weight,
        and no other position attends to them. ``detached``: no gradient reaches the trunk or the embedding.
        """
        layer = self.model.layers[-1]
        assert isinstance(layer, MultiTokenLayer), "this model has no multi-token-prediction layer"
        next_ND = self.embed(tokens_N.roll(-1))
        if detached:
            next_ND, states_ND = next_ND.detach(), states_ND.detach()
        x_ND = layer.join(next_ND, states_ND)
        x_ND, stats = layer(x_ND, docs, self.cos, self.sin, observe)
        return Hidden(layer.shared_head(x_ND), stats)

    def logits(self, states_ND: Tensor) -> Tensor:
        """[N, V] in the states' dtype. Training uses the fused head instead."""
        return F.linear(states_ND, self.head_weight.to(states_ND.dtype))

    @torch.no_grad()
    def update_balance(self, routing: list[RouterStats], rule: Rule, rate: float) -> None:
        """Moves the selection biases once per optimizer step. ``routing``: the whole batch's statistics of the
        trunk's expert layers, then those of ``draft`` if it ran."""
        for router, stats in zip(self.routers, routing, strict=False):
            bias_E = router.e_score_correction_bias
            chosen = self.config.num_experts_per_tok
            bias_E.copy_(next_bias(bias_E, stats, rule, rate, chosen))
