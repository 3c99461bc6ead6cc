"""A finished model as a Hugging Face folder, and back.

    config.json  generation_config.json  model.safetensors (or shards with an index)
    tokenizer.json  tokenizer_config.json  chat_template.jinja  (copied)

On disk every expert has its own three matrices, as in DeepSeek's own files, and the MTP layer (number
num_hidden_layers) carries copies of the embedding and the head, which engines load it with. Nothing here unpickles
or runs what it reads.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from shenhong.errors import ModelError
from shenhong.model import Decoder
from shenhong.model.hf_config import Precision, read_config, to_hf
from shenhong.model.rope import half_split, interleaved
from shenhong.run import atomic_folder

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
SHARD_BYTES = 4_000_000_000
# Embeddings may be padded past the tokenizer (DeepSeek-V3 pads by 465), but not by this much.
PADDING = 512
# What grouped-query attention rotates; in latent attention the pairs are neighbours on disk too.
_HALVES = re.compile(r"self_attn\.(q_proj|k_proj|q_norm|k_norm)\.(weight|bias)$")


class Entry(NamedTuple):
    """One tensor on disk and the part of the decoder it is."""

    name: str
    view: Tensor  # shares memory with the decoder
    is_copy: bool = False  # on disk a second time; loading only compares it
    exact: bool = False  # kept in fp32 whatever the folder's precision
    halves: int = 0  # width of heads whose rotated pairs are (i, i + width/2) on disk and neighbours here


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
            halves = config.head_dim if _HALVES.search(name) else 0
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
    tokenizer: str | Path | None = None,
    *,
    dtype: Precision = "float32",
    generation: dict[str, Any] | None = None,
) -> Path:
    """Writes ``folder`` whole or not at all and returns it.

    ``tokenizer``: the folder whose tokenizer files are copied. ``generation``: further fields of
    generation_config.json (temperature, ...). The same decoder always gives the same bytes.
    """
    folder, config = Path(folder), decoder.config
    text = json.dumps(to_hf(config, dtype), indent=2)
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    said = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    said |= generation or {}
    copied: list[Path] = []
    if tokenizer is not None:
        check_tokenizer(Path(tokenizer), config.vocab_size)
        copied = [Path(tokenizer) / name for name in TOKENIZER_FILES]
    with atomic_folder(folder) as new:
        (new / "config.json").write_text(text + "\n", encoding="utf-8")
        (new / "generation_config.json").write_text(
            json.dumps(said, indent=2) + "\n", encoding="utf-8"
        )
        _write_tensors(decoder, new, getattr(torch, dtype))
        for path in copied:
            if path.exists():
                shutil.copyfile(path, new / path.name)
    return folder


def _write_tensors(decoder: Decoder, folder: Path, dtype: torch.dtype) -> None:
    shards: list[list[Entry]] = [[]]
    room = SHARD_BYTES
    for entry in entries(decoder):
        size = entry.view.numel() * dtype.itemsize
        if size > room and shards[-1]:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(entry)
        room -= size
    total, where = 0, {}
    for number, shard in enumerate(shards, 1):
        file = (
            SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        )
        tensors = {}
        for entry in shard:
            kept = torch.float32 if entry.exact else dtype
            # A copy each: safetensors refuses tensors that share memory.
            tensor = entry.view.detach().to("cpu", kept, copy=True)
            tensor = half_split(tensor, entry.halves) if entry.halves else tensor
            tensors[entry.name] = tensor.contiguous()
            total += tensors[entry.name].nbytes
            where[entry.name] = file
        save_file(tensors, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


# -------------------------------------------------------------------------- loading


def load_model(folder: str | Path, compute_dtype: torch.dtype = torch.float32) -> Decoder:
    """The decoder of a finished model folder, fp32 parameters.

    ``ModelError`` names what does not fit: an unsupported configuration, a missing, extra or wrong-shaped tensor, a
    damaged file, a tokenizer of another size, or weights that are only there as pickle.
    """
    folder = Path(folder)
    config = read_config(folder / "config.json")
    if (folder / "tokenizer.json").exists():
        check_tokenizer(folder, config.vocab_size)
    files = _tensor_files(folder)
    decoder = Decoder(config, compute_dtype=compute_dtype)
    wanted = {entry.name: entry for entry in entries(decoder)}
    copies: list[tuple[Entry, Tensor]] = []
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    entry = wanted.pop(name, None)
                    if entry is None:
                        raise ModelError(
                            f"{path}: tensor {name} does not belong to this config.json"
                        )
                    tensor = _checked(file.get_tensor(name), entry, path)
                    if entry.halves:
                        tensor = interleaved(tensor, entry.halves)
                    if entry.is_copy:
                        copies.append((entry, tensor))
                    else:
                        entry.view.detach().copy_(tensor)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path} is damaged ({error}); copy the model folder again") from None
    if wanted:
        name = next(iter(wanted))
        more = f" and {len(wanted) - 1} more" if len(wanted) > 1 else ""
        raise ModelError(f"{folder}: tensor {name}{more} missing; copy the model folder again")
    for entry, tensor in copies:
        if not torch.equal(entry.view, tensor.to(entry.view.dtype)):
            raise ModelError(f"{folder}: {entry.name} differs from the trunk's; it must be a copy")
    return decoder


def _checked(tensor: Tensor, entry: Entry, path: Path) -> Tensor:
    if tensor.shape != entry.view.shape:
        found, wanted = list(tensor.shape), list(entry.view.shape)
        raise ModelError(
            f"{path}: tensor {entry.name} is {found}, but config.json makes it {wanted}"
        )
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ModelError(
            f"{path}: tensor {entry.name} is {tensor.dtype}; expected 16 or 32-bit floats"
        )
    return tensor


def _tensor_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: the one, or those its index names."""
    if (folder / SINGLE).exists():
        return [folder / SINGLE]
    if not (folder / INDEX).exists():
        pickles = [
            p.name for kind in ("bin", "pt", "pth", "ckpt") for p in folder.glob(f"*.{kind}")
        ]
        if pickles:
            raise ModelError(
                f"{folder / pickles[0]} is a pickle, which can run code and is never opened; "
                "convert it to safetensors"
            )
        raise ModelError(f"{folder} has no {SINGLE}; give a finished model folder")
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        names = sorted(set(index["weight_map"].values()))
        safe = all(Path(name).name == name for name in names)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{folder / INDEX} is damaged ({error}); copy the folder again") from None
    if not safe:
        raise ModelError(f"{folder / INDEX} names files outside its folder")
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise ModelError(f"{folder / missing[0]} is missing; copy the model folder again")
    return [folder / name for name in names]


def check_tokenizer(folder: Path, vocab_size: int) -> None:
    """``ModelError`` where tokenizer.json in ``folder`` does not go with embeddings of ``vocab_size`` rows."""
    path = folder / "tokenizer.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        ids = list(values["model"]["vocab"].values())
        ids += [token["id"] for token in values.get("added_tokens", [])]
        size = max(ids) + 1
    except FileNotFoundError:
        raise ModelError(f"{path} is missing") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path} is no tokenizer ({error}); copy the model folder again") from None
    if not size <= vocab_size < size + PADDING:
        raise ModelError(
            f"{path} has {size} tokens, but the model's embeddings have {vocab_size}: "
            "tokenizer and model are of different runs"
        )
