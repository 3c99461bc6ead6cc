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

from shenhong.errors import ModelError, UsageError
from shenhong.export import deepseek2, grouped
from shenhong.export.gguf_sampling import add_sampling
from shenhong.export.gguf_tokenizer import name_of_splits
from shenhong.export.huggingface import Entry
from shenhong.export.source import Source, open_source
from shenhong.export.verdicts import LLAMA_CPP, verdict
from shenhong.model import Decoder, ModelConfig
from shenhong.model.hf_config import model_type
from shenhong.model.rope import half_split
from shenhong.runs.files import atomic_file

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
    model: str | Path, path: str | Path, bits: int = 16, *, multitoken: bool = True
) -> Written:
    """Writes a model folder or GGUF file as one file, whole or not at all. ``bits`` of a matrix: 32, 16, 8 or 4.

    Errors: ModelError where llama.cpp would not compute what the model computes, or the tokenizer is not one
    it knows; RunError when the file cannot be written.
    """
    path, source = Path(path), open_source(Path(model))
    if path.resolve() == source.path.resolve():
        raise UsageError(f"--out {path} is where the model lies; choose another file")
    config = source.check()
    judged = verdict(LLAMA_CPP, config)
    if not judged.opens:
        raise ModelError(
            f"{source.path} cannot become GGUF: {LLAMA_CPP}: {'; '.join(judged.reasons)}"
        )
    splits, notes = _splits(source), judged.reasons
    if config.num_nextn_predict_layers and not config.expert_layers:
        multitoken = False
        notes.append(
            "the multi-token-prediction layer is left out: llama.cpp reads none without experts"
        )
    # Quantised one at a time when it is written, so that only the table is made before.
    architecture, values, entries = _described(source.decoder(), multitoken)
    others: dict[str, list[str]] = {}
    plan = [(entry, _kind(entry, bits, others)) for entry in entries]
    notes += [_counted(names, why) for why, names in others.items()]
    with atomic_file(path) as temporary:
        writer = gguf.GGUFWriter(temporary, architecture)
        try:
            _add_metadata(writer, values)
            writer.add_name(path.stem)
            writer.add_file_type(_FILE_TYPES[bits])
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
            _add_tokenizer(writer, source, config, splits, notes)
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
                raw = gguf.quantize(_plain(entry), kind).view(np.uint8)
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


def _plain(entry: Entry) -> np.ndarray:
    tensor = entry.view.detach()
    tensor = half_split(tensor, entry.halves) if entry.halves else tensor
    values: np.ndarray = tensor.to("cpu", torch.float32).contiguous().numpy()
    return values


def _described(
    decoder: Decoder, multitoken: bool
) -> tuple[str, dict[str, str | int | float | bool], list[Entry]]:
    """(architecture, metadata, tensors) of the file."""
    config = decoder.config
    if config.attention == "mla":
        metadata = deepseek2.metadata(config, multitoken)
        return deepseek2.ARCHITECTURE, metadata, list(deepseek2.entries(decoder, multitoken))
    architecture = model_type(config)
    entries = list(deepseek2.entries(decoder, in_halves=architecture in grouped.IN_HALVES))
    if (divisors := grouped.divisors(config)) is not None:
        entries.append(Entry(grouped.FACTORS, divisors, exact=True))
    return architecture, grouped.metadata(config), entries


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


def _splits(source: Source) -> str:
    """llama.cpp's name for how the tokenizer splits text. Error: ModelError where it has none."""
    name = name_of_splits(json.loads(source.tokenizer.backend.to_str()))
    if name is None:
        raise ModelError(
            f"{source.path} cannot become GGUF: its tokenizer splits text in a way llama.cpp has no name for; "
            "those of GPT-2, SmolLM2, Llama 3, Qwen2 and DeepSeek-V3 are exported"
        )
    return name


def _add_tokenizer(
    writer: gguf.GGUFWriter, source: Source, config: ModelConfig, splits: str, notes: list[str]
) -> None:
    """Byte-level BPE as "gpt2" with a pre-tokenizer by name, special ids, the chat template and how it is sampled."""
    tokenizer = source.tokenizer
    values = json.loads(tokenizer.backend.to_str())
    # Embeddings past the tokenizer's end have no text.
    tokens = [f"[PAD{number}]" for number in range(config.vocab_size)]
    types = [int(gguf.TokenType.UNUSED)] * config.vocab_size
    for token, number in values["model"]["vocab"].items():
        tokens[number], types[number] = token, int(gguf.TokenType.NORMAL)
    for added in values["added_tokens"]:
        kind = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        tokens[added["id"]], types[added["id"]] = added["content"], int(kind)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splits)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(pair) for pair in values["model"]["merges"]])
    # What the tokenizer says of them goes before config.json, as in llama.cpp's own converter.
    special = tokenizer.special
    bos = config.bos_token_id if special.bos is None else tokenizer.bos_id
    eos = config.eos_token_id if special.eos is None else tokenizer.eos_id
    pad = config.pad_token_id if special.pad is None else tokenizer.pad_id
    others = sorted(end for end in tokenizer.ends - {eos} if 0 <= end < len(tokens))
    named = [
        (bos, writer.add_bos_token_id),
        (eos, writer.add_eos_token_id),
        (pad, writer.add_pad_token_id),
        *zip(others, (writer.add_eot_token_id, writer.add_eom_token_id), strict=False),
    ]
    for number, add in named:
        if number is not None:
            add(number)
    if len(others) > 2:
        notes.append(f"{len(others) + 1} tokens end an answer: a GGUF file names three of them")
    wide = [t["content"] for t in values["added_tokens"] if t["lstrip"] or t["rstrip"]]
    if wide:
        notes.append(
            f"a GGUF file cannot say that {wide[0]!r} takes the spaces beside it ({len(wide)} such tokens)"
        )
    writer.add_add_bos_token(special.begins)
    writer.add_add_eos_token(False)
    add_sampling(writer, source.generation(config))
    if special.template is not None:
        writer.add_chat_template(special.template)
