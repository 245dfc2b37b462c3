"""Who a run is, from the files of its folder: what goes on with it, what is refused, and what is written down."""

import functools
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from based_megatron.checkpoint.manifest import MANIFEST, seal_file, write_manifest
from based_megatron.checkpoint.ranks import ALONE
from based_megatron.config import Config, from_dict, load_config, to_dict
from based_megatron.errors import BasedError, ConfigError
from based_megatron.run_folder.files import DONE, EVENTS, LOCK
from based_megatron.run_folder.history import read_history
from based_megatron.run_folder.json_lines import append_line
from based_megatron.train.identity import Identity, identify, locked_folder, record_start

DATA = "c0ffee*1/seed=42/sequence_length_tokens=64"


@pytest.fixture
def run(tmp_path):
    """run({"section.field": value}) is a config of the run folder `mine`."""

    def make(changes: dict[str, Any] | None = None) -> Config:
        values = to_dict(load_config("tiny"))
        for key, value in {"run_dir": str(tmp_path / "mine"), "data.path": "corpus", **(changes or {})}.items():
            *sections, name = key.split(".")
            functools.reduce(dict.__getitem__, sections, values)[name] = value
        return from_dict(values)

    return make


def save(config: Config, step: int, /, **changes: Any) -> Path:
    """What identify looks at of a checkpoint."""
    path = Path(config.run_dir) / "checkpoints" / f"step-{step:08d}"
    path.mkdir(parents=True)
    state = {
        "format": 1,
        "step": step,
        "kinds": ["exp_avg", "model"],
        "config": to_dict(config),
        "data_fingerprint": DATA,
    }
    (path / "state.json").write_text(json.dumps(state | changes))
    (path / ".metadata").touch()
    write_manifest(path, [seal_file(path / name) for name in (".metadata", "state.json")])
    return path


def start(config: Config, from_step: int = 0) -> Identity:
    """A start that was accepted."""
    Path(config.run_dir).mkdir(exist_ok=True)
    identity = identify(config, DATA)
    record_start(config, identity, from_step, ALONE, ["node1", "node1", "node2"])
    return identity


def refusal(config: Config, data: str = DATA) -> str:
    with pytest.raises(ConfigError) as error:
        identify(config, data)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_new_run_has_a_name_and_writes_nothing_until_it_is_recorded(run, tmp_path):
    first, second = identify(run(), DATA), identify(run({"run_name": "other"}), DATA)
    assert (first.run_name, second.run_name) == ("mine", "other") and first.run_id != second.run_id
    assert (first.start, first.saved_step, first.changes) == (1, 0, {})
    assert not (tmp_path / "mine").exists()


def test_a_start_is_written_down(run, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    config = run()
    identity = start(config)
    (entry,) = read_history(tmp_path / "mine")
    assert (entry.start, entry.run_id, entry.run_name, entry.from_step) == (1, identity.run_id, "mine", 0)
    assert (entry.hosts, entry.ranks, entry.job) == (["node1", "node2"], 1, "77")
    assert entry.config == to_dict(config) and entry.command == sys.argv and entry.changes == {}
    assert "torch" in entry.versions and entry.time.endswith("+00:00")
    assert entry.git_commit is None or len(entry.git_commit.removesuffix("-dirty")) == 40
    assert load_config(str(tmp_path / "mine" / "config.yaml")) == config


def test_a_restart_is_the_same_run_and_lists_what_changed(run, tmp_path):
    first = start(run())
    save(run(), 15, run_id=first.run_id)
    config = run({"parallel.tensor": 2, "data.path": "moved"})
    second = start(config, from_step=15)
    assert (second.run_id, second.start, second.saved_step) == (first.run_id, 2, 15)
    assert second.changes == {"data.path": ["corpus", "moved"], "parallel.tensor": [1, 2]}
    assert read_history(tmp_path / "mine")[1].changes == second.changes
    assert read_history(tmp_path / "mine")[1].from_step == 15


def test_a_checkpoint_brings_its_run_into_a_folder_without_a_history(run):
    save(run(), 15, run_id="f00d")
    identity = identify(run(), DATA)
    assert (identity.run_id, identity.start) == ("f00d", 1)


def test_a_second_experiment_is_refused_with_what_changed_and_how_to_allow_it(run):
    path = save(run(), 15)
    line = refusal(run({"optimizer.lr": 0.01, "train.seed": 7, "parallel.tensor": 2}))
    lr = run().optimizer.lr
    assert line.startswith(
        f"{path} is of a run with other settings: optimizer.lr {lr} -> 0.01, train.seed 1111 -> 7. Give"
    )
    assert line.endswith("--checkpoint.allow-changed optimizer.lr train.seed")
    allowed = run({"optimizer.lr": 0.01, "checkpoint.allow_changed": ["optimizer.lr"]})
    assert identify(allowed, DATA).changes["optimizer.lr"] == [lr, 0.01]


def test_the_settings_of_the_checkpoint_count_not_those_of_a_start_that_saved_nothing(run):
    save(run(), 15)
    start(run({"optimizer.lr": 0.01, "checkpoint.allow_changed": ["optimizer.lr"]}), from_step=15)
    assert identify(run(), DATA).changes == {}
    assert "optimizer.lr" in refusal(run({"optimizer.lr": 0.01}))


def test_a_run_from_before_sequences_crossed_blocks_keeps_its_order(run):
    """Its config has no word of it: it goes on as it was, or not without being told."""
    values = to_dict(run())
    del values["data"]["cross_blocks"]
    save(run(), 15, config=values)
    assert "other settings: data.cross_blocks False -> True. Give" in refusal(run())
    assert identify(run({"data.cross_blocks": False}), DATA).changes == {}
    allowed = run({"checkpoint.allow_changed": ["data.cross_blocks"]})
    assert identify(allowed, DATA).changes["data.cross_blocks"] == [False, True]


@pytest.mark.parametrize("name", ["data.path", "data"])
def test_data_may_move_but_not_change_unless_allowed(run, name):
    save(run(), 15)
    other = DATA.replace("c0ffee", "bad")
    line = refusal(run({"data.path": "moved"}), other)
    assert "the content of data.path (fingerprint c0ffee*1 -> bad*1)" in line and line.endswith(
        "allow-changed data.path"
    )
    assert "the content of data.path" in refusal(run({"checkpoint.allow_changed": ["data.seed"]}), other)
    identify(run({"checkpoint.allow_changed": [name]}), other)


def test_data_of_a_mixture_is_named_by_its_sources(run):
    save(run(), 15)
    mixture = run({"data.path": "", "data.sources": [{"path": "a"}, {"path": "b", "weight": 2.0}]})
    assert refusal(mixture, "a*1+b*2/x").endswith("allow-changed data.sources")


def test_a_longer_run_is_another_one_unless_allowed(run):
    save(run(), run().train.steps)
    longer = run().train.steps + 1
    assert "train.steps" in refusal(run({"train.steps": longer}))
    identify(run({"train.steps": longer, "checkpoint.allow_changed": ["train.steps"]}), DATA)


def test_without_resume_a_folder_with_checkpoints_is_refused(run):
    save(run(), 15)
    assert "has a checkpoint of step 15" in refusal(run({"checkpoint.resume": False}))


def test_a_start_after_one_that_saved_nothing_may_change_all_and_is_then_another_run(run):
    first = start(run())
    again, other = identify(run({"monitor.tensorboard": False}), DATA), identify(run({"optimizer.lr": 0.01}), DATA)
    assert again.run_id == first.run_id and list(again.changes) == ["monitor.tensorboard"]
    assert other.run_id != first.run_id and list(other.changes) == ["optimizer.lr"]
    assert other.start == 2


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("sign", ["events", "history", "done", "manifest"])
def test_checkpoints_that_are_gone_do_not_make_a_run_begin_anew(run, tmp_path, sign, resume):
    folder = tmp_path / "mine"
    start(run(), from_step=15 if sign == "history" else 0)
    if sign == "events":
        for step in (10, 15):
            append_line(folder / EVENTS, {"step": step, "event": "checkpoint"})
        append_line(folder / EVENTS, {"step": 99, "event": "step"})
    elif sign == "done":
        (folder / DONE).touch()
    elif sign == "manifest":
        (save(run(), 15) / MANIFEST).unlink()
    step = "?" if sign == "done" else 15
    assert f"{folder} has saved step {step}, but there is no whole checkpoint in {folder}/checkpoints" in refusal(
        run({"checkpoint.resume": resume})
    )


def test_a_checkpoint_of_another_run_is_refused(run):
    save(run(), 5, run_id=start(run()).run_id)
    save(run(), 15, run_id="beef")
    assert "step-00000015 is of run beef, but its folder belongs to run" in refusal(run())


@pytest.mark.parametrize("damage", ["cut", "another value", "deleted"])
def test_a_damaged_state_is_left_to_the_loading_and_the_next_one_asked(run, damage):
    """Its settings may be anything: a flipped bit is no changed setting."""
    save(run(), 10, run_id="f00d")
    state = save(run(), 15, run_id="f00d") / "state.json"
    text = state.read_text()
    state.write_text(text[:-9] if damage == "cut" else text.replace('"f00d"', '"f00e"').replace("1111", "1112"))
    if damage == "deleted":
        state.unlink()
    assert (identify(run(), DATA).run_id, identify(run(), DATA).changes) == ("f00d", {})
    assert "step-00000010 is of a run with other settings: optimizer.lr" in refusal(run({"optimizer.lr": 0.01}))


def test_imported_weights_have_no_settings_to_keep(run):
    save(run(), 0, kinds=["model"], data_fingerprint=None)
    assert identify(run({"optimizer.lr": 0.01}), DATA).changes == {}


def test_a_start_that_trains_on_removes_the_mark_of_the_end(run, tmp_path):
    save(run(), 15)
    (tmp_path / "mine" / DONE).touch()
    start(run(), from_step=15)
    assert not (tmp_path / "mine" / DONE).exists()


@pytest.mark.parametrize("error", [None, KeyError("a bug")])
def test_the_lock_is_held_while_a_folder_is_used_and_not_longer(run, tmp_path, error):
    lock = tmp_path / "mine" / LOCK
    try:
        with locked_folder(run({"train.lock_seconds": 600}), ALONE):
            assert json.loads(lock.read_text())["stale_seconds"] == 600
            with pytest.raises(BasedError, match="in use"), locked_folder(run(), ALONE):
                pass
            assert lock.exists()
            if error:
                raise error
    except KeyError:
        pass
    assert not lock.exists()


A, B = "a" * 32, "b" * 32
ORDER = "/seed=42/cross_blocks/sequence_length_tokens=2048"


def mixed(*weights: float, schedule: tuple[str, ...] = ()) -> dict[str, Any]:
    sources = [{"path": f"/c{place}", "weight": weight} for place, weight in enumerate(weights)]
    return {"data.path": "", "data.sources": sources, "data.schedule": schedule}


@pytest.mark.parametrize(("jumps", "steps_read"), [([], 10), ([[5, 8]], 13)])
def test_weights_may_change_from_the_present_on(run, jumps, steps_read):
    """The past of the order is kept to the sequence; rollbacks have moved it on."""
    config = run(mixed(0.8, 0.2))
    read = steps_read * config.train.global_batch_sequences
    save(config, 10, data_fingerprint=f"{A}*0.8+{B}*0.2{ORDER}", guard={"data_jumps": jumps})
    then = f"{A}*4+{B}*1"
    for later in ("", f"@{read}={B}*1", f"@{read}={A}*1@{10**9}={B}*1"):
        assert identify(config, f"{then}{later}{ORDER}").saved_step == 10
    assert f"{then} -> {then}@{read - 1}={B}*1)" in refusal(config, f"{then}@{read - 1}={B}*1{ORDER}")
    tokens = read * config.data.sequence_length_tokens
    line = refusal(run(mixed(1, 1)), f"{A}*1+{B}*1{ORDER}")
    assert f"leave those of data.sources at 0.8,0.2, and add --data.schedule {tokens}=1.0,1.0)" in line
    allowed = run(mixed(1, 1) | {"checkpoint.allow_changed": ["data.sources"]})
    assert identify(allowed, f"{A}*1+{B}*1{ORDER}").saved_step == 10


def test_equal_shares_are_the_same_mixture(run):
    save(run(mixed(1, 1)), 10, data_fingerprint=f"{A}*1+{B}*1{ORDER}")
    assert identify(run(mixed(2, 2)), f"{A}*1+{B}*1{ORDER}").saved_step == 10
    assert f"{A}*1+{B}*1 -> {B}*1+{A}*1" in refusal(run(mixed(1, 1)), f"{B}*1+{A}*1{ORDER}")
