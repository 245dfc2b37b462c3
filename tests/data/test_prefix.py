"""The loss of sequences with a prefix: which labels it has, what is masked, and what each weighs."""

import dataclasses

import pytest
import torch

from based_megatron.config import Config, DataConfig, ModelConfig
from based_megatron.data.batch import MicroBatch
from based_megatron.data.prefix import Prefix, build_prefix
from based_megatron.data.slices import NO_SLICE
from based_megatron.parallel.sequence.documents import Documents

LENGTH, MASK = 40, 99
PREFIX = Prefix(tokens=20, mask_fraction=0.15, mask_token=MASK, seed=7)


def batch(documents: Documents | None = None) -> MicroBatch:
    """Two sequences, tokens 1 to 41 and so on."""
    tokens = 1 + torch.arange(LENGTH + 1) + torch.tensor([[0], [1000]])
    return MicroBatch(tokens[:, :-1].clone(), tokens[:, 1:].clone(), torch.ones(2, LENGTH), documents, (0, LENGTH))


def test_labels_that_the_prefix_shows_are_in_no_loss_and_no_slice():
    """The label of its last token is the first that it does not show."""
    found = PREFIX.causal(dataclasses.replace(batch(), slices_BL=torch.full((2, LENGTH), 3, dtype=torch.uint8)))
    assert found.loss_mask_BL[0].tolist() == [0.0] * 19 + [1.0] * 21
    assert found.slices_BL[0].tolist() == [NO_SLICE] * 19 + [3] * 21
    assert torch.equal(found.tokens_BL, batch().tokens_BL)


def test_masked_tokens_are_predicted_in_place():
    found, plain = PREFIX.masked(batch(), [5, 6]), batch()
    masked = found.tokens_BL == MASK
    assert masked.sum(1).tolist() == [3, 3] and not masked[:, 20:].any()
    assert torch.equal(found.labels_BL[masked], plain.tokens_BL[masked])
    assert torch.equal(found.labels_BL[~masked], plain.labels_BL[~masked])
    assert torch.equal(found.tokens_BL[~masked], plain.tokens_BL[~masked])
    assert (found.loss_mask_BL[:, :19][~masked[:, :19]] == 0).all()


@pytest.mark.parametrize("documents", [None, Documents((torch.tensor([0, 12]), torch.tensor([0, 30])))])
def test_the_weighted_mean_is_that_of_the_paper(documents):
    """(mean over next tokens + 0.25 mean over masked tokens) / 1.25, and weights that add up to the next tokens."""
    found = PREFIX.masked(batch(documents), [1, 2])
    loss_BL = torch.rand(2, LENGTH, generator=torch.Generator().manual_seed(0))
    for row in range(2):
        masked, weights = found.tokens_BL[row] == MASK, found.loss_mask_BL[row]
        following = (weights > 0) & ~masked
        expected = (loss_BL[row, following].mean() + 0.25 * loss_BL[row, masked].mean()) / 1.25
        torch.testing.assert_close((loss_BL[row] * weights).sum() / weights.sum(), expected)
        torch.testing.assert_close(weights.sum(), following.sum().float())


def test_a_prefix_ends_with_the_first_document():
    """Its last label, of the next document, is the loader's to leave out; labels after it count."""
    found = PREFIX.masked(batch(Documents((torch.tensor([0, 12]), torch.tensor([0])))), [1, 2])
    masked = found.tokens_BL == MASK
    assert masked.sum(1).tolist() == [2, 3] and not masked[0, 12:].any()
    assert (found.loss_mask_BL[0, 12:] > 0).all() and (found.loss_mask_BL[1, :19] > 0).sum() <= 3


def test_masks_depend_on_the_seed_and_the_sequence_alone():
    both = PREFIX.masked(batch(), [5, 6])
    swapped = PREFIX.masked(batch(), [6, 5])
    places = [
        (x.tokens_BL == MASK) for x in (both, swapped, dataclasses.replace(PREFIX, seed=8).masked(batch(), [5, 6]))
    ]
    assert torch.equal(places[0], places[1].flip(0)) and not torch.equal(places[0][0], places[0][1])
    assert not torch.equal(places[0], places[2])


def test_the_mask_is_the_last_row_of_the_embedding_that_is_no_token():
    model = ModelConfig(prefix_tokens=16, vocab_size=50257, vocab_multiple=8)
    config = Config(model=model, data=DataConfig(path="unused", seed=3))
    assert build_prefix(config) == Prefix(16, 0.15, 50263, 3)
    assert build_prefix(dataclasses.replace(config, model=ModelConfig())) is None
