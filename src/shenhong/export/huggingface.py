"""A finished model as a Hugging Face folder, and back.

    config.json  generation_config.json  model.safetensors (or shards with an index)
    tokenizer.json  tokenizer_config.json  chat_template.jinja  (copied)

On disk every expert has its own three matrices, as in DeepSeek's own files, and the MTP layer (number
num_hidden_layers) carries copies of the embedding and the head, which engines load it with. In FP8 the matrices of the
layers are stored as ``numerics/fp8.py`` says, beside a tensor of scales each; all else is bfloat16. Nothing here
unpickles or runs what it reads.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from shenhong.errors import ModelError
from shenhong.export import shards
from shenhong.export.shards import INDEX, MULTITOKEN, SINGLE, Stored
from shenhong.model import Decoder, ModelConfig
from shenhong.model.hf_config import FP8, read_config, to_hf
from shenhong.model.rope import half_split, interleaved
from shenhong.numerics.formats import fp8
from shenhong.runs.files import atomic_folder, pointer
from shenhong.runs.regular import UnreadableError, read_inside
from shenhong.tokenizer import Tokenizer
from shenhong.tokenizer.tokenizer import ends_of, read_object

log = logging.getLogger("shenhong.export")

Precision = Literal["float32", "bfloat16", "float8"]

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
)
GENERATION = "generation_config.json"
SHARD_BYTES = 4_000_000_000
# What grouped-query attention rotates; in latent attention the pairs are neighbours on disk too.
HALVES = re.compile(r"self_attn\.(q_proj|k_proj|q_norm|k_norm)\.(weight|bias)$")
# What is stored in FP8: the layers' matrices, but not the routers (mlp.gate) and not the MTP layer's eh_proj.
_EIGHT_BITS = re.compile(r"\.(self_attn|mlp)\..*_proj(_with_mqa)?\.weight$")
SCALES = "_scale_inv"  # behind a matrix's name
_OLD_TABLES = "rotary_emb.inv_freq"  # some older Llama folders carry what follows from config.json
_FLOATS: tuple[str, ...] = ("F32", "BF16", "F16")


class Entry(NamedTuple):
    """One tensor on disk and the part of the decoder it is."""

    name: str
    view: Tensor  # shares memory with the decoder
    is_copy: bool = False  # on disk a second time; loading only compares it
    exact: bool = False  # kept in fp32 whatever the folder's precision
    halves: int = 0  # width of heads whose rotated pairs are (i, i + width/2) on disk


def entries(decoder: Decoder) -> Iterator[Entry]:
    """Every tensor of the folder, in the decoder's order; views into its parameters and biases."""
    config = decoder.config
    for name, tensor in decoder.state_dict().items():
        if name.endswith("mlp.experts.gate_up_proj"):
            width = config.moe_intermediate_size
            for e, expert in enumerate(tensor):
                stem = f"{name.removesuffix('gate_up_proj')}{e}."
                yield Entry(stem + "gate_proj.weight", expert[:width])
                yield Entry(stem + "up_proj.weight", expert[width:])
        elif name.endswith("mlp.experts.down_proj"):
            for e, expert in enumerate(tensor):
                yield Entry(f"{name.removesuffix('down_proj')}{e}.down_proj.weight", expert)
        else:
            exact = name.endswith("e_score_correction_bias")
            halves = config.head_dim if HALVES.search(name) else 0
            yield Entry(name, tensor, exact=exact, halves=halves)
    if config.num_nextn_predict_layers:
        stem = f"model.layers.{config.num_hidden_layers}."
        embedding = decoder.model.embed_tokens.weight.detach()
        yield Entry(stem + "embed_tokens.weight", embedding, is_copy=True)
        yield Entry(stem + "shared_head.head.weight", decoder.head_weight.detach(), is_copy=True)


# -------------------------------------------------------------------------- saving


def save_model(
    decoder: Decoder,
    folder: str | Path,
    tokenizer: str | Path | Tokenizer | None = None,
    *,
    dtype: Precision = "float32",
) -> Path:
    """Writes ``folder`` whole or not at all and returns it.

    ``tokenizer``: the folder whose tokenizer files are copied, and what it says of how answers end and are sampled; or one
    of ours to be written. The same decoder always gives the same bytes.
    """
    folder, config = Path(folder), decoder.config
    values = to_hf(config, "float32" if dtype == "float32" else "bfloat16")
    if dtype == "float8":
        whole = [
            entry.name.removesuffix(".weight")
            for entry in entries(decoder)
            if _EIGHT_BITS.search(entry.name) and not _in_eight_bits(entry)
        ]
        if whole:
            log.warning("%d matrices do not divide into blocks and stay bfloat16", len(whole))
        values["quantization_config"] = FP8 | ({"modules_to_not_convert": whole} if whole else {})
    source = Path(tokenizer) if isinstance(tokenizer, str | Path) else None
    said = generation(config, source)
    copied: dict[str, bytes] = {}
    if source is not None:
        check_tokenizer(source, config.vocab_size)
        copied = tokenizer_files(source)
    with atomic_folder(folder) as new:
        (new / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        (new / GENERATION).write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
        _write_tensors(decoder, new, dtype)
        for name, content in copied.items():
            (new / name).write_bytes(content)
        if isinstance(tokenizer, Tokenizer):
            tokenizer.save(new)
    return folder


def tokenizer_files(folder: Path) -> dict[str, bytes]:
    """The files of a model folder that go with its tokenizer, by name. Error: ModelError."""
    found = {}
    for name in TOKENIZER_FILES:
        with contextlib.suppress(FileNotFoundError):
            try:
                found[name] = read_inside(folder / name)
            except UnreadableError as error:
                raise ModelError(
                    f"{folder / name} is not copied: {error}; put the file itself there"
                ) from None
    return found


def generation(config: ModelConfig, folder: Path | None) -> dict[str, Any]:
    """What generation_config.json says in ``folder``; without one the special tokens and all ends of its config.json.

    Error: ModelError where it is damaged.
    """
    if folder is not None and (said := read_object(folder / GENERATION)):
        return said
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    said = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    ends = ends_of(folder) if folder is not None else ()
    return said | ({"eos_token_id": list(ends)} if len(ends) > 1 else {})


def _in_eight_bits(entry: Entry) -> bool:
    """Whether a matrix is stored in FP8. Transformers infers the blocks from the number of scales, so each side must be
    a multiple of the block, or within one."""
    sides = entry.view.shape
    return bool(_EIGHT_BITS.search(entry.name)) and all(
        side < fp8.BLOCK or side % fp8.BLOCK == 0 for side in sides
    )


def _stored(entry: Entry, dtype: Precision) -> dict[str, Tensor]:
    """An entry as it is written: one tensor, or a matrix in FP8 and its scales."""
    tensor = entry.view.detach()
    tensor = half_split(tensor, entry.halves) if entry.halves else tensor
    if dtype == "float8" and _in_eight_bits(entry):
        q, scale = fp8.quantise(tensor.cpu())
        return {entry.name: q, entry.name + SCALES: scale}
    kept = torch.float32 if entry.exact or dtype == "float32" else torch.bfloat16
    # A copy each: safetensors refuses tensors that share memory.
    return {entry.name: tensor.to("cpu", kept, copy=True).contiguous()}


def _write_tensors(decoder: Decoder, folder: Path, dtype: Precision) -> None:
    """The trunk in one file, or in several with an index; the multi-token layer beside it in a file of its own.

    Transformers knows no such layer: in a file that it reads, each of the tensors would be a complaint.
    """
    multitoken = f"model.layers.{decoder.config.num_hidden_layers}."
    files: list[list[Entry]] = [[]]
    apart: list[Entry] = []
    room, bytes_each = SHARD_BYTES, 4 if dtype == "float32" else 2
    for entry in entries(decoder):
        if entry.name.startswith(multitoken):
            apart.append(entry)
            continue
        size = entry.view.numel() * bytes_each
        if size > room and files[-1]:
            files.append([])
            room = SHARD_BYTES
        files[-1].append(entry)
        room -= size
    total, where = 0, dict[str, str]()
    for number, part in enumerate(files, 1):
        file = SINGLE if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        names, size = _write(part, folder / file, dtype)
        total += size
        where |= dict.fromkeys(names, file)
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    if apart:
        _write(apart, folder / MULTITOKEN, dtype)


def _write(part: list[Entry], file: Path, dtype: Precision) -> tuple[list[str], int]:
    """One file; the names and the bytes of its tensors."""
    tensors: dict[str, Tensor] = {}
    for entry in part:
        tensors |= _stored(entry, dtype)
    save_file(tensors, file, metadata={"format": "pt"})
    # The library keeps what it writes from everyone else, as nothing else here is.
    file.chmod(file.with_name("config.json").stat().st_mode)
    return list(tensors), sum(tensor.nbytes for tensor in tensors.values())


# -------------------------------------------------------------------------- loading


def load_model(folder: str | Path, compute_dtype: torch.dtype = torch.float32) -> Decoder:
    """The decoder of a finished model folder, fp32 parameters; beside it a small part of the files is in memory.

    ``ModelError`` names what does not fit, before anything is allocated: an unsupported configuration, a missing, extra
    or wrong-shaped tensor, a damaged file, a tokenizer of another size, or weights that are only there as pickle.
    A multi-token-prediction layer that config.json names and the files lack is left out, and the log says so.
    """
    folder = Path(folder)
    config, stored = check_model(folder)
    if (
        config.num_nextn_predict_layers
        < read_config(folder / "config.json").num_nextn_predict_layers
    ):
        log.warning(
            "%s has no multi-token-prediction layer, though its config.json names one: opened without",
            folder,
        )
    decoder = Decoder(config, seed=None, compute_dtype=compute_dtype)
    expected = _expected(decoder)
    scales = {
        name: tensor.clone()
        for name, tensor in shards.read(stored, [n for n in stored if n.endswith(SCALES)])
    }
    copies = [name for name in stored if name in expected and expected[name].is_copy]
    first = [name for name in stored if name in expected and not expected[name].is_copy]
    for name, tensor in shards.read(stored, first + copies):
        entry = expected[name]
        if name + SCALES in scales:
            tensor = fp8.dequantise(tensor, scales[name + SCALES])
        if entry.halves:
            tensor = interleaved(tensor, entry.halves)
        if not entry.is_copy:
            entry.view.copy_(tensor)
        elif not torch.equal(entry.view, tensor.to(entry.view.dtype)):
            raise ModelError(f"{folder}: {name} differs from the trunk's; it must be a copy")
    return decoder


def check_model(folder: Path) -> tuple[ModelConfig, dict[str, Stored]]:
    """The shape and the headers of a folder whose every tensor fits; nothing is allocated. Error: ModelError."""
    config = read_shape(folder)
    if (folder / "tokenizer.json").exists():
        check_tokenizer(folder, config.vocab_size)
    stored = shards.headers(folder)
    for name in _experts(config):  # first, for config.json may name billions
        if name not in stored:
            raise _missing([name], folder)
    with torch.device("meta"):
        _check(_expected(Decoder(config, seed=None)), stored, folder)
    return config, stored


def read_shape(folder: Path) -> ModelConfig:
    """What config.json says, without a multi-token-prediction layer of which no tensor is there."""
    config, stored = read_config(folder / "config.json"), shards.headers(folder)
    own = f"model.layers.{config.num_hidden_layers}."
    if not config.num_nextn_predict_layers or any(name.startswith(own) for name in stored):
        return config
    return dataclasses.replace(config, num_nextn_predict_layers=0)


def _experts(config: ModelConfig) -> Iterator[str]:
    return (
        f"model.layers.{layer}.mlp.experts.{e}.{part}_proj.weight"
        for layer in config.expert_layers
        for e in range(config.n_routed_experts)
        for part in ("gate", "up", "down")
    )


def _missing(names: list[str], folder: Path) -> ModelError:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return ModelError(f"{folder}: tensor {names[0]}{more} missing; copy the model folder again")


def _expected(decoder: Decoder) -> dict[str, Entry]:
    """The entries by name, those that may be there among them."""
    found = {entry.name: entry for entry in entries(decoder)}
    if decoder.lm_head is None:
        head = decoder.head_weight.detach()
        found["lm_head.weight"] = Entry("lm_head.weight", head, is_copy=True)
    return found


def _check(expected: dict[str, Entry], stored: dict[str, Stored], folder: Path) -> None:
    """Error: ModelError that names the first tensor which is missing, too much, or of another shape or kind."""
    for name, there in stored.items():
        path = there.path
        matrix = name.removesuffix(SCALES)
        if name.endswith(SCALES) and stored.get(matrix, there).kind == "F8_E4M3":
            wanted = tuple(fp8.blocks(side) for side in stored[matrix].shape)
            kinds, kind = _FLOATS, "16 or 32-bit floats"
        elif name in expected:
            wanted = tuple(expected[name].view.shape)
            eight = name + SCALES in stored and len(wanted) == 2
            kinds = ("F8_E4M3",) if eight else _FLOATS
            kind = "16 or 32-bit floats, or FP8 with scales"
        elif name.endswith(_OLD_TABLES) or 0 in there.shape:
            continue  # for want of shared experts transformers keeps matrices without rows
        else:
            raise ModelError(f"{path}: tensor {name} does not belong to this config.json")
        if there.shape != wanted:
            raise ModelError(
                f"{path}: tensor {name} is {list(there.shape)}, but config.json makes it {list(wanted)}"
            )
        if there.kind not in kinds:
            raise ModelError(f"{path}: tensor {name} is {there.kind}; expected {kind}")
    missing = [name for name, e in expected.items() if not e.is_copy and name not in stored]
    if missing == ["lm_head.weight"]:
        raise ModelError(
            f"{folder} has no lm_head.weight, and its config.json does not say that the head is the embedding (transformers "
            "would begin with a random head); if it is, set tie_word_embeddings to true there"
        )
    if missing:
        raise _missing(missing, folder)


def check_tokenizer(folder: Path, vocab_size: int) -> None:
    """``ModelError`` where tokenizer.json in ``folder`` has tokens beyond embeddings of ``vocab_size`` rows.

    Rows beyond the tokens are padding: DeepSeek-V3 has 465 of them, DeepSeek-V2 2,385.
    """
    path = folder / "tokenizer.json"
    try:
        values = json.loads(read_inside(path))
        ids = list(values["model"]["vocab"].values())
        ids += [token["id"] for token in values.get("added_tokens", [])]
        size = max(ids) + 1
    except FileNotFoundError:
        raise ModelError(f"{path} is missing") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(
            pointer(path) or f"{path} is no tokenizer ({error}); copy the model folder again"
        ) from None
    if size > vocab_size:
        raise ModelError(
            f"{path} has {size} tokens, but the model's embeddings only {vocab_size} rows: "
            "tokenizer and model are of different runs"
        )
