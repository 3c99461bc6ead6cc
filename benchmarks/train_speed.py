"""Training speed: a whole step (forward, backward, AdamW) against transformers' DeepseekV3ForCausalLM, side by side.

    python benchmarks/train_speed.py             as the machine is
    python benchmarks/train_speed.py --avx2      both restricted to AVX2

Same shapes, same random tokens, untied head, no multi-token prediction, one sequence a document. The peer is tried in
each of its dtypes, expert implementations and thread counts; the fastest of each dtype then runs alternately with
ours, and the medians make the ratio. Prints a table with its conditions, then one JSON line.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

# A thread that waits must sleep, not spin: with any other process about, spinning costs a time slice a GEMM.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if "--avx2" in sys.argv and "ONEDNN_MAX_CPU_ISA" not in os.environ:
    os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX2"
    os.environ["SHENHONG_KERNEL_FLAGS"] = "-O3 -mavx2 -mfma"
    os.execv(sys.executable, [sys.executable, *sys.argv])

import torch
import transformers

from shenhong import numerics
from shenhong.model.config import ModelConfig
from shenhong.model.decoder import Decoder
from shenhong.numerics import ops
from shenhong.train.optimizer import Optimizer

ROWS, LENGTH = 64, 128
SHAPE = {
    "vocab_size": 6000,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "q_lora_rank": None,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 48,
    "qk_rope_head_dim": 16,
    "v_head_dim": 64,
    "moe_intermediate_size": 192,
    "n_routed_experts": 16,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
EXPERTS = ("eager", "grouped_mm", "batched_mm")
LEARNING_RATE = 1e-4


class Contestant(NamedTuple):
    who: str
    dtype: str
    experts: str
    step: Callable[[], None]


def batch() -> torch.Tensor:
    return torch.randint(1, 6000, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))


def ours(dtype: str) -> Contestant:
    config = ModelConfig(**SHAPE)
    model = Decoder(config, seed=0, compute_dtype=DTYPES[dtype])
    optimizer = Optimizer(
        dict(model.named_parameters()),
        config,
        muon=False,
        momentum=0.95,
        betas=(0.9, 0.95),
        weight_decay=0.1,
        compute=DTYPES[dtype],
    )
    tokens = batch()
    targets = tokens.roll(-1, 1).flatten()
    weights = torch.ones(ROWS, LENGTH)
    weights[:, -1] = 0
    weights = weights.flatten() / weights.sum()

    def step() -> None:
        docs = ops.documents(tokens, 0)
        states_ND = model(tokens.flatten(), docs).states_ND
        head_VD = model.head_weight.to(states_ND.dtype)
        loss, _ = ops.cross_entropy(states_ND, head_VD, targets, weights)
        loss.backward()
        optimizer.step(LEARNING_RATE, LEARNING_RATE)
        for parameter in model.parameters():
            parameter.grad = None

    return Contestant("shenhong", dtype, "fused", step)


def peer(dtype: str, experts: str) -> Contestant:
    config = transformers.DeepseekV3Config(
        **SHAPE, num_key_value_heads=4, use_cache=False, tie_word_embeddings=False
    )
    config._experts_implementation = experts
    model = transformers.DeepseekV3ForCausalLM._from_config(config, dtype=DTYPES[dtype])
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    tokens = batch()

    def step() -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return Contestant("transformers", dtype, experts, step)


def free_gigabytes() -> float:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9


def gathered_gigabytes(dtype: str) -> float:
    """What batched_mm keeps for backward: a copy of an expert's weights for every assignment of every layer."""
    assignments = ROWS * LENGTH * 2 * 5
    return assignments * 3 * 192 * 256 * DTYPES[dtype].itemsize / 1e9


def seconds(contestant: Contestant, threads: int) -> float:
    torch.set_num_threads(threads)
    begin = time.perf_counter()
    contestant.step()
    return time.perf_counter() - begin


def best_threads(contestant: Contestant, threads: list[int]) -> tuple[float, int]:
    """(seconds, threads) of the faster count; one warm-up step first, so nothing is compiled inside a measurement."""
    timed = []
    for count in threads:
        seconds(contestant, count)
        timed.append((min(seconds(contestant, count) for _ in range(2)), count))
    return min(timed)


def conditions() -> dict[str, object]:
    with open("/proc/cpuinfo") as info:
        model = next((x.split(":")[1].strip() for x in info if x.startswith("model name")), "?")
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "isa": os.environ.get("ONEDNN_MAX_CPU_ISA", torch.backends.cpu.get_cpu_capability()),
        "amx": torch.cpu._is_amx_tile_supported()
        if hasattr(torch.cpu, "_is_amx_tile_supported")
        else None,
        "kernels": numerics.kernels_in_use(),
        "batch": f"{ROWS} x {LENGTH}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "load": [round(x, 2) for x in os.getloadavg()],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--avx2", action="store_true", help="restrict both to AVX2")
    parser.add_argument("--repeats", type=int, default=5, help="alternating rounds of the final")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES)
    arguments = parser.parse_args()
    # oneDNN has no fast bf16 product for AVX2: minutes a step, for both.
    dtypes = arguments.dtypes or (["fp32"] if arguments.avx2 else list(DTYPES))
    transformers.logging.set_verbosity_error()
    facts = conditions()
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    print(f"{'':14}{'dtype':6}{'experts':12}{'threads':>8}{'s/step':>9}{'tokens/s':>10}")

    def show(contestant: Contestant, took: float, threads: int, note: str = "") -> None:
        speed = ROWS * LENGTH / took
        row = f"{contestant.who:14}{contestant.dtype:6}{contestant.experts:12}{threads:8}"
        print(f"{row}{took:9.3f}{speed:10.0f}  {note}", flush=True)

    finalists: list[tuple[Contestant, int]] = []
    for dtype in dtypes:
        contestant = ours(dtype)
        took, threads = best_threads(contestant, arguments.threads)
        show(contestant, took, threads)
        finalists.append((contestant, threads))
        heat = []
        for experts in EXPERTS:
            if experts == "batched_mm" and gathered_gigabytes(dtype) > free_gigabytes() / 2:
                size = f"{gathered_gigabytes(dtype):.0f} GB of gathered weights"
                print(f"transformers  {dtype}  {experts}  skipped: needs {size}")
                continue
            try:
                contestant = peer(dtype, experts)
                took, threads = best_threads(contestant, arguments.threads)
            except (RuntimeError, NotImplementedError, MemoryError) as error:
                print(f"transformers {dtype} {experts}: fails ({str(error).splitlines()[0]})")
                continue
            show(contestant, took, threads)
            heat.append((took, threads, contestant))
            gc.collect()
        _, threads, contestant = min(heat, key=lambda entry: entry[0])
        finalists.append((contestant, threads))

    print(f"final: {arguments.repeats} alternating rounds, medians")
    times: list[list[float]] = [[] for _ in finalists]
    for _ in range(arguments.repeats + 1):  # the first round warms up
        for entry, (contestant, threads) in zip(times, finalists, strict=True):
            entry.append(seconds(contestant, threads))
    medians = [statistics.median(entry[1:]) for entry in times]
    speeds: dict[str, dict[str, float]] = {"shenhong": {}, "transformers": {}}
    for (contestant, threads), took in zip(finalists, medians, strict=True):
        show(contestant, took, threads)
        speeds[contestant.who][contestant.dtype] = ROWS * LENGTH / took
    mine, theirs = speeds["shenhong"], speeds["transformers"]
    ratios = {dtype: round(mine[dtype] / theirs[dtype], 2) for dtype in dtypes}
    ratios["best"] = round(max(mine.values()) / max(theirs.values()), 2)
    print("shenhong / transformers: " + ", ".join(f"{k} {v}x" for k, v in ratios.items()))
    facts["load_after"] = [round(x, 2) for x in os.getloadavg()]
    result = {"ratio": ratios, "tokens_per_second": speeds, "conditions": facts}
    print(json.dumps({"benchmark": "train_speed", **result}))


if __name__ == "__main__":
    main()
