"""Words for weights that change over a run."""

import pytest

from based_megatron.config import SourceConfig
from based_megatron.config.schema import DataConfig
from based_megatron.config.weights import Weights, weights_of
from based_megatron.errors import ConfigError


def data(*schedule: str, weights: tuple[float, ...] = (3.0, 1.0)) -> DataConfig:
    sources = tuple(SourceConfig(f"c{place}", weight) for place, weight in enumerate(weights))
    return DataConfig(sources=sources, schedule=schedule)


@pytest.mark.parametrize(
    ("word", "tokens", "weights"),
    [
        ("7=1,2", 7, (1, 2)),
        ("300B=0.5,0.5", 300 * 10**9, (0.5, 0.5)),
        ("1.5k=0,1", 1500, (0, 1)),
        ("2M=1e-3,1", 2 * 10**6, (0.001, 1)),
        ("0.25T=1, 2", 250 * 10**9, (1, 2)),
        ("9007199254740993=1,1", 9007199254740993, (1, 1)),
    ],
)
def test_a_word_is_read(word, tokens, weights):
    assert weights_of(data(word)) == [Weights(0, (3, 1)), Weights(tokens, weights)]


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        (("300B",), "'300B', not TOKENS=WEIGHT.* each of 2 data.sources, such as 300B=1,1"),
        (("300B=1",), "each of 2 data.sources"),
        (("300B=1,1,1",), "each of 2 data.sources"),
        (("300B=1,x",), "not TOKENS=WEIGHT"),
        (("300G=1,1",), "not TOKENS=WEIGHT"),
        (("-3=1,1",), "not TOKENS=WEIGHT"),
        (("0=1,1",), "after 0 tokens"),
        (("300B=1,1", "300B=1,2"), "after 300000000000 tokens.*ascending"),
        (("300B=1,1", "200B=1,2"), "ascending"),
        (("300B=0,0",), "some above it"),
        (("300B=-1,1",), "at least 0"),
        (("300B=nan,1",), "finite"),
        (("300B=inf,1",), "finite"),
    ],
)
def test_a_word_that_is_none_is_refused_with_its_key(schedule, words):
    with pytest.raises(ConfigError, match=words) as error:
        weights_of(data(*schedule))
    assert "data.schedule" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 0.0), (-1.0, 1.0)])
def test_sources_that_are_never_read_are_refused(weights):
    with pytest.raises(ConfigError, match=r"data\.sources"):
        weights_of(data(weights=weights))


def test_a_source_may_wait_for_the_schedule():
    assert weights_of(data("5=0,1", weights=(1, 0)))[0].weights == (1, 0)


def test_a_single_corpus_has_one_weight_and_no_schedule():
    assert weights_of(DataConfig(path="c")) == [Weights(0, (1.0,))]
    with pytest.raises(ConfigError, match=r"change data\.schedule"):
        weights_of(DataConfig(path="c", schedule=("5=1",)))
