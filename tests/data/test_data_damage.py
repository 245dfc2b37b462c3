"""Damage of every kind to the files of a corpus, before and while it is read: one line that names shard and sample, or the right tokens."""

import os
import random
from pathlib import Path

import numpy as np
import pytest
from made_corpora import as_version, numbered_documents, random_lengths, write_corpus

from based_megatron.config.schema import DataConfig
from based_megatron.data import manifest as manifest_module
from based_megatron.data import reader as reader_module
from based_megatron.data.loader import Loader
from based_megatron.data.manifest import Manifest, load_manifest
from based_megatron.data.sources import Sources
from based_megatron.errors import DataError

S, BATCH, PIECE = 32, 8, 256


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Samples of a few kilobytes have many pieces with hashes."""
    for module in (manifest_module, reader_module):
        monkeypatch.setattr(module, "HASHED_BYTES", PIECE)


def corpus(folder: Path) -> Manifest:
    return write_corpus(folder, numbered_documents(random_lengths(90, 80)), block_tokens=700)


def loader(folder: Path) -> Loader:
    data = data_config(folder)
    return Loader(Sources(data, BATCH), data, BATCH, 2)


def data_config(folder: Path) -> DataConfig:
    return DataConfig(path=str(folder), sequence_length_tokens=S, num_workers=0)


def steps_of(manifest: Manifest) -> int:
    return (manifest.splits["train"].tokens - 1) // S // BATCH


def tokens_of(batches: Loader, steps: range) -> list[np.ndarray]:
    return [batch.tokens_BL.numpy() for step in steps for batch in batches.micro_batches(step)]


def flip(data: bytearray, rng: random.Random) -> None:
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def zero_page(data: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(data))
    data[start : start + 512] = bytes(len(data[start : start + 512]))


def swap(data: bytearray, rng: random.Random) -> None:
    """Two stretches of tokens in each other's place."""
    a, b = rng.randrange(len(data) // 2 - 64), len(data) // 2 + rng.randrange(len(data) // 2 - 64)
    data[a : a + 64], data[b : b + 64] = data[b : b + 64], data[a : a + 64]


def truncate(data: bytearray, rng: random.Random) -> None:
    del data[rng.randrange(len(data)) :]


def empty(data: bytearray, rng: random.Random) -> None:
    data.clear()


DAMAGES = (flip, zero_page, swap, truncate, empty)


def check_damage(folder: Path, seed: int) -> None:
    """Damage one file, before the start or in the middle of a run, and read all."""
    rng = random.Random(seed)
    manifest = corpus(folder)
    steps = steps_of(manifest)
    expected = tokens_of(loader(folder), range(steps))
    running = loader(folder) if seed % 2 else None
    half = steps // 2
    if running:
        tokens_of(running, range(half))
    path = folder / rng.choice([member.file for member in manifest.splits["train"].members])
    data = bytearray(path.read_bytes())
    DAMAGES[seed % len(DAMAGES)](data, rng)
    with path.open("r+b") as file:  # the same file, which a reader may have open
        file.truncate(len(data))
        file.write(data)
    try:
        found = tokens_of(running or loader(folder), range(half if running else 0, steps))
    except DataError as error:
        line = str(error)
        assert path.name in line and "\n" not in line and ("sample" in line or "truncated" in line), line
        return
    # What was damaged was not read: headers and origins of documents.
    parts = steps - (half if running else 0)
    assert all(np.array_equal(a, b) for a, b in zip(found, expected[-len(found) :], strict=True))
    assert len(found) == parts * BATCH // 2


@pytest.mark.parametrize("seed", range(30))
def test_damage_is_named_or_harmless(tmp_path, seed):
    check_damage(tmp_path / "c", seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(30, 130))
def test_more_damage_is_named_or_harmless(tmp_path, seed):
    check_damage(tmp_path / "c", seed)


def test_any_flipped_bit_of_the_tokens_is_found(tmp_path):
    """The error names the shard, the sample and the bytes of the piece; a sequence in another piece is read all the same."""
    manifest = corpus(tmp_path / "c")
    member = manifest.splits["train"].members[1]
    place = member.offset + manifest.token_bytes(member) // 2
    data = bytearray((tmp_path / "c" / member.file).read_bytes())
    data[place] ^= 4
    (tmp_path / "c" / member.file).write_bytes(data)
    reader = reader_module.SequenceReader(load_manifest(tmp_path / "c"), "train", S)
    piece = (place - member.begin) // PIECE
    first = member.begin + piece * PIECE
    bad = []
    for sequence in range(len(reader)):
        try:
            reader.tokens(sequence)
        except DataError as error:
            where = f"sample {member.key} does not match its hash in bytes {first} to {first + PIECE};"
            assert f"{member.file} is damaged: {where}" in str(error)
            bad.append(sequence)
    inside = [
        sequence
        for sequence in range(len(reader))
        for part in reader.pieces(sequence)
        if part.member == 1
        and member.offset + part.start * 4 < first + PIECE
        and member.offset + part.stop * 4 > first - PIECE
    ]
    assert bad and set(bad) <= set(inside)


def test_each_read_is_checked(tmp_path):
    """A file that changes after it was read is found at the next read of the same place."""
    manifest = corpus(tmp_path / "c")
    reader = reader_module.SequenceReader(manifest, "train", S)
    reader.tokens(0)
    member = manifest.splits["train"].members[0]
    with (tmp_path / "c" / member.file).open("r+b") as file:
        file.seek(member.offset + 8)
        file.write(b"\x09")
    with pytest.raises(DataError, match="sample 00000000"):
        reader.tokens(0)


@pytest.mark.parametrize("version", [1, 2])
def test_a_corpus_whose_manifest_has_no_hashes_of_pieces_is_checked_by_whole_samples(tmp_path, version):
    """Once for each sample; the run says so in one line."""
    manifest = as_version(corpus(tmp_path / "c"), version)
    (warning,) = Sources(data_config(tmp_path / "c")).warnings
    assert "whole samples" in warning and "\n" not in warning
    assert len(tokens_of(loader(tmp_path / "c"), range(3))) == 3 * BATCH // 2
    member = manifest.splits["train"].members[0]
    with (tmp_path / "c" / member.file).open("r+b") as file:
        file.seek(member.end - 1)
        file.write(b"x")
    reader = reader_module.SequenceReader(load_manifest(tmp_path / "c"), "train", S)
    with pytest.raises(DataError, match="sample 00000000 does not match its hash;"):
        reader.tokens(0)
    last = len(reader) - 1
    reader.tokens(last)
    with (tmp_path / "c" / member.file).open("r+b") as file:
        os.ftruncate(file.fileno(), member.offset)
    with pytest.raises(DataError, match="sample 00000000"):
        reader.tokens(0)


def test_new_corpora_have_no_warning(tmp_path):
    corpus(tmp_path / "c")
    assert Sources(data_config(tmp_path / "c")).warnings == []
