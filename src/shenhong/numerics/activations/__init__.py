"""Activations of the feed-forward blocks: one file each, found by the name that a config's ``hidden_act`` gives.

An activation's file offers ``activate``, from a tensor to one of its shape and dtype, differentiable. The block computes
activate(gate) * up. Only silu has kernels; any other runs in PyTorch, in training and in generation.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable

from torch import Tensor


def activations() -> list[str]:
    """The names there are."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The function of this name, which must be one of `activations`."""
    return importlib.import_module(f"{__name__}.{name}").activate
