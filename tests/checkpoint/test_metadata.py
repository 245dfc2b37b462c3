"""The table of tensors is read without running code that it names."""

import os
import pickle
import random

import pytest
import torch.distributed.checkpoint as dcp
from ckpt_fragments import save, shard

from based_megatron.checkpoint.full import read_full
from based_megatron.checkpoint.load import load_checkpoint, stored_shapes
from based_megatron.checkpoint.manifest import FileEntry, read_manifest, seal_file, write_manifest
from based_megatron.checkpoint.metadata import read_metadata
from based_megatron.errors import CheckpointError


class Bomb:
    """Pickles to a call of os.mkdir."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def replace_table(path, content: bytes) -> None:
    """A checkpoint whose table was replaced by somebody who knows of manifests."""
    (path / ".metadata").write_bytes(content)
    entries: list[FileEntry] = [seal_file(path / entry.name) for entry in read_manifest(path)]
    write_manifest(path, entries)


def test_the_table_is_that_of_the_library(tmp_path):
    path = save(tmp_path, 1)
    expected = dcp.FileSystemReader(path).read_metadata()
    assert read_metadata(path).state_dict_metadata == expected.state_dict_metadata
    assert read_metadata(path).storage_data == expected.storage_data


@pytest.mark.parametrize(
    "read", [read_metadata, stored_shapes, read_full, lambda path: load_checkpoint(path, shard(None, 1, 1)[0])]
)
def test_code_in_a_table_does_not_run(tmp_path, read):
    path, folder = save(tmp_path, 1), tmp_path / "made"
    replace_table(path, pickle.dumps(Bomb(folder)))
    with pytest.raises(CheckpointError, match=r"\.metadata cannot be read \(it names (posix|nt|os)\.mkdir"):
        read(path)
    assert not folder.exists()


@pytest.mark.parametrize(
    "module", ["builtins\neval", "torch\nload", "torch.serialization\nload", "pathlib\nPath.write_text"]
)
def test_only_parts_of_a_table_are_known(tmp_path, module):
    path = save(tmp_path, 1)
    replace_table(path, f"c{module}\n.".encode())
    with pytest.raises(CheckpointError, match="no part of a table"):
        read_metadata(path)


def test_another_object_is_no_table(tmp_path):
    path = save(tmp_path, 1)
    replace_table(path, pickle.dumps([1, 2]))
    with pytest.raises(CheckpointError, match="holds a list, not a table"):
        read_metadata(path)


def test_every_damage_of_a_table_is_one_line(tmp_path):
    path = save(tmp_path, 1)
    whole, draw = (path / ".metadata").read_bytes(), random.Random(0)
    refused = 0
    for _ in range(200):
        damaged = bytearray(whole[: draw.randrange(len(whole))] if draw.random() < 0.3 else whole)
        for _ in range(draw.randrange(1, 4)):
            if damaged:
                damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        (path / ".metadata").write_bytes(damaged)
        try:
            read_metadata(path)
        except CheckpointError as error:
            refused += "\n" not in str(error)
    assert refused > 100
