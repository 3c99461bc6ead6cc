"""x * sigmoid(x) (Elfwing et al. 2018): SwiGLU's, in nearly every model of today."""

from torch.nn.functional import silu as activate

__all__ = ["activate"]
