"""With carried states each row of the batch reads its own part of the corpus in order, and knows how far back its document goes."""

import numpy as np
import pytest
import torch
from made_corpora import EOS, numbered_documents, random_lengths, write_corpus

from based_megatron.config.schema import DataConfig
from based_megatron.data.documents import documents_of_step
from based_megatron.data.loader import Loader
from based_megatron.data.sources import Sources
from based_megatron.errors import DataError

S, ROWS, STEPS = 16, 3, 40


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Blocks of 100 tokens, which no sequence length divides; some documents are longer than several of them."""
    lengths = random_lengths(60, 40)
    lengths[5] = 420
    lengths[20] = 199
    documents = numbered_documents(lengths)
    folder = tmp_path_factory.mktemp("corpus") / "c"
    write_corpus(folder, documents, block_tokens=100)
    return folder, np.concatenate(documents).astype(np.int64)


def loader(folder, dp=(0, 1), cp=(0, 1), micro=1) -> Loader:
    data = DataConfig(path=str(folder), sequence_length_tokens=S, num_workers=0, carry_state=True)
    return Loader(Sources(data, ROWS), data, ROWS, micro, *dp, *cp)


def test_rows_read_their_parts_of_the_stream_in_order(corpus):
    folder, stream = corpus
    share = (len(stream) - 1) // S // ROWS
    steps = [loader(folder).micro_batches(step) for step in range(share + 1)]
    for row in range(ROWS):
        batches = [step[row] for step in steps]
        assert [batch.row for batch in batches] == [row] * len(batches)
        tokens = torch.cat([batch.tokens_BL[0] for batch in batches[:-1]])
        begin = row * share * S
        assert tokens.tolist() == stream[begin : begin + share * S].tolist()
        # The next pass begins where this one did.
        assert torch.equal(batches[-1].tokens_BL, batches[0].tokens_BL)
        assert batches[-1].documents.tokens_before == (0,)  # type: ignore[union-attr]


def test_documents_know_how_far_back_they_go(corpus):
    folder, stream = corpus
    share, seen_long = (len(stream) - 1) // S // ROWS, 0
    for step in range(share):
        for row, batch in enumerate(loader(folder).micro_batches(step)):
            pass_begin = row * share * S
            begin = pass_begin + step * S
            ends_before = np.flatnonzero(stream[pass_begin:begin] == EOS)
            since = step * S - (int(ends_before[-1]) + 1 if len(ends_before) else 0)
            assert batch.documents is not None and batch.documents.tokens_before == (since,)
            inside = np.flatnonzero(stream[begin : begin + S - 1] == EOS) + 1
            assert batch.documents.starts[0].tolist() == [0, *inside.tolist()]
            assert torch.equal(batch.loss_mask_BL[0] == 0, batch.tokens_BL[0] == EOS)
            seen_long += since > 2 * 100
    assert seen_long > 3


def test_slices_and_data_parallel_ranks_get_parts_of_the_same(corpus):
    folder, _ = corpus
    for step in (0, 5):
        whole = loader(folder).micro_batches(step)
        for dp_rank in range(3):
            slices = [loader(folder, (dp_rank, 3), (rank, 3)).micro_batches(step)[0] for rank in range(3)]
            joined = torch.cat([part.tokens_BL for part in slices], 1)
            assert torch.equal(joined, whole[dp_rank].tokens_BL)
            assert {part.documents.tokens_before for part in slices} == {whole[dp_rank].documents.tokens_before}  # type: ignore[union-attr]


def test_the_documents_of_a_step_can_be_listed(corpus):
    folder, _ = corpus
    data = DataConfig(path=str(folder), sequence_length_tokens=S, carry_state=True)
    for step in range(STEPS):
        parts = list(documents_of_step(Sources(data, ROWS), step, ROWS))
        for row in range(ROWS):
            assert sum(part.tokens for part in parts if part.sequence == row) == S


def test_the_order_is_part_of_the_fingerprint(corpus):
    folder, _ = corpus
    plain = Sources(DataConfig(path=str(folder), sequence_length_tokens=S), ROWS).fingerprint
    assert loader(folder).fingerprint != plain


def test_more_rows_than_sequences_are_refused(corpus):
    folder, _ = corpus
    with pytest.raises(DataError, match=r"data\.carry_state.*train\.global_batch_sequences"):
        Sources(DataConfig(path=str(folder), sequence_length_tokens=S, carry_state=True), 10_000)
