"""Which engine outside will open a model, and why another will not: their documented requirements as a table.

A requirement is a test of the configuration and the reason a person is given. "refuses": without it the engine stops,
or would compute something else. "opens": it opens the model all the same. Nothing here runs an engine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

from shenhong.model import ModelConfig, Yarn
from shenhong.model.attention import LATENT_NORM_EPS
from shenhong.model.config import Llama3Rope
from shenhong.model.hf_config import model_type

Effect = Literal["refuses", "opens"]
ENGINES = TRANSFORMERS, VLLM, SGLANG, LLAMA_CPP = "transformers", "vLLM", "SGLang", "llama.cpp"
_KERNEL_WIDTHS = (320, 576)  # 256 + 64 and 512 + 64
_HEAD_WIDTHS = (64, 80, 96, 112, 128, 256)


_SEEN = {
    TRANSFORMERS: "compared with transformers 5.23",
    VLLM: "not run here",
    SGLANG: "not run here",
    LLAMA_CPP: "as GGUF; compared with llama-cpp-python 0.3.36",
}


class Requirement(NamedTuple):
    """``met`` is asked of every model; ``reason`` is said where it is false, ``{c.name}`` being the model's own."""

    engine: str
    effect: Effect
    met: Callable[[ModelConfig], bool]
    reason: str


class Verdict(NamedTuple):
    """What an engine does with a model, the requirements that are not met, and how this is known."""

    engine: str
    opens: bool
    reasons: list[str]
    seen: str

    def __str__(self) -> str:
        said = "; ".join(["opens it" if self.opens else "refuses it", *self.reasons])
        return f"{said} ({self.seen})"


def _lite(config: ModelConfig) -> bool:
    """llama.cpp takes these for DeepSeek-V2-Lite and its kin, which have no query rank."""
    layers = config.num_hidden_layers
    return layers in (26, 27) or (layers == 48 and config.vocab_size == 128256)


def _yarn_of_llama_cpp(config: ModelConfig) -> bool:
    """llama.cpp scales latent attention by mscale_all_dim alone, other attention as YaRN's paper, and reads no beta."""
    yarn = config.rope_scaling
    if not isinstance(yarn, Yarn):
        return True
    scales = (yarn.mscale, yarn.mscale_all_dim)
    same = scales[0] == scales[1] != 0 if _mla(config) else not all(scales)
    plain = yarn.attention_factor is None and yarn.truncate
    return same and plain and (yarn.beta_fast, yarn.beta_slow) == (32.0, 1.0)


def _is(config: ModelConfig, kind: str) -> bool:
    return config.attention == "gqa" and model_type(config) == kind


def _mla(config: ModelConfig) -> bool:
    return config.attention == "mla"


def _experts(config: ModelConfig) -> bool:
    return bool(config.expert_layers)


_MTP_OF_TRANSFORMERS = 61  # the one layer number that its use_mtp looks for

# Its ACT2FN, but for names that want settings of their own.
_ACTIVATIONS_OF_TRANSFORMERS = frozenset(
    [
        "gelu",
        "gelu_10",
        "gelu_accurate",
        "gelu_fast",
        "gelu_new",
        "gelu_python",
        "gelu_python_tanh",
        "gelu_pytorch_tanh",
        "hardswish",
        "laplace",
        "leaky_relu",
        "linear",
        "mish",
        "quick_gelu",
        "relu",
        "relu2",
        "relu6",
        "sigmoid",
        "silu",
        "sqrtsoftplus",
        "swish",
        "tanh",
    ]
)

_TABLE = [
    Requirement(
        TRANSFORMERS,
        "refuses",
        lambda c: c.attention != "mha",
        "plain multi-head attention is for comparisons here and has no config.json",
    ),
    Requirement(
        TRANSFORMERS,
        "refuses",
        lambda c: c.hidden_act in _ACTIVATIONS_OF_TRANSFORMERS,
        "it has no activation called {c.hidden_act}",
    ),
    Requirement(
        TRANSFORMERS,
        "opens",
        lambda c: not c.num_nextn_predict_layers or c.num_hidden_layers == _MTP_OF_TRANSFORMERS,
        "without the multi-token-prediction layer, which it looks for at number 61 only",
    ),
    *(
        Requirement(
            engine,
            "refuses",
            lambda c: c.hidden_act == "silu",
            "its feed-forward blocks know silu alone, here {c.hidden_act}",
        )
        for engine in (LLAMA_CPP, VLLM, SGLANG)
    ),
    Requirement(
        VLLM,
        "refuses",
        lambda c: not _mla(c) or c.kv_lora_rank + c.qk_rope_head_dim in _KERNEL_WIDTHS,
        "its latent-attention kernels take kv_lora_rank + qk_rope_head_dim of 320 or 576, here "
        "{c.kv_lora_rank} + {c.qk_rope_head_dim}; VLLM_MLA_DISABLE=1 does without them, and "
        "recipes/cluster.toml makes such a shape",
    ),
    Requirement(
        SGLANG,
        "refuses",
        lambda c: not _mla(c) or c.kv_lora_rank + c.qk_rope_head_dim in _KERNEL_WIDTHS,
        "its latent-attention kernels take kv_lora_rank + qk_rope_head_dim of 320 or 576, here "
        "{c.kv_lora_rank} + {c.qk_rope_head_dim}; recipes/cluster.toml makes such a shape",
    ),
    *(
        Requirement(
            engine,
            "refuses",
            lambda c: not _experts(c) or c.n_group == 1 or c.topk_group < c.n_group,
            "it needs topk_group < n_group; n_group = topk_group = 1 is the same model",
        )
        for engine in (VLLM, SGLANG)
    ),
    Requirement(
        SGLANG,
        "opens",
        lambda c: (
            not _experts(c)
            or (c.n_routed_experts.bit_count() == 1 and c.n_routed_experts // c.n_group <= 32)
        ),
        "its fast router takes a power of two of experts and at most 32 in a group, here "
        "{c.n_routed_experts} in {c.n_group}",
    ),
    *(
        Requirement(
            engine,
            "opens",
            lambda c: c.attention != "gqa" or c.head_dim in _HEAD_WIDTHS,
            "its common kernels take heads of 64, 80, 96, 112, 128 or 256, here {c.head_dim}",
        )
        for engine in (VLLM, SGLANG)
    ),
    Requirement(
        LLAMA_CPP,
        "refuses",
        lambda c: c.attention != "mha",
        "plain multi-head attention is for comparisons here and has no architecture there",
    ),
    Requirement(
        LLAMA_CPP,
        "refuses",
        lambda c: not _is(c, "qwen2") or c.num_attention_heads * c.head_dim == c.hidden_size,
        "its qwen2 takes heads as wide together as the model, here {c.num_attention_heads} of {c.head_dim} in "
        "{c.hidden_size}",
    ),
    Requirement(
        LLAMA_CPP,
        "refuses",
        lambda c: not isinstance(c.rope_scaling, Llama3Rope) or _is(c, "llama"),
        "it reads Llama 3's extension of the context in llama alone",
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
        lambda c: c.topk_method != "group_limited_greedy" or c.topk_group == c.n_group,
        "it scores groups of experts by their best two, this router by the best one",
    ),
    Requirement(
        LLAMA_CPP,
        "refuses",
        _yarn_of_llama_cpp,
        "it knows YaRN only with beta_fast 32 and beta_slow 1, without attention_factor, truncated, and with mscale = "
        "mscale_all_dim in latent attention, without one of them in other",
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


def verdict(engine: str, config: ModelConfig) -> Verdict:
    needs = unmet(engine, config)
    refusals = [need for need in needs if need.effect == "refuses"]
    reasons = [need.reason.format(c=config) for need in refusals or needs]
    return Verdict(engine, not refusals, reasons, _SEEN[engine])


def verdicts(config: ModelConfig) -> list[Verdict]:
    """One of each engine. A requirement met is no proof where the engine was not run."""
    return [verdict(engine, config) for engine in ENGINES]
