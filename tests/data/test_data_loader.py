"""The loader: what a rank gets at a step, for every layout."""

import itertools
import json
import threading
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_corpora import EOS, VOCAB_SIZE, numbered_documents, random_lengths, write_corpus

from based_megatron.config.schema import DataConfig, SourceConfig
from based_megatron.data.batch import MicroBatch
from based_megatron.data.loader import Loader
from based_megatron.data.manifest import check_tokenizer, fingerprint, load_manifest
from based_megatron.data.prefix import Prefix
from based_megatron.data.probes import ProbeSequences
from based_megatron.data.reader import SequenceReader
from based_megatron.data.recall import RecallRows
from based_megatron.data.slices import NO_SLICE, slices_of
from based_megatron.data.sources import Sources
from based_megatron.errors import ConfigError, DataError
from based_megatron.parallel.sequence.slices import even_bounds

S = 16
GLOBAL_BATCH = 24


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """Two corpora with tokens 1.. and 50000.., blocks of 512 tokens that cut documents."""
    folder = tmp_path_factory.mktemp("corpora")
    for name, first, count in (("a", 1, 120), ("b", 50_000, 60)):
        train = numbered_documents(random_lengths(count, 40), first)
        validation = numbered_documents(random_lengths(8, 40, seed=1), first + 20_000)
        write_corpus(folder / name, train, validation, block_tokens=512)
    return folder


def data_config(folder, **changes) -> DataConfig:
    sources = (SourceConfig(str(folder / "a"), 3.0), SourceConfig(str(folder / "b"), 1.0))
    return DataConfig(**{"sources": sources, "sequence_length_tokens": S, "num_workers": 0, "seed": 7, **changes})


def loader(folder, micro=1, dp=(0, 1), cp=(0, 1), global_batch=GLOBAL_BATCH, **changes) -> Loader:
    data = data_config(folder, **changes)
    return Loader(Sources(data, global_batch), data, global_batch, micro, *dp, *cp)


def with_prefix(folder, micro=1, dp=(0, 1)) -> Loader:
    prefix = Prefix(tokens=8, mask_fraction=0.5, mask_token=VOCAB_SIZE, seed=3)
    data = data_config(folder, isolate_documents=False)
    return Loader(Sources(data, GLOBAL_BATCH), data, GLOBAL_BATCH, micro, *dp, prefix=prefix)


def test_masks_of_a_prefix_are_the_same_in_every_layout(corpora):
    """And at every call, but not at every step."""
    whole = with_prefix(corpora).micro_batches(5)
    ranks = [batch for rank in (0, 1) for batch in with_prefix(corpora, micro=3, dp=(rank, 2)).micro_batches(5)]
    assert rows(whole) == rows(ranks)
    masked = [batch.tokens_BL == VOCAB_SIZE for batch in (*whole, *with_prefix(corpora).micro_batches(6))]
    assert all(int(places.sum()) == 4 and not places[:, 8:].any() for places in masked)
    assert len({str(places.tolist()) for places in masked}) > GLOBAL_BATCH


def test_held_out_sequences_are_not_masked(corpora):
    batches = list(with_prefix(corpora).validation_batches(4))
    plain = list(loader(corpora, isolate_documents=False).validation_batches(4))
    assert all(torch.equal(a.tokens_BL, b.tokens_BL) for a, b in zip(batches, plain, strict=True))
    assert all(batch.loss_mask_BL[0].tolist() == [0.0] * 7 + [1.0] * 9 for batch in batches)


def fields(batch: MicroBatch) -> list[list]:
    tensors = (batch.tokens_BL, batch.labels_BL, batch.loss_mask_BL)
    starts = [] if batch.documents is None else [[row.tolist() for row in batch.documents.starts]]
    return [*(tensor.tolist() for tensor in tensors), *starts]


def rows(batches: list[MicroBatch]) -> Counter:
    """Every sequence of these batches with all that belongs to it."""
    return Counter(str(row) for batch in batches for row in zip(*fields(batch), strict=True))


def test_batches_have_the_declared_shapes_and_dtypes(corpora):
    batches = loader(corpora, micro=3, dp=(1, 2), cp=(1, 3)).micro_batches(0)
    assert len(batches) == GLOBAL_BATCH // 6
    batch = batches[0]
    assert batch.tokens_BL.shape == batch.labels_BL.shape == batch.loss_mask_BL.shape == (3, 5)
    assert batch.tokens_BL.dtype == batch.labels_BL.dtype == torch.int64 and batch.loss_mask_BL.dtype == torch.float32
    assert batch.documents is not None and [starts.dtype for starts in batch.documents.starts] == [torch.int64] * 3
    assert batch.bounds == (0, 6, 11, 16)


@settings(max_examples=12, deadline=None)
@given(
    dp=st.sampled_from([1, 2, 3, 4]), micro=st.sampled_from([1, 2]), step=st.integers(0, 10**6), cp=st.integers(1, 3)
)
def test_ranks_together_hold_the_batch_of_one_rank(corpora, dp, micro, step, cp):
    whole = rows(loader(corpora).micro_batches(step))
    parts: Counter = Counter()
    for dp_rank in range(dp):
        slices = [loader(corpora, micro, (dp_rank, dp), (rank, cp)).micro_batches(step) for rank in range(cp)]
        for of_each_slice in zip(*slices, strict=True):
            joined = [
                torch.cat([getattr(batch, name) for batch in of_each_slice], 1)
                for name in ("tokens_BL", "labels_BL", "loss_mask_BL")
            ]
            parts += rows([MicroBatch(*joined, of_each_slice[0].documents, of_each_slice[0].bounds)])
    assert parts == whole


@settings(max_examples=12, deadline=None)
@given(
    workers=st.integers(0, 3),
    resumed_workers=st.integers(0, 3),
    stop=st.integers(0, 6),
    resumed_dp=st.sampled_from([1, 2, 4]),
)
def test_resuming_equals_not_stopping(corpora, workers, resumed_workers, stop, resumed_dp):
    reference = [rows(loader(corpora).micro_batches(step)) for step in range(8)]
    before = loader(corpora, num_workers=workers)
    seen = [rows(before.micro_batches(step)) for step in range(stop)]
    before.close()
    after = [loader(corpora, 1, (rank, resumed_dp), num_workers=resumed_workers) for rank in range(resumed_dp)]
    for step in range(stop, 8):
        seen.append(sum((rows(rank.micro_batches(step)) for rank in after), Counter()))
    for rank in after:
        rank.close()
    assert seen == reference


def test_workers_do_not_change_the_order_of_micro_batches(corpora):
    ahead = loader(corpora, micro=2, num_workers=3)
    plain = loader(corpora, micro=2)
    for step in (0, 1, 2, 3, 9, 4, 5):
        assert list(map(fields, ahead.micro_batches(step))) == list(map(fields, plain.micro_batches(step)))
    ahead.close()


def test_labels_are_the_next_tokens_of_the_stream(corpora):
    documents = numbered_documents(random_lengths(120, 40), 1) + numbered_documents(random_lengths(60, 40), 50_000)
    stream = np.concatenate(documents)
    follower = dict(zip(stream[:-1].tolist(), stream[1:].tolist(), strict=True))
    for step in range(5):
        for batch in loader(corpora, micro=4).micro_batches(step):
            tokens, labels = batch.tokens_BL, batch.labels_BL
            assert torch.equal(tokens[:, 1:], labels[:, :-1])
            inner = tokens != EOS
            assert labels[inner].tolist() == [follower[token] for token in tokens[inner].tolist()]


def test_loss_mask_is_off_exactly_where_a_document_ends(corpora):
    batches = [batch for step in range(5) for batch in loader(corpora, micro=4).micro_batches(step)]
    tokens = torch.cat([batch.tokens_BL for batch in batches])
    mask = torch.cat([batch.loss_mask_BL for batch in batches])
    assert (tokens == EOS).any() and torch.equal(mask == 0, tokens == EOS)


def test_document_ids_count_the_ends_so_far(corpora):
    for batch in loader(corpora, micro=24).micro_batches(3):
        ends = (batch.tokens_BL == EOS).int()
        assert batch.documents is not None
        assert torch.equal(batch.documents.numbers(torch.arange(S)), (ends.cumsum(1) - ends).int())


def test_documents_can_be_left_unisolated(corpora):
    for batch in loader(corpora, micro=24, isolate_documents=False).micro_batches(3):
        assert batch.documents is None and (batch.loss_mask_BL == 1).all()


def test_an_epoch_holds_every_sequence_once(corpora):
    data = data_config(corpora, sources=(), path=str(corpora / "a"))
    reader = SequenceReader(load_manifest(corpora / "a"), "train", S, joined=True)
    one_epoch = Loader(Sources(data, len(reader)), data, len(reader), 1).micro_batches(2)
    expected = Counter(str(reader.tokens(i)[:-1].tolist()) for i in range(len(reader)))
    assert Counter(str(batch.tokens_BL[0].tolist()) for batch in one_epoch) == expected


def test_windows_cover_all_but_the_tail_of_each_member(corpora):
    manifest = load_manifest(corpora / "a")
    reader = SequenceReader(manifest, "train", S)
    members = manifest.splits["train"].members
    assert len(members) > 3 and len({member.file for member in members}) > 1
    assert len(reader) == sum((member.tokens - 1) // S for member in members)
    stream = np.concatenate(numbered_documents(random_lengths(120, 40), 1))
    blocks = [stream[start : start + 512] for start in range(0, len(stream), 512)]
    windows = [block[i * S : i * S + S + 1] for block in blocks for i in range((len(block) - 1) // S)]
    assert [reader.tokens(i).tolist() for i in range(len(reader))] == [window.tolist() for window in windows]


def test_mixture_gives_the_weights(corpora):
    batches = [batch for step in range(20) for batch in loader(corpora, micro=24).micro_batches(step)]
    tokens = torch.cat([batch.tokens_BL for batch in batches])
    from_b = (tokens.max(1).values >= 50_000).sum().item()
    assert from_b == 20 * GLOBAL_BATCH // 4


@pytest.mark.parametrize(
    "change", [{"seed": 8}, {"sequence_length_tokens": 8}, {"sources": "swapped weights"}, {"sources": "one"}]
)
def test_other_data_has_another_fingerprint(corpora, change):
    a, b = str(corpora / "a"), str(corpora / "b")
    if change.get("sources") == "swapped weights":
        change = {"sources": (SourceConfig(a, 1.0), SourceConfig(b, 3.0))}
    elif change.get("sources") == "one":
        change = {"sources": (SourceConfig(a, 3.0),)}
    assert loader(corpora).fingerprint == loader(corpora, num_workers=1, dp=(1, 2)).fingerprint
    assert loader(corpora, **change).fingerprint != loader(corpora).fingerprint


@pytest.mark.parametrize(("dp", "micro", "sequences"), [(1, 1, 5), (2, 3, 7), (4, 2, 9)])
def test_validation_is_the_same_set_for_every_layout(corpora, dp, micro, sequences):
    def counted(batches):
        kept = [(row, mask) for b in batches for row, mask in zip(b.tokens_BL.tolist(), b.loss_mask_BL, strict=True)]
        return Counter(str(row) for row, mask in kept if mask.any())

    reference = counted(loader(corpora).validation_batches(sequences))
    ranks = [list(loader(corpora, micro, (rank, dp)).validation_batches(sequences)) for rank in range(dp)]
    assert {len(batches) for batches in ranks} == {-(-sequences // (dp * micro))}
    assert sum((counted(batches) for batches in ranks), Counter()) == reference
    assert sum(reference.values()) == sequences
    assert all(batch.tokens_BL.shape == (micro, S) for batches in ranks for batch in batches)


@pytest.mark.parametrize(("dp", "micro", "cp", "probes"), [(1, 1, 1, 0), (2, 3, 1, 4), (1, 4, 3, 2), (3, 2, 2, 5)])
def test_slices_and_probes_are_cut_like_labels(corpora, dp, micro, cp, probes):
    """Every label of every row keeps its slice, what fills up is in none, and only held-out rows have a loss."""
    sequences, length = 3, 64
    made = ProbeSequences(VOCAB_SIZE, length, probes)
    slices = slices_of(10**6, 0, 8, tuple(probe.name for probe in made.probes))
    held_out = np.random.default_rng(0).integers(0, 30, (sequences, length)).astype(np.uint8)
    rows = RecallRows(held_out, made, slices)
    plain = [batch for batch in loader(corpora, sequence_length_tokens=length).validation_batches(sequences)]
    expected = [(batch.labels_BL[0].tolist(), batch.loss_mask_BL[0].tolist()) for batch in plain]
    expected = [(*row, held_out[i].tolist()) for i, row in enumerate(expected)]
    expected += [(made.tokens(i)[1:].tolist(), [0.0] * length, made.slices(i, slices).tolist()) for i in range(probes)]
    found = []
    for rank in range(dp):
        of_slices = [
            loader(corpora, micro, (rank, dp), (part, cp), sequence_length_tokens=length).validation_batches(
                sequences, rows
            )
            for part in range(cp)
        ]
        for parts in zip(*of_slices, strict=True):
            names = ("labels_BL", "loss_mask_BL", "slices_BL")
            found += zip(
                *(torch.cat([getattr(part, name) for part in parts], 1).tolist() for name in names), strict=True
            )
    total = sequences + probes
    assert len(found) == -(-total // (dp * micro)) * dp * micro
    filling = [row for row in found if set(row[2]) == {NO_SLICE}]
    assert len(filling) == len(found) - total and all(set(row[1]) == {0.0} for row in filling)
    assert sorted(row for row in found if row not in filling) == sorted(expected)


def test_validation_uses_held_out_documents_only(corpora):
    tokens = torch.cat([batch.tokens_BL for batch in loader(corpora).validation_batches(10)])
    words = tokens[tokens != EOS]
    assert (((words > 20_000) & (words < 50_000)) | (words >= 70_000)).all()


def test_validation_takes_what_there_is(corpora):
    sizes = [len(SequenceReader(load_manifest(corpora / name), "validation", S, joined=True)) for name in "ab"]
    assert len(list(loader(corpora).validation_batches(10**6))) == sum(sizes)


def test_validation_that_holds_no_sequence_names_the_keys(corpora):
    with pytest.raises(DataError, match=r"data\.sequence_length_tokens 400: set validation\.interval_steps"):
        loader(corpora, sequence_length_tokens=400).validation_batches(10)


def test_training_split_that_holds_no_sequence_names_the_key(corpora):
    with pytest.raises(DataError, match=r"data\.sequence_length_tokens 8192 or prepare more text$"):
        loader(corpora, sequence_length_tokens=8192)


def test_vocabulary_that_is_too_small_names_the_key(corpora):
    with pytest.raises(DataError, match=r"model\.vocab_size 1000 .*131072"):
        check_tokenizer(load_manifest(corpora / "a"), 1000)


def test_batch_that_does_not_divide_names_the_keys(corpora):
    with pytest.raises(ConfigError, match=r"train\.global_batch_sequences 24 .*train\.micro_batch_sequences 5"):
        loader(corpora, micro=5)


def test_sources_of_different_tokenizers_are_refused(corpora, tmp_path):
    write_corpus(tmp_path / "c", numbered_documents([100]))
    path = tmp_path / "c" / "manifest.json"
    values = json.loads(path.read_text()) | {"tokenizer_xxh3": "0" * 32}
    path.write_text(json.dumps({**values, "fingerprint": fingerprint(values)}))
    sources = (SourceConfig(str(corpora / "a")), SourceConfig(str(tmp_path / "c")))
    with pytest.raises(DataError, match="different tokenizers"):
        loader(corpora, sources=sources)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.timeout(30)
def test_damage_found_while_reading_ahead_is_raised_not_swallowed(tmp_path, workers):
    manifest = write_corpus(tmp_path / "c", numbered_documents([1000]))
    member = manifest.splits["train"].members[0]
    with (tmp_path / "c" / member.file).open("r+b") as file:
        file.seek(member.offset)
        file.write(b"\xff" * member.tokens * 4)
    damaged = loader(tmp_path, sources=(), path=str(tmp_path / "c"), num_workers=workers)
    for step in (0, 1, 2):
        with pytest.raises(DataError, match="damaged: sample 00000000 does not match its hash in bytes 0 to 7168"):
            damaged.micro_batches(step)
    damaged.close()


@pytest.mark.timeout(30)
def test_one_worker_reads_the_next_step_before_it_is_asked_for(corpora, monkeypatch):
    read, next_step_read = [], threading.Event()
    original = SequenceReader.tokens

    def watched(reader, sequence, *bounds):
        read.append(sequence)
        if len(read) > GLOBAL_BATCH:
            next_step_read.set()
        return original(reader, sequence, *bounds)

    monkeypatch.setattr(SequenceReader, "tokens", watched)
    ahead = loader(corpora, num_workers=1)
    ahead.micro_batches(0)
    assert next_step_read.wait(20)
    ahead.close()


def test_close_ends_the_threads(corpora):
    ahead = loader(corpora, num_workers=2)
    ahead.micro_batches(0)
    ahead.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("loader")]


@given(units=st.integers(0, 1000), size=st.integers(1, 50), multiple=st.integers(1, 8))
def test_slices_are_contiguous_and_even(units, size, multiple):
    bounds = even_bounds(units * multiple, size, multiple)
    assert bounds[0] == 0 and bounds[-1] == units * multiple and len(bounds) == size + 1
    lengths = [right - left for left, right in itertools.pairwise(bounds)]
    assert lengths == sorted(lengths, reverse=True) and max(lengths) - min(lengths) <= multiple
    assert all(length % multiple == 0 for length in lengths)
