"""The GGUF file in llama.cpp beside the model here: greedy texts, tokens, and perplexity at each precision.

The model is exported in 32, 16, 8 and 4 bits, with its multi-token-prediction layer and without, and each file opened
by llama-cpp-python on one thread with a 32-bit cache. A text counts as equal when it is so to its end; where one is
not, the gap is that between our two best logits at the first token that differs. The texts are the corpus's held-out
ones. Tokens are compared on strings of twenty-two scripts, spaces and digits.

    python benchmarks/llama_cpp_parity.py runs/poet [--prompts 50] [--strings 5000]

Prints a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor

from shenhong.engine import Sampling
from shenhong.export import load_model, save_gguf
from shenhong.llm import LLM
from shenhong.model import Decoder
from shenhong.models import folder_of
from shenhong.numerics import documents
from shenhong.tokenizer import Tokenizer

CONTEXT = 256
# First and last code point of each; unassigned ones among them, which either side may meet.
SCRIPTS = """20-7e a1-24f 300-36f 370-3ff 400-4ff 590-5ff 600-6ff 900-97f e00-e7f 1100-11ff 1780-17ff 1e00-1fff
2000-206f 20a0-20cf 2100-2bff 3000-30ff 3400-4dbf 4e00-9fff ac00-d7a3 ff00-ffef 1f300-1faff 20000-2a6df"""
_RANGES = [[int(end, 16) for end in span.split("-")] for span in SCRIPTS.split()]
_SPACES = [" ", "  ", "\n", "\r\n", "\t", " \n\n ", "\u3000", "\u00a0"]
_MARKS = ["'s", "n't", "!?", "...", "——", "《》", "，。", "<｜User｜>", "<|x|>", "#foo", "(bar"]


def open_llama(path: str | Path, load_mtp: bool = False, **settings: Any) -> llama_cpp.Llama:
    """A GGUF file in llama.cpp. Its extra buffer types abort on any deepseek2 file where the CPU has AMX."""
    api = llama_cpp.llama_cpp
    plain = api.llama_model_default_params

    def parameters() -> Any:
        values = plain()
        values.use_extra_bufts = False
        values.load_mtp = load_mtp
        return values

    f32 = llama_cpp.GGML_TYPE_F32
    chosen = {"n_ctx": CONTEXT, "n_batch": CONTEXT, "n_threads": 1, "n_threads_batch": 1}
    chosen |= {"logits_all": True, "type_k": f32, "type_v": f32, "verbose": False}
    api.llama_model_default_params = parameters
    try:
        return llama_cpp.Llama(str(path), **(chosen | settings))
    finally:
        api.llama_model_default_params = plain


def their_logits(llama: llama_cpp.Llama, tokens: Sequence[int]) -> np.ndarray:
    """[T, V] of llama.cpp."""
    llama.reset()
    llama.eval(tokens)
    return np.array(llama.scores[: len(tokens)])


def their_greedy(
    llama: llama_cpp.Llama, prompt: Sequence[int], most: int, eos: int | None
) -> list[int]:
    """The likeliest token each time, until ``eos`` (left out) or ``most``."""
    llama.reset()
    llama.eval(prompt)
    answer: list[int] = []
    while len(answer) < most:
        token = int(llama.scores[llama.n_tokens - 1].argmax())
        if token == eos:
            break
        answer.append(token)
        llama.eval([token])
    return answer


@torch.no_grad()
def our_logits(decoder: Decoder, tokens: Sequence[int]) -> Tensor:
    """[T, V] of the decoder as it was trained."""
    tokens_T = torch.tensor(tokens)
    return decoder.logits(decoder(tokens_T, documents(tokens_T[None], -1)).states_ND)


def first_gaps(decoder: Decoder, prompts: Any, ours: Any, theirs: Any) -> list[float]:
    """For each pair of texts that differ, how far apart our two best logits are at the first difference."""
    gaps = []
    for prompt, our, their in zip(prompts, ours, theirs, strict=True):
        if our == their:
            continue
        same = next(
            (i for i, (a, b) in enumerate(zip(our, their, strict=False)) if a != b),
            min(len(our), len(their)),
        )
        best = our_logits(decoder, [*prompt, *our[:same]])[-1].topk(2).values
        gaps.append(float(best[0] - best[1]))
    return gaps


def perplexity(logits: Any, prompts: Any, answers: Any) -> float:
    """exp of the mean loss of the answers' tokens; ``logits`` gives [T, V] of a text."""
    total = count = 0.0
    for prompt, answer in zip(prompts, answers, strict=True):
        rows = torch.as_tensor(logits([*prompt, *answer])).double().log_softmax(-1)
        chosen = rows[len(prompt) - 1 : -1].gather(1, torch.tensor(answer)[:, None])
        total, count = total - float(chosen.sum()), count + len(answer)
    return math.exp(total / count)


def random_text(pick: random.Random) -> str:
    parts = []
    for _ in range(pick.randint(1, 12)):
        kind = pick.random()
        if kind < 0.15:
            parts.append(pick.choice(_SPACES))
        elif kind < 0.25:
            parts.append(str(pick.randint(0, 10 ** pick.randint(1, 9))))
        elif kind < 0.3:
            parts.append(pick.choice(_MARKS))
        else:
            first, last = pick.choice(_RANGES)
            parts += [chr(pick.randint(first, last)) for _ in range(pick.randint(1, 8))]
    return "".join(parts)


def tokenized_otherwise(path: str | Path, tokenizer: Tokenizer, strings: int) -> list[str]:
    """The random strings that llama.cpp cuts into other tokens than ``tokenizer``."""
    llama, pick = open_llama(path, vocab_only=True), random.Random(0)
    texts = [random_text(pick) for _ in range(strings)]
    ids, bounds = tokenizer.encode_many(texts)
    ours = [ids[a:b].tolist() for a, b in itertools.pairwise(bounds)]
    return [
        text
        for text, our in zip(texts, ours, strict=True)
        if our != llama.tokenize(text.encode(), add_bos=False, special=False)
    ]


def measure(run: Path, prompts: int = 50, strings: int = 5000) -> dict[str, Any]:
    """Prints the table of a finished run with its corpus, and returns its numbers."""
    folder = folder_of(run)
    llm, decoder = LLM(folder, torch.float32), load_model(folder)
    tokenizer = llm.tokenizer
    held_out = pq.read_table(run / "corpus" / "test.parquet").slice(0, prompts)
    asked = [tokenizer.encode_prompt(prompt) for prompt in held_out["prompt"].to_pylist()]
    texts = [[*tokenizer.encode(text), tokenizer.eos_id] for text in held_out["text"].to_pylist()]
    done = llm.engine.generate(asked, 100, sampling=Sampling(temperature=0), seed=0)
    ours = [[token for token in one.tokens if token != tokenizer.eos_id] for one in done]
    full = perplexity(lambda tokens: our_logits(decoder, tokens), asked, texts)
    print(
        f"{prompts} prompts; perplexity here {full:.4f}; llama-cpp-python {llama_cpp.__version__}"
    )
    print(
        f"{'file':>14} {'MB':>6} {'equal texts':>12} {'largest gap':>12} {'perplexity':>11} {'change':>8}"
    )
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for bits, multitoken in ((32, True), (16, True), (16, False), (8, True), (4, True)):
            written = save_gguf(folder, Path(scratch) / "model.gguf", bits, multitoken=multitoken)
            llama = open_llama(written.path)
            theirs = [their_greedy(llama, prompt, 100, tokenizer.eos_id) for prompt in asked]
            gaps = first_gaps(decoder, asked, ours, theirs)
            there = perplexity(lambda tokens, on=llama: their_logits(on, tokens), asked, texts)
            llama.close()
            row = {
                "file": f"{bits} bits" + ("" if multitoken else " no MTP"),
                "megabytes": round(written.nbytes / 1e6, 1),
                "equal": prompts - len(gaps),
                "largest_gap": round(max(gaps, default=0.0), 5),
                "perplexity": round(there, 4),
                "change_percent": round(100 * (there / full - 1), 3),
            }
            rows.append(row)
            print(
                f"{row['file']:>14} {row['megabytes']:>6} {row['equal']:>6} of {prompts:>2} "
                f"{row['largest_gap']:>12} {row['perplexity']:>11} {row['change_percent']:>7}%"
            )
        others = tokenized_otherwise(written.path, tokenizer, strings)
    print(f"{len(others)} of {strings} random strings are other tokens there")
    return {"perplexity": full, "files": rows, "other_tokens": len(others)}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("run", type=Path, help="a finished run with its corpus")
    options.add_argument("--prompts", type=int, default=50)
    options.add_argument("--strings", type=int, default=5000)
    chosen = options.parse_args()
    torch.set_num_threads(1)
    print(json.dumps(measure(chosen.run, chosen.prompts, chosen.strings)))


if __name__ == "__main__":
    main()
