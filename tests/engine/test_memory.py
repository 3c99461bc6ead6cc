"""The cache follows from the model and the machine: a share of what the weights leave, a container's limit included."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from shenhong.engine import Engine, EngineSettings, memory
from shenhong.errors import ModelError
from shenhong.model.cache import Pools
from shenhong.model.counts import parameters
from tests.model.random_configs import random_config, random_decoder

ALL = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.mark.parametrize(
    ("file", "text", "found"),
    [
        ("memory.max", "max\n", ALL),
        ("memory.max", "1000000\n", 1_000_000),
        ("memory.max", str(2 * ALL), ALL),
        ("memory/memory.limit_in_bytes", "2000000\n", 2_000_000),
        ("memory/memory.limit_in_bytes", "9223372036854771712\n", ALL),
        ("other", "1", ALL),
    ],
)
def test_a_machine_is_what_a_container_may_use_of_it(
    file: str, text: str, found: int, tmp_path: Path
) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(text)
    assert memory.machine_bytes(tmp_path) == found


def tokens(dtype: torch.dtype = torch.float32, **settings) -> tuple[int, int]:
    """Room of an engine's cache, and bytes of a token in it."""
    decoder = random_decoder(random_config(1), 1)
    engine = Engine(decoder, dtype=dtype, settings=EngineSettings(page=1, **settings))
    return engine.pages.count, engine.pools.bytes_per_token


def test_the_cache_takes_a_share_of_what_the_weights_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = parameters(random_config(1)).total
    for dtype in (torch.float32, torch.bfloat16):
        monkeypatch.setattr(memory, "machine_bytes", lambda: 1_000_000)
        for share in (0.25, 0.125):
            found, each = tokens(dtype, cache_share=share)
            assert found == int(share * (1_000_000 - numbers * dtype.itemsize)) // each
    context = random_config(1).max_position_embeddings
    monkeypatch.setattr(memory, "machine_bytes", lambda: 1000)  # smaller than the weights
    assert tokens()[0] == context  # one text of full length always fits
    monkeypatch.setattr(memory, "machine_bytes", lambda: 1 << 40)
    assert tokens(most_running=3)[0] == 3 * context  # more than running texts fill is of no use
    assert tokens(cache_bytes=10_000)[0] == 10_000 // tokens()[1]  # and what is said is done


def test_a_cache_that_cannot_be_had_is_one_line() -> None:
    """A context of 2^22 tokens is allowed, and its cache may be more than any machine has."""
    with pytest.raises(ModelError, match=r"4,194,304 tokens needs [\d,.]+ GB .*lower max_pos"):
        Pools([1 << 40], (1 << 22) // 16, 16, torch.float32, torch.device("cpu"))
