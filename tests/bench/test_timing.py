"""Timing on a CPU, and what is said of baselines that give no time."""

import pytest
import torch

from based_megatron.bench.keys import Method
from based_megatron.bench.timing import Bench, forward_backward

BENCH = Bench(torch.device("cpu"), torch.float32, "reference", quick=True)


def test_a_time_is_the_median_of_calls_taken_in_turn():
    seen: list[int] = []
    timing = Bench(torch.device("cpu"), torch.float32, "reference").time(
        [lambda: seen.append(0), lambda: seen.append(1)]
    )
    assert timing.ms >= 0 and timing.method is Method.CLOCK
    assert {*seen} == {0, 1}


def test_gradients_of_floats_only_and_fresh_in_every_call():
    x, index = torch.ones(3), torch.tensor([0, 2])
    call = forward_backward(lambda x, index: x[index] * 2, [x, index], torch.ones(2))
    for _ in range(2):
        (grad,) = call()
        assert grad.tolist() == [2, 0, 2]
    assert x.grad is None


def raises(error: Exception):
    def build():
        raise error

    return build


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ModuleNotFoundError("No module named 'fla'"), "not installed"),
        (NotImplementedError("compiled for a GPU only"), "compiled for a GPU only"),
        (ValueError("head dim\n 112"), "failed: ValueError: head dim 112"),
    ],
)
def test_a_baseline_without_a_time_says_why(error, said):
    assert BENCH.baseline(raises(error)) == said
    assert BENCH.baseline(lambda: raises(error)) == said, "an error of the call itself"


def test_random_numbers_have_the_bench_dtype_and_are_fresh():
    bench = Bench(torch.device("cpu"), torch.bfloat16, "reference")
    a, b = bench.random(4, 5), bench.random(4, 5)
    assert a.dtype == torch.bfloat16 and a.shape == (4, 5) and not torch.equal(a, b)
    assert bench.random(2, dtype=torch.float32).dtype == torch.float32
