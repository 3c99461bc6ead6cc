"""Muon for matrices, AdamW for everything else.

Muon (Jordan et al. 2024): keep a momentum of the gradient, replace it by the nearest half-orthogonal
matrix, step. With Moonlight's factor 0.2*sqrt(max(A, B)) (Liu et al. 2025, eq. 4) an update has the
size an AdamW update has, so both share rates and weight decay:

    M <- mu*M + G;   O = NewtonSchulz(G + mu*M);   W <- W - lr*(0.2*sqrt(max(A,B))*O + wd*W)

One matrix is what the model multiplies by on its own: in each expert the gate and the up projection, the two halves of
W_DKV|W_KR, and in each head W_UK and W_UV, W_UQ and W_QR, each by itself; with grouped queries each head of queries,
keys or values, of which there are fewer. Embedding, head, router and norms are left to
AdamW: their rows or entries are used one by one, which an orthogonal update would ignore.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator

import torch

from shenhong.model.config import ModelConfig
from shenhong.numerics.muon import decayed_add_, nesterov_, newton_schulz

_OF_HEADS = ("q_proj.weight", "k_proj.weight", "v_proj.weight")


def matrix_views(name: str, tensor: torch.Tensor, config: ModelConfig) -> list[torch.Tensor]:
    """Views of ``tensor`` as batches of matrices [batch, A, C]; empty for what AdamW updates."""
    if tensor.ndim < 2 or any(
        part in name for part in ("embed_tokens", "lm_head", "mlp.gate.", "norm")
    ):
        return []
    if name.endswith("experts.gate_up_proj"):
        experts, twice, hidden = tensor.shape
        return [tensor.view(experts * 2, twice // 2, hidden)]
    if tensor.ndim == 3:
        return [tensor]
    if name.endswith("kv_a_proj_with_mqa.weight"):
        return [part[None] for part in tensor.split([config.kv_lora_rank, config.qk_rope_head_dim])]
    if config.attention == "gqa" and name.endswith(_OF_HEADS):
        return [tensor.unflatten(0, (-1, config.head_dim))]
    if name.endswith(("q_proj.weight", "q_b_proj.weight", "k_proj.weight", "kv_b_proj.weight")):
        heads, nope = config.num_attention_heads, config.qk_nope_head_dim
        per_head = tensor.view(heads, -1, tensor.shape[1])
        return [per_head[:, :nope], per_head[:, nope:]]
    if name.endswith("v_proj.weight"):
        return [tensor.view(config.num_attention_heads, -1, tensor.shape[1])]
    return [tensor[None]]


class Optimizer:
    """Holds the state of both rules, by parameter name. ``compute`` is Muon's matrix-product dtype."""

    def __init__(
        self,
        parameters: dict[str, torch.nn.Parameter],
        config: ModelConfig,
        *,
        muon: bool,
        momentum: float,
        betas: tuple[float, float],
        weight_decay: float,
        compute: torch.dtype,
    ) -> None:
        self.config, self.momentum, self.betas = config, momentum, betas
        self.weight_decay, self.compute = weight_decay, compute
        self.parameters = parameters
        self.matrices = {
            n: p for n, p in parameters.items() if muon and matrix_views(n, p.detach(), config)
        }
        self.vectors = {n: p for n, p in parameters.items() if n not in self.matrices}
        self.decayed = {n for n, p in self.vectors.items() if matrix_views(n, p.detach(), config)}
        self.steps = 0
        self.momenta = {n: torch.zeros_like(p) for n, p in self.matrices.items()}
        self.means = {n: torch.zeros_like(p) for n, p in self.vectors.items()}
        self.squares = {n: torch.zeros_like(p) for n, p in self.vectors.items()}

    def state(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor a checkpoint must hold, by name."""
        yield "steps", torch.tensor(self.steps)
        for kind in ("momenta", "means", "squares"):
            for name, tensor in getattr(self, kind).items():
                yield f"{kind}.{name}", tensor

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        self.steps = int(tensors["steps"])
        for name, tensor in self.state():
            tensor.copy_(tensors[name])

    @torch.no_grad()
    def step(self, matrix_lr: float, vector_lr: float) -> None:
        """One update from the parameters' gradients. Parameters without a gradient rest."""
        self.steps += 1
        self._muon(matrix_lr)
        # A matrix under AdamW (the ablation) takes the matrices' rate; embedding, head and norms theirs.
        for decayed, lr in ((True, matrix_lr), (False, vector_lr)):
            names = [
                n
                for n, p in self.vectors.items()
                if (n in self.decayed) == decayed and p.grad is not None
            ]
            if names:
                self._adamw(names, lr, self.weight_decay if decayed else 0.0)

    def _adamw(self, names: list[str], lr: float, weight_decay: float) -> None:
        steps = torch.tensor(float(self.steps), device=self.vectors[names[0]].device)
        torch._fused_adamw_(
            [self.vectors[n] for n in names],
            [self._gradient(n) for n in names],
            [self.means[n] for n in names],
            [self.squares[n] for n in names],
            [],
            [steps.clone() for _ in names],
            lr=lr,
            beta1=self.betas[0],
            beta2=self.betas[1],
            weight_decay=weight_decay,
            eps=1e-10,
            amsgrad=False,
            maximize=False,
        )

    def _gradient(self, name: str) -> torch.Tensor:
        gradient = self.vectors[name].grad
        assert gradient is not None
        return gradient

    def _muon(self, lr: float) -> None:
        by_shape: dict[tuple[int, int], list[tuple[torch.Tensor, torch.Tensor]]] = defaultdict(list)
        for name, parameter in self.matrices.items():
            if parameter.grad is None:
                continue
            momentum = self.momenta[name]
            update = nesterov_(momentum, parameter.grad, self.momentum, self.compute)
            views = (matrix_views(name, tensor, self.config) for tensor in (parameter, update))
            for weight_BAC, update_BAC in zip(*views, strict=True):
                by_shape[weight_BAC.shape[1], weight_BAC.shape[2]].append((weight_BAC, update_BAC))
        for (rows, columns), group in by_shape.items():
            # Matrices of one shape, from all layers, are one batch.
            updates = [update_BAC for _, update_BAC in group]
            joined = updates[0] if len(updates) == 1 else torch.cat(updates)
            ortho_BAC = newton_schulz(joined)
            rate = lr * 0.2 * math.sqrt(max(rows, columns))
            parts = ortho_BAC.split([len(update) for update in updates])
            for (weight_BAC, _), part_BAC in zip(group, parts, strict=True):
                decayed_add_(weight_BAC, part_BAC, lr * self.weight_decay, rate)


def clip_(gradients: list[torch.Tensor], limit: float) -> float:
    """Scale all gradients in place so that their joint norm is at most ``limit``; returns the norm before."""
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    value = float(norm)
    if value > limit:
        torch._foreach_mul_(gradients, limit / value)
    return value
