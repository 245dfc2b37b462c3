"""Descriptors: a run keeps few shards open, and says what to do where there are too few for it."""

import gc
import os
import resource
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from made_corpora import numbered_documents, write_corpus

from based_megatron.config.schema import DataConfig, SourceConfig
from based_megatron.data import sources as sources_module
from based_megatron.data.loader import Loader
from based_megatron.data.open_shards import OpenShards
from based_megatron.data.sources import Sources
from based_megatron.errors import DataError

S, SHARDS, OPEN = 16, 12, 3
SEQUENCES = (SHARDS * 64 - 1) // S
"""Sequences of each split of a corpus."""


@contextmanager
def free_descriptors(count: int) -> Iterator[None]:
    """So many files can still be opened, as with a low `ulimit -n`; all others are in use."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken: list[int] = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 32, limits[1]))
    try:
        while True:
            try:
                taken.append(os.dup(2))
            except OSError:
                break
        for _ in range(count):
            os.close(taken.pop())
        yield
    finally:
        for descriptor in taken:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def open_below(folder: Path) -> int:
    """Files of a folder that this process has open."""
    links = [Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd")]
    return sum(os.readlink(link).startswith(str(folder)) for link in links if link.is_symlink())


@pytest.fixture(scope="module")
def corpora(tmp_path_factory) -> Path:
    """Two corpora of twelve shards of one block in each split."""
    folder = tmp_path_factory.mktemp("corpora")
    for name, first in (("a", 1), ("b", 50_000)):
        train, held_out = (numbered_documents([SHARDS * 64 - 1], first + more) for more in (0, 10_000))
        manifest = write_corpus(folder / name, train, held_out, block_tokens=64, shard_blocks=1)
        assert [len({m.file for m in split.members}) for split in manifest.splits.values()] == [SHARDS, SHARDS]
    return folder


def read_all(folder: Path, workers: int) -> tuple[list[list[int]], int]:
    """The tokens of an epoch of both corpora and of both validation splits; the shards that are open after it."""
    gc.collect()  # what an earlier loader has open
    sources = tuple(SourceConfig(str(folder / name)) for name in "ab")
    data = DataConfig(sources=sources, sequence_length_tokens=S, num_workers=workers)
    loader = Loader(Sources(data), data, SEQUENCES, SEQUENCES)
    trained = [batch for step in (0, 1) for batch in loader.micro_batches(step)]
    rows = [row for batch in [*trained, *loader.validation_batches(2 * SEQUENCES)] for row in batch.tokens_BL.tolist()]
    loader.close()
    return rows, open_below(folder)


@pytest.mark.parametrize("workers", [0, 2])
def test_all_splits_of_all_corpora_share_a_few_descriptors(corpora, monkeypatch, workers):
    expected, many = read_all(corpora, workers)
    assert len({tuple(row) for row in expected}) == len(expected) == 4 * SEQUENCES
    monkeypatch.setattr(sources_module, "OPEN_SHARDS", OPEN)
    with free_descriptors(SHARDS):
        found, few = read_all(corpora, workers)
    assert found == expected and (few, many) == (OPEN, 4 * SHARDS)


def test_shards_that_are_kept_open_are_given_back_where_others_need_files(tmp_path):
    """And the file that is opened last is read, whatever came before."""
    shards, paths = OpenShards(100), [tmp_path / f"{i}.tar" for i in range(10)]
    for i, path in enumerate(paths):
        path.write_bytes(bytes([i] * 5))
    with free_descriptors(4):
        assert [shards.read(path, 1, 4) for path in paths * 2] == [bytes([i] * 3) for i in range(10)] * 2
    with free_descriptors(0):  # those that are kept are enough
        assert shards.read(paths[3], 0, 2) == bytes([3, 3])


def test_a_process_without_descriptors_is_told_to_raise_the_limit(tmp_path):
    (tmp_path / "0.tar").write_bytes(b"x")
    with free_descriptors(0), pytest.raises(DataError) as error:
        OpenShards().read(tmp_path / "0.tar", 0, 1)
    line = str(error.value)
    assert line.startswith(f"cannot read shard {tmp_path / '0.tar'}: Too many open files; all ") and "\n" not in line
    assert "ulimit -n" in line and "corpus" not in line


def test_each_cause_has_its_advice(tmp_path):
    with pytest.raises(DataError, match=r"No such file or directory; restore it or write the corpus again$"):
        OpenShards().read(tmp_path / "0.tar", 0, 1)
    with pytest.raises(DataError, match=r"Is a directory; see that this host can read it$"):
        OpenShards().read(tmp_path, 0, 1)


def test_many_threads_read_through_one_open_shard(tmp_path):
    """A shard that is closed by one thread is read to its end by another."""
    shards, paths = OpenShards(1), [tmp_path / f"{i}.tar" for i in range(4)]
    for i, path in enumerate(paths):
        path.write_bytes(bytes([i] * 64))
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: shards.read(paths[i % 4], 0, 64), range(2000)))
    assert found == [bytes([i % 4] * 64) for i in range(2000)]
    assert open_below(tmp_path) == 1
