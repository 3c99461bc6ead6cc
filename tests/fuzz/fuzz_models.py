"""Coverage-guided fuzzing of everything that opens a model: GGUF files, and Hugging Face folders.

    python tests/fuzz/fuzz_models.py gguf|folder [--minutes 10] [--corpus DIR]

Needs atheris (not a dependency of ours). It starts from a small model of every kind, changes bytes, and in a folder
also values of JSON; atheris keeps what reaches new lines of our readers. A finding is any exception but a
``ShenhongError`` and any input that takes longer than TIMEOUT seconds or more than MEMORY bytes; each place is told
once, with the input that reached it under --corpus. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import atexit
import json
import logging
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import atheris

# Imported before instrumentation: not ours, and slow under it.
import daft  # noqa: F401
import gguf
import safetensors.torch  # noqa: F401
import tokenizers  # noqa: F401
import torch

with atheris.instrument_imports(
    include=[
        "shenhong.export",
        "shenhong.model.config",
        "shenhong.model.hf_config",
        "shenhong.tokenizer",
    ]
):
    from shenhong.errors import ShenhongError
    from shenhong.export import load_model, open_gguf, save_gguf, save_model
    from shenhong.export.deepseek2 import entries
    from shenhong.export.gguf import _add_tokenizer
    from shenhong.export.gguf_model import load_gguf
    from shenhong.export.gguf_tokenizer import gguf_tokenizer
    from shenhong.model import Decoder, ModelConfig
    from shenhong.tokenizer import Tokenizer

TIMEOUT, MEMORY = 20, 6_000_000_000
BETWEEN = b"\0--file--\0"  # a folder as one input: its files in this order
FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")
NAME = re.compile(rb"(deepseek2|llama|general|tokenizer)\.[a-z_.]+|blk\.\d\.[a-z_.]+|GGUF")
EDGES: list[Any] = [0, 1, -1, 2, 3, 7, 1 << 31, 1 << 63, 1e308, 0.5, "", "x", None, True, [], {}]


class Target:
    """Opens one input after another, and remembers where it failed."""

    def __init__(self, kind: str, keep: Path, deadline: float) -> None:
        self.kind, self.keep, self.deadline = kind, keep, deadline
        self.place = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
        self.findings: dict[str, str] = {}
        self.runs = self.opened = 0
        self.slowest = 0.0
        atexit.register(self.report)

    def __call__(self, data: bytes) -> None:
        if time.monotonic() > self.deadline:
            self.report()
            os._exit(0)
        self.runs += 1
        begun = time.process_time()
        signal.alarm(TIMEOUT)
        try:
            (self.gguf if self.kind == "gguf" else self.folder)(data)
            self.opened += 1
        except ShenhongError as error:
            if "\n" in str(error):
                self.found("an error of several lines", data)
        except BaseException as error:
            self.found("".join(traceback.format_exception(error)), data)
        finally:
            signal.alarm(0)
            took = time.process_time() - begun
            if took > self.slowest:
                self.slowest = took
                (self.keep / f"slowest-{self.kind}").write_bytes(data)

    def gguf(self, data: bytes) -> None:
        path = self.place / "x.gguf"
        path.write_bytes(data)
        gguf_tokenizer(open_gguf(path))
        load_gguf(path)

    def folder(self, data: bytes) -> None:
        parts = data.split(BETWEEN)
        for name, part in zip(FILES, parts, strict=False):
            (self.place / name).write_bytes(part)
        for name in FILES[len(parts) :]:
            (self.place / name).unlink(missing_ok=True)
        Tokenizer.load(self.place)
        load_model(self.place)

    def found(self, what: str, data: bytes) -> None:
        where = [line for line in what.splitlines() if line.startswith("  File")][-1:]
        key = f"{what.splitlines()[-1][:100]} {where}"
        if key not in self.findings:
            self.findings[key] = what
            (self.keep / f"finding-{self.kind}-{len(self.findings)}").write_bytes(data)
            print(f"\nFINDING {len(self.findings)}\n{what}", file=sys.stderr, flush=True)

    def report(self) -> None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        said = {
            "target": self.kind,
            "inputs": self.runs,
            "opened": self.opened,
            "slowest_seconds": round(self.slowest, 2),
            "peak_gigabytes": round(peak / 1e9, 2),
            "findings": list(self.findings),
        }
        print(json.dumps(said), flush=True)
        shutil.rmtree(self.place, ignore_errors=True)


def change(data: bytes, most: int, seed: int) -> bytes:
    """A value of a folder's JSON changed, or a number in a file's header; else what atheris does with bytes."""
    pick = random.Random(seed)
    parts = data.split(BETWEEN)
    if len(parts) > 1 and pick.random() < 0.5:
        number = pick.randrange(len(parts) - 1)
        try:
            values = json.loads(parts[number])
            spot, key = values, pick.choice(list(values))
            while isinstance(spot[key], dict | list) and spot[key] and pick.random() < 0.8:
                spot = spot[key]
                key = (
                    pick.choice(list(spot)) if isinstance(spot, dict) else pick.randrange(len(spot))
                )
            spot[key] = pick.choice([*EDGES, pick.randrange(1 << pick.randrange(1, 70))])
            parts[number] = json.dumps(values).encode()
            return BETWEEN.join(parts)[:most]
        except (ValueError, TypeError, KeyError, IndexError):
            pass
    elif pick.random() < 0.5 and len(data) > 60:
        # What follows a name is a type, a length, a shape or a value.
        spots = [match.end() for match in NAME.finditer(data, 0, 400_000)] or [0]
        at = min(pick.choice(spots) + pick.randrange(40), len(data) - 8)
        width = pick.choice([1, 4, 8])
        value = pick.choice([0, 1, 2, 3, 8, 9, 255, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 64) - 1])
        return data[:at] + (value % (1 << 8 * width)).to_bytes(width, "little") + data[at + width :]
    return atheris.Mutate(data, most)


def seeds(kind: str, corpus: Path) -> None:
    """Small whole models to begin with: experts, dense, 8-bit, grouped queries."""
    from tests.export.folders import small_config, small_folder

    small = {"n_routed_experts": 3, "num_experts_per_tok": 2, "num_hidden_layers": 1}
    heads = {"attention": "gqa", "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 320}
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    llama = {**heads, **sizes, "num_hidden_layers": 1, "first_k_dense_replace": 1}
    shapes = {
        "experts": small_config(1, **small, num_nextn_predict_layers=1, first_k_dense_replace=0),
        "dense": small_config(1, **(small | {"first_k_dense_replace": 1})),
        "llama": ModelConfig(**llama, tie_word_embeddings=True),
        "qwen3": ModelConfig(**llama, qk_norm=True),
    }
    for name, config in shapes.items():
        with tempfile.TemporaryDirectory() as scratch:
            folder, decoder = small_folder(Path(scratch) / name, config)
            if kind == "folder":
                if name == "experts":
                    save_model(decoder, folder, folder, dtype="float8")
                data = BETWEEN.join((folder / file).read_bytes() for file in FILES)
            elif config.attention == "mla":
                data = save_gguf(folder, Path(scratch) / "x.gguf", 4).path.read_bytes()
            else:
                data = grouped(Path(scratch) / "x.gguf", name, config, folder, decoder)
            (corpus / name).write_bytes(data)


def grouped(path: Path, name: str, config: ModelConfig, folder: Path, decoder: Decoder) -> bytes:
    """A GGUF file with grouped queries, which we read but do not write."""
    writer = gguf.GGUFWriter(path, name)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    _add_tokenizer(writer, folder, config)
    for entry in entries(decoder):
        writer.add_tensor(entry.name, entry.view.detach().contiguous().numpy())
    for part in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{part}_to_file")()
    writer.close()
    return path.read_bytes()


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("kind", choices=("gguf", "folder"))
    options.add_argument("--minutes", type=float, default=10)
    options.add_argument("--corpus", type=Path, default=Path("fuzz-corpus"))
    chosen = options.parse_args()
    corpus = chosen.corpus / chosen.kind
    corpus.mkdir(parents=True, exist_ok=True)
    seeds(chosen.kind, corpus)
    torch.set_num_threads(1)
    logging.disable()
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))

    def hangs(*_: Any) -> None:
        raise KeyboardInterrupt(f"more than {TIMEOUT} seconds")  # what no reader of ours catches

    target = Target(chosen.kind, chosen.corpus, time.monotonic() + 60 * chosen.minutes)
    flags = [sys.argv[0], str(corpus), "-max_len=400000", "-timeout=300", "-rss_limit_mb=0"]
    flags += ["-verbosity=0", "-detect_leaks=0"]
    atheris.Setup(flags, target, custom_mutator=change, internal_libfuzzer=True)
    signal.signal(signal.SIGALRM, hangs)
    atheris.Fuzz()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    main()
