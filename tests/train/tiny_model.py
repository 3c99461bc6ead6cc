"""A model of a moment, and a training of something else than next tokens for it: a toy objective, and a toy source of texts."""

from __future__ import annotations

import torch

from shenhong.model import Decoder, ModelConfig
from shenhong.parallel import Mesh
from shenhong.train.data import Batch
from shenhong.train.objectives import Objective, Pass

BOS, WIDTH = 0, 16

CONFIG = ModelConfig(
    vocab_size=32,
    hidden_size=WIDTH,
    intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    kv_lora_rank=8,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=8,
    moe_intermediate_size=8,
    n_routed_experts=4,
    num_experts_per_tok=4,  # all: no choice that rounding could turn
)

TEACHER_VD = torch.randn(32, WIDTH, generator=torch.Generator().manual_seed(1))


class Alignment(Objective):
    """Policy gradient on some tokens, nearness to a teacher's states on all of them, and a term that is only reported."""

    names = ("loss", "distance", "size")
    weights = (1.0, 0.5, 0.0)

    def counts(self, batch: Batch, late: bool) -> list[torch.Tensor]:
        tokens = torch.tensor(float(len(batch.tokens_N)))
        return [batch.weights_N.sum(), tokens, tokens]

    def terms(self, batch: Batch, forward: Pass, late: bool) -> list[torch.Tensor]:
        logprobs_NV = (forward.states_ND @ forward.head_VD.T).log_softmax(-1)
        following_N1 = batch.tokens_N.roll(-1)[:, None]
        weights_N = (batch.weights_N * batch.extra["advantages"]).roll(-1)
        policy = -(weights_N * logprobs_NV.gather(1, following_N1)[:, 0]).sum()
        distance = (forward.states_ND - batch.extra["teacher"]).square().mean(1).sum()
        return [policy, distance, forward.states_ND.detach().square().mean(1).sum()]


class Texts:
    """Texts of different lengths, ``together`` of them in a forward pass; no file, no rows of one length."""

    def __init__(self, together: int = 1, texts: int = 12) -> None:
        self.together, self.texts = together, texts
        self.seen: list[torch.Tensor] = []  # a weight of the model that was handed over, each time

    def batches(self, step: int, model: Decoder, mesh: Mesh, part: int = 1) -> list[Batch]:
        self.seen.append(model.model.norm.weight.detach().clone())
        mine = range(mesh.rank, self.texts, mesh.size)
        groups = [mine[i : i + self.together] for i in range(0, len(mine), self.together)]
        return [joined([self.text(step, number) for number in group]) for group in groups]

    def text(self, step: int, number: int) -> Batch:
        stream = torch.Generator().manual_seed(100 * step + number)
        length = 3 + 2 * number
        tokens = torch.randint(1, 32, (length,), generator=stream)
        tokens[0] = BOS
        answer = (torch.arange(length) > number % 3).float()  # the rest is a prompt
        extra = {
            "advantages": torch.randn(1, generator=stream).expand(length),
            "teacher": TEACHER_VD[tokens],
        }
        return Batch(tokens, answer, tokens == BOS, length, extra)

    def mean_context(self) -> float:
        return self.texts / 2


def joined(texts: list[Batch]) -> Batch:
    """One row of several texts, each of which begins with BOS."""
    flat = (torch.cat([text[i] for text in texts]) for i in (0, 1, 2))
    names = texts[0].extra
    extra = {name: torch.cat([text.extra[name] for text in texts]) for name in names}
    return Batch(*flat, sum(text.row_length for text in texts), extra)
