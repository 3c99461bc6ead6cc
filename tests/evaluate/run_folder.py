"""Small but whole corpora and run folders to evaluate and to report on."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parents[2]

LINES = [
    "白日依山尽",
    "黄河入海流",
    "欲穷千里目",
    "更上一层楼",
    "床前明月光",
    "疑是地上霜",
    "举头望明月",
    "低头思故乡",
    "红豆生南国",
    "春来发几枝",
    "愿君多采撷",
    "此物最相思",
    "空山不见人",
    "但闻人语响",
    "返景入深林",
    "复照青苔上",
    "千山鸟飞绝",
    "万径人踪灭",
    "孤舟蓑笠翁",
    "独钓寒江雪",
]
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>![x](http://evil.example/x)[y](javascript:alert(3))\"'`|&"


def poem(number: int) -> str:
    a, b, c, d = (LINES[(number * k + k) % len(LINES)] for k in (1, 3, 7, 9))
    return f"{a}，{b}。{c}，{d}。"


def write_corpus(folder: Path, train: int = 200, test: int = 30) -> None:
    """A corpus of verse: train.parquet and test.parquet."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, start, count in (("train", 0, train), ("test", train, test)):
        numbers = range(start, start + count)
        texts = [poem(n) for n in numbers]
        table = pa.table(
            {
                "id": [f"{split}-{n:05d}" for n in numbers],
                "prompt": [f"五绝 题{n}" for n in numbers],
                "text": texts,
                "form": ["五绝"] * count,
                "title": [f"题{n}" for n in numbers],
                "author": ["佚名"] * count,
                "prosody_text": texts,
            }
        )
        pq.write_table(table, folder / f"{split}.parquet")


def write_run(folder: Path, evaluation: dict | None = None, words: str = "poet") -> None:
    """A finished run. words: stands wherever a run folder holds free text."""
    (folder / "corpus").mkdir(parents=True, exist_ok=True)
    events: list[dict] = [{"kind": "stage", "stage": "corpus", "state": "end", "seconds": 9.0}]
    for step in range(1, 301):
        loss = 4.5 + 4 * math.exp(-step / 40)
        event = {
            "time": 1.7e9 + step, "kind": "train", "step": step, "steps": 300, "loss": loss,
            "lr": 1e-3 * (1 - step / 300), "grad_norm": 1 + 1 / step, "tokens": step * 4096,
            "seconds": step * 0.5, "tokens_per_second": 8192, "load_max": [1.3, 1.2],
            "mtp_loss": loss + 1,
        }  # fmt: skip
        if step % 20 == 0:
            event["load"] = [[0.3, 0.3, 0.2, 0.2], [0.25, 0.25, 0.3, 0.2]]
        if step == 120:
            event["loss"] = float("nan")
        events.append(event)
        if step % 100 == 0:
            events.append(
                {"kind": "valid", "step": step, "seconds": step * 0.5,
                 "nats_per_token": loss, "nats_per_character": loss * 0.98}
            )  # fmt: skip
    events.append({"kind": "sample", "step": 300, "text": words})
    lines = "\n".join(json.dumps(event) for event in events)
    (folder / "events.jsonl").write_text(lines + '\n{"kind": "tra')
    stages = {"corpus": 9.0, "tokenizer": 3.0, "train": 150.0, "evaluate": 20.0}
    manifest = {
        "format": 1, "name": words, "shenhong": "0.1.0", "created": 1.76e9, "seed": 1,
        "machine": {"cpu": words, "cores": 2, "dtype": "bfloat16", "kernels": {"attention": True}},
        "stages": {
            name: {"state": "done", "seconds": seconds, "peak_bytes": 2**30, "outputs": {}}
            for name, seconds in stages.items()
        },
        "train": {"steps": 300, "tokens_per_step": 4096, "flops_per_token": 6e7,
                  "parameters": 17_500_000, "active_parameters": 9_000_000},
        "seconds_total": 190.0,
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))
    step = {
        "step": "rules", "what": words, "records": 10, "kept": 7, "dropped": {words: 3},
        "changed": 0, "changed_nothing": False, "seconds": 1.0,
        "examples": {words: [{"id": "1", "text": words, "became": words}]},
    }  # fmt: skip
    report = {"steps": [step], "splits": {"train": {"records": 7, "characters": 140}}}
    (folder / "corpus" / "report.json").write_text(json.dumps(report))
    (folder / "recipe.toml").write_text(f"name = {json.dumps(words)}\n[train]\n")
    if evaluation is not None:
        (folder / "evaluation.json").write_text(json.dumps(evaluation, allow_nan=False))
