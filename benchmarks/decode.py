"""Generation: tokens per second at batch 1 to 64 and time to the first token, against transformers' generate.

Both engines have the same weights and run in turns in this process, each at its best thread count and dtype; random
weights of the 17M shape unless --model names a finished model, for speed does not depend on what weights say. Texts
are greedy and of fixed length. With --model, llama.cpp takes part too where its Python binding is installed (16-bit
GGUF), and a multi-token-prediction layer has drafting calibrated.

    python benchmarks/decode.py [--model runs/poet] [--tokens 64] [--batches 1 4 16 64]

Prints a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "20000")

import torch
from transformers import AutoModelForCausalLM

from common import conditions
from shenhong.engine import Engine, EngineSettings, Sampling
from shenhong.export import load_model, save_gguf, save_model
from shenhong.model import Decoder, ModelConfig
from shenhong.model.counts import cache_numbers, parameters
from shenhong.models import folder_of
from shenhong.train import machine

GREEDY = Sampling(temperature=0)
PROMPT = 16  # tokens before the first of a timed text
FIRST = (128, 2048)  # prompt lengths of the time to the first token
DTYPES = (torch.float32, torch.bfloat16)

SMALL = ModelConfig(  # 17M parameters
    vocab_size=8192,
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=6,
    num_attention_heads=8,
    kv_lora_rank=64,
    qk_nope_head_dim=32,
    qk_rope_head_dim=32,
    v_head_dim=32,
    moe_intermediate_size=192,
    n_routed_experts=16,
    num_experts_per_tok=2,
    max_position_embeddings=4096,
)
V3 = ModelConfig(
    vocab_size=129280,
    hidden_size=7168,
    intermediate_size=18432,
    num_hidden_layers=61,
    num_attention_heads=128,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    moe_intermediate_size=2048,
    n_routed_experts=256,
    num_experts_per_tok=8,
    first_k_dense_replace=3,
)

Writer = Callable[[list[list[int]], int], Any]


def ours(decoder: Decoder, dtype: torch.dtype) -> Writer:
    """No prefix is shared, so that every prompt is computed."""
    engine = Engine(decoder, dtype=dtype, settings=EngineSettings(share_prefixes=False))
    return lambda prompts, tokens: engine.generate(prompts, tokens, sampling=GREEDY, stop=[])


def theirs(folder: Path, dtype: torch.dtype) -> Writer:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    model.generation_config.eos_token_id = None

    def write(prompts: list[list[int]], tokens: int) -> Any:
        rows = torch.tensor(prompts)
        return model.generate(
            rows,
            attention_mask=torch.ones_like(rows),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
        )

    return write


def llama_cpp(folder: Path, gguf: Path, streams: int, length: int, threads: int) -> Writer:
    from llama_cpp_engine import LlamaCpp

    if not gguf.exists():
        save_gguf(folder, gguf, 16, multitoken=False)
    return LlamaCpp(gguf, streams, length, threads)


def prompts_of(count: int, length: int, vocabulary: int, seed: int) -> list[list[int]]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(5, vocabulary, (count, length), generator=draw).tolist()


class Arm:
    """One engine at one dtype and thread count."""

    def __init__(self, name: str, dtype: torch.dtype, threads: int, write: Writer) -> None:
        self.name, self.dtype, self.threads, self.write = name, dtype, threads, write

    def seconds(self, prompts: list[list[int]], tokens: int) -> float:
        torch.set_num_threads(self.threads)
        begin = time.perf_counter()
        self.write(prompts, tokens)
        return time.perf_counter() - begin

    @property
    def label(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}, {self.threads} threads"


def best_of(arms: list[Arm], prompts: list[list[int]], tokens: int, rounds: int) -> dict[str, Any]:
    """Medians of interleaved runs; of each engine its best arm."""
    spent: dict[Arm, list[float]] = {arm: [] for arm in arms}
    for turn in range(rounds + 1):
        for arm in arms:
            taken = arm.seconds(prompts, tokens)
            if turn:  # the first warms up
                spent[arm].append(taken)
    found: dict[str, Any] = {}
    for arm, seconds in spent.items():
        median = statistics.median(seconds)
        if arm.name not in found or median < found[arm.name]["seconds"]:
            found[arm.name] = {"seconds": median, "how": arm.label}
    return found


def row(name: int, numbers: dict[str, float], better: Callable[[float, float], float]) -> str:
    """Each engine's number, and ours against each peer's."""
    mine = numbers["shenhong"]
    ratios = (better(mine, v) for k, v in numbers.items() if k != "shenhong")
    return (
        f"{name:12}"
        + "".join(f"{v:14,.1f}" for v in numbers.values())
        + "   "
        + ", ".join(f"{r:.1f}x" for r in ratios)
    )


def cache_bytes(config: ModelConfig) -> dict[str, Any]:
    """In bfloat16, all layers of the trunk."""
    cache, layers = cache_numbers(config), config.num_hidden_layers
    latent, heads = 2 * layers * cache.kept, 2 * layers * cache.mha
    return {"latent": latent, "multi_head": heads, "ratio": round(heads / latent, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", type=Path, help="a run or model folder instead of random weights"
    )
    parser.add_argument("--tokens", type=int, default=64, help="length of each timed text")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, machine.cores()}))
    options = parser.parse_args()
    folder = folder_of(options.model) if options.model else Path()
    decoder = load_model(folder) if options.model else Decoder(SMALL)
    config = decoder.config
    size = parameters(config)
    print(conditions(max(options.threads), torch.float32))
    print(
        f"{size.total / 1e6:.1f}M parameters, {size.active / 1e6:.1f}M active, "
        f"prompts of {PROMPT}, {options.tokens} tokens a text, best of threads {options.threads} and both dtypes\n"
    )
    result: dict[str, Any] = {"benchmark": "decode", "parameters": size.total, "rates": {}}
    with tempfile.TemporaryDirectory() as name:
        save_model(decoder, Path(name) / "model")
        arms = [
            Arm(engine, dtype, threads, write)
            for dtype in DTYPES
            for engine, write in (
                ("shenhong", ours(decoder, dtype)),
                ("transformers", theirs(Path(name) / "model", dtype)),
            )
            for threads in options.threads
        ]
        if options.model and importlib.util.find_spec("llama_cpp"):
            longest = PROMPT + options.tokens
            streams = max(options.batches)
            gguf = Path(name) / "model.gguf"
            arms += [
                Arm(
                    "llama.cpp",
                    torch.float16,
                    threads,
                    llama_cpp(folder, gguf, streams, longest, threads),
                )
                for threads in options.threads
            ]
        heads = "".join(f"{engine:>14}" for engine in dict.fromkeys(arm.name for arm in arms))
        print(f"{'batch':>12}{heads}   tokens/s, and ours over theirs")
        for batch in options.batches:
            prompts = prompts_of(batch, PROMPT, config.vocab_size, batch)
            found = best_of(arms, prompts, options.tokens, options.rounds)
            rates = {k: batch * options.tokens / v["seconds"] for k, v in found.items()}
            how = {k: v["how"] for k, v in found.items()}
            result["rates"][batch] = {k: round(v, 1) for k, v in rates.items()} | {"how": how}
            print(f"{row(batch, rates, lambda a, b: a / b)}   ({'; '.join(how.values())})")
        print(f"\n{'prompt':>12}{heads}   ms to the first token, and theirs over ours")
        result["first_token_ms"] = {}
        for length in FIRST:
            if length > config.max_position_embeddings:
                continue
            found = best_of(arms, prompts_of(1, length, config.vocab_size, 7), 1, options.rounds)
            spent = {k: 1000 * v["seconds"] for k, v in found.items()}
            result["first_token_ms"][length] = {k: round(v, 2) for k, v in spent.items()}
            print(row(length, spent, lambda a, b: b / a))
    print("\ncache bytes a token (bfloat16): latent, multi-head with the same heads, ratio")
    result["cache"] = {}
    for name, shape in (("this model", config), ("DeepSeek-V3", V3)):
        numbers = result["cache"][name] = cache_bytes(shape)
        print(
            f"{name:>12} {numbers['latent']:12,} {numbers['multi_head']:13,} {numbers['ratio']:6}"
        )
    if options.model and config.num_nextn_predict_layers:
        torch.set_num_threads(max(options.threads))
        prompt = prompts_of(1, PROMPT, config.vocab_size, 1)[0]
        report = Engine(decoder).calibrate(prompt)
        result["drafting"] = report._asdict()
        tries = ", ".join(f"{depth}: {speed:.2f}" for depth, speed in report.speedups.items())
        print(f"\ndrafting at batch 1, speed by depth over none: {tries}; chosen {report.depth}")
    print()
    print(json.dumps(result | {"conditions": conditions(max(options.threads), torch.float32)}))


if __name__ == "__main__":
    main()
