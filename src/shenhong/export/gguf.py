"""A finished model as one GGUF file, which llama.cpp, Ollama and LM Studio open with no patch.

Matrices are stored in 32 or 16-bit floats, or in blocks of 32 numbers with a 16-bit scale each (Q8_0, Q4_0). Norms,
routers and biases stay in 32 bits: they are few, and a router that rounds sends tokens to other experts. At 4 bits the
embedding and the head are Q8_0, for every token passes both.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import gguf
import numpy as np
import torch
from torch import Tensor

from shenhong.errors import ModelError
from shenhong.export import deepseek2
from shenhong.export.huggingface import Entry, check_tokenizer, load_model, read_shape
from shenhong.export.verdicts import LLAMA_CPP, verdict
from shenhong.model import ModelConfig
from shenhong.runs.files import atomic_file
from shenhong.tokenizer import Tokenizer
from shenhong.tokenizer.tokenizer import deepseek_v3_splits

_Kind = gguf.GGMLQuantizationType
KINDS = {32: _Kind.F32, 16: _Kind.F16, 8: _Kind.Q8_0, 4: _Kind.Q4_0}
_FILE_TYPES = {
    32: gguf.LlamaFileType.ALL_F32,
    16: gguf.LlamaFileType.MOSTLY_F16,
    8: gguf.LlamaFileType.MOSTLY_Q8_0,
    4: gguf.LlamaFileType.MOSTLY_Q4_0,
}
_LARGEST_HALF = 65504.0
_EMBEDDINGS = ("token_embd.weight", "output.weight")


class Written(NamedTuple):
    """What a file holds: bytes by kind, and what differs from what was asked for."""

    path: Path
    nbytes: int
    kinds: dict[str, int]
    notes: list[str]


def save_gguf(
    folder: str | Path, path: str | Path, bits: int = 16, *, multitoken: bool = True
) -> Written:
    """Writes the model folder as one file, whole or not at all. ``bits`` of a matrix: 32, 16, 8 or 4.

    Errors: ModelError where llama.cpp would not compute what the model computes, or the tokenizer is not one
    it knows; RunError when the file cannot be written.
    """
    folder, path = Path(folder), Path(path)
    judged = verdict(LLAMA_CPP, read_shape(folder))
    if not judged.opens:
        raise ModelError(f"{folder} cannot become GGUF: {LLAMA_CPP}: {'; '.join(judged.reasons)}")
    decoder, notes = load_model(folder), judged.reasons
    config = decoder.config
    if config.num_nextn_predict_layers and not config.expert_layers:
        multitoken = False
        notes.append(
            "the multi-token-prediction layer is left out: llama.cpp reads none without experts"
        )
    # Quantised one at a time when it is written, so that only the table is made before.
    others: dict[str, list[str]] = {}
    plan = [(entry, _kind(entry, bits, others)) for entry in deepseek2.entries(decoder, multitoken)]
    notes += [_counted(names, why) for why, names in others.items()]
    with atomic_file(path) as temporary:
        writer = gguf.GGUFWriter(temporary, deepseek2.ARCHITECTURE)
        try:
            _add_metadata(writer, deepseek2.metadata(config, multitoken))
            writer.add_name(path.stem)
            writer.add_file_type(_FILE_TYPES[bits])
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
            _add_tokenizer(writer, folder, config)
            for entry, kind in plan:
                block, width = gguf.GGML_QUANT_SIZES[kind]
                shape = tuple(entry.view.shape)
                stored = (*shape[:-1], shape[-1] // block * width)
                writer.add_tensor_info(
                    entry.name, stored, np.dtype(np.uint8), int(np.prod(stored)), raw_dtype=kind
                )
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            kinds: dict[str, int] = {}
            for entry, kind in plan:
                raw = gguf.quantize(_plain(entry.view), kind).view(np.uint8)
                kinds[kind.name] = kinds.get(kind.name, 0) + raw.nbytes
                writer.write_tensor_data(raw)
        finally:
            writer.close()
    return Written(path, path.stat().st_size, kinds, notes)


def _kind(entry: Entry, bits: int, others: dict[str, list[str]]) -> gguf.GGMLQuantizationType:
    """How a tensor is stored; where that is not in ``bits``, its name joins those of the same reason in ``others``."""
    if entry.exact:
        return _Kind.F32
    kind = KINDS[8 if bits == 4 and entry.name in _EMBEDDINGS else bits]
    row, (block, _) = entry.view.shape[-1], gguf.GGML_QUANT_SIZES[kind]
    if row % block:
        why = f"stays in 16 bits: rows of {row} are no multiple of {block}"
        others.setdefault(why, []).append(entry.name)
        kind = _Kind.F16
    if kind is _Kind.F16 and entry.view.abs().max() > _LARGEST_HALF:
        why = "stays in 32 bits: it has numbers that 16-bit floats cannot hold"
        others.setdefault(why, []).append(entry.name)
        kind = _Kind.F32
    return kind


def _counted(names: list[str], why: str) -> str:
    """One line for all tensors of one reason."""
    if len(names) == 1:
        return f"{names[0]} {why}"
    return f"{len(names)} tensors, {names[0]} the first: each {why}"


def _plain(view: Tensor) -> np.ndarray:
    values: np.ndarray = view.detach().to("cpu", torch.float32).contiguous().numpy()
    return values


def _add_metadata(writer: gguf.GGUFWriter, values: dict[str, str | int | float | bool]) -> None:
    for key, value in values.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_uint32(key, value)


def _add_tokenizer(writer: gguf.GGUFWriter, folder: Path, config: ModelConfig) -> None:
    """Byte-level BPE as "gpt2" with a pre-tokenizer by name, special ids and the chat template."""
    check_tokenizer(folder, config.vocab_size)
    tokenizer = Tokenizer.load(folder)
    values = json.loads(tokenizer.backend.to_str())
    model, splits = values["model"], json.loads(deepseek_v3_splits().__getstate__())
    if model["type"] != "BPE" or values["pre_tokenizer"] != splits or values["normalizer"]:
        raise ModelError(
            f"{folder / 'tokenizer.json'} splits text in a way llama.cpp has no name for; only the "
            "splits of DeepSeek-V3's tokenizer are exported"
        )
    # Embeddings past the tokenizer's end have no text.
    tokens = [f"[PAD{number}]" for number in range(config.vocab_size)]
    types = [int(gguf.TokenType.UNUSED)] * config.vocab_size
    for token, number in model["vocab"].items():
        tokens[number], types[number] = token, int(gguf.TokenType.NORMAL)
    for added in values["added_tokens"]:
        kind = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        tokens[added["id"]], types[added["id"]] = added["content"], int(kind)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("deepseek-v3")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    for name, add in (
        ("bos", writer.add_bos_token_id),
        ("eos", writer.add_eos_token_id),
        ("pad", writer.add_pad_token_id),
    ):
        number = getattr(config, f"{name}_token_id")
        if number is not None:
            add(number)
    writer.add_add_bos_token(tokenizer.special.begins)
    writer.add_add_eos_token(False)
    if tokenizer.special.template is not None:
        writer.add_chat_template(tokenizer.special.template)
