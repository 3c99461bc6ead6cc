"""What decoding remembers: per layer a pool of pages, each with room for a fixed number of tokens.

A row of a page is what its layer's attention declares (``cache_row``): for latent attention the normed latent and the
rotated key, for grouped queries each group's key and value. Which page belongs to whom is the engine's matter (``engine/cache.py``).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from shenhong.errors import ModelError
from shenhong.numerics.cpu.decode import Batch

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
            try:
                flat = torch.empty(size + SLACK, dtype=dtype, device=device)
            except RuntimeError:  # torch's word for memory that cannot be had
                raise ModelError(
                    f"a cache of {pages * page:,} tokens needs {size * dtype.itemsize / 1e9:,.1f} GB in each layer, which "
                    "cannot be had here; lower max_position_embeddings in the model's config.json"
                ) from None
            self.layers.append(flat[:size].view(pages, page, row))

    @property
    def bytes_per_token(self) -> int:
        """Of all layers together."""
        return sum(pool.shape[2] * pool.element_size() for pool in self.layers)


class SlotMapping:
    """Where a batch's tokens and keys lie, for PyTorch's indexing.

    ``groups``: one per number of new tokens, (tokens [S, T], slots of the keys [S, L], additive mask [S, T, L]).
    """

    def __init__(self, batch: Batch, page: int, device: torch.device) -> None:
        _, positions, starts, tables = batch
        counts = np.diff(starts)
        sequence = np.repeat(np.arange(len(counts)), counts)
        slots = tables[sequence, positions // page].astype(np.int64) * page + positions % page
        self.positions_N = torch.from_numpy(positions.astype(np.int64)).to(device)
        self.slots_N = torch.from_numpy(slots).to(device)
        self.groups: list[tuple[Tensor, Tensor, Tensor]] = []
        for T in np.unique(counts):
            members = np.flatnonzero(counts == T)
            tokens = starts[members, None] + np.arange(T)
            seen = positions[tokens]
            keys = np.arange(seen.max() + 1)
            # A shorter sequence's table may end early: its keys past the end are masked.
            column = np.minimum(keys // page, tables.shape[1] - 1)
            past = np.maximum(tables[members][:, column], 0).astype(np.int64) * page + keys % page
            past = np.where(keys <= seen[:, -1:], past, past[:, :1])
            mask = np.where(keys <= seen[..., None], 0.0, -np.inf).astype(np.float32)
            group = (tokens.astype(np.int64), past, mask)
            self.groups.append(tuple(torch.from_numpy(a).to(device) for a in group))  # type: ignore[arg-type]
