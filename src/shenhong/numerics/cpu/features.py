"""What the CPU can do by its own account: rules follow from this, never from a timing, so a busy machine decides alike."""

from __future__ import annotations

import torch


def multiplies_bfloat16() -> bool:
    """Whether it has instructions for products of bfloat16 (AMX or AVX512-BF16).

    Without them such products are widened to float32 first: no faster, and less exact.
    """
    has = torch.cpu.get_capabilities()
    return bool(has.get("amx_bf16") or has.get("avx512_bf16"))
