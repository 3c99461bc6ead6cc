"""The structs that Python fills and the kernels read: field for field as in csrc/*.h.

A field that is wider or elsewhere on one side would let a kernel read or write anything, so `check` compares the size
of every struct and the place and size of every field with what the compiler made of them, whenever kernels are loaded.
"""

from __future__ import annotations

import ctypes
from ctypes import c_double, c_int64, c_void_p
from typing import Any

import numpy as np


class LayoutError(RuntimeError):
    """The kernels and this module do not mean the same struct."""


class Attention(ctypes.Structure):
    """Of attention.h."""

    _fields_ = (
        [
            (n, c_int64)
            for n in ["dtype", "threads", "documents", "tokens", "heads", "plain", "rope", "value"]
        ]
        + [("scale", c_double)]
        + [(n, c_void_p) for n in ["starts", "cosine", "sine", "q", "k", "k_rope", "v"]]
        + [(f"{n}_{axis}", c_int64) for n in ("q", "k", "kr", "v") for axis in ("token", "head")]
        + [(n, c_void_p) for n in ["o", "lse", "d_o", "dq", "dk", "dk_rope", "dv"]]
        + [(f"{n}_{axis}", c_int64) for n in ("dk", "dkr", "dv") for axis in ("token", "head")]
        + [("dk_rope_heads", c_void_p)]
    )


def _struct(name: str, pointers: str = "", numbers: str = "", after: str = "") -> Any:
    """A C struct: pointers, then 64-bit integers, then whatever ``after`` lists as name:kind."""
    kinds: dict[str, Any] = {"d": c_double, "n": c_int64, "p": c_void_p}
    fields: list[tuple[str, Any]] = [(n, c_void_p) for n in pointers.split()] + [
        (n, c_int64) for n in numbers.split()
    ]
    fields += [(n, kinds[k]) for n, k in (item.split(":") for item in after.split())]
    return type(name, (ctypes.Structure,), {"_fields_": fields})


# Of decode.h.
DecodeLayer = _struct(
    "DecodeLayer",
    "norm down q_norm q_b kv_norm k_norm qkv_bias uk uv out mlp_norm dense_gate_up dense_down router bias gate_up "
    "expert_down pool",
    "dense_inner",
)
DecodeModel = _struct(
    "DecodeModel",
    numbers="dtype hidden heads rank nope rope value q_rank experts chosen inner groups kept_groups normalise softmax page key_heads",
    after="scaling:d eps:d latent_eps:d scale:d cosine:p sine:p layers:p",
)
DecodeBatch = _struct(
    "DecodeBatch",
    numbers="threads first_layer last_layer sequences table_width",
    after="starts:p positions:p tables:p tokens:p embedding:p last_norm:p x:p "
    "head:p vocab:n most:n max_new_tokens:p samplings:p stops:p stop_starts:p written:p counts:p",
)

# Sampling of sampling.h, in arrays of many.
SAMPLING = np.dtype(
    [
        ("temperature", np.float32),
        ("top_p", np.float32),
        ("min_p", np.float32),
        ("top_k", np.int32),
        ("uniform", np.float64),
    ]
)


def check(library: ctypes.CDLL) -> None:
    """Error: LayoutError naming the first struct or field that differs."""
    ask = library.shenhong_layout
    ask.argtypes, ask.restype = [ctypes.c_char_p, ctypes.c_char_p, c_void_p], ctypes.c_int
    for name, fields, whole in _layouts():
        for field, place in (*fields.items(), ("", (0, whole))):
            found = (c_int64 * 2)()
            known = ask(name.encode(), field.encode(), found)
            if not known or tuple(found) != place:
                what = f"field {field}" if field else "the size"
                there = f"{found[0]} and {found[1]} bytes" if known else "nothing of that name"
                raise LayoutError(
                    f"struct {name}: {what} is at {place[0]} and {place[1]} bytes in Python, {there} in C++"
                )


def _layouts() -> list[tuple[str, dict[str, tuple[int, int]], int]]:
    """Of each struct its name, offset and size of each field, and its own size."""
    found = []
    for struct in (Attention, DecodeLayer, DecodeModel, DecodeBatch):
        places = {field[0]: getattr(struct, field[0]) for field in struct._fields_}
        fields = {name: (place.offset, place.size) for name, place in places.items()}
        found.append((struct.__name__, fields, ctypes.sizeof(struct)))
    assert SAMPLING.fields is not None
    sampling = {name: (at[1], at[0].itemsize) for name, at in SAMPLING.fields.items()}
    return [*found, ("Sampling", sampling, SAMPLING.itemsize)]
