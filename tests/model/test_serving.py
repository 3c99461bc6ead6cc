"""Which dtype serves follows from the model and the CPU's features: never from a timing, nor from what a file stores."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from shenhong.model import serving
from shenhong.model.serving import planned
from shenhong.numerics import use_kernels, why_off
from shenhong.numerics.cpu import features
from tests.model.random_configs import random_config

AMX, AVX512 = {"amx_bf16": True}, {"avx512_bf16": True, "amx_bf16": False}


@pytest.fixture(autouse=True)
def kernels() -> None:
    if why_off():
        pytest.skip("no compiler here")


@pytest.mark.parametrize(
    ("has", "dtype"),
    [
        (AMX, torch.bfloat16),
        (AVX512, torch.bfloat16),
        ({"avx2": True, "avx512_f": True}, torch.float32),
        ({}, torch.float32),
    ],
)
def test_auto_is_bfloat16_where_the_cpu_multiplies_it(
    has: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    assert features.multiplies_bfloat16() == (dtype == torch.bfloat16)
    found = planned(random_config(1))
    assert found.dtype == dtype and found.kernel and "this CPU" in found.why


def test_and_float32_wherever_pytorch_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "multiplies_bfloat16", lambda: True)
    found = planned(random_config(1, hidden_act="gelu_pytorch_tanh"))
    assert str(found) == (
        "float32, by PyTorch: there is no kernel for hidden_act gelu_pytorch_tanh, only for silu"
    )
    use_kernels(False)
    try:
        found = planned(random_config(1))
    finally:
        use_kernels(True)
    assert str(found) == "float32, by PyTorch: the kernels are switched off"


def test_what_is_asked_for_is_done() -> None:
    for dtype, name in ((torch.float32, "float32"), (torch.bfloat16, "bfloat16")):
        assert str(planned(random_config(1), dtype)) == f"{name}, by the kernel: as asked for"
    found = planned(random_config(1, hidden_act="gelu_pytorch_tanh"), torch.bfloat16)
    assert found.dtype == torch.bfloat16 and not found.kernel
