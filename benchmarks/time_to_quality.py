"""Held-out loss over wall-clock: the poet, poet-plain, and nanochat's model on the same text and tokens.

    shenhong train recipes/poet.toml --run runs/poet --until tokens
    git clone https://github.com/karpathy/nanochat && python benchmarks/time_to_quality.py --run runs/poet --nanochat nanochat

Each model trains for the full time; the poet also for a third of it, with its schedule made for that.
nanochat's model, initialisation, optimizer and schedule are its own (depth 6, width 256, bfloat16, the
rates of its training script, scaled for the batch as it does); it gets the same rows in the same order.
``--finished poet=runs/poet`` takes the end of a finished run of that recipe instead of training it again.
Prints a table, then one JSON line; draws --plot.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "20000")
os.environ.setdefault("NANOCHAT_DTYPE", "bfloat16")

import torch

from common import Bench, Curve, step_seconds, train_arm, usual_machine
from shenhong.export import load_model
from shenhong.recipe import load
from shenhong.train.data import order

ROOT = Path(__file__).resolve().parents[1]


def nanochat(
    bench: Bench, folder: Path, seconds: float, looks: int, seed: int, batch_tokens: int
) -> Curve:
    """Train nanochat's GPT for ``seconds`` with its own optimizer; the clock excludes looks."""
    sys.path.insert(0, str(folder))
    from nanochat.gpt import GPT, GPTConfig

    torch.manual_seed(seed)
    length, vocabulary = bench.rows.row_length, bench.vocabulary
    model = GPT(
        GPTConfig(
            sequence_len=length,
            vocab_size=vocabulary,
            n_layer=6,
            n_head=4,
            n_kv_head=4,
            n_embd=256,
            window_pattern="L",
        )
    )
    model.init_weights()
    # Its script scales rates by the square root of the batch over 2^19 tokens.
    scale = math.sqrt(batch_tokens / 2**19)
    optimizer = model.setup_optimizer(
        unembedding_lr=0.008 * scale,
        embedding_lr=0.3 * scale,
        matrix_lr=0.02 * scale,
        scalar_lr=0.5 * scale,
    )
    rows_a_step = batch_tokens // length

    def batch(numbers: torch.Tensor, rows: Any) -> tuple[torch.Tensor, torch.Tensor]:
        got = rows.batch(numbers)
        tokens, weights = (x.view(-1, length) for x in (got.tokens_N, got.weights_N))
        targets = torch.full_like(tokens, -1)
        targets[:, :-1] = torch.where(weights[:, 1:] > 0, tokens[:, 1:], -1)
        return tokens, targets

    def step(number: int, done: float) -> None:
        factor = min(1.0, (number + 1) / 40) * min(1.0, max(0.05, (1 - done) / 0.65))
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        tokens, targets = batch(
            order(len(bench.rows), seed, number * rows_a_step, rows_a_step), bench.rows
        )
        model(tokens, targets).backward()
        optimizer.step()
        model.zero_grad(set_to_none=True)

    @torch.no_grad()
    def look() -> float:
        nats = 0.0
        for part in torch.arange(len(bench.valid)).split(rows_a_step):
            nats += float(model(*batch(part, bench.valid), loss_reduction="sum"))
        return nats / bench.valid.characters

    curve, spent, number = Curve(), 0.0, 0
    marks = [seconds * (i + 1) / looks for i in range(looks)]
    while marks:
        begin = time.perf_counter()
        step(number, spent / seconds)
        spent += time.perf_counter() - begin
        number += 1
        if spent >= marks[0]:
            marks.pop(0)
            curve.seconds.append(round(spent, 1))
            curve.tokens.append(number * batch_tokens)
            curve.nats.append(look())
            print(
                f"nanochat {spent:.0f} s, {curve.tokens[-1]:,} tokens, {curve.final:.4f}",
                file=sys.stderr,
                flush=True,
            )
    return curve


def end_of(bench: Bench, run: Path) -> Curve:
    """A finished run as a curve of one point; its tokenizer and text must be those of the bench."""
    for part in ("tokenizer/tokenizer.json", "tokens/valid.safetensors"):
        assert (run / part).read_bytes() == (bench.path / part).read_bytes(), (
            f"{run} differs: {part}"
        )
    events = map(json.loads, (run / "events.jsonl").read_text().splitlines())
    last = [event for event in events if event["kind"] == "valid"][-1]
    nats = bench.nats_per_character(load_model(run / "model", torch.bfloat16))
    steps, batch = last["step"], load(run / "recipe.toml").train.batch_tokens
    return Curve([last["seconds"]], [steps * batch], [nats])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True, help="a run prepared up to its tokens")
    parser.add_argument(
        "--nanochat", type=Path, default=None, help="a checkout of nanochat; left out without it"
    )
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument(
        "--finished", nargs="*", default=[], metavar="NAME=RUN", help="poet=RUN, poet-plain=RUN"
    )
    parser.add_argument("--looks", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--plot", type=Path, default=None, help="file to draw the curves into (.svg or .png)"
    )
    options = parser.parse_args()
    bench = Bench.open(options.run)
    dtype = usual_machine()
    seconds = options.minutes * 60
    curves: dict[str, Curve] = {}
    finished = dict(pair.split("=", 1) for pair in options.finished)
    recipes = {name: load(ROOT / "recipes" / f"{name}.toml") for name in ("poet", "poet-plain")}
    for name, minutes in (
        ("poet", options.minutes),
        ("poet", options.minutes / 3),
        ("poet-plain", options.minutes),
    ):
        if minutes == options.minutes and name in finished:
            curves[name] = end_of(bench, Path(finished[name]))
            continue
        recipe = recipes[name]
        config, settings = bench.config(recipe), recipe.train
        steps = round(minutes * 60 / step_seconds(bench, config, settings, dtype))
        label = name if minutes == options.minutes else f"{name}, a third of the time"
        curves[label] = train_arm(
            bench, config, settings, dtype, options.seed, steps, options.looks
        )
        print(
            f"{label}: {curves[label].final:.4f} after {curves[label].seconds[-1]:.0f} s",
            file=sys.stderr,
            flush=True,
        )
    if options.nanochat:
        batch = bench.recipe.train.batch_tokens
        curves["nanochat"] = nanochat(
            bench, options.nanochat, seconds, options.looks, options.seed, batch
        )
    print("\nheld-out nats per character by training seconds (looks not counted)")
    for name, curve in curves.items():
        pace = curve.tokens[-1] / curve.seconds[-1]
        points = "  ".join(
            f"{s:.0f}s {n:.3f}" for s, n in zip(curve.seconds, curve.nats, strict=True)
        )
        print(f"{name:26}{pace:8,.0f} tokens/s   {points}")
    if options.plot:
        draw(curves, options.plot)
    print(json.dumps({name: asdict(curve) for name, curve in curves.items()}))


def draw(curves: dict[str, Curve], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for name, curve in curves.items():
        axes.plot(curve.seconds, curve.nats, marker="o", markersize=3, label=name)
    axes.set(xlabel="training seconds", ylabel="held-out nats per character")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    main()
