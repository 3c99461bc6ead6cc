"""``config.json``: a shape as transformers, vLLM, SGLang and llama.cpp's converter read it, and back.

One table says, for every model type that opens here, which fields it shares with ``ModelConfig``, what an absent one
stands for, and which values this decoder does not compute and therefore refuses. Saved are "deepseek_v3",
"deepseek_v2", "llama", "qwen2" and "qwen3"; "kimi_k2" is DeepSeek-V3 under another name.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any, Literal, NamedTuple

from shenhong.errors import ModelError
from shenhong.model.config import LinearRope, Llama3Rope, ModelConfig, RopeScaling, Yarn, check_type
from shenhong.runs.files import pointer
from shenhong.runs.regular import read_inside

log = logging.getLogger("shenhong.model")


class Only(NamedTuple):
    """The values of a field that are computed here, what an absent field stands for, and why others are refused."""

    values: tuple[Any, ...]
    absent: Any
    why: str


class Family(NamedTuple):
    """How one model type's config.json relates to ``ModelConfig``."""

    architecture: str
    same: tuple[str, ...]  # fields of one name and meaning, in the order they are written
    required: tuple[str, ...]
    only: dict[str, Only]
    absent: dict[str, Any]  # what null or nothing means, where not ModelConfig's default
    fixed: dict[str, Any]  # what the type means by itself
    written: dict[str, Any]  # written as well, for engines with another default or none


_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
_LATENT = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
_EXPERTS = (
    "moe_intermediate_size",
    "n_routed_experts",
    "num_experts_per_tok",
    "n_shared_experts",
    "first_k_dense_replace",
    "n_group",
    "topk_group",
    "norm_topk_prob",
    "routed_scaling_factor",
)
_GENERAL = ("hidden_act", "rms_norm_eps", "initializer_range", "tie_word_embeddings")
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
# A null here is not the default: it means none, and ModelConfig refuses it where there must be one.
_MAY_BE_NULL = ("q_lora_rank", "hidden_act", *_TOKENS)

_NO_BIAS = "its matrices have no bias here"
_PLAIN = {
    "attention_bias": Only((False,), False, _NO_BIAS),
}
_FULL = "a sliding window is not computed here"
_LATENT_ONLY = _PLAIN | {
    "rope_interleave": Only((True, None), True, "neighbouring numbers are rotated together"),
    "moe_layer_freq": Only((1,), 1, "all layers after the dense ones have experts"),
    "mlp_bias": Only((False, None), False, _NO_BIAS),
}
_SAID = {"attention_bias": False, "attention_dropout": 0.0, "use_cache": True}

DEEPSEEK_V3 = Family(
    architecture="DeepseekV3ForCausalLM",
    same=(
        *_SIZES,
        *_LATENT,
        "q_lora_rank",
        *_EXPERTS,
        "num_nextn_predict_layers",
        "max_position_embeddings",
        *_GENERAL,
        *_TOKENS,
    ),
    required=(*_SIZES, *_LATENT),
    only=_LATENT_ONLY
    | {
        "topk_method": Only(("noaux_tc",), "noaux_tc", "that of DeepSeek-V3"),
        "scoring_func": Only(("sigmoid",), "sigmoid", "that of DeepSeek-V3"),
    },
    absent={"routed_scaling_factor": 1.0},
    fixed={},
    written=_SAID
    | {
        "rope_interleave": True,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "moe_layer_freq": 1,
    },
)
DEEPSEEK_V2 = Family(
    architecture="DeepseekV2ForCausalLM",
    same=(
        *_SIZES,
        *_LATENT,
        "q_lora_rank",
        *_EXPERTS,
        "topk_method",
        "max_position_embeddings",
        *_GENERAL,
        *_TOKENS,
    ),
    required=(*_SIZES, *_LATENT),
    only=_LATENT_ONLY
    | {
        "scoring_func": Only(("softmax",), "softmax", "that of DeepSeek-V2"),
        "norm_topk_prob": Only(
            (False, None), False, "engines differ in what else it means in DeepSeek-V2"
        ),
        "num_nextn_predict_layers": Only((0, None), 0, "DeepSeek-V2 has no such layers"),
    },
    absent={
        "routed_scaling_factor": 1.0,
        "topk_method": "greedy",
        "norm_topk_prob": False,
        "first_k_dense_replace": 0,
    },
    fixed={"scoring_func": "softmax"},
    written=_SAID | {"scoring_func": "softmax", "moe_layer_freq": 1},
)


def _grouped(architecture: str, only: dict[str, Only], **fixed: bool) -> Family:
    return Family(
        architecture=architecture,
        same=(
            *_SIZES,
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
            *_GENERAL,
            *_TOKENS,
        ),
        required=_SIZES,
        only=_PLAIN | only,
        absent={"routed_scaling_factor": 1.0},
        fixed={"attention": "gqa", **fixed},
        written=_SAID,
    )


_WINDOW = {"use_sliding_window": Only((False, None), False, _FULL)}
FAMILIES = {
    "deepseek_v3": DEEPSEEK_V3,
    "deepseek_v2": DEEPSEEK_V2,
    "llama": _grouped("LlamaForCausalLM", {"mlp_bias": Only((False, None), False, _NO_BIAS)}),
    "qwen2": _grouped("Qwen2ForCausalLM", _WINDOW, qkv_bias=True),
    "qwen3": _grouped("Qwen3ForCausalLM", _WINDOW, qk_norm=True),
    "kimi_k2": DEEPSEEK_V3,
}
_ROPES: dict[str, type[RopeScaling]] = {
    "yarn": Yarn,
    "linear": LinearRope,
    "llama3": Llama3Rope,
}


def model_type(config: ModelConfig) -> str:
    """The type a shape is saved as; ``ModelError`` where no open format holds it."""
    if config.attention == "mha":
        raise ModelError('attention "mha" has no open format; only "mla" and "gqa" can be saved')
    if config.attention == "mla":
        return "deepseek_v2" if config.scoring_func == "softmax" else "deepseek_v3"
    if config.expert_layers or (config.qkv_bias and config.qk_norm):
        raise ModelError("no open format holds grouped-query attention with these other parts")
    return "qwen2" if config.qkv_bias else "qwen3" if config.qk_norm else "llama"


def to_hf(config: ModelConfig, dtype: Literal["float32", "bfloat16"] = "float32") -> dict[str, Any]:
    """The contents of ``config.json``; ``ModelError`` where no open format holds the model.

    Beside transformers' own fields it names the router for engines that have no default for it
    (topk_method, scoring_func, moe_layer_freq) and repeats RoPE the old way (rope_theta, rope_scaling).
    """
    kind = model_type(config)
    family = FAMILIES[kind]
    latent = {
        "num_key_value_heads": config.num_attention_heads,
        "qk_head_dim": config.qk_head_dim,
        "head_dim": config.qk_rope_head_dim,
    }
    rope, legacy = _rope_to_hf(config)
    after = ("topk_method", "scoring_func", "moe_layer_freq")
    return {
        "architectures": [family.architecture],
        "model_type": kind,
        **{name: getattr(config, name) for name in family.same},
        **(latent if config.attention == "mla" else {}),
        **{name: value for name, value in family.written.items() if name not in after},
        "rope_parameters": rope,
        "rope_theta": config.rope_theta,
        "rope_scaling": legacy,
        **{name: value for name, value in family.written.items() if name in after},
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def from_hf(values: dict[str, Any], where: str = "config.json") -> ModelConfig:
    """Reads ``config.json``; refuses (``ModelError``) what this decoder would compute differently."""
    kind = values.get("model_type")
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is None:
        known = ", ".join(FAMILIES)
        raise ModelError(f"{where}: model_type is {kind!r:.80}; those that open here are {known}")
    for name, only in family.only.items():
        if values.get(name, only.absent) not in only.values:
            raise ModelError(
                f"{where}: {name} is {values.get(name)!r:.80}; only {only.values[0]!r} is supported "
                f"({only.why})"
            )
    missing = [name for name in family.required if values.get(name) is None]
    if missing:
        raise ModelError(f"{where}: {', '.join(missing)} missing")
    # DeepSeek's own files leave unused group limits as null.
    stated = {
        name: values[name]
        for name in family.same
        if name in values and (values[name] is not None or name in _MAY_BE_NULL)
    }
    kept = family.absent | stated | family.fixed
    if isinstance(kept.get("eos_token_id"), list) and kept["eos_token_id"]:
        kept["eos_token_id"] = kept["eos_token_id"][0]
    heads = values["num_attention_heads"]
    try:
        _check_quantised(values.get("quantization_config"))
        if family.fixed.get("attention") == "gqa":
            kept |= _heads_from_hf(values)
        elif values.get("num_key_value_heads", heads) not in (heads, None):
            raise ModelError("num_key_value_heads must equal num_attention_heads in MLA")
        elif kept.get("topk_method") == "greedy":
            kept |= {"n_group": 1, "topk_group": 1}  # the greedy choice does not look at groups
        check_type("routed_scaling_factor", "float", kept["routed_scaling_factor"])
        theta, scaling = _rope_from_hf(values)
        return ModelConfig(**kept, rope_theta=theta, rope_scaling=scaling)
    except ModelError as error:
        raise ModelError(f"{where}: {error}") from None


def read_config(path: str | Path) -> ModelConfig:
    """The shape that a config.json describes. Error: ModelError, one line."""
    path = Path(path)
    try:
        values = json.loads(read_inside(path))
    except FileNotFoundError:
        raise ModelError(f"{path} is missing; give a finished model folder") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(
            pointer(path) or f"{path} is not JSON ({error}); copy the model folder again"
        ) from None
    if not isinstance(values, dict):
        raise ModelError(f"{path} is not a JSON object")
    return from_hf(values, str(path))


# DeepSeek-V3's FP8 weights, as they are written and the only quantised ones that are read.
FP8 = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}


def _check_quantised(given: Any) -> None:
    if given is None:
        return
    good = isinstance(given, dict) and all(
        given.get(name, value if name in ("fmt", "activation_scheme") else None) == value
        for name, value in FP8.items()
    )
    if not good:
        raise ModelError(
            f"quantization_config is {given!r:.80}; besides none only fp8 with weight_block_size "
            "[128, 128] is supported"
        )


def _heads_from_hf(values: dict[str, Any]) -> dict[str, Any]:
    """Heads of grouped-query attention: absent numbers follow from the others, and no layer has a window."""
    kinds = values.get("layer_types")
    if kinds is not None and (
        not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds)
    ):
        raise ModelError(f"layer_types is {kinds!r:.80}; only full_attention is supported")
    heads, width = values["num_attention_heads"], values["hidden_size"]
    check_type("num_attention_heads", "int", heads)
    check_type("hidden_size", "int", width)
    shared, each = values.get("num_key_value_heads"), values.get("head_dim")
    return {
        "first_k_dense_replace": values["num_hidden_layers"],
        "num_key_value_heads": heads if shared is None else shared,
        "head_dim": width // max(heads, 1) if each is None else each,
    }


def _rope_to_hf(config: ModelConfig) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """(rope_parameters, the old rope_scaling)."""
    scaling = config.rope_scaling
    if scaling is None:
        return {"rope_type": "default", "rope_theta": config.rope_theta}, None
    kind = next(name for name, made in _ROPES.items() if isinstance(scaling, made))
    numbers = dataclasses.asdict(scaling)
    for name, usual in (("attention_factor", None), ("truncate", True)):
        if numbers.get(name, usual) == usual:  # older readers know neither
            numbers.pop(name, None)
    rope = {"rope_type": kind, "rope_theta": config.rope_theta, **numbers}
    return rope, {"type": kind, "rope_type": kind, **numbers}


def _rope_from_hf(values: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    """RoPE from the new field (rope_parameters) or the old pair (rope_theta, rope_scaling)."""
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ModelError(f"rope_parameters is {rope!r:.80}; expected an object")
    theta = rope.get("rope_theta", values.get("rope_theta", 10000.0))
    check_type("rope_theta", "float", theta)
    for place in (rope, values):
        if place.get("partial_rotary_factor", 1.0) not in (1.0, None):
            raise ModelError("partial_rotary_factor is set; heads are rotated whole here")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return float(theta), None
    made = _ROPES.get(kind) if isinstance(kind, str) else None
    if made is None:
        known = ", ".join(_ROPES)
        raise ModelError(f"rope type {kind!r:.80}; those supported are default, {known}")
    names = {field.name for field in dataclasses.fields(made)}
    extra = set(rope) - names - {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    if made is Yarn and "attn_factor" in extra:
        extra.remove("attn_factor")
        log.warning("yarn's attn_factor is not read, as in transformers; attention_factor is")
    if extra:
        raise ModelError(f"unsupported {kind} rope setting {', '.join(sorted(extra)):.80}")
    # Without DeepSeek's two scales YaRN has the one of its own paper.
    given: dict[str, Any] = {"mscale": 0.0, "mscale_all_dim": 0.0} if made is Yarn else {}
    given |= {name: rope[name] for name in names if rope.get(name) is not None}
    missing = [
        field.name
        for field in dataclasses.fields(made)
        if field.default is dataclasses.MISSING and field.name not in given
    ]
    if missing:
        raise ModelError(f"rope type {kind} needs {' and '.join(missing)}")
    return float(theta), made(**given)
