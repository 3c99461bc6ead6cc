"""Tiny models of random weights as transformers saves those of SmolLM2, Qwen2 and Qwen3: folder, tokenizer, template."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import torch
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXT = "The quick brown fox's 1987 dogs, naïve Café: 长城万里 Привет!\n\tx = 1 🙂"
ENDS = [2, 0]
SAMPLING = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95}
# Heads of queries, heads of keys, width of one, and of the model.
FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM, (9, 3, 8, 72), "smollm"),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, (8, 2, 8, 64), "qwen2"),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, (32, 8, 8, 64), "qwen2"),
}
_QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@cache
def backend(splits: str) -> Backend:
    """Byte-level BPE of some 380 tokens with the published splits."""
    made = Backend(models.BPE())
    if splits == "smollm":
        parts = [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    else:
        made.normalizer = normalizers.NFC()
        parts = [
            pre_tokenizers.Split(Regex(_QWEN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
        ]
    made.pre_tokenizer = pre_tokenizers.Sequence(parts)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=380,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([TEXT] * 40, trainer)
    return made


def family(kind: str, folder: Path, **changes):
    """The model, saved whole in ``folder``."""
    configuration, model, (heads, shared, width, hidden), splits = FAMILIES[kind]
    config = configuration(
        **{
            "vocab_size": 400,
            "hidden_size": hidden,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": heads,
            "num_key_value_heads": shared,
            "max_position_embeddings": 128,
            "tie_word_embeddings": kind == "llama",
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 2,
            "attn_implementation": "eager",
            **({} if kind == "qwen2" else {"head_dim": width}),
            **changes,
        }
    )
    torch.manual_seed(len(kind))
    made = model(config).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            mean = 1.0 if name.endswith("norm.weight") else 0.0
            parameter.normal_(mean, 0.2 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5)
        made.model.embed_tokens.weight.mul_(8)
    made.generation_config = GenerationConfig(
        bos_token_id=1, eos_token_id=ENDS, pad_token_id=2, **SAMPLING
    )
    made.save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend(splits),
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template=CHATML,
    )
    tokenizer.save_pretrained(folder)
    return made


def generation(folder: Path) -> dict:
    said = json.loads((folder / "generation_config.json").read_text())
    return {name: value for name, value in said.items() if name != "transformers_version"}
