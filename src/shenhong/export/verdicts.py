"""Which engine outside will open a model, and why another will not: their documented requirements as a table.

A requirement is a test of the configuration and the reason a person is given. "refuses": without it the engine stops,
or would compute something else. "opens": it opens the model all the same. Nothing here runs an engine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

from shenhong.model import ModelConfig, Yarn
from shenhong.model.attention import LATENT_NORM_EPS

Effect = Literal["refuses", "opens"]
TRANSFORMERS, VLLM, SGLANG, LLAMA_CPP = "transformers", "vLLM", "SGLang", "llama.cpp"


class Requirement(NamedTuple):
    """``met`` is asked of every model; ``reason`` is said where it is false."""

    engine: str
    effect: Effect
    met: Callable[[ModelConfig], bool]
    reason: str


class Verdict(NamedTuple):
    """``answer`` is "opens", "opens, slower" or "refuses"; the reasons are the requirements that are not met."""

    engine: str
    answer: str
    reasons: list[str]
    seen: str  # where this was tried


def _lite(config: ModelConfig) -> bool:
    """llama.cpp takes these for DeepSeek-V2-Lite and its kin, which have no query rank."""
    layers = config.num_hidden_layers
    return layers in (26, 27) or (layers == 48 and config.vocab_size == 128256)


def _yarn_of_llama_cpp(yarn: object) -> bool:
    """llama.cpp scales attention by mscale_all_dim alone, and reads neither beta."""
    if not isinstance(yarn, Yarn):
        return True
    same = yarn.mscale == yarn.mscale_all_dim != 0
    return same and (yarn.beta_fast, yarn.beta_slow) == (32.0, 1.0)


def _mla(config: ModelConfig) -> bool:
    return config.attention == "mla"


def _experts(config: ModelConfig) -> bool:
    return bool(config.expert_layers)


_TABLE = [
    Requirement(
        LLAMA_CPP,
        "refuses",
        _mla,
        "only models with latent attention (MLA) are written as GGUF",
    ),
    Requirement(
        LLAMA_CPP,
        "refuses",
        lambda c: not _lite(c) or c.q_lora_rank is None,
        "it reads no q_lora_rank at this number of layers; choose another number of layers",
    ),
    Requirement(
        LLAMA_CPP,
        "refuses",
        lambda c: not _experts(c) or c.n_shared_experts >= 1,
        "it needs a shared expert beside the routed ones; set n_shared_experts = 1",
    ),
    Requirement(
        LLAMA_CPP,
        "refuses",
        lambda c: c.topk_method != "group_limited_greedy" or c.n_group == 1,
        "it scores groups of experts by their best two, this router by the best one",
    ),
    Requirement(
        LLAMA_CPP,
        "refuses",
        lambda c: (
            not _experts(c) or c.n_group == 1 or c.topk_group < c.n_group < c.n_routed_experts
        ),
        "it needs topk_group < n_group < n_routed_experts; n_group = topk_group = 1 is the same model",
    ),
    Requirement(
        LLAMA_CPP,
        "refuses",
        lambda c: _yarn_of_llama_cpp(c.rope_scaling),
        "it knows YaRN only with mscale = mscale_all_dim, beta_fast 32 and beta_slow 1",
    ),
    Requirement(
        LLAMA_CPP,
        "refuses",
        lambda c: not _experts(c) or c.n_routed_experts <= 1024,
        "it takes at most 1,024 experts",
    ),
    Requirement(
        LLAMA_CPP,
        "refuses",
        lambda c: c.num_hidden_layers + c.num_nextn_predict_layers <= 512,
        "it takes at most 512 layers",
    ),
    Requirement(
        LLAMA_CPP,
        "opens",
        lambda c: not _mla(c) or c.rms_norm_eps == LATENT_NORM_EPS,
        "it gives rms_norm_eps to the latent norms too, which have 1e-6: logits differ a little",
    ),
]


def unmet(engine: str, config: ModelConfig) -> list[Requirement]:
    """The requirements of ``engine`` that the model does not meet, in the table's order."""
    return [need for need in _TABLE if need.engine == engine and not need.met(config)]


def objections(engine: str, config: ModelConfig) -> list[str]:
    """Why ``engine`` would refuse the model; empty where it opens it."""
    return [
        f"{engine}: {need.reason}" for need in unmet(engine, config) if need.effect == "refuses"
    ]
