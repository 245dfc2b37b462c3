"""Saving, finding, verifying, pruning and loading checkpoints in one process."""

import json
import os
import resource
from pathlib import Path

import pytest
import torch
from ckpt_fragments import CONFIG, flat, full_tensors, save, shard

from based_megatron import __version__
from based_megatron.checkpoint import manifest
from based_megatron.checkpoint.fragments import Fragment
from based_megatron.checkpoint.load import load_checkpoint
from based_megatron.checkpoint.save import save_checkpoint
from based_megatron.checkpoint.store import (
    GOOD,
    Kept,
    find_checkpoint,
    list_checkpoints,
    newest_good,
    newest_valid,
    prune,
    resolve_checkpoint,
    step_of,
)
from based_megatron.config import from_dict
from based_megatron.errors import CheckpointError
from based_megatron.parallel.sharding import ShardSpec


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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_fragments_on_a_gpu_come_back_bit_for_bit(tmp_path):
    full = full_tensors(0)
    saved, got = (
        [Fragment(f.spec, f.start, f.numel, {k: t.cuda() for k, t in f.tensors.items()}, f.owned) for f in fragments]
        for fragments in (flat(shard(full, 2, 3)), flat(shard(None, 1, 1)))
    )
    load_checkpoint(save_checkpoint(tmp_path, 3, saved, {}), got)
    assert all(
        torch.equal(f.tensors[kind].cpu().view(f.spec.shape), full[kind][f.spec.name]) for f in got for kind in full
    )


def test_copies_are_loaded_but_never_written(tmp_path):
    full, other = full_tensors(0), full_tensors(1)
    original, copy = shard(full, 1, 1)[0], shard(other, 1, 1)[0]
    copy = [Fragment(f.spec, f.start, f.numel, f.tensors, owned=False) for f in copy]
    path = save_checkpoint(tmp_path, 1, [*copy, *original], {})
    load_checkpoint(path, copy)
    assert all(torch.equal(f.tensors["model"].view(f.spec.shape), full["model"][f.spec.name]) for f in copy)


def test_state_comes_back_with_step_versions_and_kinds(tmp_path):
    state = load_checkpoint(save(tmp_path, 12), flat(shard(None, 1, 1)))
    assert (state["step"], state["consumed_tokens"]) == (12, 120)
    assert state["kinds"] == ["exp_avg", "exp_avg_sq", "model"]
    assert (state["versions"]["based-megatron"], state["versions"]["torch"]) == (__version__, torch.__version__)
    assert from_dict(state["config"]) == CONFIG


def test_a_parameter_of_another_shape_is_named_with_both_shapes_and_nothing_is_loaded(tmp_path):
    path = save(tmp_path, 1)
    fragments = flat(shard(None, 1, 1))
    wider = ShardSpec("layers.0.mlp.fc1.weight", (12, 6))
    fragments[1] = Fragment(wider, 0, 72, {kind: torch.full((72,), 7.0) for kind in fragments[1].tensors})
    with pytest.raises(
        CheckpointError, match=r"layers\.0\.mlp\.fc1\.weight is \(10, 6\) there and \(12, 6\)"
    ) as caught:
        load_checkpoint(path, fragments)
    assert "\n" not in str(caught.value)
    assert all((tensor == 7).all() for fragment in fragments for tensor in fragment.tensors.values())


def test_a_parameter_that_the_checkpoint_lacks_is_named(tmp_path):
    fragments = flat(shard(full_tensors(0), 1, 1))
    path = save_checkpoint(tmp_path, 1, fragments[:-1], {})
    with pytest.raises(CheckpointError, match=r"no parameter norm, which is \(7,\)"):
        load_checkpoint(path, fragments)


def test_a_parameter_that_the_model_lacks_is_named(tmp_path):
    path = save(tmp_path, 1)
    with pytest.raises(CheckpointError, match=r"has a parameter norm of \(7,\), not in this model"):
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
    return [".metadata", "__0_0_0.distcp", "state.json", "manifest.json"]


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
    assert len(skipped) == 1
    assert str(bad) in skipped[0] and name in skipped[0] and "\n" not in skipped[0]


def test_a_damaged_checkpoint_named_directly_is_refused(tmp_path):
    path = save(tmp_path, 1)
    with (path / "__0_0_0.distcp").open("ab") as stream:
        stream.write(b"x")
    with pytest.raises(CheckpointError, match=r"__0_0_0\.distcp has \d+ bytes instead of \d+"):
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
    assert prune(tmp_path, Kept(last=2), saved=paths[3]) == [paths[1], paths[0]]
    assert sorted(os.listdir(tmp_path)) == ["step-00000003", "step-00000004"]


def test_prune_never_takes_the_one_just_saved_though_later_steps_are_there(tmp_path):
    older, saved, later = (save(tmp_path, step) for step in (1, 2, 9))
    prune(tmp_path, Kept(last=1), saved=saved)
    assert list_checkpoints(tmp_path) == [later, saved]
    assert not older.exists()


def steps(folder: Path) -> list[int]:
    return sorted(map(step_of, list_checkpoints(folder)))


def test_prune_keeps_the_first_checkpoint_of_every_so_many_steps(tmp_path):
    """Saves by time come at any step: what counts is the interval that they are in, the first of which has none."""
    kept = Kept(last=1, every_steps=10)
    left = []
    for step in (3, 8, 12, 15, 20, 27, 41):
        prune(tmp_path, kept, saved=save(tmp_path, step))
        left.append(steps(tmp_path))
    assert left[2:] == [[12], [12, 15], [12, 20], [12, 20, 27], [12, 20, 41]]


def save_as(folder: Path, step: int, good: bool) -> Path:
    return save_checkpoint(folder, step, flat(shard(full_tensors(step), 1, 1)), {GOOD: good})


def test_the_newest_good_one_is_never_pruned(tmp_path):
    save_as(tmp_path, 1, good=True)
    good = save_as(tmp_path, 2, good=True)
    for step in (3, 4, 5):
        prune(tmp_path, Kept(last=1), saved=save_as(tmp_path, step, good=False))
    assert steps(tmp_path) == [2, 5] and newest_good(tmp_path) == good
    prune(tmp_path, Kept(last=1), saved=save_as(tmp_path, 6, good=True))
    assert steps(tmp_path) == [6]


def test_one_that_is_proven_good_stays(tmp_path):
    """A loss that has risen is known to have four steps later: what was saved since may be bad. The next to be proven stays too."""
    left = []
    for step in (2, 4, 6, 7, 8, 9, 10, 13, 30):
        prune(tmp_path, Kept(last=1, proven_after_steps=4), saved=save_as(tmp_path, step, good=True))
        left.append(steps(tmp_path))
    assert left == [[2], [2, 4], [2, 4, 6], [2, 4, 7], [4, 7, 8], [4, 7, 9], [4, 7, 10], [7, 10, 13], [13, 30]]


def test_the_newest_good_one_is_by_step_and_may_be_asked_for_before_a_step(tmp_path):
    """One that does not say is good: older versions saved no others. One whose state is unreadable is not."""
    assert newest_good(tmp_path) is None
    silent, good, bad = save(tmp_path, 5), save_as(tmp_path, 10, good=True), save_as(tmp_path, 15, good=False)
    assert newest_good(tmp_path) == good == newest_good(tmp_path, before_step=15)
    assert newest_good(tmp_path, before_step=10) == silent
    assert newest_good(tmp_path, before_step=5) is None
    (bad / "state.json").write_text("[")
    assert newest_good(tmp_path) == good


@pytest.mark.parametrize("name", ["backup", "step-200", "step-00000050", "step-00000300"])
def test_a_newer_checkpoint_under_another_name_is_told(tmp_path, name):
    good, renamed = save(tmp_path, 100), save(tmp_path, 200)
    renamed.rename(tmp_path / name)
    told: list[str] = []
    assert newest_valid(tmp_path, told.append) == good
    (line,) = told
    assert str(tmp_path / name) in line and "200" in line


def test_an_older_one_under_another_name_and_an_unfinished_save_are_not_told(tmp_path):
    save(tmp_path, 100).rename(tmp_path / "backup")
    unfinished, good = save(tmp_path, 300), save(tmp_path, 200)
    unfinished.rename(tmp_path / "step-00000300.tmp")
    assert newest_valid(tmp_path, refuse) == good


def test_a_folder_with_renamed_or_emptied_checkpoints_alone_does_not_start_over(tmp_path):
    path = save(tmp_path, 100)
    (path / "manifest.json").rename(tmp_path / "manifest.json")
    with pytest.raises(CheckpointError, match="all 1 checkpoints"):
        newest_valid(tmp_path, [].append)
    (tmp_path / "manifest.json").rename(path / "manifest.json")
    path.rename(tmp_path / "backup")
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* but backup: it holds the checkpoint of step 100"):
        newest_valid(tmp_path, refuse)


@pytest.mark.parametrize("listed", [[], ["state.json"], [".metadata"], [".metadata", "state.json"]])
def test_a_manifest_must_list_all_files_of_the_checkpoint(tmp_path, listed):
    good, bad = save(tmp_path, 1), save(tmp_path, 2)
    files = json.loads((bad / "manifest.json").read_text())["files"]
    entries = [entry for entry in files if entry["name"] in listed]
    (bad / "manifest.json").write_text(json.dumps({"files": entries}))
    told: list[str] = []
    assert newest_valid(tmp_path, told.append) == good
    missing = {".metadata", "state.json"} - set(listed) or {"__0_0_0.distcp"}
    assert all(name in told[0] for name in missing)


def test_ranks_that_verify_read_each_file_once(tmp_path, monkeypatch):
    path = save(tmp_path, 1)
    read: list[str] = []
    hash_file = manifest._hash
    monkeypatch.setattr(manifest, "_hash", lambda file: (read.append(file.name), hash_file(file))[1])
    entries, unreadable = manifest.listed(path)
    assert not unreadable
    assert [manifest.problems(path, entries[rank::3]) for rank in range(3)] == [[], [], []]
    assert sorted(read) == sorted(set(os.listdir(path)) - {"manifest.json"})


def test_prune_with_zero_keeps_all(tmp_path):
    paths = [save(tmp_path, step) for step in (1, 2, 3)]
    prune(tmp_path, Kept(last=0), saved=paths[2])
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


def test_everything_is_flushed_to_the_disk_before_the_folder_gets_its_name(tmp_path, monkeypatch):
    events: list[str] = []
    fsync, rename = os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(Path(f"/proc/self/fd/{fd}").readlink().name), fsync(fd)))
    monkeypatch.setattr(os, "rename", lambda a, b: (events.append(f"rename to {Path(b).name}"), rename(a, b)))
    path = save(tmp_path, 3)
    named = events.index("rename to step-00000003")
    assert set(os.listdir(path)) <= set(events[events.index("rename to .metadata") : named])
    assert events[named - 1] == "step-00000003.tmp"
    assert events[named + 1 :] == [tmp_path.name]


def test_a_checkpoint_half_deleted_by_prune_is_not_taken_for_one(tmp_path, monkeypatch):
    old, new = save(tmp_path, 1), save(tmp_path, 2)

    def interrupted(path):
        (path / "state.json").unlink()
        raise OSError("stale file handle")

    monkeypatch.setattr("shutil.rmtree", interrupted)
    with pytest.raises(CheckpointError, match="cannot delete an old checkpoint: stale file handle"):
        prune(tmp_path, Kept(last=1), saved=new)
    assert list_checkpoints(tmp_path) == [new]
    assert not old.exists()


def test_stale_remains_of_the_same_step_do_not_end_up_in_a_checkpoint(tmp_path):
    stale = tmp_path / "step-00000003.tmp"
    stale.mkdir()
    (stale / "__0_7.distcp").write_text("left by a killed run")
    assert not (save(tmp_path, 3) / "__0_7.distcp").exists()


def test_a_checkpoint_of_an_unknown_format_is_refused(tmp_path):
    path = save(tmp_path, 1)
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({**state, "format": 2}))
    with pytest.raises(CheckpointError, match="format 2, this version reads 1"):
        load_checkpoint(path, flat(shard(None, 1, 1)))
