"""Whatever lies in the way of the files of a run is refused in one line, before anything is written."""

import os

import pytest

from based_megatron.errors import ConfigError
from based_megatron.run_folder.check import check_contents
from based_megatron.run_folder.files import FILES, FOLDERS

NAMES = (*FILES, *FOLDERS, "halt")


def refusal(folder) -> str:
    before = sorted(folder.iterdir())
    with pytest.raises(ConfigError) as error:
        check_contents(folder, "halt")
    assert sorted(folder.iterdir()) == before
    return str(error.value)


def test_an_empty_folder_none_and_that_of_a_run_pass(tmp_path):
    check_contents(tmp_path / "none", "halt")
    check_contents(tmp_path, "halt")
    (tmp_path / "elsewhere").mkdir()
    for name in NAMES:
        if name in FOLDERS:
            (tmp_path / name).symlink_to(tmp_path / "elsewhere")
        else:
            (tmp_path / name).touch()
    (tmp_path / "notes").mkdir()
    check_contents(tmp_path, "halt")


@pytest.mark.parametrize("name", NAMES)
def test_another_kind_of_thing_under_a_name_of_ours_is_refused(tmp_path, name):
    path = tmp_path / name
    path.symlink_to(tmp_path / "nothing")
    assert (
        refusal(tmp_path)
        == f"{path} is a link to nothing, but the run keeps its own there: move it away, or change run_dir"
    )
    path.unlink()
    path.touch() if name in FOLDERS else path.mkdir()
    assert f"{path} is {'no' if name in FOLDERS else 'a'} folder, but" in refusal(tmp_path)


def test_a_pipe_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "heartbeat")
    assert "heartbeat is no file" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("name", "words"), [("events.jsonl", "is a file without"), ("checkpoints", "is a folder without")]
)
def test_what_cannot_be_written_is_refused(tmp_path, monkeypatch, name, words):
    """Rights do not bind the user that tests may run as."""
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "events.jsonl").touch()
    monkeypatch.setattr(os, "access", lambda path, mode: not (path == tmp_path / name and mode & os.W_OK))
    assert f"{name} {words} permission" in refusal(tmp_path)


def test_a_folder_that_cannot_be_searched_is_one_line(tmp_path, monkeypatch):
    def denied(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os.path, "lexists", denied)
    assert "config.yaml cannot be looked at (Permission denied)" in refusal(tmp_path)
