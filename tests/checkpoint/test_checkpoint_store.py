"""Saving, finding, verifying, pruning and loading checkpoints in one process."""

import json
import os
import resource
from pathlib import Path

import pytest
import torch
from ckpt_fragments import SHAPES, flat, full_tensors, shard

from based_megatron.checkpoint import (
    find_checkpoint,
    load_checkpoint,
    newest_valid,
    prune,
    read_full,
    resolve_checkpoint,
    save_checkpoint,
    verify,
    write_full,
)
from based_megatron.checkpoint.cli import main
from based_megatron.checkpoint.store import list_checkpoints
from based_megatron.config import Config, ModelConfig, to_dict
from based_megatron.errors import CheckpointError

CONFIG = Config(model=ModelConfig(hidden_size=6))


def save(folder: Path, step: int) -> Path:
    state = {"consumed_tokens": step * 10, "config": to_dict(CONFIG)}
    return save_checkpoint(folder, step, flat(shard(full_tensors(step), 2, 2)), state)


def refuse(line: str) -> None:
    raise AssertionError(f"nothing should be skipped: {line}")


@pytest.mark.parametrize("saved", [(1, 1), (2, 3)])
@pytest.mark.parametrize("loaded", [(1, 1), (1, 4), (2, 2), (3, 2)])
def test_any_tiling_loads_into_any_other_bit_for_bit_and_padding_becomes_zero(tmp_path, saved, loaded):
    full = full_tensors(0)
    path = save_checkpoint(tmp_path, 3, flat(shard(full, *saved)), {})
    for got, expected in zip(shard(None, *loaded), shard(full, *loaded), strict=True):
        load_checkpoint(path, got)
        for a, b in zip(got, expected, strict=True):
            assert all(torch.equal(a.tensors[kind], b.tensors[kind]) for kind in a.tensors), a.spec.name


def test_copies_are_loaded_but_never_written(tmp_path):
    full, other = full_tensors(0), full_tensors(1)
    original, copy = shard(full, 1, 1)[0], shard(other, 1, 1)[0]
    copy = [type(f)(f.spec, f.start, f.numel, f.tensors, owned=False) for f in copy]
    path = save_checkpoint(tmp_path, 1, [*copy, *original], {})
    load_checkpoint(path, copy)
    assert all(torch.equal(f.tensors["model"].view(f.spec.shape), full["model"][f.spec.name]) for f in copy)


def test_state_comes_back_with_step_versions_and_kinds(tmp_path):
    state = load_checkpoint(save(tmp_path, 12), flat(shard(None, 1, 1)))
    assert (state["step"], state["consumed_tokens"]) == (12, 120)
    assert state["kinds"] == ["exp_avg", "exp_avg_sq", "model"]
    assert state["versions"]["torch"] == torch.__version__
    assert state["config"] == to_dict(CONFIG)


def test_a_parameter_of_another_shape_is_named_with_both_shapes_and_nothing_is_loaded(tmp_path):
    path = save(tmp_path, 1)
    fragments = flat(shard(None, 1, 1))
    wider = type(fragments[1].spec)("layers.0.mlp.fc1.weight", (12, 6))
    fragments[1] = type(fragments[1])(wider, 0, 72, {kind: torch.full((72,), 7.0) for kind in fragments[1].tensors})
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.fc1\.weight is \(10, 6\) there and \(12, 6\)") as caught:
        load_checkpoint(path, fragments)
    assert "\n" not in str(caught.value)
    assert all((tensor == 7).all() for fragment in fragments for tensor in fragment.tensors.values())


def test_a_parameter_that_the_checkpoint_lacks_is_named(tmp_path):
    fragments = flat(shard(full_tensors(0), 1, 1))
    path = save_checkpoint(tmp_path, 1, fragments[:-1], {})
    with pytest.raises(CheckpointError, match=r"no parameter norm, which is \(6,\)"):
        load_checkpoint(path, fragments)


def test_a_parameter_that_the_model_lacks_is_named(tmp_path):
    path = save(tmp_path, 1)
    with pytest.raises(CheckpointError, match=r"has a parameter norm of \(6,\), not in this model"):
        load_checkpoint(path, flat(shard(None, 1, 1))[:-1])


def test_newest_is_by_step_number_and_ignores_unfinished_ones(tmp_path):
    for step in (900, 1000, 20):
        save(tmp_path, step)
    (tmp_path / "step-00002000.tmp").mkdir()
    (tmp_path / "step-00003000").mkdir()  # no manifest
    assert find_checkpoint(tmp_path) == tmp_path / "step-00001000"
    assert find_checkpoint(tmp_path / "none") is None
    assert newest_valid(tmp_path / "none", refuse) is None


def files_of_a_checkpoint() -> list[str]:
    return [".metadata", "__0_0.distcp", "state.json", "manifest.json"]


@pytest.mark.parametrize("name", files_of_a_checkpoint())
@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_damage_to_the_newest_falls_back_to_the_one_before_and_says_so(tmp_path, name, damage):
    good, bad = save(tmp_path, 100), save(tmp_path, 200)
    content = bytearray((bad / name).read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 0xFF if name == "manifest.json" else 0x01
    if damage == "delete":
        (bad / name).unlink()
    else:
        (bad / name).write_bytes(content if damage == "flip" else content[:-1])
    skipped: list[str] = []
    assert newest_valid(tmp_path, skipped.append) == good
    if (name, damage) == ("manifest.json", "delete"):
        assert skipped == []  # without a manifest it was never complete
    else:
        assert len(skipped) == 1
        assert str(bad) in skipped[0] and name in skipped[0] and "\n" not in skipped[0]


def test_a_damaged_checkpoint_named_directly_is_refused(tmp_path):
    path = save(tmp_path, 1)
    with (path / "__0_0.distcp").open("ab") as stream:
        stream.write(b"x")
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp has \d+ bytes instead of \d+"):
        resolve_checkpoint(path, refuse)


def test_only_damaged_checkpoints_is_an_error_not_a_fresh_start(tmp_path):
    for step in (1, 2):
        (save(tmp_path, step) / "state.json").write_text("{}")
    skipped: list[str] = []
    with pytest.raises(CheckpointError, match="all 2 checkpoints"):
        newest_valid(tmp_path, skipped.append)
    assert len(skipped) == 2


def test_saving_a_step_again_replaces_it_and_leaves_nothing_else(tmp_path):
    save(tmp_path, 5)
    path = save_checkpoint(tmp_path, 5, flat(shard(full_tensors(77), 1, 1)), {})
    got = shard(None, 1, 1)[0]
    load_checkpoint(path, got)
    assert torch.equal(got[0].tensors["model"].view(13, 6), full_tensors(77)["model"]["embedding.weight"])
    assert os.listdir(tmp_path) == ["step-00000005"]


def test_a_kill_between_the_two_renames_of_a_replacement_loses_nothing(tmp_path):
    path = save(tmp_path, 5)
    path.rename(tmp_path / "step-00000005.old")
    assert newest_valid(tmp_path, refuse) == tmp_path / "step-00000005.old"


def test_prune_keeps_the_last_ones_and_clears_unfinished_ones(tmp_path):
    paths = [save(tmp_path, step) for step in (1, 2, 3, 4)]
    (tmp_path / "step-00000009.tmp").mkdir()
    (tmp_path / "step-00000002.old").mkdir()
    assert prune(tmp_path, 2, saved=paths[3]) == [paths[1], paths[0]]
    assert sorted(os.listdir(tmp_path)) == ["step-00000003", "step-00000004"]


def test_prune_never_takes_the_one_just_saved_though_later_steps_are_there(tmp_path):
    older, saved, later = (save(tmp_path, step) for step in (1, 2, 9))
    prune(tmp_path, 1, saved=saved)
    assert list_checkpoints(tmp_path) == [later, saved]
    assert not older.exists()


def test_prune_with_zero_keeps_all(tmp_path):
    paths = [save(tmp_path, step) for step in (1, 2, 3)]
    prune(tmp_path, 0, saved=paths[2])
    assert list_checkpoints(tmp_path) == paths[::-1]


@pytest.mark.parametrize("limit_bytes", [0, 5000])
def test_a_full_disk_is_one_line_and_leaves_the_old_checkpoint_and_no_remains(tmp_path, limit_bytes):
    """The kernel refuses to grow a file beyond the limit, as a full disk does: at the first byte, or among the tensors."""
    old = save(tmp_path, 1)
    fragments = flat(shard(full_tensors(1), 1, 1))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
    try:
        with pytest.raises(CheckpointError) as caught:
            save_checkpoint(tmp_path, 2, fragments, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "step 2 was not saved" in str(caught.value) and "\n" not in str(caught.value)
    assert "File too large" in str(caught.value)
    assert os.listdir(tmp_path) == [old.name]
    assert newest_valid(tmp_path, refuse) == old
    save_checkpoint(tmp_path, 2, fragments, {})  # and it works once there is room


def test_stale_remains_of_the_same_step_do_not_end_up_in_a_checkpoint(tmp_path):
    stale = tmp_path / "step-00000003.tmp"
    stale.mkdir()
    (stale / "__0_7.distcp").write_text("left by a killed run")
    assert not (save(tmp_path, 3) / "__0_7.distcp").exists()


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


def test_a_checkpoint_of_an_unknown_format_is_refused(tmp_path):
    path = save(tmp_path, 1)
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({**state, "format": 2}))
    with pytest.raises(CheckpointError, match="format 2, this version reads 1"):
        load_checkpoint(path, flat(shard(None, 1, 1)))


def test_ckpt_ls_lists_newest_first(tmp_path, capsys):
    for step in (10, 2000):
        save(tmp_path / "checkpoints", step)
    assert main(["ls", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert ["2,000" in lines[0], "10" in lines[1], len(lines)] == [True, True, 2]


def test_ckpt_inspect_shows_state_and_parameters(tmp_path, capsys):
    save(tmp_path / "checkpoints", 10)
    assert main(["inspect", str(tmp_path), "--tensors"]) == 0
    out = capsys.readouterr().out
    assert "parameters: 174 in 4 tensors" in out
    assert "consumed_tokens: 100" in out and "13 x 6" in out


def test_ckpt_verify_names_the_damaged_file_and_fails(tmp_path, capsys):
    good, bad = save(tmp_path, 1), save(tmp_path, 2)
    assert main(["verify", str(tmp_path)]) == 0
    (bad / "state.json").write_text("{}")
    assert main(["verify", str(bad)]) == 1
    assert main(["verify", str(good)]) == 0
    assert "state.json has 2 bytes" in capsys.readouterr().out
    assert verify(good) == []
