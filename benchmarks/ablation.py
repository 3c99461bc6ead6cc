"""What each technique of the poet is worth: one arm without it, at equal tokens and at equal wall-clock.

    shenhong train recipes/poet.toml --run runs/poet --until tokens
    python benchmarks/ablation.py --run runs/poet --out ablation            # all of it, one after the other
    python benchmarks/ablation.py --run runs/poet --out ablation --paces-only   # on an idle machine, then
    taskset -c 0 python benchmarks/ablation.py --run runs/poet --out ablation --shard 0/2 &
    taskset -c 1 python benchmarks/ablation.py --run runs/poet --out ablation --shard 1/2

The pace of every arm is measured first, in alternating rounds on one thread; it says how many steps fit
into the time. Losses depend on steps, rate and seed only, so the trainings may then share the machine.
Every arm tries the same factors of its rate (one seed, half the length; one more where the best is at an
edge), then trains with the best on several seeds, for as many tokens as the reference and for as many
seconds. Each training is kept in --out as it ends, and not repeated. Prints a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "20000")

import torch

from common import Bench, Curve, step_seconds, train_arm, usual_machine
from shenhong.model import ModelConfig
from shenhong.model.counts import forward_flops, parameters
from shenhong.runs.files import atomic_write
from shenhong.train.settings import TrainSettings

FACTORS = (0.5, 1.0, 2.0)  # of the recipe's matrix rate
Arms = dict[str, tuple[ModelConfig, dict[str, Any]]]


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


def arms(bench: Bench) -> Arms:
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


def paces(bench: Bench, arms: Arms, base: TrainSettings, dtype: torch.dtype) -> dict[str, float]:
    """Seconds a step of each arm: the median of alternating rounds."""
    rounds = [
        {
            name: step_seconds(bench, config, base.model_copy(update=changes), dtype)
            for name, (config, changes) in arms.items()
        }
        for _ in range(3)
    ]
    return {name: statistics.median(r[name] for r in rounds) for name in arms}


def same_pace(pace: dict[str, float], a: str, b: str) -> bool:
    return abs(pace[a] / pace[b] - 1) < 0.03


class Trainings:
    """Trainings of one arm, each kept as a file."""

    def __init__(self, bench: Bench, out: Path, dtype: torch.dtype) -> None:
        self.bench, self.out, self.dtype = bench, out, dtype

    def curve(
        self, name: str, config: ModelConfig, settings: TrainSettings, seed: int, steps: int
    ) -> Curve:
        described = json.dumps([asdict(config), settings.model_dump(), steps], sort_keys=True)
        digest = hashlib.sha256(described.encode()).hexdigest()[:8]
        kept = self.out / f"{name.replace(' ', '-')}-{settings.lr:g}-{seed}-{steps}-{digest}.json"
        if kept.exists():
            return Curve(**json.loads(kept.read_text()))
        curve = train_arm(self.bench, config, settings, self.dtype, seed, steps)
        atomic_write(kept, json.dumps(asdict(curve)).encode())
        print(
            f"{name}: lr {settings.lr:g}, seed {seed}, {steps} steps: {curve.final:.4f}",
            file=sys.stderr,
            flush=True,
        )
        return curve

    def sweep(
        self, name: str, config: ModelConfig, settings: TrainSettings, centre: float, steps: int
    ) -> dict[float, float]:
        """Final loss by rate; goes one rate on where the best is at an edge."""
        found: dict[float, float] = {}

        def look(factor: float) -> None:
            trial = settings.model_copy(update={"lr": centre * factor})
            found[factor] = self.curve(name, config, trial, 1000, steps).final

        for factor in FACTORS:
            look(factor)
        best = min(found, key=lambda factor: found[factor])
        if best in (FACTORS[0], FACTORS[-1]):
            look(best * best)
        return {centre * factor: found[factor] for factor in sorted(found)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True, help="a run prepared up to its tokens")
    parser.add_argument("--out", type=Path, required=True, help="folder that keeps each training")
    parser.add_argument(
        "--seconds", type=float, default=120, help="training time of one run, on one core"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--paces-only", action="store_true", help="measure the paces and stop")
    parser.add_argument("--shard", default="0/1", help="I/N: only every N-th arm, from the I-th")
    options = parser.parse_args()
    bench = Bench.open(options.run)
    dtype = usual_machine(threads=1)
    base = bench.recipe.train
    all_arms = arms(bench)
    options.out.mkdir(parents=True, exist_ok=True)
    paces_file = options.out / "paces.json"
    if not paces_file.exists():
        atomic_write(paces_file, json.dumps(paces(bench, all_arms, base, dtype)).encode())
    pace = json.loads(paces_file.read_text())
    if options.paces_only:
        print(json.dumps(pace))
        return
    reference = next(iter(all_arms))
    # Paces closer than they can be measured count as equal, and one training serves both comparisons.
    fits = {
        name: round(options.seconds / pace[reference if same_pace(pace, name, reference) else name])
        for name in all_arms
    }
    reference_steps = fits[reference]
    shard, shards = map(int, options.shard.split("/"))
    trainings = Trainings(bench, options.out, dtype)
    results: dict[str, dict[str, Any]] = {}
    for number, (name, (config, changes)) in enumerate(all_arms.items()):
        if number % shards != shard:
            continue
        settings = base.model_copy(update=changes)
        # An AdamW update is some three times as large as Muon's at the same rate (Muon's has RMS 0.2 lr).
        centre = settings.lr * (0.3 if settings.optimizer == "adamw" else 1.0)
        sweep = trainings.sweep(name, config, settings, centre, reference_steps // 2)
        best = min(sweep, key=lambda rate: sweep[rate])
        chosen = settings.model_copy(update={"lr": best})
        size = parameters(config)
        results[name] = {
            "parameters": size.total + size.multitoken,
            "active": size.active,
            "mflops_per_token": forward_flops(config, bench.rows.mean_context()) / 1e6,
            "tokens_per_second": base.batch_tokens / pace[name],
            "lr": best,
            "at_edge": best in (min(sweep), max(sweep)),
            "sweep": sweep,
            **{
                key: [
                    asdict(trainings.curve(name, config, chosen, seed, steps))
                    for seed in range(options.seeds)
                ]
                for key, steps in (("tokens", reference_steps), ("seconds", fits[name]))
            },
        }
    show(results, options.seconds, reference_steps * base.batch_tokens)
    print(json.dumps(results))


def show(results: dict[str, dict[str, Any]], seconds: float, tokens: int) -> None:
    def cell(curves: list[dict[str, Any]]) -> str:
        finals = [curve["nats"][-1] for curve in curves]
        spread = statistics.stdev(finals) if len(finals) > 1 else float("nan")
        return f"{statistics.mean(finals):.4f} ± {spread:.4f}"

    seeds = len(next(iter(results.values()))["tokens"])
    print(
        f"\nheld-out nats per character, mean ± standard deviation over {seeds} seeds"
        " (* the best rate is at the edge of its sweep)"
    )
    print(
        f"{'arm':28}{'params':>8}{'MFLOP/tok':>11}{'tok/s':>8}{'lr':>9}"
        f"  {f'at {tokens:,} tokens':>20}  {f'at {seconds:g} s':>18}{'load max':>10}"
    )
    for name, r in results.items():
        load = statistics.mean(curve["load_max"] for curve in r["tokens"])
        rate = f"{r['lr']:.3g}{'*' if r['at_edge'] else ' '}"
        print(
            f"{name:28}{r['parameters'] / 1e6:7.1f}M{r['mflops_per_token']:11.2f}{r['tokens_per_second']:8,.0f}{rate:>9}"
            f"  {cell(r['tokens']):>20}  {cell(r['seconds']):>18}{load:10.2f}"
        )


if __name__ == "__main__":
    main()
