"""Rotary position embedding: the tables, and the rotation of interleaved pairs.

Legend: T positions, r rotary dims of a head (pairs 2i, 2i+1 are rotated together).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from shenhong.errors import ModelError
from shenhong.model.config import LinearRope, Llama3Rope, ModelConfig, Yarn

LARGEST = 1 << 28  # numbers in both tables


def magnitude(factor: float, mscale: float) -> float:
    """YaRN's attention temperature: 0.1 * mscale * ln(factor) + 1."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def softmax_scale(config: ModelConfig) -> float:
    """(width of a query)^-0.5, in latent attention times m^2 where YaRN asks for it (DeepSeek's mscale_all_dim)."""
    scale = config.qk_head_dim**-0.5
    yarn = config.rope_scaling
    if config.attention != "gqa" and isinstance(yarn, Yarn) and yarn.mscale_all_dim:
        scale *= magnitude(yarn.factor, yarn.mscale_all_dim) ** 2
    return scale


def rope_tables(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """cos and sin, each [max_position_embeddings, r/2] fp32, YaRN's amplitude included.

    Error: ModelError for a context that no real model has at this width.
    """
    r, scaling = config.rotary_dim, config.rope_scaling
    if config.max_position_embeddings * r > LARGEST:
        raise ModelError(
            f"max_position_embeddings {config.max_position_embeddings} with {r} rotated numbers a head "
            f"needs tables of more than {4 * LARGEST >> 20} MiB; lower it"
        )
    wavelength = config.rope_theta ** (torch.arange(0, r, 2, dtype=torch.float32) / r)
    frequency, amplitude = 1.0 / wavelength, 1.0
    if isinstance(scaling, Yarn):
        keep = _extrapolated_share(scaling, r, config.rope_theta)
        frequency = frequency * keep + (1.0 / (scaling.factor * wavelength)) * (1 - keep)
        amplitude = _amplitude(scaling)
    elif isinstance(scaling, Llama3Rope):
        frequency = llama3_frequencies(frequency, scaling)
    elif isinstance(scaling, LinearRope):
        frequency = frequency / scaling.factor
    angle = torch.arange(config.max_position_embeddings, dtype=torch.float32)[:, None] * frequency
    return angle.cos() * amplitude, angle.sin() * amplitude


def _amplitude(yarn: Yarn) -> float:
    """What cosine and sine are multiplied by."""
    if yarn.attention_factor is not None:
        return yarn.attention_factor
    if yarn.mscale and yarn.mscale_all_dim:
        whole = magnitude(yarn.factor, yarn.mscale_all_dim)
        return magnitude(yarn.factor, yarn.mscale) / whole
    return magnitude(yarn.factor, 1.0)


def llama3_frequencies(frequency: Tensor, rope: Llama3Rope) -> Tensor:
    """Llama 3.1's frequencies, by a pair's turns within the original context: slow ones divided by the factor, fast kept."""
    turns = rope.original_max_position_embeddings * frequency / (2 * math.pi)
    span = rope.high_freq_factor - rope.low_freq_factor
    keep = ((turns - rope.low_freq_factor) / span).clamp(0, 1)
    return frequency * keep + frequency / rope.factor * (1 - keep)


def _extrapolated_share(yarn: Yarn, r: int, theta: float) -> Tensor:
    """[r/2] share of each pair that keeps its frequency: fast pairs 1, slow pairs 0, a ramp between."""

    def pair_of(turns: float) -> float:
        length = yarn.original_max_position_embeddings
        return r * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = pair_of(yarn.beta_fast), pair_of(yarn.beta_slow)
    if yarn.truncate:
        first, last = math.floor(first), math.ceil(last)
    low, high = max(first, 0), min(last, r - 1)
    width = high - low if high != low else 0.001
    ramp = (torch.arange(r // 2, dtype=torch.float32) - low) / width
    return 1 - ramp.clamp(0, 1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs of x [..., r] by angles whose cos and sin are [..., r/2]; fp32 inside."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1)
    return rotated.flatten(-2).to(x.dtype)


def interleaved(rows: Tensor, width: int) -> Tensor:
    """Rows of heads of ``width`` whose pairs are (i, i + width/2), as Llama's folders have them, as neighbours."""
    return rows.unflatten(0, (-1, 2, width // 2)).transpose(1, 2).flatten(0, 2)


def half_split(rows: Tensor, width: int) -> Tensor:
    """The reverse of ``interleaved``."""
    return rows.unflatten(0, (-1, width // 2, 2)).transpose(1, 2).flatten(0, 2)
