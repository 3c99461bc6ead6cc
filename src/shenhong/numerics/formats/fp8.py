"""FP8 weights with a scale for every block of 128 x 128 numbers (DeepSeek-V3, arXiv 2412.19437, section 3.3.2).

    w  ~  q * s      q in e4m3 (largest 448, three mantissa bits), s fp32, one a block

A block's scale makes its largest weight 448. Scales keep 20 of their 24 significant bits, so that every q * s is exact
in fp32: what was read back and is quantised again gives the same bytes.

Legend: R rows, C columns, r = ceil(R / 128), c = ceil(C / 128) blocks; the last block of either side may be smaller.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128
LARGEST = 448.0  # of e4m3
_SMALLEST_SCALE = 2.0**-100  # blocks of zeros, and of what is as good as zero


def blocks(side: int) -> int:
    """How many blocks a side of this length has."""
    return -(-side // BLOCK)


def quantise(weight_RC: Tensor) -> tuple[Tensor, Tensor]:
    """(q [R, C] float8_e4m3fn, scales [r, c] fp32) of a finite matrix, rounded to the nearest, ties to even."""
    weight_RC = weight_RC.float()
    R, C = weight_RC.shape
    padded = F.pad(weight_RC.abs(), (0, -C % BLOCK, 0, -R % BLOCK))
    largest_rc = padded.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK)).amax((1, 3))
    scale_rc = (largest_rc / LARGEST).clamp(min=_SMALLEST_SCALE)
    scale_rc = ((scale_rc.view(torch.int32) + 15) & ~15).view(torch.float32)
    return (weight_RC / spread(scale_rc, R, C)).to(torch.float8_e4m3fn), scale_rc


def dequantise(q_RC: Tensor, scale_rc: Tensor) -> Tensor:
    """[R, C] fp32."""
    return q_RC.float().mul_(spread(scale_rc.float(), *q_RC.shape))


def spread(scale_rc: Tensor, R: int, C: int) -> Tensor:
    """[R, C] the scale of every number."""
    rows_rC = scale_rc.repeat_interleave(BLOCK, 1)[:, :C]
    return rows_rC.repeat_interleave(BLOCK, 0)[:R]
