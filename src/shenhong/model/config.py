"""The shape of a model, in the field names of Hugging Face's ``deepseek_v3`` configuration.

One frozen dataclass says everything that decides which tensors exist and what they compute. It is checked
when it is made, so that no later code meets an impossible shape. Reading and writing ``config.json`` is in
``hf_config.py``, counting parameters, FLOPs and cache bytes in ``counts.py``.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Literal

import numpy as np

from shenhong.errors import ModelError
from shenhong.numerics.activations import activations


@dataclass(frozen=True)
class Yarn:
    """YaRN context extension (arXiv 2309.00071) with DeepSeek's two attention scales (0: the paper's own).

    ``attention_factor`` is what cosine and sine are multiplied by, in place of what follows from the scales. Without
    ``truncate`` the ramp between fast and slow pairs begins and ends between pairs, as in gpt-oss.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        _check_extension(self)
        if self.attention_factor is not None and not self.attention_factor > 0:
            raise ModelError("YaRN needs a positive attention_factor")
        if not self.beta_fast > self.beta_slow > 0:
            raise ModelError("YaRN needs beta_fast > beta_slow > 0")


@dataclass(frozen=True)
class LinearRope:
    """Position interpolation (arXiv 2306.15595): every position divided by ``factor``."""

    factor: float

    def __post_init__(self) -> None:
        _check_extension(self)


@dataclass(frozen=True)
class Llama3Rope:
    """Llama 3.1's extension: slow pairs divided by ``factor``, fast pairs kept, those between interpolated."""

    factor: float
    original_max_position_embeddings: int
    low_freq_factor: float
    high_freq_factor: float

    def __post_init__(self) -> None:
        _check_extension(self)
        if not self.high_freq_factor > self.low_freq_factor > 0:
            raise ModelError("rope type llama3 needs high_freq_factor > low_freq_factor > 0")


RopeScaling = Yarn | LinearRope | Llama3Rope


def _check_extension(rope: RopeScaling) -> None:
    _check_types(rope)
    if rope.factor < 1:
        raise ModelError(f"rope factor {rope.factor} must be at least 1")
    if not isinstance(rope, LinearRope) and rope.original_max_position_embeddings < 1:
        raise ModelError("original_max_position_embeddings must be at least 1")


@dataclass(frozen=True)
class ModelConfig:
    """A decoder of the DeepSeek or Llama family; raises ``ModelError`` when the numbers do not fit together.

    Layers ``0 .. first_k_dense_replace-1`` have a dense feed-forward block, the later ones experts, and so has
    the multi-token-prediction layer (number ``num_hidden_layers``). ``first_k_dense_replace`` equal to
    ``num_hidden_layers`` makes the whole model dense, that layer included.
    ``routed_scaling_factor="auto"`` is replaced by ``auto_scaling_factor`` at once.
    ``attention="gqa"`` is grouped-query attention as in Llama and Qwen: heads of ``head_dim``, all of it rotated, keys
    and values shared by ``num_attention_heads / num_key_value_heads`` queries; the four fields of latent attention
    are then 0. ``attention="mha"`` (plain multi-head attention, dims as in MLA) exists for the ablation only.
    ``scoring_func="softmax"`` is DeepSeek-V2's router, which has no selection bias; a group's score is its best
    expert there, and its best two where ``topk_method`` is "noaux_tc".
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    kv_lora_rank: int = 0
    qk_nope_head_dim: int = 0
    qk_rope_head_dim: int = 0
    v_head_dim: int = 0
    q_lora_rank: int | None = None
    moe_intermediate_size: int = 0
    n_routed_experts: int = 0
    num_experts_per_tok: int = 0
    n_shared_experts: int = 1
    first_k_dense_replace: int = 1
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float | Literal["auto"] = "auto"
    num_nextn_predict_layers: int = 0
    max_position_embeddings: int = 2048
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    hidden_act: str = "silu"  # of the feed-forward blocks: one of numerics.activations
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    attention: Literal["mla", "mha", "gqa"] = "mla"
    scoring_func: Literal["sigmoid", "softmax"] = "sigmoid"
    topk_method: Literal["noaux_tc", "greedy", "group_limited_greedy"] = "noaux_tc"
    num_key_value_heads: int = 0
    head_dim: int = 0
    qkv_bias: bool = False
    qk_norm: bool = False

    @property
    def qk_head_dim(self) -> int:
        if self.attention == "gqa":
            return self.head_dim
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def rotary_dim(self) -> int:
        """How many numbers of a head are rotated."""
        return self.head_dim if self.attention == "gqa" else self.qk_rope_head_dim

    @property
    def has_selection_bias(self) -> bool:
        return self.topk_method == "noaux_tc"

    @property
    def scaling_factor(self) -> float:
        """``routed_scaling_factor`` as the number it became in ``__post_init__``."""
        assert not isinstance(self.routed_scaling_factor, str)
        return self.routed_scaling_factor

    def has_experts(self, layer: int) -> bool:
        return (
            self.first_k_dense_replace < self.num_hidden_layers
            and layer >= self.first_k_dense_replace
        )

    @property
    def expert_layers(self) -> list[int]:
        """Numbers of the trunk layers that have experts (the MTP layer not among them)."""
        return list(range(self.first_k_dense_replace, self.num_hidden_layers))

    # ---------------------------------------------------------------- validation

    def __post_init__(self) -> None:
        _check_types(self)
        if self.hidden_act not in activations():
            raise ModelError(
                f"hidden_act is {self.hidden_act!r:.80}; there are {', '.join(activations())}"
            )
        # A damaged file must not ask for the impossible before anything compares it with the weights.
        for name, most in _AT_MOST.items():
            if (getattr(self, name) or 0) > most:
                raise ModelError(f"{name} is {getattr(self, name)}; at most {most} is supported")
        grouped = self.attention == "gqa"
        for name in _AT_LEAST_ONE + (_OF_GROUPED if grouped else _OF_LATENT):
            if getattr(self, name) < 1:
                raise ModelError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if grouped:
            self._check_grouped()
        elif any(getattr(self, name) for name in (*_OF_GROUPED, "qkv_bias", "qk_norm")):
            raise ModelError(
                'num_key_value_heads, head_dim, qkv_bias and qk_norm belong to attention "gqa"'
            )
        if self.max_position_embeddings * self.rotary_dim > _ANGLES:
            raise ModelError(
                f"max_position_embeddings {self.max_position_embeddings} of {self.rotary_dim} rotated "
                "numbers each make tables too large; lower max_position_embeddings"
            )
        if self.q_lora_rank is not None and self.q_lora_rank < 1:
            raise ModelError("q_lora_rank must be at least 1, or absent for full-rank queries")
        rotated = "head_dim" if grouped else "qk_rope_head_dim"
        if getattr(self, rotated) % 2:
            raise ModelError(
                f"{rotated} is {getattr(self, rotated)}; RoPE rotates pairs, so make it even"
            )
        if not grouped and not isinstance(self.rope_scaling, Yarn | None):
            raise ModelError("latent attention supports no other rope scaling than YaRN")
        if self.num_nextn_predict_layers not in (0, 1):
            raise ModelError("num_nextn_predict_layers must be 0 or 1: engines read one MTP layer")
        if self.first_k_dense_replace < 0:
            raise ModelError("first_k_dense_replace must be at least 0")
        self._check_router()
        if self.first_k_dense_replace < self.num_hidden_layers:
            self._check_experts()
        if self.routed_scaling_factor == "auto":
            factor = 1.0
            if self.n_routed_experts and self.norm_topk_prob:
                factor = auto_scaling_factor(self.num_experts_per_tok, self.n_routed_experts)
            object.__setattr__(self, "routed_scaling_factor", factor)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            token = getattr(self, name)
            if token is not None and not 0 <= token < self.vocab_size:
                raise ModelError(f"{name} is {token}, outside the vocabulary of {self.vocab_size}")
        for name in ("rms_norm_eps", "initializer_range", "rope_theta"):
            if not getattr(self, name) > 0:
                raise ModelError(f"{name} must be positive")

    def _check_grouped(self) -> None:
        heads, shared = self.num_attention_heads, self.num_key_value_heads
        if heads % shared:
            raise ModelError(
                f"num_key_value_heads is {shared}; it must divide num_attention_heads ({heads})"
            )
        for name in (*_OF_LATENT, "q_lora_rank", "num_nextn_predict_layers"):
            if getattr(self, name):
                raise ModelError(f'{name} does not go with attention "gqa"')

    def _check_router(self) -> None:
        softmax = self.scoring_func == "softmax"
        if softmax == self.has_selection_bias:
            raise ModelError(
                f"scoring_func {self.scoring_func} does not go with topk_method {self.topk_method}: choose "
                "sigmoid with noaux_tc (V3), or softmax with greedy or group_limited_greedy (V2)"
            )
        if softmax and (self.norm_topk_prob or self.num_nextn_predict_layers):
            raise ModelError(
                "the softmax router of DeepSeek-V2 goes with norm_topk_prob = false and "
                "num_nextn_predict_layers = 0: no engine reads such a model otherwise"
            )

    def _check_experts(self) -> None:
        experts, chosen = self.n_routed_experts, self.num_experts_per_tok
        if self.moe_intermediate_size < 1 or experts < 2:
            raise ModelError(
                "layers with experts need moe_intermediate_size >= 1 and n_routed_experts >= 2; for a "
                "dense model set first_k_dense_replace to num_hidden_layers"
            )
        if not 1 <= chosen <= experts:
            raise ModelError(
                f"num_experts_per_tok is {chosen}; it must lie between 1 and n_routed_experts ({experts})"
            )
        if self.n_shared_experts < 0:
            raise ModelError("n_shared_experts must be at least 0")
        groups = self.n_group
        if groups < 1 or experts % groups:
            raise ModelError(f"n_group is {groups}; it must divide n_routed_experts ({experts})")
        if self.topk_method == "greedy" and groups > 1:
            raise ModelError('topk_method "greedy" has no groups; choose "group_limited_greedy"')
        if self.has_selection_bias and experts // groups < 2:
            raise ModelError(
                "a group needs at least 2 experts: its score is its best two; lower n_group"
            )
        if not 1 <= self.topk_group <= groups:
            raise ModelError(
                f"topk_group is {self.topk_group}; it must lie between 1 and n_group ({groups})"
            )
        reachable = self.topk_group * (experts // groups)
        if reachable < chosen:
            raise ModelError(
                f"topk_group = {self.topk_group} groups hold {reachable} experts, fewer than "
                f"num_experts_per_tok = {chosen}; raise topk_group"
            )


_AT_LEAST_ONE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)
_OF_LATENT = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
_OF_GROUPED = ("num_key_value_heads", "head_dim")
_WIDTH = 2**20
_ANGLES = 2**28  # of the rotary tables: at most a gigabyte
_AT_MOST = {
    "vocab_size": 2**24,
    "num_hidden_layers": 1024,
    "num_attention_heads": 4096,
    "n_routed_experts": 4096,
    "n_shared_experts": 4096,
    "max_position_embeddings": 2**22,
    **dict.fromkeys(("hidden_size", "intermediate_size", "moe_intermediate_size"), _WIDTH),
    **dict.fromkeys((*_OF_LATENT, *_OF_GROUPED, "q_lora_rank"), _WIDTH),
}


def _check_types(part: ModelConfig | RopeScaling) -> None:
    for field in dataclasses.fields(part):
        check_type(field.name, str(field.type), getattr(part, field.name))


def check_type(name: str, annotation: str, value: object) -> None:
    """Strict types, bool never passing for int; an int may stand for a float."""
    kinds: tuple[type, ...] = ()
    for part, types in (
        ("int", (int,)),
        ("float", (int, float)),
        ("bool", (bool,)),
        ("RopeScaling", (Yarn, LinearRope, Llama3Rope)),
    ):
        if part in annotation.replace("Literal", ""):
            kinds += types
    if "Literal" in annotation or annotation == "str":
        kinds += (str,)
    good = isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
    if value is None:
        good = "None" in annotation
    if isinstance(value, str) and annotation != "str":
        good = good and value in re.findall(r"'(\w+)'", annotation)
    if isinstance(value, int | float) and not -1e300 < value < 1e300:
        good = False  # NaN and infinity among them
    if not good:
        raise ModelError(f"{name} is {value!r:.80}; expected {annotation}")


def auto_scaling_factor(chosen: int, experts: int) -> float:
    """E[1/||p||_2] for p the normalised top-``chosen`` of ``experts`` gates sigmoid(N(0, 1)).

    With this factor the routed experts' mixture has about the size of a single expert's output
    (Moonlight, arXiv 2502.16982, section 2.2). Fixed sample, rounded to two decimals.
    """
    samples = np.random.default_rng(0).standard_normal((4096, experts))
    top = np.sort(1 / (1 + np.exp(-samples)), axis=1)[:, experts - chosen :]
    gates = top / top.sum(axis=1, keepdims=True)
    return round(float((1 / np.sqrt((gates**2).sum(axis=1))).mean()), 2)
