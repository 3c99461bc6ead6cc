"""The GGUF reader: reads what the gguf package writes, and refuses every damaged file in one line."""

from __future__ import annotations

import struct
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shenhong.errors import ModelError
from shenhong.export.gguf_file import KINDS, open_gguf

METADATA: dict[str, Any] = {
    "a.int": 7,
    "a.float": 0.5,
    "a.flag": True,
    "a.words": ["深", "", "红"],
    "a.many": [1, -2],
}
KINDS_WRITTEN = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"]


def write(path, kinds=KINDS_WRITTEN):
    """A file with one 3 x 64 tensor of each kind; returns the tensors before they were quantised."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("a.int", 7)
    writer.add_float32("a.float", 0.5)
    writer.add_bool("a.flag", True)
    writer.add_array("a.words", METADATA["a.words"])
    writer.add_array("a.many", METADATA["a.many"])
    values = np.random.default_rng(0).standard_normal((3, 64)).astype(np.float32)
    for name in kinds:
        kind = gguf.GGMLQuantizationType[name]
        raw = gguf.quantize(values, kind)
        writer.add_tensor(f"t.{name}", raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "whole.gguf"
    write(path)
    return path.read_bytes()


def test_reads_what_the_package_writes(tmp_path):
    path = tmp_path / "x.gguf"
    values = write(path)
    file = open_gguf(path)
    assert METADATA.items() <= file.metadata.items()
    assert file.metadata["general.architecture"] == "llama"
    assert list(file.tensors) == [f"t.{kind}" for kind in KINDS_WRITTEN]
    for reference in gguf.GGUFReader(path).tensors:
        ours = file.read(reference.name)
        theirs = gguf.dequantize(reference.data, reference.tensor_type)
        info = file.tensors[reference.name]
        assert info.shape == (3, 64) and info.kind == reference.tensor_type.name
        assert ours.dtype == torch.float32 and np.array_equal(ours.numpy(), theirs)
        assert np.abs(ours.numpy() - values).max() < (0.4 if info.kind.startswith("Q4") else 0.2)
    assert torch.equal(file.read("t.F32"), torch.from_numpy(values))


@pytest.mark.parametrize("kind", [name for name, block, _ in KINDS.values() if block == 256])
def test_k_quants_are_read_by_the_row(tmp_path, kind):
    number = gguf.GGMLQuantizationType[kind]
    raw = np.random.default_rng(1).integers(0, 64, (2, gguf.GGML_QUANT_SIZES[number][1]), np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tensor("k", raw, raw_dtype=number)
    for step in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{step}_to_file")()
    writer.close()
    assert open_gguf(tmp_path / "x.gguf").read("k").shape == (2, 256)


def test_every_truncation_is_refused(tmp_path, whole):
    path = tmp_path / "cut.gguf"
    (tmp_path / "whole.gguf").write_bytes(whole)
    last = list(open_gguf(tmp_path / "whole.gguf").tensors.values())[-1]
    end = last.start + last.nbytes  # only padding comes after
    for cut in [*range(0, end, 29), end - 1]:
        path.write_bytes(whole[:cut])
        with pytest.raises(ModelError, match=r"cut.gguf: .*download the file again"):
            open_gguf(path)


def header(*, version=3, tensors=0, pairs=0, rest=b""):
    return b"GGUF" + struct.pack("<IQQ", version, tensors, pairs) + rest


def text(value):
    return struct.pack("<Q", len(value)) + value


def tensor(shape=(32,), kind=0, offset=0, name=b"t", dimensions=None):
    count = len(shape) if dimensions is None else dimensions
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", count, *shape, kind, offset)


PAD = bytes(4096)
HOSTILE = {
    "magic": (b"GGML" + PAD, "not a GGUF"),
    "empty": (b"", "not a GGUF"),
    "version 1": (header(version=1, rest=PAD), "version 1"),
    "big-endian": (header(version=3 << 24, rest=PAD), "little-endian"),
    "tensors": (header(tensors=1 << 63, rest=PAD), "9223372036854775808 tensors"),
    "pairs": (header(pairs=1 << 40, rest=PAD), "metadata pairs"),
    "long key": (header(pairs=1, rest=struct.pack("<Q", 1 << 62) + PAD), "characters"),
    "key type": (header(pairs=1, rest=text(b"k") + struct.pack("<I", 77) + PAD), "type 77"),
    "not UTF-8": (header(pairs=1, rest=text(b"\xff") + PAD), "UTF-8"),
    "no name": (header(pairs=1, rest=text(b"k\nl") + PAD), "is no name"),
    "array": (
        header(pairs=1, rest=text(b"k") + struct.pack("<IIQ", 9, 8, 1 << 50) + PAD),
        "strings",
    ),
    "nested": (header(pairs=1, rest=text(b"k") + struct.pack("<IIQ", 9, 9, 1) + PAD), "type 9"),
    "flag": (header(pairs=1, rest=text(b"k") + struct.pack("<IB", 7, 3) + PAD), "neither true"),
    "twice": (header(pairs=2, rest=(text(b"k") + struct.pack("<IB", 0, 3)) * 2 + PAD), "twice"),
    "alignment": (
        header(pairs=1, rest=text(b"general.alignment") + struct.pack("<II", 4, 0) + PAD),
        "power of two",
    ),
    "kind": (header(tensors=1, rest=tensor(kind=99) + PAD), "stored as 99"),
    "known kind": (header(tensors=1, rest=tensor(kind=39) + PAD), "MXFP4"),
    "no elements": (header(tensors=1, rest=tensor((0,)) + PAD), "shape"),
    "overflow": (header(tensors=1, rest=tensor((1 << 32, 1 << 32)) + PAD), "shape"),
    "block": (header(tensors=1, rest=tensor((33,), kind=8) + PAD), "shape"),
    "dimensions": (header(tensors=1, rest=tensor(dimensions=1 << 31) + PAD), "dimensions"),
    "offset": (header(tensors=1, rest=tensor(offset=1 << 63) + PAD), "ends at"),
    "unaligned": (header(tensors=1, rest=tensor(offset=1) + PAD), "aligned"),
    "overlap": (header(tensors=2, rest=tensor() + tensor(name=b"u") + PAD), "over another"),
    "same name": (header(tensors=2, rest=tensor() + tensor(offset=128) + PAD), "twice"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers_are_refused(tmp_path, case):
    content, words = HOSTILE[case]
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=words) as caught:
        open_gguf(path)
    assert "\n" not in str(caught.value)


def test_what_is_not_there_is_named(tmp_path, whole):
    with pytest.raises(ModelError, match=r"none.gguf: cannot be read"):
        open_gguf(tmp_path / "none.gguf")
    path = tmp_path / "x.gguf"
    path.write_bytes(whole)
    file = open_gguf(path)
    with pytest.raises(ModelError, match=r"tensor blk\.9 missing"):
        file.read("blk.9")
    path.write_bytes(whole + b"more")
    with pytest.raises(ModelError, match="changed while"):
        file.read("t.F32")


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_any_change_of_a_header_is_read_or_refused(tmp_path_factory, whole, data):
    """Never another exception, and what is accepted can be read."""
    changed = bytearray(whole)
    edge = data.draw(st.sampled_from([0, 1, 255, 1 << 16, (1 << 32) - 1, (1 << 64) - 1]))
    for at in data.draw(st.lists(st.integers(0, 900), min_size=1, max_size=3)):
        width = data.draw(st.sampled_from([1, 4, 8]))
        changed[at : at + width] = (edge % (1 << 8 * width)).to_bytes(width, "little")
    path = tmp_path_factory.getbasetemp() / "changed.gguf"
    path.write_bytes(changed)
    try:
        file = open_gguf(path)
    except ModelError:
        return
    for name, info in file.tensors.items():
        assert file.read(name).shape == info.shape
