"""Sequences go on from block to block: an epoch reads every token of a source once, but for a tail shorter than a sequence."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_corpora import EOS, numbered_documents, random_lengths, write_corpus

from based_megatron.config.schema import DataConfig, SourceConfig
from based_megatron.data.documents import documents_of_step
from based_megatron.data.loader import Loader
from based_megatron.data.sources import Sources
from based_megatron.errors import DataError

FIRST = {"a": 1, "b": 60_000}


def stream_of(name: str, documents: int, longest: int, seed: int) -> np.ndarray:
    return np.concatenate(numbered_documents([*random_lengths(documents, longest, seed), 30], FIRST[name]))


def write(folder: Path, name: str, stream: np.ndarray, block_tokens: int, validation: np.ndarray | None = None) -> str:
    """A corpus of the documents of a stream."""
    held_out = () if validation is None else split(validation)
    write_corpus(folder / name, split(stream), held_out, block_tokens=block_tokens, shard_blocks=3)
    return str(folder / name)


def split(stream: np.ndarray) -> list[np.ndarray]:
    return np.split(stream, np.flatnonzero(stream == EOS)[:-1] + 1)


def windows_of(stream: np.ndarray, length: int) -> list[list[int]]:
    """The sequences that a stream has, with the label of the last token of each."""
    return [stream[begin : begin + length + 1].tolist() for begin in range(0, len(stream) - length, length)]


def read(data: DataConfig, batch: int, steps: range, dp: int, cp: int) -> list[tuple[list[int], list[int], list[int]]]:
    """Tokens with the last label, places where the loss is off, and starts of documents, of each row over all ranks."""
    rows = []
    sources = Sources(data, batch)
    ranks = [
        [Loader(sources, data, batch, 1, dp_rank, dp, cp_rank, cp) for cp_rank in range(cp)] for dp_rank in range(dp)
    ]
    for step in steps:
        for dp_rank in ranks:
            for slices in zip(*(loader.micro_batches(step) for loader in dp_rank), strict=True):
                tokens, labels, mask = (
                    torch.cat([getattr(part, name) for part in slices], 1)[0].tolist()
                    for name in ("tokens_BL", "labels_BL", "loss_mask_BL")
                )
                assert tokens[1:] == labels[:-1] and slices[0].documents is not None
                off = [place for place, value in enumerate(mask) if not value]
                rows.append(([*tokens, labels[-1]], off, slices[0].documents.starts[0].tolist()))
    return rows


@settings(max_examples=12, deadline=None)
@given(
    length=st.integers(1, 70),
    block_tokens=st.integers(3, 90),
    documents=st.integers(1, 12),
    longest=st.integers(0, 60),
    seed=st.integers(0, 3),
    layouts=st.lists(st.sampled_from([(1, 1), (2, 1), (1, 3), (4, 2)]), min_size=2, max_size=2),
)
def test_every_token_is_read_once_an_epoch(tmp_path_factory, length, block_tokens, documents, longest, seed, layouts):
    """Under a layout that changes in the epoch, whatever the lengths, and again in the next epoch in another order."""
    folder = tmp_path_factory.mktemp("corpora")
    stream = stream_of("a", documents, longest, seed)
    expected = windows_of(stream, length)
    path = write(folder, "a", stream, block_tokens)
    data = DataConfig(path=path, sequence_length_tokens=length, num_workers=0, seed=seed)
    if not expected:
        with pytest.raises(DataError, match=r"does not hold one sequence: lower .* or prepare more text$"):
            Sources(data)
        return
    assert len(stream) - length <= Sources(data).tokens_read < len(stream)
    cp_fits = [(dp, min(cp, length)) for dp, cp in layouts]
    batch, count = 4, len(expected)  # after `count` steps of 4 sequences exactly four epochs are over
    half = count // 2
    rows = read(data, batch, range(half), *cp_fits[0]) + read(data, batch, range(half, count), *cp_fits[1])
    assert sorted(tokens for tokens, _, _ in rows) == sorted(expected * batch)
    for tokens, off, starts in rows:
        ends = [place for place, token in enumerate(tokens[:-1]) if token == EOS]
        assert off == ends
        assert starts == [0, *(place + 1 for place in ends if place + 1 < length)]


def test_epochs_of_a_mixture_read_each_source_whole(tmp_path):
    """By its weight: one epoch of the larger source and three of the smaller one, without a sequence that is lost or read twice."""
    S, streams = 24, {"a": stream_of("a", 40, 60, 1), "b": stream_of("b", 12, 60, 2)}
    windows = {name: windows_of(stream, S) for name, stream in streams.items()}
    paths = {name: write(tmp_path, name, stream, block_tokens=50) for name, stream in streams.items()}
    weights = {"a": float(len(windows["a"])), "b": 3.0 * len(windows["b"])}
    sources = tuple(SourceConfig(paths[name], weights[name]) for name in "ab")
    data = DataConfig(sources=sources, sequence_length_tokens=S, num_workers=0)
    total = len(windows["a"]) + 3 * len(windows["b"])
    rows = [tokens for tokens, _, _ in read(data, total, range(1), 1, 1)]
    assert sorted(rows) == sorted(windows["a"] + 3 * windows["b"])
    both = sum(map(len, streams.values()))
    assert both - 2 * S <= Sources(data).tokens_read == S * (len(windows["a"]) + len(windows["b"])) < both


@pytest.mark.parametrize("length", [50, 51, 99, 500])
def test_a_length_at_or_above_that_of_a_block(tmp_path, length):
    stream, held_out = stream_of("a", 80, 60, 3), stream_of("b", 40, 60, 4)
    path = write(tmp_path, "a", stream, 50, held_out)
    data = DataConfig(path=path, sequence_length_tokens=length, num_workers=0)
    count = len(windows_of(stream, length))
    rows = read(data, count, range(1), 1, 1)
    assert sorted(tokens for tokens, _, _ in rows) == sorted(windows_of(stream, length))
    (held, *_), loader = windows_of(held_out, length), Loader(Sources(data), data, 1, 1)
    batch = next(loader.validation_batches(10**6))
    assert batch.tokens_BL[0].tolist() == held[:-1] and batch.labels_BL[0].tolist() == held[1:]
    assert len(list(loader.validation_batches(10**6))) == len(windows_of(held_out, length))
    within = dataclasses.replace(data, cross_blocks=False)
    with pytest.raises(DataError, match=rf"{length} or set data\.cross_blocks=true$"):
        Sources(within)


def test_without_it_the_order_is_that_of_before(tmp_path):
    """The fingerprint too, so that a checkpoint of carried states, or a rollback, finds its own data."""
    S, stream = 16, stream_of("a", 30, 40, 5)
    path = write(tmp_path, "a", stream, 100)
    data = DataConfig(path=path, sequence_length_tokens=S, num_workers=0, seed=3, cross_blocks=False)
    sources = Sources(data)
    (manifest,) = sources.manifests
    assert sources.fingerprint == f"{manifest.fingerprint}*1/seed=3/sequence_length_tokens=16"
    blocks = [stream[begin : begin + 100] for begin in range(0, len(stream), 100)]
    expected = [window for block in blocks for window in windows_of(block, S)]
    rows = read(data, len(expected), range(1), 1, 1)
    assert sorted(tokens for tokens, _, _ in rows) == sorted(expected)
    assert sources.tokens_read == S * len(expected) < len(stream) - S
    crossing = Sources(dataclasses.replace(data, cross_blocks=True))
    assert crossing.fingerprint == f"{manifest.fingerprint}*1/seed=3/cross_blocks/sequence_length_tokens=16"
    carried = [
        Sources(dataclasses.replace(data, carry_state=True, cross_blocks=on)).fingerprint for on in (False, True)
    ]
    assert carried == [f"{manifest.fingerprint}*1/carried/sequence_length_tokens=16"] * 2


def test_rows_that_carry_states_read_what_the_rows_divide(tmp_path):
    stream = stream_of("a", 30, 40, 6)
    path = write(tmp_path, "a", stream, 100)
    data = DataConfig(path=path, sequence_length_tokens=16, num_workers=0, carry_state=True)
    count = len(windows_of(stream, 16))
    assert Sources(data, 7).tokens_read == 16 * 7 * (count // 7)


def test_documents_of_a_step_are_listed_across_blocks(tmp_path):
    """Each part once for each block that it lies in, in the order of the tokens."""
    S, stream = 64, stream_of("a", 30, 90, 7)
    data = DataConfig(path=write(tmp_path, "a", stream, 50), sequence_length_tokens=S, num_workers=0)
    sources, count = Sources(data), len(windows_of(stream, S))
    parts = list(documents_of_step(sources, 1, count))
    number = np.cumsum(stream == EOS) - (stream == EOS)
    rows = [tokens[:-1] for tokens, _, _ in read(data, count, range(1), 1, 1)]
    begins = {tuple(window[:-1]): place * S for place, window in enumerate(windows_of(stream, S))}
    for row, tokens in enumerate(rows):
        begin = begins[tuple(tokens)]
        mine = [part for part in parts if part.sequence == row]
        listed = [document for part in mine for document in [part.document] * part.tokens]
        assert listed == number[begin : begin + S].tolist()
