"""Checkpoints: exact, whole or refused by name."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shenhong.errors import CheckpointError
from shenhong.train import checkpoint
from shenhong.train.checkpoint import Progress


def write(root, step):
    model = {"w": torch.arange(12.0).view(3, 4) + step}
    return checkpoint.save(root, Progress(step, 3.5, 1.0), model, {"m": torch.ones(3) * step})


def test_round_trip_restores_tensors_progress_and_random_state(tmp_path):
    torch.manual_seed(5)
    write(tmp_path, 7)
    expected = torch.rand(3)
    torch.manual_seed(6)
    progress, model, optimizer = checkpoint.load_newest(tmp_path)
    assert progress == Progress(7, 3.5, 1.0)
    assert torch.equal(model["w"], torch.arange(12.0).view(3, 4) + 7)
    assert torch.equal(optimizer["m"], torch.full((3,), 7.0))
    assert torch.equal(torch.rand(3), expected)


def test_the_newest_two_are_kept_and_none_is_none(tmp_path):
    assert checkpoint.load_newest(tmp_path) is None
    for step in (1, 2, 3):
        write(tmp_path, step)
    assert [p.name for p in checkpoint.saved(tmp_path)] == ["step-000002", "step-000003"]


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_truncation_or_flipped_byte_is_refused_by_name(tmp_path, data):
    write(tmp_path, 1)
    folder = write(tmp_path, 2)
    name = data.draw(st.sampled_from(["model.safetensors", "optimizer.safetensors", "state.json"]))
    good = (folder / name).read_bytes()
    place = data.draw(st.integers(0, len(good) - 1))
    if data.draw(st.booleans()):
        bad = good[:place]
    else:
        bad = (
            good[:place]
            + bytes([good[place] ^ (1 << data.draw(st.integers(0, 7)))])
            + good[place + 1 :]
        )
    (folder / name).write_bytes(bad)
    with pytest.raises(CheckpointError, match=r"step-000002.*go on from step-000001"):
        checkpoint.load_newest(tmp_path)
    assert (tmp_path / "step-000001" / "model.safetensors").exists()
