"""What each technique of the poet is worth: one arm without it, at equal tokens and at equal wall-clock.

    shenhong train recipes/poet.toml --run runs/poet --until tokens
    python benchmarks/ablation.py --run runs/poet --seconds 120

Every arm first tries the same learning rates (one seed, half the length), then trains with its best one
on several seeds, once for as many tokens as the reference and once for as many seconds. Prints a table,
then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "20000")


from common import Bench, Curve, step_seconds, train_arm, usual_machine
from shenhong.model import ModelConfig
from shenhong.model.counts import forward_flops, parameters

RATES = (0.5, 1.0, 2.0)  # of the recipe's matrix rate


def dense_width(bench: Bench, reference: ModelConfig) -> int:
    """Width of a dense MLP in every layer that gives the reference's FLOPs a token."""
    context = bench.rows.mean_context()
    wanted = forward_flops(reference, context, True)

    def flops(width: int) -> float:
        return forward_flops(dense(bench, width), context, True)

    width = min(range(64, 4096, 16), key=lambda w: abs(flops(w) - wanted))
    assert abs(flops(width) / wanted - 1) < 0.02
    return width


def dense(bench: Bench, width: int) -> ModelConfig:
    layers = bench.recipe.model.num_hidden_layers + 1  # the draft layer is dense too
    return bench.config(bench.recipe, first_k_dense_replace=layers, intermediate_size=width)


def arms(bench: Bench) -> dict[str, tuple[ModelConfig, dict[str, Any]]]:
    """Each arm's model and its changes to the training settings."""
    recipe = bench.recipe
    full = bench.config(recipe)
    return {
        "V3 block (reference)": (full, {}),
        "dense, equal FLOPs": (dense(bench, dense_width(bench, full)), {}),
        "no bias balancing": (full, {"balance": "none"}),
        "no multi-token prediction": (bench.config(recipe, num_nextn_predict_layers=0), {}),
        "AdamW": (full, {"optimizer": "adamw"}),
        "multi-head attention": (bench.config(recipe, attention="mha", q_lora_rank=None), {}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True, help="a run prepared up to its tokens")
    parser.add_argument(
        "--seconds", type=float, default=120, help="training time of one run of the reference"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--only", nargs="*", help="names of arms to run (the reference always runs)"
    )
    options = parser.parse_args()
    bench = Bench.open(options.run)
    dtype = usual_machine()
    base = bench.recipe.train
    all_arms = arms(bench)
    if options.only:
        all_arms = {
            n: a for i, (n, a) in enumerate(all_arms.items()) if i == 0 or n in options.only
        }
    results: dict[str, dict[str, Any]] = {}
    reference_steps = 0
    for name, (config, changes) in all_arms.items():
        settings = base.model_copy(update=changes)
        pace = step_seconds(bench, config, settings, dtype)
        fits = max(10, round(options.seconds / pace))
        reference_steps = reference_steps or fits
        # AdamW on matrices wants smaller rates than the orthogonal update: its sweep starts lower, is as wide.
        centre = settings.lr * (0.1 if settings.optimizer == "adamw" else 1.0)
        sweep = {}
        for factor in RATES:
            trial = settings.model_copy(update={"lr": centre * factor})
            sweep[centre * factor] = train_arm(bench, config, trial, dtype, 1000, fits // 2).final
        best = min(sweep, key=lambda rate: sweep[rate])
        chosen = settings.model_copy(update={"lr": best})
        runs: dict[str, list[Curve]] = {"tokens": [], "seconds": []}
        for seed in range(options.seeds):
            by_time = train_arm(bench, config, chosen, dtype, seed, fits)
            same = fits == reference_steps
            runs["seconds"].append(by_time)
            runs["tokens"].append(
                by_time if same else train_arm(bench, config, chosen, dtype, seed, reference_steps)
            )
        size = parameters(config)
        results[name] = {
            "parameters": size.total + size.multitoken,
            "active": size.active,
            "mflops_per_token": forward_flops(config, bench.rows.mean_context()) / 1e6,
            "tokens_per_second": base.batch_tokens / pace,
            "steps_by_time": fits,
            "lr": best,
            "sweep": sweep,
            **{key: [asdict(curve) for curve in curves] for key, curves in runs.items()},
        }
        print(
            f"{name}: lr {best:g}, sweep {', '.join(f'{r:g}: {v:.3f}' for r, v in sweep.items())}",
            file=sys.stderr,
            flush=True,
        )
    show(results, options.seconds, reference_steps * base.batch_tokens)
    print(json.dumps(results))


def show(results: dict[str, dict[str, Any]], seconds: float, tokens: int) -> None:
    def cell(curves: list[dict[str, Any]]) -> str:
        finals = [curve["nats"][-1] for curve in curves]
        spread = statistics.stdev(finals) if len(finals) > 1 else float("nan")
        return f"{statistics.mean(finals):.4f} ± {spread:.4f}"

    print(
        f"\nheld-out nats per character, mean ± standard deviation over {len(next(iter(results.values()))['tokens'])} seeds"
    )
    head = f"{'arm':28}{'params':>8}{'MFLOP/tok':>11}{'tok/s':>8}{'lr':>8}  {f'at {tokens:,} tokens':>20}  {f'at {seconds:g} s':>18}{'load max':>10}"
    print(head)
    for name, r in results.items():
        load = statistics.mean(curve["load_max"] for curve in r["tokens"])
        print(
            f"{name:28}{r['parameters'] / 1e6:7.1f}M{r['mflops_per_token']:11.2f}{r['tokens_per_second']:8,.0f}{r['lr']:8.3g}"
            f"  {cell(r['tokens']):>20}  {cell(r['seconds']):>18}{load:10.2f}"
        )


if __name__ == "__main__":
    main()
