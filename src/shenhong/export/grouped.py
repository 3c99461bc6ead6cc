"""The architectures "llama", "qwen2" and "qwen3" of GGUF: their metadata, and what else differs from "deepseek2".

Their tensors bear the names that ``deepseek2.py`` lists. llama.cpp rotates neighbouring pairs of a head in "llama", as
the decoder here does, and pairs of the two halves in Qwen's. Llama 3's extension is one tensor more: what each
frequency is divided by.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shenhong.model import ModelConfig, Yarn
from shenhong.model.config import LinearRope, Llama3Rope
from shenhong.model.hf_config import model_type
from shenhong.model.rope import llama3_frequencies

ARCHITECTURES = ("llama", "qwen2", "qwen3")
IN_HALVES = ("qwen2", "qwen3")
FACTORS = "rope_freqs.weight"


def metadata(config: ModelConfig) -> dict[str, str | int | float | bool]:
    """The shape as llama.cpp reads it."""
    values: dict[str, str | int | float | bool] = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": float(config.rope_theta),
    }
    scaling = config.rope_scaling
    if isinstance(scaling, LinearRope | Yarn):
        values |= {
            "rope.scaling.type": "yarn" if isinstance(scaling, Yarn) else "linear",
            "rope.scaling.factor": float(scaling.factor),
        }
    if isinstance(scaling, Yarn):
        values["rope.scaling.original_context_length"] = scaling.original_max_position_embeddings
    architecture = model_type(config)
    return {f"{architecture}.{key}": value for key, value in values.items()}


def frequencies(theta: float, width: int) -> Tensor:
    """[width / 2] of heads that nothing extends."""
    return theta ** -(torch.arange(0, width, 2, dtype=torch.float32) / width)


def divisors(config: ModelConfig) -> Tensor | None:
    """[head_dim / 2] what Llama 3's extension divides each frequency by; None where there is none."""
    if not isinstance(config.rope_scaling, Llama3Rope):
        return None
    plain = frequencies(config.rope_theta, config.head_dim)
    return plain / llama3_frequencies(plain, config.rope_scaling)
