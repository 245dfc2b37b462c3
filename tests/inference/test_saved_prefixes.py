"""States of prompts that were read before: what follows them is what follows the whole prompt."""

import pytest
import torch

from based_megatron.errors import CheckpointError
from based_megatron.inference.engine import Engine
from based_megatron.inference.prefix import Prefix, PrefixStore, load_prefix
from based_megatron.inference.reader import Reader, Tokens
from support.decoding import MODEL, engine_of, prompts


@pytest.fixture(scope="module")
def engine() -> Engine:
    return engine_of()


START = prompts(1, seed=3)[0] * 2
ROWS = [(*START, 3, 4), (9, 8), START, (*START, 5), START[:4], (*START, 3, 4, 7, 7)]


def prefix_of(engine: Engine, tokens: Tokens) -> Prefix:
    return Prefix(tokens, *Reader(engine).read([tokens]))


def read(store: PrefixStore, engine: Engine, rows: list[Tokens]) -> tuple[float, int]:
    """The largest error of logits and of a step after them, against each row read alone; the tokens that were computed."""
    reader = Reader(engine)
    logits, states = store.read(reader, rows)
    step = engine.decode_step(reader.index(range(len(rows))), states)
    errors = []
    for place, row in enumerate(rows):
        expected, alone = engine.prefill(reader.tensor([row], len(row)))
        after = engine.decode_step(reader.index([place]), alone)
        errors += [logits[place] - expected[0], step[place] - after[0]]
    return float(torch.stack(errors).abs().max()), reader.computed_tokens


def test_rows_go_on_from_the_longest_prefix_that_they_have(engine):
    store = PrefixStore()
    store.add(prefix_of(engine, START[:5]))
    store.add(prefix_of(engine, START))
    error, computed = read(store, engine, ROWS)
    assert error < 1e-10
    assert computed == sum(map(len, ROWS)) - 4 * len(START), "rows with the start read what is behind it"
    assert store.saved_tokens == 4 * len(START)


def test_prompts_that_were_read_are_remembered_and_the_oldest_forgotten(engine):
    store = PrefixStore(remembered=2)
    assert read(store, engine, [START])[1] == len(START)
    error, computed = read(store, engine, [(*START, 3, 4)])
    assert error < 1e-10 and computed == 2
    read(store, engine, [(1, 2, 3)])
    error, computed = read(store, engine, [(*START, 3, 4), START])
    assert error < 1e-10 and computed == len(START), "START alone was the oldest; the longer one is whole"


def test_using_a_prefix_does_not_change_it(engine):
    store = PrefixStore()
    store.add(prefix_of(engine, START))
    assert [read(store, engine, ROWS[:1])[0] < 1e-10 for _ in range(3)] == [True] * 3


def test_a_saved_prefix_goes_on_the_same_bit_for_bit(engine, tmp_path):
    prefix = prefix_of(engine, START)
    prefix.save(tmp_path / "start", engine.model)
    loaded = load_prefix(tmp_path / "start", engine.model, engine.model.zero_states(1))
    assert loaded.tokens == prefix.tokens and torch.equal(loaded.logits_1U, prefix.logits_1U)
    found = [Reader(engine).read([(7, 8)], each.states)[0] for each in (prefix, loaded)]
    assert torch.equal(*found) and not loaded.states.is_start


def test_states_of_another_model_are_refused(engine, tmp_path):
    prefix_of(engine, START).save(tmp_path / "start", engine.model)
    other = engine_of(torch.float32)
    with pytest.raises(CheckpointError, match="not of this model's weights in this precision"):
        load_prefix(tmp_path / "start", other.model, other.model.zero_states(1))
    (tmp_path / "broken").write_bytes((tmp_path / "start").read_bytes()[:100])
    for name in ("broken", "none"):
        with pytest.raises(CheckpointError, match="cannot read the states"):
            load_prefix(tmp_path / name, engine.model, engine.model.zero_states(1))
    with pytest.raises(CheckpointError, match="cannot write the states"):
        prefix_of(engine, START).save(tmp_path / "no" / "folder", engine.model)


def test_a_prefix_shorter_than_what_all_tokens_see_is_not_used():
    """With model.prefix_tokens, tokens of the first piece see each other both ways."""
    import dataclasses

    engine = engine_of(model=dataclasses.replace(MODEL, prefix_tokens=6))
    store = PrefixStore()
    store.add(prefix_of(engine, START[:4]))
    error, computed = read(store, engine, [START, START[:4]])
    assert error < 1e-10 and computed == len(START)
