"""Unsharded reading and writing, and the `based ckpt` commands."""

import pytest
import torch
from ckpt_fragments import CONFIG, SHAPES, full_tensors, save, shard

from based_megatron.checkpoint import full, show, store
from based_megatron.checkpoint.cli import main
from based_megatron.checkpoint.full import read_full, read_whole, write_full
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


MOMENTS = ["store.problems", "store.read_metadata", "full.stored_shapes", "full.read_metadata", "full.read_state"]


@pytest.fixture
def live_run(tmp_path, monkeypatch):
    """A run that saves step 2 and deletes step 1 at one moment of whoever reads it: gives the checkpoint of step 1."""
    older = save(tmp_path / "checkpoints", 1)

    def goes_on(moment):
        module, _, name = moment.partition(".")
        place = {"store": store, "full": full}[module]
        real = getattr(place, name)

        def after_a_save(*args):
            if older.exists():
                store.prune(older.parent, store.Kept(last=1), save(older.parent, 2))
            return real(*args)

        monkeypatch.setattr(place, name, after_a_save)
        return older

    return goes_on


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_that_deletes_what_is_being_read_has_its_newest_read(live_run, tmp_path, capsys, moment):
    older = live_run(moment)
    whole = read_whole(tmp_path)
    assert whole.path.name == "step-00000002" and whole.state["step"] == 2 and not older.exists()
    assert all(torch.equal(whole.weights[name], value) for name, value in full_tensors(2)["model"].items())
    assert capsys.readouterr().err == "", "a checkpoint that was deleted is not damaged"


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_step_that_its_run_deletes_is_not_replaced_by_another(live_run, moment):
    path = live_run(moment)
    with pytest.raises(CheckpointError, match=r"step-00000001 was deleted while it was read.*keep_last"):
        read_full(path)


@pytest.mark.parametrize("command", ["ls", "verify"])
def test_ckpt_leaves_out_what_a_run_deletes_meanwhile(tmp_path, capsys, monkeypatch, command):
    older = save(tmp_path, 1)
    save(tmp_path, 2)
    real = show.named_checkpoints

    def deleted_after_the_look(folder):
        found = real(folder)
        store.prune(folder, store.Kept(last=1), found[0])
        return found

    monkeypatch.setattr(show, "named_checkpoints", deleted_after_the_look)
    assert main([command, str(tmp_path)]) == 0
    assert not older.exists() and capsys.readouterr().out.count("step-") == 1


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


@pytest.mark.parametrize("command", ["ls", "verify"])
@pytest.mark.parametrize(
    ("name", "reason"), [("manifest.json", "manifest.json is unreadable"), ("__0_0_0.distcp", "cannot be read")]
)
def test_ckpt_names_checkpoints_that_lack_a_file(tmp_path, capsys, command, name, reason):
    for step in (1, 2):
        save(tmp_path, step)
    next((tmp_path / "step-00000002").glob(name)).unlink()
    main([command, str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert "step-00000002" in lines[0] and reason in lines[0] and reason not in lines[1]


def test_ckpt_ls_sees_a_file_that_was_cut(tmp_path, capsys):
    path = save(tmp_path, 2)
    stored = next(path.glob("*.distcp"))
    whole = stored.read_bytes()
    stored.write_bytes(whole[:-1])
    assert main(["ls", str(tmp_path)]) == 0
    assert f"has {len(whole) - 1} bytes instead of {len(whole)}" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["ls", "verify", "inspect"])
def test_ckpt_takes_a_checkpoint_under_another_name_and_a_link(tmp_path, capsys, command):
    path = save(tmp_path / "checkpoints", 2)
    link = tmp_path / "best"
    link.symlink_to(path)
    moved = tmp_path / "kept"
    moved.symlink_to(link)
    assert main([command, str(link)]) == 0 and main([command, str(moved)]) == 0
    path.rename(tmp_path / "renamed")
    assert main([command, str(tmp_path / "renamed")]) == 0
    assert "damaged" not in capsys.readouterr().out


def test_ckpt_inspect_of_a_checkpoint_without_a_manifest_is_refused(tmp_path):
    (save(tmp_path, 2) / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* has a manifest.json"):
        main(["inspect", str(tmp_path)])


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
