"""A corpus that is replaced under a run: its old tokens, or one line that names the shard; never the tokens of another one."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from made_corpora import as_version, numbered_documents, write_corpus

from based_megatron.config.schema import DataConfig
from based_megatron.data import sources as sources_module
from based_megatron.data.loader import Loader
from based_megatron.data.manifest import Manifest, load_manifest, save_manifest
from based_megatron.data.sources import Sources
from based_megatron.errors import DataError

S, STEPS = 16, 10
LENGTHS = [30] * 30


def corpus(folder: Path, first: int, version: int = 4, lengths: list[int] = LENGTHS) -> Manifest:
    """Shards of one block; corpora of the same lengths have the same bytes everywhere but in their tokens and hashes."""
    written = write_corpus(folder, numbered_documents(lengths, first), block_tokens=100, shard_blocks=1)
    return written if version == 4 else as_version(written, version)


def loader(folder: Path) -> Loader:
    data = DataConfig(path=str(folder), sequence_length_tokens=S, num_workers=0, seed=1)
    return Loader(Sources(data), data, 4, 4)


def tokens(batches: Loader, step: int) -> list[list[int]]:
    (batch,) = batches.micro_batches(step)
    return batch.tokens_BL.tolist()


def replace(folder: Path, by: Path) -> None:
    """As `based prep --overwrite` does it."""
    folder.rename(folder.with_name("old"))
    by.rename(folder)


@pytest.mark.parametrize("version", [1, 2, 3, 4])
@pytest.mark.parametrize("steps_before", [0, 3])
def test_another_corpus_of_the_same_layout_is_named_when_it_is_opened(tmp_path, monkeypatch, version, steps_before):
    monkeypatch.setattr(sources_module, "OPEN_SHARDS", 2)
    then, now = corpus(tmp_path / "c", 1, version), corpus(tmp_path / "other", 50_000, version)
    expected = [tokens(loader(tmp_path / "c"), step) for step in range(STEPS)]
    running = loader(tmp_path / "c")
    for step in range(steps_before):
        tokens(running, step)
    replace(tmp_path / "c", tmp_path / "other")
    errors = 0
    for step in range(STEPS):
        try:
            assert tokens(running, step) == expected[step]
        except DataError as error:
            errors += 1
            line = str(error)
            assert line.startswith(f"{tmp_path / 'c' / 'train'}/shard-000") and "\n" not in line
            assert (
                f"another corpus than the run began with: the fingerprint of {tmp_path / 'c'} was {then.fingerprint} "
                in line
            )
            assert f"and is {now.fingerprint}; " in line
    assert errors == STEPS if not steps_before else errors >= STEPS - steps_before


def test_a_smaller_corpus_that_lacks_the_shard_is_named_too(tmp_path):
    corpus(tmp_path / "c", 1)
    corpus(tmp_path / "other", 1, lengths=[30])
    running = loader(tmp_path / "c")
    replace(tmp_path / "c", tmp_path / "other")
    for step in range(STEPS):
        with pytest.raises(DataError, match="of another corpus than the run began with"):
            tokens(running, step)


@pytest.mark.parametrize("version", [1, 2, 3, 4])
def test_one_shard_of_another_corpus_under_the_same_manifest(tmp_path, version):
    """The hashes in that shard fit its tokens, but are not those that the manifest knows."""
    manifest = corpus(tmp_path / "c", 1, version)
    corpus(tmp_path / "other", 50_000)
    expected = [tokens(loader(tmp_path / "c"), step) for step in range(STEPS)]
    running, (file, key) = loader(tmp_path / "c"), named(manifest, 4)
    shutil.copy(tmp_path / "other" / file, tmp_path / "c" / file)
    found = []
    for step in range(STEPS):
        try:
            found.append(tokens(running, step) == expected[step])
        except DataError as error:
            what = "does not have the hashes that the manifest knows" if version > 2 else "does not match its hash"
            assert f"{tmp_path / 'c' / file} is damaged: sample {key} {what};" in str(error)
    assert all(found) and 0 < len(found) < STEPS


def named(manifest: Manifest, number: int) -> tuple[str, str]:
    member = manifest.splits["train"].members[number]
    return member.file, member.key


def test_the_same_corpus_may_move_and_be_put_back(tmp_path, monkeypatch):
    """Other inodes and other times, and the run goes on."""
    monkeypatch.setattr(sources_module, "OPEN_SHARDS", 1)
    corpus(tmp_path / "c", 1)
    expected = [tokens(loader(tmp_path / "c"), step) for step in range(STEPS)]
    running = loader(tmp_path / "c")
    tokens(running, 0)
    shutil.copytree(tmp_path / "c", tmp_path / "copy", copy_function=shutil.copyfile)
    replace(tmp_path / "c", tmp_path / "copy")
    assert [tokens(running, step) for step in range(STEPS)] == expected


def test_a_shard_that_is_lost_while_the_manifest_stays_is_named(tmp_path):
    manifest = corpus(tmp_path / "c", 1)
    running = loader(tmp_path / "c")
    for member in manifest.splits["train"].members:
        (tmp_path / "c" / member.file).unlink()
    with pytest.raises(
        DataError, match=r"cannot read shard .*shard-000\d\d\.tar: No such file or directory; restore it"
    ):
        tokens(running, 0)
    (tmp_path / "c" / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"cannot read shard .*shard-000\d\d\.tar"):
        tokens(running, 0)


def test_versions_hold_the_same_tokens(tmp_path):
    """What an earlier version wrote is read as it was, in an order of its own fingerprint."""
    written = corpus(tmp_path / "c", 1)
    streams = []
    for version in (1, 2, 3, 4):
        old = as_version(written, version) if version < 4 else written
        if version == 4:
            save_manifest(written)
        assert load_manifest(tmp_path / "c") == old
        reader = Sources(DataConfig(path=str(tmp_path / "c"), sequence_length_tokens=S)).train[0]
        streams.append(np.concatenate([reader.tokens(number) for number in range(len(reader))]).tolist())
    assert streams[0] == streams[1] == streams[2] == streams[3] and len(set(streams[0])) > 500
