"""Products beside messages are those of Megatron's layers, bit for bit, and wait for what they read.

Inputs are whole numbers: their sums are exact in any order, so that nothing needs a tolerance.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from based_megatron.config import ModelConfig, ParallelConfig
from based_megatron.model.config import based_config
from based_megatron.parallel.linear import column_linear, row_linear
from based_megatron.parallel.megatron import megatron_runs
from support.layouts import topology_of
from support.pool import rank_device

HIDDEN, FEATURES, LENGTH, BATCH = 8, 12, 20, 3
"""Rows of a rank, 15 or 30, do not divide into pieces."""
PRODUCTS = ("mm", "addmm", "bmm")

Surroundings = Callable[[list[str]], AbstractContextManager[Any]]


def whole_numbers(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-4, 5, shape, generator=generator).to(rank_device(dist.get_rank()), torch.float32)


def build(overlap: bool) -> tuple[Any, Any]:
    """A column and a row layer with biases, the same ones with and without overlap."""
    parallel = ParallelConfig(tensor=dist.get_world_size(), overlap_tensor=overlap)
    model = ModelConfig(layer_pattern="c", hidden_size=HIDDEN, ffn_hidden_size=8, num_heads=4)
    config = based_config(model, parallel, dtype=torch.float32, backend="reference", recompute="none")
    group = topology_of(parallel).tensor.group
    layers = (
        column_linear(config, (FEATURES,), bias=True, group=group),
        row_linear(config, FEATURES, bias=True, group=group),
    )
    for layer in layers:
        layer.to(rank_device(dist.get_rank()))
        for seed, parameter in enumerate(layer.parameters()):
            parameter.data.copy_(whole_numbers(*parameter.shape, seed=10 * dist.get_rank() + seed))
    return layers


def nothing(log: list[str]) -> AbstractContextManager[Any]:
    return nullcontext()


@megatron_runs()
def column_then_row(overlap: bool, surroundings: Surroundings = nothing) -> tuple[dict[str, Tensor], list[str]]:
    """row(column(x)^2): its value and all gradients, and what happened in which order."""
    column, row = build(overlap)
    log: list[str] = []
    x = whole_numbers(LENGTH // dist.get_world_size(), BATCH, HIDDEN, seed=100 + dist.get_rank()).requires_grad_()
    with surroundings(log):
        middle = column(x)[0]
        log.append("|")
        y, loose_bias = row(middle * middle)
        log.append("|")
        y.backward(whole_numbers(*y.shape, seed=200 + dist.get_rank()))
    assert loose_bias is None and x.grad is not None
    found = {"value": y.detach(), "input": x.grad}
    for name, layer in (("column", column), ("row", row)):
        found |= {f"{name}.{key}": parameter.grad for key, parameter in layer.named_parameters()}
    return {key: value.cpu() for key, value in found.items()}, log


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys() and len(found) == 6
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("ranks", [2, 4])
def test_overlap_changes_no_bit_of_values_and_gradients(worker_pool, ranks):
    expected = worker_pool(ranks).run(column_then_row, False)
    for (found, _), (plain, _) in zip(worker_pool(ranks).run(column_then_row, True), expected, strict=True):
        assert all(value.count_nonzero() for value in plain.values())
        assert_equal(found, plain)


@contextmanager
def late_messages(log: list[str]) -> Iterator[None]:
    """Messages that move nothing before they are waited for: what is read, or changed, too early is wrong."""

    def late(name: str, collective: Callable[..., Any]) -> Callable[..., Any]:
        def start(output: Tensor, source: Tensor, *, group: Any, async_op: bool) -> Any:
            assert async_op
            log.append(name)
            output.fill_(float("nan"))
            return mock.Mock(wait=lambda: (log.append("wait"), collective(output, source, group=group)))

        return start

    names = {"all_gather_into_tensor": "gather", "reduce_scatter_tensor": "sum"}
    with mock.patch.multiple(dist, **{name: late(short, getattr(dist, name)) for name, short in names.items()}):
        yield


class Products(TorchDispatchMode):
    """Logs matrix products."""

    def __init__(self, log: list[str]) -> None:
        super().__init__()
        self.log = log

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.overloadpacket.__name__ in PRODUCTS:
            self.log.append("product")
        return func(*args, **(kwargs or {}))


@contextmanager
def observed(log: list[str]) -> Iterator[None]:
    with late_messages(log), Products(log):
        yield


def test_rows_are_read_after_they_have_arrived(worker_pool):
    expected = worker_pool(2).run(column_then_row, False)
    for (found, _), (plain, _) in zip(worker_pool(2).run(column_then_row, True, observed), expected, strict=True):
        assert_equal(found, plain)


def test_products_run_beside_messages_and_rows_are_gathered_once(worker_pool):
    """In backward the row layer gathers first, then the column layer sums; a weight gradient is the last product of each."""
    row_backward = "gather product wait product product"
    column_backward = "product sum product wait"
    expected = f"gather product wait product | product sum product sum wait wait | {row_backward} {column_backward}"
    for _, log in worker_pool(2).run(column_then_row, True, observed):
        assert " ".join(log) == expected
