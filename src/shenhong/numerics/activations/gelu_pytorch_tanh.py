"""GELU by its tanh approximation (Hendrycks & Gimpel 2016): Gemma's."""

from torch import Tensor
from torch.nn.functional import gelu


def activate(x: Tensor) -> Tensor:
    return gelu(x, approximate="tanh")
