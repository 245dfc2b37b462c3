"""The entries of a history, and what they say about the code."""

import dataclasses
import subprocess

import pytest

from based_megatron import __version__
from based_megatron.run_folder.files import HISTORY
from based_megatron.run_folder.history import Start, append_start, git_commit, new_run_id, read_history, versions

START = Start(
    start=1,
    run_id="f00d",
    run_name="a run",
    time="2031-05-01T12:00:00+00:00",
    command=["based", "train"],
    config={"train": {"steps": 3}},
    changes={"optimizer.lr": [0.1, 0.2]},
    git_commit=None,
    versions={"torch": "2"},
    hosts=["node1", "node2"],
    ranks=16,
    job="77",
    from_step=0,
)


def test_starts_come_back_in_order_without_one_that_a_crash_has_cut(tmp_path):
    assert read_history(tmp_path) == []
    append_start(tmp_path, START)
    with (tmp_path / HISTORY).open("a") as file:
        file.write('{"start": 2, "run_id"')
    third = dataclasses.replace(START, start=3, from_step=7)
    append_start(tmp_path, third)
    assert read_history(tmp_path) == [START, third]


def test_entries_of_other_versions_are_read_as_far_as_they_are_known(tmp_path):
    (tmp_path / HISTORY).write_text('{"start": 1}\n[]\n')
    append_start(tmp_path, START)
    path = tmp_path / HISTORY
    path.write_text(path.read_text().replace('"ranks": 16', '"ranks": 16, "later": 1'))
    assert read_history(tmp_path) == [START]


@pytest.mark.parametrize("name", ["start", "run_id", "config", "from_step"])
def test_entries_that_are_damaged_are_left_out(tmp_path, name):
    append_start(tmp_path, dataclasses.replace(START, **{name: ["junk"]}))
    append_start(tmp_path, START)
    assert read_history(tmp_path) == [START]


def test_run_ids_differ():
    assert len({new_run_id() for _ in range(10)}) == 10 and new_run_id().isalnum()


def test_versions_name_what_decides_a_run():
    found = versions()
    assert found["based-megatron"] == __version__ and found.keys() == {
        "based-megatron",
        "torch",
        "megatron-core",
        "deepspeed",
    }


def git(folder, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    return subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout


def test_the_commit_is_that_of_the_repository_that_tracks_the_code(tmp_path):
    code, installed = tmp_path / "code", tmp_path / "installed"
    code.mkdir()
    installed.mkdir()
    assert git_commit(code) is None
    git(tmp_path, "init", "-q")
    (code / "a.py").write_text("1")
    (installed / "a.py").write_text("1")
    git(tmp_path, "add", "code")
    git(tmp_path, "commit", "-qm", "first")
    head = git(tmp_path, "rev-parse", "HEAD").strip()
    git(tmp_path, "tag", "v1")
    assert git_commit(code) == head
    assert git_commit(installed) is None, "it lies in the repository of somebody else"
    (code / "a.py").write_text("2")
    assert git_commit(code) == f"{head}-dirty"
