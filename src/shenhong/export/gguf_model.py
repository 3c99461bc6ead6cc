"""A GGUF file as a model: its shape from the metadata, its tensors dequantised into a decoder.

What is read: "llama", "qwen2" and "qwen3" (grouped-query attention) and "deepseek2" (latent attention, split as
llama.cpp has it). llama.cpp's converter has already brought the rotated rows of "llama" and "deepseek2" into our order
of neighbouring pairs; those of the Qwen architectures still are two halves.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shenhong.errors import ModelError
from shenhong.export import grouped
from shenhong.export.deepseek2 import entries
from shenhong.export.gguf_file import GgufFile, open_gguf
from shenhong.model import Decoder, ModelConfig, Yarn
from shenhong.model.config import LinearRope, Llama3Rope, RopeScaling, check_type
from shenhong.model.rope import interleaved, llama3_frequencies

ARCHITECTURES = (*grouped.ARCHITECTURES, "deepseek2")
# Llama 3.1 and its kin differ in the factor only, and a file says nothing but the result.
_LLAMA3 = Llama3Rope(1.0, 8192, low_freq_factor=1.0, high_freq_factor=4.0)
# What would change the result and is not computed here: key -> the values under which it changes nothing.
_UNREAD: dict[str, tuple[float, ...]] = {
    "attention.sliding_window": (0,),
    "attention.scale": (0, 1),
    "attention.causal": (True,),
    "rope.scaling.attn_factor": (1,),
    "rope.scale_linear": (1,),
    "logit_scale": (1,),
    "embedding_scale": (1,),
    "residual_scale": (1,),
}


class _Fields:
    """The metadata of one architecture."""

    def __init__(self, file: GgufFile) -> None:
        self.file, self.values = file, file.metadata
        self.architecture = self.get("general.architecture", "str")
        if self.architecture not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise ModelError(f"architecture {self.architecture!r:.60}; those that open are {known}")
        for name, harmless in _UNREAD.items():
            value = self.values.get(f"{self.architecture}.{name}", harmless[0])
            if value not in harmless:
                raise ModelError(f"{name} is {value!r:.60}, which is not computed here")

    def get(self, key: str, kind: str, absent: Any = dataclasses.MISSING) -> Any:
        value = self.values.get(key, absent)
        if value is dataclasses.MISSING:
            raise ModelError(f"metadata {key} missing")
        if value is absent:
            return value
        if kind == "str" and not isinstance(value, str):
            raise ModelError(f"metadata {key} is {value!r:.60}; expected text")
        if kind != "str":
            check_type(key, kind, value)
        # Numbers are stored in 32 bits: 1e-05 must not become 9.999999747378752e-06.
        return float(str(np.float32(value))) if kind == "float" else value

    def whole(self, name: str, absent: Any = dataclasses.MISSING) -> Any:
        return self.get(f"{self.architecture}.{name}", "int", absent)

    def number(self, name: str, absent: Any = dataclasses.MISSING) -> Any:
        return self.get(f"{self.architecture}.{name}", "float", absent)

    def text(self, name: str, absent: str | None = None) -> Any:
        return self.get(f"{self.architecture}.{name}", "str", absent)


def gguf_config(file: GgufFile) -> ModelConfig:
    """The shape a file describes. Error: ModelError for what is not computed here."""
    try:
        fields = _Fields(file)
        tokens = file.metadata.get("tokenizer.ggml.tokens")
        listed = len(tokens) if isinstance(tokens, list) else dataclasses.MISSING
        common: dict[str, Any] = {
            "vocab_size": fields.whole("vocab_size", listed),
            "hidden_size": fields.whole("embedding_length"),
            "intermediate_size": fields.whole("feed_forward_length"),
            "num_attention_heads": fields.whole("attention.head_count"),
            "max_position_embeddings": fields.whole("context_length"),
            "rms_norm_eps": fields.number("attention.layer_norm_rms_epsilon"),
            "rope_theta": fields.number("rope.freq_base", 10000.0),
            "tie_word_embeddings": "output.weight" not in file.tensors,
        }
        if isinstance(tokens, list) and len(tokens) > common["vocab_size"]:
            raise ModelError(
                f"{len(tokens)} tokens, but the model's embeddings have only {common['vocab_size']} rows"
            )
        for name in ("bos", "eos", "padding"):
            token = fields.get(f"tokenizer.ggml.{name}_token_id", "int", None)
            common[f"{name.removesuffix('ding')}_token_id"] = token
        latent = fields.architecture == "deepseek2"
        return ModelConfig(**common, **(_latent(fields) if latent else _grouped(fields, common)))
    except ModelError as error:
        raise ModelError(f"{file.path}: {error}") from None


def _grouped(fields: _Fields, common: dict[str, Any]) -> dict[str, Any]:
    layers, heads = fields.whole("block_count"), common["num_attention_heads"]
    if fields.whole("expert_count", 0):
        raise ModelError("experts with grouped-query attention are not computed here")
    width = fields.whole("attention.key_length", common["hidden_size"] // max(heads, 1))
    for name in ("attention.value_length", "rope.dimension_count"):
        if fields.whole(name, width) != width:
            raise ModelError(f"{name} differs from the width of a head ({width})")
    return {
        "attention": "gqa",
        "num_hidden_layers": layers,
        "first_k_dense_replace": layers,
        "num_key_value_heads": fields.whole("attention.head_count_kv", heads),
        "head_dim": width,
        "qkv_bias": "blk.0.attn_q.bias" in fields.file.tensors,
        "qk_norm": "blk.0.attn_q_norm.weight" in fields.file.tensors,
        "rope_scaling": _llama3(fields, width, common) or _scaling(fields, 0.0),
    }


def _latent(fields: _Fields) -> dict[str, Any]:
    if fields.whole("attention.key_length_mla", None) is None:
        raise ModelError("made before llama.cpp split attn_kv_b; convert the model again")
    multitoken = fields.whole("nextn_predict_layers", 0)
    layers = fields.whole("block_count") - multitoken
    rope, experts = fields.whole("rope.dimension_count"), fields.whole("expert_count", 0)
    shape: dict[str, Any] = {
        "num_hidden_layers": layers,
        "num_nextn_predict_layers": multitoken,
        "kv_lora_rank": fields.whole("attention.kv_lora_rank"),
        "q_lora_rank": fields.whole("attention.q_lora_rank", 0) or None,
        "qk_rope_head_dim": rope,
        "qk_nope_head_dim": fields.whole("attention.key_length_mla") - rope,
        "v_head_dim": fields.whole("attention.value_length_mla"),
        # The file says 0.1 of it.
        "rope_scaling": _scaling(
            fields, 10 * fields.number("rope.scaling.yarn_log_multiplier", 0.0)
        ),
    }
    if not experts:
        return shape | {"first_k_dense_replace": layers, "n_shared_experts": 1}
    softmax = fields.whole("expert_gating_func", 1) != 2
    groups = max(fields.whole("expert_group_count", 1), 1)
    return shape | {
        "first_k_dense_replace": fields.whole("leading_dense_block_count", 0),
        "n_routed_experts": experts,
        "num_experts_per_tok": fields.whole("expert_used_count"),
        "moe_intermediate_size": fields.whole("expert_feed_forward_length"),
        "n_shared_experts": fields.whole("expert_shared_count", 0),
        "norm_topk_prob": fields.get("deepseek2.expert_weights_norm", "bool", False),
        "routed_scaling_factor": fields.number("expert_weights_scale", 0.0) or 1.0,
        "n_group": groups,
        "topk_group": fields.whole("expert_group_used_count", 1) if groups > 1 else 1,
        "scoring_func": "softmax" if softmax else "sigmoid",
        "topk_method": ("group_limited_greedy" if groups > 1 else "greedy")
        if softmax
        else "noaux_tc",
    }


def _scaling(fields: _Fields, mscale: float) -> RopeScaling | None:
    kind = fields.text("rope.scaling.type", "none")
    if kind == "none":
        return None
    factor = fields.number("rope.scaling.factor")
    if kind == "linear":
        return LinearRope(factor)
    if kind != "yarn":
        raise ModelError(f'rope scaling {kind!r:.60}; only "linear" and "yarn" are computed here')
    original = fields.whole("rope.scaling.original_context_length")
    scale = round(mscale, 6)
    return Yarn(factor, original, mscale=scale, mscale_all_dim=scale)


def _llama3(fields: _Fields, width: int, common: dict[str, Any]) -> Llama3Rope | None:
    """The extension that gives the file's divisors of the frequencies, if they are Llama 3's."""
    info = fields.file.tensors.get(grouped.FACTORS)
    if info is None:
        return None
    divisors = fields.file.read(grouped.FACTORS) if info.shape == (width // 2,) else torch.zeros(1)
    if float(divisors.min()) > 0.999:
        rope = dataclasses.replace(_LLAMA3, factor=round(float(divisors.max()), 3))
        plain = grouped.frequencies(common["rope_theta"], width)
        if torch.allclose(plain / divisors, llama3_frequencies(plain, rope), rtol=1e-3):
            return rope
    raise ModelError(
        f"{grouped.FACTORS} is not Llama 3's extension; give the model's folder instead"
    )


def load_gguf(path: str | Path, compute_dtype: torch.dtype = torch.float32) -> Decoder:
    """The decoder of a GGUF file, fp32 parameters. Error: ModelError names what does not fit."""
    file = open_gguf(path)
    decoder = Decoder(check_gguf(file), seed=None, compute_dtype=compute_dtype)
    in_halves = file.metadata["general.architecture"] in grouped.IN_HALVES
    for entry in entries(decoder, in_halves=in_halves):
        tensor = file.read(entry.name)
        if entry.halves:
            tensor = interleaved(tensor, entry.halves)
        if not bool(tensor.isfinite().all()):
            raise ModelError(f"{file.path}: tensor {entry.name} holds numbers that are not finite")
        entry.view.detach().copy_(tensor)
    return decoder


def check_gguf(file: GgufFile) -> ModelConfig:
    """The shape of a file whose every tensor fits it; nothing is allocated. Error: ModelError."""
    config = gguf_config(file)
    with torch.device("meta"):
        shapes = {entry.name: entry.view.shape for entry in entries(Decoder(config, seed=None))}
    _compare(file, shapes)
    return config


def _compare(file: GgufFile, shapes: dict[str, torch.Size]) -> None:
    for name, shape in shapes.items():
        info = file.tensors.get(name)
        if info is None:
            raise ModelError(f"{file.path}: tensor {name} missing; download the file again")
        if info.shape != tuple(shape):
            raise ModelError(
                f"{file.path}: tensor {name} is {list(info.shape)}, but the metadata make it {list(shape)}"
            )
    extra = [name for name in file.tensors if name not in shapes and name != grouped.FACTORS]
    if extra:
        raise ModelError(f"{file.path}: tensor {extra[0]} does not belong to this architecture")
