"""Small tokenizers of the kinds that come with models, and folders of a random model with one."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import (
    AddedToken,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from tokenizers import Tokenizer as Backend
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEXTS = (
    "the quick brown fox jumps over the lazy dog, again and again [INST] hello world",
    '{"name": "value", "odd": true, "x": [1, 2]} yes no user assistant system',
    "schön größer 床前明月光，疑是地上霜。",
)
SPECIAL = ("<unk>", "<s>", "</s>")


def pieces(prefix: str = "never", *more: AddedToken) -> Backend:
    """As SentencePiece's models are converted. `prefix`: what writes "▁" before a text, Prepend or a scheme of Metaspace."""
    learnt = Backend(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=200, initial_alphabet=["▁"], show_progress=False)
    learnt.train_from_iterator([w for t in TEXTS * 20 for w in t.split(" ")], trainer)
    model = json.loads(learnt.to_str())["model"]
    symbols = [f"<0x{byte:02X}>" for byte in range(256)]
    words = sorted(model["vocab"], key=model["vocab"].get)
    ids = {word: id for id, word in enumerate([*SPECIAL, *symbols, *words])}
    merges = [tuple(merge) for merge in model["merges"]]
    backend = Backend(models.BPE(ids, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    if prefix == "Prepend":
        steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        backend.normalizer = normalizers.Sequence(steps)
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prefix, split=False)
    strip = [] if prefix == "never" else [decoders.Strip(" ", 1, 0)]
    back = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*back, *strip])
    return _completed(backend, *more)


def byte_level(prefix: bool = False, *more: AddedToken) -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TEXTS * 20, trainer)
    return _completed(backend, *more)


def _completed(backend: Backend, *more: AddedToken) -> Backend:
    backend.add_special_tokens([AddedToken(name, normalized=False) for name in SPECIAL])
    backend.add_tokens(list(more))
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    return backend


KINDS = {
    "Prepend": lambda *more: pieces("Prepend", *more),
    "Metaspace first": lambda *more: pieces("first", *more),
    "Metaspace always": lambda *more: pieces("always", *more),
    "Metaspace never": lambda *more: pieces("never", *more),
    "ByteLevel": lambda *more: byte_level(False, *more),
    "ByteLevel with a space": lambda *more: byte_level(True, *more),
}


def theirs(backend: Backend, template: str | None = None) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", chat_template=template
    )


def folder(path: Path, backend: Backend, template: str | None = None) -> Path:
    """A random model of two layers with this tokenizer, as transformers saves it."""
    theirs(backend, template).save_pretrained(path)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(path)
    return path
