"""Products at the same time as messages are those of Megatron's layers, bit for bit, and wait for what they read.

Inputs are whole numbers: their sums are exact in any order, so that nothing needs a tolerance. Memory that other ranks write to is in
files, and that of GPUs under BASED_TEST_DEVICE=cuda.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from based_megatron.config import ModelConfig, ParallelConfig
from based_megatron.errors import ConfigError
from based_megatron.model.config import based_config
from based_megatron.parallel.gradient_sums import gradient, keep_sum
from based_megatron.parallel.linear import column_linear, row_linear
from based_megatron.parallel.megatron import megatron_runs
from based_megatron.parallel.symmetric import MemoryRanks, memory_ranks, overlapping_ranks
from based_megatron.parallel.tensor_overlap import CollectiveRanks, TensorRanks
from support.layouts import topology_of
from support.pool import on_gpu, rank_device

HIDDEN, FEATURES, LENGTH, BATCH = 8, 12, 20, 3
PRODUCTS = ("mm", "addmm")
WAYS = ("collectives", "memory")

Surroundings = Callable[[list[str]], AbstractContextManager[Any]]


class FileBuffer:
    """A buffer of each rank, in files. What is written for others arrives at the barrier, and nothing is there before."""

    def __init__(self, folder: Path, size_bytes: int, group: dist.ProcessGroup, log: list[str]) -> None:
        self.folder, self.size_bytes, self.group, self.log = folder, size_bytes, group, log
        self.staged: dict[int, Tensor] = {}
        folder.mkdir(exist_ok=True)
        self.file(group.rank()).fill_(255)  # NaN
        dist.barrier(group)

    def file(self, rank: int) -> Tensor:
        return torch.from_file(str(self.folder / f"{rank}"), shared=True, size=self.size_bytes, dtype=torch.uint8)

    def get_buffer(self, rank: int, sizes: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        is_own = rank == self.group.rank()
        whole = self.file(rank) if is_own else torch.full((self.size_bytes,), 255, dtype=torch.uint8)
        used = whole[: math.prod(sizes) * dtype.itemsize].view(sizes[0], -1)
        if not is_own:
            self.staged[rank] = used
        return used.flatten().view(dtype).view(sizes)

    def barrier(self) -> None:
        own = self.group.rank()
        for rank, used in self.staged.items():
            self.file(rank)[: used.numel()].view(used.shape)[own] = used[own]
        self.staged.clear()
        self.log.append(f"barrier {self.folder.name}")
        dist.barrier(self.group)


def ranks_of(way: str, group: dist.ProcessGroup, folder: Path, log: list[str]) -> TensorRanks | None:
    """The ranks of a way to overlap; None for Megatron's layers."""
    device = rank_device(dist.get_rank())
    if way != "memory":
        return CollectiveRanks(group) if way == "collectives" else None
    if on_gpu():
        return memory_ranks(group, device)
    folders = iter(folder / str(i) for i in range(10))
    return MemoryRanks(group.rank(), group.size(), device, lambda size: FileBuffer(next(folders), size, group, log))


def whole_numbers(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-4, 5, shape, generator=generator).to(rank_device(dist.get_rank()), torch.float32)


def build(way: str, folder: Path, log: list[str], sums: bool) -> tuple[Any, Any]:
    """A column and a row layer with biases, the same ones with each way to overlap; sums: parameters keep sums of gradients."""
    parallel = ParallelConfig(tensor=dist.get_world_size())
    model = ModelConfig(layer_pattern="c", hidden_size=HIDDEN, ffn_hidden_size=8, num_heads=4)
    group = topology_of(parallel).tensor.group
    ranks = ranks_of(way, group, folder, log)
    settings = dict(dtype=torch.float32, backend="reference", recompute="none", tensor_ranks=ranks)
    config = based_config(model, parallel, **settings)  # type: ignore[arg-type]
    layers = (
        column_linear(config, (FEATURES,), bias=True, group=group),
        row_linear(config, FEATURES, bias=True, group=group),
    )
    for layer in layers:
        layer.to(rank_device(dist.get_rank()))
        for seed, parameter in enumerate(layer.parameters()):
            parameter.data.copy_(whole_numbers(*parameter.shape, seed=10 * dist.get_rank() + seed))
            if sums:
                keep_sum(parameter, torch.full_like(parameter, float("nan")))
    return layers


def nothing(log: list[str]) -> AbstractContextManager[Any]:
    return nullcontext()


@megatron_runs()
def column_then_row(
    way: str, folder: Path, surroundings: Surroundings = nothing, sums: bool = False
) -> tuple[dict[str, Tensor], str]:
    """row(column(x)^2): its value and all gradients, and what happened in which order."""
    log: list[str] = []
    column, row = build(way, folder, log, sums)
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
        found |= {f"{name}.{key}": gradient(parameter) for key, parameter in layer.named_parameters()}
    return {key: value.cpu() for key, value in found.items()}, " ".join(log)


@contextmanager
def late_messages(log: list[str]) -> Iterator[None]:
    """Collectives that move nothing before they are waited for: what is read, or changed, too early is wrong."""

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


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("way", WAYS)
def test_overlap_changes_no_bit_of_values_and_gradients(worker_pool, tmp_path, way, ranks):
    """Messages are late, and bring nothing before they are waited for. Four ranks add their gradients to sums."""
    surroundings, sums = observed if way == "collectives" else nothing, ranks == 4
    expected = worker_pool(ranks).run(column_then_row, "off", tmp_path)
    for (found, _), (plain, _) in zip(
        worker_pool(ranks).run(column_then_row, way, tmp_path, surroundings, sums), expected, strict=True
    ):
        assert found.keys() == plain.keys() and len(found) == 6
        for name, value in found.items():
            assert plain[name].count_nonzero() and torch.equal(value, plain[name]), name


def test_products_run_during_messages_and_rows_are_gathered_once(worker_pool, tmp_path):
    """In backward the row layer gathers first, then the column layer sums; a weight gradient is the last product of each."""
    row_backward, column_backward = "gather product wait product product", "product sum product wait"
    expected = f"gather product wait product | product sum wait | {row_backward} {column_backward}"
    assert [log for _, log in worker_pool(2).run(column_then_row, "collectives", tmp_path, observed)] == [expected] * 2


@pytest.mark.skipif(on_gpu(), reason="the memory of a GPU keeps no log")
def test_inboxes_take_turns(worker_pool, tmp_path):
    """One barrier an exchange is enough only then."""
    row_backward, column_backward = "barrier 1 product product product", "product product product barrier 0"
    expected = f"barrier 1 product product | product product barrier 0 | {row_backward} {column_backward}"
    assert [log for _, log in worker_pool(2).run(column_then_row, "memory", tmp_path, Products)] == [expected] * 2


def insist_on_memory() -> str:
    parallel = ParallelConfig(tensor=2, overlap_tensor="memory")
    try:
        overlapping_ranks(parallel, topology_of(parallel).tensor.group, torch.device("cpu"))
    except ConfigError as error:
        return str(error)
    return ""


def test_ranks_that_cannot_write_to_each_other_are_refused(worker_pool):
    assert all("set parallel.overlap_tensor=collectives" in text for text in worker_pool(2).run(insist_on_memory))
