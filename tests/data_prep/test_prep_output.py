"""The place that `based prep` writes to: it removes what it has made and nothing else, and one process writes there at a time."""

import dataclasses
import json
import logging
import os
import signal
import sys
from pathlib import Path

import pytest

from based_megatron.data.manifest import MANIFEST_NAME, load_manifest
from based_megatron.data_prep import prepare as prepare_module
from based_megatron.data_prep.cli import main
from based_megatron.data_prep.config import PrepConfig
from based_megatron.data_prep.output import resolved_output, workplace
from based_megatron.data_prep.prepare import prepare
from based_megatron.errors import DataError
from based_megatron.run_folder.files import LOCK
from based_megatron.run_folder.lock import this_process

GONE = dataclasses.replace(this_process(60, {}), start=1)
"""An owner whose number another process has now."""


@pytest.fixture
def config(tmp_path) -> PrepConfig:
    """Twenty short documents, in a folder of their own."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text("".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(20)))
    return PrepConfig((str(tmp_path / "in"),), str(tmp_path / "out"), vocab_size=260, validation_fraction=0.2)


def names(folder: Path) -> list[str]:
    """What is in a folder, but finished units: these are kept (test_prep_units.py)."""
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".units")


def vocabulary(folder: str | Path) -> int:
    return load_manifest(folder, check_hashes=True).vocab_size


def left_by_a_killed_process(tmp_path: Path, **folders: Path) -> Path:
    """A workplace with these folders in it, whose owner is gone."""
    place = tmp_path / "out.tmp"
    place.mkdir()
    (place / LOCK).write_text(json.dumps(dataclasses.asdict(GONE)))
    for name, folder in folders.items():
        folder.rename(place / name)
    return place


def made(config: PrepConfig, output: Path, vocab_size: int) -> Path:
    prepare(dataclasses.replace(config, output=str(output), vocab_size=vocab_size))
    return output


@pytest.mark.parametrize("name", ["out.old", "out.tmp"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_folders_of_others_stay(config, tmp_path, name, overwrite):
    if overwrite:
        prepare(config)
    (tmp_path / name).mkdir()
    (tmp_path / name / "thesis.tex").write_text("precious")
    run = dataclasses.replace(config, overwrite=overwrite)
    if name == "out.tmp":
        with pytest.raises(DataError, match=r"out\.tmp is in the way"):
            prepare(run)
    else:
        prepare(run)
    assert (tmp_path / name / "thesis.tex").read_text() == "precious"


def test_a_corpus_folder_of_another_in_the_workplace_is_not_taken_for_ours(config, tmp_path):
    (tmp_path / "out.tmp" / "corpus").mkdir(parents=True)
    with pytest.raises(DataError, match=r"out\.tmp is in the way"):
        prepare(config)
    assert names(tmp_path / "out.tmp") == ["corpus"]


def test_a_link_in_the_workplace_s_place_is_not_followed(config, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "out.tmp").symlink_to(tmp_path / "other")
    with pytest.raises(DataError, match=r"out\.tmp is in the way"):
        prepare(config)
    assert (tmp_path / "out.tmp").is_symlink()


def test_a_file_that_was_put_into_a_corpus_is_not_lost_with_it(config, tmp_path):
    prepare(config)
    (tmp_path / "out" / "notes.txt").write_text("precious")
    with pytest.raises(DataError, match=r"holds notes\.txt"):
        prepare(dataclasses.replace(config, overwrite=True))
    assert (tmp_path / "out" / "notes.txt").read_text() == "precious" and names(tmp_path) == ["in", "out"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_second_process_is_refused_and_leaves_the_first_alone(config, tmp_path, overwrite):
    with workplace(tmp_path / "out", False) as first:
        (first.corpus / "tokenizer.json").write_text("of the first")
        with pytest.raises(DataError, match=rf"out\.tmp is in use by process {os.getpid()} .*change --output"):
            prepare(dataclasses.replace(config, overwrite=overwrite))
        assert (first.corpus / "tokenizer.json").read_text() == "of the first"
    assert names(tmp_path) == ["in"]


def test_a_process_that_has_lost_its_lock_neither_publishes_nor_removes(tmp_path):
    place = tmp_path / "out.tmp"
    with pytest.raises(DataError, match="was taken by another job"), workplace(tmp_path / "out", False) as first:
        for split in ("train", "validation"):
            (first.corpus / split).mkdir()
        (place / LOCK).write_text("of another")
        first._lock.lost = "another job"
        first.publish()
    assert names(place) == ["corpus", LOCK] and not (tmp_path / "out").exists()


def test_what_a_killed_process_left_is_taken_over(config, tmp_path):
    half = tmp_path / "half"
    (half / "train").mkdir(parents=True)
    left_by_a_killed_process(tmp_path, corpus=half)
    assert prepare(config) == load_manifest(config.output)
    assert names(tmp_path) == ["in", "out"]


@pytest.mark.parametrize("replaced", [False, True])
def test_a_complete_corpus_of_a_killed_process_gets_its_name(config, tmp_path, caplog, replaced):
    folders = {"replaced": made(config, tmp_path / "former", 258)} if replaced else {}
    left_by_a_killed_process(tmp_path, corpus=made(config, tmp_path / "new", 259), **folders)
    with caplog.at_level(logging.WARNING), pytest.raises(DataError, match="already holds a prepared corpus"):
        prepare(config)
    assert vocabulary(config.output) == 259 and names(tmp_path) == ["in", "out"]
    assert "out was completed by a `based prep` that was killed" in caplog.text


def test_a_replaced_corpus_gets_its_name_back_if_there_is_no_complete_one(config, tmp_path):
    half = tmp_path / "half"
    half.mkdir()
    left_by_a_killed_process(tmp_path, corpus=half, replaced=made(config, tmp_path / "former", 258))
    with pytest.raises(DataError, match="already holds a prepared corpus"):
        prepare(config)
    assert vocabulary(config.output) == 258 and names(tmp_path) == ["in", "out"]


def test_a_corpus_that_cannot_be_replaced_stays(config, tmp_path, monkeypatch):
    prepare(config)
    rename = Path.rename

    def fail_for_the_new(path, target):
        if path.name == "corpus":
            raise OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail_for_the_new)
    with pytest.raises(DataError, match="Input/output error"):
        prepare(dataclasses.replace(config, vocab_size=259, overwrite=True))
    assert vocabulary(config.output) == 260 and names(tmp_path) == ["in", "out"]


def test_an_output_that_appears_during_the_work_is_not_replaced(tmp_path):
    with pytest.raises(DataError, match="is not a prepared corpus"), workplace(tmp_path / "out", True) as place:
        for split in ("train", "validation"):
            (place.corpus / split).mkdir()
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.tex").write_text("precious")
        place.publish()
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["thesis.tex"]


def test_sigterm_leaves_nothing(config, tmp_path, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(prepare_module, "make_manifest", lambda **_: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as end:
        main([*config.inputs, "--output", config.output, "--vocab-size", "260"])
    assert end.value.code == 128 + signal.SIGTERM and names(tmp_path) == ["in"]
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_output_behind_a_link_is_written_where_the_link_leads(config, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "corpus")
    for overwrite in (False, True):
        prepare(dataclasses.replace(config, overwrite=overwrite))
        assert (tmp_path / "out").is_symlink() and names(tmp_path / "disk") == ["corpus"]
        assert (tmp_path / "disk" / "corpus" / MANIFEST_NAME).is_file() and vocabulary(config.output) == 260


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("", "is empty"),
        (" ", "is empty"),
        ("/", "is a mount point"),
        ("/proc", "is a mount point"),
        (".", "is the current folder"),
        ("..", "is the current folder or holds it"),
    ],
)
def test_places_that_no_folder_can_take_are_refused(tmp_path, monkeypatch, output, message):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(DataError, match=message):
        resolved_output(output)


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="a link to itself resolves to itself")
def test_a_link_to_itself_is_refused(tmp_path):
    (tmp_path / "out").symlink_to(tmp_path / "out")
    with pytest.raises(DataError, match="cannot be resolved"):
        resolved_output(str(tmp_path / "out"))
