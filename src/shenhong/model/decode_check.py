"""The kernel that generates against PyTorch on this machine: each half of each layer on its own, before the first use.

Both get the same residual stream, so nothing that one layer rounds reaches another, and where a router chooses both are
told the same experts, so a near tie decides nothing (the choice itself is compared in ``numerics/verify.py``). What
may differ between them follows from the arithmetic (``numerics/rounding.py``).
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from shenhong.model.cache import Pools, SlotMapping
from shenhong.model.config import ModelConfig
from shenhong.model.decode_grouped import GroupedWeights
from shenhong.model.decode_latent import LatentWeights
from shenhong.numerics import reference
from shenhong.numerics.cpu.decode import Batch, FusedLayers
from shenhong.numerics.rounding import DRAWS, Exact, Rounding, excess

if TYPE_CHECKING:
    from shenhong.model.decode import Experts, PreparedDecoder, Weights

PAGE, CPU = 2, torch.device("cpu")
FAVOUR = 4.0  # a bias that scores of 0 to 1, and the two best of a group, cannot make up for


def disagreement(
    model: PreparedDecoder, packed: Sequence[dict[str, Any]], numbers: dict[str, Any]
) -> str | None:
    """What of the layers as the kernel has them differs by more than rounding explains, and by how much, or None."""
    config = model.config
    lengths = [min(n, config.max_position_embeddings) for n in (3, 2)]
    norm_D = torch.ones(config.hidden_size)
    stream = torch.Generator().manual_seed(0)
    for number, (weights, layer) in enumerate(zip(model.layers, packed, strict=True)):
        x_ND = torch.randn(sum(lengths), config.hidden_size, generator=stream)
        wide, bias, row = _widened(weights), None, model.rows[number]
        if wide.experts is not None:
            bias = _favour(config, number)
            wide = dataclasses.replace(wide, experts=_told(wide.experts, bias))

        def attention(x: Tensor, batch: Batch, wide: Weights = wide, row: int = row) -> Tensor:
            pool = Pools([row], batch.tables_SP.size, PAGE, x.dtype, CPU).layers[0]
            return model.attend(wide, x, pool, SlotMapping(batch, PAGE, CPU))

        def feed_forward(x: Tensor, _: Batch, wide: Weights = wide) -> Tensor:
            return model.feed_forward(wide, x)

        alone = dict.fromkeys(("dense_gate_up", "dense_down", "router", "bias"))
        silent = {
            "out": torch.zeros_like(layer["out"]),
            "bias": bias,
        }  # attention that adds nothing
        for half, change in ((attention, alone), (feed_forward, silent)):
            kernel = FusedLayers([{**layer, **change}], numbers)
            batch, pool = _batch(lengths), Pools([row], 4, PAGE, model.dtype, CPU)
            found = kernel.run(x_ND.clone(), model.embedding, batch, pool.layers, range(1), norm_D)
            with _one_thread():
                with Exact():
                    exact = half(x_ND.double(), batch)
                if not exact.isfinite().all():
                    return None  # weights that are not numbers: nothing to compare
                with Rounding(model.dtype, number):
                    disturbed = half(x_ND.double().repeat(DRAWS, 1), _batch(lengths * DRAWS))
            exact, disturbed = (
                reference.rms_norm(x, norm_D, config.rms_norm_eps) for x in (exact, disturbed)
            )
            off, allowed = excess(found, exact, disturbed.unflatten(0, (DRAWS, -1)))
            if not off <= allowed:
                what = half.__name__.replace("_", "-")
                return (
                    f"{what} of layer {number} is off by {off:.2g}, rounding explains {allowed:.2g}"
                )
    return None


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """For PyTorch: so little is computed that a second thread costs more than it gives, on a busy machine far more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _batch(lengths: list[int]) -> Batch:
    """Texts of these lengths from their beginnings, their pages out of order."""
    positions = np.concatenate([np.arange(n, dtype=np.int32) for n in lengths])
    starts = np.cumsum([0, *lengths], dtype=np.int32)
    pages = np.arange(2 * len(lengths), dtype=np.int32).reshape(2, -1)
    tables = np.ascontiguousarray(pages[::-1].T)
    return Batch(np.zeros(sum(lengths), np.int64), positions, starts, tables)


def _favour(config: ModelConfig, number: int) -> Tensor:
    """[E]: a bias by which all tokens choose the same experts, others in every layer, of as many groups as may be."""
    width = config.n_routed_experts // config.n_group
    experts = [
        (number + group) % config.n_group * width + (number + place) % width
        for place in range(width)
        for group in range(config.topk_group)
    ]
    bias = torch.zeros(config.n_routed_experts)
    bias[experts[: config.num_experts_per_tok]] = FAVOUR
    return bias


def _told(experts: Experts, bias: Tensor) -> Experts:
    router = copy.deepcopy(experts.router)
    router.e_score_correction_bias = bias
    return dataclasses.replace(experts, router=router)


def _widened(weights: Weights) -> Weights:
    """Attention in float64. The router is float32 everywhere, and the rest is widened as it is used."""
    return dataclasses.replace(weights, attention=_doubled(weights.attention))


def _doubled(attention: LatentWeights | GroupedWeights) -> Any:
    own = {field.name: getattr(attention, field.name) for field in dataclasses.fields(attention)}
    tensors: dict[str, Any] = {k: v.double() for k, v in own.items() if isinstance(v, Tensor)}
    return dataclasses.replace(attention, **tensors)
