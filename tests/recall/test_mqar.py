"""Examples of MQAR: what every one of them keeps to, the law of the gaps, and which stream of random numbers makes which."""

import dataclasses

import pytest
import torch

from based_megatron.errors import ConfigError
from based_megatron.recall.mqar import FIGURE, NO_LABEL, TINY, Data, Segment, Task, draw, stream_seed


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("random_fillers", [True, False])
@pytest.mark.parametrize(("length", "pairs"), [(32, 3), (64, 16), (32, 1)])
def test_a_query_asks_for_the_value_of_its_key(length, pairs, random_fillers):
    """4 x 16 = 64: with it every slot has a query."""
    task = dataclasses.replace(TINY, vocab_size=100, random_fillers=random_fillers)
    examples = draw(task, Segment(length, pairs, 0), 50, generator())
    labels = examples.labels()
    for tokens, positions, label in zip(examples.tokens_BT, examples.positions_BK, labels, strict=True):
        keys, values = tokens[0 : 2 * pairs : 2].tolist(), tokens[1 : 2 * pairs : 2].tolist()
        assert len(set(keys)) == len(set(values)) == pairs
        assert all(1 <= key < 50 for key in keys) and all(50 <= value < 100 for value in values)
        assert tokens[positions].tolist() == keys and label[positions].tolist() == values
        places = sorted(positions.tolist())
        assert len(set(places)) == pairs and places[0] >= 2 * pairs and all(place % 2 == 0 for place in places)
        assert (label == NO_LABEL).sum() == length - pairs
        others = set(range(2 * pairs, length)) - set(places)
        assert random_fillers or all(tokens[place] == 0 for place in others)
    if 4 * pairs == length:
        assert examples.positions_BK.sort(dim=1).values.eq(torch.arange(2 * pairs, length, 2)).all()


def test_all_keys_and_values_are_drawn():
    examples = draw(TINY, Segment(32, 8, 0), 2000, generator())
    keys, values = examples.tokens_BT[:, 0:16:2].unique(), examples.tokens_BT[:, 1:16:2].unique()
    assert keys.tolist() == list(range(1, 32)) and values.tolist() == list(range(32, 64))


@pytest.mark.parametrize("power", [0.01, 0.7])
def test_the_first_slot_follows_the_power_law(power):
    """20,000 draws: the standard deviation of a frequency is below 0.0036."""
    task = dataclasses.replace(TINY, power=power)
    examples = draw(task, Segment(32, 4, 0), 20_000, generator())
    slots = (examples.positions_BK[:, 0] - 8) // 2
    found = torch.bincount(slots, minlength=12) / len(slots)
    weights = torch.arange(1, 13, dtype=torch.float64) ** (power - 1)
    torch.testing.assert_close(found.double(), weights / weights.sum(), atol=0.015, rtol=0)


def test_the_second_slot_is_drawn_from_those_that_are_left():
    """Given the first in slot 0, the second follows the law without slot 0."""
    examples = draw(TINY, Segment(32, 4, 0), 40_000, generator())
    slots = (examples.positions_BK - 8) // 2
    second = slots[slots[:, 0] == 0, 1]
    found = torch.bincount(second, minlength=12) / len(second)
    weights = torch.arange(1, 13, dtype=torch.float64) ** (TINY.power - 1)
    weights[0] = 0
    torch.testing.assert_close(found.double(), weights / weights.sum(), atol=0.02, rtol=0)


def test_pieces_do_not_repeat_each_other(monkeypatch):
    monkeypatch.setattr("based_megatron.recall.mqar.PIECE_EXAMPLES", 10)
    tokens = draw(TINY, Segment(32, 8, 0), 25, generator()).tokens_BT
    assert len(tokens) == 25 and len({tuple(row) for row in tokens.tolist()}) == 25


def test_training_and_tests_never_share_a_stream():
    seeds = {
        split: {stream_seed(seed, split, i) for seed in range(200) for i in range(7)} for split in ("train", "test")
    }
    assert max(seeds["train"]) < 1 << 31 <= min(seeds["test"]) and max(seeds["test"]) < 1 << 32
    assert len(seeds["train"]) == len(seeds["test"]) == 1400


SMALL = Task(64, (Segment(16, 2, 10), Segment(32, 4, 7)), (Segment(32, 8, 5),))


def rows_of(data: Data, epoch: int, **options) -> list[list[tuple[int, ...]]]:
    return [[tuple(row) for row in batch.tokens_BT.tolist()] for batch in data.batches(epoch, 4, 0, **options)]


def test_an_epoch_has_every_example_once_in_an_order_of_its_own():
    data = Data(SMALL, torch.device("cpu"))
    epochs = [rows_of(data, epoch) for epoch in (0, 1, 0)]
    assert epochs[0] == epochs[2] != epochs[1] and len(epochs[0]) == data.batches_per_epoch(4) == 5
    examples = [sorted(row for batch in epoch for row in batch) for epoch in epochs]
    assert examples[0] == examples[1] and len(set(examples[0])) == 17
    assert all(len({len(row) for row in batch}) == 1 for batch in epochs[0]), "batches are of one segment"


def test_ordered_batches_come_segment_by_segment_in_every_epoch():
    data = Data(SMALL, torch.device("cpu"))
    epochs = [rows_of(data, epoch, ordered=True) for epoch in (0, 1)]
    assert epochs[0] == epochs[1]
    assert [(len(batch), len(batch[0])) for batch in epochs[0]] == [(4, 16), (4, 16), (2, 16), (4, 32), (3, 32)]


def test_fresh_examples_are_never_seen_again_and_come_again_with_the_epoch():
    data = Data(dataclasses.replace(SMALL, fresh=True), torch.device("cpu"))
    first, second, again = (rows_of(data, epoch) for epoch in (0, 1, 0))
    assert first == again
    assert not {row for batch in first for row in batch} & {row for batch in second for row in batch}


def test_the_sets_are_those_of_the_seed():
    sets = [Data(dataclasses.replace(SMALL, seed=seed), torch.device("cpu")).test[0].tokens_BT for seed in (1, 1, 2)]
    assert torch.equal(sets[0], sets[1]) and not torch.equal(sets[0], sets[2])


def test_the_published_task_is_there():
    """Section 1.2 of what is known: 180,000 examples, 707 batches of 256, 2.8 million labels."""
    assert sum(segment.examples for segment in FIGURE.train) == 180_000
    assert sum(-(-segment.examples // 256) for segment in FIGURE.train) == 707
    assert sum(segment.examples * segment.pairs for segment in FIGURE.train) == 2_800_000
    FIGURE.check()


@pytest.mark.parametrize(
    ("vocab", "length", "pairs", "expected"),
    [
        (100, 32, 9, r"32/9.*4 x 9 = 36 tokens, there are 32"),
        (100, 33, 4, r"33/4.*even number"),
        (100, 32, 0, r"32/0.*at least one pair"),
        (32, 32, 4, r"vocabulary of 32 is too small.*exceed 32"),
        (34, 32, 8, None),
    ],
)
def test_examples_that_cannot_be_are_refused_in_one_line(vocab, length, pairs, expected):
    task = Task(vocab, (Segment(length, pairs, 1),), ())
    if expected is None:
        task.check()
        return
    with pytest.raises(ConfigError, match=expected) as error:
        task.check()
    assert "\n" not in str(error.value)
