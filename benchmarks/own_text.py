"""A stranger's text of three sizes, as README says to train on it: does it end when it said, and what comes out.

    python benchmarks/own_text.py [--minutes 3] [--only small,middle,large,continue] [--out FOLDER]

small   200 KB of the CIA World Factbook, about a hundred Markdown files
middle  5 MB of it
large   60 MB: the sources and documents of this Python's library and packages, as .txt
continue  SmolLM2-135M-Instruct goes on with the 5 MB (data/smollm2/fetch.py first)

Prints a table, then one JSON line. "planned" is what was said before training, for the whole run; the n-gram is of the
text the model saw. What is there is not done again: remove the folder to measure anew.
"""

from __future__ import annotations

import argparse
import json
import site
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parents[1]
SMOLLM2 = ROOT / "runs" / "SmolLM2-135M-Instruct.gguf"


def factbook(every: int) -> Iterator[str]:
    texts = pq.read_table(ROOT / "data/english/factbook.parquet", columns=["text"])["text"]
    yield from texts.to_pylist()[::every]


def sources() -> Iterator[str]:
    folders = {sysconfig.get_paths()["stdlib"], *site.getsitepackages()}
    for folder in sorted(folders):
        for path in sorted(Path(folder).rglob("*")):
            if path.suffix in (".py", ".rst", ".md", ".txt") and path.stat().st_size > 300:
                yield path.read_text(encoding="utf-8", errors="ignore")


def write(folder: Path, texts: Iterator[str], size: int, end: str) -> None:
    """Files of together about ``size`` bytes."""
    if folder.exists():
        return
    folder.mkdir(parents=True)
    for number, text in enumerate(texts):
        length = len(text.encode())
        if size < length:
            continue
        (folder / f"{number:06d}{end}").write_text(text, encoding="utf-8")
        size -= length
        if size < 2000:
            break


def trained(out: Path, name: str, recipe: str, corpus: Path, minutes: float) -> dict:
    run = out / "runs" / name
    command = [sys.executable, "-m", "shenhong.cli", "train", str(ROOT / "recipes" / recipe)]
    changes = [f"minutes={minutes}", f"corpus.paths=[{json.dumps(str(corpus))}]"]
    if recipe == "continue.toml":
        changes.append(f"init={SMOLLM2}")
    if not (run / "report.html").exists():
        begin = time.monotonic()
        flags = [part for change in changes for part in ("--set", change)]
        subprocess.run([*command, "--run", str(run), *flags], check=True, stdout=sys.stderr)
        (run / "took.json").write_text(json.dumps(time.monotonic() - begin))
    manifest = json.loads((run / "manifest.json").read_text())
    measured = json.loads((run / "evaluation.json").read_text())["bits_per_character"]
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    looks = [event["nats_per_token"] for event in events if event["kind"] == "valid"]
    plan, stages = manifest["train"], manifest["stages"]
    before = sum(
        stages[s]["seconds"] for s in ("start", "corpus", "tokenizer", "tokens") if s in stages
    )
    ngrams = [n for n in measured["ngrams"] if n["order"] > 1]
    return {
        "text": name,
        "planned_training": plan["seconds_planned"],
        "training": round(stages["train"]["seconds"], 1),
        "before_training": round(before, 1),
        "evaluation": round(stages["evaluate"]["seconds"], 1),
        "seconds": round(json.loads((run / "took.json").read_text()), 1),
        "peak_gib": round(max(s.get("peak_bytes", 0) for s in stages.values()) / 2**30, 2),
        "steps": plan["steps"],
        "epochs": plan["epochs"],
        "capped": "steps_that_fit" in plan,
        "bits": round(measured["model"]["bits_per_character"]["value"], 3),
        "ngram": {n["source"]: round(n["bits_per_character"]["value"], 3) for n in ngrams},
        "first_look": round(looks[0], 3),
        "last_look": round(looks[-1], 3),
        "finished_at": stages["model"]["outputs"]["step"],
    }


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--minutes", type=float, default=3)
    flags.add_argument("--only", default="small,middle,large,continue")
    flags.add_argument("--out", type=Path, default=ROOT / "runs" / "own_text")
    options = flags.parse_args()
    out = options.out.resolve()
    made = {
        "small": (factbook(22), 200_000, ".md"),
        "middle": (factbook(1), 5_000_000, ".md"),
        "large": (sources(), 60_000_000, ".txt"),
    }
    rows = []
    for name in options.only.split(","):
        text = "middle" if name == "continue" else name
        write(out / text, *made[text])
        recipe = "continue.toml" if name == "continue" else "text.toml"
        rows.append(trained(out, name, recipe, out / text, options.minutes))
        print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    print(json.dumps({"minutes": options.minutes, "rows": rows}))


if __name__ == "__main__":
    main()
