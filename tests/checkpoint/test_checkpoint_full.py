"""Unsharded reading and writing, and the `based ckpt` commands."""

import pytest
import torch
from ckpt_fragments import CONFIG, SHAPES, full_tensors, save, shard

from based_megatron.checkpoint.cli import main
from based_megatron.checkpoint.full import read_full, write_full
from based_megatron.checkpoint.load import load_checkpoint
from based_megatron.checkpoint.store import verify
from based_megatron.errors import CheckpointError


def test_read_full_gives_unsharded_weights_and_config_from_run_checkpoints_or_step_folder(tmp_path):
    path = save(tmp_path / "checkpoints", 4)
    save(tmp_path / "checkpoints", 3)
    for place in (tmp_path, tmp_path / "checkpoints", path):
        weights, config = read_full(place)
        assert weights.keys() == SHAPES.keys()
        assert all(torch.equal(weights[name], value) for name, value in full_tensors(4)["model"].items())
        assert config == CONFIG


def test_read_full_without_a_checkpoint_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match=f"no checkpoint in {tmp_path}"):
        read_full(tmp_path)


def test_write_full_is_checkpoint_zero_of_a_run_and_loads_as_weights_only(tmp_path):
    weights = full_tensors(0)["model"]
    transposed = {name: value.T.contiguous().T if value.ndim == 2 else value for name, value in weights.items()}
    path = write_full(tmp_path, transposed, CONFIG)
    assert path == tmp_path / "checkpoints" / "step-00000000"
    assert all(torch.equal(value, weights[name]) for name, value in read_full(tmp_path)[0].items())
    fragments = shard(None, 1, 1)[0]
    with pytest.raises(CheckpointError, match="no exp_avg and exp_avg_sq, only weights"):
        load_checkpoint(path, fragments)
    state = load_checkpoint(path, fragments, weights_only=True)
    assert state["step"] == 0
    for fragment in fragments:
        assert torch.equal(fragment.tensors["model"].view(fragment.spec.shape), weights[fragment.spec.name])
        assert not fragment.tensors["exp_avg"].any() and not fragment.tensors["exp_avg_sq"].any()


def test_ckpt_ls_lists_newest_first(tmp_path, capsys):
    for step in (10, 2000):
        save(tmp_path / "checkpoints", step)
    assert main(["ls", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert ["2,000" in lines[0], "10" in lines[1], len(lines)] == [True, True, 2]


def test_ckpt_ls_goes_on_past_a_damaged_one(tmp_path, capsys):
    for step in (1, 2, 3):
        save(tmp_path, step)
    (tmp_path / "step-00000002" / "state.json").write_text("{")
    assert main(["ls", str(tmp_path)]) == 0
    assert ["damaged" in line for line in capsys.readouterr().out.splitlines()] == [False, True, False]


def test_ckpt_inspect_shows_state_and_parameters(tmp_path, capsys):
    save(tmp_path / "checkpoints", 10)
    assert main(["inspect", str(tmp_path), "--tensors"]) == 0
    out = capsys.readouterr().out
    assert "parameters: 175 in 4 tensors" in out
    assert "consumed_tokens: 100" in out and "13 x 6" in out


def test_ckpt_verify_names_the_damaged_file_and_fails(tmp_path, capsys):
    good, bad = save(tmp_path, 1), save(tmp_path, 2)
    assert main(["verify", str(tmp_path)]) == 0
    (bad / "state.json").write_text("{}")
    assert main(["verify", str(bad)]) == 1
    assert main(["verify", str(good)]) == 0
    assert "state.json has 2 bytes" in capsys.readouterr().out
    assert verify(good) == []
