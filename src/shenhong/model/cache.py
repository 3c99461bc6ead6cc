"""What decoding remembers: per layer and row, the latent and the rotated key of every past token.

Legend: B rows, S slots of a row, R latent rank, r rope dims.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Slots are added in blocks, so that growing is rare and little stands empty.
BLOCK = 32


class LatentCache:
    """Rows of different lengths; slot s of a row holds its token s: (normed latent | rotated key), R + r numbers."""

    def __init__(
        self, layers: int, rows: int, width: int, dtype: torch.dtype, device: torch.device
    ):
        shape = (rows, BLOCK, width)
        self.slots = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]
        self.lengths_B = torch.zeros(rows, dtype=torch.long, device=device)
        self.longest = 0

    @property
    def rows(self) -> int:
        return len(self.lengths_B)

    def reserve(self, more: int) -> None:
        """Makes room for ``more`` tokens in every row."""
        capacity = self.slots[0].shape[1]
        wanted = self.longest + more
        if wanted > capacity:
            # Half as much again: the copies stay a small share however long the text grows.
            wanted = max(wanted, capacity * 3 // 2)
            extra = (wanted + BLOCK - 1) // BLOCK * BLOCK - capacity
            for i, slots in enumerate(self.slots):
                empty = slots.new_zeros(slots.shape[0], extra, slots.shape[2])
                self.slots[i] = torch.cat((slots, empty), dim=1)

    def advance(self, tokens: int | Tensor) -> None:
        """Counts tokens, the same number or [B] numbers, that were written behind each row."""
        self.lengths_B = self.lengths_B + tokens
        self.longest = int(self.lengths_B.max()) if self.rows else 0

    def keep(self, rows: Tensor) -> None:
        """Drops all rows but these (indices, in their new order)."""
        self.slots = [slots[rows] for slots in self.slots]
        self.lengths_B = self.lengths_B[rows]
        self.advance(0)
