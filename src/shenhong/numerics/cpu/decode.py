"""Generation through the kernels: matrices in kernel layout, and one call for all layers of a batch of tokens.

Shapes: N tokens, S sequences, P pages of the longest table, D hidden, H heads, R latent rank, r rope dims, E experts,
I inner width, b lanes of a panel.
"""

from __future__ import annotations

import ctypes
from collections.abc import Collection, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from shenhong.numerics.cpu import structs
from shenhong.numerics.cpu.native import call
from shenhong.numerics.cpu.structs import SAMPLING


class Batch(NamedTuple):
    """Tokens of several sequences, each sequence's consecutive; where they stand, and the pages of each sequence."""

    tokens_N: np.ndarray  # int64
    positions_N: np.ndarray  # int32
    starts_S: np.ndarray  # int32 [S + 1]: sequence s has tokens starts[s] .. starts[s + 1] - 1
    tables_SP: np.ndarray  # int32


class Writing(NamedTuple):
    """How the sequences of a batch go on, each for at most K tokens."""

    max_new_tokens_S: (
        np.ndarray
    )  # int32: tokens to write; 0 where the prompt goes on with another batch
    samplings_SK: np.ndarray  # SAMPLING
    stops: list[Collection[int]]  # of every sequence: the tokens that end it


def pack(matrix: Tensor) -> Tensor:
    """[..., rows, K] as panels [..., ceil(rows / b), K, b], zeros behind the last row.

    Where the CPU multiplies bfloat16 itself: [..., ceil(rows / b), K / 2, b, 2].
    """
    lanes, pair = call("shenhong_panel"), call("shenhong_pair", matrix.dtype)
    rows, columns = matrix.shape[-2:]
    padded = F.pad(matrix, (0, -columns % pair, 0, -rows % lanes))
    panels = padded.unflatten(-2, (-1, lanes)).unflatten(-1, (-1, pair))
    return panels.transpose(-3, -2).contiguous()


def pack_gated(gate_up: Tensor) -> Tensor:
    """[..., 2I, K], gates before ups, as panels of b/2 gates and their b/2 ups."""
    half = call("shenhong_panel") // 2
    inner = gate_up.shape[-2] // 2
    parts = gate_up.unflatten(-2, (2, inner))
    parts = F.pad(parts, (0, 0, 0, -inner % half)).unflatten(-2, (-1, half))
    return pack(parts.transpose(-4, -3).flatten(-4, -2))


def project(x_ND: Tensor, packed: Tensor, rows: int) -> Tensor:
    """[N, rows] fp32: x times a packed [rows, D]; a row's result depends on no other row."""
    x_ND = x_ND.contiguous()
    out = torch.empty(len(x_ND), rows)
    call(
        "shenhong_project",
        packed.dtype,
        x_ND,
        packed,
        out,
        len(x_ND),
        x_ND.shape[1],
        rows,
        torch.get_num_threads(),
    )
    return out


def sample_tokens(logits_NV: Tensor, how_N: np.ndarray) -> np.ndarray:
    """[N] tokens sampled from fp32 logits, each row by its own SAMPLING settings; -1 where the logits are not numbers.

    Temperature 0 takes the likeliest. Limits apply in the order top-k, top-p, min-p.
    """
    assert how_N.dtype == SAMPLING and logits_NV.stride(1) == 1
    chosen = np.empty(len(how_N), np.int64)
    call(
        "shenhong_sample",
        logits_NV,
        logits_NV.stride(0),
        logits_NV.shape[1],
        how_N.ctypes.data,
        chosen.ctypes.data,
        len(how_N),
        torch.get_num_threads(),
    )
    return chosen


class FusedLayers:
    """A model's layers as the kernel wants them. ``numbers``: fields of DecodeModel; ``layers``: those of DecodeLayer,
    tensors for the pointers (None for what a layer lacks)."""

    def __init__(
        self, layers: Sequence[dict[str, Tensor | int | None]], numbers: dict[str, object]
    ) -> None:
        self.kept = [layers, numbers]  # alive, for the kernel holds only addresses
        self.layers = (structs.DecodeLayer * len(layers))()
        for target, layer in zip(self.layers, layers, strict=True):
            for name, value in layer.items():
                if value is not None:
                    address = value.data_ptr() if isinstance(value, Tensor) else value
                    setattr(target, name, address)
        self.model = structs.DecodeModel(
            **{k: v.data_ptr() if isinstance(v, Tensor) else v for k, v in numbers.items()},
            layers=ctypes.addressof(self.layers),
        )

    def run(
        self,
        x: Tensor | None,
        embedding_VD: Tensor,
        batch: Batch,
        pools: Sequence[Tensor],
        layers: range,
        norm_D: Tensor,
    ) -> Tensor:
        """[N, D] fp32: x [N, D] fp32, in place, or else the tokens' embeddings, through the layers and a norm.

        ``pools``: [pages, page, row] of every layer of the model.
        """
        out_ND = x
        if out_ND is None:
            out_ND = torch.empty(len(batch.tokens_N), embedding_VD.shape[1])
        arguments = self._arguments(embedding_VD, batch, pools, layers, norm_D)
        arguments.x = out_ND.data_ptr()
        if x is not None:
            arguments.tokens = None
        call("shenhong_decode", ctypes.addressof(self.model), ctypes.addressof(arguments))
        return out_ND

    def write(
        self,
        embedding_VD: Tensor,
        batch: Batch,
        pools: Sequence[Tensor],
        layers: range,
        norm_D: Tensor,
        head: Tensor,
        writing: Writing,
    ) -> list[list[int]]:
        """What each sequence writes behind the batch: up to its limit, a stop included, or -1 where logits are not
        numbers. ``head``: packed."""
        arguments = self._arguments(embedding_VD, batch, pools, layers, norm_D)
        max_new_tokens_S, samplings_SK, stops = writing
        assert samplings_SK.dtype == SAMPLING and samplings_SK.flags.c_contiguous
        starts = np.array([0, *accumulate(map(len, stops))], np.int32)
        flat = np.array([token for own in stops for token in own], np.int64)
        written_SK, counts_S = (
            np.empty(samplings_SK.shape, np.int64),
            np.empty_like(max_new_tokens_S),
        )
        arguments.head, arguments.vocab = head.data_ptr(), len(embedding_VD)
        arguments.most, arguments.max_new_tokens = (
            samplings_SK.shape[1],
            max_new_tokens_S.ctypes.data,
        )
        arguments.samplings = samplings_SK.ctypes.data
        arguments.stops, arguments.stop_starts = flat.ctypes.data, starts.ctypes.data
        arguments.written, arguments.counts = written_SK.ctypes.data, counts_S.ctypes.data
        call("shenhong_decode", ctypes.addressof(self.model), ctypes.addressof(arguments))
        rows: Any = written_SK.tolist()
        return [row[:count] for row, count in zip(rows, counts_S.tolist(), strict=True)]

    def _arguments(
        self,
        embedding_VD: Tensor,
        batch: Batch,
        pools: Sequence[Tensor],
        layers: range,
        norm_D: Tensor,
    ) -> Any:
        for layer, pool in zip(self.layers, pools, strict=True):
            layer.pool = pool.data_ptr()
        self.model.page = pools[0].shape[1]
        tokens, positions, starts, tables = batch
        return structs.DecodeBatch(
            threads=torch.get_num_threads(),
            first_layer=layers.start,
            last_layer=layers.stop,
            sequences=len(starts) - 1,
            table_width=tables.shape[1],
            starts=starts.ctypes.data,
            positions=positions.ctypes.data,
            tables=tables.ctypes.data,
            tokens=tokens.ctypes.data,
            embedding=embedding_VD.data_ptr(),
            last_norm=norm_D.data_ptr(),
        )
