import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from shenhong.errors import DataError
from shenhong.train.data import Rows, order


@given(
    rows=st.integers(1, 50),
    seed=st.integers(0, 2**31 - 1),
    cuts=st.lists(st.integers(0, 70), min_size=1, max_size=6),
)
def test_the_order_does_not_depend_on_how_it_is_cut(rows, seed, cuts):
    whole = order(rows, seed, 0, sum(cuts)) if sum(cuts) else torch.tensor([])
    start, parts = 0, []
    for count in cuts:
        if count:
            parts.append(order(rows, seed, start, count))
            start += count
    assert torch.equal(whole, torch.cat(parts) if parts else torch.tensor([]))
    for epoch in range(len(whole) // rows):
        assert sorted(whole[epoch * rows : (epoch + 1) * rows].tolist()) == list(range(rows))


def test_epochs_and_seeds_differ():
    assert not torch.equal(order(100, 1, 0, 100), order(100, 1, 100, 100))
    assert not torch.equal(order(100, 1, 0, 100), order(100, 2, 0, 100))


def test_prompt_weight_reaches_prompts_only(tmp_path):
    bos, eos, pad = 0, 1, 2
    tokens = torch.tensor([[bos, 7, 8, 9, eos, bos, 7, pad]], dtype=torch.uint16)
    counted = torch.tensor([[0, 0, 1, 1, 1, 0, 0, 0]], dtype=torch.uint8)
    save_file({"tokens": tokens, "counted": counted}, tmp_path / "t.safetensors")
    weights = Rows(tmp_path / "t.safetensors", bos, pad, 0.25).batch(torch.tensor([0])).weights_N
    assert weights.tolist() == [0, 0.25, 1, 1, 1, 0, 0.25, 0]


def test_missing_damaged_and_empty_files_are_named(tmp_path):
    with pytest.raises(DataError, match=r"t\.safetensors is missing or damaged"):
        Rows(tmp_path / "t.safetensors", 0, 2)
    (tmp_path / "t.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(DataError, match="damaged"):
        Rows(tmp_path / "t.safetensors", 0, 2)
    empty = {
        "tokens": torch.zeros(0, 8, dtype=torch.uint16),
        "counted": torch.zeros(0, 8, dtype=torch.uint8),
    }
    save_file(empty, tmp_path / "t.safetensors")
    with pytest.raises(DataError, match="no rows"):
        Rows(tmp_path / "t.safetensors", 0, 2)
