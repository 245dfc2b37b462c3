"""Linear layers cut over two tensor parallel ranks do what the unsharded layer does, and every parameter knows its place."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from based_megatron.config import ModelConfig, ParallelConfig
from based_megatron.model.config import based_config
from based_megatron.parallel.linear import (
    attach_shard_specs,
    column_linear,
    grouped_by,
    is_tied_copy,
    row_linear,
    shard_parameter,
    shard_spec,
    vocab_embedding,
)
from based_megatron.parallel.megatron import megatron_runs
from based_megatron.parallel.sharding import VOCAB_MULTIPLE, ShardSpec
from based_megatron.parallel.topology import Topology, build_topology
from support.pool import rank_device

HIDDEN, TOKENS = 8, 6


def setup(sequence_parallel: bool) -> tuple[Topology, Any]:
    parallel = ParallelConfig(tensor=dist.get_world_size(), sequence_parallel=sequence_parallel)
    model = ModelConfig(layer_pattern="c", hidden_size=HIDDEN, ffn_hidden_size=8, num_heads=2)
    config = based_config(model, parallel, dtype=torch.float64, backend="reference", recompute="none")
    return build_topology(parallel, rank_device(dist.get_rank())), config


def load_full(layer: nn.Module, topology: Topology) -> dict[str, Tensor]:
    """Fill a layer from unsharded draws, and return these."""
    attach_shard_specs(layer, topology.tensor.group)
    full = {}
    for name, parameter in layer.named_parameters():
        generator = torch.Generator().manual_seed(len(name))
        full[name] = torch.randn(shard_spec(parameter).shape, dtype=torch.float64, generator=generator)
        parameter.data.copy_(shard_spec(parameter).cut(full[name]))
        full[name].requires_grad_()
    return full


def gradient_gaps(layer: nn.Module, full: dict[str, Tensor]) -> list[float]:
    """Errors of this rank's gradients against its part of the unsharded ones."""
    gaps = []
    for name, parameter in layer.named_parameters():
        expected = full[name].grad
        assert parameter.grad is not None and expected is not None
        gaps.append(float((parameter.grad - shard_spec(parameter).cut(expected)).abs().max()))
    return gaps


def seeded(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@megatron_runs()
def column_then_row(sequence_parallel: bool) -> dict[str, float]:
    """[a | b] = column(x), row(a * b): errors of the output and of all gradients against unsharded matrices."""
    topology, config = setup(sequence_parallel)
    group = topology.tensor.group
    first = column_linear(config, (4, 4), bias=True, group=group)
    second = row_linear(config, 4, bias=True, group=group)
    full1, full2 = load_full(first, topology), load_full(second, topology)
    x_full = seeded(TOKENS, 1, HIDDEN).requires_grad_()
    a, b = functional.linear(x_full, full1["weight"], full1["bias"]).chunk(2, dim=-1)
    expected = functional.linear(a * b, full2["weight"], full2["bias"])
    (expected * expected).sum().backward()

    part = slice(None)
    if sequence_parallel:
        share = TOKENS // topology.tensor.size
        part = slice(topology.tensor.rank * share, (topology.tensor.rank + 1) * share)
    x = x_full.detach()[part].clone().requires_grad_()
    a, b = first(x)[0].chunk(2, dim=-1)
    output, loose_bias = second(a * b)
    (output * output).sum().backward()
    assert loose_bias is None and x_full.grad is not None and x.grad is not None
    if sequence_parallel:
        # The bias of the row layer is added to this rank's tokens only: the step sums its gradient over the ranks.
        assert second.bias.sequence_parallel
        dist.all_reduce(second.bias.grad, group=group)
    return {
        "output": float((output - expected[part]).abs().max()),
        "input gradient": float((x.grad - x_full.grad[part]).abs().max()),
        "weight gradients": max(gradient_gaps(first, full1) + gradient_gaps(second, full2)),
    }


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_fused_column_and_row_layers_equal_whole_matrices(worker_pool, sequence_parallel):
    """They would differ with an odd order of parts, [a_0 b_0 | a_1 b_1], or with the bias added on both ranks."""
    for errors in worker_pool(2).run(column_then_row, sequence_parallel):
        assert all(error < 1e-12 for error in errors.values()), errors


@megatron_runs()
def padded_embedding(sequence_parallel: bool) -> tuple[float, float, ShardSpec, list[float]]:
    """Lookup of 7 rows over two ranks of 4: (output error, gradient error, spec, rank's padding rows)."""
    topology, config = setup(sequence_parallel)
    layer = vocab_embedding(config, 7, topology.tensor.group)
    full = load_full(layer, topology)["weight"]
    tokens = torch.tensor([[0, 3, 4, 6, 6, 1]])
    expected = functional.embedding(tokens, full)
    (expected * expected).sum().backward()
    output = layer(tokens)
    if sequence_parallel:
        # Megatron cuts the sequence itself, and puts it first.
        expected = expected.transpose(0, 1).chunk(2)[topology.tensor.rank]
    (output * output).sum().backward()
    assert full.grad is not None
    spec = shard_spec(layer.weight)
    padding = layer.weight[3].tolist() if topology.tensor.rank == 1 else []
    return (
        float((output - expected).abs().max()),
        float((layer.weight.grad - spec.cut(full.grad)).abs().max()),
        spec,
        padding,
    )


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_a_padded_embedding_looks_up_its_rows(worker_pool, sequence_parallel):
    results = worker_pool(2).run(padded_embedding, sequence_parallel)
    for rank, (output, gradient, spec, _) in enumerate(results):
        assert output < 1e-12 and gradient < 1e-12
        assert spec == ShardSpec("weight", (7, HIDDEN), 0, (7,), rank, 2, VOCAB_MULTIPLE)
    assert results[1][3] == [0.0] * HIDDEN


def specs_of_layers() -> dict[str, ShardSpec]:
    topology, config = setup(True)
    group = topology.tensor.group
    module = nn.ModuleDict(
        {
            "column": column_linear(config, (6, 2), bias=True, group=group),
            "row": row_linear(config, 4, bias=True, group=group),
            "taps": nn.ParameterList([shard_parameter(nn.Parameter(torch.zeros(3, 2)), dim=0)]),
            "weightless": column_linear(config, (6,), bias=False, group=group, allocate=False),
        }
    )
    attach_shard_specs(module, group)
    return {name: shard_spec(parameter) for name, parameter in module.named_parameters()}


def test_every_parameter_knows_its_place(worker_pool):
    for rank, specs in enumerate(worker_pool(2).run(specs_of_layers)):
        assert specs == {
            "column.weight": ShardSpec("column.weight", (8, HIDDEN), 0, (6, 2), rank, 2),
            "column.bias": ShardSpec("column.bias", (8,), 0, (6, 2), rank, 2),
            "row.weight": ShardSpec("row.weight", (HIDDEN, 4), 1, (4,), rank, 2),
            "row.bias": ShardSpec("row.bias", (HIDDEN,), None, (), rank, 2),
            "taps.0": ShardSpec("taps.0", (6, 2), 0, (6,), rank, 2),
        }


def parts_that_do_not_fit() -> str:
    topology, config = setup(True)
    layer = column_linear(config, (5, 3), bias=False, group=topology.tensor.group)
    try:
        attach_shard_specs(layer, topology.tensor.group)
    except AssertionError as error:
        return str(error)
    return ""


def test_parts_that_do_not_divide_are_a_bug(worker_pool):
    """[5 | 3] over two ranks is not [3 | 2] and [2 | 1]: the matrix of 8 rows would be cut in the middle of a part."""
    assert all("does not fit" in text for text in worker_pool(2).run(parts_that_do_not_fit))


def test_parameters_are_found_by_their_marks():
    marked, plain = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    marked.sequence_parallel = marked.tied_copy = True  # type: ignore[attr-defined]
    plain.sequence_parallel = False  # type: ignore[attr-defined]
    assert [p is marked for p in grouped_by([marked, plain], "sequence_parallel")] == [True]
    assert is_tied_copy(marked) and not is_tied_copy(plain)
