"""What decoding remembers: per layer a pool of pages, each with room for a fixed number of tokens.

A row of a page is what its layer's attention declares (``cache_row``): for latent attention the normed latent and the
rotated key, R + r numbers. Which page belongs to whom is the engine's matter (``engine/cache.py``).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Kernels read whole vectors, so a little past the last row.
SLACK = 256


class Pools:
    """``layers[l]``: [pages, page, row of layer l]. The memory is taken from the system as pages are first used."""

    def __init__(
        self,
        rows: Sequence[int],
        pages: int,
        page: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.pages, self.page = pages, page
        self.layers: list[Tensor] = []
        for row in rows:
            size = pages * page * row
            flat = torch.empty(size + SLACK, dtype=dtype, device=device)
            self.layers.append(flat[:size].view(pages, page, row))

    @property
    def bytes_per_token(self) -> int:
        """Of all layers together."""
        return sum(pool.shape[2] * pool.element_size() for pool in self.layers)
