"""Load the compiled kernels, believe them only after a self-check, and switch them on and off.

The first op that could use a kernel builds (or finds) the library, runs a tiny call of every kernel and compares it
with the PyTorch reference. Whatever goes wrong, the reference serves and one log line says so.
SHENHONG_KERNELS=0 or `use_kernels(False)` switches the kernels off; the variable has the last word.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Callable
from ctypes import c_float, c_int, c_int64, c_void_p

import torch
from torch import Tensor

from shenhong.numerics.cpu import structs
from shenhong.numerics.cpu.build import BuildError, build

log = logging.getLogger("shenhong.numerics")

DTYPES = {torch.float32: 0, torch.bfloat16: 1}  # enum DType of common.h


def _signature(code: str) -> list[type]:
    """p pointer, n 64-bit integer, i int, f float: in the order of the C declaration."""
    return [{"p": c_void_p, "n": c_int64, "i": c_int, "f": c_float}[c] for c in code]


SIGNATURES = {
    "shenhong_softmax_loss": "ipppp" + "nnii",
    "shenhong_rms_forward": "ipnppp" + "nnfi",
    "shenhong_rms_backward": "ipnppppp" + "nni",
    "shenhong_swiglu_forward": "ipnp" + "nni",
    "shenhong_swiglu_backward": "ipnpp" + "nni",
    "shenhong_gather": "ippp" + "nnii",
    "shenhong_gated_forward": "ipppp" + "nni",
    "shenhong_gated_backward": "ippppppp" + "nni",
    "shenhong_combine": "ippp" + "nnii",
    "shenhong_count": "pnnp",
    "shenhong_place": "pnnppp",
    "shenhong_select": "ppp" + "nniiiii",
    "shenhong_attention": "pi",
    "shenhong_nesterov": "ippp" + "nfi",
    "shenhong_decayed_add": "ipp" + "nffi",
    "shenhong_normalise": "ipp" + "nni",
    "shenhong_polynomial": "ipp" + "nnfffi",
    "shenhong_panel": "",
    "shenhong_pair": "i",
    "shenhong_decode": "pp",
    "shenhong_project": "ippp" + "nnni",
    "shenhong_sample": "pnnpp" + "ni",
}
RETURNING = ("shenhong_count", "shenhong_panel", "shenhong_pair")


class _State:
    allowed = os.environ.get("SHENHONG_KERNELS", "1") != "0"
    wanted = True
    library: ctypes.CDLL | None = None
    tried = False
    failed = ""  # why the library cannot be used
    verify: Callable[[], None] | None = None


def _load() -> ctypes.CDLL:
    library = ctypes.CDLL(str(build()))
    structs.check(library)
    for name, code in SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes = _signature(code)
        function.restype = c_int if name in RETURNING else None
    return library


def library() -> ctypes.CDLL | None:
    """The kernels, or None where the PyTorch reference must serve."""
    if not (_State.allowed and _State.wanted):
        return None
    if not _State.tried:
        _State.tried = True
        try:
            _State.library = _load()
            assert _State.verify is not None, "shenhong.numerics says how kernels are verified"
            _State.verify()
        except (BuildError, OSError, AttributeError, ArithmeticError, RuntimeError) as error:
            _State.library, _State.failed = None, str(error)
            log.warning("CPU kernels are off, plain PyTorch serves (slower): %s", error)
    return _State.library


def verify_with(check: Callable[[], None]) -> None:
    """How kernels are compared with their references before the first use; raises ArithmeticError where they differ.

    Handed in from above: what compares is no part of what is compared.
    """
    _State.verify = check


def use_kernels(wanted: bool) -> None:
    """Switch the kernels on (where they can run) or off for this process."""
    _State.wanted = wanted


def kernels_in_use() -> bool:
    """Whether ops on CPU tensors run in the kernels now; the first call may compile them."""
    return library() is not None


def why_off() -> str | None:
    """Why kernels do not run now, or None where they do; the first call may compile them."""
    if library() is not None:
        return None
    if not _State.allowed:
        return "SHENHONG_KERNELS=0 switches the kernels off"
    return _State.failed if _State.wanted else "the kernels are switched off"


def fast(*tensors: Tensor) -> bool:
    """Whether these tensors are the kernels' business: on the CPU, of one dtype the kernels know."""
    dtype = tensors[0].dtype
    return (
        dtype in DTYPES
        and all(t.device.type == "cpu" and t.dtype == dtype for t in tensors)
        and library() is not None
    )


def call(name: str, *arguments: object) -> int:
    """Call a kernel: tensors become pointers, a dtype its code, everything else is a number."""
    assert _State.library is not None
    plain = [
        a.data_ptr() if isinstance(a, Tensor) else DTYPES[a] if isinstance(a, torch.dtype) else a
        for a in arguments
    ]
    return getattr(_State.library, name)(*plain)


def rows_last_contiguous(x: Tensor) -> Tensor:
    """x as a matrix whose rows may be strided but whose last dimension is contiguous."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()
