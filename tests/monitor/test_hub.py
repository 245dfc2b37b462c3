"""The metrics hub: what becomes of values over records, ranks and log points."""

import math
from typing import Any

import pytest
import torch

from based_megatron.config import ParallelConfig
from based_megatron.monitor.hub import Metrics, build_metrics
from support.layouts import topology_of

PARTS = [torch.tensor([3.0, -4.0]), torch.tensor([1.0, 2.0, 2.0])]
WHOLE = torch.cat(PARTS)


def alone() -> Metrics:
    return Metrics(torch.device("cpu"))


@pytest.mark.parametrize(
    ("reduce", "of_part", "expected"),
    [
        ("mean", torch.mean, WHOLE.mean()),
        ("rms", lambda x: x.square().mean().sqrt(), WHOLE.square().mean().sqrt()),
        ("sum", torch.sum, WHOLE.sum()),
        ("norm", torch.linalg.vector_norm, torch.linalg.vector_norm(WHOLE)),
        ("max", torch.max, WHOLE.max()),
        ("min", torch.min, WHOLE.min()),
        ("last", torch.max, PARTS[1].max()),
    ],
)
def test_values_of_parts_become_that_of_the_whole(reduce, of_part, expected):
    metrics = alone()
    for part in PARTS:
        metrics.record("x", of_part(part), reduce, count=len(part))
    assert metrics.collect() == {"x": pytest.approx(float(expected), rel=1e-6)}


def test_numbers_and_scalars_mix():
    metrics = alone()
    metrics.record("x", 2)
    metrics.record("x", torch.tensor(4.0, dtype=torch.bfloat16))
    metrics.record("x", torch.tensor(6, dtype=torch.int64))
    assert metrics.collect() == {"x": 4.0}


def test_each_log_point_starts_over():
    metrics = alone()
    metrics.record("x", 2.0)
    metrics.record("y", 2.0, "max")
    metrics.collect()
    metrics.record("x", 3.0)
    assert metrics.collect() == {"x": 3.0} and metrics.collect() == {}


@pytest.mark.parametrize(
    ("reduce", "bad", "expected"),
    [
        ("max", math.nan, math.inf),
        ("min", math.nan, -math.inf),
        ("max", math.inf, math.inf),
        ("min", -math.inf, -math.inf),
    ],
)
def test_an_extreme_that_is_not_finite_is_not_lost(reduce, bad, expected):
    metrics = alone()
    for value in (1.0, bad, 2.0):
        metrics.record("x", value, reduce)
    assert metrics.collect() == {"x": expected}


@pytest.mark.parametrize("reduce", ["mean", "rms", "sum", "norm", "last"])
def test_a_nan_is_reported_as_it_is(reduce):
    metrics = alone()
    for value in (1.0, math.nan):
        metrics.record("x", value, reduce)
    assert math.isnan(metrics.collect()["x"])


def test_gradients_are_not_kept():
    x = torch.ones((), requires_grad=True)
    metrics = alone()
    metrics.record("x", x * 2)
    assert metrics.collect() == {"x": 2.0}


def test_a_metric_has_one_reduction():
    metrics = alone()
    metrics.record("x", 1.0)
    with pytest.raises(AssertionError, match="x is recorded as mean and as sum"):
        metrics.record("x", 1.0, "sum")


def over_ranks(parallel: ParallelConfig) -> list[dict[str, float]]:
    """Two log points. Values depend on the place of a rank where its part is its own, and are equal where it is a copy."""
    topology = topology_of(parallel)
    metrics = build_metrics(topology)
    place, stage = topology.data_context.rank, topology.pipeline.rank
    metrics.record("world_sum", topology.rank + 1.0, "sum")
    metrics.record("world_norm", topology.rank + 1.0, "norm")
    metrics.record("batch_sum", place + 1.0, "sum", group="data_context")
    metrics.record(f"stage_{stage}_sum", place + 1.0, "sum", group="layer")
    metrics.record("mean", 10.0 * place, count=place + 1)
    metrics.record("slowest", topology.rank, "max")
    metrics.record("fastest", topology.rank, "min")
    metrics.record("last", 5.0, "last")
    if topology.rank == 1:
        metrics.record("only_on_one", 7.0)
    points = [metrics.collect()]
    if topology.rank == 0:
        metrics.record("only_on_the_other", 8.0, "min")
    metrics.record("slowest", topology.rank, "max")
    return [*points, metrics.collect()]


@pytest.mark.parametrize(
    ("parallel", "places", "stages"),
    [
        (ParallelConfig(tensor=2), 1, 1),
        (ParallelConfig(pipeline=2), 1, 2),
        (ParallelConfig(context=2), 2, 1),
        (ParallelConfig(), 2, 1),
    ],
)
def test_every_rank_knows_the_values_of_all(worker_pool, parallel, places, stages):
    per_batch = float(sum(range(1, places + 1)))
    first = {
        "world_sum": 3.0,
        "world_norm": pytest.approx(math.sqrt(5)),
        "batch_sum": per_batch,
        **{f"stage_{stage}_sum": per_batch for stage in range(stages)},
        "mean": pytest.approx(20 / 3) if places == 2 else 0.0,
        "slowest": 1.0,
        "fastest": 0.0,
        "last": 5.0,
        "only_on_one": 7.0,
    }
    results: list[Any] = worker_pool(2).run(over_ranks, parallel)
    assert results == [[first, {"only_on_the_other": 8.0, "slowest": 1.0}]] * 2
    assert list(results[0][0]) == sorted(first)


def collectives(count: int) -> list[str]:
    """The collectives of a log point with so many metrics, after one that has made their names known."""
    calls: list[str] = []
    metrics = build_metrics(topology_of())
    with pytest.MonkeyPatch.context() as patch:
        for _ in range(2):
            for i in range(count):
                metrics.record(f"mean {i}", 1.0)
                metrics.record(f"max {i}", 1.0, "max")
            calls.clear()
            for name in ("all_reduce", "all_gather_object"):
                real = getattr(torch.distributed, name)
                patch.setattr(
                    torch.distributed, name, lambda *a, real=real, name=name, **k: (calls.append(name), real(*a, **k))
                )
            metrics.collect()
            patch.undo()
    return calls


def test_a_log_point_costs_two_collectives(worker_pool):
    assert worker_pool(2).run(collectives, 50) == [["all_reduce", "all_reduce"]] * 2
