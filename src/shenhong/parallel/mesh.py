"""Who takes part in a run: one process, or several started by torchrun, with the same results.

Everything a step normalises by (token counts, gradient sums, expert loads) goes through ``sum_`` here,
so one process and two give the same losses up to the order of floating-point addition.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Mesh:
    """Position of this process: ``rank`` of ``size``. A mesh of one never touches torch.distributed."""

    rank: int = 0
    size: int = 1
    local_size: int = 1  # processes on this machine, which share its cores

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def sum_(self, tensors: list[torch.Tensor]) -> None:
        """Sum each tensor over all processes, in place; flattened by dtype into one message each."""
        if self.size == 1:
            return
        for dtype in sorted({t.dtype for t in tensors}, key=str):
            group = [t for t in tensors if t.dtype == dtype]
            flat = torch.cat([t.reshape(-1) for t in group])
            dist.all_reduce(flat)
            for tensor, part in zip(group, flat.split([t.numel() for t in group]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def share(self, value: Any) -> Any:
        """The leader's value on every process (small JSON-like objects: numbers, strings, lists, dicts)."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]


def join() -> Mesh:
    """The mesh torchrun's environment describes; a mesh of one without it."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return Mesh()
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    if device.type != "cpu":
        torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
    if not dist.is_initialized():
        # The others wait while the leader refines the corpus and evaluates, however long that takes.
        backend = dist.get_default_backend_for_device(device)
        dist.init_process_group(backend, timeout=timedelta(days=7))
    return Mesh(dist.get_rank(), size, int(os.environ.get("LOCAL_WORLD_SIZE", size)))


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
