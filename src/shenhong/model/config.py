"""The shape of a model, in the field names of Hugging Face's ``deepseek_v3`` configuration.

One frozen dataclass says everything that decides which tensors exist and what they compute. It is checked
when it is made, so that no later code meets an impossible shape, and it reads and writes ``config.json``.
Counting parameters, FLOPs and cache bytes from it is in ``counts.py``.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from shenhong.errors import ModelError


@dataclass(frozen=True)
class Yarn:
    """YaRN context extension (arXiv 2309.00071) with DeepSeek's two attention scales."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check_type(field.name, str(field.type), getattr(self, field.name))
        if self.factor < 1:
            raise ModelError(f"rope factor {self.factor} must be at least 1")
        if self.original_max_position_embeddings < 1:
            raise ModelError("original_max_position_embeddings must be at least 1")
        if not self.beta_fast > self.beta_slow > 0:
            raise ModelError("YaRN needs beta_fast > beta_slow > 0")


@dataclass(frozen=True)
class ModelConfig:
    """A DeepSeek-V3 decoder; raises ``ModelError`` when the numbers do not fit together.

    Layers ``0 .. first_k_dense_replace-1`` have a dense feed-forward block, the later ones experts, and so has
    the multi-token-prediction layer (number ``num_hidden_layers``). ``first_k_dense_replace`` equal to
    ``num_hidden_layers`` makes the whole model dense, that layer included.
    ``routed_scaling_factor="auto"`` is replaced by ``auto_scaling_factor`` at once.
    ``attention="mha"`` (plain multi-head attention, same heads and dims) exists for the ablation only.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
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
    rope_scaling: Yarn | None = None
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    attention: Literal["mla", "mha"] = "mla"

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

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
        for field in dataclasses.fields(self):
            _check_type(field.name, str(field.type), getattr(self, field.name))
        for name in _AT_LEAST_ONE:
            if getattr(self, name) < 1:
                raise ModelError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.q_lora_rank is not None and self.q_lora_rank < 1:
            raise ModelError("q_lora_rank must be at least 1, or absent for full-rank queries")
        if self.qk_rope_head_dim % 2:
            raise ModelError(
                f"qk_rope_head_dim is {self.qk_rope_head_dim}; RoPE turns pairs, so make it even"
            )
        if self.attention not in ("mla", "mha"):
            raise ModelError(f'attention is {self.attention!r}; choose "mla" or "mha"')
        if self.num_nextn_predict_layers not in (0, 1):
            raise ModelError("num_nextn_predict_layers must be 0 or 1: engines read one MTP layer")
        if self.first_k_dense_replace < 0:
            raise ModelError("first_k_dense_replace must be at least 0")
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
        if experts // groups < 2:
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

    # ---------------------------------------------------------------- config.json

    def to_hf(self, dtype: str = "float32") -> dict[str, Any]:
        """The contents of ``config.json``; ``ModelError`` for the ablation's attention.

        Beside transformers' own fields it names the router for engines that have no default for it
        (topk_method, scoring_func, moe_layer_freq) and repeats RoPE the old way (rope_theta, rope_scaling).
        """
        if self.attention != "mla":
            raise ModelError(
                f'attention "{self.attention}" has no open format; only "mla" can be saved'
            )
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": self.rope_theta}
        if self.rope_scaling is not None:
            rope = {"rope_type": "yarn", "rope_theta": self.rope_theta}
            rope |= dataclasses.asdict(self.rope_scaling)
        fields = {name: getattr(self, name) for name in _SAME_NAME}
        legacy = None
        if self.rope_scaling is not None:
            legacy = {"type": "yarn", **{k: v for k, v in rope.items() if k != "rope_theta"}}
        return {
            "architectures": ["DeepseekV3ForCausalLM"],
            "model_type": "deepseek_v3",
            **fields,
            "num_key_value_heads": self.num_attention_heads,
            "qk_head_dim": self.qk_head_dim,
            "head_dim": self.qk_rope_head_dim,
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "use_cache": True,
            "rope_interleave": True,
            "rope_parameters": rope,
            "rope_theta": self.rope_theta,
            "rope_scaling": legacy,
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
            "moe_layer_freq": 1,
            "dtype": dtype,
            "torch_dtype": dtype,
        }

    @classmethod
    def from_hf(cls, values: dict[str, Any], where: str = "config.json") -> ModelConfig:
        """Reads ``config.json``; refuses (``ModelError``) what this decoder would compute differently."""
        for name, (wanted, default) in _ONLY.items():
            if values.get(name, default) not in wanted:
                raise ModelError(
                    f"{where}: {name} is {values.get(name)!r:.80}; only {wanted[0]!r} is supported"
                )
        heads = values.get("num_attention_heads")
        if values.get("num_key_value_heads", heads) not in (heads, None):
            raise ModelError(f"{where}: num_key_value_heads must equal num_attention_heads in MLA")
        required = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING]
        missing = [name for name in required if values.get(name) is None]
        if missing:
            raise ModelError(f"{where}: {', '.join(missing)} missing")
        kept = {name: values[name] for name in _SAME_NAME if name in values}
        # DeepSeek's own files leave unused group limits as null.
        kept = {k: v for k, v in kept.items() if v is not None or k in _MAY_BE_NONE}
        if isinstance(kept.get("eos_token_id"), list) and kept["eos_token_id"]:
            kept["eos_token_id"] = kept["eos_token_id"][0]
        try:
            factor = _number("routed_scaling_factor", kept.pop("routed_scaling_factor", 1.0))
            theta, yarn = _rope_from_hf(values)
            return cls(**kept, routed_scaling_factor=factor, rope_theta=theta, rope_scaling=yarn)
        except ModelError as error:
            raise ModelError(f"{where}: {error}") from None

    @classmethod
    def read(cls, path: str | Path) -> ModelConfig:
        path = Path(path)
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ModelError(f"{path} is missing; give a finished model folder") from None
        except (ValueError, RecursionError) as error:
            raise ModelError(f"{path} is not JSON ({error}); copy the model folder again") from None
        if not isinstance(values, dict):
            raise ModelError(f"{path} is not a JSON object")
        return cls.from_hf(values, str(path))


_AT_LEAST_ONE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "max_position_embeddings",
)
_NOT_IN_HF = ("attention", "rope_theta", "rope_scaling")
_SAME_NAME = [f.name for f in dataclasses.fields(ModelConfig) if f.name not in _NOT_IN_HF]
_MAY_BE_NONE = ("q_lora_rank", "bos_token_id", "eos_token_id", "pad_token_id")
# name -> (accepted values, the value an absent field stands for)
_ONLY: dict[str, tuple[tuple[Any, ...], Any]] = {
    "model_type": (("deepseek_v3",), None),
    "hidden_act": (("silu",), "silu"),
    "attention_bias": ((False,), False),
    "rope_interleave": ((True, None), True),
    "topk_method": (("noaux_tc",), "noaux_tc"),
    "scoring_func": (("sigmoid",), "sigmoid"),
    "moe_layer_freq": ((1,), 1),
    "quantization_config": ((None,), None),
}


def _check_type(name: str, annotation: str, value: object) -> None:
    """Strict types, bool never passing for int; an int may stand for a float."""
    kinds: tuple[type, ...] = ()
    for part, types in (
        ("int", (int,)),
        ("float", (int, float)),
        ("bool", (bool,)),
        ("Yarn", (Yarn,)),
    ):
        if part in annotation.replace("Literal", ""):
            kinds += types
    if "Literal" in annotation:
        kinds += (str,)
    good = isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
    if value is None:
        good = "None" in annotation
    if isinstance(value, str) and name == "routed_scaling_factor":
        good = good and value == "auto"
    if isinstance(value, int | float) and not -1e300 < value < 1e300:
        good = False  # NaN and infinity among them
    if not good:
        raise ModelError(f"{name} is {value!r:.80}; expected {annotation}")


def _number(name: str, value: Any) -> float:
    _check_type(name, "float", value)
    return float(value)


def _rope_from_hf(values: dict[str, Any]) -> tuple[float, Yarn | None]:
    """RoPE from the new field (rope_parameters) or the old pair (rope_theta, rope_scaling)."""
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ModelError(f"rope_parameters is {rope!r:.80}; expected an object")
    theta = _number("rope_theta", rope.get("rope_theta", values.get("rope_theta", 10000.0)))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "yarn":
        raise ModelError(f'rope type {kind!r:.80}; only "default" and "yarn" are supported')
    names = {f.name for f in dataclasses.fields(Yarn)}
    extra = set(rope) - names - {"rope_type", "type", "rope_theta"}
    if extra:
        raise ModelError(f"unsupported YaRN setting {', '.join(sorted(extra))}")
    try:
        return theta, Yarn(**{k: v for k, v in rope.items() if k in names})
    except TypeError:
        raise ModelError("YaRN needs factor and original_max_position_embeddings") from None


def auto_scaling_factor(chosen: int, experts: int) -> float:
    """E[1/||p||_2] for p the normalised top-``chosen`` of ``experts`` gates sigmoid(N(0, 1)).

    With this factor the routed experts' mixture has about the size of a single expert's output
    (Moonlight, arXiv 2502.16982, section 2.2). Fixed draw, rounded to two decimals.
    """
    draws = np.random.default_rng(0).standard_normal((4096, experts))
    top = np.sort(1 / (1 + np.exp(-draws)), axis=1)[:, experts - chosen :]
    shares = top / top.sum(axis=1, keepdims=True)
    return round(float((1 / np.sqrt((shares**2).sum(axis=1))).mean()), 2)
