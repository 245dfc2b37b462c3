"""Counts of bigrams in a training split: equal to counting one by one, over borders of members, sampled, and kept in files."""

import itertools
import os
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from made_corpora import EOS, VOCAB_SIZE, write_corpus

from based_megatron.config.schema import DataConfig, SourceConfig
from based_megatron.data.bigrams import count_in_turns, sampled
from based_megatron.data.manifest import Manifest
from based_megatron.data.recall import slices_in_turns
from based_megatron.data.slices import Slices
from based_megatron.data.sources import Sources
from based_megatron.errors import DataError

WORDS, BLOCK = 12, 64


def documents(seed: int, count: int, longest: int = 150) -> list[np.ndarray]:
    """Documents of few words, some longer than two blocks, so that bigrams cross members."""
    generator = random.Random(seed)
    lengths = [generator.randint(0, longest) for _ in range(count)]
    return [np.array([*(generator.randint(1, WORDS) for _ in range(n)), EOS], np.uint32) for n in lengths]


def counted(texts: list[np.ndarray]) -> Counter:
    return Counter(pair for text in texts for pair in itertools.pairwise(text.tolist()))


WANTED = np.array(sorted(a * VOCAB_SIZE + b for a in range(WORDS + 2) for b in range(WORDS + 2)), np.int64)


def expected(counts: Counter) -> list[float]:
    return [counts[divmod(bigram, VOCAB_SIZE)] for bigram in WANTED.tolist()]


def run(manifest: Manifest, *folders: Path, limit_tokens: int = 10**9) -> tuple[list[float], int]:
    """(counts, members that had to be counted)."""
    *turns, counts = count_in_turns(manifest, WANTED, limit_tokens, folders)
    assert all(turn is None for turn in turns)
    return counts.tolist(), len(turns)


@pytest.fixture
def corpus(tmp_path) -> tuple[Manifest, list[np.ndarray]]:
    texts = documents(0, 30)
    return write_corpus(tmp_path / "corpus", texts, documents(1, 4), block_tokens=BLOCK), texts


def test_counts_are_those_of_a_loop_over_documents(corpus):
    manifest, texts = corpus
    assert len(manifest.splits["train"].members) > 20
    counts, _ = run(manifest)
    assert counts == expected(counted(texts))


def test_a_second_start_reads_what_the_first_has_counted(corpus, tmp_path):
    manifest, _ = corpus
    first, turns = run(manifest, manifest.folder, tmp_path / "run")
    assert turns > 0 and run(manifest, manifest.folder, tmp_path / "run") == (first, 0)
    assert [path.suffix for path in (manifest.folder / "recall").iterdir()] == [".counts"], "no other file stays"
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_written_to_leaves_the_next(corpus, tmp_path):
    manifest, _ = corpus
    (tmp_path / "file").touch()  # not even the superuser can make a folder in it
    first, _ = run(manifest, tmp_path / "file", tmp_path / "run")
    assert run(manifest, tmp_path / "file", tmp_path / "run") == (first, 0)


def test_no_folder_to_write_to_costs_another_count(corpus, tmp_path):
    manifest, _ = corpus
    (tmp_path / "file").touch()
    assert run(manifest, tmp_path / "file") == run(manifest, tmp_path / "file")


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "foreign"])
def test_a_file_that_is_not_as_it_was_written_is_counted_anew(corpus, tmp_path, damage):
    manifest, texts = corpus
    run(manifest, manifest.folder)
    (path,) = (manifest.folder / "recall").iterdir()
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[3] ^= 1
    elif damage == "cut":
        data = data[:-1]
    elif damage == "empty":
        data = bytearray()
    else:  # counts of another corpus, under this one's name
        other = write_corpus(tmp_path / "other", documents(5, 30), block_tokens=BLOCK)
        run(other, other.folder)
        (foreign,) = (other.folder / "recall").iterdir()
        assert foreign.name != path.name
        data = bytearray(foreign.read_bytes())
    path.write_bytes(data)
    counts, turns = run(manifest, manifest.folder)
    assert turns > 0 and counts == expected(counted(texts))
    assert run(manifest, manifest.folder) == (counts, 0), "it was written again"


def test_a_damaged_shard_is_named_and_nothing_is_kept(corpus):
    manifest, _ = corpus
    member = manifest.splits["train"].members[7]
    with (manifest.folder / member.file).open("r+b") as file:
        file.seek(member.offset)
        file.write(b"\xff" * 4)
    with pytest.raises(DataError, match="sample 00000007 does not match its hash"):
        run(manifest, manifest.folder)
    assert not (manifest.folder / "recall").exists()


def test_other_bigrams_and_other_samples_have_files_of_their_own(corpus):
    manifest, texts = corpus
    run(manifest, manifest.folder)
    *turns, found = count_in_turns(manifest, WANTED[:5], 10**9, [manifest.folder])
    assert turns and found.tolist() == expected(counted(texts))[:5]
    assert run(manifest, manifest.folder, limit_tokens=200)[1] > 0
    assert len(list((manifest.folder / "recall").iterdir())) == 3


@pytest.mark.parametrize(
    ("tokens", "limit", "chosen"),
    [([4, 4, 2], 10, [0, 1, 2]), ([4] * 8, 16, [0, 2, 4, 6]), ([4] * 6, 1, [0]), ([4] * 5, 13, [0, 1, 3]), ([], 9, [])],
)
def test_a_sample_lies_evenly_over_the_members(tokens, limit, chosen):
    assert sampled(np.array(tokens, np.int64), limit) == chosen


def test_counts_of_a_sample_are_scaled_to_the_split(corpus):
    manifest, _ = corpus
    split = manifest.splits["train"]
    counts, turns = run(manifest, limit_tokens=split.tokens // 3)
    assert 0 < turns < len(split.members) / 2
    # Without document borders every token but the last would count once.
    assert sum(counts) == pytest.approx(split.tokens - split.documents, rel=0.05)


def test_a_mixture_counts_each_corpus_by_its_share(tmp_path):
    """As many tokens as all corpora have, of which each gives what its weight says."""
    texts = {"a": documents(0, 30), "b": documents(1, 8)}
    manifests = {name: write_corpus(tmp_path / name, texts[name], documents(2, 5), BLOCK) for name in texts}
    tokens = {name: manifest.splits["train"].tokens for name, manifest in manifests.items()}
    weights = {"a": 1.0, "b": 3.0}
    config = [SourceConfig(str(tmp_path / name), weight) for name, weight in weights.items()]
    sources = Sources(DataConfig(sources=tuple(config), sequence_length_tokens=16))
    rate = Counter()
    for name in texts:
        for pair, count in counted(texts[name]).items():
            rate[pair] += count * weights[name] / 4 * sum(tokens.values()) / tokens[name]
    slices = Slices(2.0, (4,))
    *_, ids = slices_in_turns(sources, 6, slices, 10**9, tmp_path)
    chosen = sources.validation_sequences(6)
    assert {source for source, _ in chosen} == {0, 1} and ids.shape == (6, 16)
    bins = {"0": (0, 0), "1-9": (0, 10), "10-99": (10, 100), "100-999": (100, 1000), "1000_up": (1000, 1e9)}
    seen = set()
    for (source, sequence), row in zip(chosen, ids.tolist(), strict=True):
        window = sources.validation[source].tokens(sequence).tolist()
        for pair, number in zip(itertools.pairwise(window), row, strict=True):
            if pair[0] != EOS:
                low, high = bins[slices.keys[number][0]]
                assert low <= rate[pair] < high or rate[pair] == low == high, pair
                seen.add(slices.keys[number][0])
    assert len(seen) > 1


def test_counts_go_into_the_run_folder_if_the_data_is_read_only(corpus, tmp_path):
    manifest, _ = corpus
    sources = Sources(DataConfig(path=str(manifest.folder), sequence_length_tokens=16))
    (manifest.folder / "recall").touch()
    for _ in range(2):
        list(slices_in_turns(sources, 4, Slices(1.0, (4,)), 10**9, tmp_path / "run"))
    assert len(os.listdir(tmp_path / "run" / "recall")) == 1
